"""Losses of segmented points: cross-entropy and Lovasz-softmax.

The golden vectors of the Lovasz loss were made with MMDetection3D at fe25f7a.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_methods.lidar.contrast import wide


def lovasz_softmax(probs: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Lovasz-softmax (arXiv:1705.08790) over the classes present in the batch, points of all samples together.

    Args:
        probs: (n, C) softmax over all C outputs.
        labels: (n,) int64.
        ignore_index: Points with this label take no part.

    Returns:
        Scalar; 0 (with zero gradients) when every point is ignored.
    """
    valid = labels != ignore_index
    counts = valid.to(probs.dtype)
    # (C, n): rows are sorted faster than columns
    target = probs.new_zeros(probs.shape[::-1]).scatter_(0, labels.where(valid, 0)[None], counts[None])
    # ignored points sort behind all others, where they change no value and no rank
    error = (target - probs.T).abs() * counts - (1 - counts)
    error, order = error.sort(dim=1, descending=True)
    with torch.no_grad():
        present = target.sum(1, keepdim=True)
        hit = target.gather(1, order).cumsum(1)
        rank = torch.arange(1, len(labels) + 1, device=labels.device)
        jaccard = 1 - (present - hit) / (present + rank - hit)
        step = torch.cat([jaccard[:, :1], jaccard.diff(dim=1)], dim=1)
        seen = present[:, 0] > 0
    per_class = (error.clamp(min=0) * step).sum(1)
    return torch.where(seen, per_class, 0.0).sum() / seen.sum().clamp(min=1)


def segmentation_losses(logits: Tensor, labels: Tensor, ignore_index: int, lovasz_weight: float = 2.0) -> dict[str, Tensor]:
    """Cross-entropy averaged over the points that are not ignored, and the weighted Lovasz-softmax.

    Args:
        logits: (n, C) any float dtype; computed in float32 or wider.
        labels: (n,) int64 in 0..C-1, or ``ignore_index``.
        ignore_index: Label that takes no part.
        lovasz_weight: 2.0 in the authors' configuration.

    Returns:
        ``ce``, ``lovasz`` (already weighted), ``total``; zeros with zero gradients when every point is ignored.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits = wide(logits)
        valid = labels != ignore_index
        ce = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum") / valid.sum().clamp(min=1)
        lovasz = lovasz_weight * lovasz_softmax(logits.softmax(dim=1), labels, ignore_index)
        return {"ce": ce, "lovasz": lovasz, "total": ce + lovasz}


def weighted_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor | None = None, ignore_index: int = 255) -> Tensor:
    """Cross-entropy of the labelled points, each with a weight: ``sum_i w_i ce_i / sum_i w_i``.

    Args:
        logits: (n, C) any float dtype; computed in float32 or wider.
        labels: (n,) int64 in 0..C-1, or ``ignore_index``.
        weights: (n,) >= 0; None: 1 each.
        ignore_index: Label of points that take no part.

    Returns:
        Scalar; 0 with zero gradients when no point has a label and a weight.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits = wide(logits)
        valid = (labels != ignore_index).to(logits.dtype)
        valid = valid if weights is None else valid * weights
        ce = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="none")
        total = valid.sum()
        return (ce * valid).sum() / torch.where(total > 0, total, 1.0)


__all__ = ["lovasz_softmax", "segmentation_losses", "weighted_cross_entropy"]
