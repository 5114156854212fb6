"""The picture of ConsistencyDet: the noise that it begins with, and the boxes that it finds in one step and in eight."""

from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image, ImageDraw, ImageFont

from lit_methods import CascadedHead, ConsistencyDet, SmallDetectionBackbone
from lit_methods.datamodules import DetectionShapesDataModule
from lit_methods.detection.consistencydet.core import detection_scalings
from lit_methods.detection.noise import to_pixels
from lit_methods.detection.scores import draw_boxes
from lit_methods.runs.checkpoints import load_into

WIDTH, HEIGHT, LEFT, SIDE, COUNT = 1152, 648, 150, 194, 5  # pixels; images in a row
BACKGROUND, TEXT, NOISE = (13, 20, 33), (214, 222, 235), (150, 190, 245)


def load(run: Path) -> tuple[ConsistencyDet, dict[str, torch.Tensor], list[str]]:
    """The trained detector, images of the validation with their boxes, and the names of the classes."""
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    settings, data = config["model"]["init_args"], DetectionShapesDataModule(**config["data"]["init_args"])
    backbone, head = (settings.pop(name)["init_args"] for name in ("backbone", "head"))
    model = ConsistencyDet(SmallDetectionBackbone(**backbone), CascadedHead(**head), **settings)
    load_into(model, run / "checkpoints" / "last.ckpt")
    data.setup("validate")
    return model.eval(), next(iter(data.val_dataloader())), data.class_names


@torch.no_grad()
def draw(run: Path) -> Image.Image:
    """The picture out of a finished run of ``configs/consistencydet.yaml``.

    Args:
        run: The run's folder, with ``config.yaml`` and ``checkpoints/last.ckpt``.
    """
    model, batch, names = load(run)
    rows = slice(1, 1 + COUNT)
    images, size, index = batch["image"][rows], batch["size"][rows], batch["index"][rows]
    truths = [boxes[label >= 0] for boxes, label in zip(batch["boxes"][rows], batch["label"][rows], strict=True)]
    canvas = Image.new("RGB", (WIDTH, HEIGHT), BACKGROUND)
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(20)
    features, noise = model.features(images), model.noise(index, 8)
    start = to_pixels(detection_scalings(model.levels[:1].float()).inp * model.levels[0].float() * noise[0], size)
    for row, (words, steps) in enumerate((("the boxes it\nbegins with", 0), ("one step", 1), ("eight steps", 8))):
        top = 16 + row * (SIDE + 12)
        pen.multiline_text((14, top + SIDE / 2 - 14), words, font=font, fill=TEXT)
        for place in range(COUNT):
            one = slice(place, place + 1)
            found = model.combine(model.sample([part[one] for part in features], size[one], noise[: max(steps, 1), one]))
            nothing = [type(found[0])(*(part[:0] for part in found[0]))]
            pixels = draw_boxes(images[one], truths[one], found if steps else nothing, names, threshold=0.4)
            tile = Image.fromarray(np.ascontiguousarray(pixels[2:-2, 2:-2]))
            if not steps:
                factor, ink = tile.width / images.shape[-1], ImageDraw.Draw(tile)
                for left, up, right, down in (start[place] * factor).tolist():
                    ink.rectangle((min(left, right), min(up, down), max(left, right), max(up, down)), outline=NOISE)
            canvas.paste(tile.resize((SIDE, SIDE)), (LEFT + place * (SIDE + 6), top))
    return canvas
