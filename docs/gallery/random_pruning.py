"""The picture of random pruning: the masks of a trained network, kept weights in the colour of their sign, and each layer's density."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, TOP, BOTTOM = 1152, 648, 64, 540  # pixels; TOP, BOTTOM: of the masks
BACKGROUND, DEAD, POSITIVE, NEGATIVE, TEXT, LINE = (
    (13, 20, 33),
    (24, 34, 52),
    (240, 150, 70),
    (90, 160, 245),
    (214, 222, 235),
    (90, 104, 130),
)


def draw(run: Path) -> Image.Image:
    """The picture out of a finished run of ``configs/random_pruning.yaml``.

    Args:
        run: The run's folder, with ``artifacts/random_pruning_masks.pt`` and ``checkpoints/last.ckpt``.
    """
    masks = torch.load(run / "artifacts" / "random_pruning_masks.pt", weights_only=True)
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    canvas = Image.new("RGB", (WIDTH, HEIGHT), BACKGROUND)
    pen = ImageDraw.Draw(canvas)
    large, small = (ImageFont.load_default(size) for size in (26, 20))
    overall = sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())
    places = ((40, 200), (300, 476), (836, 276))  # left edge and width of each layer
    for (name, mask), (left, width) in zip(masks.items(), places, strict=True):
        matrix = np.full((*mask.shape, 3), DEAD, dtype=np.uint8)
        weight = state[name]
        matrix[(mask & (weight > 0)).numpy()] = POSITIVE
        matrix[(mask & (weight <= 0)).numpy()] = NEGATIVE
        if matrix.shape[0] < 32:  # the classifier lies on its side
            matrix = matrix.transpose(1, 0, 2)
        canvas.paste(Image.fromarray(matrix).resize((width, BOTTOM - TOP), Image.Resampling.NEAREST), (left, TOP))
        density = float(mask.float().mean())
        pen.text((left, TOP - 36), f"{mask.shape[1]} to {mask.shape[0]}", font=large, fill=TEXT)
        pen.text((left, BOTTOM + 14), f"{density:.0%} kept", font=large, fill=TEXT)
        pen.rectangle((left, BOTTOM + 58, left + width, BOTTOM + 72), fill=DEAD)
        pen.rectangle((left, BOTTOM + 58, left + round(width * density), BOTTOM + 72), fill=TEXT)
    pen.text((40, HEIGHT - 28), f"{overall:.0%} of all weights are kept. Positions are random and never change.", font=small, fill=LINE)
    return canvas
