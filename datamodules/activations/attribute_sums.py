"""Activations that are a sum of one vector for each attribute, so that the right dictionary is known."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_methods.checks import at_least
from lit_methods.datamodules.base import Batches, Ints, LoaderDataModule

VALUES = {"io": 20, "s": 20, "pos": 2}


class Rows(Batches):
    """Rows of several tensors that lie in memory.

    Args:
        tensors: Name -> (N, ...).
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def batch(self, epochs: Ints, index: Ints) -> dict[str, Tensor]:
        """The chosen rows of each tensor."""
        chosen = torch.from_numpy(index)
        return {name: tensor[chosen] for name, tensor in self.tensors.items()}


class CodeReadout(nn.Module):
    """A subject model that tells each attribute's value from an activation: the code nearest to what is left without the other codes.

    Args:
        codes: Attribute -> (U, d) codes that it looks for.
    """

    def __init__(self, codes: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.names = list(codes)
        self.codes = nn.ParameterList([nn.Parameter(code, requires_grad=False) for code in codes.values()])

    def forward(self, activation: Tensor, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Attribute -> (B, U) logits: minus half the squared distance to each code, without what all codes share.

        Args:
            activation: (B, d).
            batch: With the (B,) values of the attributes, which say what the other codes are.
        """
        parts = [code[batch[name]] for name, code in zip(self.names, self.codes, strict=True)]
        rest = activation - torch.stack(parts).sum(0)
        return {
            name: (rest + part) @ code.T - code.square().sum(1) / 2 for name, part, code in zip(self.names, parts, self.codes, strict=True)
        }


class AttributeSumsDataModule(LoaderDataModule):
    """Activations a = sum over attributes of m_i E_i[value of i] + noise, with unit codes E_i in random directions.

    Batch: {"activation": (B, d) float32, "io": (B,) int64, "s": (B,) int64, "pos": (B,) int64}

    Values are independent and equally likely. Two attributes of different magnitude m_i show occlusion: an autoencoder gives features to
    the larger one. ``scaled`` divides all activations by mean |a| / sqrt(d) of the training part, so that their mean length is sqrt(d).
    The names in the batch are those in ``values``. Codes, training and validation part follow from ``seed``; test is the validation part.

    Args:
        values: Attribute -> number of its values; null: io 20, s 20, pos 2.
        magnitudes: Attribute -> length of its codes; 1 for those left out.
        dims: d.
        noise: Root mean square length of the noise; each of its numbers has the standard deviation noise / sqrt(d).
        scaled: Divide by the scale of the training part.
        num_train: Training activations.
        num_val: Validation activations.
        batch_size: Activations per process and step.
        eval_batch_size: Activations per process and evaluation step; null: ``batch_size``.
        num_workers: Processes that read data; the activations lie in memory, so 0 is fastest.
        seed: Seed of codes, values, noise and order.

    Attributes:
        scale: What activations were divided by, after ``setup``.
        subject: A :class:`CodeReadout` of the true codes, after ``setup``.

    Raises:
        ValueError: A number lies outside its range, or a magnitude has no attribute.
    """

    scale = 1.0
    subject: CodeReadout | None = None

    def __init__(
        self,
        values: dict[str, int] | None = None,
        magnitudes: dict[str, float] | None = None,
        dims: int = 64,
        noise: float = 0.3,
        scaled: bool = True,
        num_train: int = 4000,
        num_val: int = 2000,
        batch_size: int = 512,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, eval_batch_size=eval_batch_size, num_workers=num_workers, seed=seed)
        self.values, self.magnitudes = dict(values or VALUES), dict(magnitudes or {})
        at_least(1, dims=dims, num_train=num_train, num_val=num_val, **self.values)
        at_least(0, noise=noise, **self.magnitudes)
        if unknown := sorted(self.magnitudes.keys() - self.values.keys()):
            raise ValueError(f"magnitudes has {unknown}, but the attributes are {list(self.values)}: name them in values, too")
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        """Draw codes and activations."""
        if self.train_set is not None:
            return
        hp, generator = self.hparams, torch.Generator().manual_seed(self.seed)
        dims, sizes = hp["dims"], (hp["num_train"], hp["num_val"])
        codes = {
            name: self.magnitudes.get(name, 1.0) * F.normalize(torch.randn(number, dims, generator=generator), dim=1)
            for name, number in self.values.items()
        }
        parts: list[dict[str, Tensor]] = []
        for size in sizes:
            ids = {name: torch.randint(number, (size,), generator=generator) for name, number in self.values.items()}
            noise = torch.randn(size, dims, generator=generator) * (hp["noise"] / dims**0.5)
            parts.append({"activation": noise + torch.stack([codes[name][one] for name, one in ids.items()]).sum(0), **ids})
        self.scale = float(parts[0]["activation"].norm(dim=1).mean()) / dims**0.5 if hp["scaled"] else 1.0
        for part in parts:
            part["activation"] /= self.scale
        self.subject = CodeReadout({name: code / self.scale for name, code in codes.items()})
        self.train_set, self.val_set = (Rows(part) for part in parts)
        self.test_set = self.val_set


__all__ = ["AttributeSumsDataModule", "CodeReadout", "Rows"]
