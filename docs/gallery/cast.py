"""The picture of CAST: a 1:8 layer just before its masked weights are removed, beside it how these shrank, and the accuracy."""

import json
import math
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

WIDTH, HEIGHT = 1152, 648  # pixels
BACKGROUND, GRID = (13, 20, 33), (40, 52, 72)
MASKED, KEPT = np.array([60, 125, 245]), np.array([250, 176, 70])
LAYER = "network.layers.1.weight"
ROWS, COLUMNS, CELL = 92, 128, 5  # part of the layer that is shown; pixels of a weight
LEFT, TOP = 40, 94


def draw(run: Path) -> Image.Image:
    """The picture out of a finished run of ``configs/cast.yaml``.

    Args:
        run: The run's folder, with ``metrics.jsonl`` and ``cast/unfinalized.ckpt``.
    """
    content = torch.load(run / "cast" / "unfinalized.ckpt", weights_only=True)
    (state,) = [state for key, state in content["callbacks"].items() if key.startswith("CAST")]
    canvas = np.full((HEIGHT, WIDTH, 3), BACKGROUND, dtype=np.uint8)
    weights(canvas, state["weights"][LAYER]["latent"].numpy(), state["masks"][LAYER].numpy())
    picture = Image.fromarray(canvas)
    pen = ImageDraw.Draw(picture)
    sizes = {name: series(run, f"cast/{name}_magnitude") for name in ("masked", "kept")}
    upper, lower = (730, 94, 1112, 324), (730, 374, 1112, 554)
    grid(pen, upper, 5)
    grid(pen, lower, 3)
    for name, colour in (("masked", MASKED), ("kept", KEPT)):
        points = [(step, (math.log10(value) + 4) / 4) for step, value in sizes[name]]  # 1e-4 to 1
        curve(pen, points, upper, tuple(int(part) for part in colour))
    points = [(step, max(0.0, (value - 0.8) / 0.2)) for step, value in series(run, "classifier/val_accuracy")]  # 0.8 to 1
    curve(pen, points, lower, (230, 235, 245))
    return picture


def weights(canvas: NDArray[np.uint8], latent: NDArray[np.float32], kept: NDArray[np.bool_]) -> None:
    """Brightness: magnitude. Blue: weights that are about to be removed; orange: the one of each 8 that stays."""
    strength = np.clip(np.abs(latent) / np.quantile(np.abs(latent), 0.98), 0, 1)[..., None] ** 0.5
    colours = BACKGROUND + strength * (np.where(kept[..., None], KEPT, MASKED) - BACKGROUND)
    block = colours[:ROWS, :COLUMNS].astype(np.uint8).repeat(CELL, 0).repeat(CELL, 1)
    canvas[TOP : TOP + block.shape[0], LEFT : LEFT + block.shape[1]] = block


def series(run: Path, metric: str) -> list[tuple[float, float]]:
    """(step, value) of a metric."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(record["step"], record["metrics"][metric]) for record in records if metric in record.get("metrics", {})]


def grid(pen: ImageDraw.ImageDraw, box: tuple[int, int, int, int], lines: int) -> None:
    """Level lines of a box (left, top, right, bottom)."""
    left, top, right, bottom = box
    for index in range(lines):
        height = top + (bottom - top) * index / (lines - 1)
        pen.line([(left, height), (right, height)], fill=GRID, width=2)


def curve(pen: ImageDraw.ImageDraw, points: list[tuple[float, float]], box: tuple[int, int, int, int], colour: tuple[int, ...]) -> None:
    """A curve of values between 0 and 1 in a box."""
    left, top, right, bottom = box
    last = max(step for step, _ in points)
    pen.line([(left + (right - left) * step / last, bottom - (bottom - top) * value) for step, value in points], fill=colour, width=5)
