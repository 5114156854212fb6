"""Ranked documents of queries, what they are worth, and TREC's file of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lit_methods.files import write_atomically

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
MEASURES = ("ndcg_at_10", "mrr_at_10", "recall_at_100")


@dataclass(frozen=True)
class Ranking:
    """The best documents of each query, best first.

    Attributes:
        queries: (Q,) numbers of the queries.
        documents: (Q, K) numbers of the documents; -1 behind the last one that was found.
        scores: (Q, K).
    """

    queries: Ints
    documents: Ints
    scores: Floats


def rank_documents(
    queries: Any, documents: Any, query_numbers: Ints, document_numbers: Ints, top_k: int, positive: bool, rows: int = 64
) -> Ranking:
    """The ``top_k`` documents with the largest inner product; of equal ones those with the lower number.

    Args:
        queries: (Q, D) array or sparse matrix in rows.
        documents: (N, D) of the same kind.
        query_numbers: (Q,).
        document_numbers: (N,).
        top_k: K, cut to N.
        positive: Leave out what scores 0 or less, as an inverted index does.
        rows: Queries at a time.
    """
    order = np.argsort(document_numbers, kind="stable")
    documents, numbers = documents[order], document_numbers[order]
    k = min(top_k, len(numbers))
    found, scores = np.full((len(query_numbers), k), -1, np.int64), np.full((len(query_numbers), k), -np.inf, np.float32)
    columns = documents.T
    for start in range(0, len(query_numbers), rows):
        product = queries[start : start + rows] @ columns
        block = np.asarray(product.toarray() if hasattr(product, "toarray") else product, dtype=np.float32)
        best = np.argsort(-block, axis=1, kind="stable")[:, :k]
        values = np.take_along_axis(block, best, axis=1)
        kept = values > 0 if positive else np.ones_like(values, dtype=bool)
        found[start : start + rows] = np.where(kept, numbers[best], -1)
        scores[start : start + rows] = np.where(kept, values, -np.inf)
    return Ranking(query_numbers, found, scores)


def ranking_figures(ranking: Ranking, judgements: Ints) -> dict[str, float]:
    """Mean nDCG@10, MRR@10 and Recall@100 over the queries with a relevant document, by torchmetrics.

    Args:
        ranking: Of the queries.
        judgements: (J, 3) int64: query, document, grade; a grade > 0 is relevant.

    Returns:
        {} where no ranked query has a relevant document.
    """
    from torchmetrics.functional.retrieval import retrieval_normalized_dcg, retrieval_recall, retrieval_reciprocal_rank

    relevant: dict[int, dict[int, int]] = {}
    for query, document, grade in judgements[judgements[:, 2] > 0].tolist():
        relevant.setdefault(query, {})[document] = grade
    sums = dict.fromkeys(MEASURES, 0.0)
    judged = 0
    for query, documents in zip(ranking.queries.tolist(), ranking.documents, strict=True):
        grades = relevant.get(query)
        if not grades:
            continue
        judged += 1
        names = documents[documents >= 0].tolist()
        missed = [grade for name, grade in grades.items() if name not in set(names)]
        target = torch.tensor([grades.get(name, 0) for name in names] + [0] * max(0, 100 - len(names)) + missed)
        place = torch.arange(len(target), 0, -1, dtype=torch.float32)  # what wasn't found lies behind all that was, and behind rank 100
        sums["ndcg_at_10"] += float(retrieval_normalized_dcg(place, target, top_k=10))
        sums["mrr_at_10"] += float(retrieval_reciprocal_rank(place, target > 0, top_k=10))
        sums["recall_at_100"] += float(retrieval_recall(place, target > 0, top_k=100))
    return {name: total / judged for name, total in sums.items()} if judged else {}


def expected_products(queries: Any, documents: Any) -> float:
    """Expected number of products of a query and a document: sum_j p_q(j) p_d(j), with p the shares of rows in which j isn't 0.

    Args:
        queries: (Q, V) sparse matrix in rows, without stored zeros.
        documents: (N, V) of the same kind.
    """
    shares = [np.bincount(rows.indices, minlength=rows.shape[1]) / rows.shape[0] for rows in (queries, documents)]
    return float(shares[0] @ shares[1])


def write_trec_run(path: Path, ranking: Ranking, query_names: Sequence[str], document_names: Sequence[str], tag: str) -> None:
    """TREC's run file: ``query Q0 document rank score tag``, a line for each document that was found.

    Args:
        path: The file.
        ranking: Of the queries.
        query_names: Name of each number of a query.
        document_names: Name of each number of a document.
        tag: Name of the run, without a blank.
    """
    lines = [
        f"{query_names[query]} Q0 {document_names[document]} {rank} {score:.6g} {tag}"
        for query, documents, scores in zip(ranking.queries.tolist(), ranking.documents.tolist(), ranking.scores.tolist(), strict=True)
        for rank, (document, score) in enumerate(zip(documents, scores, strict=True), start=1)
        if document >= 0
    ]
    write_atomically(path, "".join(f"{line}\n" for line in lines))


def trec_figures(run: Mapping[str, Mapping[str, float]], judgements: Mapping[str, Mapping[str, int]]) -> dict[str, float]:
    """nDCG@10, MRR and Recall@100 by trec_eval, mean over the judged queries; queries without an answer count as 0.

    Args:
        run: Query -> document -> score.
        judgements: Query -> document -> grade.

    Raises:
        ImportError: pytrec_eval is not installed; the message names the extra.
    """
    try:
        import pytrec_eval
    except ImportError as error:
        raise ImportError('measures by trec_eval need pytrec_eval: pip install "lit-methods[retrieval]"') from error
    judged = {query: dict(grades) for query, grades in judgements.items() if any(grade > 0 for grade in grades.values())}
    if not judged:
        return {}
    evaluator = pytrec_eval.RelevanceEvaluator(judged, {"ndcg_cut.10", "recip_rank", "recall.100"})
    found = evaluator.evaluate({query: dict(run.get(query, {})) for query in judged})
    names = {"ndcg_cut_10": "ndcg_at_10", "recip_rank": "mrr", "recall_100": "recall_at_100"}
    return {ours: sum(figures.get(name, 0.0) for figures in found.values()) / len(judged) for name, ours in names.items()}


__all__ = ["MEASURES", "Ranking", "expected_products", "rank_documents", "ranking_figures", "trec_figures", "write_trec_run"]
