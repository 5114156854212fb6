"""The picture of ShrinkMatch: uncertain digits, each with its ranked predictions, and which of them the shrinking takes away."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

WIDTH, HEIGHT = 1152, 648  # pixels
BACKGROUND, GRID = (13, 20, 33), (40, 52, 72)
LIKELIEST, REMOVED, KEPT = (250, 176, 70), (60, 125, 245), (170, 180, 195)
COLUMNS, ROWS, DIGIT, BAR = 3, 5, 88, 17  # cells across and down; pixels of a digit and of a bar


def draw(run: Path) -> Image.Image:
    """The picture out of a finished run of ``configs/shrinkmatch.yaml``.

    Args:
        run: The run's folder, with ``config.yaml`` and ``checkpoints/last.ckpt``.
    """
    import yaml

    from lit_methods import ShrinkMatch, SmallConvNet
    from lit_methods.datamodules import DigitsDataModule
    from lit_methods.functional import shrink

    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["model"]["init_args"]
    model = ShrinkMatch(SmallConvNet(**config.pop("backbone")["init_args"]), **config)
    model.load_state_dict(torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"])
    data = DigitsDataModule(num_train=1297, batch_size=500)
    data.setup("validate")
    images = next(iter(data.val_dataloader()))["image"]
    with torch.no_grad():
        p = model.eval()(images).softmax(1)
    uncertain = (p.amax(1) < model.threshold).nonzero().flatten()
    spread = uncertain[p[uncertain].amax(1).argsort(descending=True)]
    chosen = spread[torch.linspace(0, len(spread) - 1, COLUMNS * ROWS).long()]
    shrunk = shrink(p[chosen], model.threshold)

    canvas = Image.new("RGB", (WIDTH, HEIGHT), BACKGROUND)
    pen = ImageDraw.Draw(canvas)
    for cell, index in enumerate(chosen.tolist()):
        left, top = 40 + cell % COLUMNS * 368, 34 + cell // COLUMNS * 120
        pixels = images[index, 0].mul(255).round().byte().numpy().astype(np.uint8)
        canvas.paste(Image.fromarray(pixels).resize((DIGIT, DIGIT), Image.Resampling.NEAREST), (left, top))
        start, floor = left + DIGIT + 20, top + DIGIT
        for rank, value in enumerate(p[index][shrunk.order[cell]].tolist()):
            colour = LIKELIEST if rank == 0 else REMOVED if rank < shrunk.cut[cell] else KEPT
            x = start + rank * (BAR + 5)
            pen.rectangle([x, floor - max(1, value**0.5 * DIGIT), x + BAR, floor], fill=colour)
        pen.line([(start, floor + 1), (start + 10 * (BAR + 5) - 5, floor + 1)], fill=GRID, width=2)
    return canvas
