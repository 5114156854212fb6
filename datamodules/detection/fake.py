"""Tiny releases of COCO, LVIS and PASCAL VOC, with shapes in the pictures."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_methods.datamodules.detection.readers import VOC_CLASSES
from lit_methods.datamodules.detection.shapes import draw_detection_shapes
from lit_methods.datamodules.fake import Arguments, Writer, picture, text

SIZE = 48


def _drawn(number: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.int64]]:
    images, boxes, labels = draw_detection_shapes(number, SIZE, seed=seed)
    return images[:, : SIZE - 8], boxes.clip(0, [SIZE, SIZE - 8, SIZE, SIZE - 8]).astype(np.float32), labels


def coco(root: Path, splits: Sequence[str], images: str | None = None, lvis: bool = False, classes: int = 80, number: int = 6) -> None:
    """Tables and pictures of some splits; category ids have gaps, as COCO's have.

    Args:
        root: Folder of the release.
        splits: Names of the splits, of which each gets ``number`` pictures.
        images: Folder of all pictures below the root; None: the layout's.
        lvis: LVIS' layout.
        classes: Number of categories.
        number: Pictures of a split.
    """
    for seed, split in enumerate(splits):
        pixels, boxes, labels = _drawn(number, seed)
        folder = images or ("train2017" if lvis else split)
        entries: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for place in range(number):
            name = f"{100 * seed + place:012d}.jpg"
            picture(root / folder / name, pixels[place])
            entry: dict[str, Any] = {"id": 100 * seed + place, "width": SIZE, "height": SIZE - 8}
            named = {"coco_url": f"http://images.cocodataset.org/{folder}/{name}"} if lvis and images is None else {"file_name": name}
            entries.append(entry | named)
            for (left, top, right, bottom), label in zip(boxes[place].tolist(), labels[place].tolist(), strict=True):
                if label < 0 or right <= left or bottom <= top:
                    continue
                box = [left, top, right - left, bottom - top]
                rest = {"bbox": box, "area": box[2] * box[3], "iscrowd": 0}
                annotations.append({"id": len(annotations) + 1, "image_id": entry["id"], "category_id": 2 * label + 1} | rest)
        categories = [{"id": 2 * k + 1, "name": f"class_{k:04d}"} for k in range(classes)]
        table = {"images": entries, "annotations": annotations, "categories": categories}
        text(root / "annotations" / (f"{split}.json" if lvis else f"instances_{split}.json"), json.dumps(table))


def voc(root: Path, splits: Sequence[str], class_names: Sequence[str], number: int = 6) -> None:
    """Annotations, lists and pictures of some splits."""
    for seed, split in enumerate(splits):
        pixels, boxes, labels = _drawn(number, seed)
        names = [f"{seed:02d}{place:04d}" for place in range(number)]
        text(root / "ImageSets" / "Main" / f"{split}.txt", *names)
        for place, name in enumerate(names):
            picture(root / "JPEGImages" / f"{name}.jpg", pixels[place])
            objects = [
                f"<object><name>{class_names[label % len(class_names)]}</name><difficult>0</difficult><bndbox><xmin>{left + 1:.0f}</xmin>"
                f"<ymin>{top + 1:.0f}</ymin><xmax>{right:.0f}</xmax><ymax>{bottom:.0f}</ymax></bndbox></object>"
                for (left, top, right, bottom), label in zip(boxes[place].tolist(), labels[place].tolist(), strict=True)
                if label >= 0 and right > left + 1 and bottom > top + 1
            ]
            size = f"<size><width>{SIZE}</width><height>{SIZE - 8}</height><depth>3</depth></size>"
            text(root / "Annotations" / f"{name}.xml", f"<annotation>{size}{''.join(objects)}</annotation>")


def _release(arguments: Arguments, sizes: Mapping[str, int]) -> dict[str, Any]:
    from lit_methods.datamodules.detection.files import SPLITS

    root, layout = arguments["root"], arguments["layout"]
    own_train, own_val = SPLITS[layout]
    val = arguments.get("val") or own_val
    splits = list(dict.fromkeys([arguments.get("train") or own_train, val, arguments.get("test") or val]))
    number = max(6, sizes.get("images", 0))
    if layout == "voc":
        voc(root, splits, arguments.get("class_names") or VOC_CLASSES, number)
    else:
        classes = sizes.get("num_classes", 1203 if layout == "lvis" else 80)
        coco(root, splits, arguments.get("images"), layout == "lvis", classes, number)
    given: dict[str, Any] = {"root": root, "layout": layout}
    if arguments.get("predict") is not None:
        for place, pixels in enumerate(_drawn(2, 9)[0]):
            picture(Path(arguments["predict"]) / f"picture_{place}.png", pixels)
        given["predict"] = arguments["predict"]
    return given


FAKES: dict[str, Writer] = {"DetectionDataModule": _release}
__all__ = ["FAKES", "coco", "voc"]
