"""Composed image retrieval with multi-grained uncertainty regularisation (arXiv:2211.07394): noisy targets, two losses, recall.

The golden vectors come from Monoxide-Chen/uncertainty_retrieval@f1fd828 (models/augmenter/normal_augmenter.py, losses/uncertainty_loss.py,
losses/batch_based_classification_loss.py, evaluators/metric_calculators.py). The compositor stands in
:mod:`lit_methods.retrieval.cir_uncertainty.networks`. Under autocast everything here runs in float32, float64 stays float64.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-5  # addend to the variance of a target's dimensions


class AugmentedTargets(NamedTuple):
    """Targets under noise.

    Attributes:
        features: (B, D) alpha * standardised target + beta.
        alpha: (B, D) factors, no gradient.
        beta: (B, D) addends, no gradient.
    """

    features: Tensor
    alpha: Tensor
    beta: Tensor


class UncertaintyLoss(NamedTuple):
    """Scalars of a batch.

    Attributes:
        loss: The weighted sum.
        info_nce: InfoNCE on the targets as they are.
        uncertainty: (exp(-s) * InfoNCE on the augmented targets + s) / 2.
        spread: s, standard deviation of all numbers of the augmented targets.
    """

    loss: Tensor
    info_nce: Tensor
    uncertainty: Tensor
    spread: Tensor


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def on_sphere(x: Tensor, norm_scale: float = 4.0) -> Tensor:
    """Rows of the length ``norm_scale``: the inner product of two is ``norm_scale``^2 times their cosine. A row of zeros stays one.

    Args:
        x: (B, D) floating point.
        norm_scale: Length, > 0.

    Returns:
        (B, D), float32 or wider.
    """
    return norm_scale * F.normalize(_wide(x), dim=1)


def augment_targets(
    features: Tensor,
    alpha_noise: Tensor,
    beta_noise: Tensor,
    alpha_scale: float = 1.0,
    beta_scale: float = 1.0,
    eps: float = EPS,
) -> AugmentedTargets:
    """Targets under noise of their own statistics: alpha * (f - mean) / sqrt(var + eps) + beta, all over the dimensions of a sample.

    alpha = ``alpha_scale`` * (1 + std * ``alpha_noise``) and beta = ``beta_scale`` * (mean + std * ``beta_noise``), with the sample's mean
    and unbiased standard deviation. The gradient reaches the features through their standardised form alone; the result isn't normalised.

    Args:
        features: (B, D) floating point, D >= 2.
        alpha_noise: (B, D), standard normal.
        beta_noise: (B, D), standard normal.
        alpha_scale: Factor of alpha.
        beta_scale: Factor of beta.
        eps: Addend to the biased variance.

    Returns:
        Features, alpha and beta, float32 or wider.

    Raises:
        ValueError: The shapes differ, or D < 2.
    """
    if features.ndim != 2 or features.shape[1] < 2 or not features.shape == alpha_noise.shape == beta_noise.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (features, alpha_noise, beta_noise))
        raise ValueError(f"features, alpha_noise and beta_noise are {shapes}: give three of (B, D >= 2)")
    with torch.autocast(features.device.type, enabled=False):
        wide = _wide(features)
        fixed = wide.detach()
        mean, std = fixed.mean(dim=1, keepdim=True), fixed.std(dim=1, keepdim=True)
        alpha, beta = alpha_scale * (1 + std * alpha_noise), beta_scale * (mean + std * beta_noise)
        return AugmentedTargets(alpha * F.layer_norm(wide, wide.shape[1:], eps=eps) + beta, alpha, beta)


def gaussian_targets(features: Tensor, noise: Tensor, scale: float) -> Tensor:
    """A baseline: ``features`` + ``scale`` * ``noise``, (B, D) each, float32 or wider."""
    return _wide(features) + scale * noise


def composed_info_nce(queries: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each query's own target among all targets, by inner products without a temperature; mean over queries.

    Args:
        queries: (B, D) floating point.
        targets: (B, D), in the order of the queries.

    Returns:
        Scalar, float32 or wider.

    Raises:
        ValueError: The shapes differ, or there is no query.
    """
    if queries.ndim != 2 or queries.shape != targets.shape or not len(queries):
        raise ValueError(f"queries are {tuple(queries.shape)} and targets {tuple(targets.shape)}: give one target a query, (B, D) both")
    with torch.autocast(queries.device.type, enabled=False):
        logits = _wide(queries) @ _wide(targets).T
        return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))


