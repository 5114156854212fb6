"""Tables of boxes in the layouts of COCO, LVIS and PASCAL VOC, every entry looked at before it is used."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree import ElementTree

import numpy as np

from lit_methods.datamodules.broken import Broken
from lit_methods.datamodules.detection.samples import Record
from lit_methods.datamodules.errors import BrokenRecordError
from lit_methods.datamodules.reading import AGAIN, once, plain_file_name, read_json, read_text

WAY = "correct the table, or set on_broken to skip"
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


@dataclass
class Table:
    """What a table says.

    Attributes:
        records: The images with their boxes.
        class_names: Names of the classes, by label.
    """

    records: list[Record] = field(default_factory=list)
    class_names: list[str] = field(default_factory=list)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _list_of(content: Any, key: str, file: Path) -> list[dict[str, Any]]:
    found = content.get(key) if isinstance(content, dict) else None
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise BrokenRecordError(file, key, f"expected a list of objects, as COCO's tables have: another file, or truncated, {AGAIN}")
    return found


def _path_below(name: Any, file: Path, place: str) -> str:
    """A relative path of plain parts."""
    if not isinstance(name, str) or not name:
        raise BrokenRecordError(file, place, f"file_name is {name!r}, expected the name of an image: {WAY}")
    for part in PurePosixPath(name).parts:
        plain_file_name(part, file, f"{place} file_name")
    return name


def _corners(box: Any, size: tuple[int, int]) -> tuple[list[float], str]:
    """COCO's (left, top, width, height) as corners inside the image, and what is wrong with it, or nothing."""
    numbers = isinstance(box, list) and len(box) == 4 and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in box)
    if not numbers or not all(math.isfinite(value) for value in box):
        return [], f"bbox is {str(box)[:60]}, expected four finite numbers: left, top, width, height"
    left, top, width, height = box
    if width <= 0 or height <= 0:
        return [], f"bbox is {box}, a box without area"
    corners = [max(0.0, left), max(0.0, top), min(left + width, size[0]), min(top + height, size[1])]
    if corners[0] >= corners[2] or corners[1] >= corners[3]:
        return [], f"bbox is {box}, outside of the image of {size[0]} x {size[1]} pixels"
    return corners, ""


def _categories(content: Any, file: Path) -> tuple[dict[int, int], list[str]]:
    """Id -> label, and names; sorted by id. A broken list of categories can't be skipped: all labels hang on it."""
    ids: list[int] = []
    names: list[str] = []
    for place, entry in enumerate(_list_of(content, "categories", file)):
        number: Any = entry.get("id")
        name = entry.get("name")
        if not _whole(number) or not isinstance(name, str):
            raise BrokenRecordError(
                file, f"categories[{place}]", f"id is {number!r} and name {str(name)[:40]!r}: expected a number and a name"
            )
        ids.append(number)
        names.append(name)
    once(ids, file, "categories", "id")
    once(names, file, "categories")
    if not ids:
        raise BrokenRecordError(file, "categories", f"is empty: another file, {AGAIN}")
    order = sorted(range(len(ids)), key=lambda place: ids[place])
    return {ids[place]: label for label, place in enumerate(order)}, [names[place] for place in order]


def _coco_images(content: Any, file: Path, folder: Path, lvis: bool, broken: Broken) -> dict[int, Record]:
    """Id -> image without boxes."""
    records: dict[int, Record] = {}
    empty = (np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, bool))
    for place, entry in enumerate(_list_of(content, "images", file)):
        where = f"images[{place}]"
        stated: list[Any] = [entry.get(key) for key in ("id", "width", "height")]
        number, width, height = stated
        if not _whole(number) or not _whole(width) or not _whole(height) or width < 1 or height < 1:
            broken.say(
                file, where, f"id, width and height are {number!r}, {width!r}, {height!r}: expected whole numbers, sides above 0; {WAY}"
            )
            continue
        if number in records:
            broken.say(file, where, f"the id {number} stands twice: {WAY}")
            continue
        name = entry.get("file_name")
        if lvis and name is None and isinstance(entry.get("coco_url"), str):
            name = "/".join(entry["coco_url"].split("/")[-2:])
        try:
            path = folder / _path_below(name, file, where)
        except BrokenRecordError as error:
            broken.say(file, error.field, error.problem)
            continue
        if not path.is_file():
            broken.say(file, where, f"there is no {path}: unpack the images into {folder}, or set on_broken to skip")
            continue
        records[number] = Record(path.stem, *empty, path, (width, height))
    return records


