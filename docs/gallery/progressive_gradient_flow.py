"""The picture of progressive gradient flow: a 1:32 layer with its latent weights, beside it beta and the accuracy over training."""

import json
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

WIDTH, HEIGHT = 1152, 648  # pixels
BACKGROUND, GRID = (13, 20, 33), (40, 52, 72)
LATENT, KEPT = np.array([60, 125, 245]), np.array([250, 176, 70])
LAYER = "network.layers.2.weight"
ROWS, GROUPS, CELL, GAP = 92, 4, 5, 12  # rows and groups of 32 that are shown; pixels of a weight and between two groups
LEFT, TOP = 40, 94


def draw(run: Path) -> Image.Image:
    """The picture out of a finished run of ``configs/progressive_gradient_flow.yaml``.

    Args:
        run: The run's folder, with ``metrics.jsonl`` and ``checkpoints/last.ckpt``.
    """
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    (latent,) = [state["latent"][LAYER] for state in content["callbacks"].values() if isinstance(state, dict) and "latent" in state]
    canvas = np.full((HEIGHT, WIDTH, 3), BACKGROUND, dtype=np.uint8)
    weights(canvas, latent.numpy(), content["state_dict"][LAYER].numpy() != 0)
    picture = Image.fromarray(canvas)
    pen = ImageDraw.Draw(picture)
    for top, metric, colour in ((94, "progressive_gradient_flow/beta", LATENT), (344, "classifier/val_accuracy", KEPT)):
        curve(pen, series(run, metric), (780, top, 1112, top + 210), tuple(int(part) for part in colour))
    return picture


def weights(canvas: NDArray[np.uint8], latent: NDArray[np.float32], kept: NDArray[np.bool_]) -> None:
    """Brightness: magnitude. Blue: latent weights that don't act; orange: the one of each 32 that does."""
    strength = np.clip(np.abs(latent) / np.quantile(np.abs(latent), 0.995), 0, 1)[..., None]
    blue = BACKGROUND + 0.75 * strength * (LATENT - BACKGROUND)
    orange = KEPT * (0.65 + 0.35 * strength)
    colours = np.where(kept[..., None], orange, blue).astype(np.uint8)
    for group in range(GROUPS):
        block = colours[:ROWS, 32 * group : 32 * (group + 1)].repeat(CELL, 0).repeat(CELL, 1)
        left = LEFT + group * (32 * CELL + GAP)
        canvas[TOP : TOP + block.shape[0], left : left + block.shape[1]] = block


def series(run: Path, metric: str) -> list[tuple[float, float]]:
    """(step, value) of a metric."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(record["step"], record["metrics"][metric]) for record in records if metric in record.get("metrics", {})]


def curve(pen: ImageDraw.ImageDraw, points: list[tuple[float, float]], box: tuple[int, int, int, int], colour: tuple[int, ...]) -> None:
    """A curve between 0 and 1 in a box (left, top, right, bottom)."""
    left, top, right, bottom = box
    for share in (0, 0.5, 1):
        height = top + share * (bottom - top)
        pen.line([(left, height), (right, height)], fill=GRID, width=2)
    last = max(step for step, _ in points)
    pen.line([(left + (right - left) * step / last, bottom - (bottom - top) * value) for step, value in points], fill=colour, width=5)
