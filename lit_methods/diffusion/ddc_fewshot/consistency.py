"""What keeps an adapted generator near its source, in features of a frozen network: for DDC's module, its callback, or one's own loop."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn

from lit_methods.datamodules.reading import finite, read_npy
from lit_methods.diffusion.ddc_fewshot.core import (
    cosine_distance,
    ddc_distance,
    domain_direction,
    gram_distance,
    gram_matrix,
    pairwise_divergence,
    widened,
)
from lit_methods.distributed import sum_over_ranks
from lit_methods.frozen import Frozen
from lit_methods.hub import leave_out


def _as_wanted(network: nn.Module, samples: Tensor) -> Tensor:
    """Samples in the dtype of a network's weights; float32 or wider, if it has none."""
    weight = next(network.parameters(), None)
    return widened(samples) if weight is None else samples.to(weight.dtype)


class FeatureConsistency(nn.Module):
    """Base of losses that compare features of generated samples with those of the samples they were generated from.

    Saves: nothing; the network is :class:`~lit_methods.frozen.Frozen`.

    Args:
        features: Samples (B, ...), images in [-1, 1] -> features (B, D). It is frozen, and gradients pass. None: samples are features.
    """

    needs_banks = False

    def __init__(self, features: nn.Module | None = None) -> None:
        super().__init__()
        self.features = Frozen(nn.Flatten() if features is None else features)

    def embed(self, samples: Tensor) -> Tensor:
        """Features (B, D) float32 or wider of samples, with gradient, outside autocast."""
        with torch.autocast(samples.device.type, enabled=False):
            found: Tensor = widened(self.features.module(_as_wanted(self.features.module, samples)))
        if found.ndim != 2 or len(found) != len(samples):
            kind = type(self.features.module).__name__
            raise ValueError(
                f"{kind} makes {tuple(found.shape)} of {tuple(samples.shape)}: give a network with one row of features a sample"
            )
        return found

    def forward(self, generated: Tensor, source: Tensor) -> Tensor:
        """Features (B, D) of generated samples and of their sources -> (B,)."""
        raise NotImplementedError


class PairwiseSimilarity(FeatureConsistency):
    """Cross-domain correspondence (arXiv:2104.06820): samples should be as like each other as their sources are. A baseline of DDC.

    KL of the softmax over a sample's cosines with the others of its batch; a batch needs three samples to say anything.

    Saves: nothing.

    Args:
        features: Samples (B, ...), images in [-1, 1] -> features (B, D); None: samples are features.
    """

    def forward(self, generated: Tensor, source: Tensor) -> Tensor:
        """Features (B, D) of generated samples and of their sources -> (B,)."""
        return pairwise_divergence(generated, source)


