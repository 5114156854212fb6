"""Mean-field normal posteriors as pure functions: theta = mu + sigma * eps, entry by entry.

Sources: local reparameterisation (Kingma et al., arXiv:1506.02557); the forms of SSVI's released code (arXiv:2402.11025;
ljb121002/SSVI@5ddb405, models/utils.py: StoLinear), against which golden vectors test them.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Spread = Literal["softplus", "exp", "abs"]
Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
_FLOOR = 1e-8  # added to the variance of an output, so that its root has a gradient where all sigmas are 0


def posterior_std(rho: Tensor, mask: Tensor | None = None, spread: Spread = "softplus") -> Tensor:
    """Sigma of rho: softplus(rho), exp(rho) or |rho|, and exactly 0 where nothing is active.

    Args:
        rho: Any shape.
        mask: bool, same shape, True where a weight is active; None: everywhere.
        spread: Which of the three.

    Returns:
        Shape and dtype of ``rho``, >= 0.
    """
    sigma = F.softplus(rho) if spread == "softplus" else rho.exp() if spread == "exp" else rho.abs()
    return sigma if mask is None else sigma * mask


def rho_of_std(sigma: Tensor, spread: Spread = "softplus") -> Tensor:
    """Undo :func:`posterior_std`: log(expm1(sigma)), log(sigma) or sigma.

    Args:
        sigma: Any shape, > 0.
        spread: Which of the three.
    """
    return torch.log(torch.expm1(sigma)) if spread == "softplus" else sigma.log() if spread == "exp" else sigma


def variational_output(
    product: Product,
    inputs: Tensor,
    squares: Tensor,
    mu: Tensor,
    sigma: Tensor,
    bias: Tensor | None = None,
    noise: Callable[[Tensor], Tensor] = torch.randn_like,
) -> Tensor:
    """Output of a linear map with random weights, drawn at the output: P(x; mu) + b + sqrt(P(x^2; sigma^2) + 1e-8) * eps.

    Every entry of the output has noise of its own, so that samples of a batch don't share the weights' noise (local reparameterisation).

    Args:
        product: P(inputs, weight, bias), linear in its weight, such as ``F.linear``.
        inputs: What it takes.
        squares: The same, squared; for a look-up in a table the indices themselves.
        mu: Mean of the weight.
        sigma: Its standard deviation, same shape, 0 where a weight isn't there.
        bias: Added to the mean; it has no noise.
        noise: Draws eps like a tensor.

    Returns:
        What ``product`` returns. The root is taken in float32 or wider.
    """
    mean = product(inputs, mu, bias)
    variance = product(squares, sigma.square(), None)
    wide = torch.promote_types(variance.dtype, torch.float32)
    return (mean + (variance.to(wide) + _FLOOR).sqrt() * noise(mean)).to(mean.dtype)


def gaussian_kl(mu: Tensor, sigma: Tensor, mask: Tensor | None = None, prior_mean: float = 0.0, prior_std: float = 1.0) -> Tensor:
    """KL divergence from a normal prior, sum over active weights of log(sp / sigma) + (sigma^2 + (mu - mp)^2) / (2 sp^2) - 1/2.

    Args:
        mu: Means, any shape.
        sigma: Standard deviations, same shape, > 0 where a weight is active.
        mask: bool, same shape; None: all are active.
        prior_mean: mp.
        prior_std: sp > 0.

    Returns:
        Scalar >= 0 in nats, float32 or wider. No gradient reaches inactive entries.
    """
    wide = torch.promote_types(mu.dtype, torch.float32)
    mu, sigma = mu.to(wide), sigma.to(wide)
    positive = sigma if mask is None else torch.where(mask, sigma, 1.0)
    ratio = positive.clamp_min(torch.finfo(wide).tiny).log()
    terms = math.log(prior_std) - ratio + (positive.square() + (mu - prior_mean).square()) / (2 * prior_std**2) - 0.5
    return (terms if mask is None else torch.where(mask, terms, 0.0)).sum()


def mixture_log_probabilities(logits: Tensor) -> Tensor:
    """Log of the mean of K softmaxes, which is a vector of logits itself: its softmax is that mean.

    Args:
        logits: (K, B, C).

    Returns:
        (B, C), each row's exponentials sum to 1, in float32 or wider.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide.log_softmax(-1).logsumexp(0) - math.log(len(logits))


__all__ = ["Product", "Spread", "gaussian_kl", "mixture_log_probabilities", "posterior_std", "rho_of_std", "variational_output"]
