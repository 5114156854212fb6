"""The picture of ConR: bars and their labels, how often each label is trained on, the predictions, and how alike the features are."""

from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

WIDTH, HEIGHT = 1152, 648  # pixels
BACKGROUND, GRID, TEXT = (13, 20, 33), (40, 52, 72), (214, 222, 235)
COUNT, GUESS, TRUTH = (90, 110, 140), (250, 176, 70), (214, 222, 235)
BOX = (40, 200, 580, 600)  # of the predictions
SQUARE = (660, 148, 1112, 600)  # of the features


def draw(run: Path) -> Image.Image:
    """The picture out of a finished run of ``configs/conr.yaml``.

    Args:
        run: The run's folder, with ``config.yaml`` and ``checkpoints/last.ckpt``.
    """
    pictures, targets, counts, features, guess = load(run)
    canvas = Image.new("RGB", (WIDTH, HEIGHT), BACKGROUND)
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(20)
    left, top, right, bottom = BOX
    labels = int(targets.max()) + 1
    step = (right - left) / labels
    chosen = range(0, labels, 10)
    for place, label in enumerate(chosen):
        picture = pictures[int((targets == label).nonzero()[0]), 0].clamp(0, 1)
        tile = Image.fromarray((255 * picture).to(torch.uint8).numpy()).resize((66, 66), Image.Resampling.NEAREST)
        x = left + place * (right - left - 66) / (len(chosen) - 1)
        canvas.paste(tile, (round(x), 56))
        pen.text((x, 128), str(label), font=font, fill=TEXT)
    pen.text((left, 18), "pictures and labels", font=font, fill=TEXT)
    pen.text((left, 164), "grey: training pictures; yellow: predictions; line: truth", font=font, fill=TEXT)
    scale = 0.6 * (bottom - top) / float(counts.max())
    for label in range(labels):
        known = int(counts[targets == label][0])
        pen.rectangle([left + label * step + 1, bottom - known * scale, left + (label + 1) * step - 1, bottom], fill=COUNT)
    height = (bottom - top) / labels
    for target, value in zip(targets.tolist(), guess.clamp(0, labels).tolist(), strict=True):
        x, y = left + (target + 0.5) * step, bottom - value * height
        pen.rectangle([x - 1, y - 1, x + 1, y + 1], fill=GUESS)
    pen.line([(left, bottom), (right, top)], fill=TRUTH, width=2)
    means = torch.stack([features[targets == label].mean(0) for label in range(labels)])
    unit = torch.nn.functional.normalize(means, dim=1)
    alike = ((unit @ unit.T).clamp(0, 1) ** 2).numpy()[..., None]  # squared: more contrast
    pixels = (np.array(BACKGROUND) + alike * (np.array(GUESS) - np.array(BACKGROUND))).astype(np.uint8)
    side = SQUARE[2] - SQUARE[0], SQUARE[3] - SQUARE[1]
    canvas.paste(Image.fromarray(pixels).resize(side, Image.Resampling.NEAREST), SQUARE[:2])
    pen.text((SQUARE[0], 112), "cosine of features, label by label", font=font, fill=TEXT)
    for x, y in ((SQUARE[0], SQUARE[3] + 8), (left, bottom + 8)):
        pen.text((x, y), "0", font=font, fill=TEXT)
    for x, y in ((SQUARE[2] - 24, SQUARE[3] + 8), (right - 24, bottom + 8)):
        pen.text((x, y), str(labels - 1), font=font, fill=TEXT)
    return canvas


def load(run: Path) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Held-out pictures, labels, training counts of the labels, features and predictions."""
    from lit_methods import MLP
    from lit_methods.datamodules import BarsDataModule

    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    backbone = MLP(config["model"]["init_args"]["backbone"]["init_args"]["widths"])
    regressor = torch.nn.Linear(**config["model"]["init_args"]["regressor"]["init_args"])
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    for name, module in (("backbone.", backbone), ("regressor.", regressor)):
        module.load_state_dict({key.removeprefix(name): value for key, value in state.items() if key.startswith(name)})
    data = BarsDataModule(**config["data"]["init_args"])
    data.setup("validate")
    assert data.val_set is not None
    batch = data.val_set.__getitems__([(0, index) for index in range(len(data.val_set))])
    with torch.no_grad():
        features = backbone(batch["image"])
        guess = regressor(features)[:, 0]
    return batch["image"], batch["target"], batch["count"], features, guess
