"""Pruning from a random start by iterative soft shrinkage, ISS-P (arXiv:2303.09650), and what it is compared with.

Golden vectors: Jiamian-Wang/Iterative-Soft-Shrinkage-SR at 6e11c43, basicsr/pruner/utils.py (which weights are pruned) and
basicsr/pruner/ist_pruner.py (the shrinking steps), see tests/golden/data/issp/README.md. Read were that code, its README and the abstract;
the paper's tables were not readable. Metrics of images stand in :mod:`lit_methods.tasks.superres.metrics`.
"""

import math
import re
from typing import Literal

import torch
from torch import Tensor

from lit_methods.callbacks.sparsity.masks import keep_largest, nm_mask

LARGEST_SHARE = 0.995
"""No more than this share of a layer is ever pruned."""
SAMPLE = 32_400
"""Weights of a layer from which the fast pick takes its threshold."""
VISIBLE = 1e-3
"""Pruned weights above this count as still there at the switch."""


def pruned_count(number: int, pr: float) -> int:
    """How many of a layer's weights are pruned: min(ceil(pr * number), int(0.995 * number)).

    Args:
        number: Weights of the layer, >= 0.
        pr: Wanted share, in [0, 1].
    """
    return min(math.ceil(pr * number), int(LARGEST_SHARE * number))


def parse_pick(pick: str) -> tuple[int, int] | None:
    """``"min_19:20"`` -> (19, 20); None for ``"min"`` and ``"fast"``, which have no groups.

    Raises:
        ValueError: Another text, or more pruned than a group holds.
    """
    if pick in ("min", "fast"):
        return None
    found = re.fullmatch(r"min_(\d+):(\d+)", pick)
    if not found or not 0 <= int(found[1]) <= int(found[2]) or int(found[2]) < 1:
        raise ValueError(f"pick is {pick!r}: give 'min', 'fast', or 'min_N:M' to prune N of every M weights, such as 'min_19:20'")
    return int(found[1]), int(found[2])


def fitting_pattern(n: int, m: int, granularity: int) -> tuple[int, int]:
    """N and M, both raised by 1 until M divides ``granularity``.

    Args:
        n: Pruned per group.
        m: Size of a group, >= 1.
        granularity: Greatest common divisor of the layers' sizes; 0: anything fits.

    Raises:
        ValueError: No such M.
    """
    for larger in range(m, max(granularity, m) + 1):
        if granularity % larger == 0:
            return n + larger - m, larger
    why = f"min_{n}:{m} fits no layers whose sizes have {granularity} as greatest common divisor"
    raise ValueError(f"{why}: choose groups of at most {granularity}, leave small layers out by skip, or take pick='min'")


def pick_pruned(score: Tensor, pr: float, pick: str = "min", granularity: int = 0) -> Tensor:
    """The weights of a layer that are pruned: those with the smallest scores.

    Args:
        score: |W| of the layer, any shape, >= 0, no NaN.
        pr: Share that is pruned, in [0, 1], as in :func:`pruned_count`. Doesn't matter for groups.
        pick: ``min``: the smallest of the whole layer. ``min_N:M``: the N smallest of every M consecutive entries of the flattened layer,
            after :func:`fitting_pattern`. Mind that N counts the pruned ones.
        granularity: Greatest common divisor of the layers' sizes, for groups alone.

    Returns:
        bool, shape of ``score``, True where pruned; of equal scores the first are pruned, as in a stable sort.

    Raises:
        ValueError: Groups that don't fit the layer, or another ``pick``.
    """
    if pick == "fast":
        raise ValueError("pick='fast' needs a sample of the layer: call pick_below_sample")
    pattern = parse_pick(pick)
    if pattern is None:
        return keep_largest(-score, pruned_count(score.numel(), pr))
    n, m = fitting_pattern(*pattern, granularity)
    if score.numel() % m:
        raise ValueError(f"min_{n}:{m} doesn't fit a layer of {score.numel()} weights, which is no multiple of {m}: use skip or pick='min'")
    kept = nm_mask(score.flatten().view(-1, m).flip(1), m - n, m).flip(1)  # flipped: of equal scores the last are kept
    return ~kept.reshape(score.shape)


def pick_below_sample(score: Tensor, sample: Tensor, pr: float) -> Tensor:
    """The fast pick: a threshold from some scores of the layer, instead of sorting all of them.

    Args:
        score: |W| of the layer, any shape.
        sample: (S,) scores drawn from it, S >= 1.
        pr: Share that is pruned, in [0, 1].

    Returns:
        bool, shape of ``score``: below the (ceil(pr * S) + 1)-th smallest of the sample, or the largest one. About ``pr`` of the layer.
    """
    ordered = sample.sort().values
    return score < ordered[min(math.ceil(pr * len(ordered)), len(ordered) - 1)]


def shrink(weight: Tensor, pruned: Tensor, ratio: float) -> Tensor:
    """``ratio`` * W where pruned, W elsewhere; ratio 0 is hard thresholding (IHT), 1 leaves all as it is.

    Args:
        weight: W, any shape, floating point.
        pruned: bool, same shape.
        ratio: r in [0, 1], 1 less the shrinkage percentage.
    """
    return weight.masked_fill(pruned, 0.0) if ratio == 0 else torch.where(pruned, weight * ratio, weight)


def draw_sample(score: Tensor, seed: int) -> Tensor:
    """What the fast pick looks at: (S,) scores of a layer, drawn with repetition; of small layers all of them."""
    flat = score.flatten()
    if flat.numel() <= SAMPLE:
        return flat
    generator = torch.Generator(flat.device).manual_seed(seed)
    return flat[torch.randint(flat.numel(), (SAMPLE,), generator=generator, device=flat.device)]


def shrink_step(weight: Tensor, pr: float, ratio: float, pick: str = "min", granularity: int = 0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """What follows an optimiser's step: pick the smallest weights anew and shrink them (ISS-P, IHT).

    Args:
        weight: W as the optimiser left it. The shrinking adds up: give the next step the returned one.
        pr: Share that is pruned.
        ratio: Factor r of pruned weights.
        pick: ``fast``, or a pick of :func:`pick_pruned`.
        granularity: Greatest common divisor of the layers' sizes, for groups alone.
        seed: Seed of the sample, for ``fast`` alone.

    Returns:
        New weight, and which were pruned (bool).
    """
    score = weight.abs()
    fast = pick == "fast"
    pruned = pick_below_sample(score, draw_sample(score, seed), pr) if fast else pick_pruned(score, pr, pick, granularity)
    return shrink(weight, pruned, ratio), pruned


def shrink_ratio(method: Literal["iss_p", "iht"], ratio: float) -> float:
    """Factor of pruned weights: ``ratio`` for ISS-P, 0 for IHT."""
    return {"iss_p": ratio, "iht": 0.0}[method]


def grow_penalty(penalty: Tensor, pruned: Tensor, delta: float, limit: float = math.inf) -> Tensor:
    """Coefficients of the growing L2 penalty (ISS-R, ASSL): ``delta`` more where pruned, up to ``limit``; they never fall.

    Args:
        penalty: Per weight, >= 0.
        pruned: bool, same shape.
        delta: What one update adds, >= 0.
        limit: Growth stops here.
    """
    return torch.where(pruned, (penalty + delta).clamp(max=limit), penalty)


# not shrink: the bare name belongs to no technique alone
__all__ = [
    "draw_sample",
    "fitting_pattern",
    "grow_penalty",
    "parse_pick",
    "pick_below_sample",
    "pick_pruned",
    "pruned_count",
    "shrink_ratio",
    "shrink_step",
]
