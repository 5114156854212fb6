"""Masks from scores: which weights stay. Pure functions; every count is exact and ties go to the lowest index."""

import torch
from torch import Tensor

from lit_methods import checks


def _comparable(score: Tensor) -> Tensor:
    """Half types as float32, which keeps their order: not every selection kernel knows them."""
    return score.float() if score.dtype in (torch.float16, torch.bfloat16) else score


def keep_largest(score: Tensor, count: int) -> Tensor:
    """Mask of the ``count`` largest scores of a tensor.

    Args:
        score: Any shape, any real dtype; infinities allowed, no NaN.
        count: Entries to keep, 0 to ``score.numel()``.

    Returns:
        bool, shape of ``score``, exactly ``count`` True; of equal scores the one with the lower flat index is kept.

    Raises:
        ValueError: ``count`` is out of range.
    """
    if not 0 <= count <= score.numel():
        raise ValueError(f"count is {count}, but a tensor of shape {tuple(score.shape)} has {score.numel()} entries to keep")
    if count in (0, score.numel()):
        return torch.full_like(score, count > 0, dtype=torch.bool)
    flat = _comparable(score.detach()).flatten()
    threshold = flat.kthvalue(flat.numel() - count + 1).values
    if flat.device.type == "cpu":  # elsewhere the host would have to wait
        kept = flat >= threshold
        if int(kept.sum()) == count:  # no ties, so that none has to be counted
            return kept.view(score.shape)
    above, equal = flat > threshold, flat == threshold
    return (above | (equal & (equal.cumsum(0) <= count - above.sum()))).view(score.shape)


def random_mask(shape: torch.Size | tuple[int, ...], density: float, generator: torch.Generator, exact: bool = False) -> Tensor:
    """A random mask on the CPU.

    Args:
        shape: Shape of the weight.
        density: Share that is kept, in [0, 1].
        generator: CPU generator; the same state gives the same mask on every machine.
        exact: Keep exactly ``round(density * numel)`` entries; otherwise each entry is kept independently with probability ``density``.

    Returns:
        bool, ``shape``.

    Raises:
        ValueError: ``density`` is out of range.
    """
    checks.share(density=density)
    uniform = torch.rand(shape, generator=generator)
    return keep_largest(-uniform, round(density * uniform.numel())) if exact else uniform < density


def nm_mask(weight: Tensor, n: int, m: int, dim: int = 1) -> Tensor:
    """N:M mask: of every ``m`` consecutive weights along ``dim`` the ``n`` with the largest magnitude stay.

    Args:
        weight: At least ``dim + 1`` dimensions, real and without NaN: a linear (out, in) or convolution (out, in/groups, ...) weight.
        n: Kept per group, 0 <= n <= m.
        m: Size of a group; must divide ``weight.shape[dim]``, so that no group crosses a row.
        dim: 1: groups run over the inputs (row mode); 0: over the outputs (column mode).

    Returns:
        bool, shape of ``weight``, exactly ``n`` True in each group; of equal magnitudes the first along ``dim`` is kept.

    Raises:
        ValueError: The groups don't fit.
    """
    if not 0 <= n <= m or m < 1:
        raise ValueError(f"a pattern of {n}:{m} can't be: expected 0 <= n <= m and m >= 1")
    dim %= weight.ndim
    size = weight.shape[dim]
    if size % m:
        misfit = f"dimension {dim} has {size} entries, no multiple of {m}, so that groups would cross rows"
        raise ValueError(f"{n}:{m} doesn't fit a weight of shape {tuple(weight.shape)}: {misfit}; take another pattern or dim, or skip it")
    if n == m:
        return torch.ones_like(weight, dtype=torch.bool)
    magnitude = _comparable(weight.detach()).abs()
    if m <= 16 and (n > 1 or m < 8):  # m (m - 1) / 2 comparisons of whole columns: faster than sorting
        return _fewest_beaten(magnitude, n, m, dim)
    groups = magnitude.movedim(dim, -1).unflatten(-1, (size // m, m))
    places = groups.argmax(-1, keepdim=True) if n == 1 else groups.argsort(dim=-1, descending=True, stable=True)[..., :n]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, places, True).flatten(-2).movedim(-1, dim)


def _fewest_beaten(magnitude: Tensor, n: int, m: int, dim: int) -> Tensor:
    """An entry stays if fewer than ``n`` of its group come before it: larger ones, or equal ones further to the left."""
    columns = magnitude.unflatten(dim, (-1, m)).movedim(dim + 1, 0)
    if m > 4:
        columns = columns.contiguous()
    before = [torch.full_like(column, place, dtype=torch.int8) for place, column in enumerate(columns)]  # as if all were equal
    for right in range(m):
        for left in range(right):
            larger = (columns[right] > columns[left]).view(torch.int8)
            before[left] += larger
            before[right] -= larger
    return torch.stack([count < n for count in before], dim=dim + 1).flatten(dim, dim + 1)


def check_pattern(n: int, m: int) -> None:
    """Raise unless n:m is a pattern.

    Raises:
        ValueError: It isn't.
    """
    if not 1 <= n <= m:
        raise ValueError(f"a pattern of {n}:{m} can't be: give 1 <= N <= M")


def is_nm(weight: Tensor, n: int, m: int, dim: int = 1) -> bool:
    """Whether no group of ``m`` along ``dim`` has more than ``n`` non-zero entries."""
    if weight.shape[dim] % m:
        return False
    return bool(((weight != 0).movedim(dim, -1).unflatten(-1, (-1, m)).sum(-1) <= n).all())
