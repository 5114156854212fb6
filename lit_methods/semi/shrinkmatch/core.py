"""The class space of an uncertain prediction, shrunk until the rest is certain (ShrinkMatch, arXiv:2308.06777, section 3.2 and 3.3).

Golden vectors come from LiheYoung/ShrinkMatch@c4339b8 (CIFAR/shrinkmatch.py, STL10-SVHN/models/shrinkmatch/shrinkmatch_utils.py).
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Shrunk(NamedTuple):
    """The classes that are left for each prediction.

    Attributes:
        order: (B, C) int64, classes from the likeliest to the least likely; of equal ones the first comes first.
        cut: (B,) int64, c of 2..C-1: the classes of ranks 1 to c - 1 are removed. -1 where C < 3: nothing can go.
        reached: (B,) bool: the likeliest class has reached the threshold among those that are left.
    """

    order: Tensor
    cut: Tensor
    reached: Tensor


@torch.no_grad()
def shrink(probability: Tensor, threshold: float) -> Shrunk:
    """Remove the runners-up, the likeliest first, until p_(0) / (p_(0) + sum of what is left) reaches the threshold.

    At least one class is always removed, and the last one never.

    Args:
        probability: (B, C), rows sum to 1.
        threshold: tau in (0, 1].
    """
    ranked, order = probability.sort(dim=1, descending=True, stable=True)
    rows, classes = ranked.shape
    if classes < 3:
        return Shrunk(order, order.new_full((rows,), -1), torch.zeros(rows, dtype=torch.bool, device=ranked.device))
    left = ranked.flip(1).cumsum(dim=1).flip(1)[:, 2:]  # (B, C - 2): sum of the ranks >= c, for c = 2..C-1
    enough = ranked[:, :1] / (ranked[:, :1] + left) >= threshold
    reached = enough.any(dim=1)
    first = enough.int().argmax(dim=1)  # of equal entries the first
    return Shrunk(order, torch.where(reached, first + 2, classes - 1), reached)


def shrunk_loss(logits: Tensor, shrunk: Shrunk) -> Tensor:
    """Cross-entropy with the likeliest class among those that are left: (B,), 0 where none could be removed.

    Args:
        logits: (B, C) of the strong view, by the auxiliary head.
        shrunk: What is left, from the weak view.
    """
    rank = torch.arange(logits.shape[1], device=logits.device)
    removed = (rank >= 1) & (rank < shrunk.cut[:, None])
    kept = logits.gather(1, shrunk.order).masked_fill(removed, -torch.inf)
    losses = kept.logsumexp(dim=1) - kept[:, 0]
    return torch.where(shrunk.cut >= 0, losses, torch.zeros_like(losses))


def uncertain_loss(logits: Tensor, probability: Tensor, certain: Tensor, shrunk: Shrunk) -> Tensor:
    """ShrinkMatch's term, without the factor r: sum over uncertain rows of max(p) * 1[reached] * loss, divided by all rows.

    Args:
        logits: (B, C) of the strong view, by the auxiliary head.
        probability: (B, C) of the weak view, after alignment if there is one, no gradient.
        certain: (B,) bool.
        shrunk: What is left for each row.

    Returns:
        Scalar.
    """
    weight = probability.amax(dim=1) * (~certain & shrunk.reached)
    return (weight * shrunk_loss(logits, shrunk)).mean()


__all__ = ["Shrunk", "shrink", "shrunk_loss", "uncertain_loss"]
