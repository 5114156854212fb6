"""Base of the datamodules of collections: data sets of training examples and of what an evaluation encodes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_methods.checks import at_least
from lit_methods.datamodules.base import LoaderDataModule, Samples
from lit_methods.datamodules.retrieval.tokens import Vocabulary, padded
from lit_methods.retrieval.idf import count_documents, idf_of_counts

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Example:
    """A training example: texts, or lists of tokens.

    Attributes:
        query: The query.
        documents: G documents, the relevant one first.
        scores: G scores of a teacher; None: none.
    """

    query: Any
    documents: list[Any]
    scores: list[float] | None = None


@dataclass(frozen=True)
class Lengths:
    """How texts are cut, and what batches hold beside tokens."""

    document: int
    query: int
    texts: bool = False


class TrainingExamples(Samples):
    """Examples as batches of tokens; subclasses write :meth:`example` and ``__len__``.

    Args:
        vocabulary: Makes tokens of what the examples hold.
        lengths: How they are cut.
    """

    def __init__(self, vocabulary: Vocabulary, lengths: Lengths) -> None:
        self.vocabulary, self.lengths = vocabulary, lengths

    def example(self, epoch: int, index: int) -> Example:
        """One example, as an epoch sees it."""
        raise NotImplementedError

    def at(self, epoch: int, index: int) -> dict[str, Any]:
        """One example, padded to the longest lengths: ``query_ids``, ``query_mask`` (Q,), ``document_ids``, ``document_mask`` (G, L)."""
        example, lengths = self.example(epoch, index), self.lengths
        query, documents = (
            self.vocabulary.encode(*part) for part in (([example.query], lengths.query), (example.documents, lengths.document))
        )
        padding = next(iter(self.vocabulary.special_ids), 0)
        query_ids, query_mask = padded(query, padding, lengths.query)
        ids, mask = padded(documents, padding, lengths.document)
        sample: dict[str, Any] = {"query_ids": query_ids[0], "query_mask": query_mask[0], "document_ids": ids, "document_mask": mask}
        if example.scores is not None:
            sample["scores"] = torch.tensor(example.scores, dtype=torch.float32)
        return sample | ({"query_text": example.query, "document_text": example.documents} if lengths.texts else {})

    @staticmethod
    def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch, cut to its longest query and document; documents of a query stand one behind the other."""
        batch: dict[str, Any] = {}
        for name in samples[0]:
            if name.endswith("_text"):
                found = [sample[name] for sample in samples]
                batch[name] = found if name == "query_text" else [text for texts in found for text in texts]
            else:
                batch[name] = torch.stack([sample[name] for sample in samples])
        for part in ("query", "document"):
            names = [f"{part}_ids", f"{part}_mask"]
            longest = int(batch[names[1]].sum(dim=-1).max())
            batch |= {name: batch[name].flatten(0, -2)[:, :longest] if part == "document" else batch[name][:, :longest] for name in names}
        return batch


