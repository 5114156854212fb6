"""Folders and digits of two domains: what is drawn beside what, and ten kinds of bad input, each with an error that helps."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from lit_methods.datamodules import FewShotDigitsDataModule, FewShotFoldersDataModule
from lit_methods.datamodules.errors import BrokenRecordError, WrongRootError
from lit_methods.datamodules.generative.fake import few_shot
from lit_methods.datamodules.generative.few_shot import restyle


def prepared(module):
    module.setup("fit")
    return module


def folders(root, sources=6, targets=3, **arguments):
    few_shot(root, ("source", sources), ("target", targets))
    return FewShotFoldersDataModule(root, image_size=16, **{"num_val": 2, "batch_size": 2} | arguments)


def test_targets_are_drawn_anew_and_evaluation_sees_what_training_does_not(tmp_path):
    data = prepared(folders(tmp_path, shots=2, flip=False))
    first, later = ([data.train_set[epoch, index] for index in range(4)] for epoch in (0, 1))
    torch.testing.assert_close(torch.stack([x["source"] for x in first]), torch.stack([x["source"] for x in later]))
    drawn = torch.stack([x[name] for part in (first, later) for x in part for name in ("target", "detail")])
    assert len(drawn.flatten(1).unique(dim=0)) == 2, "the first two of three"
    held = torch.stack([data.val_set[index]["source"] for index in range(2)])
    bank = torch.cat([batch["image"] for batch in data.banks()["source"]])
    assert len(bank) == 4
    assert torch.cdist(held.flatten(1), bank.flatten(1)).min() > 0
    assert sum(len(batch["image"]) for batch in data.banks()["target"]) == 2


def test_folders_below_and_paths_of_their_own_count(tmp_path):
    few_shot(tmp_path / "a", ("source/deep", 3))
    few_shot(tmp_path / "b", ("few", 1))
    data = FewShotFoldersDataModule(tmp_path / "a", target=str(tmp_path / "b" / "few"), image_size=16, num_val=1, channels=1)
    assert next(iter(prepared(data).train_dataloader()))["target"].shape == (2, 1, 16, 16)


def test_digits_have_ten_targets_and_the_picture_that_is_wanted():
    data = prepared(FewShotDigitsDataModule(num_train=100, num_val=8, batch_size=50))
    assert len(data.bank_sets["target"]) == 10
    batch = next(iter(data.val_dataloader()))
    torch.testing.assert_close(batch["styled"], restyle(batch["source"], "bold"))
    assert batch["styled"].abs().max() <= 1
    assert torch.equal(restyle(batch["source"], "negative"), -restyle(batch["source"], "bold"))
    seeds = [prepared(FewShotDigitsDataModule(num_train=100, num_val=8, seed=seed)).bank_sets["target"].parts["image"] for seed in (0, 1)]
    assert not torch.equal(*seeds)


def _cut(path):
    path.write_bytes(path.read_bytes()[:60])


@pytest.mark.parametrize(
    ("spoil", "error", "says"),
    [
        (lambda root: [path.unlink() for path in (root / "target").iterdir()], WrongRootError, "target=.* holds 0 images"),
        (lambda root: [path.unlink() for path in sorted((root / "source").iterdir())[2:]], WrongRootError, "holds 2 images .* at least 3"),
        (lambda root: (root / "target").rename(root / "others"), WrongRootError, "target=.* is no folder"),
        (lambda root: _cut(root / "target" / "00000.png"), BrokenRecordError, "00000.png: image"),
        (lambda root: (root / "target" / "00000.png").write_text("no picture"), BrokenRecordError, "can't be decoded"),
        (lambda root: (root / "target" / "00000.png").write_bytes(b""), BrokenRecordError, "00000.png"),
        (
            lambda root: Image.fromarray(np.zeros((4, 4), np.float32)).save(root / "target" / "00000.tif"),
            BrokenRecordError,
            "mode F of Pillow",
        ),
    ],
)
def test_bad_files_are_named(spoil, error, says, tmp_path):
    data = folders(tmp_path, shots=None)
    spoil(tmp_path)
    with pytest.raises(error, match=says):
        list(prepared(data).banks()["target"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"channels": 9}, "channels is 9: give 3 for colours, or 1 for grey"),
        ({"shots": 0}, "shots is 0"),
        ({"image_size": 4}, "image_size is 4"),
        ({"num_val": 0}, "num_val is 0"),
    ],
)
def test_wrong_numbers_are_named(arguments, says):
    with pytest.raises(ValueError, match=says):
        FewShotFoldersDataModule(**arguments)


def test_more_shots_than_images_and_unreadable_folders(tmp_path):
    with pytest.raises(WrongRootError, match=r"holds 3 images .* at least 5"):
        folders(tmp_path, shots=5).check_root()
    if os.getuid():
        (tmp_path / "target").chmod(0)
        with pytest.raises(BrokenRecordError, match="may not be read"):
            folders(tmp_path).check_root()
    with pytest.raises(ValueError, match="shots is 30"):
        FewShotDigitsDataModule(num_train=20, shots=30)
    with pytest.raises(RuntimeError, match="setup"):
        FewShotDigitsDataModule().banks()
