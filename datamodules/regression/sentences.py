"""STS-B-DIR: how alike two sentences are, with skewed training scores (arXiv:2102.09554)."""

import csv
import re
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_methods.checks import at_least
from lit_methods.datamodules.errors import BrokenRecordError
from lit_methods.datamodules.folders import data_path
from lit_methods.datamodules.regression.base import RegressionDataModule, RegressionSamples, Reweighting
from lit_methods.datamodules.tables import named_rows
from lit_methods.tasks.imbalanced_regression.weights import Kernel, Reweight

_FILES = {"train": "train_new.tsv", "val": "dev_new.tsv", "test": "test_new.tsv"}
_COLUMNS = ("sentence1", "sentence2", "score")
_WORD = re.compile(r"\w+|[^\w\s]")
Pairs = tuple[list[tuple[str, str]], NDArray[np.float32]]


def read_pairs(file: Path) -> Pairs:
    """Pairs of sentences and their scores, 0 to 5.

    Args:
        file: The benchmark's table: columns between tabs, among them ``sentence1``, ``sentence2`` and ``score``.

    Raises:
        MissingFileError: There is no such file.
        BrokenRecordError: A column or all rows are missing, or a row is wrong; the message names the line.
    """
    pairs, scores = [], []
    missing = "copy the three tables of the benchmark to root"
    for line, (one, other, score) in named_rows(file, _COLUMNS, missing, delimiter="\t", quoting=csv.QUOTE_NONE):
        try:
            value = float(score)
        except ValueError:
            value = -1.0
        if not (one and other and 0 <= value <= 5):
            raise BrokenRecordError(
                file, f"line {line}", f"expected two sentences and a score of 0 to 5, got {score!r}: copy the file again"
            )
        pairs.append((one, other))
        scores.append(value)
    if not pairs:
        raise BrokenRecordError(file, "rows", "there are none: copy the file again")
    return pairs, np.array(scores, np.float32)


def tokens_of(sentences: tuple[str, str], draw: object, *, num_tokens: int, max_length: int) -> Tensor:
    """(2, L) int64: words and signs in small letters, each hashed to 1..``num_tokens - 1``; 0 behind the last one, the rest is cut off.

    ``draw`` is not used: sentences aren't augmented.
    """
    found = torch.zeros(2, max_length, dtype=torch.int64)
    for row, sentence in enumerate(sentences):
        words = _WORD.findall(sentence.lower())[:max_length]
        found[row, : len(words)] = torch.tensor([1 + zlib.crc32(word.encode()) % (num_tokens - 1) for word in words], dtype=torch.int64)
    return found


_SLOTS = (
    ("A man", "A woman", "A child", "A dog", "The teacher", "The old sailor", "A girl", "The cook"),
    ("is watching", "is carrying", "finds", "is drawing", "forgets", "is washing", "sells", "looks for"),
    ("a red", "a small", "the broken", "an empty", "the green", "a heavy", "the new", "an old"),
    ("chair", "bicycle", "basket", "guitar", "boat", "window", "lamp", "carpet"),
    ("in the garden.", "near the river.", "at school.", "on the roof.", "in the kitchen.", "at night.", "after lunch.", "in the rain."),
)


def made_up_pairs(count: int, balanced: bool, rng: np.random.Generator) -> Pairs:
    """Pairs of sentences of five parts; the score is the number of parts in common. Unless ``balanced``, high scores are rare."""
    share = np.ones(6) if balanced else np.array([30, 25, 20, 15, 7, 3])
    scores = rng.choice(6, count, p=share / share.sum())
    pairs = []
    for score in scores:
        first = rng.integers(8, size=5)
        other = (first + rng.integers(1, 8, size=5)) % 8  # differs in all parts
        kept = rng.permutation(5)[:score]
        other[kept] = first[kept]
        one, two = (" ".join(part[place] for part, place in zip(_SLOTS, chosen, strict=True)) for chosen in (first, other))
        pairs.append((one, two))
    return pairs, scores.astype(np.float32)


class SentencePairsDataModule(RegressionDataModule):
    """STS-B-DIR: pairs of sentences with a score of 0 (nothing in common) to 5. Training scores are skewed, validation and test balanced.

    Batch: {"tokens": (B, 2, L) int64, "target": (B,) float32, "count": (B,) int64}

    ``tokens``: hashed words with 0 behind the last one. ``count``: the training pairs in the bin of 0.1 that the score lies in; in training
    with ``reweight`` also ``weight`` (B,) float32.

    Args:
        root: Folder with ``train_new.tsv``, ``dev_new.tsv`` and ``test_new.tsv`` of the benchmark. None: built-in sentences of five parts.
        num_tokens: Numbers that a token can have, 0 included.
        max_length: Tokens of a sentence, L; more are cut off.
        reweight: Weight of a training sample by its bin: ``none``, ``inverse`` or ``sqrt_inv`` frequency.
        lds: Smooth the frequencies over neighbouring bins.
        lds_kernel: ``gaussian``, ``triang`` or ``laplace``.
        lds_kernel_size: Width of the kernel in bins, odd.
        lds_sigma: Standard deviation of the kernel in bins.
        batch_size: Pairs per process and step.
        num_workers: Processes that read data; the sentences lie in memory.
        seed: Seed of the order.

    Raises:
        ValueError: A value lies outside its range.
        WrongRootError: ``root`` doesn't hold the benchmark.
        BrokenRecordError: A file is missing or wrong; the message names it and the line.
    """

    def __init__(
        self,
        root: Path | None = None,
        num_tokens: int = 20_000,
        max_length: int = 40,
        reweight: Reweight = "none",
        lds: bool = False,
        lds_kernel: Kernel = "gaussian",
        lds_kernel_size: int = 5,
        lds_sigma: float = 2.0,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        rare = Reweighting(reweight, lds, lds_kernel, lds_kernel_size, lds_sigma)
        super().__init__(rare, 0.1, 50, batch_size=batch_size, num_workers=num_workers, seed=seed)
        at_least(2, num_tokens=num_tokens)
        at_least(1, max_length=max_length)
        self.save_hyperparameters()
        self.root = data_path(root)

    def check_root(self, stage: str = "fit") -> None:
        """Look for the training table."""
        way = "copy the tables of sts-b-dir/glue_data/STS-B of YyzHarry/imbalanced-regression there"
        self.expect(_FILES["train"], way, "sentences")

    def setup(self, stage: str) -> None:
        """Read the tables."""
        if self.train_set is not None:
            return
        if self.root is None:
            counts = {"train": 1000, "val": 240, "test": 240}
            table = {
                split: made_up_pairs(count, split != "train", np.random.default_rng([place, 6]))
                for place, (split, count) in enumerate(counts.items())
            }
        else:
            self.check_root(stage)
            table = {split: read_pairs(self.root / name) for split, name in _FILES.items()}
        labels = self.known(table["train"][1], [table["val"][1], table["test"][1]])
        transform = partial(tokens_of, num_tokens=self.hparams["num_tokens"], max_length=self.hparams["max_length"])
        self.train_set, self.val_set, self.test_set = (
            RegressionSamples(pairs.__getitem__, known, transform, name="tokens")
            for (pairs, _), known in zip(table.values(), labels, strict=True)
        )


__all__ = ["SentencePairsDataModule", "made_up_pairs", "read_pairs", "tokens_of"]
