"""A tiny folder of images in the layout of Kodak's."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from lit_methods.datamodules.fake import Arguments, Writer, picture, smooth


def _images(arguments: Arguments, sizes: Mapping[str, int]) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    side = arguments["size"]
    for index in range(2 * arguments["number"]):
        picture(arguments["root"] / f"kodim{index + 1:02d}.png", smooth(rng, (side + 6, side + 2)))
    return {"root": arguments["root"]}


FAKES: dict[str, Writer] = {"NoisyImagesDataModule": _images}
__all__ = ["FAKES"]
