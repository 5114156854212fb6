"""One update of a dynamic mask: drop some weights, grow as many. Pure functions.

Sources: SET and RigL as in the released code of Sparse-IFT (arXiv:2303.11525; CerebrasResearch/Sparse-IFT@487c284,
cbsparse/sparse/optimizers/{set,rigl}.py); DSL (arXiv:2402.02855; shuyao-wang/DSL@a93cc5d, LightGCN/utils/core.py).
Golden vectors test both.
"""

import math

import torch
from torch import Tensor

from lit_methods.callbacks.sparsity.masks import keep_largest


def grow(mask: Tensor, score: Tensor, count: int) -> Tensor:
    """``mask`` with the ``count`` inactive positions of the largest score switched on.

    Args:
        mask: bool, any shape.
        score: Same shape, non-negative; what it says of active positions doesn't matter, so that no growth is wasted on them.
        count: Positions to switch on; capped at the number of inactive ones.

    Returns:
        bool, shape of ``mask``.
    """
    inactive = int((~mask).sum())
    return mask | keep_largest(score.masked_fill(mask, -math.inf), min(count, inactive))


def drop_smallest(weight: Tensor, mask: Tensor, fraction: float) -> Tensor:
    """RigL's and SET's drop: the int(fraction * active) active weights with the smallest magnitude go.

    Args:
        weight: Any shape, zero where ``mask`` is False.
        mask: bool, same shape.
        fraction: Share of the active weights, in [0, 1].

    Returns:
        bool, exactly active - int(fraction * active) True, all of them in ``mask``.
    """
    active = int(mask.sum())
    score = weight.detach().abs().masked_fill(~mask, -1.0)  # an active zero stays before an inactive one
    return keep_largest(score, active - int(fraction * active))


def drop_below_threshold(weight: Tensor, mask: Tensor, fraction: float) -> Tensor:
    """DSL's drop: every weight whose magnitude is at most that of the ceil(fraction * active)-th smallest active one.

    Ties with that one go as well, among them active weights that are exactly 0: more than asked may be dropped, and growth makes up for it.

    Args:
        weight: Any shape, zero where ``mask`` is False.
        mask: bool, same shape.
        fraction: Share of the active weights, in [0, 1].

    Returns:
        bool, shape of ``mask``.
    """
    active = int(mask.sum())
    dropped = math.ceil(fraction * active)
    if not dropped:
        return mask
    magnitude = weight.detach().abs()
    flat = magnitude.float().flatten() if magnitude.dtype in (torch.float16, torch.bfloat16) else magnitude.flatten()
    threshold = flat.kthvalue(flat.numel() - active + dropped).values
    return magnitude > threshold


def target_count(numel: int, sparsity: float) -> int:
    """Active weights of a layer as the released code counts them: (1 - sparsity) * numel, rounded to float32, then truncated."""
    return int(torch.tensor((1 - sparsity) * numel, dtype=torch.float32))


def update_mask(weight: Tensor, mask: Tensor, score: Tensor, fraction: float, target: int) -> Tensor:
    """One update of RigL (``score`` = |dense gradient|) or SET (``score`` uniformly random in [0, 1)).

    Just-dropped weights may grow back, and then keep their value: the caller sets weight = weight * new mask.

    Args:
        weight: Any shape, zero where ``mask`` is False.
        mask: bool, same shape.
        score: Same shape, non-negative.
        fraction: Share of the active weights that is dropped, in [0, 1].
        target: Active weights of the layer afterwards (more, if more are kept).

    Returns:
        The new mask, bool.
    """
    kept = drop_smallest(weight, mask, fraction)
    return grow(kept, score, max(target - int(kept.sum()), 0))
