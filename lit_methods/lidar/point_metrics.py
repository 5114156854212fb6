"""Point-level segmentation quality."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix


class PointIoU(MulticlassConfusionMatrix):
    """IoU of every class over all points of a split; points labelled ``ignore_index`` are left out.

    A class that neither occurs nor is predicted is NaN and takes no part in the mean. An output for the ignored class
    is allowed: predicting it is a miss of the true class.

    Args:
        num_outputs: Width of the predictions, the ignored class included.
        ignore_index: Label that is left out.
    """

    def __init__(self, num_outputs: int, ignore_index: int) -> None:
        inside = 0 <= ignore_index < num_outputs
        super().__init__(num_classes=num_outputs, ignore_index=ignore_index)
        self.counted = [c for c in range(num_outputs) if not (inside and c == ignore_index)]

    def iou(self) -> Tensor:
        """(classes,) IoU without the ignored class, in [0, 1] or NaN."""
        confusion = self.compute().double()
        hit = confusion.diagonal()
        union = confusion.sum(0) + confusion.sum(1) - hit
        return torch.where(union > 0, hit / union, torch.nan)[self.counted]


def mean_iou(iou: Tensor) -> Tensor:
    """Mean over the classes that occur, 0 when none does."""
    return torch.nan_to_num(iou.nanmean()).float()


def iou_rows(iou: Tensor, class_names: Sequence[str]) -> tuple[tuple[str, float | None], ...]:
    """Table rows (class, IoU in percent or None)."""
    return tuple((name, None if value != value else round(100 * value, 2)) for name, value in zip(class_names, iou.tolist(), strict=True))
