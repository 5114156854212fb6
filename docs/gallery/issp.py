"""The picture of ISS-P: an enlarged patch, a layer after the switch, and how pruned and kept weights part before it."""

import json
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 1152, 648  # pixels
BACKGROUND, GRID, TEXT, DEAD = (13, 20, 33), (40, 52, 72), (214, 222, 235), (24, 34, 52)
PRUNED, KEPT, NEGATIVE = (60, 125, 245), (250, 176, 70), (120, 190, 120)
LAYER = "network.body.1.conv1.weight"
SIDE, TOP = 308, 56  # of the three images


def draw(run: Path) -> Image.Image:
    """The picture out of a finished run of ``configs/issp.yaml``.

    Args:
        run: The run's folder, with ``media/superres-picture-*.png``, ``metrics.jsonl`` and ``checkpoints/last.ckpt``.
    """
    canvas = Image.new("RGB", (WIDTH, HEIGHT), BACKGROUND)
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(22)
    newest = max((run / "media").glob("superres-picture-*.png"), key=lambda path: path.stat().st_mtime)
    panel = Image.open(newest).convert("RGB")
    side = panel.height
    gap = (panel.width - 3 * side) // 2
    for index, title in enumerate(("bicubic", "90 % pruned", "truth")):
        left = 48 + index * (SIDE + 66)
        part = panel.crop((index * (side + gap), 0, index * (side + gap) + side, side))
        canvas.paste(part.resize((SIDE, SIDE), Image.Resampling.NEAREST), (left, TOP))
        pen.text((left, TOP - 34), title, font=font, fill=TEXT)
    weight = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"][LAYER].numpy()
    canvas.paste(Image.fromarray(kernels(weight)).resize((192, 192), Image.Resampling.NEAREST), (48, 428))
    pen.text((48, 394), "a layer's kernels", font=font, fill=TEXT)
    pen.text((330, 394), "mean |W|: kept, pruned; the switch at step 360", font=font, fill=TEXT)
    box = (330, 436, 1104, 616)
    series = {name: points(run, f"issp/magnitude_{name}") for name in ("pruned", "kept")}
    last = max(step for step, _ in series["kept"])
    highest = 1.1 * max(value for _, value in series["kept"])
    for share in (0, 0.5, 1):
        height = box[1] + share * (box[3] - box[1])
        pen.line([(box[0], height), (box[2], height)], fill=GRID, width=2)
    middle = box[0] + (box[2] - box[0]) * 360 / (last + 1)
    pen.line([(middle, box[1]), (middle, box[3])], fill=TEXT, width=2)
    for name, colour in (("pruned", PRUNED), ("kept", KEPT)):
        places = [(box[0] + (box[2] - box[0]) * step / last, box[3] - (box[3] - box[1]) * value / highest) for step, value in series[name]]
        pen.line(places, fill=colour, width=5, joint="curve")
    return canvas


def kernels(weight: NDArray[np.float32]) -> NDArray[np.uint8]:
    """(out, in, 3, 3) -> (3 out, 3 in, 3): kept weights by sign, pruned ones dark."""
    flat = weight.transpose(0, 2, 1, 3).reshape(3 * weight.shape[0], 3 * weight.shape[1])
    colours = np.full((*flat.shape, 3), DEAD, dtype=np.uint8)
    colours[flat > 0], colours[flat < 0] = KEPT, NEGATIVE
    return colours


def points(run: Path, metric: str) -> list[tuple[float, float]]:
    """(step, value) of a metric."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(record["step"], record["metrics"][metric]) for record in records if metric in record.get("metrics", {})]
