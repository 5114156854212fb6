"""The picture of DSnoT: the masks of a pruned network, kept weights in the colour of their sign, and each layer's expected error."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, TOP, BOTTOM = 1152, 648, 64, 420  # pixels; TOP, BOTTOM: of the masks
FULL = 276  # pixels of the longest bar
BACKGROUND, DEAD, POSITIVE, NEGATIVE, TEXT, LINE = (
    (13, 20, 33),
    (24, 34, 52),
    (240, 150, 70),
    (90, 160, 245),
    (214, 222, 235),
    (90, 104, 130),
)


def draw(run: Path) -> Image.Image:
    """The picture out of a finished run of ``configs/dsnot.yaml``.

    Args:
        run: The run's folder, with ``checkpoints/last.ckpt``.
    """
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    saved = next(state for key, state in checkpoint["callbacks"].items() if key.startswith("DSnoT"))
    canvas = Image.new("RGB", (WIDTH, HEIGHT), BACKGROUND)
    pen = ImageDraw.Draw(canvas)
    large, small = (ImageFont.load_default(size) for size in (26, 20))
    longest = max(layer["error_before"] for layer in saved["report"].values())
    places = ((40, 200), (300, 476), (836, 276))  # left edge and width of each layer
    for (name, mask), (left, width) in zip(saved["masks"].items(), places, strict=True):
        matrix = np.full((*mask.shape, 3), DEAD, dtype=np.uint8)
        weight = checkpoint["state_dict"][name]
        matrix[(mask & (weight > 0)).numpy()] = POSITIVE
        matrix[(mask & (weight <= 0)).numpy()] = NEGATIVE
        if matrix.shape[0] < 32:  # the classifier lies on its side
            matrix = matrix.transpose(1, 0, 2)
        canvas.paste(Image.fromarray(matrix).resize((width, BOTTOM - TOP), Image.Resampling.NEAREST), (left, TOP))
        pen.text((left, TOP - 36), f"{mask.shape[1]} to {mask.shape[0]}", font=large, fill=TEXT)
        for row, (key, colour) in enumerate((("error_before", LINE), ("error", POSITIVE))):
            top, value = BOTTOM + 28 + 62 * row, saved["report"][name][key]
            pen.rectangle((left, top + 26, left + max(2, round(FULL * value / longest)), top + 44), fill=colour)
            pen.text((left, top - 2), f"{value:.3f}", font=small, fill=TEXT)
    legend = "Mean expected error of a row, per image: of Wanda's mask (grey), and after at most four swaps in each row (orange)."
    pen.text((40, HEIGHT - 34), legend, font=small, fill=TEXT)
    return canvas
