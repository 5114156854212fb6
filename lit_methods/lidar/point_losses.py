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
    target = F.one_hot(torch.where(valid, labels, 0), probs.shape[1]).to(probs.dtype) * valid[:, None]
    # ignored points sort behind all others, where they change no value and no rank
    error = torch.where(valid[:, None], (target - probs).abs(), -1.0)
    error, order = error.sort(dim=0, descending=True)
    target = target.gather(0, order)
    present = target.sum(0)
    hit = target.cumsum(0)
    miss = (1 - target).cumsum(0)
    jaccard = 1 - (present - hit) / (present + miss)
    step = torch.cat([jaccard[:1], jaccard[1:] - jaccard[:-1]])
    per_class = (error.clamp(min=0) * step).sum(0)
    return torch.where(present > 0, per_class, 0.0).sum() / (present > 0).sum().clamp(min=1)


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


__all__ = ["lovasz_softmax", "segmentation_losses"]
