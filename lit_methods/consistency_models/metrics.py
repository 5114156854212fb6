"""Distances between the student's and the teacher's answer, one number per sample.

Papers differ in whether squares are summed or averaged over the D components; ``reduction`` says which. Pass float32 or wider: at
small c half types lose the result.
"""

from typing import Literal

import torch
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
