"""A made-up collection in which queries and documents name the same concepts by different words."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_methods.checks import at_least
from lit_methods.datamodules.retrieval.base import CollectionDataModule, EncodedTexts, Example, Lengths, TrainingExamples

Ints = NDArray[np.int64]
TOPICS, CONCEPTS, SYNONYMS, FILLERS = 40, 3, 3, 40
PAIRS = ((0, 1), (0, 2), (1, 2))


class MadeWords:
    """A vocabulary of fillers and of synonyms; texts are tokens already."""

    def __init__(self) -> None:
        places = [(t, c, s) for t in range(TOPICS) for c in range(CONCEPTS) for s in range(SYNONYMS)]
        self.tokens = [f"filler{k}" for k in range(FILLERS)] + [f"topic{t}concept{c}word{s}" for t, c, s in places]
        self.special_ids: list[int] = []

    def encode(self, texts: Any, max_length: int) -> list[list[int]]:
        """The tokens themselves."""
        return [list(map(int, text[:max_length])) for text in texts]


class QueryPairs(TrainingExamples):
    """Each query with its document, and negatives that are drawn anew in each epoch."""

    def __init__(self, vocabulary: MadeWords, lengths: Lengths, queries: Ints, documents: Ints, group: int, seed: int) -> None:
        super().__init__(vocabulary, lengths)
        self.queries, self.documents, self.group, self.seed = queries, documents, group, seed

    def __len__(self) -> int:
        return len(self.queries)

    def example(self, epoch: int, index: int) -> Example:
        """A query, its document, and ``group - 1`` others."""
        drawn = np.random.default_rng([self.seed, 2, epoch, index]).integers(len(self.queries) - 1, size=self.group - 1)
        others = (index + 1 + drawn) % len(self.queries)
        return Example(self.queries[index], [self.documents[index], *self.documents[others]])


class SynonymSearchDataModule(CollectionDataModule):
    """Documents of words that have synonyms, among fillers; a query may use other words than its documents.

    Batch: {"query_ids": (B, Q) int64, "query_mask": (B, Q) int64, "document_ids": (N, L) int64, "document_mask": (N, L) int64}

    N = B * docs_per_query, laid out by query, the relevant one first. The vocabulary has 40 fillers, whose frequencies follow Zipf's law,
    and 40 topics of 3 concepts with 3 words each. A document has two concepts of a topic by two of their words each, one stray word and 15
    fillers; its query has one word of each concept and 3 fillers. Relevant are all documents with the same two concepts. The queries of the
    last quarter of the documents are held out for validation and test; all documents are ranked.

    Batches of an evaluation: {"input_ids": (B, L) int64, "attention_mask": (B, L) int64, "is_query": (B,) bool, "index": (B,) int64,
    "judgements": (J, 3) int64}.

    Args:
        num_documents: Documents, drawn once.
        docs_per_query: G, documents of a training query: its own and others at random.
        batch_size: Queries per process and training step.
        eval_batch_size: Texts per process and evaluation step.
        num_workers: Processes that read data.
        seed: Seed of all draws.

    Attributes:
        vocab_size: V.

    Raises:
        ValueError: A number lies outside its range.
    """

    vocab_size = FILLERS + TOPICS * CONCEPTS * SYNONYMS

    def __init__(
        self,
        num_documents: int = 1200,
        docs_per_query: int = 1,
        batch_size: int = 32,
        eval_batch_size: int = 256,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            batch_size=batch_size, eval_batch_size=eval_batch_size, num_workers=num_workers, seed=seed, docs_per_query=docs_per_query
        )
        at_least(8, "documents", num_documents=num_documents)
        self.save_hyperparameters()
        self.num_documents, self.lengths = num_documents, Lengths(20, 20)

    def setup(self, stage: str) -> None:
        """Draw everything."""
        if self.train_set is not None:
            return
        rng, number = np.random.default_rng([self.seed, 1]), self.num_documents
        topics, pairs = rng.integers(TOPICS, size=number), rng.integers(len(PAIRS), size=number)
        zipf = 1.0 / np.arange(1, FILLERS + 1)

        def words_of(topic: Ints, concept: Ints, synonym: Ints) -> Ints:
            return np.asarray(FILLERS + (topic * CONCEPTS + concept) * SYNONYMS + synonym)

        concepts = np.array(PAIRS)[pairs]  # (n, 2)
        chosen = rng.random((number, 2, SYNONYMS)).argsort(axis=2)
        said = words_of(topics[:, None, None], concepts[:, :, None], chosen[:, :, :2]).reshape(number, 4)
        stray = rng.integers(FILLERS, self.vocab_size, size=(number, 1))
        fillers = rng.choice(FILLERS, size=(number, 18), p=zipf / zipf.sum())
        documents = np.concatenate([said, stray, fillers[:, :15]], axis=1)
        asked = words_of(topics[:, None], concepts, rng.integers(SYNONYMS, size=(number, 2)))
        queries = np.concatenate([asked, fillers[:, 15:]], axis=1)

        held = number - number * 3 // 4
        same = (topics[:, None] == topics) & (pairs[:, None] == pairs)
        rows, columns = np.nonzero(same[-held:])
        self.vocabulary = MadeWords()
        self.all_documents = documents
        self.document_names, self.query_names = [f"d{k}" for k in range(number)], [f"q{k}" for k in range(number)]
        self.judgements = np.stack([rows + number - held, columns, np.ones_like(rows)], axis=1).astype(np.int64)
        training = slice(0, number - held)
        self.train_set = QueryPairs(self.vocabulary, self.lengths, queries[training], documents[training], self.docs_per_query, self.seed)
        self.val_set = self.test_set = EncodedTexts(self.vocabulary, self.lengths, queries, documents, self.judgements)


__all__ = ["SynonymSearchDataModule"]
