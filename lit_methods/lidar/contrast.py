"""Contrast between embeddings, and what tells whether it works: means over groups, InfoNCE, retrieval, effective rank."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def wide(x: Tensor) -> Tensor:
    """``x`` in float32 or wider (float64 stays): the precision in which pooling and contrast are computed."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def group_mean(embeddings: Tensor, groups: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Mean embedding of each group, ``sum / (n + 1e-6)``: zero for an empty group, and NOT normalised again.

    Args:
        embeddings: (n, D).
        groups: (n,) int64 in 0..num_groups-1.
        num_groups: G.

    Returns:
        Means (G, D) in float32 or wider, and sizes (G,) of the same dtype.
    """
    embeddings = wide(embeddings)
    total = embeddings.new_zeros(num_groups, embeddings.shape[1]).index_add(0, groups, embeddings)
    size = embeddings.new_zeros(num_groups).index_add(0, groups, embeddings.new_ones(groups.shape[0]))
    return total / (size[:, None] + 1e-6), size


class _WeightedNCE(torch.autograd.Function):
    """``sum_i w_i -log softmax_j(<a_i, b_j> + offset_j)_i``, with one (n, n) matrix in memory from forward to backward.

    The matrix becomes ``e_ij = exp(logit_ij - max_j logit_ij)`` in place. The gradients are products with it, so that the softmax and the
    gradient of the logits, two more matrices of its size, are never made: ``grad a = w (e b / sum_j e - b)``, and for ``b`` likewise.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, offset: Tensor | None, weight: Tensor) -> Tensor:  # type: ignore[override]
        logits = a @ b.T if offset is None else torch.addmm(offset[None], a, b.T)
        positive, top = logits.diagonal().clone(), logits.amax(dim=1)
        e = logits.sub_(top[:, None]).exp_()
        total = e.sum(dim=1)
        ctx.save_for_backward(a, b, e, total, weight)
        return (weight * (total.log() + top - positive)).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        a, b, e, total, weight = ctx.saved_tensors
        with torch.autocast(a.device.type, enabled=False):
            own = (grad * weight)[:, None]
            shared = own / total[:, None]
            grad_a = shared * (e @ b) - own * b if ctx.needs_input_grad[0] else None
            grad_b = e.T @ (shared * a) - own * a if ctx.needs_input_grad[1] else None
        return grad_a, grad_b, None, None


def info_nce(a: Tensor, b: Tensor, temperature: float, mask: Tensor | None = None) -> Tensor:
    """One-directional InfoNCE: rows of ``a`` against all rows of ``b``, positives on the diagonal.

    Nothing is normalised or detached inside.

    ``mean_i -log softmax_j(<a_i, b_j> / temperature)_i`` over the rows of the mask. Computed outside autocast, without a host sync;
    its gradient can't be differentiated again.

    Args:
        a: (n, D).
        b: (n, D).
        temperature: > 0.
        mask: (n,) bool, rows (and columns) that take part; None takes all.

    Returns:
        Scalar, float32 or wider; 0 (with zero gradients) when no row takes part.
    """
    with torch.autocast(a.device.type, enabled=False):
        a, b, offset = wide(a) / temperature, wide(b), None
        weight = a.new_full((len(a),), 1 / max(len(a), 1))
        if mask is not None:
            a, b, offset, weight = _chosen_rows(a, b, mask) if a.device.type == "cpu" else _silenced_rows(a, b, mask)
        if not len(a):
            return a.sum() + b.sum()
        return _WeightedNCE.apply(a, b, offset, weight)  # type: ignore[no-any-return]


def _chosen_rows(a: Tensor, b: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, None, Tensor]:
    """The mask's rows, their offset and weights for :class:`_WeightedNCE`; their number must be known, which only a CPU tells at once."""
    rows = mask.nonzero()[:, 0]  # the gradient of index_select is faster than that of a mask
    a, b = a.index_select(0, rows), b.index_select(0, rows)
    return a, b, None, a.new_full((len(a),), 1 / max(len(a), 1))


def _silenced_rows(a: Tensor, b: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All rows, offset and weights for :class:`_WeightedNCE`: those outside the mask weigh 0 and are nobody's negatives."""
    weight = mask / mask.sum().clamp(min=1).to(a.dtype)
    # finite, so that a mask without a row gives no NaN, and yet exp(offset - maximum) is 0
    offset = a.new_zeros(len(a)).masked_fill(~mask, torch.finfo(a.dtype).min / 2)
    return a.where(mask[:, None], 0.0), b.where(mask[:, None], 0.0), offset, weight


def retrieval_accuracy(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """Share of the mask's rows of ``a`` whose most similar row of ``b`` (of the mask) is their own; 0 for an empty mask."""
    similarity = (a.detach() @ b.detach().T).masked_fill(~mask[None], -torch.inf)
    hit = similarity.argmax(dim=1) == torch.arange(a.shape[0], device=a.device)
    return (hit & mask).sum() / mask.sum().clamp(min=1)


def effective_rank(embeddings: Tensor, mask: Tensor) -> Tensor:
    """Exp of the entropy of the normalised singular values of the mask's rows (Roy & Vetterli 2007): 1 when all rows are parallel."""
    with torch.autocast(embeddings.device.type, enabled=False):
        rows = wide(embeddings.detach()) * mask[:, None]
        share = torch.linalg.svdvals(rows)
        share = share / share.sum().clamp(min=1e-12)
        return torch.exp(torch.special.entr(share).sum())


__all__ = ["effective_rank", "group_mean", "info_nce", "retrieval_accuracy", "wide"]