class _Directional(FeatureConsistency):
    """Base of losses that know the direction between the means of two domains.

    Args:
        features: Samples (B, ...), images in [-1, 1] -> features (B, D); None: samples are features.
        source_bank: File ``.npy`` with features (N, D) of all source samples; None: they are computed.
        target_bank: The same of the target samples.
    """

    needs_banks = True

    def __init__(self, features: nn.Module | None = None, source_bank: Path | None = None, target_bank: Path | None = None) -> None:
        super().__init__(features)
        self.mu_source: Tensor
        self.mu_target: Tensor
        for name, bank in (("mu_source", source_bank), ("mu_target", target_bank)):
            self.register_buffer(name, torch.zeros(0) if bank is None else _bank_mean(Path(bank), f"{name[3:]}_bank"))
        self.given = {name for name in ("mu_source", "mu_target") if getattr(self, name).numel()}
        self._check_width()

    @property
    def fitted(self) -> bool:
        """Whether both means are known."""
        return bool(self.mu_source.numel() and self.mu_target.numel())

    @property
    def direction(self) -> Tensor:
        """Direction d between the domains, (1, D)."""
        if not self.fitted:
            raise ValueError(f"{type(self).__name__} doesn't know the means of both domains yet: call fit(bank_a, bank_b) first")
        return domain_direction(self.mu_source, self.mu_target)

    def fit(self, bank_a: Tensor, bank_b: Tensor) -> None:
        """Take the means of all source and all target features.

        Args:
            bank_a: (N, D) features of the source, those of this process; sums and counts of all processes are joined.
            bank_b: (M, D) of the target.

        Raises:
            ValueError: A bank is empty, or the widths differ.
        """
        self._set({"mu_source": [bank_a], "mu_target": [bank_b]})
        self.given = {"mu_source", "mu_target"}

    @torch.no_grad()
    def fit_samples(self, source: Iterable[Any], target: Iterable[Any]) -> None:
        """Take the means of all source and all target samples' features; those from files, or that :meth:`fit` was given, stay.

        Args:
            source: Batches with ``image``, those of this process.
            target: As ``source``.

        Raises:
            ValueError: A bank is empty, or the widths differ.
        """
        device = self.mu_source.device
        banks = {"mu_source": source, "mu_target": target}
        self._set(
            {
                name: (self.embed(batch["image"].to(device)) for batch in batches)
                for name, batches in banks.items()
                if name not in self.given
            }
        )

    def _set(self, banks: dict[str, Any]) -> None:
        for name, parts in banks.items():
            total: Tensor | None = None
            count = 0
            for part in parts:
                if part.ndim != 2:
                    raise ValueError(f"features of the {name[3:]} are {tuple(part.shape)}: expected (N, D)")
                added = part.detach().double().sum(0)
                total, count = added if total is None else total + added, count + len(part)
            if total is None or not count:
                raise ValueError(f"the {name[3:]} has no samples, so there is no direction between the domains: give at least one")
            joined = sum_over_ranks(torch.cat([total, total.new_tensor([count])]))
            setattr(self, name, (joined[:-1] / joined[-1]).to(part.dtype))
        self._check_width()

    def _check_width(self) -> None:
        if self.fitted and self.mu_source.shape != self.mu_target.shape:
            raise ValueError(
                f"source features have {self.mu_source.numel()} entries and target features {self.mu_target.numel()}: "
                "give banks of the same network"
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("mu_source", "mu_target"):  # of whatever width the saved ones are
            if isinstance(saved := state_dict.get(prefix + name), Tensor) and saved.shape != getattr(self, name).shape:
                setattr(self, name, torch.zeros_like(saved, device=getattr(self, name).device))
        super()._load_from_state_dict(state_dict, prefix, *args)


class DirectionalDistributionConsistency(_Directional):
    """DDC: the features of a generated sample are to be those of its source, moved by the direction between the two domains' means.

    mean over D of (f_G - (f_A + d))^2, d = mean target - mean source: the whole distribution moves by one vector, and nothing turns.

    Saves: both means, ``mu_source`` and ``mu_target``.

    Args:
        features: Samples (B, ...), images in [-1, 1] -> features (B, D); None: samples are features.
        source_bank: File ``.npy`` with features (N, D) of all source samples; None: they are computed.
        target_bank: The same of the target samples.

    Raises:
        ValueError: A file holds something else.
    """

    def forward(self, generated: Tensor, source: Tensor) -> Tensor:
        """Features (B, D) of generated samples and of their sources -> (B,)."""
        return ddc_distance(generated, source, self.direction)


class DirectionalCosine(_Directional):
    """The directional loss of StyleGAN-NADA (arXiv:2108.00946): 1 - cos(f_G - f_A, d). A baseline of DDC.

    Saves: both means, ``mu_source`` and ``mu_target``.

    Args:
        features: Samples (B, ...), images in [-1, 1] -> features (B, D); None: samples are features.
        source_bank: File ``.npy`` with features (N, D) of all source samples; None: they are computed.
        target_bank: The same of the target samples.

    Raises:
        ValueError: A file holds something else.
    """

    def forward(self, generated: Tensor, source: Tensor) -> Tensor:
        """Features (B, D) of generated samples and of their sources -> (B,)."""
        return cosine_distance(generated, source, self.direction)


def _bank_mean(path: Path, argument: str) -> Tensor:
    if leave_out(f"{argument}={str(path)!r}", path):
        return torch.zeros(0)
    features = read_npy(path.expanduser(), argument, "give a file of features (N, D), or null to compute them", kinds="f")
    if features.ndim != 2 or not len(features):
        raise ValueError(f"{argument}={str(path)!r} holds {features.shape}: expected features (N, D), N >= 1")
    return torch.from_numpy(finite(features.mean(0, dtype=np.float64), path, argument)).float()


class GramStyle(nn.Module):
    """Style of images: Gram matrices of a frozen network's feature maps, against those of all target images.

    The mean over target images s of the Gram distance to s is the distance to their mean Gram matrix plus how far they lie from it; both
    are found once.

    Saves: nothing; the network is :class:`~lit_methods.frozen.Frozen`.

    Args:
        network: Images (B, C, H, W) in [-1, 1] -> list of maps (B, D, h, w), by its method ``maps`` if it has one.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = Frozen(network)
        self.mean: list[Tensor] = []
        self.spread: Tensor | None = None

    def grams(self, images: Tensor) -> list[Tensor]:
        """One (B, D, D) float32 or wider for each layer, with gradient."""
        network: Any = self.network.module
        with torch.autocast(images.device.type, enabled=False):
            wanted = _as_wanted(network, images)
            maps = network.maps(wanted) if hasattr(network, "maps") else network(wanted)
        if isinstance(maps, Tensor) or any(layer.ndim != 4 for layer in maps):
            raise ValueError(f"{type(network).__name__} gives no list of feature maps (B, D, h, w): use VGGMaps or a network with maps()")
        return [gram_matrix(layer) for layer in maps]

    @torch.no_grad()
    def fit_samples(self, target: Iterable[Any], device: torch.device) -> None:
        """Look at all target images; every process sees all of them.

        Args:
            target: Batches with ``image``.
            device: Where the network is.

        Raises:
            ValueError: There is no image.
        """
        found = [self.grams(batch["image"].to(device)) for batch in target]
        if not found:
            raise ValueError("the target has no images, so there is no style: give at least one")
        layers = [torch.cat(parts) for parts in zip(*found, strict=True)]
        self.mean = [layer.mean(0, keepdim=True) for layer in layers]
        self.spread = gram_distance(layers, self.mean).mean()

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [-1, 1] -> (B,)."""
        if self.spread is None:
            raise ValueError("GramStyle hasn't seen the target images yet: call fit_samples first")
        return gram_distance(self.grams(images), self.mean) + self.spread


def fit_banks(trainer: pl.Trainer, consistency: nn.Module | None, style: GramStyle | None, device: torch.device) -> None:
    """At the start of a training: mean features of both domains, and the style of the target; every process calls it.

    A resumed run keeps the means of its checkpoint.

    Args:
        trainer: Its datamodule's ``banks()`` gives loaders ``source`` and ``target`` of batches with ``image``.
        consistency: A loss that may need means; None: none.
        style: None: none.
        device: Where the networks are.

    Raises:
        ValueError: Something is needed, and the datamodule has no ``banks()``.
    """
    wants_means = isinstance(consistency, _Directional) and len(consistency.given) < 2 and not (trainer.global_step and consistency.fitted)
    if not wants_means and style is None:
        return
    datamodule: Any = getattr(trainer, "datamodule", None)
    if not hasattr(datamodule, "banks"):
        lacking = [type(part).__name__ for part, lacks in ((consistency, wants_means), (style, style and style.spread is None)) if lacks]
        if not lacking:
            return
        kind = "no datamodule" if datamodule is None else f"{type(datamodule).__name__} without banks()"
        raise ValueError(
            f"{' and '.join(lacking)} must see all images of both domains, and the trainer has {kind}: use FewShotFoldersDataModule, give "
            "yours a method banks() -> {'source': loader, 'target': loader} of batches with 'image', or call fit or fit_samples before"
        )
    banks = datamodule.banks()
    if isinstance(consistency, _Directional) and wants_means:
        consistency.fit_samples(banks["source"], banks["target"])
    if style is not None:
        style.fit_samples(banks["target"], device)


__all__ = ["DirectionalCosine", "DirectionalDistributionConsistency", "FeatureConsistency", "GramStyle", "PairwiseSimilarity", "fit_banks"]
