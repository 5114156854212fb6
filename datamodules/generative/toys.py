"""Points in the plane whose distribution is known, for claims that take seconds."""

import math

import numpy as np
import torch
from torch import Tensor

from lit_methods.checks import at_least, positive, share, within
from lit_methods.datamodules.generative.base import GenerativeDataModule, Tensors


def ring(count: int, generator: torch.Generator, modes: int = 8, radius: float = 0.65, noise: float = 0.05) -> Tensor:
    """Points of ``modes`` Gaussians at equal distances on a circle around 0: (count, 2) float32.

    Args:
        count: Number of points.
        generator: CPU generator.
        modes: Number of Gaussians, all as likely.
        radius: Radius of the circle.
        noise: Standard deviation of each Gaussian in each coordinate.
    """
    angles = torch.randint(modes, (count,), generator=generator) * (2 * math.pi / modes)
    return radius * torch.stack([angles.cos(), angles.sin()], dim=1) + noise * torch.randn(count, 2, generator=generator)


class RingDataModule(GenerativeDataModule):
    """A ring of Gaussians in the plane; some of the training points may be thrown far away.

    Batch: {"image": (B, 2) float32}

    With the defaults the standard deviation of a coordinate is 0.46. Validation points are always clean.

    Args:
        num_train: Training points, drawn once.
        num_val: Validation points, drawn once, the same for every seed.
        modes: Number of Gaussians.
        radius: Radius of the circle.
        noise: Standard deviation of each Gaussian.
        impulses: Share of the training points that are thrown, in [0, 1]: an impulse is added to each.
        impulse_scale: Standard deviation of an impulse in each coordinate.
        batch_size: Points per process and step.
        val_batch_size: Points per process and validation step.
        num_samples: Samples that ``lit predict`` draws, at most ``num_val``.
        num_workers: Processes that read data; the points lie in memory, so 0 is fastest.
        seed: Seed of the training points and their order.

    Raises:
        ValueError: A number lies outside its range.
    """

    def __init__(
        self,
        num_train: int = 51200,
        num_val: int = 4000,
        modes: int = 8,
        radius: float = 0.65,
        noise: float = 0.05,
        impulses: float = 0.0,
        impulse_scale: float = 8.0,
        batch_size: int = 512,
        val_batch_size: int = 4000,
        num_samples: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, val_batch_size=val_batch_size, num_samples=num_samples, num_workers=num_workers, seed=seed)
        at_least(1, num_train=num_train, num_val=num_val, modes=modes)
        within("[0, inf)", radius=radius, noise=noise, impulse_scale=impulse_scale)
        share(impulses=impulses)
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        """Draw both sets."""
        if self.train_set is not None:
            return
        hp, generator = self.hparams, torch.Generator().manual_seed(self.seed)
        shape = (hp["modes"], hp["radius"], hp["noise"])
        points = ring(hp["num_train"], generator, *shape)
        thrown = torch.rand(len(points), 1, generator=generator) < hp["impulses"]
        points = points + thrown * hp["impulse_scale"] * torch.randn(points.shape, generator=generator)
        self.train_set = Tensors(points)
        self.val_set = Tensors(ring(hp["num_val"], torch.Generator().manual_seed(2**40), *shape))


def iris_flowers() -> Tensor:
    """Length and width of the petals of scikit-learn's 150 irises, each with mean 0 and standard deviation 1: (150, 2) float64."""
    from sklearn.datasets import load_iris

    petals = load_iris().data[:, 2:]
    return torch.from_numpy((petals - np.mean(petals, axis=0)) / np.std(petals, axis=0))


class IrisDataModule(GenerativeDataModule):
    """Points in the plane around the petals of 150 real irises: an equal Gaussian at each flower. There is nothing to download.

    Batch: {"image": (B, 2) float32}

    The two coordinates are the length and the width of the petals, with standard deviation 1.

    Args:
        num_train: Training points, drawn once.
        num_val: Validation points, drawn once, the same for every seed.
        noise: Standard deviation of each Gaussian in each coordinate, > 0.
        batch_size: Points per process and step.
        val_batch_size: Points per process and validation step.
        num_samples: Samples that ``lit predict`` draws, at most ``num_val``.
        num_workers: Processes that read data; the points lie in memory, so 0 is fastest.
        seed: Seed of the training points and their order.

    Raises:
        ValueError: A number lies outside its range.
    """

    def __init__(
        self,
        num_train: int = 51200,
        num_val: int = 4000,
        noise: float = 0.05,
        batch_size: int = 512,
        val_batch_size: int = 4000,
        num_samples: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, val_batch_size=val_batch_size, num_samples=num_samples, num_workers=num_workers, seed=seed)
        at_least(1, num_train=num_train, num_val=num_val)
        positive(noise=noise)
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        """Draw both sets."""
        if self.train_set is not None:
            return
        flowers = iris_flowers().float()
        for part, count, seed in (("train", self.hparams["num_train"], self.seed), ("val", self.hparams["num_val"], 2**40)):
            generator = torch.Generator().manual_seed(seed)
            chosen = flowers[torch.randint(len(flowers), (count,), generator=generator)]
            setattr(self, f"{part}_set", Tensors(chosen + self.hparams["noise"] * torch.randn(count, 2, generator=generator)))
