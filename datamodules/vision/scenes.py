"""Drawn scenes with a mask: one or two textured shapes before a plain back, whose class is the texture and not the colour."""

import numpy as np
from numpy.typing import NDArray

from lit_methods.datamodules.vision.shapes import paint

TEXTURES = ("back", "plain", "rows", "columns", "diagonals", "checkerboard")


def _textures(kinds: NDArray[np.int64], x: NDArray[np.float64], y: NDArray[np.float64], phase: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N, S, S) brightness in 0 to 1 of the textures 1 to 5."""
    pitch = 2 * np.pi * 4
    along = np.select(
        [k == kinds[:, None, None] for k in (2, 3, 4)], [y + 0 * x, x + 0 * y, (x + y) / np.sqrt(2)], default=np.zeros_like(x + y)
    )
    stripes = np.sin(pitch * along + phase) > 0
    checks = np.sin(pitch * x + phase) * np.sin(pitch * y + phase) > 0
    return np.where((kinds == 1)[:, None, None], 1.0, np.where((kinds == 5)[:, None, None], checks, stripes)).astype(np.float64)


def draw_scenes(number: int, size: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]:
    """Images, their masks, and the class of the larger shape.

    Args:
        number: N.
        size: Side S in pixels.
        seed: Two seeds share no image.

    Returns:
        (N, S, S, 3) uint8 RGB; (N, S, S) int64 places in :data:`TEXTURES`; (N,) int64 class of the first shape, less 1.
    """
    rng = np.random.default_rng([seed, 71, size])
    grid = (np.arange(size) + 0.5) * 2 / size - 1
    x, y = grid[None, None, :], grid[None, :, None]
    images = np.zeros((number, size, size, 3), np.uint8)
    masks = np.zeros((number, size, size), np.int64)
    first = rng.integers(1, len(TEXTURES), number)
    cover = np.zeros((number, size, size))
    for shape, (radius, spread) in enumerate((((0.45, 0.65), 0.35), ((0.2, 0.35), 0.65))):
        kinds = first if shape == 0 else rng.integers(1, len(TEXTURES), number)
        sides = rng.uniform(*radius, (2, number, 1, 1))
        places = rng.uniform(-spread, spread, (2, number, 1, 1))
        across, down = (x - places[0]) / sides[0], (y - places[1]) / sides[1]
        round_ = rng.integers(2, size=(number, 1, 1)) == 1
        inside = np.where(round_, np.hypot(across, down), np.maximum(np.abs(across), np.abs(down))) < 1
        texture = 0.15 + 0.85 * _textures(kinds, x, y, rng.uniform(0, 2 * np.pi, (number, 1, 1)))
        painted = paint(np.where(inside, texture, 0.0), rng.uniform(size=number), rng)
        where = inside if shape else np.ones_like(inside)
        images = np.where(where[..., None], painted, images)
        masks, cover = np.where(inside, kinds[:, None, None], masks), np.maximum(cover, inside)
    return images, masks, first - 1


__all__ = ["TEXTURES", "draw_scenes"]
