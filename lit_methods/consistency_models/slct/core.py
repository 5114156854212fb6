"""The maths of sLCT (arXiv:2502.01441): the scale of its metric, the early denoising loss, the coupling, layer norm without a scale.

Golden vectors come from quandao10/LCT@34661b9 (models/karras_diffusion.py, models/optimal_transport.py, models/network_dit.py). The metric
is :func:`~lit_methods.consistency_models.metrics.cauchy`. The assignment is solved by SciPy, exactly; the authors call POT's ``emd``, which
finds the same optimum.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from lit_methods import checks


def adaptive_c(levels: int, s0: int = 10, initial: float = 0.03456, slope: float = -1.15, intercept: float = -0.85) -> float:
    """Scale c of the Cauchy metric: ``initial`` in the first stage (N = s0 + 1), then exp(slope ln(N - 1) + intercept).

    Args:
        levels: N >= 2.
        s0: Intervals of the first stage.
        initial: Its c; 0.00054 sqrt(D) in the code, 0.03456 for D = 4096.
        slope: Slope of ln c over ln(N - 1): a fit of how the differences of the answers shrink. The code's; the paper's is -1.18 (mem).
        intercept: The code's; the paper's is -0.72 (mem).
    """
    return initial if levels <= s0 + 1 else math.exp(slope * math.log(levels - 1) + intercept)


def is_early(index: Tensor, levels: int, fraction: float = 0.25) -> Tensor:
    """Which pairs are among the smallest levels: those with N - 1 - i >= floor(N (1 - fraction)).

    Args:
        index: (B,) i in 1..N-1 of the lower level, ascending.
        levels: N.
        fraction: Share of the levels, in [0, 1].

    Returns:
        (B,) bool.
    """
    return levels - 1 - index >= int(levels * (1 - fraction))


class EarlyLoss(NamedTuple):
    """Losses (B,), 0 outside the region, and their mean inside: a scalar, 0 if no sample is inside."""

    losses: Tensor
    mean: Tensor


def early_diffusion_loss(answer: Tensor, x: Tensor, upper: Tensor, inside: Tensor, sigma_data: float = 0.5) -> EarlyLoss:
    """mean((y - x)^2) (1 / sigma^2 + 1 / sigma_data^2) of the samples inside: denoising, on the student's own answer.

    Args:
        answer: (B, ...) y = f(x + sigma z, sigma).
        x: (B, ...) data.
        upper: (B,) sigma, the higher level of each pair, > 0.
        inside: (B,) bool, see :func:`is_early`.
        sigma_data: Standard deviation of the data.
    """
    with torch.autocast(x.device.type, enabled=False):
        wide = torch.promote_types(answer.dtype, torch.float32)
        squares = (answer.to(wide) - x.to(wide)).square().flatten(1).mean(1)
        losses = torch.where(inside, squares * (1 / upper**2 + 1 / sigma_data**2), 0.0)
        return EarlyLoss(losses, losses.sum() / inside.sum().clamp(min=1))


def slct_loss(losses: Tensor, early: Tensor, weight: float = 5.0) -> Tensor:
    """Mean of the consistency losses (B,) plus ``weight`` times the diffusion loss of the early levels: a scalar."""
    return losses.mean() + weight * early


class Coupling(NamedTuple):
    """Which noise goes to which sample, and what it costs.

    Attributes:
        match: (B,) int64, row of the noise for each row of the data, on their device.
        cost: Scalar, sum of squared distances of the matched pairs.
        identity_cost: The same, for the order in which they were drawn.
    """

    match: Tensor
    cost: Tensor
    identity_cost: Tensor


@torch.no_grad()
def couple(x: Tensor, noise: Tensor) -> Coupling:
    """The assignment of noise to data with the smallest sum of squared distances (exact; on the CPU, O(B^3)).

    Args:
        x: (B, ...) data, finite.
        noise: The same shape, finite.

    Raises:
        ValueError: Shapes that differ, or a value that isn't finite.
    """
    if x.shape != noise.shape:
        raise ValueError(f"{tuple(x.shape)} data don't fit {tuple(noise.shape)} noise: give as many of the same size")
    with torch.autocast(x.device.type, enabled=False):
        wide = torch.promote_types(x.dtype, torch.float32)
        flat, drawn = x.flatten(1).to(wide), noise.flatten(1).to(wide)
        # the squared norms are in every assignment alike, so the products alone decide
        products = (flat @ drawn.T).cpu().numpy()
        try:
            _, columns = linear_sum_assignment(products, maximize=True)
        except ValueError as problem:
            raise ValueError("the data or the noise of this batch hold a NaN or an infinity: no coupling can be found") from problem
        match = torch.from_numpy(columns).to(x.device)
        return Coupling(match, (flat - drawn[match]).square().sum(), (flat - drawn).square().sum())


class NonScalingLayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) + beta over the last dimension; beta is trained, a scale doesn't exist.

    A trained scale would amplify channels with outliers.

    Args:
        features: D of (..., D).
        eps: Added to the variance.
    """

    def __init__(self, features: int, eps: float = 1e-5) -> None:
        super().__init__()
        checks.at_least(0, eps=eps)
        self.eps = eps
        self.bias = nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return F.layer_norm(x, self.bias.shape, None, self.bias, self.eps)


def remove_norm_scales(network: nn.Module) -> int:
    """Put a :class:`NonScalingLayerNorm` in the place of every ``nn.LayerNorm`` over one dimension that has a scale; biases are kept.

    Layers without a scale stay: in a DiT the conditioning scales them. Subclasses of ``nn.LayerNorm`` stay, too: they may do more. Do
    it before the optimiser is made.

    Args:
        network: Changed in place; not itself a ``nn.LayerNorm``.

    Returns:
        How many were replaced.
    """
    count = 0
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.LayerNorm and child.elementwise_affine and len(child.normalized_shape) == 1:
                norm = NonScalingLayerNorm(child.normalized_shape[0], child.eps).to(child.weight)
                if child.bias is not None:
                    norm.bias.data.copy_(child.bias.data)
                setattr(parent, name, norm.train(child.training))
                count += 1
    return count


__all__ = ["NonScalingLayerNorm", "adaptive_c", "couple", "early_diffusion_loss", "is_early", "remove_norm_scales", "slct_loss"]
