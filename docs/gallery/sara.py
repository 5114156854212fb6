"""The picture of SaRA: weights of the largest matrix behind the tuning, those that were frozen and those that were chosen."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 1152, 648, 60, 1112, 90, 570  # pixels
BACKGROUND, GRID, TEXT = (13, 20, 33), (90, 104, 130), (214, 222, 235)
FROZEN, CHOSEN = (125, 180, 240), (250, 176, 70)


def draw(run: Path) -> Image.Image:
    """The picture out of a finished run of ``configs/sara.yaml``.

    Args:
        run: The run's folder, with ``sara.safetensors`` and ``checkpoints/last.ckpt``.
    """
    from lit_methods.callbacks.fine_tuning.delta import load_delta
    from lit_methods.runs.checkpoints import read_state_dict

    delta, weights = load_delta(run / "sara.safetensors"), read_state_dict(run / "checkpoints" / "last.ckpt")
    name = max(delta.entries, key=lambda name: weights[f"network.{name}"].numel())
    values, tau = weights[f"network.{name}"].flatten().numpy(), float(delta.notes["threshold"])
    chosen = np.zeros(len(values), dtype=bool)
    chosen[delta.entries[name].index.numpy()] = True
    reach = 8 * tau
    edges = np.linspace(-reach, reach, 129)
    counts = [np.histogram(values[which], edges)[0] for which in (~chosen, chosen)]
    canvas = Image.new("RGB", (WIDTH, HEIGHT), BACKGROUND)
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(20)
    pen.text((LEFT, 20), f"values of {name} behind the tuning: frozen, bit by bit as before", font=font, fill=FROZEN)
    pen.text((LEFT, 48), f"and chosen, |P| < {tau:.4f} before ({chosen.sum():,} of {len(values):,})", font=font, fill=CHOSEN)
    highest = max(int(count.max()) for count in counts)
    step = (RIGHT - LEFT) / (len(edges) - 1)
    for count, colour, shift in ((counts[0], FROZEN, 0.0), (counts[1], CHOSEN, 0.5)):
        for place, number in enumerate(count):
            left = LEFT + (place + shift) * step
            pen.rectangle([left, BOTTOM - (BOTTOM - TOP) * number / highest, left + 0.5 * step, BOTTOM], fill=colour)
    for value, words in ((-tau, "-tau"), (0.0, "0"), (tau, "tau"), (-reach, f"{-reach:.2f}"), (0.97 * reach, f"{reach:.2f}")):
        across = LEFT + (RIGHT - LEFT) * (value + reach) / (2 * reach)
        if words.endswith("tau"):
            pen.line([(across, TOP), (across, BOTTOM)], fill=GRID, width=2)
        pen.text((across - 14, BOTTOM + 12), words, font=font, fill=TEXT)
    return canvas
