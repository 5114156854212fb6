"""Draws of a Gaussian mixture whose flow is known exactly."""

import torch
from torch import Tensor

from lit_methods import checks
from lit_methods.datamodules.base import Batches, Ints, LoaderDataModule


def mixture_means(components: int, side: int, spread: float, seed: int) -> Tensor:
    """Means ``spread`` * N(0, 1) of a mixture's components: (components, 1, side, side) float64."""
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(components, 1, side, side, generator=generator, dtype=torch.float64)


class Indexed(Batches):
    """Images that lie in memory, with their numbers and names.

    Args:
        images: (N, C, H, W).
        first: Number of the first image.
        name: What names begin with.
    """

    def __init__(self, images: Tensor, first: int = 0, name: str = "image") -> None:
        self.images, self.first, self.name = images, first, name

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, epochs: Ints, index: Ints) -> dict[str, Tensor]:
        """Some of them."""
        chosen = torch.from_numpy(index)
        names = [f"{self.name}_{self.first + number:05d}" for number in index.tolist()]
        return {"image": self.images[chosen], "index": chosen + self.first, "name": names}  # type: ignore[dict-item]


class MixtureDataModule(LoaderDataModule):
    """Draws of a mixture of equally likely isotropic Gaussians, shaped like small images; the prior ``GaussianMixtureFlow`` knows its flow.

    Batch: {"image": (B, 1, S, S) float32, "index": (B,) int64, "name": list of B strings}

    Args:
        components: Gaussians.
        side: S; a sample has S x S coordinates.
        std: Standard deviation of each Gaussian in each coordinate.
        spread: Standard deviation of the means' coordinates.
        num_train: Draws for training.
        num_val: Draws for validation, which calibrates.
        num_test: Draws for testing and predicting.
        batch_size: Draws per process and step.
        eval_batch_size: Draws per process and evaluation step; null: ``batch_size``.
        num_workers: Processes that read data.
        seed: Seed of means and draws; the prior's must be the same.
    """

    def __init__(
        self,
        components: int = 6,
        side: int = 4,
        std: float = 0.15,
        spread: float = 1.5,
        num_train: int = 64,
        num_val: int = 512,
        num_test: int = 64,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed, eval_batch_size=eval_batch_size)
        checks.at_least(1, components=components, side=side, num_train=num_train, num_val=num_val, num_test=num_test)
        checks.positive(std=std, spread=spread)
        self.components, self.side, self.std, self.spread = components, side, std, spread
        self.numbers = (num_train, num_val, num_test)

    def setup(self, stage: str) -> None:
        """Draw."""
        if self.train_set is not None:
            return
        means = mixture_means(self.components, self.side, self.spread, self.seed)
        generator = torch.Generator().manual_seed(self.seed + 1_000_003)
        count = sum(self.numbers)
        chosen = torch.randint(self.components, (count,), generator=generator)
        draws = means[chosen] + self.std * torch.randn(count, *means.shape[1:], generator=generator, dtype=torch.float64)
        parts = draws.float().split(self.numbers)
        starts = (0, self.numbers[0], sum(self.numbers[:2]))
        self.train_set, self.val_set, self.test_set = (Indexed(part, first, "draw") for part, first in zip(parts, starts, strict=True))


__all__ = ["Indexed", "MixtureDataModule", "mixture_means"]
