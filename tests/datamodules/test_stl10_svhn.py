"""STL-10 and SVHN in their official formats, written by the tests; broken files; their images in semi-supervised batches."""

import numpy as np
import pytest
import torch
from scipy.io import savemat

from lit_methods.datamodules import SemiSupervisedDataModule, STL10DataModule, SVHNDataModule
from lit_methods.datamodules.errors import BrokenRecordError, MissingFileError, WrongRootError
from lit_methods.datamodules.vision import fake

NAMES = "airplane bird car cat deer dog horse monkey ship truck"


@pytest.fixture
def stl10(tmp_path):
    fake.stl10(tmp_path)
    return tmp_path


@pytest.fixture
def svhn(tmp_path):
    fake.svhn(tmp_path, extra=7)
    return tmp_path


def test_stl10_is_read_column_by_column(stl10):
    data = STL10DataModule(stl10, augment=False)
    data.setup("fit")
    stored = np.frombuffer((stl10 / "stl10_binary" / "train_X.bin").read_bytes(), np.uint8)
    third = stored[2 * 27648 : 3 * 27648]
    image = data.train_set.read(2)
    assert image.shape == (3, 96, 96)
    assert image[1, 4, 5] == third[96 * 96 + 5 * 96 + 4]  # green plane, column 5, row 4
    assert data.class_names == tuple(NAMES.split())
    assert data.train_set.labels[:3].tolist() == [0, 1, 2]
    assert (len(data.train_set), len(data.test_set), len(data.unlabelled_set)) == (20, 10, 7)
    expected = (image / 255 - torch.tensor(data.mean).view(3, 1, 1)) / torch.tensor(data.std).view(3, 1, 1)
    torch.testing.assert_close(data.train_set[0, 2]["image"], expected)


def test_svhn_has_digits_and_no_mirror_images(svhn):
    from scipy.io import loadmat

    data = SVHNDataModule(svhn, extra=True)
    data.setup("fit")
    stored = loadmat(str(svhn / "train_32x32.mat"))["X"]
    assert data.train_set.read(3)[2, 4, 5] == stored[4, 5, 2, 3]
    assert data.train_set.labels[:10].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    assert data.class_names == tuple("0123456789")
    assert len(data.unlabelled_set) == 7
    padded = torch.nn.functional.pad(data.train_set.read(0), (4,) * 4)
    crops = {padded[:, top : top + 32, left : left + 32].numpy().tobytes() for top in range(9) for left in range(9)}
    scale, shift = torch.tensor(data.std).view(3, 1, 1), torch.tensor(data.mean).view(3, 1, 1)
    for epoch in range(20):
        seen = ((data.train_set[epoch, 0]["image"] * scale + shift) * 255).round().to(torch.uint8)
        assert seen.numpy().tobytes() in crops


def test_unlabelled_images_stand_behind_those_of_training(stl10):
    data = SemiSupervisedDataModule(STL10DataModule(stl10), labels_per_class=1, batch_size=4, ratio=2)
    data.setup("fit")
    assert data.unlabelled.tolist() == list(range(27))
    batch = next(iter(data.train_dataloader()))[0]
    assert "label" not in batch["unlabelled"], "labels that aren't all known are of no use"
    assert batch["unlabelled"]["weak"].shape == (8, 3, 96, 96)
    assert batch["labelled"]["label"].min() >= 0
    last = data.unlabelled_set[0, 26]["weak"]
    assert last.shape == (3, 96, 96)
    assert torch.equal(data.unlabelled_set.images.read(26), data.data.unlabelled_set.read(6))


def test_extra_images_of_svhn_have_labels_for_diagnosis(svhn):
    data = SemiSupervisedDataModule(SVHNDataModule(svhn, extra=True), labels_per_class=1, batch_size=4, ratio=2)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))[0]
    assert batch["unlabelled"]["label"].shape == (8,)


@pytest.mark.parametrize("make", [STL10DataModule, SVHNDataModule])
def test_without_a_root_there_is_something_built_in(make):
    data = make()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape[:2] == (64, 3)
    assert batch["label"].max() < 10


def test_broken_files_are_named(stl10, svhn):
    with pytest.raises(WrongRootError, match="stl10_binary"):
        STL10DataModule(stl10 / "stl10_binary").setup("fit")
    with pytest.raises(WrongRootError, match="train_32x32"):
        SVHNDataModule(svhn / "stl10_binary").setup("fit")
    images = stl10 / "stl10_binary" / "train_X.bin"
    images.write_bytes(images.read_bytes()[:-1])
    with pytest.raises(BrokenRecordError, match=r"train_X\.bin.*truncated"):
        STL10DataModule(stl10).setup("fit")
    digits = svhn / "train_32x32.mat"
    digits.write_bytes(digits.read_bytes()[:500])
    with pytest.raises(BrokenRecordError, match=r"train_32x32\.mat"):
        SVHNDataModule(svhn).setup("fit")
    savemat(digits, {"X": np.zeros((32, 32, 3, 2), np.uint8), "y": np.array([[1], [11]])})
    with pytest.raises(BrokenRecordError, match="from 1 to 11"):
        SVHNDataModule(svhn).setup("fit")
    (svhn / "test_32x32.mat").unlink()
    savemat(digits, {"X": np.zeros((32, 32, 3, 2), np.uint8), "y": np.array([[1], [10]])})
    with pytest.raises(MissingFileError, match=r"test_32x32\.mat"):
        SVHNDataModule(svhn).setup("fit")
