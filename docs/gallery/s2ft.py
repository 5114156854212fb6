"""The picture of S2FT: what it changed in each down projection, in the base model's own order."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, LEFT, RIGHT, TOP = 1152, 648, 60, 1112, 96  # pixels
BACKGROUND, FIELD, TEXT, CHANGED = np.array([13, 20, 33]), np.array([30, 40, 58]), (214, 222, 235), np.array([250, 176, 70])


def draw(run: Path) -> Image.Image:
    """The picture out of a finished run of ``configs/s2ft.yaml``.

    Args:
        run: The run's folder, with ``s2ft.safetensors`` and ``checkpoints/last.ckpt``.
    """
    from lit_methods.callbacks.fine_tuning.delta import load_delta
    from lit_methods.runs.checkpoints import read_state_dict

    delta, weights = load_delta(run / "s2ft.safetensors"), read_state_dict(run / "checkpoints" / "last.ckpt")
    canvas = Image.new("RGB", (WIDTH, HEIGHT), tuple(BACKGROUND))
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(20)
    pen.text((LEFT, 20), "change of the down projections: rows are outputs, columns are channels", font=font, fill=TEXT)
    top = TOP
    for name, entry in delta.entries.items():
        weight = weights[f"network.{name}"]
        change = np.zeros(tuple(weight.shape))
        change[:, entry.index.numpy()] = entry.values.abs().numpy()
        share = np.clip(change / np.quantile(change[change > 0], 0.95), 0, 1)[..., None]
        pixels = (FIELD * (1 - share) + CHANGED * share).astype(np.uint8)
        words = f"{name}: {len(entry.index)} of {weight.shape[1]} channels, {entry.values.numel():,} of {weight.numel():,} values"
        pen.text((LEFT, top - 26), words, font=font, fill=TEXT)
        canvas.paste(Image.fromarray(pixels).resize((RIGHT - LEFT, 134), Image.Resampling.NEAREST), (LEFT, top))
        top += 184
    return canvas
