"""The picture of Sparse-IFT: the dense layer's square of weights beside the larger sparse one with as many, and what its mask has tried."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

WIDTH, HEIGHT, TOP, CELL = 1152, 648, 76, 8  # pixels; CELL: of a weight
BACKGROUND, NEVER, DROPPED, ALWAYS, GROWN, INK = (13, 20, 33), (24, 34, 52), (52, 76, 120), (125, 180, 240), (240, 196, 70), (214, 222, 235)
LAYER = "network.layers.1.weight"


def draw(run: Path) -> Image.Image:
    """The picture out of a finished run of ``configs/sparse_ift.yaml``.

    Args:
        run: The run's folder, with ``checkpoints/last.ckpt``.
    """
    states = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]
    state = next(state for key, state in states.items() if key.startswith("SparseIFT"))
    now, ever, always = (state[key][LAYER] for key in ("masks", "ever", "always"))
    canvas = Image.new("RGB", (WIDTH, HEIGHT), BACKGROUND)
    pen = ImageDraw.Draw(canvas)
    large, small = (ImageFont.load_default(size) for size in (26, 20))
    side = len(now) * CELL
    left = WIDTH - side - 60
    dense = len(now) // 2 * CELL  # sparse wide at 75 %: half the width
    pen.rectangle((60, TOP, 60 + dense - 1, TOP + dense - 1), fill=ALWAYS)
    pen.text((60, TOP - 40), f"dense: {(len(now) // 2) ** 2:,} weights", font=large, fill=INK)
    pen.text((left, TOP - 40), f"wide: {int(now.sum()):,} of {now.numel():,} weights", font=large, fill=INK)
    canvas.paste(Image.fromarray(colours(now, ever, always)).resize((side, side), Image.Resampling.NEAREST), (left, TOP))
    rows = (
        (ALWAYS, "active all the time", always),
        (GROWN, "active now, not always", now & ~always),
        (DROPPED, "tried and dropped", ever & ~now),
    )
    for index, (colour, words, mask) in enumerate(rows):
        top = TOP + dense + 48 + 48 * index
        pen.rectangle((60, top, 84, top + 24), fill=colour)
        pen.text((100, top), f"{words}: {float(mask.float().mean()):.0%}", font=small, fill=INK)
    return canvas


def colours(now: Tensor, ever: Tensor, always: Tensor) -> np.ndarray:
    """Masks (outputs, inputs) -> (outputs, inputs, 3) RGB."""
    kind = ever.long() + now.long() * 2 - always.long()  # 0 never, 1 dropped, 2 always, 3 grown
    return np.array([NEVER, DROPPED, ALWAYS, GROWN], dtype=np.uint8)[kind.numpy()]
