"""Inverse document frequencies: counted, computed, and as a JSON file: token -> value. Imports no torch."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lit_methods.datamodules.errors import BrokenRecordError
from lit_methods.datamodules.reading import is_finite, read_json
from lit_methods.files import write_json


def count_documents(rows: Sequence[Sequence[int]], size: int) -> NDArray[np.int64]:
    """(V,) in how many of some documents each token occurs.

    Args:
        rows: Tokens of each document, in [0, ``size``).
        size: V.
    """
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    flat = np.fromiter((token for row in rows for token in row), np.int64, int(lengths.sum()))
    pairs = np.unique(np.repeat(np.arange(len(rows)), lengths) * size + flat)
    return np.bincount(pairs % size, minlength=size)


def idf_of_counts(counts: NDArray[np.int64], documents: int) -> NDArray[np.float32]:
    """ln(1 + (N - n + 0.5) / (n + 0.5)) of tokens that n of N documents contain; 1 for tokens that none contains.

    Args:
        counts: (V,) n in [0, N].
        documents: N.

    Returns:
        (V,), > 0.
    """
    n = counts.astype(np.float64)
    return np.where(counts > 0, np.log1p((documents - n + 0.5) / (n + 0.5)), 1.0).astype(np.float32)


def read_idf(path: Path, tokens: Sequence[str]) -> NDArray[np.float32]:
    """(V,) values of a vocabulary; 1 for tokens that the table lacks.

    Args:
        path: JSON file: token -> value.
        tokens: The vocabulary, in order.

    Raises:
        MissingFileError: There is no such file.
        BrokenRecordError: It is no such table, or has no token of the vocabulary.
    """
    table = read_json(path, "JSON", "make the table by `lit idf`")
    if not isinstance(table, dict):
        raise BrokenRecordError(path, "JSON", f"is a {type(table).__name__}, expected an object: token -> value")
    for token, value in table.items():
        if not is_finite(value):
            raise BrokenRecordError(path, f"token {token!r}", f"{value!r}, expected a finite number")
    if not any(token in table for token in tokens):
        raise BrokenRecordError(path, "tokens", f"none of its {len(table)} is in the vocabulary: make the table with the same tokenizer")
    return np.array([table.get(token, 1.0) for token in tokens], dtype=np.float32)


def write_idf(path: Path, tokens: Sequence[str], idf: NDArray[np.float32]) -> None:
    """Write a table that :func:`read_idf` reads: token -> value."""
    write_json(path, dict(zip(tokens, (round(value, 6) for value in idf.tolist()), strict=True)))


__all__ = ["count_documents", "idf_of_counts", "read_idf", "write_idf"]
