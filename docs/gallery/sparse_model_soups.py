"""The picture of Sparse Model Soups: one run of IMP, its sparsity, learning rate and held-out accuracy over the steps."""

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, LEFT, RIGHT = 1152, 648, 300, 1100  # pixels; LEFT, RIGHT: of the curves
BACKGROUND, TEXT, LINE = (13, 20, 33), (214, 222, 235), (58, 72, 98)
STRIPS = (  # metric, words, colour, top
    ("sparse_model_soups/sparsity", "weights that are gone", (240, 150, 70), 60),
    ("sparse_model_soups/learning_rate", "learning rate", (90, 160, 245), 240),
    ("classifier/val_accuracy", "held-out accuracy", (120, 200, 140), 420),
)
TALL = 130  # pixels of a strip


def draw(run: Path) -> Image.Image:
    """The picture out of a finished run of ``configs/sparse_model_soups.yaml``.

    Args:
        run: The run's folder, with ``metrics.jsonl``.
    """
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    curves = {name: [(e["step"], e["metrics"][name]) for e in entries if name in e["metrics"]] for name, *_ in STRIPS}
    phases = [(e["step"], e["metrics"]["sparse_model_soups/phase"]) for e in entries if "sparse_model_soups/phase" in e["metrics"]]
    canvas = Image.new("RGB", (WIDTH, HEIGHT), BACKGROUND)
    pen = ImageDraw.Draw(canvas)
    large, small = (ImageFont.load_default(size) for size in (24, 19))
    last = max(step for step, _ in phases)
    begins = [next(step for step, phase in phases if phase == number) for number in sorted({phase for _, phase in phases})]
    for number, (begin, end) in enumerate(zip(begins, [*begins[1:], last], strict=True)):
        place = LEFT + (RIGHT - LEFT) * begin / last
        pen.line((place, 50, place, HEIGHT - 80), fill=LINE, width=2)
        words = f"phase {number}" if number else "dense training"
        pen.text((LEFT + (RIGHT - LEFT) * (begin + end) / 2 / last, 22), words, font=small, fill=TEXT, anchor="mm")
    for name, words, colour, top in STRIPS:
        strip(pen, curves[name], last, top, colour)
        low, high = (pick(value for _, value in curves[name]) for pick in (min, max))
        pen.text((30, top + TALL / 2), words, font=large, fill=colour, anchor="lm")
        pen.text((LEFT - 14, top), f"{high:.3g}", font=small, fill=TEXT, anchor="rm")
        pen.text((LEFT - 14, top + TALL), f"{low:.3g}", font=small, fill=TEXT, anchor="rm")
    legend = "lit soup retrains several copies in each phase, which share the mask, and goes on with their average."
    pen.text((30, HEIGHT - 40), legend, font=small, fill=TEXT)
    return canvas


def strip(pen: ImageDraw.ImageDraw, curve: Sequence[tuple[int, float]], last: int, top: int, colour: tuple[int, int, int]) -> None:
    """One curve between its lowest and highest value."""
    low, high = min(value for _, value in curve), max(value for _, value in curve)
    points = [(LEFT + (RIGHT - LEFT) * step / last, top + TALL * (1 - (value - low) / ((high - low) or 1.0))) for step, value in curve]
    pen.line(points, fill=colour, width=4, joint="curve")
