"""Pictures of metric learning."""

import numpy as np
from PIL import Image, ImageDraw

from lit_methods.panels import ImageMedia
from lit_methods.tasks.metric_learning.opis import OPISResult

_MOST = 100  # classes that are drawn


def utility_curves(result: OPISResult, size: tuple[int, int] = (720, 420)) -> ImageMedia:
    """The utility of each class over the range of thresholds, and their mean.

    Args:
        result: What :func:`~lit_methods.tasks.metric_learning.opis.opis` gives.
        size: Width and height in pixels.

    Returns:
        Thin lines: up to 100 classes, evenly chosen by mean utility, red the worst and blue the best. Thick line: the mean of all.
    """
    width, height = size
    picture = Image.new("RGB", size, (255, 255, 255))
    pen = ImageDraw.Draw(picture)
    left, right, top, bottom = 48, width - 16, 28, height - 40
    span = float(result.thresholds[-1] - result.thresholds[0])
    x = left + (result.thresholds - result.thresholds[0]).cpu().numpy() / span * (right - left)

    def line(values: np.ndarray, colour: tuple[int, int, int], thick: int) -> None:
        pen.line(list(zip(x.tolist(), (bottom - values * (bottom - top)).tolist(), strict=True)), fill=colour, width=thick)

    for level in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = bottom - level * (bottom - top)
        pen.line([(left, y), (right, y)], fill=(222, 226, 232))
        pen.text((8, y - 6), f"{level:.2f}", fill=(70, 70, 70))
    order = result.class_mean_utility.argsort(stable=True).cpu().numpy()
    drawn = order[np.linspace(0, len(order) - 1, min(len(order), _MOST)).round().astype(int)]
    utility = result.utility.cpu().numpy()
    for place, row in enumerate(drawn):
        share = place / max(len(drawn) - 1, 1)
        line(utility[row], (int(200 - 140 * share), int(70 + 60 * share), int(60 + 150 * share)), 1)
    line(result.mean_utility.cpu().numpy(), (20, 20, 20), 4)
    score = float(result.opis)
    pen.text((left, 8), f"utility of {len(order)} classes; black: mean; OPIS {score:.4f}", fill=(20, 20, 20))
    pen.text((left, bottom + 8), f"distance threshold {float(result.thresholds[0]):.3f}", fill=(70, 70, 70))
    pen.text((right - 34, bottom + 8), f"{float(result.thresholds[-1]):.3f}", fill=(70, 70, 70))
    pixels = np.asarray(picture).copy()
    return ImageMedia(pixels, f"Utility of {len(order)} classes over the distance threshold, and their mean; OPIS {score:.4f}")


__all__ = ["utility_curves"]
