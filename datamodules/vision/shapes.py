"""The built-in images: ten kinds of shapes and textures in random places, sizes and colours, drawn by ourselves."""

import numpy as np
from numpy.typing import NDArray

KINDS = ("disc", "ring", "square", "triangle", "cross", "rows", "columns", "diagonals", "checkerboard", "star")


def _cover(kind: int, x: NDArray, y: NDArray, size: NDArray, rng: np.random.Generator) -> NDArray[np.bool_]:
    """(N, S, S) foreground of N images; ``x`` and ``y`` run from the centre of the shape, image side 2."""
    distance, side = np.hypot(x, y), np.maximum(np.abs(x), np.abs(y))
    if kind <= 1:
        return (distance < size) & (distance > 0.6 * size * kind)
    if kind == 2:
        return side < 0.85 * size
    if kind == 3:
        return (y < 0.7 * size) & (1.7 * np.abs(x) - y < 0.9 * size)
    if kind == 4:
        return (np.minimum(np.abs(x), np.abs(y)) < 0.25 * size) & (side < size)
    if kind == 9:
        angle, number = np.arctan2(y, x), rng.integers(4, 8, size.shape)
        return distance < size * (0.75 + 0.35 * np.sin(number * angle))
    pitch = 9 / (0.6 + size)
    along = {5: y, 6: x, 7: (x + y) / np.sqrt(2)}
    waves = np.sin(pitch * along[kind]) if kind in along else np.sin(pitch * x) * np.sin(pitch * y)
    return waves > 0


def draw_shapes(number: int, num_classes: int, size: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images with a shape or texture each.

    With 10 classes the class is the kind, and colours say nothing. With 100 it is ``10 * kind + hue`` of the foreground, in ten steps.

    Args:
        number: N.
        num_classes: 10 or 100; all are equally frequent, to within one image.
        size: Side S in pixels.
        seed: Two seeds share no image.

    Returns:
        (N, S, S, 3) uint8 RGB and (N,) classes, in random order.
    """
    rng = np.random.default_rng([seed, num_classes, size])
    labels = rng.permutation(np.arange(number) % num_classes)
    kinds, hues = labels, rng.uniform(size=number)
    if num_classes == 100:
        kinds, hues = labels // 10, (labels % 10 + 0.2 + 0.6 * hues) / 10
    grid = (np.arange(size) + 0.5) * 2 / size - 1
    place = rng.uniform(-0.3, 0.3, (2, number, 1, 1))
    radius = rng.uniform(0.45, 0.8, (number, 1, 1))
    cover = np.zeros((number, size, size), dtype=bool)
    for kind in range(len(KINDS)):
        chosen = np.flatnonzero(kinds == kind)
        x, y = grid[None, None, :] - place[0, chosen], grid[None, :, None] - place[1, chosen]
        cover[chosen] = _cover(kind, x, y, radius[chosen], rng)
    return paint(cover, hues, rng), labels.astype(np.int64)


FACTORS = {"shape": KINDS[:5], "colour": ("red", "yellow", "green", "cyan", "blue", "magenta"), "position": ("nw", "ne", "sw", "se")}


def draw_factors(number: int, size: int, seed: int) -> tuple[NDArray[np.uint8], dict[str, NDArray[np.int64]]]:
    """Images of one shape each, in one of six colours and in one of four quarters, drawn independently of each other.

    Args:
        number: N.
        size: Side S in pixels.
        seed: Two seeds share no image.

    Returns:
        (N, S, S, 3) uint8 RGB, and for each name of :data:`FACTORS` the (N,) place in its tuple.
    """
    rng = np.random.default_rng([seed, 53, size])
    factors = {name: rng.integers(len(values), size=number) for name, values in FACTORS.items()}
    hues = (factors["colour"] + rng.uniform(-0.2, 0.2, number)) / len(FACTORS["colour"]) % 1
    grid = (np.arange(size) + 0.5) * 2 / size - 1
    quarter = np.stack([factors["position"] % 2, factors["position"] // 2]) * 0.5 - 0.25
    place = quarter[..., None, None] + rng.uniform(-0.1, 0.1, (2, number, 1, 1))
    radius = rng.uniform(0.5, 0.7, (number, 1, 1))
    cover = np.zeros((number, size, size), dtype=bool)
    for kind in range(len(FACTORS["shape"])):
        chosen = np.flatnonzero(factors["shape"] == kind)
        x, y = grid[None, None, :] - place[0, chosen], grid[None, :, None] - place[1, chosen]
        cover[chosen] = _cover(kind, x, y, radius[chosen], rng)
    return paint(cover, hues, rng), factors


def paint(cover: NDArray, hues: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Images of one colour on a darker one, with noise.

    Args:
        cover: (N, H, W) where the front is, bool or share in [0, 1].
        hues: (N,) of the front, in turns of the wheel of colours.
        rng: What the back and the noise are drawn from.

    Returns:
        (N, H, W, 3) uint8 RGB.
    """
    wheel = np.abs((hues[:, None] * 6 + np.array([0, 4, 2])) % 6 - 3) - 1
    front = 0.25 + 0.75 * np.clip(wheel, 0, 1)
    back = rng.uniform(0.0, 0.6, (len(cover), 3))
    back *= np.minimum(1, (front.mean(axis=1) - 0.2) / back.mean(axis=1))[:, None]  # darker than the shape
    share = cover[..., None].astype(np.float64)
    images = share * front[:, None, None] + (1 - share) * back[:, None, None] + rng.normal(0, 0.08, (*cover.shape, 3))
    return (255 * np.clip(images, 0, 1)).astype(np.uint8)
