"""MNIST's file format: a magic number, the sizes, the bytes."""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lit_methods.datamodules.errors import BrokenRecordError
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


__all__ = ["MISSING", "read_idx", "write_idx"]
