"""ConR: a contrastive regulariser for regression with skewed labels (arXiv:2309.06651).

Golden vectors come from BorealisAI/ConR@ad6a8c9: imdb-wiki-dir/loss.py (one number per image) and nyud2-dir/ConR.py (dense targets). The
Callback is :class:`lit_methods.callbacks.ConR`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class ConRLoss(NamedTuple):
    """The scalar loss, and the numbers of negatives and positives of each anchor, (M,) int64."""

    loss: Tensor
    negatives: Tensor
    positives: Tensor


def _column(values: Tensor, rows: int, name: str) -> Tensor:
    """(M, 1), the mean where a sample has several values."""
    if values.ndim < 1 or len(values) != rows:
        raise ValueError(f"{name} are {tuple(values.shape)} for {rows} rows of features: expected one row for each")
    wide = values.detach().to(torch.promote_types(values.dtype, torch.float32))
    return wide.reshape(rows, -1).mean(dim=1, keepdim=True)


class _Pairs(NamedTuple):
    """What is known of M samples and their pairs: (M, M) ``near`` labels, ``confused`` far ones, distances ``far``; (M, 1) ``rarity``."""

    near: Tensor
    confused: Tensor
    far: Tensor
    rarity: Tensor


def _pairs(targets: Tensor, predictions: Tensor, weights: Tensor | None, rows: int, window: float) -> _Pairs:
    y, guess = _column(targets, rows, "targets"), _column(predictions, rows, "predictions")
    rarity = torch.ones_like(y) if weights is None else _column(weights, rows, "weights")
    far = (y - y.T).abs()
    near = far <= window
    return _Pairs(near, ~near & ((guess - guess.T).abs() <= window), far, rarity)


def _cosines(features: Tensor) -> Tensor:
    """(M, M) cosines of all pairs of rows."""
    rows, width = features.shape
    if width <= 8 * rows:
        unit = F.normalize(features, dim=1)
        return unit @ unit.T
    products = features @ features.T  # long rows: only their products are divided, which needs no copy of them
    size = products.diagonal().clamp_min(1e-24).sqrt()
    return products / size / size[:, None]


def _contrast(
    features: Tensor, alike: Tensor, negative: Tensor, push: Tensor, temperature: float, extra_positive: int, strict: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of each anchor (M,), 0 where it has no negative or no positive; and the numbers of both."""
    similarity = _cosines(features.to(torch.promote_types(features.dtype, torch.float32))) / temperature
    others = ~torch.eye(len(features), dtype=torch.bool, device=features.device)
    positive = alike & others
    negatives, positives = negative.sum(1), positive.sum(1)
    counted = (negatives > 0) & (positives > 0)
    pulling = positive.to(similarity.dtype)  # products: masks that select are slow on a CPU
    # a pair is positive, negative, or neither
    factor = pulling + negative * push.clamp(max=torch.finfo(push.dtype).max) + ~counted[:, None]
    # a common bound of the row keeps exp in range: 1 / temperature bounds every cosine, unless it is so large that exp would leave float32
    top = torch.full_like(similarity[:, 0], 1 / temperature)
    if temperature < 1 / 40:
        top = (similarity - (factor == 0) * 1e30).detach().amax(1)
        similarity = torch.minimum(similarity, top[:, None])  # entries of a factor 0 only
    denominator = top + (factor * (similarity - top[:, None]).exp()).sum(1).log()  # logsumexp, whose log of a factor 0 would be slow
    if not strict:  # the reference sums exp(P * S) over all columns: every column that is no positive adds exp(0) = 1
        denominator = torch.logaddexp(denominator, (len(features) - positives).to(denominator.dtype).log())
    pulls = (pulling * (denominator[:, None] - similarity)).sum(1)
    return torch.where(counted, pulls / (positives + extra_positive).clamp(min=1), 0), negatives, positives


def conr_loss(
    features: Tensor,
    targets: Tensor,
    predictions: Tensor,
    weights: Tensor | None = None,
    window: float = 1.0,
    temperature: float = 0.07,
    eta: float = 0.01,
    strict: bool = False,
) -> ConRLoss:
    """Contrast of samples with near labels against those with far labels but near predictions.

    Positives of an anchor: other samples whose label is at most ``window`` away. Negatives: samples whose label is farther and whose
    prediction is at most ``window`` away; they are pushed with the weight ``s_i exp(eta |y_i - y_j|)`` of anchor i. The loss of an
    anchor is the mean over its positives of -log(exp(S_ij) / D_i), S the cosines over ``temperature``, times s_i; 0 without a negative or a
    positive. The result is the mean over all M anchors. D_i holds all positives and the weighted negatives, and as in the authors' code 1
    for every column that is no positive, the anchor itself included.

    Args:
        features: (M, D) floating point of any length, both views one behind the other; the only input that gets a gradient.
        targets: (M, 1) or (M,) labels.
        predictions: (M, 1) or (M,), in the unit of the labels.
        weights: (M, 1) or (M,) rarity s of each sample, >= 0; None: 1.
        window: Largest distance of near labels and predictions, inclusive, in their unit.
        temperature: > 0.
        eta: Growth of the push with the distance of labels, per unit.
        strict: Only positives and negatives in D_i, as the paper's equation has it.

    Returns:
        The loss in float32 or wider, and the numbers of negatives and positives of each anchor.

    Raises:
        ValueError: The rows differ in number.
    """
    if features.ndim != 2:
        raise ValueError(f"features must be (M, D), got {tuple(features.shape)}")
    with torch.autocast(features.device.type, enabled=False):
        near, confused, far, rarity = _pairs(targets, predictions, weights, len(features), window)
        each, negatives, positives = _contrast(features, near, confused, rarity * (eta * far).exp(), temperature, 0, strict)
        return ConRLoss((rarity[:, 0] * each).mean(), negatives, positives)


def conr_dense_loss(
    features: Tensor,
    targets: Tensor,
    predictions: Tensor,
    weights: Tensor | None = None,
    window: float = 0.2,
    temperature: float = 0.07,
    eta: float = 0.2,
    strict: bool = False,
) -> ConRLoss:
    """The variant for images with a target at each pixel, such as depth: an image counts by the means of its pixels.

    As :func:`conr_loss`, but the push is ``eta s_i |y_i - y_j|``, linear; the sum over positives is divided by their number plus 1; and the
    anchors aren't weighted.

    Args:
        features: (N, C, h, w) or (N, D); flattened.
        targets: (N, ...) one value for each pixel.
        predictions: (N, ...).
        weights: (N, ...) >= 0; None: 1.
        window: Largest distance of near means, inclusive, in the unit of the targets.
        temperature: > 0.
        eta: Push per unit.
        strict: Only positives and negatives in the denominator, as the paper's equation has it.

    Returns:
        The loss in float32 or wider, and the numbers of negatives and positives of each image.

    Raises:
        ValueError: The rows differ in number.
    """
    with torch.autocast(features.device.type, enabled=False):
        near, confused, far, rarity = _pairs(targets, predictions, weights, len(features), window)
        each, negatives, positives = _contrast(features.flatten(1), near, confused, eta * rarity * far, temperature, 1, strict)
        return ConRLoss(each.mean(), negatives, positives)


__all__ = ["conr_dense_loss", "conr_loss"]
