"""Tiny releases of CUB-200-2011, Cars-196, Stanford Online Products and iNaturalist 2018 in their official layouts.

The class of an image is in its red channel. Half of the classes train; the training classes are the last ones before the border that the
official split has.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lit_methods.datamodules.fake import Arguments, Writer, flat, picture, text


def _colour(label: int) -> tuple[int, int, int]:
    return (label % 250, 100, 30)


def cub(root: Path, classes: int = 2, per_class: int = 3) -> None:
    """``images.txt``, ``image_class_labels.txt`` in another order, and ``images/``; classes up to 100 train."""
    kinds = list(range(101 - classes, 101 + classes))
    rows = [(number, f"{label:03d}.Bird/{number}.jpg", label) for number, label in enumerate(kinds * per_class, start=1)]
    for _, name, label in rows:
        picture(root / "images" / name, flat(_colour(label)))
    text(root / "images.txt", *(f"{number} {name}" for number, name, _ in rows))
    text(root / "image_class_labels.txt", *(f"{number} {label}" for number, _, label in reversed(rows)))


def cars(root: Path, classes: int = 2, per_class: int = 3) -> None:
    """``cars_annos.mat``, a struct array as MATLAB writes it, and ``car_ims/``; classes up to 98 train."""
    from scipy.io import savemat

    kinds = list(range(99 - classes, 99 + classes)) * per_class
    fields = ["relative_im_path", "bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "test"]
    table = np.zeros((1, len(kinds)), dtype=[(name, object) for name in fields])
    for place, kind in enumerate(kinds):
        name = f"car_ims/{place + 1:06d}.jpg"
        picture(root / name, flat(_colour(kind)))
        table[0, place] = (name, 1, 2, 20, 15, kind, place % 2)
    savemat(root / "cars_annos.mat", {"annotations": table, "class_names": np.array([["a", "b"]], dtype=object)})


def sop(root: Path, classes: int = 2, per_class: int = 3) -> None:
    """``Ebay_train.txt`` with classes from 1 on, ``Ebay_test.txt`` with classes from 11319 on, and the images."""
    for part, first in (("train", 1), ("test", 11319)):
        lines = []
        for place, kind in enumerate(list(range(first, first + classes)) * per_class, start=1):
            name = f"chair_final/{part}_{kind}_{place}.JPG"
            picture(root / name, flat(_colour(kind)))
            lines.append(f"{place} {kind} 4 {name}")
        text(root / f"Ebay_{part}.txt", "image_id class_id super_class_id path", *lines)


def inat(root: Path, classes: int = 2, per_class: int = 3) -> None:
    """``Inat_dataset_splits`` with two lists of paths, and ``train_val2018/``; training classes from 7 on, the test's behind them."""
    for part, first in (("train", 7), ("test", 7 + classes)):
        names = [f"train_val2018/Aves/{kind}/{place}.jpg" for place in range(per_class) for kind in range(first, first + classes)]
        for name in names:
            picture(root / name, flat(_colour(int(name.split("/")[2]))))
        text(root / "Inat_dataset_splits" / f"Inaturalist_{part}_set1.txt", *names)


LAYOUTS = {"cub": cub, "cars": cars, "sop": sop, "inat": inat}


def _retrieval(arguments: Arguments, sizes: Mapping[str, int]) -> dict[str, Any]:
    LAYOUTS[arguments["name"]](arguments["root"], max(2, arguments["classes_per_batch"]), max(3, arguments["samples_per_class"]))
    return {"root": arguments["root"]}


FAKES: dict[str, Writer] = {"RetrievalImagesDataModule": _retrieval}
__all__ = ["FAKES", "LAYOUTS", "cars", "cub", "inat", "sop"]
