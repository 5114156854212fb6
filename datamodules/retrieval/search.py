"""Collections that are searched, from files in BEIR's or TREC's layout, and training examples from them."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lit_methods.checks import at_least, literals, within
from lit_methods.datamodules.errors import BrokenRecordError, WrongRootError
from lit_methods.datamodules.folders import data_path
from lit_methods.datamodules.reading import is_finite
from lit_methods.datamodules.retrieval.base import CollectionDataModule, Documents, EncodedTexts, Example, Lengths, TrainingExamples
from lit_methods.datamodules.retrieval.collection import (
    LAYOUTS,
    Broken,
    Collection,
    OnBroken,
    Texts,
    made_collection,
    read_collection,
    records_of,
)
from lit_methods.datamodules.retrieval.tokens import Vocabulary, WordPieces, Words

Ints = NDArray[np.int64]
TrainFrom = Literal["titles", "judgements"]


class JudgedPairs(TrainingExamples):
    """Pairs of a query and a relevant document, with negatives drawn at random from the other documents, anew in each epoch.

    Args:
        vocabulary: Makes tokens.
        lengths: How texts are cut.
        queries: Texts of the queries.
        documents: Texts of the documents.
        pairs: (E, 2): query and document.
        group: G, documents of a query.
        seed: Seed of the negatives.
    """

    def __init__(self, vocabulary: Vocabulary, lengths: Lengths, queries: Any, documents: Any, pairs: Ints, group: int, seed: int) -> None:
        super().__init__(vocabulary, lengths)
        self.queries, self.documents, self.pairs, self.group, self.seed = queries, documents, pairs, group, seed
        order = np.lexsort((pairs[:, 1], pairs[:, 0]))
        self._sorted = pairs[order]

    def __len__(self) -> int:
        return len(self.pairs)

    def example(self, epoch: int, index: int) -> Example:
        """One pair with its negatives."""
        query, document = self.pairs[index].tolist()
        first, last = np.searchsorted(self._sorted[:, 0], [query, query + 1])
        relevant = self._sorted[first:last, 1]
        rng = np.random.default_rng([self.seed, 2, epoch, index])
        # a rank among the documents that aren't relevant, moved past the relevant ones before it
        ranks = rng.integers(len(self.documents) - len(relevant), size=self.group - 1)
        others = ranks + np.searchsorted(relevant - np.arange(len(relevant)), ranks, side="right")
        return Example(self.queries[query], [self.documents[place] for place in (document, *others.tolist())])


class WrittenExamples(TrainingExamples):
    """Examples of a file with a JSON object in each line; see ``SearchDataModule``.

    Args:
        vocabulary: Makes tokens.
        lengths: How texts are cut.
        file: The file.
        group: G, documents of a query.
        seed: Seed of the choice among more documents than G.
        broken: What is done with records that can't be used.
    """

    def __init__(self, vocabulary: Vocabulary, lengths: Lengths, file: Path, group: int, seed: int, broken: Broken) -> None:
        super().__init__(vocabulary, lengths)
        queries, documents, counts, scores = [], [], [], []
        self.group, self.seed = group, seed
        kinds: set[bool] = set()
        for number, record in records_of(file, broken):
            place = f"line {number}"
            found = self._documents(file, place, record, broken)
            if found is None:
                continue
            query, texts, own = found
            if len(texts) < group:
                broken.say(file, f"{place}, docs", f"has {len(texts)} documents, and docs_per_query is {group}: lower it")
                continue
            queries.append(query)
            documents += texts
            counts.append(len(texts))
            scores += own or []
            kinds.add(own is not None)
        if not queries:
            raise BrokenRecordError(file, "lines", "there is no example: expected lines such as {'query': ..., 'pos': ..., 'negs': [...]}")
        if len(kinds) > 1:
            raise BrokenRecordError(file, "scores", "some lines have scores and some don't: use one kind of example in a file")
        self.queries, self.documents = Texts(queries), Texts(documents)
        self.starts = np.cumsum([0, *counts])
        self.scores = np.array(scores, dtype=np.float32) if kinds == {True} else None

    @staticmethod
    def _documents(file: Path, place: str, record: dict[str, Any], broken: Broken) -> tuple[str, list[str], list[float] | None] | None:
        query = record.get("query")
        if not isinstance(query, str) or not query.strip():
            broken.say(file, f"{place}, query", f"{query!r}, expected text")
            return None
        scores: Any = None
        if "docs" in record:
            texts, scores = record["docs"], record.get("scores")
        else:
            positive = record.get("pos")
            texts = [*(positive if isinstance(positive, list) else [positive])[:1], *(record.get("negs") or [])]
        if not isinstance(texts, list) or not texts or any(not isinstance(text, str) or not text.strip() for text in texts):
            broken.say(file, f"{place}, {'docs' if 'docs' in record else 'pos, negs'}", "expected texts that aren't empty")
            return None
        if scores is not None:
            numbers = isinstance(scores, list) and all(map(is_finite, scores))
            if not numbers or len(scores) != len(texts):
                broken.say(file, f"{place}, scores", f"expected {len(texts)} finite numbers, one for each document")
                return None
            order = sorted(range(len(texts)), key=[-float(x) for x in scores].__getitem__)  # the best one is the positive
            texts, scores = [texts[k] for k in order], [float(scores[k]) for k in order]
        return query, texts, scores

    def __len__(self) -> int:
        return len(self.queries)

    def example(self, epoch: int, index: int) -> Example:
        """The query, its best document and others of its own, drawn anew in each epoch."""
        first, last = self.starts[index : index + 2].tolist()
        drawn = np.random.default_rng([self.seed, 2, epoch, index]).permutation(last - first - 1)[: self.group - 1]
        places = [first, *(first + 1 + np.sort(drawn)).tolist()]
        scores = None if self.scores is None else self.scores[places].tolist()
        return Example(self.queries[index], [self.documents[place] for place in places], scores)


class SearchDataModule(CollectionDataModule):
    """A collection with queries and judgements, in the layout of BEIR's sets or of TREC's.

    Batch: {"query_ids": (B, Q) int64, "query_mask": (B, Q) int64, "document_ids": (N, L) int64, "document_mask": (N, L) int64}

    N = B * docs_per_query, laid out by query, the relevant one first; ``scores`` (B, docs_per_query) float32 where the examples have some;
    with ``texts`` the lists ``query_text`` and ``document_text``. Batches of an evaluation mix queries and documents evenly:
    {"input_ids": (B, L) int64, "attention_mask": (B, L) int64, "is_query": (B,) bool, "index": (B,) int64, "judgements": (J, 3) int64}.

    ``root`` is a folder with ``corpus.jsonl`` (``_id``, ``title``, ``text`` in each line), ``queries.jsonl`` and
    ``qrels/<split>.tsv``, as BEIR's sets and MS MARCO are given; or with ``doc-text.trec``, ``query-text.trec`` and ``qrels``, as Vaswani
    is. A document is its title, a blank and its text. Everything is held in memory.

    Training examples, by ``train_from``. ``titles``: a document's title is the query, its text the document. ``judgements``: queries with
    the documents that are relevant for them in the training split; other documents of a query are drawn at random. ``examples`` takes a
    file in their place, with lines ``{"query": text, "pos": text, "negs": [texts]}`` or
    ``{"query": text, "docs": [texts], "scores": [numbers]}``.

    Args:
        root: Folder in one of these layouts; None: 60 documents of a small grammar, with no download.
        examples: File of training examples; None: they come from the collection.
        train_from: ``titles`` or ``judgements``.
        train_split: Name of the judgements for training.
        val_split: Name of those for validation; where there are none, validation is the test.
        test_split: Name of those for test.
        train_share: Share of the test's queries that are for training, where the data have no training split; drawn by the seed.
        tokenizer: Folder or hub name of a tokenizer of transformers, or ``package:<name>``; None: the most frequent words of the documents.
        vocab_size: V of the words.
        docs_per_query: G, documents of a training query.
        max_length: Tokens of a document; what is behind them is cut off.
        max_query_length: Tokens of a query.
        val_documents: Documents that validation ranks: those that are judged, and others drawn by the seed up to this number; None: all.
        texts: Batches of training hold the texts, too, for teachers with tokenizers of their own.
        on_broken: ``raise`` at the first record that can't be used, or ``skip`` and count them.
        batch_size: Queries per process and training step.
        eval_batch_size: Texts per process and evaluation step.
        num_workers: Processes that read data.
        seed: Seed of the order, the negatives and the split.

    Attributes:
        collection: What was read, after ``setup``.

    Raises:
        ValueError: A value outside its range.
    """

    collection: Collection | None = None

    def __init__(
        self,
        root: Path | None = None,
        examples: Path | None = None,
        train_from: TrainFrom = "titles",
        train_split: str = "train",
        val_split: str = "dev",
        test_split: str = "test",
        train_share: float = 0.0,
        tokenizer: str | None = None,
        vocab_size: int = 4096,
        docs_per_query: int = 1,
        max_length: int = 256,
        max_query_length: int = 64,
        val_documents: int | None = None,
        texts: bool = False,
        on_broken: OnBroken = "raise",
        batch_size: int = 32,
        eval_batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            batch_size=batch_size, eval_batch_size=eval_batch_size, num_workers=num_workers, seed=seed, docs_per_query=docs_per_query
        )
        literals(SearchDataModule, locals())
        within("[0, 1)", "a share", train_share=train_share)
        at_least(3, "tokens", vocab_size=vocab_size)
        at_least(1, max_length=max_length, max_query_length=max_query_length, val_documents=val_documents)
        self.save_hyperparameters()
        self.root, self.examples = data_path(root), data_path(examples)
        self.splits = {"train": train_split, "val": val_split, "test": test_split}
        self.train_from, self.train_share, self.tokenizer, self.vocab_size = train_from, train_share, tokenizer, vocab_size
        self.lengths, self.val_documents, self.on_broken = Lengths(max_length, max_query_length, texts), val_documents, on_broken

    def check_root(self, stage: str = "fit") -> None:
        """Look for the files.

        Raises:
            WrongRootError: There is no such collection.
        """
        if self.root is not None and not any((self.root / name).is_file() for name in ("corpus.jsonl", "doc-text.trec")):
            raise WrongRootError(f"root={str(self.root)!r} is no collection: give a folder with {LAYOUTS}")

    def setup(self, stage: str) -> None:
        """Read everything.

        Raises:
            WrongRootError: There is no such collection, or it lacks a split that is needed.
            BrokenRecordError: A record that can't be used.
        """
        if self.collection is not None:
            return
        self.check_root(stage)
        broken = Broken(self.on_broken)
        collection = made_collection() if self.root is None else read_collection(self.root, broken)
        documents = self.all_documents = Documents(collection)
        self.vocabulary = Words(documents, self.vocab_size) if self.tokenizer is None else WordPieces(self.tokenizer)
        self.document_names, self.query_names = collection.document_names, collection.query_names
        judged = self._judged(collection)
        if self.examples is not None:
            self.train_set = WrittenExamples(self.vocabulary, self.lengths, self.examples, self.docs_per_query, self.seed, broken)
        elif self.train_from == "titles":
            self.train_set = self._titles(collection)
        elif "train" in judged:
            pairs = judged["train"][judged["train"][:, 2] > 0][:, :2]
            self.train_set = self._pairs(collection.queries, documents, pairs)
        for name in ("val", "test"):
            if name in judged:
                chosen = self._chosen(judged[name], len(documents)) if name == "val" else None
                setattr(
                    self, f"{name}_set", EncodedTexts(self.vocabulary, self.lengths, collection.queries, documents, judged[name], chosen)
                )
        self.judgements = judged.get("test", self.judgements)
        broken.report()
        self.collection = collection

    def _judged(self, collection: Collection) -> dict[str, Ints]:
        """Part -> judgements: validation and test stand in for each other."""
        found = {part: collection.judgements[name] for part, name in self.splits.items() if name in collection.judgements}
        if not found:
            names = ", ".join(collection.judgements) or "none"
            raise WrongRootError(
                f"root={str(self.root)!r} has judgements {names}, and the splits are {', '.join(self.splits.values())}: give files "
                "qrels/<split>.tsv, or set train_split, val_split and test_split"
            )
        if self.train_share and "train" in found:
            raise ValueError(f"train_share is {self.train_share}, but there are judgements {self.splits['train']!r}: set it to 0")
        if self.train_share and "test" in found:
            queries = np.random.default_rng([self.seed, 3]).permutation(np.unique(found["test"][:, 0]))
            mine = np.isin(found["test"][:, 0], queries[: round(self.train_share * len(queries))])
            found["train"], found["test"] = found["test"][mine], found["test"][~mine]
        for part, other in (("val", "test"), ("test", "val")):
            if part not in found and other in found:
                found[part] = found[other]
        return found

    def _pairs(self, queries: Any, documents: Any, pairs: Ints) -> JudgedPairs:
        if len(documents) <= self.docs_per_query or not len(pairs):
            raise ValueError(
                f"{len(pairs)} training pairs and {len(documents)} documents: too few for docs_per_query={self.docs_per_query}"
            )
        return JudgedPairs(self.vocabulary, self.lengths, queries, documents, pairs, self.docs_per_query, self.seed)

    def _titles(self, collection: Collection) -> JudgedPairs | None:
        titled = np.array([bool(title) and bool(collection.bodies[k]) for k, title in enumerate(collection.titles)], dtype=bool)
        if not titled.any():
            return None
        numbers = np.flatnonzero(titled)
        return self._pairs(collection.titles, collection.bodies, np.stack([numbers, numbers], axis=1))

    def _chosen(self, judgements: Ints, number: int) -> Ints | None:
        if self.val_documents is None or self.val_documents >= number:
            return None
        judged = np.unique(judgements[:, 1])
        others = np.setdiff1d(np.arange(number), judged)
        drawn = np.random.default_rng([self.seed, 4]).permutation(others)[: max(0, self.val_documents - len(judged))]
        return np.sort(np.concatenate([judged, drawn]))


__all__ = ["JudgedPairs", "SearchDataModule", "WrittenExamples"]
