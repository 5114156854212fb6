"""The picture of AbsTopK: cosines of features and axes, and the code of each axis's feature over the axis's true coefficient."""

from pathlib import Path

import torch
import yaml
from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, TOP, SIDE = 1152, 620, 60, 500  # pixels
BACKGROUND, GRID, TEXT, DOT = (13, 20, 33), (40, 52, 72), (214, 222, 235), (150, 190, 245)
NEGATIVE, POSITIVE = (90, 160, 245), (250, 150, 80)


def draw(run: Path) -> Image.Image:
    """The picture out of a finished run of ``configs/abstopk.yaml``.

    Args:
        run: The run's folder, with ``config.yaml`` and ``checkpoints/last.ckpt``.
    """
    directions, truth, code, true_code = load(run)
    cosines = torch.nn.functional.normalize(directions, dim=1) @ truth.T  # (features, axes)
    nearest = cosines.abs().argmax(dim=0)  # of each axis
    order = torch.cat([nearest.unique(), torch.tensor([i for i in range(len(directions)) if i not in nearest.tolist()], dtype=torch.int64)])
    axes = torch.tensor(sorted(range(len(truth)), key=lambda axis: order.tolist().index(int(nearest[axis]))))
    canvas = Image.new("RGB", (WIDTH, HEIGHT), BACKGROUND)
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(20)
    left = 40
    pen.text((left, 16), "cosine of each feature (row) with each axis (column)", font=font, fill=TEXT)
    cell = SIDE / max(cosines.shape)
    for row, feature in enumerate(order.tolist()):
        for column, axis in enumerate(axes.tolist()):
            value = float(cosines[feature, axis])
            end = POSITIVE if value > 0 else NEGATIVE
            colour = tuple(round(a + (b - a) * min(1.0, abs(value))) for a, b in zip(GRID, end, strict=True))
            x, y = left + column * cell, TOP + row * cell
            pen.rectangle([x, y, x + cell - 2, y + cell - 2], fill=colour)
    start = 612
    pen.text((start, 16), "code of its feature over the axis's coefficient, all axes", font=font, fill=TEXT)
    pen.rectangle([start, TOP, start + SIDE, TOP + SIDE], outline=GRID, width=2)
    middle_x, middle_y, unit = start + SIDE / 2, TOP + SIDE / 2, SIDE / 4  # one coefficient's unit in pixels
    pen.line([(start, middle_y), (start + SIDE, middle_y)], fill=GRID, width=2)
    pen.line([(middle_x, TOP), (middle_x, TOP + SIDE)], fill=GRID, width=2)
    for axis in range(len(truth)):
        sign = 1.0 if cosines[nearest[axis], axis] > 0 else -1.0
        for given, found in zip(true_code[:, axis].tolist(), (sign * code[:, nearest[axis]]).tolist(), strict=True):
            x, y = middle_x + given * unit, middle_y - found * unit
            if given and start < x < start + SIDE and TOP < y < TOP + SIDE:
                pen.ellipse([x - 2, y - 2, x + 2, y + 2], fill=DOT)
    pen.text((start, TOP + SIDE + 10), "-2", font=font, fill=TEXT)
    pen.text((start + SIDE - 14, TOP + SIDE + 10), "2", font=font, fill=TEXT)
    return canvas


def load(run: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Directions of the features, the axes, and codes and true codes of 400 held-out samples."""
    from lit_methods import AbsTopK
    from lit_methods.datamodules import SparseMixturesDataModule

    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    module = AbsTopK(**config["model"]["init_args"])
    module.load_state_dict(torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"])
    data = SparseMixturesDataModule(**config["data"]["init_args"])
    data.setup("validate")
    batch = data.val_set.tensors
    with torch.no_grad():
        return module.decoder_directions.detach(), data.directions, module.encode(batch["activation"][:400]), batch["code"][:400]
