"""Sparse-IFT: larger but sparse layers at the FLOPs of the dense ones, so that masks have more to choose from (arXiv:2303.11525).

Golden vectors come from CerebrasResearch/Sparse-IFT@487c284: ComputerVision/CIFAR/models/cifar_resnet18.py (sizes, blocks),
cbsparse/sparse/optimizers/{rigl,set}.py (updates) and dynamic.py (schedule). The code and the abstract were read, the paper's text was not.
Masks, schedules and FLOPs are the shared ones of this folder. Left out: the authors' search for the sparsity that meets a budget of FLOPs
with stem and head, their Wide-Factorized and SNIP/GraSP arms, masks balanced over attention heads.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lit_methods.callbacks.sparsity.schedules import drop_schedule

Family = Literal["wide", "parallel", "factorized", "doped", "none"]


UVLayer = Literal["linear", "nonlinear_norelu", "nonlinear_relu"]


Distribution = Literal["uniform", "er", "erk", "uniform_plus", "er_plus", "erk_plus"]


Init = Literal["kaiming_normal", "default"]


def base_scaling(sparsity: float) -> int:
    """B = 1 / (1 - s), rounded to an integer: by how much a sparse layer may hold more weights at equal FLOPs.

    Args:
        sparsity: s in [0, 1). The paper's are 0.5, 0.75 and 0.9, whose B is exact.

    Raises:
        ValueError: s outside [0, 1).
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is {sparsity}: give a share of removed weights from 0 to below 1, such as 0.75")
    return round(1 / (1.0 - sparsity))


def width_factor(sparsity: float) -> float:
    """Sparse Wide: factor of all hidden widths, sqrt(B)."""
    return math.sqrt(base_scaling(sparsity))


def wide_width(base_width: int, sparsity: float) -> int:
    """Sparse Wide: a scaled width, truncated."""
    return int(base_width * width_factor(sparsity))


def parallel_branches(sparsity: float) -> int:
    """Sparse Parallel: number of branches, B."""
    return base_scaling(sparsity)


def factorized_width(f_in: int, f_out: int, sparsity: float, kernel_size: Sequence[int] = (), sparse_u_only: bool = False) -> int:
    """Sparse Factorized: channels between U and V, rounded up.

    Args:
        f_in: Inputs of the dense layer.
        f_out: Its outputs.
        sparsity: s of U and V, not rounded to 1 / B.
        kernel_size: Kernel of U; () for a linear layer.
        sparse_u_only: V stays dense.

    Raises:
        ValueError: s outside [0, 1).
    """
    base_scaling(sparsity)
    positions = math.prod(kernel_size)
    dense = positions * f_in * f_out
    if sparse_u_only:
        return math.ceil(dense / ((1 - sparsity) * positions * f_in + f_out))
    return math.ceil(dense / ((1 - sparsity) * (positions * f_in + f_out)))


def doped_rank(f_in: int, f_out: int, sparsity: float, kernel_size: Sequence[int] = ()) -> int:
    """Sparse Doped: rank of the dense part V U, rounded down; 0 where the layer is too small for any.

    Args:
        f_in: Inputs of the dense layer.
        f_out: Its outputs.
        sparsity: s of the sparse part, not rounded to 1 / B.
        kernel_size: Kernel of the layer and of U; () for a linear layer.

    Raises:
        ValueError: s outside [0, 1).
    """
    base_scaling(sparsity)
    positions = math.prod(kernel_size)
    return math.floor(sparsity * (positions * (f_in * f_out)) / (positions * f_in + f_out))


def folded_frobenius(u: Tensor, v: Tensor) -> Tensor:
    """Squared Frobenius norm of the folded weight V U.

    Args:
        u: (d, f_in, ...) weight of U.
        v: (f_out, d, 1, ...) weight of V.

    Returns:
        Scalar in the dtype of the weights, differentiable.
    """
    with torch.autocast(u.device.type, enabled=False):
        return (v.flatten(1) @ u.flatten(1)).square().sum()


def spectral_gap(mask: Tensor) -> Tensor:
    """How far a mask is on the good side of the Ramanujan bound, as the graph between inputs and outputs that it is.

    sqrt(d_l - 1) + sqrt(d_r - 1) - sigma_2, with the mean degrees of both sides and the second largest singular value of the adjacency
    matrix. Sparse random regular graphs lie near 0, graphs with bottlenecks below; masks of a notable density above.

    Args:
        mask: bool, (outputs, inputs, ...); kernel positions count as inputs.

    Returns:
        Scalar, float64.
    """
    adjacency = mask.flatten(1).double()
    if adjacency.shape[0] > adjacency.shape[1]:
        adjacency = adjacency.T
    values = torch.linalg.eigvalsh(adjacency @ adjacency.T)  # autocast leaves float64 alone
    second = values[-2].clamp(min=0).sqrt() if len(values) > 1 else values.new_zeros(())
    edges = adjacency.sum()
    degrees = torch.stack([edges / adjacency.shape[0], edges / adjacency.shape[1]])
    return (degrees - 1).clamp(min=0).sqrt().sum() - second


__all__ = [
    "base_scaling",
    "doped_rank",
    "drop_schedule",
    "factorized_width",
    "folded_frobenius",
    "parallel_branches",
    "spectral_gap",
    "wide_width",
    "width_factor",
]
