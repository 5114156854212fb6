"""A picture of searches: in each row a reference image, the words, and the first images that were found."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from lit_methods.panels import ImageMedia

Pixels = NDArray[np.uint8]
SIDE, GAP, LINE = 88, 8, 16  # pixels: of an image, between two, of a line of words
RIGHT, WRONG, PAPER, INK = (46, 160, 67), (190, 190, 190), (255, 255, 255), (20, 20, 20)


class Search(NamedTuple):
    """One query: reference image, words, images found, and which of them are right."""

    reference: Pixels
    words: str
    found: Sequence[Pixels]
    right: Sequence[bool]


def search_picture(searches: Sequence[Search]) -> ImageMedia:
    """Rows of searches; a green frame marks a right image.

    Args:
        searches: One or more, each with as many images as the others or fewer.
    """
    columns = 1 + max(len(search.found) for search in searches)
    step, high = SIDE + GAP, SIDE + GAP + LINE
    canvas = Image.new("RGB", (max(columns * step + 2 * GAP, 240), len(searches) * high + GAP), PAPER)
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(11)
    for row, search in enumerate(searches):
        top = GAP + row * high
        pen.text((GAP, top - 3), search.words.encode("ascii", "replace").decode()[:120], font=font, fill=INK)
        for column, pixels in enumerate((search.reference, *search.found)):
            left = GAP + column * step + (GAP if column else 0)
            tile = Image.fromarray(pixels)
            smooth = max(tile.size) > SIDE
            scale = (SIDE - 6) / max(tile.size)
            size = max(1, round(tile.width * scale)), max(1, round(tile.height * scale))
            tile = tile.resize(size, Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST)
            if column:
                frame = RIGHT if search.right[column - 1] else WRONG
                pen.rectangle([left, top + LINE - 3, left + SIDE - 1, top + LINE + SIDE - 4], outline=frame, width=3)
            canvas.paste(tile, (left + (SIDE - tile.width) // 2, top + LINE - 3 + (SIDE - tile.height) // 2))
    count = sum(sum(search.right) for search in searches)
    words = (
        f"{len(searches)} queries, each a reference image with words, and the first {columns - 1} images found; {count} of all are right"
    )
    return ImageMedia(np.asarray(canvas).copy(), words)


__all__ = ["Search", "search_picture"]
