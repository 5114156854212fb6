"""``lit neighbours``: the file that the streams of crops read."""

import numpy as np
import pytest

from lit_methods.cli.main import main
from lit_methods.cli.neighbours import images_of
from lit_methods.datamodules import NeighbourCropsDataModule
from lit_methods.datamodules.vision import fake

QUICK = ["--model", "vit_tiny_patch16_224", "--untrained", "--number", "2"]


def test_each_image_gets_its_nearest_ones_and_the_datamodule_reads_them(tmp_path, capsys):
    fake.coco(tmp_path, 4, 2)
    out = tmp_path / "made" / "nearest.npz"
    assert main(["neighbours", str(tmp_path / "train2017"), str(out), *QUICK]) == 0
    assert "2 neighbours of each of 4 images" in capsys.readouterr().out
    found = np.load(out)["nns"]
    assert found.shape == (4, 2)
    assert all(number not in row and len(set(row)) == 2 for number, row in enumerate(found))
    data = NeighbourCropsDataModule(tmp_path, nearest=out, neighbours=2, image_size=16, local_size=8, batch_size=2)
    data.setup("fit")
    assert next(iter(data.train_dataloader()))["patch_global"].shape == (2, 2, 2, 3, 16, 16)
    assert main(["neighbours", str(tmp_path / "train2017"), str(out), *QUICK]) == 2
    assert "--force" in capsys.readouterr().err


def test_class_folders_stand_in_the_order_of_the_reader(tmp_path):
    fake.imagenet(tmp_path, ("n02", "n01"), 2)
    assert [path.name for path in images_of(tmp_path / "train")] == ["n01_0.JPEG", "n01_1.JPEG", "n02_0.JPEG", "n02_1.JPEG"]


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["nowhere", "out.npz"], 2, "is no folder"),
        (["train2017", "out.json"], 2, "isn't called .npz"),
        (["train2017", "out.npz", "--number", "0"], 2, "must be 1 or more"),
        (["train2017", "out.npz", "--number", "3"], 1, "has 3 images: 3 neighbours of each need more"),
        (["train2017", "out.npz", "--model", "vit_tiny_patch17", "--untrained", "--number", "1"], 1, "has no network"),
    ],
)
def test_mistakes_are_told(tmp_path, monkeypatch, capsys, words, status, said):
    monkeypatch.chdir(tmp_path)
    fake.coco(tmp_path, 3, 1)
    assert main(["neighbours", *words]) == status
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out.npz").exists()


def test_a_broken_image_is_named_and_nothing_is_written(tmp_path, capsys):
    fake.coco(tmp_path, 4, 1)
    broken = sorted((tmp_path / "train2017").iterdir())[2]
    broken.write_bytes(broken.read_bytes()[:200])
    assert main(["neighbours", str(tmp_path / "train2017"), str(tmp_path / "out.npz"), *QUICK]) == 1
    assert broken.name in capsys.readouterr().err
    assert not (tmp_path / "out.npz").exists()
