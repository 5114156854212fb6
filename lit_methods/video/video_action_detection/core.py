"""Consistency of masks over the frames of a clip, for detectors of actions with few labels.

A. Kumar, Y. S. Rawat: End-to-End Semi-Supervised Learning for Video Action Detection (arXiv:2203.04251, CVPR 2022). Golden vectors come
from AKASH2907/pi-consistency-activity-detection@b5c066e (utils/helpers.py, utils/losses.py, utils/ramp_ups.py, main_ucf101.py).

A network sees a clip and its mirror image. Both masks must agree once the second one is mirrored back, and more so where the prediction
moves: attention masks, which carry no gradient, weight the squared difference pixel by pixel. Everything is computed on the device of
the predictions, for all samples at once, in float32 or wider.

Clips of predictions are logits (B, 1, T, H, W): samples, one channel, frames, height, width.

Left out: the Jensen-Shannon and L1 forms of the classification consistency, which no released script computes.
"""

import math
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Mode = Literal["l2", "bv", "gv", "bv+gv"]
_NORMALISER = 1e-7  # added to the range that masks are divided by


def _wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check_clip(name: str, clip: Tensor, frames: int = 1) -> None:
    if clip.ndim != 5 or clip.shape[1] != 1 or not clip.is_floating_point():
        raise ValueError(f"{name} is {tuple(clip.shape)} {clip.dtype}: expected logits (B, 1, T, H, W) in floating point")
    if clip.shape[2] < frames:
        raise ValueError(f"{name} has {clip.shape[2]} frames: expected {frames} or more")


def _check_pair(output: Tensor, other: Tensor, frames: int = 1) -> None:
    _check_clip("output", output, frames)
    if output.shape != other.shape:
        raise ValueError(f"the two views have masks {tuple(output.shape)} and {tuple(other.shape)}: expected the same shape")


def normalised_over_clip(values: Tensor) -> Tensor:
    """Values moved and scaled to 0..1 over each clip: (v - min) / (max - min + 1e-7).

    Args:
        values: (B, T, H, W), floating point.

    Returns:
        Of the same shape; 0 everywhere in a clip whose values are all equal.
    """
    moved = values - values.amin(dim=(1, 2, 3), keepdim=True)
    return moved.div_(moved.amax(dim=(1, 2, 3), keepdim=True) + _NORMALISER)


# ---- attention masks -------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def variance_mask(output: Tensor, reversed_aug_output: Tensor, n_frames: int = 5, use_sigmoid: bool = False) -> Tensor:
    """Temporal coherency of two views: how much the prediction at a pixel varies over neighbouring frames, 0 to 1 over each clip.

    The T frames of the first view and the T - 2 inner frames of the other, which runs backward, make a cycle of 2 T - 2 frames. The
    population variance over ``n_frames`` neighbours in the cycle is taken at each place, and what belongs to frame t is added up: places
    t and 2 T - 2 - t, or twice the one place of the first and of the last frame.

    Args:
        output: (B, 1, T, H, W) logits of one view, T >= 2.
        reversed_aug_output: Of the same shape, the other view: mirrored back in space, and reversed in time.
        n_frames: Neighbours, odd; 3 or 5 in the paper. More than the cycle has count some of its frames twice.
        use_sigmoid: Of probabilities in place of logits.

    Returns:
        (B, 1, T, H, W) float32 or wider, without gradient.

    Raises:
        ValueError: A shape that doesn't fit, or ``n_frames`` that is even, below 1 or beyond twice the cycle.
    """
    _check_pair(output, reversed_aug_output, 2)
    frames = output.shape[2]
    length = 2 * frames - 2
    if n_frames < 1 or n_frames % 2 == 0 or n_frames > 2 * length + 1:
        raise ValueError(f"n_frames is {n_frames}: give an odd number from 1 to {2 * length + 1}, as the cycle has {length} frames")
    with torch.autocast(output.device.type, enabled=False):
        first, second = (_wide(part).squeeze(1) for part in (output, reversed_aug_output))
        if use_sigmoid:
            first, second = first.sigmoid(), second.sigmoid()
        cycle = torch.cat([first, second[:, 1 : frames - 1]], dim=1)
        # by sums, in place, since these are large tensors; around each pixel's mean, so that logits may be large and hardly move
        cycle = cycle - cycle.mean(dim=1, keepdim=True)
        half = n_frames // 2
        around = torch.cat([cycle[:, length - half :], cycle, cycle[:, :half]], dim=1)
        squared_mean = _window_means(around, n_frames).square_()
        variance = _window_means(around.square_(), n_frames).sub_(squared_mean).clamp_(min=0)
        folded = variance[:, :frames].clone()
        folded[:, 1 : frames - 1] += variance[:, frames:].flip(1)
        folded[:, :: frames - 1] *= 2
        return normalised_over_clip(folded).unsqueeze(1)


