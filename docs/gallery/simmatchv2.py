"""The picture of SimMatchV2: three unlabelled digits, the labelled ones nearest to them, and what propagation makes of the predictions."""

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

WIDTH, HEIGHT = 1152, 648  # pixels
BACKGROUND, EDGE = (13, 20, 33), np.array([60, 125, 245])
BEFORE, AFTER = (90, 102, 124), (250, 176, 70)
GRAPHS, RADIUS, CENTRE, NODE, BAR = 3, 150, 100, 54, 13  # pixels


def draw(run: Path) -> Image.Image:
    """The picture out of a finished run of ``configs/simmatchv2.yaml``.

    Args:
        run: The run's folder, with ``config.yaml`` and ``checkpoints/last.ckpt``.
    """
    import yaml

    from lit_methods import SimMatchV2, SmallConvNet
    from lit_methods.datamodules import DigitsDataModule, SemiSupervisedDataModule
    from lit_methods.functional import propagate
    from lit_methods.semi.simmatchv2.core import edges

    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    network, chosen = config["model"]["init_args"], config["data"]["init_args"]
    model = SimMatchV2(SmallConvNet(**network.pop("backbone")["init_args"]), **network)
    model.load_state_dict(torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"])
    model.eval()
    data = SemiSupervisedDataModule(DigitsDataModule(**chosen.pop("data")["init_args"]), **chosen)
    data.setup("fit")
    labelled = torch.stack([data.labelled_set.images[0, int(i)]["image"] for i in data.labelled])
    images = next(iter(data.val_dataloader()))["image"]
    graph = model.graph
    with torch.no_grad():
        logits, embedding, _ = model._averaged(images)
        p = logits.softmax(1)
        bank = model._averaged(labelled)[1]
        q = propagate(p, embedding, bank, data.labelled_classes, graph.neighbours, graph.temperature, graph.alpha)
    moved = (p - q).abs().sum(1).argsort(descending=True)[::8][:GRAPHS]

    canvas = Image.new("RGB", (WIDTH, HEIGHT), BACKGROUND)
    pen = ImageDraw.Draw(canvas)
    for column, index in enumerate(moved.tolist()):
        x, y = 192 + 384 * column, 216
        near = (embedding[index] @ bank.T).topk(graph.neighbours).indices
        weights = edges(embedding[index], bank[near], graph.temperature).tolist()
        turns = [2 * math.pi * k / len(near) - math.pi / 2 for k in range(len(near))]
        ends = [(x + RADIUS * math.cos(turn), y + RADIUS * math.sin(turn)) for turn in turns]
        for (right, down), weight in zip(ends, weights, strict=True):
            strength = min(1.0, 0.25 + 3 * weight)
            colour = tuple((np.array(BACKGROUND) + strength * (EDGE - BACKGROUND)).astype(int).tolist())
            pen.line([(x, y), (right, down)], fill=colour, width=2 + round(40 * weight))
        for (right, down), node in zip(ends, near.tolist(), strict=True):
            paste(canvas, labelled[node], right, down, NODE)
        paste(canvas, images[index], x, y, CENTRE)
        bars(pen, p[index], q[index], x - 5 * (2 * BAR + 6), 612)
    return canvas


def paste(canvas: Image.Image, image: Tensor, x: float, y: float, size: int) -> None:
    """A digit (1, 8, 8) in [0, 1] around a point."""
    pixels = Image.fromarray(image[0].mul(255).round().byte().numpy())
    place = (round(x - size / 2), round(y - size / 2))
    canvas.paste(Image.new("RGB", (size + 6, size + 6), (150, 162, 184)), (place[0] - 3, place[1] - 3))
    canvas.paste(pixels.resize((size, size), Image.Resampling.NEAREST), place)


def bars(pen: ImageDraw.ImageDraw, before: Tensor, after: Tensor, left: float, floor: float) -> None:
    """Probabilities of the digits 0 to 9, before and after, side by side."""
    for digit, pair in enumerate(zip(before.tolist(), after.tolist(), strict=True)):
        for side, (value, colour) in enumerate(zip(pair, (BEFORE, AFTER), strict=True)):
            x = left + digit * (2 * BAR + 6) + side * BAR
            pen.rectangle([x, floor - 2 - 150 * value, x + BAR - 2, floor], fill=colour)
