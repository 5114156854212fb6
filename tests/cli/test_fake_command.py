"""``lit fake``: what it writes, what it says, and what it refuses."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_methods.catalog import configs_folder
from lit_methods.cli.main import main
from lit_methods.datamodules.folders import COMMON


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(COMMON, raising=False)


def test_a_datamodule(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fake", "RetrievalImagesDataModule", "there", "name=sop", "classes_per_batch=2"]) == 0
    said = capsys.readouterr().out
    assert "made up" in said
    assert "--data RetrievalImagesDataModule --data.name sop --data.classes_per_batch 2 --data.root there" in said
    assert Path("there/Ebay_train.txt").is_file()


def test_a_config_is_found_by_the_common_root(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Images, masks and lists lie where the config has them, the data of a callback, too."""
    assert main(["fake", "configs/full/random_pruning_cifar.yaml", "there"]) == 0
    said = capsys.readouterr().out
    assert "LIT_METHODS_DATA=there lit fit --config configs/full/random_pruning_cifar.yaml" in said
    assert "trainer.callbacks+[0].init_args.unknown.init_args.root is then there/cifar" in said
    assert sorted(os.listdir("there/cifar")) == ["cifar-10-batches-py", "cifar-100-python"]
    monkeypatch.setenv(COMMON, "there")
    from lit_methods.datamodules import CIFARDataModule

    CIFARDataModule("data/cifar", "cifar100").check_root()


def test_a_config_with_built_in_data_says_its_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fake", "configs/superflow.yaml", "there"]) == 0
    assert "lit fit --config configs/superflow.yaml --data.init_args.root=there" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["CIFARDatamodule", "new"], "nearest: CIFARDataModule"),
        (["DigitsDataModule", "new"], "DigitsDataModule reads no root of its own"),
        (["SemiSupervisedDataModule", "new"], "reads no root of its own"),
        (["configs/full/tmc_cub.yaml", "new"], "nearest: configs/full/tcm_cub.yaml"),
        (["configs/tcm.yaml", "new"], "has no datamodule that reads a root"),
        (["CIFARDataModule", "used"], "used is not empty: give a new folder"),
        (["CIFARDataModule", "used/a"], "used/a is a file: give a new folder"),
        (["CIFARDataModule", "new", "nam=cifar100"], "nearest: name"),
        (["CIFARDataModule", "new", "name"], "write <argument>=<value>"),
        (["CIFARDataModule", "new", "name=cifar11"], "name is 'cifar11': give one of cifar10, cifar100"),
        (["configs/full/tcm_cub.yaml", "new", "name=sop"], "a config has its arguments already"),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("used").mkdir()
    Path("used/a").touch()
    assert main(["fake", *words]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert not Path("new").exists()
    assert os.listdir("used") == ["a"]


def paths_of(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [path for inner in value.values() for path in paths_of(inner)]
    if isinstance(value, list):
        return [path for inner in value for path in paths_of(inner)]
    return [value] if isinstance(value, str) and value.startswith("data/") else []


def with_data() -> list[Path]:
    """Full configs that read something; the data of the others are made, unless a root is given."""
    files = sorted((configs_folder() / "full").glob("*.yaml"))
    return [file for file in files if paths_of(yaml.safe_load(file.read_text(encoding="utf-8")))]


@pytest.mark.parametrize("file", with_data(), ids=lambda file: file.stem)
def test_every_path_of_data_in_a_full_config_is_written(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fake", f"configs/full/{file.name}", "there"]) == 0
    assert "LIT_METHODS_DATA=there" in capsys.readouterr().out
    wanted = [path for path in paths_of(yaml.safe_load(file.read_text())) if path != "data/celebahq256"]  # latents stand in for it
    assert wanted
    assert [path for path in wanted if not Path("there", path.removeprefix("data/")).exists()] == []
