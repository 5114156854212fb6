"""AdaWAC: weights between supervision and consistency for every sample (arXiv:2210.01891), and the baselines beside it.

Golden vectors come from gail-yxie/adawac@7d1b79e: models.py (UNETS_AW_AC.forward, update_weights) and utils.py
(calculate_metric_percase). Left out: the networks and the augmentation. The Callback is :class:`lit_methods.callbacks.AdaWAC`.
"""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lit_methods.checks import one_of
from lit_methods.tasks.segmentation.core import batch_dice, has_foreground, sample_cross_entropy

Mode = Literal["adawac", "base", "pair", "pseudo", "dac-only", "trim-train", "trim-ratio", "reweight-only", "pm-dro"]
MODES: tuple[str, ...] = get_args(Mode)
LEARNED: tuple[str, ...] = ("adawac", "reweight-only", "pm-dro")  # the modes that keep a weight for every sample
SINGLE_VIEW: tuple[str, ...] = ("base", "reweight-only", "pm-dro")  # the modes that look at the first view alone
CONSISTENT: tuple[str, ...] = ("adawac", "pseudo", "dac-only", "trim-train", "trim-ratio")  # the modes that use features, or can
_FLOOR = 1e-30  # of a weight's logarithm: a weight that has reached 0 can come back


class AdaWACLoss(NamedTuple):
    """What a step of :func:`adawac_loss` gives.

    Attributes:
        loss: Scalar.
        ce: (B,) cross-entropy of each sample, the mean of both views, also where the mode uses one.
        dice: (B,) the batch's soft Dice loss, the mean of both views, repeated.
        consistency: (B,) difference of the features, with its factor.
        weights: (B, 2) the weights after the step: those that were used. Modes without weights of samples return them unchanged.
        kept: Scalar, the number of samples whose cross-entropy counts: less than B in the trimming modes.
    """

    loss: Tensor
    ce: Tensor
    dice: Tensor
    consistency: Tensor
    weights: Tensor
    kept: Tensor


def update_sample_weights(weights: Tensor, ce: Tensor, consistency: Tensor, rate: float) -> Tensor:
    """One step of mirror ascent on the simplex: W_ik exp(rate * l_ik) / Z, in log space, so that no loss overflows (Algorithm 1).

    Args:
        weights: (B, 2) >= 0, rows that sum to 1: supervision, consistency.
        ce: (B,) loss of the first.
        consistency: (B,) loss of the second.
        rate: eta_w >= 0.

    Returns:
        (B, 2) in float32 or wider, without a gradient. A row whose losses aren't finite stays as it was.
    """
    with torch.autocast(weights.device.type, enabled=False):
        losses = torch.stack([ce, consistency], dim=1).detach()
        wide = torch.promote_types(torch.promote_types(weights.dtype, losses.dtype), torch.float32)
        before = weights.detach().to(wide)
        after = (before.clamp(min=_FLOOR).log() + rate * losses.to(wide)).softmax(dim=1)
        return torch.where(after.isfinite().all(1, keepdim=True), after, before)


def normalised_weights(weights: Tensor, ce: Tensor, rate: float, entropy: float = 0.0) -> Tensor:
    """One weight a sample, relative to the batch: ``w_i^(1 - rate * entropy) exp(rate * ce_i)``, divided by the sum over the batch.

    The step of the baselines ``reweight-only`` (``entropy`` 0) and ``pm-dro``.

    Args:
        weights: (B,) >= 0.
        ce: (B,).
        rate: eta_w >= 0.
        entropy: lambda_ent >= 0: pulls the weights together.

    Returns:
        (B,) in float32 or wider, without a gradient; sums to 1.
    """
    with torch.autocast(weights.device.type, enabled=False):
        wide = torch.promote_types(torch.promote_types(weights.dtype, ce.dtype), torch.float32)
        logs = weights.detach().to(wide).clamp(min=_FLOOR).log()
        return ((1 - rate * entropy) * logs + rate * ce.detach().to(wide)).softmax(dim=0)


