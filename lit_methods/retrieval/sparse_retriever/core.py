"""Inference-free learned sparse retrieval (arXiv:2411.04403): sparse documents, looked-up queries, FLOPS with IDF, ensemble of teachers.

The golden vectors come from zhichao-aws/opensearch-sparse-model-tuning-sample@7cbe004 (scripts/model/sparse_encoders.py,
scripts/train/trainer.py, scripts/train/bi_encoder_wrapper.py, scripts/train/loss.py). The ranking losses stand in
:mod:`lit_methods.retrieval.ranking`. Double logarithm and L0 threshold belong to the follow-up, arXiv:2504.14839.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_methods.retrieval.ranking import pair_scores


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def document_weights(logits: Tensor, mask: Tensor, double_log: bool = False, prune_ratio: float | None = None) -> Tensor:
    """Weights of the vocabulary in each document: w = log(1 + relu(max over tokens of logit * mask)).

    Args:
        logits: (B, L, V) of a masked-language head.
        mask: (B, L): 1 for tokens, 0 for padding, whose logits count as 0.
        double_log: w = log(1 + log(1 + relu(.))).
        prune_ratio: Weights of at most this share of the document's largest become 0; None: all stay.

    Returns:
        (B, V), >= 0, float32 or wider.

    Raises:
        ValueError: Shapes that don't fit.
    """
    if logits.ndim != 3 or mask.shape != logits.shape[:2]:
        raise ValueError(f"logits are {tuple(logits.shape)} and the mask {tuple(mask.shape)}: give (B, L, V) and (B, L)")
    # the maximum of rounded logits is the rounded maximum: only what it leaves is made wide
    weights = _wide((logits * mask.to(logits.dtype)[..., None]).max(dim=1).values).relu().log1p()
    if double_log:
        weights = weights.log1p()
    if prune_ratio is not None:
        weights = weights * (weights > prune_ratio * weights.max(dim=1, keepdim=True).values)
    return weights


def query_weights(token_ids: Tensor, idf: Tensor, special_ids: Tensor | Sequence[int] = ()) -> Tensor:
    """Weights of the vocabulary in each query, without a model: relu(idf_j) where token j occurs, however often, else 0.

    Args:
        token_ids: (B, L) int64, padded with a special token.
        idf: (V,) floating point. Ones give a binary query.
        special_ids: Tokens that count as absent: CLS, SEP, PAD, UNK, MASK.

    Returns:
        (B, V) of the dtype of ``idf``.
    """
    occurs = idf.new_zeros(len(token_ids), len(idf)).scatter_(1, token_ids, 1.0)
    specials = torch.as_tensor(special_ids, dtype=torch.int64, device=idf.device)
    return occurs.index_fill(1, specials, 0.0) * idf.relu()


def flops_penalty(weights: Tensor, docs_per_query: int = 1, l0_threshold: int | None = None, idf: Tensor | None = None) -> Tensor:
    """FLOPS: sum over slots g and tokens j of (mean over queries of |w_gj|)^2; with IDF, of w / idf in the place of w.

    With effective weights e = idf * w, which an index needs for binary queries, the form with IDF of e is the plain form of w.

    Args:
        weights: (B * G, V), laid out by query.
        docs_per_query: G.
        l0_threshold: Rows with at most this many weights that aren't 0 count as rows of zeros; None: all rows count.
        idf: (V,) > 0.

    Returns:
        Scalar, >= 0.

    Raises:
        ValueError: The rows aren't a whole number for each query.
    """
    if weights.ndim != 2 or not len(weights) or len(weights) % docs_per_query:
        raise ValueError(f"weights are {tuple(weights.shape)} with {docs_per_query} documents a query: give (B * G, V)")
    sizes = _wide(weights).abs()
    if l0_threshold is not None:
        sizes = sizes * ((weights != 0).sum(dim=1, keepdim=True) > l0_threshold)
    if idf is not None:
        sizes = sizes / idf
    return sizes.reshape(-1, docs_per_query, weights.shape[1]).mean(dim=0).square().sum()


def quadratic_ramp(step: int, weight: float, ramp_steps: int) -> float:
    """Return weight * ((step + 1) / ramp_steps)^2 before ``ramp_steps`` optimiser steps are done, then ``weight``."""
    return weight if step >= ramp_steps else weight * ((step + 1) / ramp_steps) ** 2


def ensemble_scores(
    queries: Sequence[Tensor],
    documents: Sequence[Tensor],
    in_batch: bool = True,
    scale: float = 30.0,
    eps: float = 1e-6,
    normalise: bool = True,
) -> Tensor:
    """Mean of the teachers' scores, each scaled to [0, 1] within a query: scale * mean over k of (S - min) / (max - min + eps).

    Args:
        queries: (B, D_k) of each teacher.
        documents: (B * G, D_k) of each teacher, laid out by query.
        in_batch: Score every document of the batch.
        scale: Factor of the mean.
        eps: Addend to the range; documents that all score the same get 0.
        normalise: False: the plain mean of the inner products, without ``scale``.

    Returns:
        (B, B * G), or (B, G) without ``in_batch``; no gradient.

    Raises:
        ValueError: No teacher, or shapes that don't fit.
    """
    if not queries or len(queries) != len(documents):
        raise ValueError(f"{len(queries)} teachers' queries and {len(documents)} teachers' documents: give both of each teacher")
    with torch.no_grad():
        each = [pair_scores(q, d, in_batch) for q, d in zip(queries, documents, strict=True)]
        if not normalise:
            return torch.stack(each).mean(dim=0)
        lows = [scores.amin(dim=1, keepdim=True) for scores in each]
        ranges = [scores.amax(dim=1, keepdim=True) - low + eps for scores, low in zip(each, lows, strict=True)]
        return scale * torch.stack([(s - low) / width for s, low, width in zip(each, lows, ranges, strict=True)]).mean(dim=0)


__all__ = [
    "document_weights", "ensemble_scores", "flops_penalty", "quadratic_ramp", "query_weights",
]  # fmt: skip