class EncodedTexts(Samples):
    """Queries and documents, evenly mixed, so that a few batches have some of both.

    Args:
        vocabulary: Makes tokens of them.
        lengths: How they are cut.
        queries: All queries of the collection.
        documents: All documents of the collection.
        judgements: (J, 3): query, document, grade. Queries without any aren't in the data set.
        chosen: (n,) numbers of the documents that are ranked; None: all.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        lengths: Lengths,
        queries: Any,
        documents: Any,
        judgements: Ints,
        chosen: Ints | None = None,
    ) -> None:
        self.vocabulary, self.lengths, self.queries, self.documents = vocabulary, lengths, queries, documents
        asked = np.unique(judgements[:, 0])
        numbers = np.arange(len(documents)) if chosen is None else chosen
        place = np.concatenate([(np.arange(len(part)) + 0.5) / max(1, len(part)) for part in (asked, numbers)])
        order = np.argsort(place, kind="stable")
        self.is_query = (np.arange(len(place)) < len(asked))[order]
        self.numbers = np.concatenate([asked, numbers])[order]
        self._judgements = judgements[np.argsort(judgements[:, 0], kind="stable")]

    def __len__(self) -> int:
        return len(self.numbers)

    def at(self, epoch: int, index: int) -> dict[str, Tensor]:
        """One text, padded to the longest length: ``input_ids``, ``attention_mask`` (L,), ``is_query`` and ``index``."""
        is_query, number = bool(self.is_query[index]), int(self.numbers[index])
        text = (self.queries if is_query else self.documents)[number]
        rows = self.vocabulary.encode([text], self.lengths.query if is_query else self.lengths.document)
        ids, mask = padded(rows, next(iter(self.vocabulary.special_ids), 0), max(self.lengths.query, self.lengths.document))
        return {"input_ids": ids[0], "attention_mask": mask[0], "is_query": torch.tensor(is_query), "index": torch.tensor(number)}

    def collate(self, samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """A batch, cut to its longest text, with the judgements of its queries."""
        batch = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
        longest = int(batch["attention_mask"].sum(dim=1).max())
        batch |= {name: batch[name][:, :longest] for name in ("input_ids", "attention_mask")}
        numbers = batch["index"][batch["is_query"]].numpy()
        ends = [np.searchsorted(self._judgements[:, 0], numbers, side=side) for side in ("left", "right")]
        own = [self._judgements[first:last] for first, last in zip(*ends, strict=True)]
        return batch | {"judgements": torch.from_numpy(np.concatenate([*own, np.zeros((0, 3), np.int64)]))}


class Documents(Sequence[str]):
    """Title and text of each document of a collection."""

    def __init__(self, collection: Any) -> None:
        self._collection = collection

    def __len__(self) -> int:
        return len(self._collection.document_names)

    def __getitem__(self, index: Any) -> Any:
        return self._collection.document(index)


class CollectionDataModule(LoaderDataModule):
    """Base: subclasses fill ``vocabulary``, the names and the sets in ``setup``.

    Attributes:
        vocabulary: Makes tokens, after ``setup``.
        document_names: Names of the documents, after ``setup``; their place is their number.
        query_names: Names of the queries.
        judgements: (J, 3) of the test: query, document, grade.
        all_documents: What the vocabulary makes tokens of, for each document.
        lengths: How it is cut.
    """

    vocabulary: Any = None
    document_names: Sequence[str] = ()
    query_names: Sequence[str] = ()
    judgements: Ints = np.zeros((0, 3), np.int64)
    all_documents: Any = ()
    lengths: Lengths

    def __init__(self, *, batch_size: int, eval_batch_size: int | None, num_workers: int, seed: int, docs_per_query: int) -> None:
        super().__init__(batch_size=batch_size, eval_batch_size=eval_batch_size, num_workers=num_workers, seed=seed)
        at_least(1, "documents", docs_per_query=docs_per_query)
        self.docs_per_query = docs_per_query
        self._idf: Tensor | None = None

    @property
    def tokens(self) -> list[str]:
        """Names of the V tokens."""
        return list(self.vocabulary.tokens)

    @property
    def special_ids(self) -> list[int]:
        """Tokens that say nothing, the padding first."""
        return list(self.vocabulary.special_ids)

    @property
    def idf(self) -> Tensor:
        """(V,) inverse document frequencies of the collection's documents; counted when it is first asked for."""
        if self._idf is None:
            size, texts = len(self.vocabulary.tokens), self.all_documents
            counts = np.zeros(size, np.int64)
            for start in range(0, len(texts), 1000):
                some = [texts[place] for place in range(start, min(start + 1000, len(texts)))]
                counts += count_documents(self.vocabulary.encode(some, self.lengths.document), size)
            counts[self.vocabulary.special_ids] = 0  # whose value is 1, as in the released table
            self._idf = torch.from_numpy(idf_of_counts(counts, len(texts)))
        return self._idf


__all__ = ["CollectionDataModule", "Documents", "EncodedTexts", "Example", "Lengths", "TrainingExamples"]
