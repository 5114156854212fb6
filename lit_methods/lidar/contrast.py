"""Contrast between embeddings, and what tells whether it works: means over groups, InfoNCE, retrieval, effective rank."""

import torch
from torch import Tensor


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


def info_nce(a: Tensor, b: Tensor, temperature: float, mask: Tensor | None = None) -> Tensor:
    """One-directional InfoNCE: rows of ``a`` against all rows of ``b``, positives on the diagonal.

    Nothing is normalised or detached inside.

    ``mean_i -log softmax_j(<a_i, b_j> / temperature)_i`` over the rows of the mask. Computed outside autocast,
    without a host sync.

    Args:
        a: (n, D).
        b: (n, D).
        temperature: > 0.
        mask: (n,) bool, rows (and columns) that take part; None takes all.

    Returns:
        Scalar, float32 or wider; 0 (with zero gradients) when no row takes part.
    """
    with torch.autocast(a.device.type, enabled=False):
        logits = wide(a) @ wide(b).T / temperature
        if mask is None:
            mask = torch.ones(logits.shape[0], dtype=torch.bool, device=logits.device)
        # rows that don't take part get finite logits, so that neither their value nor their gradient is ever NaN
        logits = logits.masked_fill(~mask[None], -torch.inf).masked_fill(~mask[:, None], 0.0)
        loss = torch.logsumexp(logits, dim=1) - logits.diagonal() if logits.numel() else logits.sum(1)
        return torch.where(mask, loss, 0.0).sum() / mask.sum().clamp(min=1)


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
