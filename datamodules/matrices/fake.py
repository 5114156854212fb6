"""Tiny releases of MNIST and of the fake job postings."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lit_methods.datamodules.fake import Arguments, Writer
from lit_methods.datamodules.matrices.idx import write_idx
from lit_methods.datamodules.matrices.postings import COLUMNS, FILES

HONEST = "team customers engineering design product software support office skills experience growth people"
FRAUD = "earn money home fast wire transfer cash easy daily deposit urgent payments"
BOTH = "work job position company apply email training hours salary candidate"


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


def postings(root: Path, rows: int = 120, frauds: float = 0.25, seed: int = 0) -> None:
    """``fake_job_postings.csv``: frauds use other words, and have a logo less often.

    Args:
        root: Folder to write to.
        rows: Postings.
        frauds: Share of frauds.
        seed: Of the words.
    """
    rng = np.random.default_rng(seed)
    root.mkdir(parents=True, exist_ok=True)
    with (root / FILES[0]).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for number in range(rows):
            fraud = int(number % round(1 / frauds) == 0)
            words = (FRAUD if fraud else HONEST).split() + BOTH.split()
            said = {name: " ".join(rng.choice(words, 12)) for name in ("company_profile", "description", "requirements", "benefits")}
            writer.writerow(
                said
                | {
                    "job_id": number + 1,
                    "title": " ".join(rng.choice(words, 3)).title(),
                    "location": "US, NY, New York",
                    "department": "",
                    "salary_range": "",
                    "telecommuting": int(rng.random() < 0.1),
                    "has_company_logo": int(rng.random() < (0.3 if fraud else 0.8)),
                    "has_questions": int(rng.random() < 0.5),
                    "employment_type": rng.choice(["", "Full-time", "Part-time"]),
                    "required_experience": rng.choice(["", "Entry level", "Associate"]),
                    "required_education": rng.choice(["", "Bachelor's Degree", "High School or equivalent"]),
                    "industry": "",
                    "function": "",
                    "fraudulent": fraud,
                }
            )


def _mnist(arguments: Arguments, sizes: Mapping[str, int]) -> dict[str, Any]:
    mnist(arguments["root"])
    return {"root": arguments["root"]}


def _postings(arguments: Arguments, sizes: Mapping[str, int]) -> dict[str, Any]:
    postings(arguments["root"])
    return {"root": arguments["root"]}


FAKES: dict[str, Writer] = {"JobPostingsDataModule": _postings, "SemiSyntheticDigitsDataModule": _mnist}
__all__ = ["FAKES", "mnist", "postings"]
