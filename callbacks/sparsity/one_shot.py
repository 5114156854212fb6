"""One-shot pruning of a linear layer without training: magnitude, Wanda and SparseGPT, unstructured and N:M. Pure functions.

Golden vectors come from the copies in zyxxmu/DSnoT@4c029df (lib/prune.py, lib/sparsegpt.py) of Wanda (arXiv:2306.11695; locuslab/wanda)
and SparseGPT (arXiv:2301.00774; IST-DASLab/sparsegpt). Left out: SparseGPT's joint quantisation.

N counts the PRUNED entries of every M consecutive columns here, as in these papers' code. 2:4 is the same either way.
"""

import re
from typing import Literal

import torch
from torch import Tensor

from lit_methods import checks
from lit_methods.callbacks.sparsity.input_statistics import InputStatistics

Pattern = tuple[int, int]
Method = Literal["magnitude", "wanda", "sparsegpt"]
DAMP = 0.01
"""Share of the Hessian's mean diagonal that is added to its diagonal."""
BLOCK = 128
"""Columns that SparseGPT prunes at a time."""


def parse_pattern(pattern: str | None) -> Pattern | None:
    """``"2:4"`` -> (2, 4): pruned per group, size of a group; None stays None.

    Raises:
        ValueError: Another text, or no pattern.
    """
    if pattern is None:
        return None
    found = re.fullmatch(r"(\d+):(\d+)", pattern)
    if not found or not 1 <= int(found[1]) < int(found[2]):
        raise ValueError(f"pattern is {pattern!r}: give 'N:M' to prune N of every M consecutive inputs, 1 <= N < M, such as '2:4', or null")
    return int(found[1]), int(found[2])


def check_width(columns: int, pattern: Pattern | None) -> None:
    """Raise unless the groups of a pattern fit a layer's width.

    Raises:
        ValueError: M doesn't divide it.
    """
    if pattern is not None and columns % pattern[1]:
        n, m = pattern
        raise ValueError(f"{n}:{m} doesn't fit a layer of {columns} inputs, which is no multiple of {m}: take another pattern, or skip it")


def keep_high_scores(score: Tensor, sparsity: float = 0.5, pattern: Pattern | None = None) -> Tensor:
    """Which weights stay: per row, or in each group of a row, all but those with the lowest scores.

    Args:
        score: (R, C), no NaN.
        sparsity: Share of every row that goes: int(C * sparsity) entries; in [0, 1]. Doesn't matter with a pattern.
        pattern: (N, M): N of every M consecutive columns go.

    Returns:
        bool (R, C), True where kept; of equal scores the first go.

    Raises:
        ValueError: Groups that don't fit, or a share out of range.
    """
    checks.share(sparsity=sparsity)
    check_width(score.shape[1], pattern)
    groups = score if pattern is None else score.reshape(len(score), -1, pattern[1])
    count = int(score.shape[1] * sparsity) if pattern is None else pattern[0]
    lowest = groups.argsort(dim=-1, stable=True)[..., :count]
    return torch.ones_like(groups, dtype=torch.bool).scatter_(-1, lowest, False).reshape(score.shape)


def magnitude_mask(weight: Tensor, sparsity: float = 0.5, pattern: Pattern | None = None) -> Tensor:
    """What the magnitude baseline keeps: |W| above a threshold of the whole layer, or the largest of each group.

    The threshold is the entry at index int(numel * sparsity) of the sorted magnitudes, and goes as well: one weight more than the share.

    Args:
        weight: (R, C).
        sparsity: Share of the layer that goes, in [0, 1].
        pattern: (N, M): N of every M consecutive columns go instead.

    Returns:
        bool (R, C), True where kept.
    """
    checks.share(sparsity=sparsity)
    size = weight.abs()
    if pattern is not None:
        return keep_high_scores(size, pattern=pattern)
    if not size.numel():
        return torch.ones_like(size, dtype=torch.bool)
    return size > size.flatten().sort().values[min(int(size.numel() * sparsity), size.numel() - 1)]


def wanda_score(weight: Tensor, square: Tensor) -> Tensor:
    """Wanda's metric |W| sqrt(q).

    Args:
        weight: (R, C).
        square: (C,) q of :class:`InputStatistics`, >= 0.
    """
    return weight.abs() * square.sqrt()


def wanda_mask(weight: Tensor, square: Tensor, sparsity: float = 0.5, pattern: Pattern | None = None) -> Tensor:
    """What Wanda keeps, bool (R, C): :func:`wanda_score` and :func:`keep_high_scores`."""
    return keep_high_scores(wanda_score(weight, square), sparsity, pattern)


