"""The picture of CoPrompt: images of base and new classes with their words, and what tuning does to both accuracies."""

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lit_methods.datamodules.fewshot import coloured_shapes as shapes

WIDTH, HEIGHT = 1152, 648  # pixels
BACKGROUND, GRID, TEXT, FAINT = (13, 20, 33), (40, 52, 72), (214, 222, 235), (130, 142, 162)
BASE, NEW = (250, 176, 70), (90, 150, 250)
SHOWN = 4  # classes of each part
LOWEST = 0.6  # accuracy at the bottom of the chart


def draw(run: Path) -> Image.Image:
    """The picture out of a finished run of ``configs/coprompt.yaml``.

    Args:
        run: The run's folder, with ``metrics.jsonl``.
    """
    canvas = Image.new("RGB", (WIDTH, HEIGHT), BACKGROUND)
    pen = ImageDraw.Draw(canvas)
    large, small = ImageFont.load_default(22), ImageFont.load_default(16)
    classes = shapes.task_classes()
    pictures, labels = shapes.draw_images(1, 2, classes)
    pictures = shapes.in_another_light(pictures, 2)
    half = len(classes) // 2
    for column, (title, first, colour) in enumerate((("base classes", 0, BASE), ("new classes", half, NEW))):
        left = 40 + 300 * column
        pen.text((left, 28), title, font=large, fill=colour)
        for row in range(SHOWN):
            own, top = classes[first + row], 76 + 140 * row
            picture = Image.fromarray(pictures[int(np.flatnonzero(labels == first + row)[0])])
            canvas.paste(picture.resize((112, 112), Image.Resampling.NEAREST), (left, top))
            pen.text((left + 124, top + 18), shapes.class_name(*own), font=small, fill=TEXT)
            words = shapes.sentences(*own)[0].split()
            pen.multiline_text((left + 124, top + 48), "\n".join((" ".join(words[:3]), " ".join(words[3:]))), font=small, fill=FAINT)
    box = (690, 96, 1110, 560)
    pen.text((box[0], 28), "accuracy over steps; thin: zero-shot", font=large, fill=TEXT)

    def height_of(accuracy: float) -> float:
        return box[3] - (max(accuracy, LOWEST) - LOWEST) / (1 - LOWEST) * (box[3] - box[1])

    for accuracy in (0.6, 0.7, 0.8, 0.9, 1.0):
        pen.line([(box[0], height_of(accuracy)), (box[2], height_of(accuracy))], fill=GRID, width=2)
        pen.text((box[0] - 38, height_of(accuracy) - 10), f"{accuracy:.2f}", font=small, fill=FAINT)
    for split, colour in (("base", BASE), ("new", NEW)):
        tuned = points(run, f"prompting/val_{split}_accuracy")
        last = max(step for step, _ in tuned)
        height = height_of(points(run, f"prompting/val_zero_shot_{split}_accuracy")[-1][1])
        pen.line([(box[0], height), (box[2], height)], fill=colour, width=2)
        places = [(box[0] + (box[2] - box[0]) * step / last, height_of(value)) for step, value in tuned]
        pen.line(places, fill=colour, width=6, joint="curve")
        pen.text((box[0] + (0 if split == "base" else 200), 584), f"{split} classes: {tuned[-1][1]:.2f}", font=large, fill=colour)
    return canvas


def points(run: Path, metric: str) -> list[tuple[float, float]]:
    """(step, value) of a metric."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(record["step"], record["metrics"][metric]) for record in records if metric in record.get("metrics", {})]
