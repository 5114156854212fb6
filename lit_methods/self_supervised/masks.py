"""Block masks of I-JEPA: which patches the context encoder sees, and which ones are predicted.

Source: I-JEPA (arXiv:2301.08243), section 3, and facebookresearch/ijepa@52c1ae9 (src/masks/multiblock.py, src/masks/utils.py).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

ATTEMPTS = 20  # places that are tried before a context may overlap with one target block more


def block_size(
    grid: tuple[int, int], scale: tuple[float, float], aspect: tuple[float, float], share_of_scale: float, share_of_aspect: float
) -> tuple[int, int]:
    """Height and width of a block, in patches.

    Args:
        grid: Rows and columns of patches.
        scale: Smallest and largest area, as a share of the grid.
        aspect: Smallest and largest height / width.
        share_of_scale: Where in ``scale``, in [0, 1].
        share_of_aspect: Where in ``aspect``, in [0, 1].

    Returns:
        Rows and columns, each smaller than the grid's; 0 where the area is too small for a patch.
    """
    rows, columns = grid
    area = int(rows * columns * (scale[0] + share_of_scale * (scale[1] - scale[0])))
    ratio = aspect[0] + share_of_aspect * (aspect[1] - aspect[0])
    return min(round(math.sqrt(area * ratio)), rows - 1), min(round(math.sqrt(area / ratio)), columns - 1)


def blocks_at(top: Tensor, left: Tensor, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Blocks as masks of the patches.

    Args:
        top: (...) int64 first row.
        left: (...) int64 first column.
        size: Rows and columns of a block.
        grid: Rows and columns of patches.

    Returns:
        (..., rows * columns) bool, row by row.
    """
    row, column = torch.arange(grid[0]), torch.arange(grid[1])
    in_rows = (row >= top[..., None]) & (row < top[..., None] + size[0])
    in_columns = (column >= left[..., None]) & (column < left[..., None] + size[1])
    return (in_rows[..., :, None] & in_columns[..., None, :]).flatten(-2)


def first_patches(masks: Tensor) -> Tensor:
    """Indices of the patches in each mask, cut to the shortest mask's number.

    Args:
        masks: (..., N) bool, at least one mask.

    Returns:
        (..., n) int64, rising; n is the smallest number of patches in a mask.
    """
    order = masks.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    return order[..., : int(masks.sum(-1).min())]


def check_blocks(
    grid: tuple[int, int],
    target_scale: tuple[float, float],
    target_aspect: tuple[float, float],
    context_scale: tuple[float, float],
    min_keep: int,
) -> None:
    """Raise if a block that may be drawn is too small: arguments are those of :func:`draw_block_masks`.

    Raises:
        ValueError: A target block without a patch, or a context that has no more than ``min_keep``.
    """
    for share in (place / 100 for place in range(101)):
        target = block_size(grid, target_scale, target_aspect, share, share)
        context = block_size(grid, context_scale, (1.0, 1.0), share, share)
        if min(target) < 1 or context[0] * context[1] <= min_keep:
            sizes = f"a target block may have {target[0]} x {target[1]} of them and the context {context[0]} x {context[1]}"
            raise ValueError(
                f"on {grid[0]} x {grid[1]} patches {sizes}: expected at least 1 and more than min_keep={min_keep}; take smaller patches, "
                "larger scales or a smaller min_keep"
            )


def draw_block_masks(
    batch_size: int,
    grid: tuple[int, int],
    sizes: torch.Generator,
    places: torch.Generator,
    *,
    target_blocks: int = 4,
    target_scale: tuple[float, float] = (0.15, 0.2),
    target_aspect: tuple[float, float] = (0.75, 1.5),
    context_scale: tuple[float, float] = (0.85, 1.0),
    min_keep: int = 10,
) -> tuple[Tensor, Tensor]:
    """Context and targets of a batch: one size of blocks for all images, places for each.

    The context is a square block less the target blocks. Where no more than ``min_keep`` patches of it are left in 20 places, it may
    overlap with the last target block, after 20 more with the last two, and so on.

    Args:
        batch_size: B >= 1.
        grid: Rows and columns of patches, N in all.
        sizes: Draws the two sizes; alike on all ranks, their masks have the same sizes.
        places: Draws the places.
        target_blocks: M.
        target_scale: Smallest and largest area of a target block, as a share of the grid.
        target_aspect: Smallest and largest height / width of a target block.
        context_scale: Smallest and largest area of the context's block.
        min_keep: A context has more patches than this.

    Returns:
        Context (1, B, n) and targets (M, B, k): int64 indices of patches on the CPU, rising.

    Raises:
        ValueError: The grid is too small for the blocks, whichever sizes are drawn.
    """
    check_blocks(grid, target_scale, target_aspect, context_scale, min_keep)
    share = torch.rand(2, generator=sizes).tolist()
    target = block_size(grid, target_scale, target_aspect, share[0], share[0])
    context = block_size(grid, context_scale, (1.0, 1.0), share[1], share[1])

    def corners(size: tuple[int, int], shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        top, left = (torch.randint(whole - part, tuple(shape), generator=places) for whole, part in zip(grid, size, strict=True))
        return top, left

    targets = blocks_at(*corners(target, (target_blocks, batch_size)), target, grid)
    # level r leaves out the last r target blocks from what the context must not touch
    covered = torch.cat([torch.zeros_like(targets[:1]), targets]).cumsum(0).flip(0).bool()
    tried = blocks_at(*corners(context, (batch_size, target_blocks + 1, ATTEMPTS)), context, grid)
    free = (tried & ~covered.transpose(0, 1)[:, :, None]).flatten(1, 2)
    enough = free.sum(-1) > min_keep
    chosen = free[torch.arange(batch_size), enough.to(torch.uint8).argmax(1)]
    return first_patches(chosen)[None], first_patches(targets)


__all__ = ["block_size", "blocks_at", "check_blocks", "draw_block_masks", "first_patches"]
