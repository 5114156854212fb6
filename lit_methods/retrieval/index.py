"""Vectors in a search engine: qdrant, inside this process or as a server, by the same code."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lit_methods.retrieval.evaluation import Ranking


class VectorIndex:
    """Documents in a collection of qdrant, sparse or dense.

    Args:
        location: ``:memory:``, a folder (qdrant's local mode keeps it there), or the URL of a server, such as ``http://localhost:6333``.
        name: Name of the collection; one of that name is replaced by :meth:`build`.

    Raises:
        ImportError: qdrant-client is not installed; the message names the extra.
    """

    def __init__(self, location: str = ":memory:", name: str = "documents") -> None:
        try:
            from qdrant_client import QdrantClient, models
        except ImportError as error:
            raise ImportError('an index needs qdrant-client: pip install "lit-methods[retrieval]"') from error
        self._models: Any = models
        self.location, self.name = location, name
        if location == ":memory:" or "://" in location:
            self.client = QdrantClient(location)
        else:
            self.client = QdrantClient(path=str(Path(location).expanduser()))

    def build(self, vectors: Any, names: Sequence[str], batch: int = 256) -> None:
        """Put documents in; what the collection held before is dropped.

        Args:
            vectors: (N, D), a sparse matrix in rows or an array.
            names: Names of the N documents.
            batch: Documents in a request.
        """
        models, self._sparse = self._models, hasattr(vectors, "indptr")
        if self.client.collection_exists(self.name):
            self.client.delete_collection(self.name)
        if self._sparse:
            self.client.create_collection(self.name, {}, sparse_vectors_config={"text": models.SparseVectorParams()})
        else:
            size = models.VectorParams(size=vectors.shape[1], distance=models.Distance.DOT)
            self.client.create_collection(self.name, {"text": size})
        for start in range(0, len(names), batch):
            rows = range(start, min(start + batch, len(names)))
            points = [models.PointStruct(id=k, vector={"text": self._vector(vectors, k)}, payload={"name": names[k]}) for k in rows]
            self.client.upsert(self.name, points)

    def _vector(self, vectors: Any, row: int) -> Any:
        if not self._sparse:
            return vectors[row].tolist()
        own = slice(vectors.indptr[row], vectors.indptr[row + 1])
        return self._models.SparseVector(indices=vectors.indices[own].tolist(), values=vectors.data[own].tolist())

    def search(self, vectors: Any, row: int, top_k: int) -> list[tuple[int, float]]:
        """(Number, score) of the documents nearest to a row of ``vectors``, best first; to a sparse row those that share an entry."""
        if self._sparse and vectors.indptr[row] == vectors.indptr[row + 1]:
            return []
        found = self.client.query_points(self.name, query=self._vector(vectors, row), using="text", limit=top_k).points
        return [(int(point.id), float(point.score)) for point in found]

    def rank(self, queries: Any, query_numbers: Any, document_numbers: Any, top_k: int) -> Ranking:
        """The ranking of some queries (Q, D), as :func:`lit_methods.retrieval.evaluation.rank_documents` gives it."""
        found = np.full((queries.shape[0], top_k), -1, np.int64)
        scores = np.full((queries.shape[0], top_k), -np.inf, np.float32)
        for row in range(queries.shape[0]):
            best = self.search(queries, row, top_k)
            found[row, : len(best)] = [document_numbers[number] for number, _ in best]
            scores[row, : len(best)] = [score for _, score in best]
        return Ranking(query_numbers, found, scores)

    def size(self) -> int | None:
        """Bytes of a folder; None in memory and on a server."""
        folder = Path(self.location).expanduser()
        if self.location == ":memory:" or "://" in self.location:
            return None
        return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())

    def close(self) -> None:
        """Let the folder go."""
        self.client.close()


__all__ = ["VectorIndex"]
