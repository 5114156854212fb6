"""A tiny folder of images in the layout of Kodak's, and one of MNIST's."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from lit_methods.datamodules.fake import Arguments, Writer, picture, smooth
from lit_methods.datamodules.matrices.fake import mnist


def _images(arguments: Arguments, sizes: Mapping[str, int]) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    side = arguments["size"]
    for index in range(2 * arguments["number"]):
        picture(arguments["root"] / f"kodim{index + 1:02d}.png", smooth(rng, (side + 6, side + 2)))
    return {"root": arguments["root"]}


def _mnist(arguments: Arguments, sizes: Mapping[str, int]) -> dict[str, Any]:
    mnist(arguments["root"])
    return {"root": arguments["root"], "samples": None}


FAKES: dict[str, Writer] = {"NoisyImagesDataModule": _images, "WeightDecayDataModule": _mnist}
__all__ = ["FAKES"]
