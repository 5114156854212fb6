"""Points and lines between two axes, drawn without a plotting library."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

_COLOURS = ("#4c6ef5", "#f08c00", "#2b8a3e", "#c92a2a", "#862e9c", "#0b7285", "#5c940d", "#a61e4d", "#364fc7", "#495057")
_SIZE = (720, 400)
_LEFT, _TOP, _RIGHT, _BOTTOM = 62, 14, 230, 44


def scatter(
    series: Mapping[str, Sequence[tuple[float, float, bool]]], across: str, up: str, log: bool = False, joined: bool = False
) -> NDArray[np.uint8]:
    """Points in colours, with a legend.

    Args:
        series: Name -> points (x, y, ringed).
        across: What x is.
        up: What y is.
        log: Whether x is drawn by its logarithm.
        joined: Whether points of a series are joined, from left to right.

    Returns:
        (400, 720, 3) uint8.
    """
    picture = Image.new("RGB", _SIZE, "white")
    pen = ImageDraw.Draw(picture)
    points = [point for own in series.values() for point in own if math.isfinite(point[0]) and math.isfinite(point[1])]
    right, bottom = _SIZE[0] - _RIGHT, _SIZE[1] - _BOTTOM
    pen.rectangle((_LEFT, _TOP, right, bottom), outline="#868e96")

    def transform(x: float) -> float:
        return math.log10(max(x, 1e-12)) if log else x

    (low_x, high_x), (low_y, high_y) = (_span([transform(x) for x, _, _ in points]), _span([y for _, y, _ in points]))

    def place(x: float, y: float) -> tuple[float, float]:
        along = (transform(x) - low_x) / (high_x - low_x)
        return _LEFT + along * (right - _LEFT), bottom - (y - low_y) / (high_y - low_y) * (bottom - _TOP)

    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        x, y = _LEFT + share * (right - _LEFT), bottom - share * (bottom - _TOP)
        value = low_x + share * (high_x - low_x)
        pen.line((x, bottom, x, bottom + 4), fill="#868e96")
        pen.line((_LEFT - 4, y, _LEFT, y), fill="#868e96")
        pen.text((x - 16, bottom + 6), f"{10**value if log else value:.3g}", fill="#343a40")
        pen.text((4, y - 6), f"{low_y + share * (high_y - low_y):.3g}", fill="#343a40")
    pen.text((_LEFT + 6, bottom + 24), across, fill="#343a40")
    pen.text((_LEFT + 6, _TOP + 4), up, fill="#343a40")
    for number, (name, own) in enumerate(series.items()):
        colour: Any = _COLOURS[number % len(_COLOURS)]
        shown = sorted((x, y, ringed) for x, y, ringed in own if math.isfinite(x) and math.isfinite(y))
        if joined and len(shown) > 1:
            pen.line([place(x, y) for x, y, _ in shown], fill=colour, width=2)
        for x, y, ringed in shown:
            a, b = place(x, y)
            pen.ellipse((a - 4, b - 4, a + 4, b + 4), fill=colour)
            if ringed:
                pen.ellipse((a - 8, b - 8, a + 8, b + 8), outline=colour, width=2)
        height = _TOP + 4 + 16 * number
        if height < bottom:
            pen.ellipse((right + 12, height + 2, right + 20, height + 10), fill=colour)
            pen.text((right + 26, height), name[:34], fill="#343a40")
    return np.asarray(picture).copy()


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values, default=0.0), max(values, default=1.0)
    edge = (high - low) * 0.05 or max(abs(high) * 0.05, 0.05)
    return low - edge, high + edge


__all__ = ["scatter"]
