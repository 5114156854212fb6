"""Tiny releases of CoOp's eleven few-shot sets in the layout of its DATASETS.md."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_methods.datamodules.fake import Arguments, Writer, flat, picture, text
from lit_methods.datamodules.fewshot.releases import LAYOUTS

CLASSES = ("River", "Forest", "Highway", "Pasture", "Sea or Lake")
VARIANTS = ("707-320", "DC-10 30", "A340 300", "Cessna 172")
PLACES = {"n01": "great white shark", "n02": "hen", "n03": "goldfish", "n04": "ostrich"}


def listed_split(root: Path, name: str = "eurosat", classes: Sequence[str] = CLASSES, per_class: int = 6) -> Path:
    """A set with ``split_zhou_<Set>.json``; one of three images of a class is for the test. Class k is painted with 20 k in red.

    Returns:
        ``root``.
    """
    layout = LAYOUTS[name]
    parts: dict[str, list[Any]] = {"train": [], "val": [], "test": []}
    for label, kind in enumerate(classes):
        for number in range(per_class):
            path = f"{kind}/{kind}_{number}.jpg"
            picture(root / layout.images / path, flat((20 * label % 256, 50, 20), (12, 8)))
            parts["train" if number % 3 else "test"].append([path, label, kind])
    text(root / layout.split, json.dumps(parts))
    return root


def aircraft(root: Path, variants: Sequence[str] = VARIANTS, per_class: int = 2) -> None:
    """FGVCAircraft: ``variants.txt``, ``images_variant_train.txt``, ``images_variant_test.txt`` and ``images/``."""
    text(root / "variants.txt", *variants)
    for order, part in enumerate(("train", "test")):
        lines = [f"{order}{label:03d}{k:03d} {name}" for label, name in enumerate(variants) for k in range(per_class)]
        text(root / f"images_variant_{part}.txt", *lines)
        for line in lines:
            picture(root / "images" / f"{line.split()[0]}.jpg", flat((90, 50, 20)))


def imagenet(root: Path, classes: Mapping[str, str] = PLACES, per_class: int = 1) -> None:
    """``classnames.txt``, ``images/train/`` and ``images/val/``; folder -> name of a class."""
    for part in ("train", "val"):
        for label, name in enumerate(classes):
            for k in range(per_class):
                picture(root / "images" / part / name / f"{name}_{k}.JPEG", flat((20 * label % 256, 50, 20)))
    text(root / "classnames.txt", *(f"{folder} {name}" for folder, name in classes.items()))


def descriptions(file: Path, classes: Sequence[str] = CLASSES) -> None:
    """Two sentences for each class."""
    text(file, json.dumps({name: [f"{name} seen from above.", f"A view of {name.lower()}."] for name in classes}))


def _few_shot(arguments: Arguments, sizes: Mapping[str, int]) -> dict[str, Any]:
    root, name, file = arguments["root"], arguments["name"], arguments.get("descriptions")
    classes: Sequence[str] = CLASSES
    if name == "fgvc_aircraft":
        classes = VARIANTS
        aircraft(root, per_class=4)
    elif name == "imagenet":
        classes = tuple(PLACES.values())
        imagenet(root, per_class=4)
    else:
        listed_split(root, name)
    if file is None:
        return {"root": root}
    descriptions(file, classes)
    return {"root": root, "descriptions": file}


FAKES: dict[str, Writer] = {"FewShotDataModule": _few_shot}
__all__ = ["CLASSES", "FAKES", "aircraft", "descriptions", "imagenet", "listed_split"]
