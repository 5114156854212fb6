"""Texts as tokens of a vocabulary whose entries have names."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lit_methods.hub import fetch, place_of


class Vocabulary(Protocol):
    """Texts -> tokens.

    Attributes:
        tokens: Names of the V tokens.
        special_ids: Numbers of those that say nothing, the padding first.
    """

    tokens: list[str]
    special_ids: list[int]

    def encode(self, texts: Sequence[Any], max_length: int) -> list[list[int]]:
        """Tokens of each text, at least one and at most ``max_length``."""


class Words:
    """The most frequent words of some texts: runs of letters and digits in small letters, without any library.

    Args:
        texts: What the words are taken from.
        size: V, two special tokens among them.
    """

    special_ids: list[int]

    def __init__(self, texts: Iterable[str], size: int) -> None:
        counts = Counter(word for text in texts for word in self.split(text))
        common = sorted(counts, key=lambda word: (-counts[word], word))[: size - 2]
        self.tokens = ["[PAD]", "[UNK]", *common]
        self.special_ids = [0, 1]
        self._places = {word: place for place, word in enumerate(self.tokens)}

    @staticmethod
    def split(text: str) -> list[str]:
        """Words of a text."""
        return re.findall(r"[^\W_]+", text.lower())

    def encode(self, texts: Sequence[str], max_length: int) -> list[list[int]]:
        """Tokens of each text."""
        return [[self._places.get(word, 1) for word in self.split(text)[:max_length]] or [1] for text in texts]


class WordPieces:
    """A fast tokenizer of transformers, with its special tokens.

    Args:
        name: Folder or hub name, or ``package:<name>`` for the one in an installed package.

    Raises:
        ImportError: transformers is not installed.
        ValueError: There is no such tokenizer.
    """

    def __init__(self, name: str) -> None:
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise ImportError('a tokenizer by its name needs transformers: pip install "lit-methods[transformers]"') from error
        given = f"tokenizer={name!r}"
        place, _ = place_of(name, given)
        self.inner: Any = fetch(
            lambda: AutoTokenizer.from_pretrained(place),
            place,
            given=given,
            instead="give the folder of a tokenizer of transformers (tokenizer.json), or null for the words of the documents",
        )
        size = len(self.inner)
        self.tokens = [str(token) for token in self.inner.convert_ids_to_tokens(list(range(size)))]
        padding = self.inner.pad_token_id
        others = [number for number in self.inner.all_special_ids if number != padding]
        self.special_ids = ([] if padding is None else [padding]) + sorted(set(others))

    def encode(self, texts: Sequence[str], max_length: int) -> list[list[int]]:
        """Tokens of each text, special ones among them."""
        found = self.inner(list(texts), truncation=True, max_length=max_length, padding=False, verbose=False)["input_ids"]
        return [ids or [self.special_ids[0] if self.special_ids else 0] for ids in found]


def padded(rows: Sequence[Sequence[int]], padding: int, length: int | None = None) -> tuple[Tensor, Tensor]:
    """Rows of tokens as (B, L) int64 and their mask (B, L) int64.

    Args:
        rows: Tokens of each text.
        padding: Token behind shorter ones.
        length: L; None: the longest row.
    """
    width = max(map(len, rows)) if length is None else length
    ids, mask = torch.full((len(rows), width), padding), torch.zeros(len(rows), width, dtype=torch.int64)
    for place, row in enumerate(rows):
        ids[place, : len(row)], mask[place, : len(row)] = torch.tensor(row), 1
    return ids, mask


__all__ = ["Vocabulary", "WordPieces", "Words", "padded"]
