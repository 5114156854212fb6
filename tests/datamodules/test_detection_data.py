"""Readers of COCO, LVIS and VOC: what is in a batch, views that move boxes with images, and tables that are broken in many ways."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lit_methods.datamodules import DetectionDataModule, DetectionShapesDataModule
from lit_methods.datamodules.broken import Broken
from lit_methods.datamodules.detection.fake import coco, voc
from lit_methods.datamodules.detection.files import repeat_factors
from lit_methods.datamodules.detection.readers import read_coco
from lit_methods.datamodules.detection.samples import Record, View, viewed
from lit_methods.datamodules.errors import BrokenRecordError, WrongRootError

TABLE = "annotations/instances_train2017.json"
CELLS = Path(os.environ.get("LIT_METHODS_TEST_DATA", "")) / "bccd"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    coco(tmp_path, ("train2017", "val2017"), classes=3, number=4)
    return tmp_path


def changed(root: Path, change: Callable[[dict[str, Any]], Any], table: str = TABLE) -> None:
    content = json.loads((root / table).read_text())
    change(content)
    (root / table).write_text(json.dumps(content))


def ready(root: Path | None, **arguments: Any) -> DetectionDataModule:
    data = DetectionDataModule(root, **({"batch_size": 2, "flip": False} | arguments))
    data.setup("fit")
    return data


def test_a_batch_has_boxes_in_pixels_and_contiguous_labels(root: Path):
    data = ready(root)
    batch = next(iter(data.val_dataloader()))
    assert data.class_names == ["class_0000", "class_0001", "class_0002"], "categories 1, 3 and 5"
    assert batch["image"].shape == (2, 3, 40, 48)
    assert batch["label"].max() <= 2
    there = batch["label"] >= 0
    assert there.any(1).all()
    assert (batch["boxes"][there][:, 2:] > batch["boxes"][there][:, :2]).all()
    assert not batch["boxes"][~there].any()
    assert (batch["size"] == torch.tensor([48.0, 40.0])).all()


def test_views_move_boxes_with_the_image():
    image = Image.fromarray(np.zeros((40, 60, 3), np.uint8))
    image.paste((255, 255, 255), (10, 5, 30, 25))
    record = Record("a", np.array([[10.0, 5, 30, 25]], np.float32), np.array([0]), np.array([False]))
    for view in (View(flip=True), View((80,)), View((20,), longest=24), View(crop=(30, 38)), View((60, 70), crop=(20, 40), flip=True)):
        for draw in range(6):
            seen, moved = viewed(image, record, view, np.random.default_rng(draw))
            rows, columns = np.nonzero(np.asarray(seen)[..., 0] > 127)
            if not len(moved.boxes):
                assert not len(rows) or (np.ptp(rows) <= 1 or np.ptp(columns) <= 1)
                continue
            found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            np.testing.assert_allclose(moved.boxes[0], found, atol=1.0)
    assert viewed(image, record, View((20,), longest=24), np.random.default_rng(0))[0].size == (24, 16)


Change = Callable[[dict[str, Any]], Any]
BROKEN: dict[str, tuple[Change, str]] = {
    "no area": (lambda t: t["annotations"][0].update(bbox=[3, 3, 0, 5]), r"annotations\[0\]: bbox is .*without area"),
    "a negative side": (lambda t: t["annotations"][0].update(bbox=[3, 3, -4, 5]), "without area"),
    "outside": (lambda t: t["annotations"][0].update(bbox=[300, 3, 4, 5]), "outside of the image of 48 x 40 pixels"),
    "three numbers": (lambda t: t["annotations"][0].update(bbox=[3, 3, 4]), "expected four finite numbers"),
    "words": (lambda t: t["annotations"][0].update(bbox=["a", 1, 1, 1]), "expected four finite numbers"),
    "an unknown category": (lambda t: t["annotations"][0].update(category_id=77), "category_id is 77, and no category"),
    "an unknown image": (lambda t: t["annotations"][0].update(image_id=77), "image_id is 77, and no image"),
    "an annotation's id twice": (lambda t: t["annotations"][1].update(id=t["annotations"][0]["id"]), "expected a whole number that stands"),
    "an image's id twice": (lambda t: t["images"][1].update(id=t["images"][0]["id"]), r"images\[1\]: the id 0 stands twice"),
    "a missing file": (lambda t: t["images"][0].update(file_name="gone.jpg"), r"images\[0\]: there is no .*gone\.jpg"),
    "another folder": (lambda t: t["images"][0].update(file_name="../secret.jpg"), "file_name"),
    "no size": (lambda t: t["images"][0].pop("width"), "id, width and height are 0, None, 40"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_entry_is_named_or_left_out_and_counted(name: str, root: Path):
    change, message = BROKEN[name]
    before = ready(root).train_set
    changed(root, change)
    with pytest.raises(BrokenRecordError, match=message) as error:
        ready(root)
    assert TABLE in str(error.value)
    with pytest.warns(UserWarning, match="are left out"):
        data = ready(root, on_broken="skip")
    assert sum(data.broken.counts.values()) >= 1
    boxes = [sum(len(record.labels) for record in part.records) for part in (before, data.train_set)]
    assert boxes[1] < boxes[0]


WHOLE: dict[str, tuple[Change, str]] = {
    "no categories": (lambda t: t.pop("categories"), "categories: expected a list of objects"),
    "empty categories": (lambda t: t.update(categories=[]), "categories: is empty"),
    "a category's id twice": (lambda t: t["categories"][1].update(id=1), "the id '1' stands twice"),
    "a category's name twice": (lambda t: t["categories"][1].update(name="class_0000"), "the name 'class_0000' stands twice"),
    "images are numbers": (lambda t: t.update(images=[1, 2]), "images: expected a list of objects"),
    "no image is left": (lambda t: t.update(images=[], annotations=[]), "no image is left"),
    "other categories than in the other split": (lambda t: t["categories"][1].update(name="dog"), "differ from those of another split"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_table_that_is_broken_as_a_whole_is_refused_in_any_case(name: str, root: Path):
    change, message = WHOLE[name]
    changed(root, change)
    for on_broken in ("raise", "skip"):
        with pytest.raises(BrokenRecordError, match=message):
            ready(root, on_broken=on_broken)


def test_files_that_are_truncated_or_of_another_size(root: Path):
    image = next((root / "train2017").iterdir())
    Image.new("RGB", (20, 20)).save(image)
    with pytest.raises(BrokenRecordError, match=r"has 20 x 20 pixels, and its table says 48 x 40"):
        [ready(root).train_set[k] for k in range(4)]
    skipping = ready(root, on_broken="skip")
    assert len({skipping.train_set[k]["name"] for k in range(4)}) == 3, "the next image takes its place"
    other = next((root / "val2017").iterdir())
    other.write_bytes(other.read_bytes()[:100])
    with pytest.warns(UserWarning, match="are left out"):
        assert len(ready(root, on_broken="skip").val_set) == 3
    (root / TABLE).write_text((root / TABLE).read_text()[:200])
    with pytest.raises(BrokenRecordError, match="isn't JSON"):
        ready(root)


def test_a_root_without_a_release_and_wrong_arguments_are_refused(tmp_path: Path):
    for layout, file in (("coco", "annotations/instances_train2017.json"), ("lvis", "lvis_v1_train.json"), ("voc", "trainval.txt")):
        with pytest.raises(WrongRootError, match=f"has no .*{file}"):
            ready(tmp_path, layout=layout)
    with pytest.raises(WrongRootError, match="holds no images"):
        DetectionDataModule(predict=tmp_path).setup("predict")
    with pytest.raises(WrongRootError, match="is no folder"):
        DetectionDataModule(predict=tmp_path / "none").setup("predict")
    for arguments, message in (
        ({"layout": "yolo"}, "layout is 'yolo'"),
        ({"crop": (9, 5)}, "least and the largest side"),
        ({"sides": [0]}, r"sides\[0\] is 0"),
        ({"class_names": ["a"]}, "whose tables name the classes"),
        ({"layout": "voc", "images": "x"}, "lie in JPEGImages"),
        ({"repeat_threshold": 2.0}, "repeat_threshold is 2.0"),
    ):
        with pytest.raises(ValueError, match=message):
            DetectionDataModule(**arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_classes is 5"):
        DetectionShapesDataModule(num_classes=5)


def test_a_folder_for_predictions_names_broken_images_or_leaves_them_out(tmp_path: Path):
    for name in ("a.png", "a.jpg", "b.png"):
        Image.new("RGB", (20, 30)).save(tmp_path / name)
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:20])
    with pytest.raises(BrokenRecordError, match=r"b\.png"):
        DetectionDataModule(predict=tmp_path).setup("predict")
    data = DetectionDataModule(predict=tmp_path, on_broken="skip")
    with pytest.warns(UserWarning, match="1 records are left out"):
        data.setup("predict")
    (batch,) = list(data.predict_dataloader())
    assert batch["name"] == ["a.jpg", "a.png"], "equal stems keep their endings"
    assert batch["original_size"].tolist() == [[20, 30]] * 2


VOC_BROKEN = {
    "an unknown class": ("<name>cat</name>", "<name>unicorn</name>", "its class is 'unicorn'"),
    "no area": ("<xmax>", "<xmax>-", "object 0: bndbox"),
    "no size": ("<width>48</width>", "", "size: width and height are nan"),
    "entities": ("<annotation>", '<!DOCTYPE a [<!ENTITY b "c">]><annotation>', "document type"),
    "no XML": ("</annotation>", "", "isn't XML"),
}


@pytest.mark.parametrize("name", VOC_BROKEN)
def test_a_broken_file_of_voc_is_named_or_left_out(name: str, tmp_path: Path):
    voc(tmp_path, ("trainval", "test"), ("cat", "cat", "cat"), 3)
    arguments: dict[str, Any] = {"layout": "voc", "class_names": ("cat",)}
    first = tmp_path / "Annotations" / "000000.xml"
    old, new, message = VOC_BROKEN[name]
    first.write_text(first.read_text().replace(old, new, 1))
    with pytest.raises(BrokenRecordError, match=message) as error:
        ready(tmp_path, **arguments)
    assert "000000.xml" in str(error.value)
    with pytest.warns(UserWarning, match="are left out"):
        data = ready(tmp_path, **arguments, on_broken="skip")
    assert 2 <= len(data.train_set) <= 3


def test_crowds_are_boxes_to_ignore_and_boxes_are_cut_at_the_border(root: Path):
    changed(root, lambda t: t["annotations"][0].update(iscrowd=1, bbox=[-5, -5, 20, 60]))
    record = read_coco(root / TABLE, root / "train2017", Broken()).records[0]
    assert record.ignore.tolist()[0] is True
    assert record.boxes[0].tolist() == [0, 0, 15, 40]


def test_rare_classes_are_repeated():
    def record(*labels: int) -> Record:
        return Record("a", np.zeros((len(labels), 4), np.float32), np.array(labels, np.int64), np.zeros(len(labels), bool))

    records = [record(0)] * 98 + [record(0, 1), record()]
    factors = repeat_factors(records, 2, 0.09)
    assert factors[98] == 3, "sqrt(0.09 / 0.01)"
    assert set(factors[:98]) == {1}
    assert factors[99] == 1


@pytest.mark.skipif(not CELLS.is_dir(), reason="BCCD isn't below LIT_METHODS_TEST_DATA")
def test_blood_cells_are_the_same_in_both_layouts():
    tables = ready(CELLS, train="train", val="val", images="BCCD/JPEGImages")
    files = ready(CELLS / "BCCD", layout="voc", train="train", val="val", class_names=("RBC", "WBC", "Platelets"), on_broken="skip")
    assert tables.class_names == files.class_names
    assert len(tables.train_set) == len(files.train_set) == 80
    ours, theirs = ({record.name: len(record.labels) for record in data.train_set.records} for data in (tables, files))
    assert sum(ours.values()) == 1192
    assert sum(abs(ours[name] - theirs[name]) for name in ours) <= 20
    sample = tables.train_set[0]
    assert sample["image"].shape == (3, 480, 640)
