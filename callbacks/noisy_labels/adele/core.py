"""ADELE: labels of a segmentation are corrected class by class, once learning them has slowed down (arXiv:2110.03740).

Golden vectors come from Kangningthu/ADELE@7195bd0: lib/utils/JSD_loss.py (calc_jsd_multiscale), train.py (fit, label_update_epoch),
lib/datasets/VOCTrainwsegDataset.py (update_allclass), SegThor/brat/label_correction.py (merge_labels_with_skip),
lib/utils/iou_computation.py. Left out: the dense CRF, DeepLab. The Callback is :class:`lit_methods.callbacks.ADELE`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

# ---- how well the labels are fitted ----------------------------------------------------------------------------------------------------


class FittedCurve(NamedTuple):
    """``a (1 - exp(-x^b / c))`` over epochs x.

    Attributes:
        a: Level that is approached, 0 to 1.
        b: Exponent, 0 to 1.
        c: Time scale, > 0.
        fitted: (n,) float64, the curve at the history's points.
        update_epoch: First epoch whose labels are corrected, 1 or more; the window's length + 1: not within the window.
    """

    a: float
    b: float
    c: float
    fitted: NDArray[np.float64]
    update_epoch: int


def _curve(x: NDArray[np.float64], a: float, b: float, c: float) -> NDArray[np.float64]:
    return a * (1 - np.exp(-(x**b) / c))


def _slope(x: NDArray[np.float64], a: float, b: float, c: float) -> NDArray[np.float64]:
    return a * b / c * np.exp(-(x**b) / c) * x ** (b - 1)


def fit_iou_curve(
    history: ArrayLike,
    eval_interval: float = 100,
    iters_per_epoch: float = 1058.1,
    threshold: float = 0.9,
    window: int = 15,
    skip_flat_start: bool = False,
) -> FittedCurve | None:
    """Fit a class's history of IoU, and find the epoch at which its growth has slowed down by the share ``threshold``.

    The points are evenly spread over ``len(history) * eval_interval / iters_per_epoch`` epochs; the last weighs 100 times the first in
    standard deviations of 1 to 0.1. Trust-region least squares within 0 <= a, b <= 1 and 0 <= c, from (1, 1, 1). The relative change of the
    slope at epoch e is ``| |f'(e)| - |f'(1)| | / |f'(1)|``, 0 if above 1; the update epoch is 1 plus the number of epochs in the window
    whose change is at most ``threshold``.

    Args:
        history: (n,) IoU in 0 to 1.
        eval_interval: Batches between two entries.
        iters_per_epoch: Batches of an epoch; may be a fraction.
        threshold: r in 0 to 1.
        window: Epochs that are looked at.
        skip_flat_start: Leave out the leading entries whose successor is less than 0.1 higher, and add their time to the result (the
            variant for histories with one entry an epoch).

    Returns:
        None for a history that says nothing: fewer than 3 points, none above 0, not finite, or no fit found.
    """
    values = np.asarray(history, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"the history is {values.shape}: expected (n,)")
    if eval_interval <= 0 or iters_per_epoch <= 0:
        raise ValueError(f"eval_interval={eval_interval} and iters_per_epoch={iters_per_epoch} must be above 0")
    start = 0
    if skip_flat_start and len(values) > 1:
        risen = np.flatnonzero(np.diff(values) >= 0.1)
        start = int(risen[0]) if len(risen) else 0
    values = values[start:]
    if len(values) < 3 or not np.isfinite(values).all() or values.max() <= 0:
        return None
    from scipy.optimize import curve_fit

    x = np.linspace(0, len(values) * eval_interval / iters_per_epoch, len(values))
    bounds = ([0, 0, 0], [1, 1, np.inf])
    sigma = np.geomspace(1, 0.1, len(values))
    try:
        with np.errstate(all="ignore"):  # the search touches its bounds
            (a, b, c), _ = curve_fit(_curve, x, values, p0=(1, 1, 1), method="trf", sigma=sigma, absolute_sigma=True, bounds=bounds)
    except RuntimeError:  # no convergence
        return None
    parameters = float(a), float(b), float(c)
    with np.errstate(all="ignore"):
        slopes = np.abs(_slope(np.arange(1, window + 1, dtype=np.float64) + 1e-6, *parameters))
        change = np.abs(slopes - slopes[0]) / slopes[0]
    if not np.isfinite(change).all():
        return None
    change[change > 1] = 0
    epoch = int((change <= threshold).sum()) + 1
    return FittedCurve(*parameters, _curve(x, *parameters), epoch + round(start * eval_interval / iters_per_epoch))


# ---- the correction --------------------------------------------------------------------------------------------------------------------


def _presence(labels: Tensor, slots: int) -> Tensor:
    """(B, slots) bool: which values stand in each image of (B, P) integers in 0 to slots - 1."""
    return torch.zeros(len(labels), slots, dtype=torch.bool, device=labels.device).scatter_(1, labels, True)


def _member(values: Tensor, allowed: Tensor) -> Tensor:
    """(B, P) bool: whether each value is allowed in its image, ``allowed`` (B, slots)."""
    return allowed.gather(1, values)


def corrected_labels(
    labels: Tensor,
    prediction: Tensor,
    confidence: Tensor,
    update_classes: Sequence[int] | Tensor,
    threshold: float = 0.8,
    ignore_index: int = 255,
) -> Tensor:
    """Labels with confident predictions of the classes that are being corrected put in: the rule for images with image-level truth.

    With U the background and the update classes, for each image: (a) an image whose labels have foreground, but no class of U, stays;
    (b) if there is foreground, predictions of classes that the image's labels lack are void, the background too; (c) pixels whose
    prediction differs from the label, isn't void, lies in U and is more confident than ``threshold`` get it, also pixels labelled
    ``ignore_index``; (d) the image stays as it was if fewer than half of its pixels that aren't 0 would be left while more than 95 % of it
    would be background.

    Args:
        labels: (H, W) or (B, H, W) integers; the annotations from which every correction starts.
        prediction: The same shape, integers.
        confidence: The same shape, floating point in 0 to 1.
        update_classes: Classes that are corrected; 0 is always among them.
        threshold: A confidence equal to it is not enough.
        ignore_index: Label of pixels without a class.

    Returns:
        New labels in the shape and dtype of ``labels``.

    Raises:
        ValueError: The shapes differ.
    """
    if prediction.shape != labels.shape or confidence.shape != labels.shape or labels.ndim < 2:
        shapes = ", ".join(str(tuple(part.shape)) for part in (labels, prediction, confidence))
        raise ValueError(f"labels, prediction and confidence are {shapes}: expected one shape, (H, W) or (B, H, W)")
    if not labels.numel():
        return labels.clone()
    flat = labels.reshape(1 if labels.ndim == 2 else len(labels), -1)
    old, guess = flat.long(), prediction.reshape(flat.shape).long()
    chosen = torch.as_tensor(update_classes, dtype=torch.int64, device=labels.device).flatten()
    nowhere = 1 + max(int(part.max()) if part.numel() else 0 for part in (old, guess, chosen))  # a slot for what is no class
    none = old == ignore_index
    present = _presence(torch.where(none | (old < 0), nowhere, old), nowhere + 1)
    present[:, nowhere] = False
    updated = torch.zeros(nowhere + 1, dtype=torch.bool, device=labels.device)
    updated[chosen[chosen >= 0]] = True
    updated[0], updated[nowhere] = True, False
    foreground = present[:, 1:].any(1, keepdim=True)
    active = ~foreground | (present & updated)[:, 1:].any(1, keepdim=True)
    allowed = updated & (present | ~foreground)
    change = active & (old != guess) & (confidence.reshape(flat.shape) > threshold)
    change &= _member(guess.clamp(min=0), allowed) & (guess >= 0) & (guess != ignore_index)
    new = torch.where(change, guess, old)
    before, after = (old != 0).sum(1, keepdim=True), (new != 0).sum(1, keepdim=True)
    lost = (2 * after < before) & (flat.shape[1] - after > 0.95 * flat.shape[1])
    return torch.where(lost, old, new).to(labels.dtype).reshape(labels.shape)


def merged_labels(
    labels: Tensor,
    probabilities: Tensor,
    needs_update: Tensor,
    confidence_threshold: float = 0.8,
    background_threshold: float = 0.95,
) -> Tensor:
    """Labels with confident predictions merged in: the rule for slices of a volume.

    A pixel is confident if its largest foreground probability exceeds ``confidence_threshold`` or its background probability
    ``background_threshold``, whichever class is predicted. It gets the prediction if its label and the prediction are each background or a
    class that is corrected, and the prediction is background or a class of the slice's labels.

    Args:
        labels: (H, W) or (B, H, W) integers.
        probabilities: (C, H, W) or (B, C, H, W); of equal ones the lowest class is predicted.
        needs_update: (C,) 0 or 1 for each class; the entry of the background isn't looked at.
        confidence_threshold: tau.
        background_threshold: tau_bg.

    Returns:
        New labels in the shape and dtype of ``labels``.

    Raises:
        ValueError: The shapes don't fit.
    """
    single = labels.ndim == 2
    old, p = (labels[None], probabilities[None]) if single else (labels, probabilities)
    if p.ndim != 4 or old.shape != (len(p), *p.shape[2:]) or needs_update.shape != p.shape[1:2]:
        shapes = ", ".join(str(tuple(part.shape)) for part in (labels, probabilities, needs_update))
        raise ValueError(f"labels, probabilities and needs_update are {shapes}: expected (B, H, W), (B, C, H, W) and (C,)")
    if not labels.numel():
        return labels.clone()
    wide, classes = old.flatten(1).long(), p.shape[1]
    guess = p.argmax(dim=1).flatten(1)
    confident = p[:, 0].flatten(1) > background_threshold
    if classes > 1:
        confident |= p[:, 1:].amax(dim=1).flatten(1) > confidence_threshold
    free = torch.zeros(classes + 1, dtype=torch.bool, device=p.device)
    free[:classes] = needs_update != 0
    free[0] = True
    slot = torch.where((wide >= 0) & (wide < classes), wide, classes)  # a label without a probability stays
    present = _presence(slot, classes + 1)
    present[:, 0], present[:, classes] = True, False
    change = confident & free[slot] & free[guess] & _member(guess, present)
    new = torch.where(change, guess, wide).to(labels.dtype).reshape(old.shape)
    return new[0] if single else new


# ---- consistency over scales -----------------------------------------------------------------------------------------------------------


class MultiScaleLoss(NamedTuple):
    """Scalars and the mixture.

    Attributes:
        ce: Sum over scales of the cross-entropies.
        consistency: Divergence of the scales from their mixture.
        mixture: (B, C, ...) weighted mean of the probabilities, in 1e-3 to 1 - 1e-3.
        confident: (B,) bool: the images whose consistency counts.
    """

    ce: Tensor
    consistency: Tensor
    mixture: Tensor
    confident: Tensor


def multiscale_consistency(
    logits: Sequence[Tensor],
    labels: Tensor,
    scale_weights: Tensor | None = None,
    threshold: float = 0.8,
    ignore_index: int = 255,
    mask_ignored: bool = False,
) -> MultiScaleLoss:
    """Cross-entropy of every scale, and the divergence KL(p_k || m) of each from their mixture m, with gradients through both.

    Weights are ``softmax(scale_weights)``; the cross-entropy is that of ``w_k * logits_k``, which acts as a temperature. Both parts are
    means over ALL B*H*W pixels: one labelled ``ignore_index`` adds 0 to the cross-entropy, but counts in the divisor; in the consistency
    it takes part, unless ``mask_ignored``. An image's consistency counts if the largest entry of m over its labelled pixels is at least
    ``threshold``: the mask is one for the whole image.

    Args:
        logits: K tensors (B, C, ...) of one shape: the scales, resized back.
        labels: (B, ...) int64.
        scale_weights: (K,) before the softmax; None: equal.
        threshold: rho in 0 to 1.
        ignore_index: Label of pixels without a class.
        mask_ignored: Leave these pixels out of the consistency, too.

    Returns:
        In float32 or wider.

    Raises:
        ValueError: The shapes don't fit.
    """
    shape = logits[0].shape
    if any(one.shape != shape for one in logits) or labels.shape != (shape[0], *shape[2:]):
        shapes = ", ".join(str(tuple(one.shape)) for one in logits)
        raise ValueError(f"logits are {shapes} and labels {tuple(labels.shape)}: expected one shape (B, C, ...), and (B, ...)")
    if scale_weights is not None and scale_weights.shape != (len(logits),):
        raise ValueError(f"scale_weights are {tuple(scale_weights.shape)} for {len(logits)} scales: expected one for each")
    with torch.autocast(labels.device.type, enabled=False):
        wide = [one.to(torch.promote_types(one.dtype, torch.float32)) for one in logits]
        raw = wide[0].new_zeros(len(logits)) if scale_weights is None else scale_weights
        weights = raw.to(wide[0].dtype).softmax(dim=0)
        ce = sum(
            (
                F.cross_entropy(w * one, labels, ignore_index=ignore_index, reduction="none").mean()
                for w, one in zip(weights, wide, strict=True)
            ),
            start=wide[0].new_zeros(()),
        )
        logs = [one.log_softmax(dim=1) for one in wide]  # not the logarithm of a probability, which may be 0
        mixture = sum((w * log.exp() for w, log in zip(weights, logs, strict=True)), start=torch.zeros_like(wide[0])).clamp(1e-3, 1 - 1e-3)
        log_mixture = mixture.log()
        divergence = sum(((log.exp() * (log - log_mixture)).sum(dim=1) for log in logs), start=wide[0].new_zeros(labels.shape))
        counted = labels != ignore_index
        certain = torch.where(counted, mixture.detach().amax(dim=1), 0)[:, None].flatten(1).amax(dim=1) >= threshold
        mask = certain.reshape(-1, *[1] * (labels.ndim - 1)) & (counted if mask_ignored else torch.ones_like(counted))
        return MultiScaleLoss(ce, (divergence * mask).mean(), mixture, certain)


__all__ = ["corrected_labels", "fit_iou_curve", "merged_labels", "multiscale_consistency"]
