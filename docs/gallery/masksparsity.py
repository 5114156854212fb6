"""The picture of MaskSparsity: the batch-norm scale of every channel after training, and their means over training."""

import json
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 1152, 648  # pixels
BACKGROUND, LINE, TEXT = (13, 20, 33), (60, 74, 98), (214, 222, 235)
STAYS, GOES = (250, 176, 70), (90, 150, 250)
LAYERS = [f"network.norms.{index}" for index in range(3)]
LEFT, RIGHT, BAR, STEP, ROW, TOP = 40, 690, 26, 40, 190, 56  # pixels: of the bars, and from one row to the next


def draw(run: Path) -> Image.Image:
    """The picture out of a finished run of ``configs/masksparsity.yaml``.

    Args:
        run: The run's folder, with ``metrics.jsonl``, ``artifacts/masksparsity_keep_masks.pt`` and ``checkpoints/last.ckpt``.
    """
    masks = torch.load(run / "artifacts" / "masksparsity_keep_masks.pt", weights_only=True)
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    scales = {name: state[f"{name}.weight"].abs() for name in LAYERS}
    largest = max(float(scale.max()) for scale in scales.values())
    picture = Image.new("RGB", (WIDTH, HEIGHT), BACKGROUND)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(20)
    for row, (name, scale) in enumerate(scales.items()):
        base = TOP + ROW * row + ROW - 46
        pen.text((LEFT, base - ROW + 34), f"layer {row + 1}: {len(scale)} channels, {int(masks[name].sum())} stay", font=font, fill=TEXT)
        pen.line((LEFT, base + 1, RIGHT, base + 1), fill=LINE, width=2)
        for channel, (size, stays) in enumerate(zip(scale.tolist(), masks[name].tolist(), strict=True)):
            left = LEFT + STEP * channel
            pen.rectangle((left, base - max(2, round((ROW - 84) * size / largest)), left + BAR, base), fill=STAYS if stays else GOES)
    for row, (words, colour) in enumerate((("mean |scale| of channels that stay", STAYS), ("and of those that go", GOES))):
        pen.text((770, 40 + 28 * row), words, font=font, fill=colour)
    box = (770, 120, 1112, HEIGHT - 90)
    kept, removed = (series(run, f"masksparsity/gamma_{name}") for name in ("kept", "removed"))
    top = 1.05 * max(kept + removed)
    for values, colour in ((kept, STAYS), (removed, GOES)):
        width, height = (box[2] - box[0]) / (len(values) - 1), (box[3] - box[1]) / top
        pen.line(
            [(box[0] + width * index, box[3] - height * value) for index, value in enumerate(values)], fill=colour, width=6, joint="curve"
        )
    pen.line((box[0], box[1], box[0], box[3], box[2], box[3]), fill=LINE, width=2)
    pen.text((box[0], box[3] + 14), f"epoch 1 to {len(kept)}; axis from 0 to {top:.1f}", font=font, fill=TEXT)
    return picture


def series(run: Path, metric: str) -> list[float]:
    """Logged values of a metric."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["metrics"][metric] for line in lines if metric in json.loads(line)["metrics"]]
