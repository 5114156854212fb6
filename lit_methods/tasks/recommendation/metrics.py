"""Top-K ranking metrics. Pure functions.

Golden vectors: shuyao-wang/DSL@a93cc5d, LightGCN/utils/metrics.py (``get_test``) with the ranking of LightGCN/train.py.
"""

import math

import torch
from torch import Tensor

from lit_methods import checks


def ranking_metrics(scores: Tensor, known: Tensor, target: Tensor, k: int) -> dict[str, Tensor]:
    """Recall, precision and NDCG of the K best items of each user, all items ranked.

    Args:
        scores: (U, I) floating point.
        known: (U, I) bool; items seen in training, ranked behind all others.
        target: (U, I) bool; held-out items that the user has taken.
        k: K >= 1; with fewer than K items all are recommended.

    Returns:
        ``recall``: hits / targets; ``precision``: hits / K; ``ndcg``: binary gain, discount 1 / log2(rank + 1) with ranks from 1, over the
        best possible with min(K, targets) hits. Each (U,), in the dtype of ``scores`` (float32 at least), 0 where a user has no target.
        ``counted``: (U,) bool, whether the user has a target.

    Raises:
        ValueError: K below 1, or shapes that differ.
    """
    checks.at_least(1, "a number of recommended items", k=k)
    if not scores.shape == known.shape == target.shape or scores.ndim != 2:
        shapes = ", ".join(str(tuple(part.shape)) for part in (scores, known, target))
        raise ValueError(f"scores, known and target must be (users, items) all three, got {shapes}")
    dtype = torch.promote_types(scores.dtype, torch.float32)
    shown = min(k, scores.shape[1])
    best = scores.masked_fill(known, -math.inf).topk(shown, dim=1).indices
    hits = target.gather(1, best).to(dtype)
    targets = target.sum(dim=1)
    discount = 1 / torch.arange(2, k + 2, device=scores.device, dtype=dtype).log2()
    ideal = torch.cat([discount.new_zeros(1), discount.cumsum(0)])[targets.clamp(max=k)]
    return {
        "recall": hits.sum(dim=1) / targets.clamp(min=1),
        "precision": hits.sum(dim=1) / k,
        "ndcg": (hits @ discount[:shown]) / ideal.clamp(min=discount[-1]),
        "counted": targets > 0,
    }


__all__ = ["ranking_metrics"]
