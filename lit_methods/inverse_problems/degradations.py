"""Degradations of images as a config names them: operators made of numbers and files in the place of masks and kernels."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from lit_methods import checks
from lit_methods.inverse_problems.operators import Blur, Inpainting, gaussian_kernel, motion_kernel


class BoxInpainting(Inpainting):
    """Images without what lies in a box.

    Args:
        size: Height and width of the images.
        box: Top, left, height and width of what is missing; null: the box in the middle, a third of the area.

    Raises:
        ValueError: The box isn't inside the image, or leaves nothing.
    """

    def __init__(self, size: Sequence[int], box: Sequence[int] | None = None) -> None:
        height, width = _two(size)
        if box is None:
            sides = [round(side / 3**0.5) for side in (height, width)]
            box = [*((side - part) // 2 for side, part in zip((height, width), sides, strict=True)), *sides]
        top, left, tall, wide = box
        inside = min(top, left) >= 0 and min(tall, wide) >= 1 and top + tall <= height and left + wide <= width
        if not inside or (tall, wide) == (height, width):
            raise ValueError(f"box is {list(box)}: give top, left, height, width of a part of {height} x {width} pixels")
        mask = torch.ones(height, width, dtype=torch.bool)
        mask[top : top + tall, left : left + wide] = False
        super().__init__(mask)


class ScatteredInpainting(Inpainting):
    """Images of which chosen pixels alone are observed, the same in all channels.

    Args:
        size: Height and width of the images.
        observed: Pixels that are.
        seed: Which.

    Raises:
        ValueError: More than there are.
    """

    def __init__(self, size: Sequence[int], observed: int, seed: int = 0) -> None:
        height, width = _two(size)
        checks.within(f"[1, {height * width}]", "pixels", observed=observed)
        chosen = torch.randperm(height * width, generator=torch.Generator().manual_seed(seed))[:observed]
        mask = torch.zeros(height * width, dtype=torch.bool)
        mask[chosen] = True
        super().__init__(mask.view(height, width))


class MaskFileInpainting(Inpainting):
    """Images without what is black in a mask file.

    Args:
        path: Grey image file; what is brighter than half is observed.

    Raises:
        MissingFileError: There is no such file.
    """

    def __init__(self, path: Path) -> None:
        from lit_methods.datamodules.pictures import open_picture

        grey = np.asarray(open_picture(Path(path).expanduser(), "mask", "give an image file").convert("L"))
        super().__init__(torch.from_numpy(grey > 127))


class MotionBlur(Blur):
    """Images blurred by a camera that moved by chance; they go on at the opposite side.

    Args:
        kernel_size: Pixels of the kernel's side; the paper's is 61.
        seed: Of the movement.
    """

    def __init__(self, kernel_size: int = 61, seed: int = 0) -> None:
        super().__init__(motion_kernel(kernel_size, torch.Generator().manual_seed(seed)))


class GaussianSmoothing(Blur):
    """Images blurred by a Gaussian; they go on at the opposite side.

    Args:
        kernel_size: Pixels of the kernel's side.
        sigma: Standard deviation in pixels.
    """

    def __init__(self, kernel_size: int = 9, sigma: float = 1.5) -> None:
        super().__init__(gaussian_kernel(kernel_size, sigma))


def _two(size: Sequence[int]) -> tuple[int, int]:
    height, width = size
    checks.at_least(1, height=height, width=width)
    return height, width


__all__ = ["BoxInpainting", "GaussianSmoothing", "MaskFileInpainting", "MotionBlur", "ScatteredInpainting"]
