"""Tiny releases of MNIST and of the fake job postings."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lit_methods.datamodules.fake import Arguments, Writer
from lit_methods.datamodules.matrices.idx import write_idx
from lit_methods.datamodules.matrices.postings import COLUMNS, FILES, made_postings


def mnist(root: Path, each: int = 4) -> None:
    """``train-images-idx3-ubyte`` and ``train-labels-idx1-ubyte`` in ``MNIST/raw``: digits of scikit-learn, each pixel three times as wide.

    Args:
        root: Folder to write to.
        each: Images of each digit.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    chosen = np.concatenate([np.flatnonzero(digits.target == digit)[:each] for digit in range(10)])
    images = np.kron(digits.images[chosen], np.ones((1, 3, 3))) * 255 / 16
    write_idx(root / "MNIST" / "raw" / "train-images-idx3-ubyte", np.pad(images, ((0, 0), (2, 2), (2, 2))).astype(np.uint8))
    write_idx(root / "MNIST" / "raw" / "train-labels-idx1-ubyte", digits.target[chosen].astype(np.uint8))


def postings(root: Path, rows: int = 120) -> None:
    """``fake_job_postings.csv`` with made-up postings.

    Args:
        root: Folder to write to.
        rows: Postings.
    """
    root.mkdir(parents=True, exist_ok=True)
    with (root / FILES[0]).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(made_postings(rows))


def _mnist(arguments: Arguments, sizes: Mapping[str, int]) -> dict[str, Any]:
    mnist(arguments["root"])
    return {"root": arguments["root"]}


def _postings(arguments: Arguments, sizes: Mapping[str, int]) -> dict[str, Any]:
    postings(arguments["root"])
    return {"root": arguments["root"]}


FAKES: dict[str, Writer] = {"JobPostingsDataModule": _postings, "SemiSyntheticDigitsDataModule": _mnist}
__all__ = ["FAKES", "mnist", "postings"]
