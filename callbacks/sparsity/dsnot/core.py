"""Dynamic Sparse No Training, DSnoT (arXiv:2310.08915): swaps of a pruned for a kept weight that drive each row's expected error to 0.

Golden vectors come from zyxxmu/DSnoT@4c029df: lib/prune.py (prune_DSnoT) and lib/layerwrapper.py. What the baselines compute stands in
:mod:`lit_methods.callbacks.sparsity.one_shot`, the statistics in :mod:`lit_methods.callbacks.sparsity.input_statistics`.

With D[r, c] = W[r, c] * s_c, a row's expected error is E_r = sum of D over its pruned columns (dense less sparse output). Weights never
change, only which of them are kept, and each of them changes its place at most once.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_methods import checks
from lit_methods.callbacks.sparsity.input_statistics import InputStatistics
from lit_methods.callbacks.sparsity.one_shot import Pattern, check_width, wanda_score

EPS = 1e-12
"""Added to variances before something is divided by them."""


@dataclass
class Swapped:
    """What the swaps led to.

    Attributes:
        keep: bool (R, C), True where kept.
        error: (R,) E_r at the end.
        swaps: (R,) int64, swaps made in each row.
    """

    keep: Tensor
    error: Tensor
    swaps: Tensor


def contribution(weight: Tensor, total: Tensor) -> Tensor:
    """D = W * s: what each weight adds to its row's output, summed over a sample's tokens, in the mean over samples.

    Args:
        weight: (R, C).
        total: (C,) s of :class:`~lit_methods.callbacks.sparsity.input_statistics.InputStatistics`.
    """
    return weight * total


class _Regrow:
    """Per row, the pruned columns by D / v^p: from one end the most negative, from the other the most positive."""

    def __init__(self, effect: Tensor, keep: Tensor, variance: Tensor, power: float) -> None:
        scaled = effect.masked_fill(keep, 0) / (variance + EPS).pow(power)
        self.values, self.order = scaled.sort(dim=1, stable=True)
        self.left = torch.zeros(len(effect), 1, dtype=torch.long, device=effect.device)
        self.right = torch.full_like(self.left, effect.shape[1] - 1)

    def next(self, up: Tensor) -> tuple[Tensor, Tensor]:
        """(R, 1) columns: the most positive ones left where ``up``, else the most negative ones; and whether there is one of that sign."""
        last = self.order.shape[1] - 1
        place = torch.where(up, self.right, self.left)
        value = self.values.gather(1, place.clamp(0, last))
        there = torch.where(up, value > 0, value < 0) & (place >= 0) & (place <= last)
        self.right, self.left = self.right - up.long(), self.left + (~up).long()
        return self.order.gather(1, place.clamp(0, last)), there


class _Queue:
    """Per row, chosen columns from the cheapest on."""

    def __init__(self, cost: Tensor, chosen: Tensor) -> None:
        self.order = cost.masked_fill(~chosen, torch.inf).sort(dim=1, stable=True).indices
        self.count = chosen.sum(1, keepdim=True)
        self.place = torch.zeros_like(self.count)

    def next(self, use: Tensor) -> tuple[Tensor, Tensor]:
        """(R, 1) the next columns, and whether there are any; the rows of ``use`` advance."""
        there = self.place < self.count
        column = self.order.gather(1, self.place.clamp(max=self.order.shape[1] - 1))
        self.place = self.place + use.long()
        return column, there


def _checked(max_cycles: int, update_threshold: float, variance_power: float) -> None:
    checks.at_least(0, "a whole number", max_cycles=max_cycles)
    checks.at_least(0, update_threshold=update_threshold, variance_power=variance_power)


def dsnot_unstructured(
    weight: Tensor,
    statistics: InputStatistics,
    keep: Tensor,
    max_cycles: int = 50,
    update_threshold: float = 0.1,
    variance_power: float = 1.0,
    require_same_sign: bool = False,
) -> Swapped:
    """Swap pruned for kept weights within each row, at most one pair per cycle.

    A cycle regrows the pruned column with the largest D / v^p of the sign of E, and prunes the kept one with the smallest Wanda metric
    whose D has the other sign, so that both lower |E|. A row goes on while |E| is above the threshold, and stops for good when it
    isn't, or when no column is left to choose.

    Args:
        weight: (R, C) float32 or float64.
        statistics: Of the layer's inputs, in the same dtype.
        keep: bool (R, C): the first mask.
        max_cycles: Swaps of a row at most.
        update_threshold: Rows with |E| at most this are left alone. E is a sum over a sample's tokens, so it grows with their number.
        variance_power: p.
        require_same_sign: A row also stops before a swap after which E has another sign than at first.

    Raises:
        ValueError: An argument out of range.
    """
    _checked(max_cycles, update_threshold, variance_power)
    effect = contribution(weight, statistics.total)
    keep = keep.clone()
    error = effect.masked_fill(keep, 0).sum(1, keepdim=True)
    first = error.sign()
    swaps = torch.zeros_like(error, dtype=torch.long)
    if not weight.numel():
        return Swapped(keep, error[:, 0], swaps[:, 0])
    cost = wanda_score(weight, statistics.square)
    regrow = _Regrow(effect, keep, statistics.variance, variance_power)
    negatives, positives = _Queue(cost, keep & (effect < 0)), _Queue(cost, keep & (effect > 0))
    active = torch.ones_like(error, dtype=torch.bool)
    for _ in range(max_cycles):  # all rows together
        grown, growable = regrow.next(error > 0)
        below = error < 0
        column, there = positives.next(below)
        other, there_too = negatives.next(~below)
        pruned, prunable = torch.where(below, column, other), torch.where(below, there, there_too)
        after = error + effect.gather(1, pruned) - effect.gather(1, grown)
        active = active & (error.abs() > update_threshold) & growable & prunable
        if require_same_sign:
            active = active & (after.sign() == first)
        _swap(keep, grown, pruned, active)
        error, swaps = torch.where(active, after, error), swaps + active
    return Swapped(keep, error[:, 0], swaps[:, 0])


def dsnot_nm(
    weight: Tensor,
    statistics: InputStatistics,
    keep: Tensor,
    score: Tensor,
    pattern: Pattern,
    max_cycles: int = 50,
    update_threshold: float = 0.1,
    variance_power: float = 1.0,
) -> Swapped:
    """The same within the groups of an N:M pattern: the column that goes is that of the regrown column's group with the lowest score.

    Its sign doesn't matter, so |E| need not fall. A row stops as well before a swap after which E has another sign than at first, and
    when every kept column of the group has been swapped already.

    Args:
        weight: (R, C).
        statistics: Of the layer's inputs.
        keep: bool (R, C): the first mask, which has the pattern.
        score: (R, C) metric that the first mask was made from.
        pattern: (N, M): N of every M consecutive columns are pruned.
        max_cycles: Swaps of a row at most.
        update_threshold: As in :func:`dsnot_unstructured`.
        variance_power: p.

    Raises:
        ValueError: An argument out of range, or groups that don't fit.
    """
    _checked(max_cycles, update_threshold, variance_power)
    check_width(weight.shape[1], pattern)
    effect, size = contribution(weight, statistics.total), pattern[1]
    error = effect.masked_fill(keep, 0).sum(1, keepdim=True)
    first = error.sign()
    cost = score.masked_fill(~keep, torch.inf)  # of what may still go
    keep = keep.clone()
    swaps = torch.zeros_like(error, dtype=torch.long)
    if not weight.numel():
        return Swapped(keep, error[:, 0], swaps[:, 0])
    regrow = _Regrow(effect, keep, statistics.variance, variance_power)
    active = torch.ones_like(error, dtype=torch.bool)
    within = torch.arange(size, device=weight.device)
    for _ in range(max_cycles):
        grown, growable = regrow.next(error > 0)
        lowest, place = cost.gather(1, grown - grown % size + within).min(1, keepdim=True)
        pruned = grown - grown % size + place
        after = error + effect.gather(1, pruned) - effect.gather(1, grown)
        active = active & (error.abs() > update_threshold) & growable & (lowest < torch.inf) & (after.sign() == first)
        _swap(keep, grown, pruned, active)
        cost.scatter_(1, pruned, cost.gather(1, pruned).masked_fill(active, torch.inf))
        error, swaps = torch.where(active, after, error), swaps + active
    return Swapped(keep, error[:, 0], swaps[:, 0])


def _swap(keep: Tensor, grown: Tensor, pruned: Tensor, active: Tensor) -> None:
    """One pair per active row, in place."""
    keep.scatter_(1, grown, keep.gather(1, grown) | active)
    keep.scatter_(1, pruned, keep.gather(1, pruned) & ~active)


__all__ = ["Swapped", "contribution", "dsnot_nm", "dsnot_unstructured"]
