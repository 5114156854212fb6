"""Distances between the student's and the teacher's answer, one number per sample.

Papers differ in whether squares are summed or averaged over the D components; ``reduction`` says which. Pass float32 or wider: at
small c half types lose the result.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Reduction = Literal["sum", "mean"]


def square(a: Tensor, b: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Sum or mean of (a - b)^2 over all dimensions but the first: (B, ...) -> (B,)."""
    squares = (a - b).square().flatten(1)
    return squares.sum(1) if reduction == "sum" else squares.mean(1)


def absolute(a: Tensor, b: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Sum or mean of |a - b| over all dimensions but the first: (B, ...) -> (B,)."""
    sizes = (a - b).abs().flatten(1)
    return sizes.sum(1) if reduction == "sum" else sizes.mean(1)


def pseudo_huber(a: Tensor, b: Tensor, c: float | Tensor, reduction: Reduction = "sum") -> Tensor:
    """sqrt(m + c^2) - c with m from :func:`square`: (B, ...) -> (B,).

    Args:
        a: (B, ...).
        b: The same shape.
        c: > 0. iCT: 0.00054 sqrt(D) with sums (arXiv:2310.14189, Section 3.3).
        reduction: ``sum`` in iCT; ``mean`` in sLCT's code, where the same c weighs sqrt(D) times more.
    """
    return (square(a, b, reduction) + c**2).sqrt() - c


def cauchy(a: Tensor, b: Tensor, c: float | Tensor) -> Tensor:
    """log(1 + m / (2 c^2)) with the mean of squares m: (B, ...) -> (B,) (sLCT, arXiv:2502.01441)."""
    return torch.log1p(square(a, b) / (2 * c**2))


def geman_mcclure(a: Tensor, b: Tensor, c: float | Tensor) -> Tensor:
    """2 m / (m + 4 c^2) with the mean of squares m: (B, ...) -> (B,)."""
    m = square(a, b)
    return 2 * m / (m + 4 * c**2)


def detached_pseudo_huber(a: Tensor, b: Tensor, c: float | Tensor) -> Tensor:
    """S / sg sqrt(S + c^2) with the sum of squares S: (B, ...) -> (B,) (EPG's code, arXiv:2510.12586).

    The denominator has no gradient, so the gradient is twice that of :func:`pseudo_huber`.

    Args:
        a: (B, ...).
        b: The same shape.
        c: > 0; 0.06 in EPG.
    """
    squares = square(a, b, "sum")
    return squares / (squares.detach() + c**2).sqrt()


def perceptual(
    a: Tensor, b: Tensor, features: Callable[[Tensor], Tensor | Sequence[Tensor]], weights: Sequence[Tensor] | None = None
) -> Tensor:
    """Distance of images by the features of a network, in the form of LPIPS (arXiv:1801.03924, Eq. 1): (B, ...) -> (B,).

    Sum over layers of the mean over places of the weighted squares of u_a - u_b, u the features of a place as a vector of length 1.

    Args:
        a: (B, C, H, W).
        b: The same shape.
        features: Images -> one tensor, or one a layer, (B, D, ...) each.
        weights: (D,) of each layer, >= 0, such as LPIPS's trained ones; None: all 1.

    Returns:
        (B,) in the dtype of ``a``.
    """
    first, second = ([layers] if isinstance(layers, Tensor) else list(layers) for layers in (features(a), features(b)))
    total = torch.zeros(len(a), dtype=a.dtype, device=a.device)
    for layer, (one, other) in enumerate(zip(first, second, strict=True)):
        apart = F.normalize(one.to(a.dtype), dim=1) - F.normalize(other.to(a.dtype), dim=1)
        squares = apart.square().reshape(len(a), apart.shape[1], -1).mean(2)  # (B, D)
        total = total + (squares if weights is None else squares * weights[layer]).sum(1)
    return total
