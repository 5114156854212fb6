"""The eleven few-shot sets of CoOp (arXiv:2109.01134) in the layout of its DATASETS.md: one folder, one list of the splits.

Nine sets have ``split_zhou_<Set>.json`` with ``train``, ``val`` and ``test``, lists of [path, label, class name]. FGVCAircraft has its own
text files, ImageNet its folders and ``classnames.txt``. The layout is from memory of the authors' description (mem).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lit_methods.datamodules import reading
from lit_methods.datamodules.errors import BrokenRecordError, MissingFileError, WrongRootError
from lit_methods.datamodules.folders import listed

Name = Literal[
    "imagenet",
    "caltech101",
    "oxford_pets",
    "stanford_cars",
    "oxford_flowers",
    "food101",
    "fgvc_aircraft",
    "sun397",
    "dtd",
    "eurosat",
    "ucf101",
]


_CLASSES = 1_000_000  # more than any set has


@dataclass(frozen=True)
class Split:
    """Images of one part: paths, their labels (N,) int64."""

    paths: list[Path]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Release:
    """A data set as it is read: the names of its classes, and its parts."""

    classes: tuple[str, ...]
    train: Split
    test: Split


@dataclass(frozen=True)
class _Layout:
    images: str  # folder of the images inside the set's folder
    split: str  # the list of the splits
    template: str


LAYOUTS: dict[str, _Layout] = {
    "imagenet": _Layout("images", "classnames.txt", "a photo of a {}."),
    "caltech101": _Layout("101_ObjectCategories", "split_zhou_Caltech101.json", "a photo of a {}."),
    "oxford_pets": _Layout("images", "split_zhou_OxfordPets.json", "a photo of a {}, a type of pet."),
    "stanford_cars": _Layout(".", "split_zhou_StanfordCars.json", "a photo of a {}."),
    "oxford_flowers": _Layout("jpg", "split_zhou_OxfordFlowers.json", "a photo of a {}, a type of flower."),
    "food101": _Layout("images", "split_zhou_Food101.json", "a photo of {}, a type of food."),
    "fgvc_aircraft": _Layout("images", "variants.txt", "a photo of a {}, a type of aircraft."),
    "sun397": _Layout("SUN397", "split_zhou_SUN397.json", "a photo of a {}."),
    "dtd": _Layout("images", "split_zhou_DescribableTextures.json", "{} texture."),
    "eurosat": _Layout("2750", "split_zhou_EuroSAT.json", "a centered satellite photo of {}."),
    "ucf101": _Layout("UCF-101-midframes", "split_zhou_UCF101.json", "a photo of a person doing {}."),
}


def read_text(file: Path) -> str:
    """The text of a file, which isn't empty.

    Raises:
        MissingFileError: There is no such file.
        BrokenRecordError: It isn't UTF-8, or empty.
    """
    text = reading.read_text(file)
    if not text.strip():
        raise BrokenRecordError(file, "file", "it is empty: copy it again")
    return text


def read_json(file: Path) -> Any:
    """The content of a JSON file.

    Raises:
        MissingFileError: There is no such file.
        BrokenRecordError: It is no JSON.
    """
    return reading.read_json(file)


def read_split_file(file: Path, images: Path) -> Release:
    """A set with ``split_zhou_<Set>.json``.

    Args:
        file: The list.
        images: Folder that its paths are relative to.

    Raises:
        MissingFileError: There is no such file.
        BrokenRecordError: Something in it is wrong; the message names part and entry.
    """
    content = read_json(file)
    names: dict[int, str] = {}
    parts: dict[str, Split] = {}
    for part in ("train", "test"):
        rows = content.get(part) if isinstance(content, dict) else None
        if not isinstance(rows, list) or not rows:
            raise BrokenRecordError(file, part, "expected a list of [path, label, class name], got none: copy the file again")
        for number, row in enumerate(rows):
            if not (
                isinstance(row, list)
                and len(row) == 3
                and isinstance(row[0], str)
                and type(row[1]) is int
                and abs(row[1]) < _CLASSES
                and isinstance(row[2], str)
            ):
                raise BrokenRecordError(file, f"{part}[{number}]", f"expected [path, label, class name], got {str(row)[:80]}")
            if names.setdefault(row[1], row[2]) != row[2]:
                raise BrokenRecordError(
                    file, f"{part}[{number}]", f"label {row[1]} is called {row[2]!r} here and {names[row[1]]!r} before: copy the file again"
                )
        reading.once([row[0] for row in rows], file, part, "image")
        parts[part] = Split([images / row[0] for row in rows], np.array([row[1] for row in rows], np.int64))
    return _release(names, parts, file)


def _release(names: dict[int, str], parts: dict[str, Split], file: Path) -> Release:
    if sorted(names) != list(range(len(names))):
        missing = next(label for label in range(len(names)) if label not in names)
        raise BrokenRecordError(file, "labels", f"expected 0 to {len(names) - 1}, and label {missing} has no image: copy the file again")
    return Release(tuple(names[label] for label in range(len(names))), parts["train"], parts["test"])


def read_aircraft(folder: Path) -> Release:
    """FGVCAircraft: ``variants.txt``, ``images_variant_train.txt``, ``images_variant_test.txt`` with image and variant in each line."""
    classes = tuple(line.strip() for line in read_text(folder / "variants.txt").splitlines() if line.strip())
    reading.once(classes, folder / "variants.txt", "lines", "variant")
    number = {name: label for label, name in enumerate(classes)}

    def read(part: str) -> Split:
        file = folder / f"images_variant_{part}.txt"
        paths, labels = [], []
        for place, line in enumerate(read_text(file).splitlines(), start=1):
            image, _, name = line.strip().partition(" ")
            if name not in number:
                raise BrokenRecordError(file, f"line {place}", f"{name!r} isn't in variants.txt: copy both files again")
            paths.append(folder / "images" / f"{image}.jpg")
            labels.append(number[name])
        reading.once(list(zip(paths, labels, strict=True)), file, "lines", "row")
        return Split(paths, np.array(labels, np.int64))

    return Release(classes, read("train"), read("test"))


def read_imagenet(folder: Path) -> Release:
    """ImageNet: ``images/train/<id>/`` and ``images/val/<id>/`` with JPEGs, and ``classnames.txt`` with id and name in each line."""
    file = folder / "classnames.txt"
    rows = [line.strip().partition(" ") for line in read_text(file).splitlines() if line.strip()]
    if bad := [number for number, (_, _, name) in enumerate(rows, start=1) if not name]:
        raise BrokenRecordError(file, f"line {bad[0]}", "expected a folder and a name")
    reading.once([own for own, _, _ in rows], file, "lines", "folder")

    def read(part: str) -> Split:
        paths: list[Path] = []
        labels: list[int] = []
        for label, (own, _, _) in enumerate(rows):
            place = folder / "images" / part / own
            found = listed(place, "*.JPEG") if place.is_dir() else []
            if not found:
                raise MissingFileError(place, "images", "no *.JPEG: unpack the archives into images/train and images/val, a folder a class")
            paths += found
            labels += [label] * len(found)
        return Split(paths, np.array(labels, np.int64))

    return Release(tuple(name for _, _, name in rows), read("train"), read("val"))


_READERS: dict[str, Callable[[Path], Release]] = {"imagenet": read_imagenet, "fgvc_aircraft": read_aircraft}


def check_layout(root: Path, name: str) -> None:
    """Look for the list of a set's splits and its folder of images.

    Raises:
        WrongRootError: The folder doesn't hold them.
    """
    layout = LAYOUTS[name]
    for part in (layout.split, layout.images):
        if not (root / part).exists():
            raise WrongRootError(
                f"root={str(root)!r} has no {part}: lay out {name} there as CoOp's DATASETS.md says ({layout.split} and {layout.images}/), "
                "or set root=null for the built-in images"
            )


def read_release(root: Path, name: str) -> Release:
    """One of the eleven sets.

    Args:
        root: Its folder.
        name: A key of :data:`LAYOUTS`.

    Raises:
        WrongRootError: The folder doesn't hold it.
        BrokenRecordError: A file is missing or wrong; the message names it and the place.
    """
    check_layout(root, name)
    layout = LAYOUTS[name]
    if name in _READERS:
        return _READERS[name](root)
    return read_split_file(root / layout.split, root / layout.images)


def read_descriptions(file: Path) -> dict[str, list[str]]:
    """Sentences of a language model: {class name: [sentence, ...]}.

    Raises:
        MissingFileError: There is no such file.
        BrokenRecordError: It has another form.
    """
    content = read_json(file)
    if not isinstance(content, dict):
        raise BrokenRecordError(file, "file", "expected {class name: [sentence, ...]}")
    for name, own in content.items():
        if not isinstance(own, list) or not own or not all(isinstance(text, str) for text in own):
            raise BrokenRecordError(file, repr(name), "expected a list of one sentence or more")
    return {name: list(own) for name, own in content.items()}


def choose_shots(labels: NDArray[np.int64], shots: int, seed: int) -> NDArray[np.int64]:
    """``shots`` images of every class, or all of a class that has fewer, as CoOp does it.

    Args:
        labels: (N,) in 0..C-1.
        shots: K >= 1.
        seed: Decides which.

    Returns:
        Indices, sorted by class.
    """
    rng = [np.random.default_rng([seed, 16, int(label)]) for label in range(int(labels.max()) + 1)]
    return np.concatenate([own.permutation(np.flatnonzero(labels == label))[:shots] for label, own in enumerate(rng)])


__all__ = [
    "LAYOUTS",
    "Name",
    "Release",
    "Split",
    "check_layout",
    "choose_shots",
    "read_aircraft",
    "read_descriptions",
    "read_imagenet",
    "read_release",
    "read_split_file",
]