def _window_means(around: Tensor, n_frames: int) -> Tensor:
    """Means of ``n_frames`` neighbours along dimension 1."""
    length = around.shape[1] - n_frames + 1
    total = around[:, :length].clone()
    for place in range(1, n_frames):
        total += around[:, place : place + length]
    return total.div_(n_frames)


def variance_masks(output: Tensor, aug_output: Tensor, n_frames: int = 5, use_sigmoid: bool = False) -> tuple[Tensor, Tensor]:
    """:func:`variance_mask` forward and backward in time, both in the order of the clip's frames.

    Args:
        output: (B, 1, T, H, W) logits of the clip.
        aug_output: Of the same shape, logits of the mirrored clip, mirrored back in space; in the clip's order.
        n_frames: Neighbours, odd.
        use_sigmoid: Of probabilities in place of logits.

    Returns:
        Forward and backward mask, each (B, 1, T, H, W), without gradient. They are one and the same: the backward cycle is the forward one,
        read the other way round, and neither windows nor the fold have a direction. So it is computed once.

    Raises:
        ValueError: As :func:`variance_mask`.
    """
    _check_pair(output, aug_output, 2)
    mask = variance_mask(output, aug_output.flip(2), n_frames, use_sigmoid)
    return mask, mask


def _differences(values: Tensor) -> Tensor:
    """Derivative along the frames (dimension 1), of central differences and, at both ends, one-sided ones."""
    inner = (values[:, 2:] - values[:, :-2]) / 2
    return torch.cat([values[:, 1:2] - values[:, :1], inner, values[:, -1:] - values[:, -2:-1]], dim=1)


@torch.no_grad()
def gradient_mask(output: Tensor, lower: float | None = None, upper: float | None = None) -> Tensor:
    """Gradient smoothness: the second derivative of the foreground's probability along the frames, 0 to 1 over each clip.

    A pixel that doesn't change gets a value in the middle, not 0, since curvature has a sign.

    Args:
        output: (B, 1, T, H, W) logits, T >= 2.
        lower: Probabilities below it count as 0; None: none do.
        upper: Probabilities above it count as 1; None: none do.

    Returns:
        (B, T, H, W) float32 or wider, without gradient.

    Raises:
        ValueError: A shape that doesn't fit.
    """
    _check_clip("output", output, 2)
    with torch.autocast(output.device.type, enabled=False):
        probability = _wide(output).squeeze(1).sigmoid()
        if lower is not None:
            probability = probability.masked_fill(probability < lower, 0.0)
        if upper is not None:
            probability = probability.masked_fill(probability > upper, 1.0)
        return normalised_over_clip(_differences(_differences(probability)))


# ---- consistency -----------------------------------------------------------------------------------------------------------------------


