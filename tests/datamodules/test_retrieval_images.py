"""CUB, Cars, SOP and iNaturalist in their official layouts, on small releases made here; real Omniglot drawings in the layout of SOP."""

import io
import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from lit_methods.datamodules import RetrievalImagesDataModule
from lit_methods.datamodules.errors import BrokenRecordError, MissingFileError, WrongRootError
from lit_methods.datamodules.metric_learning.fake import LAYOUTS, inat

FIRST = {"cub": (99, 101), "cars": (97, 99), "sop": (1, 11319), "inat": (7, 9)}  # first training and test class
SMALL = {"image_size": 16, "classes_per_batch": 2, "samples_per_class": 3, "eval_batch_size": 6}


def data_of(name, root, **kwargs):
    LAYOUTS[name](root)
    return RetrievalImagesDataModule(root, name, **SMALL | kwargs)


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_official_layout_gives_images_with_their_classes(name, tmp_path):
    data = data_of(name, tmp_path)
    data.setup("fit")
    (train,) = list(data.train_dataloader())
    (val,) = list(data.val_dataloader())
    for batch, first, classes in ((train, FIRST[name][0], {0, 1}), (val, FIRST[name][1], {2, 3})):
        assert batch["image"].shape == (6, 3, 16, 16)
        assert set(batch["label"].tolist()) == classes
        red = (batch["image"][:, 0].mean((1, 2)) * 0.229 + 0.485) * 255  # the class is written in the red channel
        expected = (batch["label"] - min(classes) + first) % 250
        torch.testing.assert_close(red.round(), expected.float(), rtol=0, atol=3.0)  # JPEG


def test_draws_are_balanced_and_the_crops_differ_from_pass_to_pass(tmp_path):
    data = data_of("sop", tmp_path)
    data.setup("fit")
    rng = np.random.default_rng(0)
    for path in data.train_set.read.args[0]:
        Image.fromarray(rng.integers(0, 255, (18, 24, 3), dtype=np.uint8)).save(path, quality=100)
    again, other, same = (data.train_set[draw]["image"] for draw in ((0, 3), (1, 3), (0, 3)))
    assert torch.equal(again, same)
    assert not torch.equal(again, other)
    for batch in data.train_dataloader():
        assert batch["label"].bincount().tolist() == [3, 3]


def test_inaturalist_takes_categories_from_its_json(tmp_path):
    inat(tmp_path)
    names = sorted((tmp_path / "Inat_dataset_splits").glob("*"))
    lists = [file.read_text().split() for file in names]  # test, train
    table = {
        "images": [{"id": place, "file_name": name} for place, name in enumerate(lists[0] + lists[1])],
        "annotations": [{"image_id": place, "category_id": place % 3 + 10 * (place >= 6)} for place in range(12)],
    }
    (tmp_path / "train2018.json").write_text(json.dumps(table))
    data = RetrievalImagesDataModule(tmp_path, "inat", **SMALL)
    data.setup("fit")
    assert data.train_labels.tolist() == [0, 1, 2, 0, 1, 2]
    (tmp_path / "train2018.json").write_text(json.dumps(table)[:-40])
    with pytest.raises(BrokenRecordError, match=r"train2018\.json: annotations"):
        RetrievalImagesDataModule(tmp_path, "inat", **SMALL).setup("fit")


def cut(file, size=40):
    file.write_bytes(file.read_bytes()[:size])


