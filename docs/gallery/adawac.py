"""The picture of AdaWAC: slices in the order of their learned weight of supervision, with their labels, and the weights of both groups."""

from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, CELL, COLUMNS = 1152, 648, 88, 11  # pixels; slices in a row
BACKGROUND, GRID, TEXT = (13, 20, 33), (40, 52, 72), (214, 222, 235)
DENSE, SPARSE = (250, 150, 80), (90, 160, 245)


def draw(run: Path) -> Image.Image:
    """The picture out of a finished run of ``configs/adawac.yaml``.

    Args:
        run: The run's folder, with ``config.yaml`` and ``artifacts/adawac_weights.pt``.
    """
    from lit_methods.datamodules import OrganSlicesDataModule
    from lit_methods.tasks.segmentation.module import colour_labels, grey_image

    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["data"]["init_args"]
    data = OrganSlicesDataModule(**(config | {"augment": False, "views": 1}))
    data.setup("fit")
    kept = torch.load(run / "artifacts" / "adawac_weights.pt", weights_only=True)
    weights, dense = kept["weights"][:, 0].numpy(), kept["group"].numpy() == 1
    order = np.argsort(weights)
    canvas = Image.new("RGB", (WIDTH, HEIGHT), BACKGROUND)
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(20)
    pen.text((40, 18), "slices from the smallest weight of supervision to the largest, with their labels", font=font, fill=TEXT)
    assert data.train_set is not None
    for place, index in enumerate(order[np.linspace(0, len(order) - 1, COLUMNS).round().astype(int)].tolist()):
        sample, left = data.train_set[0, index], 40 + place * (CELL + 9)
        for row, pixels in enumerate((grey_image(sample["image"]), colour_labels(sample["label"].numpy()))):
            picture = Image.fromarray(pixels).resize((CELL, CELL), Image.Resampling.NEAREST)
            canvas.paste(picture, (left, 60 + row * (CELL + 9)))
        pen.rectangle([left, 258, left + CELL - 1, 266], fill=DENSE if dense[index] else SPARSE)
        pen.text((left + 22, 272), f"{weights[index]:.2f}", font=font, fill=TEXT)
    low, high = float(weights.min()), float(weights.max())
    edges = np.linspace(low, high, 36)
    counts = [np.histogram(weights[group], edges)[0] for group in (~dense, dense)]
    top, floor, width = 350, 590, (WIDTH - 80) / (len(edges) - 1)
    for colour, count in zip((SPARSE, DENSE), counts, strict=True):
        for place, number in enumerate(count.tolist()):
            shift = 0 if colour == SPARSE else width / 2
            height = (floor - top) * number / max(int(c.max()) for c in counts)
            pen.rectangle([40 + place * width + shift, floor - height, 40 + place * width + shift + width / 2 - 2, floor], fill=colour)
    pen.line([(40, floor + 1), (WIDTH - 40, floor + 1)], fill=GRID, width=2)
    pen.text((40, floor + 10), f"{low:.2f}", font=font, fill=TEXT)
    pen.text((WIDTH - 84, floor + 10), f"{high:.2f}", font=font, fill=TEXT)
    pen.text((40, 318), "without an organ", font=font, fill=SPARSE)
    pen.text((230, 318), "with organs", font=font, fill=DENSE)
    return canvas
