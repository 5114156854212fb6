"""A tiny folder of images, and one of clips."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from lit_methods.datamodules.fake import Arguments, Writer, picture, smooth, text


def _images(arguments: Arguments, sizes: Mapping[str, int]) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    side = arguments["image_size"]
    for part, number in (("train", 4), ("val", 4), ("test", 4)):
        for index in range(number):
            picture(arguments["root"] / part / f"{index:05d}.png", smooth(rng, (side + 8, side + 4)))
    return {"root": arguments["root"]}


def _clips(arguments: Arguments, sizes: Mapping[str, int]) -> dict[str, Any]:
    """REDS: two clips for training and two for validation with their reductions; and what an argument names beside them."""
    rng = np.random.default_rng(0)
    scale, frames, least = arguments["scale"], arguments["frames"] + 1, max(arguments["size"], arguments["eval_size"] or 0) + 8
    width, height = (-(-least // scale) + 1) * scale, -(-least // scale) * scale
    found = {"root": arguments["root"]}
    for part, clips in (("train_sharp", ("000", "001")), ("val_sharp", ("000", "001"))):
        for clip in clips:
            for index in range(frames):
                pixels = smooth(rng, (width, height))
                picture(arguments["root"] / part / clip / f"{index:08d}.png", pixels)
                if part == "val_sharp":
                    low = smooth(rng, (width // scale, height // scale))
                    picture(arguments["root"] / f"{part}_bicubic" / f"X{scale}" / clip / f"{index:08d}.png", low)
    if (names := arguments.get("train_list")) is not None:
        text(names, *(str(arguments["root"] / "train_sharp" / clip) for clip in ("000", "001")))
        found["train_list"] = names
    if (stills := arguments.get("stills")) is not None:
        for index in range(2):
            picture(stills / f"{index:04d}.png", smooth(rng, (width, height)))
        found["stills"] = stills
    if (video := arguments.get("input")) is not None:
        for index in range(3):
            picture(video / f"{index:08d}.png", smooth(rng, (16, 12)))
        found["input"] = video
    return found


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


FAKES: dict[str, Writer] = {
    "RestorationDataModule": _images,
    "FaceRestorationDataModule": _faces,
    "VideoRestorationDataModule": _clips,
}
__all__ = ["FAKES"]
