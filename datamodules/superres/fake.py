"""Tiny releases of DIV2K, Flickr2K and the benchmarks of super-resolution in their official layouts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lit_methods.datamodules.fake import Arguments, Writer, picture, smooth
from lit_methods.datamodules.superres.pairs import cut, downsample

HIGH, LOW = ("DIV2K_train_HR", "HR"), ("DIV2K_train_LR_bicubic", "LR_bicubic")


def pairs(root: Path, folders: Sequence[str], scale: int, size: tuple[int, int] = (41, 50), number: int = 1) -> None:
    """High-resolution images and their reductions, ``<name>.png`` and ``X<scale>/<name>x<scale>.png``, in each folder.

    Args:
        root: Folder to write to.
        folders: Such as ``DIV2K``, ``Flickr2K`` and ``benchmark/Set5``; DIV2K names its inner folders in its own way.
        scale: Factor of the reduction.
        size: Width and height; images grow by one pixel in height from one to the next.
        number: Images of each folder.
    """
    rng = np.random.default_rng(0)
    for folder in folders:
        own = 0 if folder == "DIV2K" else 1
        for k in range(1, number + 1):
            pixels = smooth(rng, (size[0], size[1] + k))
            name = {"DIV2K": f"{k:04d}", "Flickr2K": f"{k:06d}"}.get(folder, f"{Path(folder).name.lower()}_{k}")
            picture(root / folder / HIGH[own] / f"{name}.png", pixels)
            picture(root / folder / LOW[own] / f"X{scale}" / f"{name}x{scale}.png", downsample(cut(pixels, scale), scale))


def _super_resolution(arguments: Arguments, sizes: Mapping[str, int]) -> dict[str, Any]:
    side = arguments["patch_size"] + 8
    names = dict.fromkeys([arguments["val"], *arguments["test"]])
    pairs(arguments["root"], list(arguments["train"]), arguments["scale"], (side, side), 3)
    pairs(arguments["root"], [f"benchmark/{name}" for name in names], arguments["scale"], (48, 40), 2)
    return {"root": arguments["root"]}


FAKES: dict[str, Writer] = {"SuperResolutionDataModule": _super_resolution}
__all__ = ["FAKES", "pairs"]
