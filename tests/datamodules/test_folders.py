"""What counts in a folder of data, and where paths point: over all datamodules."""

import inspect
import shutil
from pathlib import Path

import pytest
import yaml
from small_roots import ROOTS, everything
from torch import Tensor

from lit_methods import datamodules
from lit_methods.catalog import configs_folder
from lit_methods.datamodules.errors import WrongRootError
from lit_methods.datamodules.folders import COMMON, counts, data_path, listed, user_path
from lit_methods.datamodules.label_store import LabelStore

JUNK = ("._{}", ".DS_Store", "Thumbs.db", ".hidden.png", "desktop.ini")


def flat(sample) -> list:
    if isinstance(sample, dict):
        return [value for key in sorted(sample) for value in flat(sample[key])]
    if isinstance(sample, list | tuple):
        return [value for part in sample for value in flat(part)]
    return [sample.tolist() if isinstance(sample, Tensor) else sample]


@pytest.mark.parametrize("name", ROOTS)
def test_what_systems_leave_in_folders_is_no_data(name, tmp_path):
    write, make = ROOTS[name]
    root = tmp_path / ".cache" / "root"  # the root's own name may be hidden
    root.parent.mkdir()
    write(root)
    expected = flat(everything(make(root)))
    folders = [root, *(path for path in root.rglob("*") if path.is_dir())]
    for folder in folders:
        for path in [path for path in folder.iterdir() if path.is_file()]:
            (folder / f"._{path.name}").write_bytes(b"\0\5\26\7no data")
        for junk in JUNK[1:]:
            (folder / junk).write_bytes(b"no data")
        shutil.copytree(folder, folder / "__MACOSX") if folder != root and not list(folder.glob("*/")) else (folder / "__MACOSX").mkdir()
    assert str(flat(everything(make(root)))) == str(expected)


def test_a_label_store_may_lie_in_a_folder_that_was_looked_at(tmp_path):
    (tmp_path / ".DS_Store").write_bytes(b"x")
    (tmp_path / "Thumbs.db").write_bytes(b"x")
    assert len(LabelStore.create(tmp_path, [])) == 0
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"has notes\.txt in it"):
        LabelStore.create(tmp_path, [])


def test_names_that_count(tmp_path):
    assert [name for name in ("a.png", "._a.png", ".a", "Thumbs.db", "__MACOSX", "thumbs") if counts(name)] == ["a.png", "thumbs"]
    for name in ("b/c.PNG", "b/a.png", "b/._a.png", ".d/a.png", "a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [path.relative_to(tmp_path).as_posix() for path in listed(tmp_path, "**/*", [".png"])] == ["b/a.png", "b/c.PNG"]
    assert listed(tmp_path / "none") == []


# ---- paths -----------------------------------------------------------------------------------------------------------------------------

MORE = {  # what a datamodule needs beside the path that is looked at
    "LatentDataModule": {"root": "r", "autoencoder": "a"},
    "NoisyMasksDataModule": {"root": "r", "masks": "m"},
    "OrganSlicesDataModule": {"root": "r", "name": "acdc"},
    "KittiStyleDataModule": {"root": "r"},
    "S3DISDataModule": {"root": "r"},
    "ScanNetDataModule": {"root": "r"},
    "NuScenesDataModule": {},
    "TextDataModule": {"level": "char"},
}
WITH_PATHS = [
    (name, argument.name)
    for name in sorted(datamodules.__all__)
    for argument in inspect.signature(getattr(datamodules, name)).parameters.values()
    if "Path" in str(argument.annotation)
]


def made(name, **paths):
    more = dict(MORE.get(name, {}))
    if name == "SemiSupervisedDataModule":
        more["data"] = datamodules.DigitsDataModule()
    if "tokenizer" in paths and name in ("TextDataModule", "RepeatedTextDataModule"):
        more["level"] = "tokenizer"
    return getattr(datamodules, name)(**(more | paths))


def paths_of(module) -> list[Path]:
    values = [value for key, value in vars(module).items() if not key.startswith("_")]
    values += [inner for value in values if isinstance(value, dict) for inner in value.values()]
    return [value for value in values if isinstance(value, Path)]


@pytest.mark.parametrize(("name", "argument"), WITH_PATHS)
def test_home_and_the_common_root_stand_in_every_path(name, argument, tmp_path, monkeypatch):
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path))
    for given in (Path("~/some/place"), "~/some/place"):
        assert tmp_path / "some" / "place" in paths_of(made(name, **{argument: given}))
    if argument in ("tokenizer", "labels_folder", "cache"):  # no data
        return
    monkeypatch.setenv(COMMON, "~/common")
    (tmp_path / "common" / "place").mkdir(parents=True)
    assert tmp_path / "common" / "place" in paths_of(made(name, **{argument: "data/place"}))


def test_the_rule_of_the_common_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(COMMON, raising=False)
    common = tmp_path / "common"
    assert data_path(None) is None
    assert user_path(None) is None
    assert data_path("data/a") == Path("data/a")
    monkeypatch.setenv(COMMON, str(common))
    assert data_path("data/a") == common / "a", "an error names the place where it is to be put"
    (common / "data" / "a").mkdir(parents=True)
    assert data_path("data/a") == common / "data" / "a"
    (common / "a").mkdir()
    (common / "b").mkdir()
    assert data_path("data/a") == common / "a"
    assert data_path("b") == common / "b"
    assert data_path(tmp_path / "b") == tmp_path / "b"
    (tmp_path / "data" / "a").mkdir(parents=True)
    assert data_path("data/a") == Path("data/a"), "the current folder wins"


@pytest.mark.parametrize("name", ROOTS)
def test_a_missing_root_is_told_before_anything_is_read(name, tmp_path):
    write, make = ROOTS[name]
    module = make(tmp_path / "none")
    with pytest.raises(WrongRootError) as early:
        module.check_root("fit")
    with pytest.raises(WrongRootError) as late:
        everything(module)
    assert str(early.value) == str(late.value)
    assert str(tmp_path / "none") in str(early.value)
    assert not (tmp_path / "none").exists(), "a missing root isn't made"
    write(tmp_path / "none")
    for stage in ("fit", "validate", "test", "predict"):
        make(tmp_path / "none").check_root(stage)


NEED_A_ROOT = {"KittiStyleDataModule", "S3DISDataModule", "ScanNetDataModule"}
NEED_A_ROOT |= {"JHMDBActionsDataModule", "UCF101ActionsDataModule", "YouTubeVOSDataModule"}


@pytest.mark.parametrize("name", sorted(set(datamodules.__all__) - NEED_A_ROOT))
def test_built_in_data_need_no_root(name):
    arguments = {"data": datamodules.DigitsDataModule()} if name == "SemiSupervisedDataModule" else {}
    getattr(datamodules, name)(**arguments).check_root("fit")


def paths_in(data) -> list[tuple[str, str]]:
    """Keys and paths of a config's part on data."""
    inner = data["init_args"]
    found = [(key, inner[key]) for name, key in WITH_PATHS if name == data["class_path"].split(".")[-1] and inner.get(key) is not None]
    return found + [one for value in inner.values() if isinstance(value, dict) and "init_args" in value for one in paths_in(value)]


@pytest.mark.parametrize("file", sorted((configs_folder() / "full").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_full_configs_have_their_data_below_one_folder(file):
    found = paths_in(yaml.safe_load(file.read_text())["data"])
    assert found
    # a tokenizer may come with the model
    assert [(key, path) for key, path in found if not path.startswith("data/") and key != "tokenizer"] == []