def weighted_difference(first: Tensor, second: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean of weight (first - second)^2 over all entries.

    Args:
        first: Any shape.
        second: Of the same shape.
        weight: Broadcast to theirs; None: 1.
    """
    with torch.autocast(first.device.type, enabled=False):
        squares = (_wide(first) - _wide(second)).square()
        return (squares if weight is None else squares * weight).mean()


class MaskConsistency(NamedTuple):
    """Consistency of the masks of two views.

    Attributes:
        loss: Scalar, what is trained.
        l2: Scalar, the mean squared difference without attention.
        attention: (B, 1, T, H, W), the mean of the masks that were used; None for ``l2``.
    """

    loss: Tensor
    l2: Tensor
    attention: Tensor | None


def mask_consistency(
    output: Tensor,
    aug_output: Tensor,
    mode: Mode = "bv",
    *,
    ramp: float = 1.0,
    n_frames: int = 5,
    bv_weight: float = 0.5,
    gv_weight: float = 0.5,
    gv_cross_batch: bool = False,
    use_sigmoid: bool = False,
    lower: float | None = None,
    upper: float | None = None,
) -> MaskConsistency:
    """Spatio-temporal consistency of the masks of a clip and of its mirror image.

    With P the second prediction mirrored back, O the first one, L2 = mean (P - O)^2 on logits, V the variance masks and G the gradient
    mask:

    - ``l2``: L2
    - ``bv``: ramp [mean V_forward (P - O)^2 + mean V_backward (P - O)^2] + (1 - ramp) L2
    - ``gv``: mean G (P - O)^2
    - ``bv+gv``: bv_weight bv + gv_weight gv

    Gradients flow into both predictions, and none through the masks.

    Args:
        output: (B, 1, T, H, W) logits of the clip.
        aug_output: Of the same shape, logits of the mirrored clip as the network gives them: still mirrored.
        mode: Which of the four.
        ramp: w(e) of :func:`exp_rampup`, 0 to 1.
        n_frames: Neighbours of V, odd.
        bv_weight: Factor in ``bv+gv``.
        gv_weight: Factor in ``bv+gv``.
        gv_cross_batch: As in the released code, whose G lacks the channel's dimension: each clip is weighted by the batch's mean of G.
        use_sigmoid: V of probabilities in place of logits.
        lower: See :func:`gradient_mask`.
        upper: See :func:`gradient_mask`.

    Raises:
        ValueError: An unknown mode, or a shape that doesn't fit.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"mode is {mode!r}: give one of {', '.join(get_args(Mode))}")
    _check_pair(output, aug_output)
    unflipped = aug_output.flip(4)
    l2 = weighted_difference(unflipped, output)
    variance = gradient = None
    masks: list[Tensor] = []
    if mode in ("bv", "bv+gv"):
        forward, _ = variance_masks(output, unflipped, n_frames, use_sigmoid)
        attended = 2 * weighted_difference(unflipped, output, forward)  # the backward mask is the same
        variance = ramp * attended + (1 - ramp) * l2
        masks.append(forward)
    if mode in ("gv", "bv+gv"):
        mask = gradient_mask(output, lower, upper)[:, None]
        # the slip pairs every clip with every mask: (B, 1, ..) x (1, B, ..), whose mean is that over the masks' mean
        gradient = weighted_difference(unflipped, output, mask.mean(dim=0, keepdim=True) if gv_cross_batch else mask)
        masks.append(mask)
    if variance is not None and gradient is not None:
        loss = bv_weight * variance + gv_weight * gradient
    else:
        found = [part for part in (variance, gradient) if part is not None]
        loss = found[0] if found else l2
    return MaskConsistency(loss, l2, torch.stack(masks).mean(dim=0) if masks else None)


def exp_rampup(epoch: float, length: float) -> float:
    """w(e) = exp(-5 (1 - e / E)^2) below E = ``length``, and 1 from there on.

    Args:
        epoch: e, counted from 1; below 0 counts as 0.
        length: E, epochs; 0: 1 at once.
    """
    if epoch >= length:
        return 1.0
    return math.exp(-5.0 * (1.0 - max(0.0, epoch) / length) ** 2)


def feature_consistency(features: Tensor, aug_features: Tensor) -> Tensor:
    """Classification consistency: the mean squared difference of what the class head sees in the two views.

    Args:
        features: (B, ...) of the clip.
        aug_features: Of the same shape, of its mirror image.

    Raises:
        ValueError: The shapes differ.
    """
    if features.shape != aug_features.shape:
        raise ValueError(f"features of the two views are {tuple(features.shape)} and {tuple(aug_features.shape)}: expected the same shape")
    return weighted_difference(features, aug_features)


# ---- with labels -----------------------------------------------------------------------------------------------------------------------


def spread_loss(scores: Tensor, labels: Tensor, margin: float = 0.2) -> Tensor:
    """Spread loss of class activations: 1 / B (1 / B sum_i sum_c max(0, m - (a_iy - a_ic))^2 - m^2), c = y included.

    The released code divides by B twice; so the loss of a larger batch is smaller.

    Args:
        scores: (B, C) activations, 0 to 1, B >= 1.
        labels: (B,) int64 in 0..C-1.
        margin: m.

    Raises:
        ValueError: Shapes that don't fit.
    """
    if scores.ndim != 2 or labels.shape != scores.shape[:1]:
        raise ValueError(f"scores are {tuple(scores.shape)} and labels {tuple(labels.shape)}: expected (B, C) and (B,)")
    with torch.autocast(scores.device.type, enabled=False):
        scores = _wide(scores)
        right = scores.gather(1, labels[:, None])
        rows = (margin - (right - scores)).clamp(min=0).square().sum(dim=1)
        return (rows.mean() - margin**2) / len(scores)


def soft_dice_loss(output: Tensor, target: Tensor) -> Tensor:
    """1 - (2 sum s M + 1) / (sum s + sum M + 1) over all pixels of all clips at once, s the probability.

    Args:
        output: (B, 1, T, H, W) logits.
        target: M, of the same shape, 0 or 1, or between.
    """
    with torch.autocast(output.device.type, enabled=False):
        probability, truth = _wide(output).sigmoid(), _wide(target)
        return 1 - (2 * (probability * truth).sum() + 1) / (probability.sum() + truth.sum() + 1)


class MaskLoss(NamedTuple):
    """Supervised losses of masks.

    Attributes:
        bce: Mean binary cross-entropy.
        dice: :func:`soft_dice_loss`.
    """

    bce: Tensor
    dice: Tensor


def mask_loss(output: Tensor, target: Tensor) -> MaskLoss:
    """Both losses of predicted masks against true ones.

    Args:
        output: (B, 1, T, H, W) logits.
        target: Of the same shape, 0 or 1, or between.

    Raises:
        ValueError: The shapes differ.
    """
    if output.shape != target.shape:
        raise ValueError(f"predicted masks are {tuple(output.shape)} and true ones {tuple(target.shape)}: expected the same shape")
    with torch.autocast(output.device.type, enabled=False):
        bce = F.binary_cross_entropy_with_logits(_wide(output), _wide(target).to(torch.promote_types(output.dtype, torch.float32)))
    return MaskLoss(bce, soft_dice_loss(output, target))


# ---- baselines -------------------------------------------------------------------------------------------------------------------------


def confident_pixels(output: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Pseudo labels of pixels: the likelier of foreground and background, where it is likely enough.

    Args:
        output: (B, 1, T, H, W) logits.
        threshold: Least probability of the likelier one, 0.5 to 1.

    Returns:
        Labels 0 and 1, and which of them count, 0 or 1; both like ``output`` in float32 or wider, without gradient.
    """
    probability = _wide(output.detach()).sigmoid()
    labels = (probability >= 0.5).to(probability)
    return labels, (torch.maximum(probability, 1 - probability) >= threshold).to(probability)


def sharpened(probability: Tensor, temperature: float) -> Tensor:
    """Probability of foreground, sharpened as MixMatch does: p^(1/T) / (p^(1/T) + (1 - p)^(1/T)), computed by logits.

    Args:
        probability: Any shape, 0 to 1.
        temperature: T > 0.
    """
    return (torch.logit(_wide(probability), eps=1e-6) / temperature).sigmoid()


__all__ = [
    "MaskConsistency",
    "MaskLoss",
    "confident_pixels",
    "exp_rampup",
    "feature_consistency",
    "gradient_mask",
    "mask_consistency",
    "mask_loss",
    "sharpened",
    "soft_dice_loss",
    "spread_loss",
    "variance_mask",
    "variance_masks",
]
