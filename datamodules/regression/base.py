"""What the regression data sets share: views by (epoch, index), weights of rare labels, counts for the evaluation."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_methods.datamodules.base import LoaderDataModule, Samples
from lit_methods.tasks.imbalanced_regression.metrics import label_counts
from lit_methods.tasks.imbalanced_regression.weights import Kernel, Reweight, label_weights, smoothing_kernel


class Labels:
    """What is known of each sample beside its input.

    Args:
        targets: (N,) float.
        weights: (N,) float; None: batches have no ``weight``.
        counts: (N,) training samples with the same label.
    """

    def __init__(self, targets: NDArray[Any], weights: NDArray[Any] | None, counts: NDArray[Any]) -> None:
        self.tensors = {"target": torch.from_numpy(targets.astype(np.float32)), "count": torch.from_numpy(counts.astype(np.int64))}
        if weights is not None:
            self.tensors["weight"] = torch.from_numpy(weights.astype(np.float32))

    def __len__(self) -> int:
        return len(self.tensors["target"])

    def rows(self, index: Any) -> dict[str, Tensor]:
        """What is known of some samples, or of one."""
        return {name: values[index] for name, values in self.tensors.items()}


class RegressionSamples(Samples):
    """Samples that are read one by one.

    Args:
        read: Index -> input as stored.
        labels: Labels of all samples.
        transform: (input, (seed, epoch, index, view)) -> tensor. View 0 goes by ``name``.
        views: Number of further views, ``view_1``, ``view_2``, ...
        seed: Seed of the augmentation.
        name: Key of the input.
    """

    def __init__(
        self,
        read: Callable[[int], Any],
        labels: Labels,
        transform: Callable[[Any, tuple[int, ...]], Tensor],
        views: int = 0,
        seed: int = 0,
        name: str = "image",
    ) -> None:
        self.read, self.labels, self.transform, self.views, self.seed, self.name = read, labels, transform, views, seed, name

    def __len__(self) -> int:
        return len(self.labels)

    def at(self, epoch: int, index: int) -> dict[str, Any]:
        """One sample with its views."""
        raw = self.read(index)
        names = [self.name, *(f"view_{view}" for view in range(1, self.views + 1))]
        made = {name: self.transform(raw, (self.seed, epoch, index, view)) for view, name in enumerate(names)}
        return made | self.labels.rows(index)


class Reweighting(NamedTuple):
    """How rare labels weigh more.

    Attributes:
        reweight: Weight of a training sample by its label: ``none``, ``inverse`` or ``sqrt_inv`` frequency.
        lds: Smooth the frequencies over neighbouring labels (LDS).
        kernel: ``gaussian``, ``triang`` or ``laplace``.
        kernel_size: Width of the kernel in bins, odd.
        sigma: Standard deviation of the kernel in bins.
    """

    reweight: Reweight
    lds: bool
    kernel: Kernel
    kernel_size: int
    sigma: float


class RegressionDataModule(LoaderDataModule):
    """Base of the regression datamodules.

    Args:
        reweighting: How rare labels weigh more.
        bin_width: Labels per bin, in their unit, above 0.
        num_bins: Number of bins from 0, 1 or more; larger labels count in the last one.
        batch_size: Samples per process and step.
        num_workers: Processes that read data.
        seed: Seed of the order and the augmentation.

    Raises:
        ValueError: A value lies outside its range.
    """

    def __init__(self, reweighting: Reweighting, bin_width: float, num_bins: int, *, batch_size: int, num_workers: int, seed: int) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        if reweighting.lds and reweighting.reweight == "none":
            raise ValueError("lds=True smooths the frequencies that reweight='none' doesn't use: set reweight to inverse or sqrt_inv")
        smoothing_kernel(*reweighting[2:])  # the error comes before data are read
        self.reweighting, self.bin_width, self.num_bins = reweighting, bin_width, num_bins

    def bins(self, targets: NDArray[Any]) -> NDArray[np.int64]:
        """Bin of each label; labels that differ by rounding from a bin's edge belong to the upper bin."""
        return np.minimum(np.floor(targets.astype(np.float64) / self.bin_width + 1e-4).astype(np.int64), self.num_bins - 1)

    def known(self, train: NDArray[Any], parts: Sequence[NDArray[Any]]) -> tuple[Labels, ...]:
        """Labels of the training part, with weights, and of the others, all with the counts of the training part."""
        bins = self.bins(train)
        seen, *others = (label_counts(torch.from_numpy(self.bins(part)), torch.from_numpy(bins)).numpy() for part in (train, *parts))
        weights = None
        if self.reweighting.reweight != "none":
            weights = label_weights(bins, *self.reweighting, self.num_bins)
        return Labels(train, weights, seen), *(Labels(part, None, counts) for part, counts in zip(parts, others, strict=True))


__all__ = ["Labels", "RegressionDataModule", "RegressionSamples", "Reweighting"]
