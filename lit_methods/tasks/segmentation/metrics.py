"""Measures of a volume: Dice and the 95 % Hausdorff distance, with the conventions of the multi-organ benchmarks."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage
from torch import Tensor
from torchmetrics import Metric

from lit_methods.tasks.segmentation.core import class_counts


class ClassCounts(Metric):
    """Pixels of each class that are hit, predicted and labelled, over all batches and ranks.

    Args:
        num_classes: Classes, the background counted.
        ignore_index: Label of pixels that don't count.
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, num_classes: int, ignore_index: int = 255) -> None:
        super().__init__()
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.add_state("counts", torch.zeros(3, num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, labels: Tensor) -> None:
        """Add integers of one shape."""
        self.counts += class_counts(prediction, labels, self.num_classes, self.ignore_index)

    def compute(self) -> Tensor:
        """(3, num_classes) int64, as :func:`~lit_methods.tasks.segmentation.core.class_counts`."""
        return self.counts


def _surface(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The mask without its inside; what lies outside the volume is background."""
    return mask & ~ndimage.binary_erosion(mask, ndimage.generate_binary_structure(mask.ndim, 1))


def dice_and_hd95(prediction: ArrayLike, target: ArrayLike, spacing: Sequence[float] | float = 1.0) -> tuple[float, float]:
    """Dice overlap and the 95 % Hausdorff distance of two binary masks.

    The distance is ONE percentile (linear interpolation) over the distances of both directions, from surface to surface, where a mask's
    surface is what an erosion by face neighbours removes. Two empty masks are equal: (1, 0). If one alone is empty: (0, 0), the
    benchmarks' convention, which makes the distance look better than it is.

    Args:
        prediction: Any shape of at least one dimension, non-zero inside.
        target: The same shape.
        spacing: Edge of the voxels along each axis, or of all of them.

    Returns:
        Dice in 0 to 1, and the distance in units of ``spacing``.

    Raises:
        ValueError: The shapes differ.
    """
    a, b = np.asarray(prediction) != 0, np.asarray(target) != 0
    if a.shape != b.shape or a.ndim == 0:
        raise ValueError(f"prediction {a.shape} and target {b.shape} must be masks of one shape")
    if not a.any() or not b.any():
        return float(not a.any() and not b.any()), 0.0
    dice = 2.0 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b))
    shell_a, shell_b = _surface(a), _surface(b)
    to_a, to_b = (ndimage.distance_transform_edt(~shell, sampling=spacing) for shell in (shell_a, shell_b))
    return float(dice), float(np.percentile(np.concatenate([to_b[shell_a], to_a[shell_b]]), 95))


__all__ = ["ClassCounts", "dice_and_hd95"]
