"""What the classification data sets share: samples by (epoch, index), and label noise.

A batch is ``{"image": (B, C, H, W) float32, "label": (B,) int64}``. Augmentation follows from (seed, epoch, index) alone, never from the
worker or rank that reads the sample.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lit_methods import checks
from lit_methods.datamodules.base import LoaderDataModule, Samples


class LabelledImages(Samples):
    """Samples ``{"image": Tensor, "label": int}``, asked for by ``(epoch, index)``.

    Args:
        read: Index -> image as stored.
        labels: (N,) integers.
        transform: (image, (seed, epoch, index)) -> (C, H, W) float32.
        seed: Seed of the augmentation.
        names: File names by index, where the images are files.
    """

    def __init__(
        self,
        read: Callable[[int], Any],
        labels: NDArray[np.integer[Any]],
        transform: Callable[[Any, tuple[int, int, int]], Tensor],
        seed: int,
        names: Sequence[str] = (),
    ) -> None:
        self.read, self.labels, self.transform, self.seed, self.names = read, labels, transform, seed, names

    def __len__(self) -> int:
        return len(self.labels)

    def at(self, epoch: int, index: int) -> dict[str, Any]:
        """One image."""
        return {"image": self.transform(self.read(index), (self.seed, epoch, index)), "label": int(self.labels[index])}


def fixed_split(size: int, first: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The first ``first`` positions of one permutation of ``size``, and the rest; the same in every run, whatever the seed."""
    order = np.random.default_rng(0).permutation(size)
    return order[:first], order[first:]


def redraw_labels(labels: NDArray[np.int64], share: float, num_classes: int, seed: int) -> NDArray[np.int64]:
    """Symmetric label noise: ``round(share * N)`` labels, chosen without repetition, drawn anew from all classes.

    A label may be drawn as it was, so about ``share * (1 - 1 / num_classes)`` of the labels end up wrong.

    Args:
        labels: (N,) in 0..num_classes-1; not changed.
        share: Share of the labels to redraw, in [0, 1].
        num_classes: Number of classes.
        seed: Decides which and what.

    Returns:
        (N,) int64.

    Raises:
        ValueError: ``share`` lies outside [0, 1].
    """
    checks.share(label_noise=share)
    rng = np.random.default_rng([seed, 1])
    chosen = rng.permutation(len(labels))[: round(share * len(labels))]
    noisy = labels.copy()
    noisy[chosen] = rng.integers(num_classes, size=len(chosen))
    return noisy


class ClassificationDataModule(LoaderDataModule):
    """Base of the classification datamodules.

    Args:
        batch_size: Images per process and step.
        num_workers: Processes that read data.
        seed: Seed of the order and the augmentation.

    Attributes:
        class_names: Names of the classes 0, 1, ...; known after ``setup`` at the latest.
        unlabelled_set: Further training images, whose labels are -1 where they aren't known; None: there are none.
    """

    class_names: tuple[str, ...] = ()
    unlabelled_set: LabelledImages | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)
