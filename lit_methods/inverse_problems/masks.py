"""Which samples of k-space an accelerated scan measures: bool arrays (H, W), frequency 0 at (H // 2, W // 2)."""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from lit_methods import checks

Kind = Literal["gaussian_2d", "gaussian_1d", "poisson", "equispaced", "random"]
Mask = NDArray[np.bool_]


def _gaussian(size: int) -> NDArray[np.float64]:
    """exp(-u^2 / 2 sigma^2) at u = -1..1, with a full width at half maximum of 0.7."""
    sigma = 0.7 / np.sqrt(8 * np.log(2))
    found: NDArray[np.float64] = np.exp(-np.square(np.linspace(-1, 1, size)) / (2 * sigma**2))
    return found


def centre_ellipse(shape: tuple[int, int], centre: float) -> Mask:
    """The ellipse around frequency 0 with half-axes of ``centre`` x H and ``centre`` x W; at least frequency 0 itself."""
    rows, columns = (np.arange(size) - size // 2 for size in shape)
    half = [max(centre * size, 1e-9) for size in shape]
    found: Mask = (rows / half[0])[:, None] ** 2 + (columns / half[1]) ** 2 <= 1
    return found


def _drawn(weights: NDArray[np.float64], number: int, rng: np.random.Generator) -> Mask:
    """``number`` places without replacement, with chances in proportion to the weights."""
    places = rng.choice(weights.size, size=min(number, weights.size), replace=False, p=(weights / weights.sum()).ravel())
    found = np.zeros(weights.size, bool)
    found[places] = True
    return found.reshape(weights.shape)


def gaussian_2d(shape: tuple[int, int], acceleration: float, centre: float, rng: np.random.Generator) -> Mask:
    """HW / acceleration samples with chances p ~ sqrt(g(row) g(column)), and the central ellipse besides."""
    rows, columns = map(_gaussian, shape)
    weights = np.sqrt(np.outer(rows, columns))
    return _drawn(weights, int(weights.size / acceleration), rng) | centre_ellipse(shape, centre)


def _lines(chosen: NDArray[np.bool_], shape: tuple[int, int], centre: float) -> Mask:
    """Whole columns, with the middle ones besides: a share ``centre`` of all, at least one."""
    width = shape[1]
    number = max(1, round(centre * width))
    first = width // 2 - number // 2
    chosen[first : first + number] = True
    return np.broadcast_to(chosen, shape).copy()


def gaussian_1d(shape: tuple[int, int], acceleration: float, centre: float, rng: np.random.Generator) -> Mask:
    """W / acceleration columns with chances p ~ g(column), and the middle ones besides."""
    return _lines(_drawn(_gaussian(shape[1]), int(shape[1] / acceleration), rng), shape, centre)


def random_1d(shape: tuple[int, int], acceleration: float, centre: float, rng: np.random.Generator) -> Mask:
    """The middle columns, and of the others so many by even chances that W / acceleration are expected."""
    width = shape[1]
    middle = max(1, round(centre * width))
    chance = np.clip((width / acceleration - middle) / max(1, width - middle), 0, 1)
    return _lines(rng.random(width) < chance, shape, centre)


def equispaced(shape: tuple[int, int], acceleration: float, centre: float, rng: np.random.Generator) -> Mask:
    """The middle columns, and others at even distances from a random first one, W / acceleration in all."""
    width = shape[1]
    middle = max(1, round(centre * width))
    left = width / acceleration - middle
    chosen = np.zeros(width, bool)
    if left >= 1:
        distance = (width - middle) / left
        chosen[np.arange(rng.uniform(0, distance), width - 0.5, distance).round().astype(int)] = True
    return _lines(chosen, shape, centre)


def poisson(shape: tuple[int, int], acceleration: float, centre: float, rng: np.random.Generator) -> Mask:
    """HW / acceleration samples that keep a distance from each other, which grows from frequency 0 outwards; the central ellipse besides.

    Of all samples that are not too near to a kept one, those with the highest number in their neighbourhood are kept, until none is left.
    The distances are scaled until the number fits, and what is too much or lacks then is left out or added by chance.
    """
    number = int(shape[0] * shape[1] / acceleration)
    rows, columns = ((np.arange(size) - size // 2) / (size / 2) for size in shape)
    away = np.sqrt(rows[:, None] ** 2 + columns**2)
    order = rng.permutation(away.size).reshape(shape).astype(np.int64) + 1
    low, high = 0.0, 2.0 * np.sqrt(acceleration) + 1
    kept = np.ones(shape, bool)
    for _ in range(8):
        slope = (low + high) / 2
        kept = _apart(order, np.round(slope * (0.3 + away)).astype(int))
        low, high = (slope, high) if kept.sum() > number else (low, slope)
    spare, lacking = int(kept.sum()) - number, number - int(kept.sum())
    where = np.flatnonzero(kept if spare > 0 else ~kept)
    kept.ravel()[where[np.argsort(order.ravel()[where])[: max(spare, lacking)]]] = spare < 0
    return kept | centre_ellipse(shape, centre)


def _apart(order: NDArray[np.int64], radius: NDArray[np.int64]) -> Mask:
    """Samples no two of which lie within the radius of one of them."""
    disks = {}
    for size in np.unique(radius):
        line = np.arange(-size, size + 1)
        disks[int(size)] = line[:, None] ** 2 + line**2 <= size**2
    kept, left = np.zeros(order.shape, bool), np.ones(order.shape, bool)
    while left.any():
        waiting, new = np.where(left, order, 0), np.zeros(order.shape, bool)
        for size, disk in disks.items():
            new |= (radius == size) & left & (ndimage.maximum_filter(waiting, footprint=disk, mode="constant") == order)
        for size, disk in disks.items():
            near = ndimage.binary_dilation(new & (radius == size), structure=disk)
            left &= ~near & ~((radius == size) & ndimage.binary_dilation(new, structure=disk))
        kept |= new
    return kept


_KINDS: dict[str, Callable[..., Mask]] = {
    "gaussian_2d": gaussian_2d,
    "gaussian_1d": gaussian_1d,
    "poisson": poisson,
    "equispaced": equispaced,
    "random": random_1d,
}


def make_mask(kind: Kind, shape: tuple[int, int], acceleration: float, centre: float, rng: np.random.Generator) -> Mask:
    """A mask (H, W), true where k-space is measured.

    Args:
        kind: ``gaussian_2d``, ``poisson``: single samples; ``gaussian_1d``, ``equispaced``, ``random``: whole columns.
        shape: (H, W).
        acceleration: About H W / measured, >= 1.
        centre: Fully measured middle: half-axes of an ellipse as shares of H and W (2-D; the paper's 0.02), or a share of the columns (1-D;
            fastMRI's 0.08 at 4x and 0.04 at 8x), in [0, 1].
        rng: Source of chance.

    Raises:
        ValueError: A value lies outside its range.
    """
    checks.one_of(Kind, kind=kind)
    checks.within("[1, inf)", acceleration=acceleration)
    checks.share(centre=centre)
    return _KINDS[kind](shape, acceleration, centre, rng)


def described(mask: Any) -> str:
    """``1-D`` for whole columns, else ``2-D``."""
    values = np.asarray(mask)
    return "1-D" if values.ndim < 2 or bool((values == values[..., :1, :]).all()) else "2-D"


__all__ = ["Kind", "Mask", "centre_ellipse", "described", "make_mask"]
