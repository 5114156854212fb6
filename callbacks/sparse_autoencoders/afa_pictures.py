"""Pictures of the AFA evaluation: norms of codes over norms of inputs, and how two errors are spread per layer."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from lit_methods.panels import ImageMedia

Numbers = NDArray[np.float64]
COLOURS = ((31, 119, 180), (214, 96, 32), (44, 140, 60), (180, 40, 60), (120, 80, 170), (120, 90, 70), (200, 90, 160), (90, 90, 90))
DARK, PALE = (50, 50, 50), (222, 226, 232)
_MOST = 4000  # points that are drawn


def _canvas(size: tuple[int, int]) -> tuple[Image.Image, ImageDraw.ImageDraw, tuple[int, int, int, int]]:
    picture = Image.new("RGB", size, (255, 255, 255))
    return picture, ImageDraw.Draw(picture, "RGBA"), (64, size[0] - 64, 30, size[1] - 48)  # left, right, top, bottom


def colour(place: int) -> tuple[int, int, int]:
    """The colour of the layer at a place in their order."""
    return COLOURS[place % len(COLOURS)]


def zf_plot(
    norm_z: Numbers, norm_f: Numbers, layer: Numbers, bands: Sequence[tuple[float, float, float]], size: tuple[int, int] = (640, 520)
) -> ImageMedia:
    """The ZF plot: a point for each sample, dashed the line where both norms agree.

    Args:
        norm_z: (N,) norms of inputs, N >= 1.
        norm_f: (N,) norms of codes.
        layer: (N,) whose samples they are: a colour for each.
        bands: (error, lower slope, upper slope) of each shaded band.
        size: Width and height in pixels.
    """
    picture, pen, (left, right, top, bottom) = _canvas(size)
    ends = [float(np.quantile(values, 0.995)) * 1.1 or 1.0 for values in (norm_z, norm_f)]

    def at(x: float, y: float) -> tuple[float, float]:
        return left + x / ends[0] * (right - left), bottom - y / ends[1] * (bottom - top)

    corner = at(0, 0)
    for _, lower, upper in sorted(bands, reverse=True):
        steepest = min(upper, 999.0)
        pen.polygon([corner, at(ends[0], lower * ends[0]), at(ends[0], steepest * ends[0])], fill=(90, 140, 200, 36))
    for place, name in enumerate(np.unique(layer).tolist()):
        chosen = np.flatnonzero(layer == name)
        step = max(1, len(norm_z) // _MOST)
        for index in chosen[::step].tolist():
            x, y = at(float(norm_z[index]), float(norm_f[index]))
            pen.ellipse((x - 2, y - 2, x + 2, y + 2), fill=(*colour(place), 110))
    for start in np.arange(0, 1, 0.04).tolist():  # dashes
        pen.line([at(start * ends[0], start * ends[0]), at((start + 0.02) * ends[0], (start + 0.02) * ends[0])], fill=DARK, width=2)
    pen.rectangle((0, 0, size[0], top), fill=(255, 255, 255))
    pen.rectangle((0, bottom, size[0], size[1]), fill=(255, 255, 255))
    pen.rectangle((left, top, right, bottom), outline=DARK)
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        x, y = at(share * ends[0], share * ends[1])
        pen.text((x - 10, bottom + 6), f"{share * ends[0]:.3g}", fill=DARK)
        pen.text((8, y - 6), f"{share * ends[1]:.3g}", fill=DARK)
    shades = ", ".join(f"{error:g}" for error, _, _ in bands)
    pen.text((left, 8), f"norm of the code over norm of the input; dashed: equal; shaded: eps (h - 1) = {shades}", fill=DARK)
    pen.text(((left + right) // 2 - 40, bottom + 24), "norm of the input", fill=DARK)
    under = float((norm_f < norm_z).mean())
    alt = f"{len(norm_z)} samples: norm of the code over norm of the input; {under:.0%} lie under the line where both are equal"
    return ImageMedia(np.asarray(picture).copy(), alt)


def half_violins(errors: Sequence[tuple[str, Numbers]], layer: Numbers, size: tuple[int, int] = (640, 420)) -> ImageMedia:
    """How two errors are spread in each layer, the first to the left and the second to the right, each clipped at its 99 % quantile.

    Args:
        errors: Two names, each with (N,) values >= 0, N >= 1.
        layer: (N,) whose samples they are.
        size: Width and height in pixels.
    """
    picture, pen, (left, right, top, bottom) = _canvas(size)
    names = np.unique(layer).tolist()
    room = (right - left) / len(names)
    for side, (_, values) in enumerate(errors):
        end = float(np.quantile(values, 0.99)) or 1.0
        for place, name in enumerate(names):
            centre = left + (place + 0.5) * room
            counts, edges = np.histogram(np.minimum(values[layer == name], end), bins=48, range=(0.0, end))
            smooth = np.convolve(counts, [0.25, 0.5, 0.25], mode="same")
            widths = smooth / max(float(smooth.max()), 1.0) * room * 0.42 * (1 if side else -1)
            heights = bottom - (edges[:-1] + edges[1:]) / 2 / end * (bottom - top)
            outline = [
                (centre, float(heights[0])),
                *zip((centre + widths).tolist(), heights.tolist(), strict=True),
                (centre, float(heights[-1])),
            ]
            pen.polygon(outline, fill=(*colour(side), 150), outline=colour(side))
            middle = bottom - min(float(np.median(values[layer == name])), end) / end * (bottom - top)
            pen.line([(centre, middle), (centre + room * 0.42 * (1 if side else -1), middle)], fill=DARK, width=2)
        for share in (0.0, 0.25, 0.5, 0.75, 1.0):
            y = bottom - share * (bottom - top)
            pen.text((right + 6 if side else 8, y - 6), f"{share * end:.2g}", fill=colour(side))
    for place, name in enumerate(names):
        pen.text((left + (place + 0.5) * room - 12, bottom + 6), f"{name:g}", fill=DARK)
    pen.rectangle((left, top, right, bottom), outline=DARK)
    pen.text((left, 8), f"left: {errors[0][0]}; right: {errors[1][0]}; lines: medians", fill=DARK)
    pen.text(((left + right) // 2 - 16, bottom + 24), "layer", fill=DARK)
    medians = ", ".join(f"{name} {np.median(values):.3g}" for name, values in errors)
    return ImageMedia(np.asarray(picture).copy(), f"Spread of two errors in {len(names)} layer(s); medians: {medians}")