def inverse_factor(hessian: Tensor, damp: float = DAMP) -> Tensor:
    """U, the upper Cholesky factor of (H + damp * mean(diag H) I)^-1, with 1 on the diagonal of dead columns.

    Args:
        hessian: (C, C) of :class:`InputStatistics`.
        damp: Share of the mean diagonal, > 0.

    Raises:
        ValueError: H isn't positive definite even so.
    """
    damped = hessian.clone()
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += damp * diagonal.mean()
    lower, failed = torch.linalg.cholesky_ex(damped)
    upper, failed_again = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if bool(failed) or bool(failed_again):
        raise ValueError(f"the Hessian of {len(hessian)} inputs can't be inverted: give more calibration samples, or a damp above {damp}")
    return upper


def sparsegpt_score(weight: Tensor, hessian: Tensor, damp: float = DAMP) -> Tensor:
    """SparseGPT's metric W^2 / diag(U)^2 of the dense weight; 0 in dead columns.

    Args:
        weight: (R, C).
        hessian: (C, C) of :class:`InputStatistics`.
        damp: As in :func:`inverse_factor`.
    """
    alive = weight.masked_fill(hessian.diagonal() == 0, 0)
    return alive.square() / inverse_factor(hessian, damp).diagonal().square()


def sparsegpt(
    weight: Tensor, hessian: Tensor, sparsity: float = 0.5, pattern: Pattern | None = None, damp: float = DAMP, block: int = BLOCK
) -> Tensor:
    """SparseGPT: prunes columns from left to right, and moves the error of each into the columns behind it.

    Args:
        weight: (R, C) float32 or float64.
        hessian: (C, C) of :class:`InputStatistics`.
        sparsity: Share that goes: in each block of columns, entries up to the one at index int(size * sparsity) of the sorted metric.
        pattern: (N, M): N of every M consecutive columns go instead, chosen from the weights as they are when a group is reached.
        damp: As in :func:`inverse_factor`.
        block: Columns of a block, >= 1; with a pattern lowered to a multiple of M.

    Returns:
        (R, C) new weight, 0 where pruned; kept weights change, too.

    Raises:
        ValueError: Groups that don't fit, or a share out of range.
    """
    checks.share(sparsity=sparsity)
    check_width(weight.shape[1], pattern)
    new = weight.masked_fill(hessian.diagonal() == 0, 0)
    factor = inverse_factor(hessian, damp)
    step = block if pattern is None else max(pattern[1], block - block % pattern[1])
    for start in range(0, new.shape[1], step):
        columns = slice(start, min(start + step, new.shape[1]))
        part, own = new[:, columns].clone(), factor[columns, columns]
        diagonal, errors = own.diagonal(), torch.zeros_like(part)
        gone = torch.zeros_like(part, dtype=torch.bool)
        if pattern is None and part.numel():
            metric = part.square() / diagonal.square()
            gone = metric <= metric.flatten().sort().values[min(int(metric.numel() * sparsity), metric.numel() - 1)]
        for column in range(part.shape[1]):  # each depends on what those before it have left: rows are worked on together
            if pattern is not None and column % pattern[1] == 0:
                group = slice(column, column + pattern[1])
                gone[:, group] = ~keep_high_scores(part[:, group].square() / diagonal[group].square(), pattern=pattern)
            kept = part[:, column].masked_fill(gone[:, column], 0)
            errors[:, column] = (part[:, column] - kept) / diagonal[column]
            part[:, column:] -= errors[:, column, None] * own[column, column:]
            part[:, column] = kept
        new[:, columns] = part
        new[:, columns.stop :] -= errors @ factor[columns, columns.stop :]
    return new


def initial_score(method: Method, weight: Tensor, statistics: InputStatistics) -> Tensor:
    """(R, C) metric of a method, from which a mask per row is made: |W|, :func:`wanda_score` or :func:`sparsegpt_score`."""
    checks.one_of(Method, method=method)
    if method == "magnitude":
        return weight.abs()
    if method == "wanda":
        return wanda_score(weight, statistics.square)
    if statistics.hessian is None:
        raise ValueError("method 'sparsegpt' needs the Hessian of the inputs: take statistics with hessian=True")
    return sparsegpt_score(weight, statistics.hessian)


def expected_error(dense: Tensor, pruned: Tensor, statistics: InputStatistics) -> Tensor:
    """(R,) E_r, what a row's output loses in the mean over samples, summed over a sample's tokens: (W - W') s."""
    return (dense - pruned) @ statistics.total


__all__ = [
    "expected_error",
    "initial_score",
    "inverse_factor",
    "keep_high_scores",
    "magnitude_mask",
    "sparsegpt",
    "sparsegpt_score",
    "wanda_mask",
    "wanda_score",
]
