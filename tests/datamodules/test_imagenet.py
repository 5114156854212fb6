"""ImageNet's folders: class list, augmentation, broken files, the built-in images."""

import json
import random

import numpy as np
import pytest
import torch

from lit_methods.datamodules import ImageNetDataModule
from lit_methods.datamodules.errors import BrokenRecordError, MissingFileError, WrongRootError
from lit_methods.datamodules.vision.fake import imagenet
from lit_methods.datamodules.vision.imagenet import IMAGENET_MEAN, IMAGENET_STD, seeded


def prepared(root=None, **kwargs):
    data = ImageNetDataModule(root, **({"image_size": 28, "batch_size": 4} | kwargs))
    data.setup("fit")
    return data


def test_folders_become_batches(tmp_path):
    imagenet(tmp_path)
    data = prepared(tmp_path)
    assert data.class_names == ("n01", "n02", "n03")
    batch = next(iter(data.val_dataloader()))
    assert batch["image"].shape == (4, 3, 28, 28)
    assert batch["image"].dtype == torch.float32
    assert batch["label"].tolist() == [0, 0, 1, 1]
    pixels = batch["image"][0] * torch.tensor(IMAGENET_STD).view(3, 1, 1) + torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
    assert pixels[:, 14, 2].tolist() == pytest.approx([1.0, 20 / 255, 20 / 255], abs=0.03), "left of the middle: red"
    assert pixels[:, 14, 25].tolist() == pytest.approx([20 / 255] * 3, abs=0.03)


def test_a_class_list_gives_the_labels(tmp_path):
    imagenet(tmp_path, number=0, num_val=2)
    (tmp_path / "json").write_text(json.dumps(["n03", "other", "n01", "n02"]))
    (tmp_path / "lines").write_text("n03 tench\nother\n\nn01\nn02\n")
    for file in ("json", "lines"):
        data = prepared(tmp_path, class_list=tmp_path / file)
        assert data.num_classes == 4
        assert data.val_set.labels.tolist() == [2, 2, 3, 3, 0, 0]
    with pytest.raises(RuntimeError, match=r"has no train data: root=.* has none"):
        data.train_dataloader()
    (tmp_path / "short").write_text("n01\nn02\n")
    with pytest.raises(WrongRootError, match=r"1 folders that are no class \(n03\)"):
        prepared(tmp_path, class_list=tmp_path / "short")
    (tmp_path / "twice").write_text("n01\nn01\n")
    with pytest.raises(BrokenRecordError, match="class_list: expected distinct"):
        prepared(tmp_path, class_list=tmp_path / "twice")
    with pytest.raises(MissingFileError, match="class_list"):
        prepared(tmp_path, class_list=tmp_path / "absent")


def test_wrong_roots_and_broken_images_are_named(tmp_path):
    with pytest.raises(WrongRootError, match="no folder val"):
        prepared(tmp_path)
    imagenet(tmp_path)
    data = prepared(tmp_path)
    broken = tmp_path / "val" / "n02" / "n02_1.JPEG"
    broken.write_bytes(broken.read_bytes()[:300])
    with pytest.raises(BrokenRecordError, match=r"n02_1\.JPEG: image: can't be decoded"):
        data.val_set[(0, 3)]
    broken.unlink()
    with pytest.raises(MissingFileError, match=r"n02_1\.JPEG"):
        data.val_set[(0, 3)]
    for file in (tmp_path / "val").rglob("*.JPEG"):
        file.unlink()
    with pytest.raises(WrongRootError, match="holds no image"):
        prepared(tmp_path)


@pytest.mark.parametrize("auto_augment", [None, "rand-m9-n2-mstd0.5"])
def test_augmentation_follows_from_seed_epoch_and_index(auto_augment):
    first, second, other = (prepared(auto_augment=auto_augment, random_erasing=0.5, seed=seed).train_set for seed in (0, 0, 1))
    random.seed(1)
    torch.manual_seed(1)
    image = first[(2, 5)]["image"]
    random.seed(2)
    torch.manual_seed(2)
    assert torch.equal(second[(2, 5)]["image"], image)
    assert not torch.equal(second[(3, 5)]["image"], image)
    assert not torch.equal(other[(2, 5)]["image"], image)


def test_the_global_generators_are_left_alone():
    def draws():
        return random.random(), np.random.random(), torch.rand(1).item()  # noqa: NPY002

    def seed():
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        torch.manual_seed(0)

    seed()
    expected = draws()
    seed()
    with seeded((1, 2, 3)):
        inside = draws()
    assert draws() == expected
    with seeded((1, 2, 3)):
        assert draws() == inside
    with seeded((1, 2, 4)):
        assert not set(draws()) & set(inside)


def test_batches_are_the_same_with_a_worker():
    alone, helped = (next(iter(prepared(num_workers=workers).train_dataloader())) for workers in (0, 1))
    assert torch.equal(alone["image"], helped["image"])
    assert len(prepared().train_set) == 600


def test_the_real_sample_is_read(test_data):
    root = test_data / "imagenet_sample"
    data = prepared(root, class_list=root / "wnids_1000.json", image_size=64, batch_size=100)
    assert (data.num_classes, len(data.val_set), data.train_set) == (1000, 100, None)
    listed = json.loads((root / "classes.json").read_text())
    assert data.val_set.labels.tolist() == sorted(entry["index"] for entry in listed.values())
    assert torch.isfinite(data.val_set[(0, 42)]["image"]).all()
