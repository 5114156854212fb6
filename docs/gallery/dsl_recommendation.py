"""The picture of DSL: the embedding table's mask before and after training, rows from popular to rare, and the density by popularity."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

WIDTH, HEIGHT, MARGIN, HEAD = 1152, 648, 36, 48  # pixels
BACKGROUND, DEAD, ALIVE, NEW, INK = (13, 20, 33), (24, 34, 52), (125, 180, 240), (240, 196, 70), (200, 210, 225)


def draw(run: Path) -> Image.Image:
    """The picture out of a finished run of ``configs/dsl_recommendation.yaml``.

    Args:
        run: The run's folder, with ``config.yaml`` and ``checkpoints/last.ckpt``.
    """
    first, last, popularity = load(run)
    order = popularity.argsort(descending=True)
    canvas = Image.new("RGB", (WIDTH, HEIGHT), BACKGROUND)
    pen = ImageDraw.Draw(canvas)
    size = 380, HEIGHT - HEAD - MARGIN
    for left, title, table in (
        (MARGIN, "first mask", colours(first[order], first[order])),
        (MARGIN + 400, "last mask (yellow: grown)", colours(last[order], first[order])),
    ):
        canvas.paste(Image.fromarray(table).resize(size, Image.Resampling.BOX), (left, HEAD))
        pen.text((left, 14), title, fill=INK, font_size=20)
    left, right = MARGIN + 830, WIDTH - MARGIN
    pen.text((left, 14), "active entries per row", fill=INK, font_size=20)
    groups = order.tensor_split(10)
    means = [(float(first[group].sum(1).float().mean()), float(last[group].sum(1).float().mean())) for group in groups]
    scale = (right - left) / max(max(pair) for pair in means)
    height = size[1] / len(groups)
    for index, (before, after) in enumerate(means):
        top = HEAD + index * height
        pen.rectangle([left, top + 4, left + before * scale, top + height / 2 - 2], fill=ALIVE)
        pen.rectangle([left, top + height / 2, left + after * scale, top + height - 6], fill=NEW)
    return canvas


def colours(mask: Tensor, before: Tensor) -> NDArray[np.uint8]:
    """(rows, D) masks -> (rows, D, 3) RGB: alive since the start, grown since, or dead."""
    kind = mask.long() + (mask & ~before).long()
    return np.array([DEAD, ALIVE, NEW], dtype=np.uint8)[kind.numpy()]


def load(run: Path) -> tuple[Tensor, Tensor, Tensor]:
    """First and last mask of the table, (rows, D) bool, and the interactions of each row."""
    import yaml

    from lit_methods.callbacks import DSL
    from lit_methods.callbacks.sparsity.masks import random_mask
    from lit_methods.datamodules import RatingsDataModule

    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    settings = next(c["init_args"] for c in config["trainer"]["callbacks"] if c["class_path"].endswith("DSL"))
    states = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]
    last = next(state for key, state in states.items() if key.startswith(DSL.__name__))["masks"]["embedding.weight"]
    first = random_mask(last.shape, settings["density"], torch.Generator().manual_seed(settings["seed"]))
    data = RatingsDataModule(**config["data"]["init_args"])
    data.setup("fit")
    assert data.train_interactions is not None
    user, item = data.train_interactions
    return first, last, torch.cat([torch.bincount(user, minlength=data.num_users), torch.bincount(item, minlength=data.num_items)])
