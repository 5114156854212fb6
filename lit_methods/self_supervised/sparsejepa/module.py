"""SparseJEPA as a LightningModule: I-JEPA, a grouped autoencoder of its embeddings, and the group lasso on that one's maps.

Maths, paper and origin: :mod:`~lit_methods.self_supervised.sparsejepa.core`.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from lit_methods import checks, distributed
from lit_methods.arguments import handed_on
from lit_methods.callbacks.sparsity.group_sparsity import GroupSparsity, Mode, group_norms
from lit_methods.catalog import Technique
from lit_methods.evaluated import Part
from lit_methods.panels import Curve, ImageMedia, ImagePanel, Media, Panel
from lit_methods.seeds import seeded_noise
from lit_methods.self_supervised.ijepa import IJEPA
from lit_methods.self_supervised.jepa import Distance
from lit_methods.self_supervised.sparsejepa.core import multi_information, sparse_terms
from lit_methods.self_supervised.sparsejepa.networks import GroupedAutoencoder
from lit_methods.steps import log_global

TECHNIQUE = Technique(
    slug="sparsejepa",
    title="SparseJEPA: Sparse Representation Learning of Joint Embedding Predictive Architectures",
    arxiv="2504.16140",
    family="self_supervised",
    form="module",
    classes=("lit_methods.SparseJEPA", "lit_methods.IJEPA", "lit_methods.ViTEncoder", "lit_methods.callbacks.GroupSparsity"),
    configs=("sparsejepa.yaml", "ijepa.yaml"),
    golden=("jepa_loss", "predictor_forward", "block_size", "schedules", "group_penalty", "position_embedding"),
    claim="On drawn shapes, a linear classifier is more accurate on the features of SparseJEPA than on those of I-JEPA.",
    summary="I-JEPA whose embeddings are explained by latents, each tied to few groups of their numbers by a group lasso.",
)

Embedding = Literal["mean", "tokens"]


class _MapSparsity(GroupSparsity):
    """The module's own: it goes together with a ``GroupSparsity`` of the user, and the module shows what it does."""

    prefix = "sparsejepa"
    panels: ClassVar[tuple[Panel, ...]] = ()

    def dashboard_media(self) -> dict[str, Media]:
        """Nothing: see the module's panels."""
        return {}


