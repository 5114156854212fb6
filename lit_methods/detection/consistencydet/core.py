"""The maths of ConsistencyDet (arXiv:2404.07773): noise levels of boxes, two adjacent noisy versions, the loss at both, renewal.

Golden vectors come from Tankowa/ConsistencyDet@0f6e44a (detector.py, loss.py). Matching and losses of one level are
:mod:`~lit_methods.detection.matcher`'s and :mod:`~lit_methods.detection.criterion`'s, clean boxes
:mod:`~lit_methods.detection.noise`'s. Levels descend: index 0 is the largest noise.

Left out: the consistency weight of the code's settings, which nothing uses there.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lit_methods.consistency_models.levels import Scalings, boundary_scalings, karras_levels
from lit_methods.detection.criterion import LossWeights, SetLosses, set_losses
from lit_methods.detection.matcher import MatchCosts, Targets
from lit_methods.detection.noise import kept_first, to_pixels, to_signal


def detection_levels(
    count: int = 40, sigma_min: float = 0.002, sigma_max: float = 40.0, rho: float = 7.0, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Karras levels from the largest to the smallest, and a final 0 for the sampling: (count + 1,).

    Args:
        count: Levels, >= 1; one alone is ``sigma_max``.
        sigma_min: Smallest level, > 0.
        sigma_max: Largest level.
        rho: Spacing, > 0.
        dtype: Dtype of the result.

    Raises:
        ValueError: Levels that can't be.
    """
    levels = karras_levels(max(count, 2), sigma_min, sigma_max, rho, dtype).flip(0)[:count]
    return torch.cat([levels, levels.new_zeros(1)])


def detection_scalings(sigma: Tensor, sigma_min: float = 0.002, sigma_data: float = 0.5) -> Scalings:
    """The scalings of a consistency model, with ``inp`` halved and ``out`` doubled as the authors' code has them.

    Args:
        sigma: Any shape, >= ``sigma_min``.
        sigma_min: Smallest level.
        sigma_data: Standard deviation of the data, which the code takes as 0.5.
    """
    plain = boundary_scalings(sigma, sigma_min, sigma_data)
    return plain._replace(out=2 * plain.out, inp=plain.inp / 2)


def noisy_pair(x0: Tensor, noise: Tensor, high: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
    """x0 + high noise, and one Euler step of the ODE from there down to ``low``, with the true x0.

    Args:
        x0: (B, P, 4) clean boxes, in signal units.
        noise: (B, P, 4) standard normal.
        high: (B,) sigma_j > 0.
        low: (B,) sigma_{j+1} < sigma_j.

    Returns:
        Both (B, P, 4).
    """
    high, low = high[:, None, None], low[:, None, None]
    x_high = x0 + high * noise
    return x_high, euler_step(x_high, x0, high, low)


def euler_step(x: Tensor, x0: Tensor, current: Tensor, following: Tensor) -> Tensor:
    """X + (x - x0) / sigma (sigma' - sigma): the ODE's step between levels that broadcast with ``x``."""
    return x + (x - x0) / current * (following - current)


def skip_mix(boxes: Tensor, x: Tensor, scalings: Scalings, size: Tensor) -> Tensor:
    """c_skip x + c_out F in signal units: the paper's f, which the authors' code computes the factors of and doesn't use.

    Args:
        boxes: (L, B, P, 4) corners in pixels, F's answers of L heads.
        x: (B, P, 4) noisy boxes in signal units.
        scalings: Each (B,).
        size: (B, 2) width and height.

    Returns:
        (L, B, P, 4) corners in pixels, of sides >= 0.
    """
    skip, out = (factor[:, None, None] for factor in (scalings.skip, scalings.out))
    mixed = skip * x + out * to_signal(boxes, size)
    return to_pixels(torch.cat([mixed[..., :2], mixed[..., 2:].clamp(min=-1)], dim=-1), size)


class TwoLevelLoss(NamedTuple):
    """The loss of both levels.

    Attributes:
        total: Scalar, the weighted losses of all heads and both levels.
        high: Losses of each head at the higher level, (H,) each.
        low: At the lower level.
    """

    total: Tensor
    high: SetLosses
    low: SetLosses


def two_level_loss(
    logits_high: Tensor,
    boxes_high: Tensor,
    logits_low: Tensor,
    boxes_low: Tensor,
    targets: Targets,
    weights: LossWeights | None = None,
    costs: MatchCosts | None = None,
    class_weights: Tensor | None = None,
) -> TwoLevelLoss:
    """Sum of the set losses at both levels and of all heads; nothing compares the two answers directly.

    Args:
        logits_high: (H, B, P, K) at the higher level, of every head.
        boxes_high: (H, B, P, 4) corners in pixels.
        logits_low: At the lower level, in the same shape.
        boxes_low: At the lower level, in the same shape.
        targets: Of the B images.
        weights: Factors of the three losses; None: 2, 5 and 2.
        costs: The matching's; None: those of the paper.
        class_weights: (K,) factors of a federated class loss; None: focal loss.
    """
    heads = len(logits_high)
    found = set_losses(torch.cat([logits_high, logits_low]), torch.cat([boxes_high, boxes_low]), targets, costs, class_weights)
    high, low = SetLosses(*(part[:heads] for part in found)), SetLosses(*(part[heads:] for part in found))
    return TwoLevelLoss(found.weighted(LossWeights() if weights is None else weights).sum(), high, low)


class Renewal(NamedTuple):
    """Boxes (B, P, 4) of the next step, and which proposals (B, P) were kept: they stand first, in their order."""

    boxes: Tensor
    kept: Tensor


def renewal_step(
    x: Tensor, x0: Tensor, logits: Tensor, fresh: Tensor, current: Tensor, following: Tensor, threshold: float = 0.9
) -> Renewal:
    """One step of the sampler: proposals of a high score move on to the next level, the others are drawn anew.

    Args:
        x: (B, P, 4) noisy boxes at the current level, in signal units.
        x0: (B, P, 4) what was predicted of them.
        logits: (B, P, K) of the last head.
        fresh: (B, P, 4) standard normal; the p-th stands in the p-th place where that is free.
        current: Scalar sigma.
        following: Scalar sigma', at most sigma.
        threshold: A proposal is kept if its largest sigmoid is above.
    """
    kept = logits.sigmoid().amax(-1) > threshold
    boxes = kept_first(euler_step(x, x0, current, following), kept, fresh * following)
    return Renewal(boxes, kept)


def nearest_level(sigma: Tensor, levels: Tensor) -> Tensor:
    """Index of the training level that is nearest in log sigma: the time that the head knows.

    The authors' sampler gives its own step number, which is right only where it uses as many levels as the training.

    Args:
        sigma: (...) levels of a sampler, > 0.
        levels: (n,) descending training levels, > 0.

    Returns:
        (...) int64 in 0..n-1.
    """
    return (sigma.log()[..., None] - levels.log()).abs().argmin(-1)


__all__ = [
    "detection_levels",
    "detection_scalings",
    "nearest_level",
    "noisy_pair",
    "renewal_step",
    "two_level_loss",
]
