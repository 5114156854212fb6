"""Files that are whole or not there, and how paths are shown."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A place to write to, which takes the place of ``path`` when the block ends, and leaves it as it was when the block raises.

    Readers see the old file or the new one, never half of one. Several processes may write the same path: the last one wins.

    Args:
        path: The file to write; its folder must exist.

    Yields:
        A path in the same folder (a rename across file systems would be a copy), hidden, and removed if anything goes wrong.

    Raises:
        OSError: The file can't be written or moved; ``path`` is as it was.

    Example:
        >>> with replacing(Path("weights.npz")) as partial:  # doctest: +SKIP
        ...     numpy.savez(partial.open("wb"), weight=weight)
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):  # what went wrong before is what counts
            partial.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a whole file or nothing: :func:`replacing` for content that is at hand. Text is written as UTF-8."""
    with replacing(path) as partial:
        partial.write_bytes(content if isinstance(content, bytes) else content.encode())


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, whole or not at all."""
    write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def shown(path: Path) -> str:
    """A path as a user reads it: below the current folder where it lies there, else as it is."""
    place = path.resolve()
    return str(place.relative_to(Path.cwd())) if place.is_relative_to(Path.cwd()) else str(path)
