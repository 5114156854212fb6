"""SSVI's update of the subspace: which directions leave it, which join. Pure functions.

Paper: "Training Bayesian Neural Networks with Sparse Subspace Variational Inference" (arXiv:2402.11025). Origin: ljb121002/SSVI@5ddb405,
rigl_torch/RigL.py (RigLScheduler._rigl_step, grow_std_init). The variational layers are those of :mod:`lit_methods.bayes.variational`.
Golden vectors test both. Left out: the paper's averaging of the addition score over several weight samples, which the code doesn't do.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lit_methods.bayes.variational import Spread, posterior_std, rho_of_std
from lit_methods.callbacks.sparsity.drop_grow import grow
from lit_methods.callbacks.sparsity.masks import keep_largest

Criterion = Literal["mean", "snr", "E_mean_abs", "SNR_mean_abs", "E_exp_mean_abs", "SNR_exp_mean_abs"]
_EPS_STD = 1e-6  # sigma of new weights where it isn't the layer's mean
_FAR = 40.0  # |mu| / sigma from which on the normal distribution's tail is 0 in float64
_FLAT = 1e-6  # lam * sigma below which exp is a straight line to this accuracy, and the difference of two moments is lost in float64


def active_count(numel: int, density: float) -> int:
    """Weights of a layer that stay as the released code counts them: numel - int((1 - density) * numel)."""
    return numel - int((1 - density) * numel)


def removal_score(mu: Tensor, sigma: Tensor, criterion: Criterion = "SNR_mean_abs", lam: float = 1.0) -> Tensor:
    """How much a weight is worth by its distribution N(mu, sigma^2); the lowest leave.

    ``mean``: |mu|. ``snr``: |mu| / sigma. ``E_mean_abs``: E|theta|. ``SNR_mean_abs``: E|theta| / std |theta|. ``E_exp_mean_abs``: M(lam)
    = E exp(lam |theta|). ``SNR_exp_mean_abs``: M(lam) / sqrt(M(2 lam) - M(lam)^2).

    With t = |mu| / sigma and d = 2 (phi(t) - t Phi(-t)), E|theta| = |mu| + sigma d and var|theta| = sigma^2 (1 - 2 t d - d^2), which
    subtracts no large numbers for large t, as sigma^2 + mu^2 - (E|theta|)^2 would. M is computed by its logarithm and doesn't overflow in
    the ratio.

    Args:
        mu: Means, any shape.
        sigma: Standard deviations >= 0, same shape.
        criterion: Which score.
        lam: Of the two exponential ones, > 0.

    Returns:
        float64, >= 0, shape of ``mu``; 0 where ``mu`` and ``sigma`` are, infinity where ``sigma`` alone is 0 and divides.
    """
    mean, std = mu.detach().abs().double(), sigma.detach().double()
    if criterion == "mean":
        return mean
    absent = (mean == 0) & (std == 0)
    t = torch.where(absent, 0.0, mean / std)
    if criterion == "snr":
        return t
    near = t.clamp(max=_FAR)
    d = 2 * (torch.exp(-near.square() / 2) / (2 * torch.pi) ** 0.5 - near * torch.special.ndtr(-near))
    spread = (1 - 2 * near * d - d.square()).sqrt()  # std |theta| / sigma
    if criterion == "E_mean_abs":
        score = mean + std * d
    elif criterion == "SNR_mean_abs":
        score = (t + d) / spread
    else:
        first = _log_moment(mean, std, t, lam)
        ratio = torch.expm1(_log_moment(mean, std, t, 2 * lam) - 2 * first).rsqrt()
        score = first.exp() if criterion == "E_exp_mean_abs" else torch.where(lam * std < _FLAT, 1 / (lam * std * spread), ratio)
    return torch.where(absent, 0.0, score)


def _log_moment(mean: Tensor, std: Tensor, t: Tensor, lam: float) -> Tensor:
    """Log E exp(lam |theta|) = lam^2 sigma^2 / 2 + log(e^(lam m) Phi(t + lam sigma) + e^(-lam m) Phi(-t + lam sigma)), m = |mu|."""
    up = lam * mean + torch.special.log_ndtr(t + lam * std)
    down = -lam * mean + torch.special.log_ndtr(-t + lam * std)
    return (lam * std).square() / 2 + torch.logaddexp(up, down)


class Subspace(NamedTuple):
    """A layer after an update.

    Attributes:
        mask: bool, which weights are active: as many as before.
        mu: Means; 0 for new weights and outside the mask.
        rho: Of the standard deviations; 0 outside the mask.
    """

    mask: Tensor
    mu: Tensor
    rho: Tensor


def removal_addition(
    mu: Tensor,
    rho: Tensor,
    mask: Tensor,
    gradient: Tensor,
    fraction: float,
    criterion: Criterion = "SNR_mean_abs",
    lam: float = 1.0,
    grow_std: Literal["mean", "eps"] = "mean",
    spread: Spread = "softplus",
) -> Subspace:
    """One update of a layer's subspace: int(fraction * active) weights leave, as many join.

    Those with the lowest :func:`removal_score` leave. Those with the largest |gradient| join, among all that weren't kept: a weight that
    has just left may return, with its mu and rho. A new one begins at mu = 0.

    Args:
        mu: Means, any shape, 0 where ``mask`` is False.
        rho: Of the standard deviations, same shape.
        mask: bool, same shape.
        gradient: Dense dL/dmu, same shape, finite.
        fraction: Share of the active weights that leaves, in [0, 1].
        criterion: As in :func:`removal_score`.
        lam: As in :func:`removal_score`.
        grow_std: rho of new weights: ``mean`` of those that were active and are (where none is, of all that were), or sigma 1e-6 by
            ``eps``.
        spread: How sigma follows from rho.

    Returns:
        New tensors; nothing is changed in place.
    """
    active = int(mask.sum())
    score = removal_score(mu, posterior_std(rho, mask, spread), criterion, lam).masked_fill(~mask, -1.0)
    kept = keep_largest(score, active - int(fraction * active))
    after = grow(kept, gradient.detach().abs(), active - int(kept.sum()))
    new, stays = after & ~mask, after & mask
    known = stays if bool(stays.any()) else mask
    start = rho[known].mean() if grow_std == "mean" else rho_of_std(rho.new_tensor(_EPS_STD), spread)
    return Subspace(after, torch.where(stays, mu, 0.0), torch.where(new, start, torch.where(stays, rho, 0.0)))


__all__ = ["Criterion", "Subspace", "active_count", "removal_addition", "removal_score"]
