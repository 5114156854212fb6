"""Tiny releases: every public datamodule that reads a root gets one, in each of its layouts, and reads it."""

import hashlib
import inspect
import time
from pathlib import Path
from typing import Any

import pytest

from lit_methods import datamodules
from lit_methods.datamodules.fake import path_arguments, write_fake
from lit_methods.datamodules.fewshot.releases import LAYOUTS

WITH_ROOT = sorted(name for name in datamodules.__all__ if "root" in inspect.signature(getattr(datamodules, name)).parameters)
SMALL: dict[str, dict[str, Any]] = {  # less to read in a test
    "AgeDataModule": {"image_size": 32},
    "FashionRetrievalDataModule": {"image_size": 32, "batch_size": 4},
    "FewShotDataModule": {"image_size": 32},
    "GenerativeImageNetDataModule": {"image_size": 32},
    "ImageNetDataModule": {"image_size": 32},
    **{
        f"{name}DataModule": {"image_size": (16, 24), "resize": None, "batch_size": 2}
        for name in ("UCF101Actions", "JHMDBActions", "YouTubeVOS")
    },
    "NeighbourCropsDataModule": {"image_size": 32, "local_size": 16, "batch_size": 4},
    "LatentDataModule": {"image_size": 64, "num_val": 4},
    "LongTasksDataModule": {"length": 2048, "samples": 4, "num_train": 4},
    "NoisyMasksDataModule": {"crop": 32},
    "NuScenesDataModule": {"image_size": (32, 64)},
    "RetrievalImagesDataModule": {"image_size": 32, "classes_per_batch": 4},
    "SuperResolutionDataModule": {"patch_size": 32},
}
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in WITH_ROOT if name != "OrganSlicesDataModule"),  # it has no default that is a release
    ("AgeDataModule", {"name": "imdb_wiki"}),
    ("CIFARDataModule", {"name": "cifar100"}),
    *(("FashionRetrievalDataModule", {"name": name}) for name in ("shoes", "fashion200k")),
    *(("FewShotDataModule", {"name": name}) for name in LAYOUTS if name != "eurosat"),
    *(("DetectionDataModule", {"layout": name}) for name in ("lvis", "voc")),
    ("ImageNetDataModule", {"class_list": "classes.txt"}),
    *(
        ("KittiStyleDataModule", {"dataset": name, "neighbours": 0 if name in ("semanticstf", "synlidar", "daps3d", "synth4d") else 1})
        for name in ("scribblekitti", "semanticposs", "semanticstf", "synlidar", "rellis3d", "daps3d", "synth4d")
    ),
    ("KittiStyleDataModule", {"mode": "semi_supervised", "label_fraction": 25}),
    ("LongTasksDataModule", {"task": "quality"}),
    ("NeighbourCropsDataModule", {"cls_root": "imagenet", "class_map": "classes.json"}),
    ("NuScenesDataModule", {"mode": "segment", "version": "v1.0-mini"}),
    ("NuScenesDataModule", {"mode": "semi_supervised", "label_fraction": 1, "neighbours": 1}),
    ("OrganSlicesDataModule", {"name": "synapse"}),
    ("OrganSlicesDataModule", {"name": "acdc", "train_list": "train.txt"}),
    *(("RatingsDataModule", {"format": name}) for name in ("movielens", "lastfm", "lightgcn")),
    ("RatingsDataModule", {"mode": "autoencoder"}),
    *(("RetrievalImagesDataModule", {"name": name}) for name in ("cars", "sop", "inat")),
    ("SVHNDataModule", {"extra": True}),
    ("ScanNetDataModule", {"labelled": "points20", "mask_source": "files", "masks": "views"}),
    ("SuperResolutionDataModule", {"scale": 4}),
    ("TextDataModule", {"level": "byte"}),
    ("UCF101ActionsDataModule", {"annotations": "tubes"}),
]


def written(name: str, arguments: dict[str, Any], root: Path) -> dict[str, Any]:
    """Arguments that read the release."""
    if name == "UCF101ActionsDataModule":
        pytest.importorskip("av", reason="PyAV, which writes and reads videos")
    kind = getattr(datamodules, name)
    places = {key: root / value for key, value in arguments.items() if key in path_arguments(kind)}
    given = SMALL.get(name, {}) | arguments | places
    return given | write_fake(kind, root, **given)


@pytest.mark.parametrize(("name", "arguments"), CASES, ids=[f"{name}-{'-'.join(map(str, a.values()))}" for name, a in CASES])
def test_a_release_is_written_and_read(name: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    root, start = tmp_path / "root", time.process_time()
    given = written(name, arguments, root)
    assert time.process_time() - start < 20, "written in seconds"
    files = [path for path in root.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 8e6, "a few MB"
    data = getattr(datamodules, name)(**given)
    data.check_root("fit")
    data.prepare_data()
    for stage in ("fit", "test"):
        data.setup(stage)
    for part in ("val", "test") if name == "VideoPromptsDataModule" else ("train", "val", "test"):  # which isn't for training
        loaders = getattr(data, f"{part}_dataloader")()
        for loader in loaders if isinstance(loaders, list) else [loaders]:
            assert next(iter(loader)), part


def digest(root: Path) -> dict[str, str]:
    files = [path for path in root.rglob("*") if path.is_file()]
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("name", ["AgeDataModule", "STL10DataModule", "NuScenesDataModule", "RatingsDataModule"])
def test_the_same_arguments_give_the_same_bytes(name: str, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        written(name, {}, tmp_path / folder)
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != {}


def test_the_sizes_of_a_model_are_met(tmp_path: Path) -> None:
    for layout in ("movielens", "lightgcn"):
        given = write_fake(datamodules.RatingsDataModule, tmp_path / layout, {"num_users": 33, "num_items": 210}, format=layout)
        data = datamodules.RatingsDataModule(**given, format=layout)
        data.setup("fit")
        assert (data.num_users, data.num_items) == (33, 210)


def test_a_class_without_a_writer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="DigitsDataModule has no writer"):
        write_fake(datamodules.DigitsDataModule, tmp_path)
