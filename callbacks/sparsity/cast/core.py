"""CAST: a dense network becomes an N:M sparse one while its forward pass stays dense (arXiv:2509.25996).

Equations and algorithms by number from a third party's line-by-line reading of the paper, whose own text could not be opened; there is no
public code. Golden vectors come from these equations, see tests/golden/data/cast/README.md. Where the reading is silent the choice is ours
and marked on the technique's page. Baselines: AST (arXiv:2407.20584) and naive masked retraining; SR-STE is a recipe of
:class:`~lit_methods.callbacks.NMSparsity`. The optimiser: :mod:`~lit_methods.callbacks.sparsity.cast.adams`. Left out: N:M masks by
Wanda or SparseGPT as the start of naive retraining, MaskLLM.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def is_refresh_step(step: int, interval: int) -> bool:
    """Whether masks are made anew before optimiser step ``step`` (counted from 0): at 0, ``interval``, 2 ``interval``, ... (Eq. 6)."""
    return step % interval == 0


def expand_blocks(values: Tensor, weight: Tensor, dim: int = 1) -> Tensor:
    """Values of row blocks, spread over the weight that they belong to.

    Args:
        values: (R, b), one value for each of b contiguous blocks of inputs of each of R outputs.
        weight: (R, C, ...) with ``dim`` 1, (C, R, ...) with ``dim`` 0; b divides C.
        dim: The weight's dimension of inputs.

    Returns:
        Broadcasts with ``weight``.
    """
    spread = values.repeat_interleave(weight.shape[dim] // values.shape[1], dim=1)
    spread = spread if dim == 1 else spread.T
    return spread.reshape(*spread.shape, *[1] * (weight.ndim - 2))


def scaled_weight(weight: Tensor, scale: Tensor, dim: int = 1) -> Tensor:
    """W_s[r, c] = W[r, c] A[r, c // (C / n)] (Eq. 11 and 12).

    Args:
        weight: W, as in :func:`expand_blocks`.
        scale: A, (R, n), floating point; 1 changes nothing.
        dim: The weight's dimension of inputs.
    """
    blocks = weight.unflatten(dim, (scale.shape[1], -1))  # (R, n, C / n, ...), with dim 0 (n, C / n, R, ...): no scale is repeated
    own = scale[:, :, None] if dim == 1 else scale.T[:, None]
    return (blocks * own.reshape(*own.shape, *[1] * (weight.ndim - 2))).flatten(dim, dim + 1)


def finalized_weight(weight: Tensor, mask: Tensor, scale: Tensor | None = None, dim: int = 1) -> Tensor:
    """The N:M weight of Alg. 2: masked, then scaled; removed entries are exactly 0.

    Args:
        weight: W, unscaled.
        mask: bool, shape of ``weight``.
        scale: A; None: without scaling.
        dim: The weight's dimension of inputs.
    """
    pruned = weight.masked_fill(~mask, 0.0)
    return pruned if scale is None else scaled_weight(pruned, scale, dim)


def pruned_block_means(weight: Tensor, mask: Tensor, block: int, dim: int = 1) -> Tensor:
    """Start of AST's low-rank branch (SLoRB): for each row and block of inputs the mean of the weights that the mask removes.

    Args:
        weight: (R, C) with ``dim`` 1, (C, R) with ``dim`` 0.
        mask: bool, shape of ``weight``.
        block: Inputs of a block; divides C.
        dim: The weight's dimension of inputs.

    Returns:
        (R, C / block); 0 where nothing is removed.
    """
    rows, removed = (weight, ~mask) if dim == 1 else (weight.T, ~mask.T)
    removed = removed.unflatten(1, (-1, block))
    return (rows.unflatten(1, (-1, block)) * removed).sum(-1) / removed.sum(-1).clamp(min=1)


@torch.no_grad()
def magnitude_statistics(weights: Sequence[Tensor], masks: Sequence[Tensor]) -> dict[str, Tensor]:
    """How far the weights that a mask removes have come on their way to 0.

    Args:
        weights: Latent weights, any shapes and devices.
        masks: bool, True where a weight is kept.

    Returns:
        Scalars on the first weight's device: ``masked_magnitude`` and ``kept_magnitude``, mean absolute values over all weights;
        ``magnitude_ratio``, masked / kept; ``masked_below_1e-4``, share of the masked weights. NaN where there is none of a kind.
    """
    sums = []
    for weight, mask in zip(weights, masks, strict=True):
        size = weight.detach().abs().float()
        removed = ~mask
        parts = [size.sum(), (size * removed).sum(), removed.sum(), ((size < 1e-4) & removed).sum()]
        sums.append(torch.stack([part.float() for part in parts]).to(weights[0].device))
    everything, masked, count, small = torch.stack(sums).sum(0)
    kept = (everything - masked) / (sum(weight.numel() for weight in weights) - count)
    return {
        "masked_magnitude": masked / count,
        "kept_magnitude": kept,
        "magnitude_ratio": masked / count / kept,
        "masked_below_1e-4": small / count,
    }


class _Divergence(torch.autograd.Function):
    """KL(teacher || student) over the last dimension, with two matrices in memory from forward to backward.

    ``sum_v p (log p - log q)``, where classes with p = 0 add 0. Its gradients are q - p and p (log p - log q - KL).
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:  # type: ignore[override]
        log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
        p = log_p.exp()
        # 0 times an infinity counts 0; a NaN in the logits makes its whole row NaN, so the first class tells
        unknown = 0 * (p[..., 0] + log_q[..., 0].exp())
        terms = log_p.sub_(log_q).mul_(p).nan_to_num_(0.0, torch.inf, -torch.inf)
        total = terms.sum(-1) + unknown
        ctx.save_for_backward(p.nan_to_num_(0.0), log_q.exp_(), *((terms, total) if ctx.needs_input_grad[1] else ()))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        p, q, *rest = ctx.saved_tensors
        own = (q - p).mul_(grad[..., None]) if ctx.needs_input_grad[0] else None
        return own, (rest[0] - p * rest[1][..., None]).mul_(grad[..., None]) if rest else None


def kl_to_teacher(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, squared: bool = True, valid: Tensor | None = None
) -> Tensor:
    """KL(teacher || student) over the last dimension, mean over all others.

    Args:
        student_logits: (..., V) floating point.
        teacher_logits: Same shape; -inf removes a class.
        temperature: Divides both, > 0; CAST has none (1), AST has 2.
        squared: Multiply by ``temperature`` squared.
        valid: (...) bool, which entries count; None: all.

    Returns:
        Scalar >= 0 in float32 or wider; 0 where nothing counts. Its gradient can't be differentiated again.
    """
    with torch.autocast(student_logits.device.type, enabled=False):
        dtype = torch.promote_types(student_logits.dtype, torch.float32)
        student, teacher = student_logits.to(dtype), teacher_logits.to(dtype)
        if temperature != 1:
            student, teacher = student / temperature, teacher / temperature
        terms: Tensor = _Divergence.apply(student, teacher)
        mean = terms.mean() if valid is None else terms.masked_fill(~valid, 0).sum() / valid.sum().clamp(min=1)
    return mean * temperature**2 if squared else mean


def convex_loss(kl: Tensor, own: Tensor, eta: float) -> Tensor:
    """Eq. 13: eta KL + (1 - eta) times the module's own loss."""
    return eta * kl + (1.0 - eta) * own


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor | None,
    eta: float = 1 / 3,
    temperature: float = 1.0,
    squared: bool = True,
    ignore_index: int = -100,
    own: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """All of Eq. 13: convex sum of the KL to the teacher and the student's own loss, the cross-entropy over the same tokens.

    Args:
        student_logits: (..., V) floating point.
        teacher_logits: Same shape.
        targets: (...) int64 classes; ``ignore_index`` leaves an entry out of both parts. None: all entries count; needs ``own``.
        eta: Share of the KL, 0 to 1.
        temperature: Temperature of the KL; the cross-entropy has none.
        squared: Multiply the KL by ``temperature`` squared.
        ignore_index: Class in ``targets`` that leaves an entry out.
        own: Scalar, a loss in the place of the cross-entropy.

    Returns:
        Loss, KL and the student's own loss: scalars in float32 or wider.

    Raises:
        ValueError: Neither ``targets`` nor ``own``.
    """
    valid = None if targets is None else targets != ignore_index
    kl = kl_to_teacher(student_logits, teacher_logits, temperature, squared, valid)
    if own is None:
        if targets is None or valid is None:
            raise ValueError("distillation_loss got neither targets nor own: give the classes, or the loss that takes the place of theirs")
        with torch.autocast(student_logits.device.type, enabled=False):
            logits = student_logits.to(kl.dtype).flatten(0, -2)
            total = F.cross_entropy(logits, targets.flatten(), ignore_index=ignore_index, reduction="sum")
        own = total / valid.sum().clamp(min=1)
    return convex_loss(kl, own, eta), kl, own


__all__ = [
    "convex_loss",
    "distillation_loss",
    "expand_blocks",
    "finalized_weight",
    "is_refresh_step",
    "kl_to_teacher",
    "magnitude_statistics",
    "pruned_block_means",
    "scaled_weight",
]
