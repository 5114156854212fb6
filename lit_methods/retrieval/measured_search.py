"""A search from end to end: index, queries one by one, measures by trec_eval, bytes and latency."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix

from lit_methods.datamodules.retrieval.tokens import padded
from lit_methods.retrieval.evaluation import Ranking, expected_products, trec_figures, write_trec_run
from lit_methods.retrieval.index import VectorIndex

Row = dict[str, Any]
Found = list[tuple[int, float]]
COLUMNS = ("system", "ndcg_at_10", "mrr", "recall_at_100", "flops", "index_bytes", "p50_ms", "p95_ms", "documents_per_second")


def named_judgements(data: Any) -> dict[str, dict[str, int]]:
    """Query -> document -> grade, of a datamodule's test."""
    found: dict[str, dict[str, int]] = {}
    for query, document, grade in data.judgements.tolist():
        found.setdefault(data.query_names[query], {})[data.document_names[document]] = grade
    return found


def ask_all(search: Callable[[int], Found], numbers: Sequence[int], top_k: int) -> tuple[Ranking, list[float]]:
    """The ranking of queries that are asked one by one, and the milliseconds of each.

    Args:
        search: Number of a query -> numbers of documents with their scores, best first.
        numbers: The queries.
        top_k: Documents of a query.
    """
    documents, scores = np.full((len(numbers), top_k), -1, np.int64), np.full((len(numbers), top_k), -np.inf, np.float32)
    times = []
    for row, number in enumerate(numbers):
        began = time.perf_counter()
        best = search(number)[:top_k]
        times.append(1e3 * (time.perf_counter() - began))
        documents[row, : len(best)] = [document for document, _ in best]
        scores[row, : len(best)] = [score for _, score in best]
    return Ranking(np.asarray(numbers), documents, scores), times


def row_of(name: str, data: Any, ranking: Ranking, times: Sequence[float], out: Path, **figures: Any) -> Row:
    """Figures of a system, and its run file in ``out``."""
    file = out / f"{name}.trec"
    write_trec_run(file, ranking, data.query_names, data.document_names, name)
    run: dict[str, dict[str, float]] = {}
    for query, _, document, rank, _, _ in (line.split(" ") for line in file.read_text(encoding="utf-8").splitlines()):
        run.setdefault(query, {})[document] = -float(rank)  # trec_eval would order equal scores by name
    p50, p95 = np.percentile(times, [50, 95]).tolist()
    return {"system": name, **trec_figures(run, named_judgements(data)), **figures, "p50_ms": p50, "p95_ms": p95}


def bm25_row(data: Any, numbers: Sequence[int], out: Path, top_k: int, k1: float = 0.9, b: float = 0.4) -> Row:
    """BM25 of bm25s on the same texts.

    Args:
        data: A ``SearchDataModule`` that is set up.
        numbers: The queries.
        out: Folder for the index and the run.
        top_k: Documents of a query.
        k1: Of BM25; 0.9 and 0.4 are Anserini's.
        b: Of BM25.

    Raises:
        ImportError: bm25s is not installed; the message names the extra.
        ValueError: The data hold no texts.
    """
    try:
        import bm25s
    except ImportError as error:
        raise ImportError('BM25 needs bm25s: pip install "lit-methods[retrieval]"') from error
    if getattr(data, "collection", None) is None:
        raise ValueError(f"BM25 reads texts, and {type(data).__name__} has none: leave it out by --no-bm25")
    began = time.perf_counter()
    texts = [data.all_documents[k] for k in range(len(data.all_documents))]
    tokens = bm25s.tokenize(texts, stopwords="en", show_progress=False)
    engine = bm25s.BM25(k1=k1, b=b)
    engine.index(tokens, show_progress=False)
    seconds = time.perf_counter() - began
    engine.save(out / "bm25")
    count = min(top_k, len(texts))

    def search(number: int) -> Found:
        words = bm25s.tokenize([data.collection.queries[number]], stopwords="en", show_progress=False)
        found, scores = engine.retrieve(words, k=count, show_progress=False, sorted=True)
        return [(int(document), float(score)) for document, score in zip(found[0], scores[0], strict=True) if score > 0]

    ranking, times = ask_all(search, numbers, top_k)
    asked = bm25s.tokenize([data.collection.queries[k] for k in numbers], stopwords="en", show_progress=False, return_ids=False)
    matrices = [_occurrences(rows, tokens.vocab) for rows in ([[tokens.vocab.get(w) for w in q] for q in asked], tokens.ids)]
    size = sum(file.stat().st_size for file in (out / "bm25").rglob("*") if file.is_file())
    figures = {"flops": expected_products(*matrices), "index_bytes": size, "documents_per_second": len(texts) / seconds}
    return row_of("bm25", data, ranking, times, out, **figures)


def _occurrences(rows: Sequence[Sequence[int | None]], vocabulary: Mapping[str, int]) -> Any:
    """(N, V) sparse matrix of ones where a token occurs; None is no token."""
    own = [sorted({token for token in row if token is not None}) for row in rows]
    starts = np.cumsum([0, *map(len, own)])
    places = np.fromiter((token for row in own for token in row), np.int64, int(starts[-1]))
    return csr_matrix((np.ones(len(places)), places, starts), shape=(len(own), max(vocabulary.values()) + 1))


def retriever_row(name: str, module: Any, data: Any, queries: Any, documents: Any, out: Path, url: str | None, top_k: int) -> Row:
    """A retriever's documents in qdrant, and its queries from their texts on.

    Args:
        name: Name of the run.
        module: The retriever.
        data: Its datamodule, set up.
        queries: As the retriever encoded them; their numbers are asked again, from the texts.
        documents: As the retriever encoded them.
        out: Folder for the index and the run.
        url: A server; None: qdrant's local mode.
        top_k: Documents of a query.
    """
    index = VectorIndex(url or str(out / f"{name}.qdrant"), name)
    began = time.perf_counter()
    index.build(documents.vectors, [data.document_names[k] for k in documents.numbers.tolist()])
    seconds = time.perf_counter() - began
    padding = next(iter(data.special_ids), 0)
    module.eval()

    def search(number: int) -> Found:
        ids, mask = padded(data.vocabulary.encode([data.val_set.queries[number]], data.lengths.query), padding)
        with torch.no_grad():
            vector = module.represent_for_index(ids.to(module.device), mask.to(module.device), True).float().cpu().numpy()
        found = index.search(csr_matrix(vector) if module.sparse else vector, 0, top_k)
        return [(int(documents.numbers[place]), score) for place, score in found]

    ranking, times = ask_all(search, queries.numbers.tolist(), top_k)
    flops = expected_products(queries.vectors, documents.vectors) if module.sparse else float(documents.vectors.shape[1])
    size = index.size()
    index.close()
    figures = {"flops": flops, "index_bytes": size, "documents_per_second": len(documents.numbers) / seconds}
    return row_of(name, data, ranking, times, out, **figures)


def table_of(rows: Sequence[Row]) -> str:
    """The rows as text."""

    def shown(value: Any) -> str:
        return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    cells = [list(COLUMNS), *([shown(row.get(column)) for column in COLUMNS] for row in rows)]
    widths = [max(len(line[k]) for line in cells) for k in range(len(COLUMNS))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells)


__all__ = ["bm25_row", "named_judgements", "retriever_row", "table_of"]
