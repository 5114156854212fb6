"""The picture of supervised dictionary learning: what mixtures of digits are made of, what decides their label, and what a fit finds."""

from pathlib import Path

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, SIDE = 1152, 648, 152  # pixels; SIDE: of an image
BACKGROUND, TEXT, FAINT = (13, 20, 33), (214, 222, 235), (130, 142, 162)


def draw(run: Path) -> Image.Image:
    """The picture out of a finished run of ``configs/supervised_dictionary_learning.yaml``.

    Args:
        run: The run's folder, with ``config.yaml`` and ``checkpoints/last.ckpt``.
    """
    from lit_methods import SupervisedMatrixFactorization
    from lit_methods.datamodules import SemiSyntheticDigitsDataModule
    from lit_methods.matrix_factorization.regression import fit_regression

    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    data = SemiSyntheticDigitsDataModule(**config["data"]["init_args"])
    data.setup("fit")
    module = SupervisedMatrixFactorization.load_from_checkpoint(run / "checkpoints" / "last.ckpt", map_location="cpu")
    x, labels, covariates = module.columns(data.train_set[0])
    found = module.factors()
    alone = torch.linalg.svd(x, full_matrices=False).U[:, : module.rank]
    beta = fit_regression(alone.T @ x, covariates, labels)[0, 1:]
    canvas = Image.new("RGB", (WIDTH, HEIGHT), BACKGROUND)
    pen, large, small = ImageDraw.Draw(canvas), ImageFont.load_default(20), ImageFont.load_default(17)
    rows = (
        ("made of", data.atoms, data.direction, "what decides the label"),
        ("supervised atoms", found.dictionary.T.numpy(), (found.dictionary @ found.coefficients[0, 1:]).numpy(), "W beta"),
        ("atoms of an SVD", alone.T.numpy(), (alone @ beta).numpy(), "W beta of a regression"),
    )
    for row, (title, atoms, direction, what) in enumerate(rows):
        top = 46 + row * 200
        pen.text((24, top - 30), title, font=large, fill=TEXT)
        pen.text((24 + 5 * 172 + 60, top - 30), what, font=small, fill=FAINT)
        for column, atom in enumerate([*atoms, direction]):
            left = 24 + column * 172 + (232 if column == len(atoms) else 0)
            canvas.paste(picture(atom, data.image_shape), (left, top))
        cosine = float(direction @ data.direction / np.linalg.norm(direction) / np.linalg.norm(data.direction))
        if row:
            pen.text((24 + 4 * 172, top + 62), f"cosine {cosine:.2f}", font=large, fill=TEXT)
    return canvas


def picture(values: NDArray[np.floating], shape: tuple[int, int] | None) -> Image.Image:
    """An atom: red positive, blue negative, white 0."""
    assert shape is not None
    scaled = values.reshape(shape) / np.abs(values).max()
    fade = 1 - np.abs(scaled)
    colours = np.stack([np.where(scaled >= 0, 1, fade), fade, np.where(scaled <= 0, 1, fade)], axis=-1)
    return Image.fromarray(np.round(255 * colours).astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.NEAREST)
