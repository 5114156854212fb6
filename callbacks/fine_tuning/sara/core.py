"""Progressive sparse low-rank adaptation: which weights are trained, AdamW for them alone, the penalty of their rank.

Paper: SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank Adaptation, arXiv:2409.06633, ICLR 2025. Code of
the authors: sjtuplayer/SaRA at commit ea21192 (``optim/adamw2.py``, the variant with plain masks). Left out: the diffusion pipeline.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# ---- selection -------------------------------------------------------------------------------------------------------------------------


def small_weights(weight: Tensor, threshold: float) -> Tensor:
    """M = |P| < tau, bool of ``weight``'s shape; strict, so that zeros are chosen by any tau > 0."""
    return weight.detach().abs() < threshold


def still_small(mask: Tensor, weight: Tensor, threshold: float) -> Tensor:
    """Re-selection: M' = M and |P| < tau. What has grown past tau is frozen where it is."""
    return mask & small_weights(weight, threshold)


def threshold_of(weights: Iterable[Tensor], share: float) -> float:
    """The tau below which a share of all entries lies.

    Args:
        weights: Any shapes, floating point.
        share: In [0, 1].

    Returns:
        With entries of equal magnitude at tau, fewer lie below it; infinity for a share of 1.
    """
    magnitudes = torch.cat([weight.detach().abs().flatten().float() for weight in weights])
    count = int(share * len(magnitudes))
    return math.inf if count >= len(magnitudes) else float(magnitudes.kthvalue(count + 1).values)


def sara_learning_rate(threshold: float) -> float:
    """The authors' learning rate where none is given: 1e-3 exp(-350 tau)."""
    return 1e-3 * math.exp(-350 * threshold)


def is_reselection(step: int, progressive_steps: int) -> bool:
    """Whether M' is made at the start of an optimiser step.

    Args:
        step: The step, counted from 1.
        progressive_steps: Steps with M; below 0: M' is never made.
    """
    return progressive_steps >= 0 and step == progressive_steps + 1


# ---- unstructural back-propagation -----------------------------------------------------------------------------------------------------


class _Scattered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, index: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(index)
        ctx.dtype = values.dtype
        return weight.detach()  # the same memory: a copy of the weight is what this saves

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (index,) = ctx.saved_tensors
        return grad.flatten().index_select(0, index).to(ctx.dtype), None, None


def scattered(values: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """The dense weight as a function of the values that are trained: the gradient reaches those alone, and no other is kept.

    Args:
        values: p = P[M], (k,).
        weight: P, any shape, which holds ``values`` at ``index`` already (:func:`scatter_`); it gets no gradient.
        index: (k,) integers, ascending positions in the flattened weight.

    Returns:
        P, in the same memory as ``weight``.
    """
    return _Scattered.apply(values, weight, index)  # type: ignore[no-any-return]


@torch.no_grad()
def scatter_(values: Tensor, weight: Tensor, index: Tensor) -> None:
    """Write values into the dense weight, in place: P[M] = p."""
    weight.put_(index.long(), values.to(weight.dtype))  # not index_copy_ on a flat view: kernels may be channels-last


# ---- low rank --------------------------------------------------------------------------------------------------------------------------


def nuclear_norm(weight: Tensor, mask: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """L_rank = lambda ||P * M||_*, the sum of singular values of the masked weights (not of their change), and its gradient.

    Args:
        weight: P (m, n).
        mask: M, bool (m, n).
        strength: lambda.

    Returns:
        Scalar, and (m, n): lambda (U V^T) * M; float32 or wider.
    """
    with torch.autocast(weight.device.type, enabled=False):
        masked = weight.detach().to(torch.promote_types(weight.dtype, torch.float32)) * mask
        u, singular, vh = torch.linalg.svd(masked, full_matrices=False)
        return strength * singular.sum(), strength * (u @ vh) * mask


def effective_rank(weight: Tensor) -> Tensor:
    """Exp of the entropy of the normalised singular values of a matrix; 0 of a matrix of zeros. Scalar, float32 or wider."""
    singular = torch.linalg.svdvals(weight.detach().to(torch.promote_types(weight.dtype, torch.float32)))
    total = singular.sum()
    shares = singular / total.clamp(min=torch.finfo(singular.dtype).tiny)
    return torch.special.entr(shares).sum().exp() * (total > 0)


# ---- AdamW -----------------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def adamw_(
    values: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor | float,
    lr: Tensor | float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One step of AdamW on the entries that are trained; values and moments change in place.

    Args:
        values: Entries of the mask.
        grad: Their gradients.
        exp_avg: First moment.
        exp_avg_sq: Second moment.
        step: t, counted from 1.
        lr: Learning rate.
        betas: Decay rates of the moments.
        eps: Addend to the denominator.
        weight_decay: Decoupled: P *= 1 - lr wd.
    """
    first, second = betas
    values.mul_(1 - lr * weight_decay)
    exp_avg.lerp_(grad, 1 - first)
    exp_avg_sq.mul_(second).addcmul_(grad, grad, value=1 - second)
    denominator = (exp_avg_sq / (1 - second**step)).sqrt_().add_(eps)
    values.sub_(exp_avg / denominator * (lr / (1 - first**step)))


__all__ = ["is_reselection", "nuclear_norm", "sara_learning_rate", "small_weights", "still_small", "threshold_of"]