BROKEN = (
    ("cub", lambda root: (root / "image_class_labels.txt").unlink(), MissingFileError, r"image_class_labels\.txt"),
    ("cub", lambda root: cut(root / "images.txt", 23), BrokenRecordError, r"image_class_labels\.txt: image"),
    ("cub", lambda root: (root / "images.txt").write_text("1\n"), BrokenRecordError, r"images\.txt: line 1: expected 2 words"),
    ("cub", lambda root: (root / "image_class_labels.txt").write_text("1 one\n"), BrokenRecordError, "line 1: expected an integer"),
    (
        "cub",
        lambda root: (root / "image_class_labels.txt").write_text("".join(f"{number} 99\n" for number in range(1, 13))),
        BrokenRecordError,
        "test: there is no image of this part",
    ),
    ("cars", lambda root: cut(root / "cars_annos.mat", 200), BrokenRecordError, r"cars_annos\.mat: annotations"),
    ("sop", lambda root: (root / "Ebay_test.txt").unlink(), MissingFileError, r"Ebay_test\.txt"),
    ("sop", lambda root: cut(root / "Ebay_test.txt", 38), BrokenRecordError, r"Ebay_test\.txt: lines"),
    ("sop", lambda root: cut(root / "Ebay_test.txt", 45), BrokenRecordError, r"Ebay_test\.txt: line 2: expected 4 words"),
    ("cub", lambda root: [cut(root / name, 0) for name in ("images.txt",)], BrokenRecordError, r"images\.txt: lines"),
    (
        "sop",
        lambda root: (root / "Ebay_test.txt").write_text("image_id class_id super_class_id path\n1 2 3 a.JPG\n"),
        BrokenRecordError,
        "class 2: it stands in",
    ),
    (
        "inat",
        lambda root: (root / "Inat_dataset_splits" / "Inaturalist_test_set1.txt").unlink(),
        MissingFileError,
        r"Inaturalist_test_set1\.txt",
    ),
)


@pytest.mark.parametrize("case", BROKEN, ids=[f"{name}-{place}" for place, (name, *_) in enumerate(BROKEN)])
def test_a_broken_release_is_named(case, tmp_path):
    name, harm, error, words = case
    data = data_of(name, tmp_path)
    harm(tmp_path)
    with pytest.raises(error, match=words):
        data.setup("fit")


def test_a_broken_image_is_named(tmp_path):
    data = data_of("cub", tmp_path)
    data.setup("fit")
    path = data.train_set.read.args[0][0]
    cut(path, 150)
    with pytest.raises(BrokenRecordError, match=path.name):
        data.train_set[0, 0]
    path.unlink()
    with pytest.raises(MissingFileError, match=path.name):
        data.train_set[0, 0]


def test_another_folder_is_refused_and_says_what_belongs_there(tmp_path):
    for name, first in (
        ("cub", "images.txt"),
        ("cars", "cars_annos.mat"),
        ("sop", "Ebay_train.txt"),
        ("inat", "Inaturalist_train_set1.txt"),
    ):
        with pytest.raises(WrongRootError, match=first):
            RetrievalImagesDataModule(tmp_path, name).setup("fit")


def test_real_drawings_of_unseen_characters(test_data, tmp_path):
    """Omniglot's characters, written down as SOP's lists: half of them train."""
    archive = test_data / "omniglot" / "images_background_small1.zip"
    if not archive.is_file():
        pytest.skip("no Omniglot in LIT_METHODS_TEST_DATA")
    lists = {"Ebay_train.txt": [], "Ebay_test.txt": []}
    with zipfile.ZipFile(archive) as content:
        files = sorted(name for name in content.namelist() if name.endswith(".png"))
        characters = sorted({name.rpartition("/")[0] for name in files})[:8]
        for place, character in enumerate(characters):
            for name in [name for name in files if name.rpartition("/")[0] == character][:4]:
                target = tmp_path / f"drawings/{place}_{name.rpartition('/')[2]}"
                target.parent.mkdir(exist_ok=True)
                Image.open(io.BytesIO(content.read(name))).save(target)
                lists["Ebay_train.txt" if place < 4 else "Ebay_test.txt"].append(f"0 {place} 0 {target.relative_to(tmp_path)}")
    for file, lines in lists.items():
        (tmp_path / file).write_text("\n".join(["image_id class_id super_class_id path", *lines]))
    data = RetrievalImagesDataModule(tmp_path, "sop", image_size=32, classes_per_batch=4, samples_per_class=4, eval_batch_size=16)
    data.setup("fit")
    (train,) = list(data.train_dataloader())
    (val,) = list(data.val_dataloader())
    assert train["label"].bincount().tolist() == [4] * 4
    assert sorted(set(val["label"].tolist())) == [4, 5, 6, 7]
    ink = val["image"].amin((1, 2, 3)) < 0
    paper = val["image"].amax((1, 2, 3)) > 2
    assert ink.all()
    assert paper.all()
