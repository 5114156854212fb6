"""Tiny releases in the official layouts, to try a pipeline before the data have arrived. What is in the pictures and tables is made up.

The writers stand beside the readers, in ``fake.py`` of each folder of datamodules. ``FAKES`` there says which writer belongs to which
class: it gets the arguments of the datamodule, with the places to write to in those that are paths, and returns the arguments that must be
set to read what it wrote. ``sizes`` holds numbers that something else in the config asks for, such as ``num_users`` of the model.
"""

import importlib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Arguments = dict[str, Any]
Writer = Callable[[Arguments, Mapping[str, int]], dict[str, Any]]


def text(path: Path, *lines: str) -> None:
    """A text file of some lines, in folders that are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def picture(path: Path, pixels: NDArray[Any]) -> None:
    """An image file, in folders that are made: pixels (H, W, 3) or (H, W) uint8, or (H, W) uint16 in a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, "PNG" if path.suffix.lower() == ".png" else "JPEG")


def flat(colour: tuple[int, int, int], size: tuple[int, int] = (24, 18)) -> NDArray[np.uint8]:
    """Pixels (H, W, 3) of one colour; size is (W, H)."""
    return np.full((size[1], size[0], 3), colour, np.uint8)


def smooth(rng: np.random.Generator, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Pixels (H, W, 3) of a random picture without detail, which takes little room; size is (W, H)."""
    coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    return np.asarray(coarse.resize(size, Image.Resampling.BICUBIC))


def writer_of(kind: type) -> Writer | None:
    """The writer of a datamodule's releases; None: it has none."""
    package = kind.__module__.rpartition(".")[0]
    try:
        module = importlib.import_module(f"{package}.fake")
    except ModuleNotFoundError as error:
        if error.name != f"{package}.fake":
            raise
        return None
    found: Writer | None = getattr(module, "FAKES", {}).get(kind.__name__)
    return found


def path_arguments(kind: type) -> list[str]:
    """The datamodule's arguments that are files or folders."""
    return [name for name, argument in inspect.signature(kind).parameters.items() if "Path" in str(argument.annotation)]


def write_fake(kind: type, root: Path | None, sizes: Mapping[str, int] | None = None, **arguments: Any) -> dict[str, Any]:
    """A tiny release for a datamodule.

    The same arguments give the same bytes.

    Args:
        kind: Class of the datamodule.
        root: Folder to write to; None for a datamodule that has no root of its own.
        sizes: Numbers that something else asks for: ``num_users``, ``num_items``, ``images`` (training images to have at least).
        **arguments: Arguments of the datamodule, as far as they aren't its defaults: they decide the layout. Paths are places to write to.

    Returns:
        Arguments that must be set to read it.

    Raises:
        ValueError: The datamodule has no writer.
    """
    writer = writer_of(kind)
    if writer is None:
        raise ValueError(f"{kind.__name__} has no writer of releases: FAKES in fake.py beside the class would name it")
    defaults = {name: argument.default for name, argument in inspect.signature(kind).parameters.items()}
    places = {name: Path(arguments[name]) for name in path_arguments(kind) if arguments.get(name) is not None}
    known = {name: value for name, value in defaults.items() if value is not inspect.Parameter.empty} | arguments | places
    if root is not None:
        known["root"] = Path(root)
        known["root"].mkdir(parents=True, exist_ok=True)
    return writer(known, sizes or {})


__all__ = ["Arguments", "Writer", "flat", "path_arguments", "picture", "smooth", "text", "write_fake", "writer_of"]