class SparseJEPA(IJEPA):
    """I-JEPA with latents that explain groups of the embedding's numbers, each latent as few groups as it can.

    The encoder's embedding e, cut into G groups of numbers, is explained by K latents z ~ q(z | e) through generators, one for each group:
    e_hat^(g) = f_g(W^(g) z). The loss is L_JEPA + ``sparse_weight`` (|e - e_hat|^2 + ``kl_weight`` KL(q || N(0, I))), and ``sparsity``
    times the sum of the norms of all columns of all W^(g) is kept small by a :class:`~lit_methods.callbacks.GroupSparsity`, which this
    module brings along: with mode ``proximal`` columns become exactly 0, so that a latent has nothing to do with a group.
    Gradients flow into the encoder, not into the target encoder.

    Runs: as :class:`IJEPA`. The latents' noise follows from ``seed``, step, batch and rank. After validation the multi-information of the
    latents of whole images is logged, a Gaussian estimate in nats, over all ranks.

    Saves: what :class:`IJEPA` saves, and the grouped autoencoder.

    Refuses: what :class:`IJEPA` refuses, strategies that shard weights, and an encoder whose width isn't a multiple of ``groups``.

    Args:
        encoder: ``encoder(images, masks)`` -> tokens, with ``grid``, ``width`` and ``heads``, such as ``ViTEncoder``.
        groups: G, groups of the embedding's numbers, which lie side by side.
        latents: K.
        map_width: p, numbers that a map W^(g) puts out.
        embedding: What is explained: ``mean`` of the context's tokens, or each of these ``tokens``.
        sparse_weight: Factor of reconstruction and divergence, >= 0.
        kl_weight: Factor of the divergence therein, >= 0.
        sparsity: Lambda, factor of the group lasso, >= 0; 0: without.
        mode: ``proximal``: exact zeros. ``penalty``: its gradient joins the others', without exact zeros.
        prox_step: Step size of the proximal step; None: the learning rate of the step.
        predictor_width: Numbers in a token of the predictor.
        predictor_depth: Blocks of the predictor.
        predictor_heads: Its heads of attention; None: as many as the encoder's.
        target_blocks: Blocks to predict in each image.
        target_scale: Their smallest and largest area, as a share of the image.
        target_aspect: Their smallest and largest height / width.
        context_scale: Smallest and largest area of the context's block, as a share of the image.
        min_keep: Patches that a context has more than.
        distance: ``smooth_l1``, as in I-JEPA's code, or ``mse``, as in its text.
        momentum: Of the target encoder, at the first step.
        learning_rate: The highest, at the end of the warm-up.
        start_learning_rate: Learning rate that the warm-up begins at.
        final_learning_rate: Learning rate of the last step.
        warmup_epochs: Epochs of linear rise; may be a fraction.
        weight_decay: AdamW's weight decay at the start; the maps W^(g) have none.
        final_weight_decay: And at the end, along half a cosine.
        total_steps: Optimiser steps over which the schedules go; None: the length of the training.
        seed: Seed of masks and latents.

    Raises:
        ValueError: An argument outside its range, or an encoder that doesn't fit.
    """

    panels: ClassVar[tuple[Panel, ...]] = (
        ImagePanel("Norms of the maps' columns", "sparsejepa/maps", note="Rows: groups. Columns: latents. Black: exactly 0."),
        *IJEPA.panels,
        Curve("Columns that are exactly 0", ("sparsejepa/zero_groups",), note="Share of all columns, one for each group and latent."),
        Curve("Sum of the columns' norms", ("sparsejepa/penalty",)),
        Curve("Explaining the embedding", ("sparsejepa/reconstruction", "sparsejepa/kl"), note="Sums over its numbers, and over latents."),
        Curve("Multi-information of the latents", ("sparsejepa/val_multi_information",), note="Nats; 0: they tell nothing of each other."),
    )

    def __init__(
        self,
        encoder: nn.Module,
        groups: int = 8,
        latents: int = 16,
        map_width: int = 8,
        embedding: Embedding = "mean",
        sparse_weight: float = 1.0,
        kl_weight: float = 1.0,
        sparsity: float = 1.0,
        mode: Mode = "proximal",
        prox_step: float | None = None,
        predictor_width: int = 384,
        predictor_depth: int = 12,
        predictor_heads: int | None = None,
        target_blocks: int = 4,
        target_scale: tuple[float, float] = (0.15, 0.2),
        target_aspect: tuple[float, float] = (0.75, 1.5),
        context_scale: tuple[float, float] = (0.85, 1.0),
        min_keep: int = 10,
        distance: Distance = "smooth_l1",
        momentum: float = 0.996,
        learning_rate: float = 1e-3,
        start_learning_rate: float = 2e-4,
        final_learning_rate: float = 1e-6,
        warmup_epochs: float = 40,
        weight_decay: float = 0.04,
        final_weight_decay: float = 0.4,
        total_steps: int | None = None,
        seed: int = 0,
    ) -> None:
        checks.literals(SparseJEPA, locals())
        checks.at_least(1, groups=groups, latents=latents, map_width=map_width)
        checks.at_least(0, sparse_weight=sparse_weight, kl_weight=kl_weight, sparsity=sparsity, prox_step=prox_step)
        super().__init__(**handed_on(IJEPA, locals()))
        self.save_hyperparameters(ignore=["encoder"])
        self.sparse = GroupedAutoencoder(encoder.width, groups, latents, map_width)  # type: ignore[arg-type]
        self._samples: list[Tensor] = []  # latents of this evaluation's images

    def configure_callbacks(self) -> Sequence[Callback]:
        """The group lasso on the maps. Lightning puts it in the place of others of its kind, so those of the user come along."""
        hp, callbacks = self.hparams, self.trainer.callbacks  # type: ignore[attr-defined]
        own = _MapSparsity(["sparse.maps"], weight=hp["sparsity"], over=(-1,), mode=hp["mode"], step_size=hp["prox_step"])
        return [own, *(other for other in callbacks if isinstance(other, GroupSparsity) and not isinstance(other, _MapSparsity))]

    def undecayed(self, name: str, parameter: nn.Parameter) -> bool:
        """The group lasso takes the place of weight decay on the maps."""
        return super().undecayed(name, parameter) or name.startswith("sparse.maps.")

    def _noise(self, rows: int, place: str) -> Tensor:
        like = torch.empty(rows, self.hparams["latents"], device=self.device)
        return seeded_noise(f"SparseJEPA latents {place} on rank {distributed.rank()}", self.hparams["seed"], like)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Loss of a batch, without the group lasso."""
        hp, place = self.hparams, f"step {self.global_step} batch {batch_idx}"
        loss, tokens, features = self.prediction_loss(batch["image"], place)
        embedding = tokens.mean(1) if hp["embedding"] == "mean" else tokens.flatten(0, 1)
        reconstruction, mean, std = self.sparse(embedding, self._noise(len(embedding), place))
        terms = sparse_terms(embedding, reconstruction, mean, std)
        self.log_prediction(loss, features)
        parts = {f"sparsejepa/{name}": value.detach() for name, value in terms._asdict().items()}
        self.log_dict(parts, batch_size=len(features))
        return loss + hp["sparse_weight"] * (terms.reconstruction + hp["kl_weight"] * terms.kl)

    def _evaluate(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        super()._evaluate(batch, batch_idx)
        tokens = self.encoder(batch["image"])
        mean, std = self.sparse.encode(tokens.mean(1) if self.hparams["embedding"] == "mean" else tokens.flatten(0, 1))
        self._samples.append(mean.float() + std * self._noise(len(mean), f"evaluation batch {batch_idx}"))

    def _log_evaluation(self, part: Part) -> None:
        super()._log_evaluation(part)
        none = torch.empty(0, self.hparams["latents"], device=self.device)
        samples = distributed.gather_rows(torch.cat([none, *self._samples]), with_grad=False)
        self._samples = []
        if len(samples) > 1:
            log_global(self, {f"sparsejepa/{part}_multi_information": multi_information(samples).float()})

    def dashboard_media(self) -> dict[str, Media]:
        """The norms of the maps' columns as a picture."""
        norms = group_norms(self.sparse.maps.weight.detach(), (-1,)).cpu().numpy()
        grey = np.kron(255 * norms / max(float(norms.max()), 1e-12), np.ones((16, 16))).astype(np.uint8)
        alt = f"norms of {norms.shape[0]} groups times {norms.shape[1]} latents, {int((norms == 0).sum())} of them 0"
        return self._media | {"sparsejepa/maps": ImageMedia(np.repeat(grey[..., None], 3, axis=2), alt)}

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """As I-JEPA, and ``latent`` (B, K): the latents' means for whole images."""
        return super().predict_step(batch, batch_idx) | {"latent": self.sparse.encode(self.encoder(batch["image"]).mean(1))[0]}


__all__ = ["SparseJEPA"]