def adawac_loss(
    logits: tuple[Tensor, Tensor],
    labels: tuple[Tensor, Tensor],
    latents: tuple[Tensor, Tensor] | None,
    weights: Tensor,
    mode: Mode = "adawac",
    rate: float = 1.0,
    consistency_weight: float = 2.0,
    dice_ratio: float = 0.5,
    trim_quantile: float = 0.42108,
    entropy: float = 0.01,
    ignore_index: int = -100,
) -> AdaWACLoss:
    """The objective of one step from what the network puts out for two augmented views of a batch.

    ``r * dice + (1 - r) * mean_i(W_i1 ce_i + W_i2 ac_i)``, with the weights after this step's update. ``ac_i`` is the mean squared
    difference of the views' features, which aren't aligned, times ``consistency_weight``; gradients flow to both. The modes:

    - ``adawac``: weights by :func:`update_sample_weights`.
    - ``base``: cross-entropy and Dice of view 1. ``pair``: of both views.
    - ``dac-only``: all weights 1/2. ``pseudo``: (1, 0) for a sample whose first view has foreground, else (0, 1).
    - ``trim-train``: only samples whose first view has foreground, with (ce + ac) / 2, or ce without ``latents``. ``trim-ratio``: those
      whose cross-entropy is above the batch's quantile ``trim_quantile``. The sum over the batch, which has the Dice loss of every
      sample, is divided by the number of kept ones: Dice grows with the share that is left out. Without any the loss is 0.
    - ``reweight-only``, ``pm-dro``: view 1 with :func:`normalised_weights`.

    Args:
        logits: (B, C, ...) for each of the two views.
        labels: (B, ...) int64 for each of the two views; 0 is the background.
        latents: Features of the views, (B, ...) each; None: no consistency.
        weights: (B, 2) rows of the batch's samples.
        mode: See above.
        rate: eta_w.
        consistency_weight: lambda_AC.
        dice_ratio: r in 0 to 1.
        trim_quantile: Quantile of the batch's cross-entropies, by linear interpolation; ``trim-ratio`` leaves out samples at it or below.
        entropy: Strength with which ``pm-dro`` pulls the weights together, >= 0.
        ignore_index: Label of pixels that don't count.

    Returns:
        In float32 or wider.

    Raises:
        ValueError: Unknown mode, or shapes that don't fit.
    """
    one_of(MODES, mode=mode)
    for view, (one, label) in enumerate(zip(logits, labels, strict=True)):
        if one.ndim < 2 or label.shape != (one.shape[0], *one.shape[2:]):
            raise ValueError(
                f"view {view + 1}: logits are {tuple(one.shape)} and labels {tuple(label.shape)}: expected (B, C, ...) and (B, ...)"
            )
    size = len(logits[0])
    if weights.shape != (size, 2):
        raise ValueError(f"weights are {tuple(weights.shape)} for {size} samples: expected ({size}, 2)")
    with torch.autocast(weights.device.type, enabled=False):
        first, second = (one.to(torch.promote_types(one.dtype, torch.float32)) for one in logits)
        ce_views = [sample_cross_entropy(*view, ignore_index) for view in zip((first, second), labels, strict=True)]
        dice_views = [batch_dice(*view, ignore_index) for view in zip((first, second), labels, strict=True)]
        both, dice_both = (ce_views[0] + ce_views[1]) / 2, (dice_views[0] + dice_views[1]) / 2
        ce, dice = (ce_views[0], dice_views[0]) if mode in SINGLE_VIEW else (both, dice_both)
        consistency = torch.zeros_like(ce)
        if latents is not None:
            one, other = (latent.to(torch.promote_types(latent.dtype, torch.float32)) for latent in latents)
            consistency = consistency_weight * (one - other).square().flatten(1).mean(1)

        keep = torch.ones_like(ce)
        if mode == "adawac":
            weights = update_sample_weights(weights, ce, consistency, rate)
            each = weights[:, 0] * ce + weights[:, 1] * consistency
        elif mode in ("reweight-only", "pm-dro"):
            column = normalised_weights(weights[:, 0], ce, rate, entropy if mode == "pm-dro" else 0.0)
            weights = torch.stack([column, weights[:, 1].to(column.dtype)], dim=1)
            each = column * ce
        elif mode == "pseudo":
            each = torch.where(has_foreground(labels[0], ignore_index), ce, consistency)
        elif mode == "dac-only":
            each = (ce + consistency) / 2
        elif mode in ("trim-train", "trim-ratio"):
            kept = has_foreground(labels[0], ignore_index) if mode == "trim-train" else ce > ce.detach().quantile(trim_quantile)
            keep = kept.to(ce.dtype)
            each = keep * (ce if latents is None else (ce + consistency) / 2)
        else:
            each = ce
        count = keep.sum()
        # the sum over the whole batch, Dice included, is divided by the number of kept samples; nobody kept: nothing to learn
        loss = (dice_ratio * size * dice + (1 - dice_ratio) * each.sum()) / count.clamp(min=1) * (count > 0)
    return AdaWACLoss(loss, both, dice_both.expand(size), consistency, weights, count)


__all__ = ["adawac_loss", "normalised_weights", "update_sample_weights"]
