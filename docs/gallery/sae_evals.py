"""The picture of the supervised dictionary: agreement of edits against the weight that they remove, and the F1 of the features."""

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, TOP, BOTTOM = 1152, 648, 96, 560  # pixels; TOP, BOTTOM: of both parts
BACKGROUND, GRID, TEXT = (13, 20, 33), (40, 52, 72), (214, 222, 235)
COLOURS = {"io": (90, 160, 245), "s": (250, 150, 80), "pos": (130, 210, 140)}
LENGTHS = {"io": "1", "s": "0.3", "pos": "1"}
FIGURES = ("supervised", "greedy_1", "greedy_2", "greedy_4", "guided_1", "guided_2", "guided_4")


def draw(run: Path) -> Image.Image:
    """The picture out of a finished run of ``configs/sae_evals.yaml``.

    Args:
        run: The run's folder, with ``metrics.jsonl`` and ``media``.
    """
    lines = [json.loads(line)["metrics"] for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last = next(line for line in reversed(lines) if "sae_evals/val_edit" in line)
    canvas = Image.new("RGB", (WIDTH, HEIGHT), BACKGROUND)
    pen, font, small = ImageDraw.Draw(canvas), ImageFont.load_default(20), ImageFont.load_default(16)
    frontier(pen, last, font, small)
    found = max((run / "media").glob("sae_evals-f1-*.npz"), key=lambda file: file.stat().st_mtime)
    with np.load(found) as counted:
        histogram(pen, counted["counts"], font, small)
    return canvas


def frontier(pen: ImageDraw.ImageDraw, last: dict[str, float], font: ImageFont.ImageFont, small: ImageFont.ImageFont) -> None:
    """Left: a square for the supervised edit, a dot for each edit by features, larger for more of them."""
    left, right = 84, 620

    def place(weight: float, agreement: float) -> tuple[float, float]:
        return left + (right - left) * min(max(weight, 0.0), 1.0), BOTTOM - (BOTTOM - TOP) * agreement

    for level in (0, 0.25, 0.5, 0.75, 1):
        pen.line([place(0, level), place(1, level)], fill=GRID, width=2)
        pen.text((left - 52, place(0, level)[1] - 10), f"{level:.2f}", font=small, fill=TEXT)
        pen.text((place(level, 0)[0] - 14, BOTTOM + 8), f"{level:.2f}", font=small, fill=TEXT)
    for attribute, colour in COLOURS.items():
        for name in FIGURES:
            x, y = place(*(last[f"sae_evals/val_{figure}/{attribute}/{name}"] for figure in ("weight", "agreement")))
            if name == "supervised":
                pen.rectangle([x - 11, y - 11, x + 11, y + 11], fill=colour, outline=TEXT, width=2)
                continue
            kind, _, k = name.partition("_")
            size = 4 + 3 * int(k)
            pen.ellipse([x - size, y - size, x + size, y + size], outline=colour, fill=colour if kind == "greedy" else None, width=3)
    pen.text((left, 18), "edits that do what the full patch does", font=font, fill=TEXT)
    pen.text((left, 46), "square: supervised codes; dots: 1, 2, 4 features, full: greedy, ring: by F1", font=small, fill=TEXT)
    pen.text((left + 190, BOTTOM + 34), "weight removed", font=font, fill=TEXT)
    for row, (attribute, colour) in enumerate(COLOURS.items()):
        x = left + 170 * row
        pen.rectangle([x, BOTTOM + 64, x + 16, BOTTOM + 80], fill=colour)
        pen.text((x + 24, BOTTOM + 62), f"{attribute}, length {LENGTHS[attribute]}", font=small, fill=TEXT)


def histogram(pen: ImageDraw.ImageDraw, counts: np.ndarray, font: ImageFont.ImageFont, small: ImageFont.ImageFont) -> None:
    """Right: how many of the active features reach which F1 with their best value."""
    left, right = 720, 1112
    width, most = (right - left) / len(counts), max(int(counts.max()), 1)
    pen.text((left, 18), "best F1 of each active feature", font=font, fill=TEXT)
    for place, count in enumerate(counts.tolist()):
        top = BOTTOM - (BOTTOM - TOP) * count / most
        pen.rectangle([left + place * width + 2, top, left + (place + 1) * width - 2, BOTTOM], fill=(150, 165, 190))
        if count:
            pen.text((left + place * width + 2, top - 20), str(int(count)), font=small, fill=TEXT)
    for level in (0, 0.5, 1):
        pen.text((left + level * (right - left) - 12, BOTTOM + 8), f"{level:.1f}", font=small, fill=TEXT)
