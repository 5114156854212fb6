"""The picture of ADELE: training images, their given masks, the corrected ones and the true ones."""

from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, CELL, COLUMNS = 1152, 648, 132, 7  # pixels; images in a row
BACKGROUND, TEXT = (13, 20, 33), (214, 222, 235)


def draw(run: Path) -> Image.Image:
    """The picture out of a finished run of ``configs/adele.yaml``: the images whose labels came most nearer to the truth, and least.

    Args:
        run: The run's folder, with ``config.yaml`` and ``labels/``.
    """
    from lit_methods import LabelStore
    from lit_methods.datamodules import NoisyMasksDataModule
    from lit_methods.tasks.segmentation.module import colour_labels, grey_image

    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["data"]["init_args"]
    data = NoisyMasksDataModule(**(config | {"labels_folder": None}))
    data.setup("fit")
    store = LabelStore(run / "labels")
    assert data.clean_labels is not None
    better = np.array(
        [np.sum(store.original(i) != data.clean_labels(i)) - np.sum(store.current(i) != data.clean_labels(i)) for i in range(len(store))]
    )
    order = np.argsort(-better)
    chosen = order[np.linspace(0, len(order) - 1, COLUMNS).round().astype(int)].tolist()
    canvas = Image.new("RGB", (WIDTH, HEIGHT), BACKGROUND)
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(20)
    for row, name in enumerate(("image", "given", "corrected", "true")):
        pen.text((16, 44 + row * (CELL + 14) + CELL // 2), name, font=font, fill=TEXT)
    for place, i in enumerate(chosen):
        image = torch.as_tensor(data.training_image(i))
        rows = (grey_image(image), *(colour_labels(np.asarray(part(i))) for part in (store.original, store.current, data.clean_labels)))
        for row, pixels in enumerate(rows):
            picture = Image.fromarray(pixels).resize((CELL, CELL), Image.Resampling.NEAREST)
            canvas.paste(picture, (120 + place * (CELL + 14), 44 + row * (CELL + 14)))
        pen.text((120 + place * (CELL + 14), 12), f"{better[i]:+d} pixels right", font=ImageFont.load_default(16), fill=TEXT)
    return canvas
