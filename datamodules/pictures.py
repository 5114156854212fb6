"""Image files: opened in one place, with one way to say what is wrong with them."""

from pathlib import Path

from PIL import Image

from lit_methods.datamodules.errors import BrokenRecordError, MissingFileError


def open_picture(
    path: Path,
    field: str = "image",
    missing: str = "the release is incomplete here, unpack its archive again",
    mode: str | None = "RGB",
) -> Image.Image:
    """Decode an image file.

    Args:
        path: Of any format of Pillow.
        field: What it is to the data set, for messages.
        missing: What to do where there is no such file, for the message.
        mode: Of Pillow, that it is converted to; None: as stored.

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


__all__ = ["open_picture"]