def coarse_weight(progress: float, gamma_0: float = 1.0) -> float:
    """Gamma = exp(-gamma_0 * progress): weight of the loss on augmented targets.

    Args:
        progress: Epochs (or steps) done / planned.
        gamma_0: How fast it falls; 1: from 1 to 1 / e.
    """
    return math.exp(-gamma_0 * progress)


def uncertainty_loss(queries: Tensor, targets: Tensor, augmented: Tensor, gamma: float) -> UncertaintyLoss:
    """Gamma * L_u + (1 - gamma) * InfoNCE(queries, targets), with L_u = (exp(-s) * InfoNCE(queries, augmented) + s) / 2.

    s is the unbiased standard deviation of all B * D numbers of ``augmented``, with gradient.

    Args:
        queries: (B, D) composed queries.
        targets: (B, D) features of their targets.
        augmented: (B, D) the same under noise.
        gamma: Weight of the coarse part, in [0, 1].

    Returns:
        Four scalars, float32 or wider.

    Raises:
        ValueError: The shapes differ.
    """
    if augmented.shape != targets.shape:
        raise ValueError(f"targets are {tuple(targets.shape)} and augmented ones {tuple(augmented.shape)}: give (B, D) both")
    with torch.autocast(queries.device.type, enabled=False):
        info_nce, coarse = composed_info_nce(queries, targets), composed_info_nce(queries, augmented)
        spread = _wide(augmented).std()
        uncertainty = 0.5 * (torch.exp(-spread) * coarse + spread)
        return UncertaintyLoss(gamma * uncertainty + (1 - gamma) * info_nce, info_nce, uncertainty, spread)


# ---- evaluation ------------------------------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """The best gallery images of each query, best first.

    Attributes:
        places: (Q, k) int64, in the gallery.
        hits: (Q, k) bool, whether they are right.
    """

    places: Tensor
    hits: Tensor


def best_of_gallery(
    queries: Tensor,
    gallery: Tensor,
    wanted: Tensor,
    labels: Tensor,
    reference: Tensor,
    identities: Tensor,
    top_k: int,
    rows: int = 1024,
) -> Found:
    """Gallery images with the largest inner product; a query's own reference image comes last.

    Args:
        queries: (Q, D) composed queries.
        gallery: (G, D), G >= 1.
        wanted: (Q,) integers: a gallery image is right if its label is this.
        labels: (G,) of the gallery.
        reference: (Q,) integers: gallery images with this identity come last; -1: none does.
        identities: (G,) of the gallery, >= 0.
        top_k: k, cut to G.
        rows: Queries at a time.
    """
    k = min(top_k, len(gallery))
    found, hits = [], []
    for start in range(0, len(queries), rows):
        part = slice(start, start + rows)
        scores = queries[part] @ gallery.T
        scores = scores.masked_fill(reference[part, None] == identities[None], -torch.inf)
        best = scores.topk(k, dim=1).indices
        found.append(best)
        hits.append(labels[best] == wanted[part, None])
    empty = torch.zeros(0, k, dtype=torch.int64, device=queries.device)
    return Found(torch.cat([empty, *found]), torch.cat([empty.bool(), *hits]))


def recall_at(hits: Tensor, ks: Sequence[int]) -> Tensor:
    """Share of queries with a right image among the first k, for each k: (Q, n) bool -> (K,) float64; a k above n counts as n."""
    return torch.stack([hits[:, :k].any(dim=1).double().mean() for k in ks])


def precision_at(hits: Tensor, ks: Sequence[int]) -> Tensor:
    """Mean share of right images among the first k, for each k: (Q, n) bool -> (K,) float64; a k above n counts as n."""
    return torch.stack([hits[:, :k].double().mean() for k in ks])


__all__ = [
    "augment_targets", "best_of_gallery", "coarse_weight", "composed_info_nce", "gaussian_targets", "on_sphere", "precision_at",
    "recall_at", "uncertainty_loss",
]  # fmt: skip
