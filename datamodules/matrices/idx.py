"""MNIST's file format: a magic number, the sizes, the bytes."""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lit_methods.datamodules.errors import BrokenRecordError, WrongRootError
from lit_methods.datamodules.reading import file_size, unpacked_size

MISSING = "download MNIST's four files again"


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """The array of an IDX file of bytes, which may be packed by gzip.

    Args:
        path: The file; it is unpacked if its name ends in ``.gz``.
        dimensions: How many it must have: 3 for images, 1 for labels.

    Raises:
        MissingFileError: There is no such file.
        BrokenRecordError: It is truncated, or another file.
    """
    size, head = file_size(path, "file", MISSING), 4 + 4 * dimensions
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            start = file.read(head)
            if len(start) < head or start[:4] != bytes((0, 0, 8, dimensions)):
                raise BrokenRecordError(path, "header", f"it begins with {start[:4].hex()}, not with 000008{dimensions:02x}: {MISSING}")
            shape = struct.unpack(f">{dimensions}I", start[4:])
            unpacked_size(math.prod(shape), size, path, "header")
            data = file.read(math.prod(shape) + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as problem:
        raise BrokenRecordError(path, "file", f"it can't be unpacked ({problem}): {MISSING}") from problem
    if len(data) != math.prod(shape):
        held = f"more than {len(data) - 1}" if len(data) > math.prod(shape) else len(data)
        raise BrokenRecordError(path, "data", f"{held} bytes for an array of {shape}: {MISSING}")
    return np.frombuffer(data, np.uint8).reshape(shape)


def write_idx(path: Path, array: NDArray[np.uint8]) -> None:
    """An IDX file of bytes, not packed, in folders that are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes())


def mnist_files(root: Path) -> tuple[Path, Path]:
    """Images and labels of MNIST: the training part where it is there, else the test part.

    Raises:
        WrongRootError: There are none.
    """
    for folder in (root, root / "MNIST" / "raw"):
        for part in ("train", "t10k"):
            for ending in ("", ".gz"):
                files = (folder / f"{part}-images-idx3-ubyte{ending}", folder / f"{part}-labels-idx1-ubyte{ending}")
                if all(file.is_file() for file in files):
                    return files
    raise WrongRootError(
        f"root={str(root)!r} has no train-images-idx3-ubyte and train-labels-idx1-ubyte (nor .gz, nor in MNIST/raw): {MISSING}, or set "
        "root=null for the digits of scikit-learn"
    )


def read_mnist(root: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images (N, H, W) and digits (N,) of MNIST: of the training part where it is there, else of the test part.

    Raises:
        WrongRootError: There are no such files.
        BrokenRecordError: A file is damaged, or the two don't belong together.
    """
    images, labels = mnist_files(root)
    pixels, digits = read_idx(images, 3), read_idx(labels, 1)
    if len(pixels) != len(digits):
        raise BrokenRecordError(labels, "labels", f"{len(digits)} labels for {len(pixels)} images: {MISSING}")
    return pixels, digits


__all__ = ["MISSING", "mnist_files", "read_idx", "read_mnist", "write_idx"]
