"""The picture of the sparsity report: every kernel weight of the network, by what became of it during training."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

WIDTH, HEIGHT, MARGIN = 1152, 648, 28
BACKGROUND, NEVER, DROPPED, ACTIVE = (13, 20, 33), (38, 50, 74), (60, 125, 245), (245, 190, 70)


def draw(run: Path) -> Image.Image:
    """First layer above left, second above right, third below; weights that were never active, dropped on the way, and active at the end.

    Args:
        run: A run of ``configs/sparseland.yaml``.
    """
    from lit_methods.callbacks.sparsity.history import unpack

    states = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]
    union = unpack(next(state["seen"] for name, state in states.items() if name.startswith("SparsityReport")))
    final = next(state["masks"] for name, state in states.items() if name.startswith("DynamicSparsity"))
    first, second, third = (painted(union[name], final[name]) for name in list(union)[:3])
    canvas = np.full((HEIGHT, WIDTH, 3), BACKGROUND, dtype=np.uint8)
    row = 2 * MARGIN + 240
    place(canvas, grid(first, columns=4), (MARGIN, MARGIN), 15)
    place(canvas, grid(second, columns=41), (MARGIN, 2 * MARGIN + 240), 5)
    place(canvas, grid(third, columns=91), (row + 12, MARGIN), 3)
    return Image.fromarray(canvas)


def painted(ever: torch.Tensor, now: torch.Tensor) -> NDArray[np.uint8]:
    """(K, 3, 3, 3) RGB: K kernels of 3 x 3 weights."""
    colours = np.where(ever.numpy()[..., None], DROPPED, NEVER)
    return np.where(now.numpy()[..., None], ACTIVE, colours).astype(np.uint8).reshape(-1, 3, 3, 3)


def grid(kernels: NDArray[np.uint8], columns: int) -> NDArray[np.uint8]:
    """Kernels side by side with a gap of one weight, row by row."""
    rows = -(-len(kernels) // columns)
    cells = np.full((rows * columns, 4, 4, 3), BACKGROUND, dtype=np.uint8)
    cells[: len(kernels), :3, :3] = kernels
    return cells.reshape(rows, columns, 4, 4, 3).swapaxes(1, 2).reshape(rows * 4, columns * 4, 3)


def place(canvas: NDArray[np.uint8], picture: NDArray[np.uint8], corner: tuple[int, int], scale: int) -> None:
    """Put an enlarged picture on the canvas, cut off at its edge."""
    large = picture.repeat(scale, 0).repeat(scale, 1)
    part = canvas[corner[0] : corner[0] + large.shape[0], corner[1] : corner[1] + large.shape[1]]
    part[:] = large[: part.shape[0], : part.shape[1]]
