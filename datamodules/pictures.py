"""Image files, opened in one place with one way to say what is wrong with them, and what is commonly done to images."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lit_methods.datamodules.errors import BrokenRecordError, MissingFileError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def open_picture(
    path: Path,
    field: str = "image",
    missing: str = "the release is incomplete here, unpack its archive again",
    mode: str | None = "RGB",
) -> Image.Image:
    """Decode an image file.

    Args:
        path: File of any format that Pillow reads.
        field: What it is to the data set, for messages.
        missing: What to do where there is no such file, for the message.
        mode: Pillow's colour mode that the image is converted to; None: as stored.

    Raises:
        MissingFileError: There is no such file.
        BrokenRecordError: It is truncated or no image.
    """
    try:
        with Image.open(path) as picture:
            picture.load()
            return picture.convert(mode) if mode is not None else picture.copy()
    except FileNotFoundError:
        raise MissingFileError(path, field, f"no such file: {missing}") from None
    except (OSError, ValueError, SyntaxError) as problem:  # Pillow's ways to say that a file is broken
        raise BrokenRecordError(path, field, f"can't be decoded ({problem}): truncated or no image, copy it again") from problem


def open_listed(paths: Sequence[Path], index: int) -> Image.Image:
    """Decode one of several image files: :func:`open_picture` for data sets that are asked by index."""
    return open_picture(paths[index])


def crop_and_flip(image: Tensor, draw: tuple[int, ...], border: int = 4, mirror: bool = True) -> Tensor:
    """Black pixels on each side, a random crop of the old size, a mirror image in half of the cases.

    Args:
        image: (C, H, W).
        draw: (seed, epoch, index), which decide everything.
        border: Pixels on each side.
        mirror: False: no mirror images, as for digits.
    """
    rng = np.random.default_rng(draw)
    top, left = rng.integers(2 * border + 1, size=2).tolist()
    height, width = image.shape[1:]
    image = F.pad(image, (border,) * 4)[:, top : top + height, left : left + width]
    return image.flip(2) if mirror and rng.integers(2) else image


class Prepare:
    """(3, H, W) uint8 -> float32, augmented and normalised."""

    def __init__(self, augment: bool, mean: Sequence[float], std: Sequence[float], border: int = 4, mirror: bool = True) -> None:
        self.augment, self.border, self.mirror = augment, border, mirror
        self.mean, self.std = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)

    def __call__(self, image: Tensor, draw: tuple[int, ...]) -> Tensor:
        image = crop_and_flip(image, draw, self.border, self.mirror) if self.augment else image
        return (image / 255 - self.mean) / self.std


__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "Prepare", "crop_and_flip", "open_listed", "open_picture"]
