"""Tiny releases of AgeDB-DIR, IMDB-WIKI-DIR, STS-B-DIR and NYUD2-DIR in their official layouts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lit_methods.datamodules.fake import Arguments, Writer, flat, picture, text
from lit_methods.datamodules.regression.nyud2 import HEIGHT, WIDTH

Rows = Mapping[str, Sequence[tuple[str, str, str]]]


def faces(root: Path, name: str, ages: Mapping[str, Sequence[int]]) -> None:
    """``<name>.csv`` and grey pictures as bright as the age.

    Args:
        root: Folder to write to.
        name: ``agedb`` or ``imdb_wiki``.
        ages: Part (train, val, test) -> ages in years, one an image.
    """
    lines = ["age,path,split"]
    for part, years in ages.items():
        for place, age in enumerate(years):
            path = f"{'AgeDB' if name == 'agedb' else 'imdb_crop/01'}/{part}_{place}.jpg"
            picture(root / path, flat((age, age, age), (30, 30)))
            lines.append(f"{age},{path},{part}")
    text(root / f"{name}.csv", *lines)


def sentences(root: Path, rows: Rows) -> None:
    """``train_new.tsv``, ``dev_new.tsv`` and ``test_new.tsv``: part -> (sentence, sentence, score as it is written)."""
    head = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore"
    for part, parts in rows.items():
        lines = ["\t".join([str(place), "g", "f", "2012", "0", "none", "none", *row]) for place, row in enumerate(parts)]
        text(root / f"{part}_new.tsv", head, *lines)


def rooms(root: Path, number: int = 3, size: tuple[int, int] = (640, 480)) -> None:
    """Training depths as 8 bits of 10 m, test depths as 16 bits of millimetres; the test mask keeps the left half.

    Picture k is 2 + k m deep on the left (again 2 m from the fifth on) and 4 m more on the right.

    Args:
        root: Folder to write to.
        number: Pictures of each part.
        size: Width and height.
    """
    half = size[0] // 2
    for part, kind in (("train", np.uint8), ("test", np.uint16)):
        lines = []
        for place in range(number):
            names = [f"data/nyu2_{part}/room/{place}.{ending}" for ending in ("jpg", "png")]
            image, depth = (root / name.removeprefix("data/") for name in names)
            picture(image, flat((40 * place % 256, 90, 20), size))
            metres = np.full((size[1], size[0]), 2.0 + place % 4)
            metres[:, half:] += 4
            picture(depth, np.round(metres * (255 / 10 if part == "train" else 1000)).astype(kind))
            lines.append(",".join(names))
        text(root / f"nyu2_{part}.csv", *lines)
    mask = np.zeros((number, HEIGHT, WIDTH), np.uint8)
    mask[:, :, : WIDTH // 2] = 1
    np.save(root / "test_balanced_mask.npy", mask)


# ---- what each datamodule gets ---------------------------------------------------------------------------------------------------------


def _ages(arguments: Arguments, sizes: Mapping[str, int]) -> dict[str, Any]:
    draws = np.random.default_rng(0).normal(40, 15, 64).round().clip(0, 99).astype(int).tolist()
    faces(arguments["root"], arguments["name"], {"train": draws, "val": [20, 40, 60, 90], "test": [10, 30, 50, 70]})
    return {"root": arguments["root"]}


def _sentences(arguments: Arguments, sizes: Mapping[str, int]) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    who, does = ("A man", "A woman", "A dog", "A child", "A cat"), ("runs.", "sings.", "sleeps.", "plays a guitar.", "looks up.")

    def sentence() -> str:
        return f"{rng.choice(who)} {rng.choice(does)}"

    sentences(
        arguments["root"],
        {
            part: [(sentence(), sentence(), f"{rng.uniform(0, 5):.3f}") for _ in range(number)]
            for part, number in (("train", 64), ("dev", 16), ("test", 16))
        },
    )
    return {"root": arguments["root"]}


def _rooms(arguments: Arguments, sizes: Mapping[str, int]) -> dict[str, Any]:
    rooms(arguments["root"], 4)
    return {"root": arguments["root"]}


FAKES: dict[str, Writer] = {"AgeDataModule": _ages, "SentencePairsDataModule": _sentences, "NYUD2DataModule": _rooms}
__all__ = ["FAKES", "faces", "rooms", "sentences"]
