"""Scores of queries and documents, and the losses that rank them.

Documents of a batch are laid out by query: rows i G to i G + G - 1 belong to query i, the first of them is its positive.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def pair_scores(queries: Tensor, documents: Tensor, in_batch: bool = True) -> Tensor:
    """Inner products of queries with the documents of all queries, or with their own.

    Args:
        queries: (B, D) floating point.
        documents: (B * G, D), laid out by query.
        in_batch: Score every document of the batch.

    Returns:
        (B, B * G), or (B, G) without ``in_batch``; float32 or wider.

    Raises:
        ValueError: The documents aren't a whole number for each query, or the widths differ.
    """
    if queries.ndim != 2 or documents.ndim != 2 or queries.shape[1] != documents.shape[1]:
        raise ValueError(f"queries are {tuple(queries.shape)} and documents {tuple(documents.shape)}: give (B, D) and (B * G, D)")
    if len(queries) == 0 or len(documents) % len(queries):
        raise ValueError(f"{len(documents)} documents for {len(queries)} queries: give the same number of documents for each query")
    wide = torch.promote_types(torch.promote_types(queries.dtype, documents.dtype), torch.float32)
    with torch.autocast(queries.device.type, enabled=False):
        q, d = queries.to(wide), documents.to(wide)
        if in_batch:
            return q @ d.T
        return torch.einsum("bd,bgd->bg", q, d.reshape(len(q), -1, d.shape[1]))


def ranking_kl(scores: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(softmax(teacher / t) || softmax(scores / t)), summed over documents, mean over queries, without a factor of t^2.

    Args:
        scores: (B, N) of the student.
        teacher: (B, N); no gradient flows into it.
        temperature: t > 0.

    Raises:
        ValueError: The shapes differ.
    """
    if scores.shape != teacher.shape:
        raise ValueError(f"the student scored {tuple(scores.shape)} and the teacher {tuple(teacher.shape)}: score the same documents")
    target = F.softmax(teacher.detach().to(scores.dtype) / temperature, dim=1)
    return F.kl_div(F.log_softmax(scores / temperature, dim=1), target, reduction="batchmean")


def ranking_info_nce(scores: Tensor, docs_per_query: int, temperature: float = 1.0, other_positives: bool = False) -> Tensor:
    """Cross-entropy of each query's positive among its candidates, mean over queries.

    Args:
        scores: (B, B * G): the candidates are the query's positive and the negatives (all but the first of G) of all queries; or (B, G):
            its own documents alone.
        docs_per_query: G.
        temperature: The scores are divided by it, > 0.
        other_positives: The positives of the other queries are candidates, too.

    Returns:
        Scalar; 0 where no positive has a rival.

    Raises:
        ValueError: The width is neither B * G nor G.
    """
    number, width = scores.shape
    if width not in (docs_per_query, number * docs_per_query):
        raise ValueError(f"scores are {tuple(scores.shape)} with {docs_per_query} documents a query: give (B, B * G) or (B, G)")
    logits = scores / temperature
    if width == docs_per_query:
        return F.cross_entropy(logits, torch.zeros(number, dtype=torch.int64, device=scores.device))
    own = torch.arange(number, device=scores.device) * docs_per_query
    if not other_positives:
        columns = torch.arange(width, device=scores.device)
        rival = (columns % docs_per_query == 0) & (columns != own[:, None])  # positives of other queries
        logits = logits.masked_fill(rival, -torch.inf)
    return F.cross_entropy(logits, own)


def margin_mse(scores: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of the margins between the first document and each other one.

    Args:
        scores: (B, G) of the student, G >= 2.
        teacher: (B, G); no gradient flows into it.

    Raises:
        ValueError: The shapes differ.
    """
    if scores.shape != teacher.shape:
        raise ValueError(f"the student scored {tuple(scores.shape)} and the teacher {tuple(teacher.shape)}: score the same documents")
    wanted = teacher.detach().to(scores.dtype)
    return F.mse_loss(scores[:, :1] - scores[:, 1:], wanted[:, :1] - wanted[:, 1:])


__all__ = ["margin_mse", "pair_scores", "ranking_info_nce", "ranking_kl"]