def read_coco(file: Path, folder: Path, broken: Broken, lvis: bool = False) -> Table:
    """Images and boxes of a table in COCO's layout.

    Labels are the places of the categories, sorted by their ids. Boxes are cut at the image's border. Crowds are kept as boxes to ignore.

    Args:
        file: ``instances_<split>.json`` or ``lvis_v1_<split>.json``.
        folder: Where the images are.
        broken: What is done with entries that can't be used.
        lvis: Images may be named by ``coco_url``, whose last two parts are their path below ``folder``.

    Raises:
        MissingFileError: There is no such file.
        BrokenRecordError: It is no such table, or has an entry that can't be used.
    """
    content = read_json(file, "annotations", f"unpack the annotations into {file.parent}")
    labels, names = _categories(content, file)
    records = _coco_images(content, file, folder, lvis, broken)
    known = {entry.get("id") for entry in content["images"] if _whole(entry.get("id"))}
    found: dict[int, list[tuple[list[float], int, bool]]] = {number: [] for number in records}
    seen: set[Any] = set()
    for place, entry in enumerate(_list_of(content, "annotations", file)):
        where = f"annotations[{place}]"
        number, image, category = (entry.get(key) for key in ("id", "image_id", "category_id"))
        if not _whole(number) or number in seen:
            broken.say(file, where, f"the id is {number!r}, expected a whole number that stands once: {WAY}")
            continue
        seen.add(number)
        if not _whole(image) or image not in known:
            broken.say(file, where, f"image_id is {image!r}, and no image has that id: {WAY}")
            continue
        if not _whole(category) or category not in labels:
            broken.say(file, where, f"category_id is {category!r}, and no category has that id: {WAY}")
            continue
        if image not in found:
            continue  # its image was left out
        size = records[image].size
        assert size is not None
        corners, problem = _corners(entry.get("bbox"), size)
        if problem:
            broken.say(file, where, f"{problem}: {WAY}")
            continue
        found[image].append((corners, labels[category], bool(entry.get("iscrowd", 0))))
    for image, boxes in found.items():
        _fill(records[image], boxes)
    return Table(list(records.values()), names)


def _fill(record: Record, boxes: Sequence[tuple[list[float], int, bool]]) -> None:
    if boxes:
        corners, labels, ignore = zip(*boxes, strict=True)
        record.boxes, record.labels = np.array(corners, np.float32), np.array(labels, np.int64)
        record.ignore = np.array(ignore, bool)


def _number(element: ElementTree.Element | None) -> float:
    """The number that an element holds; not a number if it holds none."""
    try:
        return float(element.text or "") if element is not None else math.nan
    except ValueError:
        return math.nan


def _voc_image(file: Path, images: Path, classes: dict[str, int], broken: Broken) -> Record | None:
    """The image of one file of annotations; None: it was left out."""
    text = read_text(file, "annotation", f"unpack the annotations into {file.parent}")
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise BrokenRecordError(file, "annotation", f"has a document type or entities, which VOC's files don't have: {AGAIN}")
    try:
        tree = ElementTree.fromstring(text)
    except ElementTree.ParseError as problem:
        raise BrokenRecordError(file, "annotation", f"isn't XML ({problem}): truncated or another file, {AGAIN}") from problem
    path = images / f"{file.stem}.jpg"
    if not path.is_file():
        raise BrokenRecordError(file, "image", f"there is no {path}: unpack the images into {images}, or set on_broken to skip")
    width, height = (_number(tree.find(f"size/{side}")) for side in ("width", "height"))
    if not (width >= 1 and height >= 1) or width % 1 or height % 1:
        raise BrokenRecordError(file, "size", f"width and height are {width} and {height}, expected whole numbers above 0: {WAY}")
    size = (int(width), int(height))
    boxes = []
    for place, entry in enumerate(tree.findall("object")):
        where, name = f"object {place}", (entry.findtext("name") or "").strip()
        if name not in classes:
            known = ", ".join(list(classes)[:5])
            broken.say(
                file, where, f"its class is {name[:40]!r}, and class_names are {known}, ...: give class_names of this data set, or {WAY}"
            )
            continue
        left, top, right, bottom = (_number(entry.find(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax"))
        corners, wrong = _corners([left - 1, top - 1, right - left + 1, bottom - top + 1], size)
        if wrong or right <= left or bottom <= top:
            broken.say(file, where, f"bndbox is {left}, {top}, {right}, {bottom} ({wrong or 'a box without area'}): {WAY}")
            continue
        boxes.append((corners, classes[name], entry.findtext("difficult", "0").strip() == "1"))
    record = Record(file.stem, np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, bool), path, size)
    _fill(record, boxes)
    return record


def read_voc(root: Path, split: str, class_names: Sequence[str], broken: Broken) -> Table:
    """Images and boxes of PASCAL VOC's layout; pixels count from 1 there. Difficult objects are kept as boxes to ignore.

    Args:
        root: Folder with ``Annotations``, ``ImageSets/Main`` and ``JPEGImages``.
        split: Name of a list in ``ImageSets/Main``.
        class_names: Names of the classes, by label.
        broken: What is done with entries that can't be used.

    Raises:
        MissingFileError: There is no such file.
        BrokenRecordError: A file is no such table, or has an entry that can't be used.
    """
    names_file = root / "ImageSets" / "Main" / f"{split}.txt"
    lines = read_text(names_file, "list", f"give the name of a list in {names_file.parent}").splitlines()
    classes = {name: label for label, name in enumerate(class_names)}
    table, seen = Table(class_names=list(class_names)), set()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name = line.split()[0]
        try:
            plain_file_name(name, names_file, f"line {number}")
            if name in seen:
                raise BrokenRecordError(names_file, f"line {number}", f"the image {name!r} stands twice: {WAY}")
            seen.add(name)
            record = _voc_image(root / "Annotations" / f"{name}.xml", root / "JPEGImages", classes, broken)
        except BrokenRecordError as error:
            broken.say(Path(error.file), error.field, error.problem)
            continue
        if record is not None:
            table.records.append(record)
    return table


__all__ = ["VOC_CLASSES", "Table", "read_coco", "read_voc"]
