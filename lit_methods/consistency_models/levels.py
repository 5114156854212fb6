"""Noise levels, which of them are drawn, and the preconditioning that makes f(x, sigma_min) = x. Indices ascend: level 1 is the smallest.

Notation of "Consistency Models" (arXiv:2303.01469) and EDM (arXiv:2206.00364): x_sigma = x + sigma z.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


def karras_levels(
    count: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0, dtype: torch.dtype = torch.float64
) -> Tensor:
    """sigma_i = (sigma_min^(1/rho) + (i - 1) / (N - 1) (sigma_max^(1/rho) - sigma_min^(1/rho)))^rho, i = 1..N.

    Args:
        count: N >= 2.
        sigma_min: Smallest level, > 0.
        sigma_max: Largest level.
        rho: > 0; the larger, the more levels are small.
        dtype: Dtype of the result.

    Returns:
        (N,) ascending.

    Raises:
        ValueError: Levels that can't be.
    """
    if count < 2 or not 0 < sigma_min < sigma_max or rho <= 0:
        raise ValueError(
            f"{count} levels from {sigma_min} to {sigma_max} with rho {rho} can't be: give at least 2, 0 < sigma_min < sigma_max, rho > 0"
        )
    share = torch.arange(count, dtype=torch.float64) / (count - 1)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return ((low + share * (high - low)) ** rho).to(dtype)


def lognormal_probabilities(levels: Tensor, mean: float = -1.1, std: float = 2.0) -> Tensor:
    """Chance of each pair of neighbours: the mass that a lognormal has between them, normalised (iCT, arXiv:2310.14189, Eq. 10).

    Args:
        levels: (N,) ascending, > 0.
        mean: Mean of ln sigma.
        std: Standard deviation of ln sigma, > 0.

    Returns:
        (N - 1,) sums to 1; entry i - 1 belongs to the pair (sigma_i, sigma_{i+1}).
    """
    cdf = torch.erf((levels.log() - mean) / (math.sqrt(2) * std))
    mass = cdf.diff()
    return mass / mass.sum()


def uniform_probabilities(levels: Tensor) -> Tensor:
    """The same chance for each pair of neighbours of (N,) ``levels``: (N - 1,) sums to 1."""
    return torch.full_like(levels[:-1], 1.0 / (len(levels) - 1))


def inverse_gap(lower: Tensor, upper: Tensor) -> Tensor:
    """Weight lambda = 1 / (sigma_{i+1} - sigma_i), the weight of iCT; any shapes that broadcast."""
    return 1.0 / (upper - lower)


class Scalings(NamedTuple):
    """f(x, sigma) = skip x + out F(inp x, noise), each like ``sigma``."""

    skip: Tensor
    out: Tensor
    inp: Tensor
    noise: Tensor


def boundary_scalings(sigma: Tensor, sigma_min: float | Tensor = 0.002, sigma_data: float = 0.5) -> Scalings:
    """EDM's scalings, shifted so that f(x, sigma_min) = x exactly (arXiv:2303.01469, Appendix C).

    Args:
        sigma: Any shape, >= ``sigma_min``; computed in its dtype: give float32 or wider.
        sigma_min: Smallest level.
        sigma_data: Standard deviation of the data.

    Returns:
        ``noise`` is ln(sigma) / 4.
    """
    above, total = sigma - sigma_min, sigma**2 + sigma_data**2
    return Scalings(sigma_data**2 / (above**2 + sigma_data**2), sigma_data * above / total.sqrt(), total.rsqrt(), sigma.log() / 4)


def like(values: Tensor, x: Tensor) -> Tensor:
    """(B,) values, shaped so that they broadcast with (B, ...) ``x``."""
    return values.view(-1, *[1] * (x.ndim - 1))


def quarter_means(name: str, losses: Tensor, quarter: Tensor) -> dict[str, Tensor | float]:
    """Mean loss of each quarter of the noise levels, as ``<name>_q1`` to ``_q4``; NaN where no sample fell.

    Args:
        name: Prefix of what is logged.
        losses: (B,).
        quarter: (B,) int64 in 0..3.
    """
    inside = quarter[:, None] == torch.arange(4, device=quarter.device)
    means = (losses[:, None] * inside).sum(0) / inside.sum(0)
    return {f"{name}_q{number}": mean for number, mean in enumerate(means, start=1)}
