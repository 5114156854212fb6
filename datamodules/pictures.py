"""Image files, opened in one place with one way to say what is wrong with them, and what is commonly done to images."""

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lit_methods.datamodules.errors import BrokenRecordError, MissingFileError
from lit_methods.datamodules.reading import INCOMPLETE, file_size

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GREY_16_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I")  # the last: PNG with Pillow 10
INDEX_MODES = ("1", "L", "P", *GREY_16_MODES)
_GREY_16, _GREY_16_FORMATS = GREY_16_MODES[:-1], ("PNG", "PPM")  # formats without integers of 32 bits
_WITH_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
_COLOURS = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV")
_PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT")
_STRETCHED = {"L;2": 85, "L;4": 17}  # factors by which Pillow makes 8 bits of grey with 2 and 4 bits
FORMATS = ("JPEG", "PNG", "BMP", "DIB", "GIF", "PPM", "TIFF", "WEBP")  # decoded here; EPS and others start programs of their own
MAX_PIXELS = 1 << 26  # of an image, 8192 x 8192: three bytes each, twice while it is converted


@contextmanager
def decoding(path: Path, field: str, missing: str) -> Iterator[Image.Image]:
    """An image file whose header has been read; what Pillow raises inside is told with the file, and what to do.

    Args:
        path: The file that is decoded.
        field: What it is to the data set, for messages.
        missing: What to do where there is no such file, for the message.

    Yields:
        The picture, whose pixels aren't decoded yet.

    Raises:
        MissingFileError: There is no such file.
        BrokenRecordError: It is no file, truncated, no image of :data:`FORMATS`, or larger than :data:`MAX_PIXELS`.
    """
    file_size(path, field, missing)
    try:
        with Image.open(path, formats=FORMATS) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise BrokenRecordError(
                    path, field, f"has {picture.width} x {picture.height} pixels, more than {MAX_PIXELS:,}: cut it into pieces"
                )
            if picture.format == "PNG":
                _check_sums(path)
            yield picture
    except BrokenRecordError:
        raise
    except FileNotFoundError:  # since a moment ago
        raise MissingFileError(path, field, f"no such file: {missing}") from None
    except Image.UnidentifiedImageError as problem:
        raise BrokenRecordError(
            path, field, f"can't be decoded (none of {', '.join(FORMATS)}): truncated or no image, copy it again"
        ) from problem
    except Exception as problem:  # a broken file makes Pillow raise nearly anything
        raise BrokenRecordError(path, field, f"can't be decoded ({problem}): truncated or no image, copy it again") from problem


def _check_sums(path: Path) -> None:
    """Compare the check sums of a PNG's chunks, which Pillow passes over: it stops when it has all rows, whatever they are made of.

    Raises:
        ValueError: One differs.
    """
    with path.open("rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            content, stored = file.read(int.from_bytes(head[:4], "big")), file.read(4)
            if (
                head[4:] in _PIXEL_CHUNKS
                and len(stored) == 4
                and zlib.crc32(content, zlib.crc32(head[4:])) != int.from_bytes(stored, "big")
            ):
                raise ValueError(f"the check sum of {head[4:].decode()} is wrong")


def as_rgb(picture: Image.Image, path: Path, field: str = "image") -> Image.Image:
    """Eight bits of red, green and blue of an open picture.

    16-bit grey is scaled, 65535 being white. What is transparent lies on white, so that colours that nobody sees don't come forth.

    Args:
        picture: As Pillow has opened it.
        path: Its file, for the message.
        field: What it is to the data set, for the message.

    Raises:
        BrokenRecordError: Its mode has no known range (int32, float) or no colours that Pillow can convert.
    """
    mode = picture.mode
    if mode in _GREY_16 or (mode == "I" and picture.format in _GREY_16_FORMATS):
        values = np.asarray(picture).astype(np.int64)
        return Image.fromarray(((values + 128) // 257).clip(0, 255).astype(np.uint8)).convert("RGB")
    if mode in _WITH_ALPHA or (mode in _COLOURS and "transparency" in picture.info):
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
    if mode not in _COLOURS:
        raise BrokenRecordError(
            path,
            field,
            f"mode {mode} of Pillow ({picture.format}) has no known range or colours: expected 8-bit grey or colour, or 16-bit grey, whose "
            "white is 65535; convert the file to one of these",
        )
    return picture.convert("RGB")


def open_picture(
    path: Path,
    field: str = "image",
    missing: str = "the release is incomplete here, unpack its archive again",
    mode: Literal["RGB"] | None = "RGB",
) -> Image.Image:
    """Decode an image file.

    Args:
        path: File of one of :data:`FORMATS`, whatever its ending.
        field: What it is to the data set, for messages.
        missing: What to do where there is no such file, for the message.
        mode: ``RGB``, as :func:`as_rgb` converts; None: as stored. Class indices and the like: :func:`open_indices`.

    Raises:
        MissingFileError: There is no such file.
        BrokenRecordError: It is truncated, no image or too large, or its mode has no known range; the message names the mode.
    """
    with decoding(path, field, missing) as picture:
        picture.load()
        return picture.copy() if mode is None else as_rgb(picture, path, field)


def open_indices(path: Path, field: str, missing: str, modes: Sequence[str] = INDEX_MODES) -> NDArray[np.integer[Any]]:
    """Decode an image file whose pixels are numbers, such as class indices: as stored, never scaled and never turned into colours.

    Args:
        path: Image of one channel: 1, 2, 4, 8 or 16 bits, grey or with a palette, whose colours don't count.
        field: What it is to the data set, for messages.
        missing: What to do where there is no such file, for the message.
        modes: Pillow's modes that are allowed.

    Returns:
        (H, W) integers >= 0.

    Raises:
        MissingFileError: There is no such file.
        BrokenRecordError: It is truncated or no image, has several channels or fractions, or a number below 0.
    """
    with decoding(path, field, missing) as picture:
        raw = picture.tile[0][3] if picture.tile else None  # type: ignore[attr-defined]
        picture.load()
        mode, values = picture.mode, np.array(picture)
    if mode not in modes:
        raise BrokenRecordError(
            path,
            field,
            f"expected one channel of integer ids, got mode {mode} of shape {values.shape}: expected one number a pixel, not colours or "
            f"fractions (Pillow's modes {', '.join(modes)}); convert the file",
        )
    if values.dtype == np.bool_:
        values = values.astype(np.uint8)
    values = values // _STRETCHED.get(raw, 1) if isinstance(raw, str) else values
    if values.size and values.min() < 0:
        raise BrokenRecordError(path, field, f"it has the number {values.min()}: expected 0 and more")
    return values


def picture_size(path: Path, field: str = "image", missing: str = INCOMPLETE) -> tuple[int, int]:
    """Height and width of an image file, from its header alone.

    Raises:
        MissingFileError: There is no such file.
        BrokenRecordError: It is no image.
    """
    with decoding(path, field, missing) as picture:
        return picture.height, picture.width


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


__all__ = [
    "FORMATS",
    "GREY_16_MODES",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "INDEX_MODES",
    "MAX_PIXELS",
    "Prepare",
    "as_rgb",
    "crop_and_flip",
    "decoding",
    "open_indices",
    "open_listed",
    "open_picture",
    "picture_size",
]
