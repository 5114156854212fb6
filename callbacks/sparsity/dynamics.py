"""How masks move: exploration and stability, on bool tensors. Pure functions.

ITOP: Liu et al., arXiv:2102.02887 (Shiweiliuiiiiiii/In-Time-Over-Parameterization@1b6a89e, Masking.fired_masks_update); the others are the
usual set measures. Golden vectors test all of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


def _count(masks: Mapping[str, Tensor]) -> int:
    return int(torch.stack([mask.sum() for mask in masks.values()]).sum())


def union(seen: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Positions that were active at any time so far, by weight."""
    return {name: mask | seen[name] if name in seen else mask.clone() for name, mask in masks.items()}


def intersection(always: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Positions that were active at all times so far, by weight."""
    return {name: mask & always[name] if name in always else mask.clone() for name, mask in masks.items()}


def itop_rate(seen: Mapping[str, Tensor]) -> tuple[float, dict[str, float]]:
    """In-time over-parameterisation: share of weights that were ever active, in all and by weight.

    Args:
        seen: Name -> bool union of all masks so far.
    """
    counts = {name: int(mask.sum()) for name, mask in seen.items()}
    total = sum(mask.numel() for mask in seen.values())
    return sum(counts.values()) / total, {name: counts[name] / mask.numel() for name, mask in seen.items()}


@dataclass(frozen=True)
class MaskChange:
    """From masks A to masks B, over all weights together.

    Attributes:
        jaccard: |A and B| / |A or B|; 1 where both are empty.
        changed: |A xor B| / N.
        survival: |A and B| / |A|; 1 where A is empty.
    """

    jaccard: float
    changed: float
    survival: float


def mask_change(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> MaskChange:
    """Compare two sets of masks of the same weights."""
    both = _count({name: mask & after[name] for name, mask in before.items()})
    either = _count({name: mask | after[name] for name, mask in before.items()})
    old = _count(before)
    total = sum(mask.numel() for mask in before.values())
    return MaskChange(both / either if either else 1.0, (either - both) / total, both / old if old else 1.0)
