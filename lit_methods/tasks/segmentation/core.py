"""Maths of segmentation that several techniques share: counts, IoU, cross-entropy and Dice."""

import torch
import torch.nn.functional as F
from torch import Tensor


def class_counts(prediction: Tensor, labels: Tensor, num_classes: int, ignore_index: int = 255) -> Tensor:
    """Pixels of each class that are hit, predicted and labelled, without those labelled ``ignore_index``.

    Args:
        prediction: Any shape, integers; values outside 0 to ``num_classes - 1`` aren't counted.
        labels: The same shape.
        num_classes: C.
        ignore_index: Label that doesn't count.

    Returns:
        (3, C) int64. Doesn't wait for the device.
    """
    if prediction.shape != labels.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and labels {tuple(labels.shape)} must have one shape")
    p, t = prediction.flatten().long(), labels.flatten().long()
    width = num_classes + 1  # the last row and column of the table of (label, prediction) take the values that aren't counted
    row, column = (torch.where((values >= 0) & (values < num_classes), values, num_classes) for values in (t, p))
    cell = row.mul_(width).add_(column).masked_fill_(t == ignore_index, width * width)
    # not bincount, which waits for the device
    table = p.new_zeros(width * width + 1).scatter_add_(0, cell, p.new_ones(()).expand_as(cell))[:-1].view(width, width)
    return torch.stack([part[:num_classes] for part in (table.diagonal(), table.sum(0), table.sum(1))])


def iou_of_counts(counts: Tensor) -> Tensor:
    """(C,) float64 in 0 to 1 from the (3, C) of :func:`class_counts`: hits / (predicted + labelled - hits + 1e-10)."""
    hits, predicted, labelled = counts.double()
    return hits / (predicted + labelled - hits + 1e-10)


def class_iou(prediction: Tensor, labels: Tensor, num_classes: int, ignore_index: int = 255) -> Tensor:
    """(C,) float64 intersection over union of each class; 0 for a class that is nowhere. Arguments as :func:`class_counts`."""
    return iou_of_counts(class_counts(prediction, labels, num_classes, ignore_index))


def sample_cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """(B,): the mean of each sample's pixels whose label isn't ``ignore_index``; 0 where there is none.

    Args:
        logits: (B, C, ...).
        labels: (B, ...) int64.
        ignore_index: Label that doesn't count.
    """
    each = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="none").reshape(len(labels), -1)
    return each.sum(1) / (labels != ignore_index).reshape(len(labels), -1).sum(1).clamp(min=1)


def batch_dice(logits: Tensor, labels: Tensor, ignore_index: int = -100, smooth: float = 1e-5) -> Tensor:
    """Soft Dice loss over the pixels of the whole batch: ``1 - (2 sum pt + smooth) / (sum p^2 + sum t^2 + smooth)``, mean over classes.

    Args:
        logits: (B, C, ...).
        labels: (B, ...) int64; pixels with ``ignore_index`` are left out.
        ignore_index: Label that doesn't count.
        smooth: Keeps classes without a pixel finite.

    Returns:
        Scalar in 0 to 1.
    """
    p = logits.softmax(dim=1)
    counted = labels != ignore_index
    at, counts = labels.where(counted, 0), counted.to(p.dtype)
    own = p.gather(1, at.unsqueeze(1)).squeeze(1) * counts  # of the label's class: no one-hot target is made
    wide = p.dtype if p.device.type == "mps" else torch.float64  # the sums go over all pixels, one by one
    zeros = torch.zeros(p.shape[1], dtype=wide, device=p.device)
    hits, pixels = (zeros.index_add(0, at.flatten(), part.flatten().to(wide)).to(p.dtype) for part in (own, counts))
    size = labels.shape[1:].numel()  # pixels of a sample; 1 where a sample has one label
    squares = ((p * p).reshape(*p.shape[:2], size) @ counts.reshape(len(labels), size, 1)).sum((0, 2))
    return (1 - (2 * hits + smooth) / (squares + pixels + smooth)).mean()


def has_foreground(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """(B,) bool: a pixel of the sample (B, ...) is neither 0, the background, nor ``ignore_index``."""
    return ((labels != 0) & (labels != ignore_index)).reshape(len(labels), -1).any(1)


__all__ = ["batch_dice", "class_counts", "class_iou", "has_foreground", "iou_of_counts", "sample_cross_entropy"]
