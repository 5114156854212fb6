"""Procedural images with one to three filled shapes, whose boxes and classes are known."""

import numpy as np
from numpy.typing import NDArray

SHAPES = ("rectangle", "ellipse", "triangle")


def draw_detection_shapes(
    number: int, size: int = 64, most: int = 3, num_classes: int = 3, seed: int = 0
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.int64]]:
    """Images of filled shapes on a noisy ground; later shapes hide earlier ones in part.

    Args:
        number: N.
        size: Side S in pixels.
        most: M, shapes of an image at most; each number from 1 on is equally likely.
        num_classes: 2 (rectangles, ellipses) or 3 (triangles, too).
        seed: Two seeds share no image.

    Returns:
        Images (N, S, S, 3), boxes (N, M, 4) as corners in pixels, and classes (N, M), -1 where there is no shape.
    """
    rng = np.random.default_rng([seed, 91, size])
    count = rng.integers(1, most + 1, number)
    labels = rng.integers(num_classes, size=(number, most))
    labels[np.arange(most) >= count[:, None]] = -1
    sides = rng.uniform(0.2, 0.5, (number, most, 2)) * size
    low = rng.uniform(0, 1, (number, most, 2)) * (size - sides)
    boxes = np.concatenate([low, low + sides], axis=-1).round()
    colours = rng.uniform(0.35, 1.0, (number, most, 3))
    images = np.broadcast_to(rng.uniform(0.0, 0.25, (number, 1, 1, 3)), (number, size, size, 3)).copy()
    y, x = np.mgrid[:size, :size] + 0.5
    for place in range(most):
        left, top, right, bottom = (boxes[:, place, side, None, None] for side in range(4))
        across, down = (x - left) / (right - left), (y - top) / (bottom - top)  # 0 to 1 inside the box
        inside = (across >= 0) & (across <= 1) & (down >= 0) & (down <= 1)
        ellipse = (across - 0.5) ** 2 + (down - 0.5) ** 2 <= 0.25
        triangle = np.abs(across - 0.5) <= 0.5 * down
        kind = labels[:, place, None, None]
        cover = inside & ((kind == 0) | ((kind == 1) & ellipse) | ((kind == 2) & triangle))
        images = np.where(cover[..., None], colours[:, place, None, None], images)
    images = images + rng.normal(0, 0.04, images.shape)
    boxes[labels < 0] = 0
    return (255 * images.clip(0, 1)).astype(np.uint8), boxes.astype(np.float32), labels


__all__ = ["SHAPES", "draw_detection_shapes"]
