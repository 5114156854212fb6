"""A tiny folder of images."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from lit_methods.datamodules.fake import Arguments, Writer, picture, smooth


def _images(arguments: Arguments, sizes: Mapping[str, int]) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    side = arguments["image_size"]
    for part, number in (("train", 4), ("val", 4), ("test", 4)):
        for index in range(number):
            picture(arguments["root"] / part / f"{index:05d}.png", smooth(rng, (side + 8, side + 4)))
    return {"root": arguments["root"]}


def _faces(arguments: Arguments, sizes: Mapping[str, int]) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    side, places = (
        arguments["image_size"],
        {name: arguments[name] for name in ("root", "pairs", "faces") if arguments.get(name) is not None},
    )
    folders = [places["root"] / "train", *(places.get("pairs", places["root"]) / part for part in ("lq", "gt"))]
    for folder in [*folders, *([places["faces"]] if "faces" in places else [])]:
        for index in range(8 if folder.name == "train" else 4):
            picture(folder / f"{index:05d}.png", smooth(rng, (side, side)))
    return places


FAKES: dict[str, Writer] = {"RestorationDataModule": _images, "FaceRestorationDataModule": _faces}
__all__ = ["FAKES"]
