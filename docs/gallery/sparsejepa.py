"""The picture of SparseJEPA: which latent explains which group of the embedding's numbers, and how columns came to be exactly 0."""

from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from lit_methods.reports.page import series_by_name
from lit_methods.reports.record import load_run

WIDTH, HEIGHT = 1152, 570  # pixels
LEFT, TOP, CELL = 96, 118, 36  # of the matrix
BACKGROUND, GRID, TEXT, LINE = (13, 20, 33), (40, 52, 72), (214, 222, 235), (125, 180, 240)
LOW, HIGH = (58, 44, 40), (255, 176, 80)  # colours of a small and of the largest norm


def draw(run: Path) -> Image.Image:
    """The picture out of a finished run of ``configs/sparsejepa.yaml``.

    Args:
        run: The run's folder, with ``metrics.jsonl`` and ``checkpoints/last.ckpt``.
    """
    maps = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]["sparse.maps.weight"]
    steps, share = series_by_name(load_run(run).history)["sparsejepa/zero_groups"]
    canvas = Image.new("RGB", (WIDTH, HEIGHT), BACKGROUND)
    pen = ImageDraw.Draw(canvas)
    matrix(canvas, pen, maps.norm(dim=-1))
    curve(pen, list(steps), list(share))
    return canvas


def font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Pillow's own."""
    return ImageFont.load_default(size)


def matrix(canvas: Image.Image, pen: ImageDraw.ImageDraw, norms: torch.Tensor) -> None:
    """(groups, latents) norms as squares; what is exactly 0 is an empty frame."""
    rows, columns = norms.shape
    largest = float(norms.max())
    right, bottom = LEFT + columns * CELL, TOP + rows * CELL
    pen.text((LEFT, 16), "what each latent explains", font=font(24), fill=TEXT)
    pen.text((LEFT, 50), f"{int((norms == 0).sum())} of {norms.numel()} columns of the maps are exactly 0", font=font(18), fill=TEXT)
    for row in range(rows):
        pen.text((LEFT - 12, TOP + (row + 0.5) * CELL), str(row + 1), font=font(18), fill=TEXT, anchor="rm")
        for column in range(columns):
            x, y, norm = LEFT + column * CELL, TOP + row * CELL, float(norms[row, column])
            box = [x + 2, y + 2, x + CELL - 3, y + CELL - 3]
            if norm == 0:
                pen.rectangle(box, outline=GRID, width=2)
            else:
                pen.rectangle(box, fill=mixed(norm / largest))
    for column in range(columns):
        pen.text((LEFT + (column + 0.5) * CELL, bottom + 8), str(column + 1), font=font(18), fill=TEXT, anchor="mt")
        groups = int((norms[:, column] > 0).sum())
        pen.text((LEFT + (column + 0.5) * CELL, TOP - 8), str(groups), font=font(18), fill=LINE, anchor="mb")
    pen.text(((LEFT + right) / 2, bottom + 36), "latent  (above, in blue: groups that it explains)", font=font(18), fill=TEXT, anchor="mt")
    upright = Image.new("L", (bottom - TOP, 26))
    ImageDraw.Draw(upright).text((upright.width / 2, 13), "group of the embedding", font=font(18), fill=255, anchor="mm")
    upright = upright.rotate(90, expand=True)
    canvas.paste(TEXT, (20, TOP), upright)
    bar = bottom + 92
    pen.text((LEFT, bar - 8), "norm of a column", font=font(18), fill=TEXT)
    start, length = LEFT + 160, 220
    for pixel in range(length):
        pen.line([(start + pixel, bar - 8), (start + pixel, bar + 14)], fill=mixed(pixel / length))
    pen.text((start, bar + 20), "small", font=font(18), fill=TEXT, anchor="mt")
    pen.text((start + length, bar + 20), f"{largest:.2g}", font=font(18), fill=TEXT, anchor="mt")
    pen.rectangle([start + length + 60, bar - 8, start + length + 82, bar + 14], outline=GRID, width=2)
    pen.text((start + length + 92, bar + 3), "exactly 0", font=font(18), fill=TEXT, anchor="lm")


def mixed(share: float) -> tuple[int, ...]:
    """From ``LOW`` at 0 to ``HIGH`` at 1."""
    return tuple(round(low + (high - low) * share) for low, high in zip(LOW, HIGH, strict=True))


def curve(pen: ImageDraw.ImageDraw, steps: list[float], share: list[float]) -> None:
    """Share of the columns that are exactly 0 over the steps."""
    left, right, top, bottom = 792, 1112, TOP, TOP + 8 * CELL
    pen.text((left, 16), "the group lasso at work", font=font(24), fill=TEXT)
    pen.text((left, 50), "share of columns that are exactly 0", font=font(18), fill=TEXT)
    last = max(steps)

    def place(step: float, value: float) -> tuple[float, float]:
        return left + step / last * (right - left), bottom - value * (bottom - top)

    for value in (0, 0.25, 0.5, 0.75, 1):
        pen.line([place(0, value), place(last, value)], fill=GRID, width=2)
        pen.text((left - 10, place(0, value)[1]), f"{value:g}", font=font(18), fill=TEXT, anchor="rm")
    for step in (0, 0.5, 1):
        pen.text((left + step * (right - left), bottom + 8), f"{step * (last + 1):.0f}", font=font(18), fill=TEXT, anchor="mt")
    pen.text(((left + right) / 2, bottom + 36), "training step", font=font(18), fill=TEXT, anchor="mt")
    pen.line([place(step, value) for step, value in zip(steps, share, strict=True)], fill=LINE, width=5, joint="curve")
