"""Every datamodule with a root, its release broken in every way: an error that names the file, or the same data, in seconds.

What can't be told from other data is let through, and listed in ``OTHER_DATA`` with the reason.
"""

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import corruptions
import numpy as np
import pytest
import torch
from corruptions import KINDS, Broken, Outcome, Unfit, read_all, representatives, trial
from test_fake_releases import CASES, WITH_ROOT, written

from lit_methods import datamodules
from lit_methods.datamodules.errors import BrokenRecordError
from lit_methods.datamodules.fake import path_arguments, text, write_fake
from lit_methods.datamodules.retrieval.fake import trec
from lit_methods.datamodules.vision.fake import cifar

IDS = [f"{name}-{'-'.join(map(str, arguments.values()))}" for name, arguments in CASES]
Given = dict[str, Any]


def _with_label_list(root: Path) -> Given:
    cifar(root, number=2)
    text(root / "labels.txt", "0", "3")
    data = datamodules.CIFARDataModule(root)
    return {"data": data, "label_list": root / "labels.txt", "batch_size": 1, "ratio": 1}


def _with_tokenizer(root: Path) -> Given:
    folder = write_fake(datamodules.IOIActivations, None, tokenizer=root / "tokenizer")["tokenizer"]
    return written("TextDataModule", {"level": "byte"}, root) | {"level": "tokenizer", "tokenizer": folder, "block_size": 16}


def _trec(root: Path) -> Given:
    trec(root)
    return {"root": root, "train_from": "judgements", "train_share": 0.5, "batch_size": 4}


# arguments that name files beside a release, and a layout that no argument asks for: datamodule, which of the files, who writes them
FURTHER: dict[str, tuple[str, str, Callable[[Path], Given]]] = {
    "descriptions": ("FewShotDataModule", r"^words", lambda root: written("FewShotDataModule", {"descriptions": "words.json"}, root)),
    "class_list": (
        "GenerativeImageNetDataModule",
        r"^classes",
        lambda root: written("GenerativeImageNetDataModule", {"class_list": "classes.txt"}, root),
    ),
    "null_embedding": (
        "LatentShardsDataModule",
        r"^negative",
        lambda root: written("LatentShardsDataModule", {"null_embedding": "negative.pt"}, root),
    ),
    "masks clean": (
        "NoisyMasksDataModule",
        r"^masks",
        lambda root: (given := written("NoisyMasksDataModule", {"masks": "masks"}, root)) | {"clean": given["masks"]},
    ),
    "val_list test_list": (
        "OrganSlicesDataModule",
        r"^(val|test)\.txt",
        lambda root: written("OrganSlicesDataModule", {"name": "acdc", "val_list": "val.txt", "test_list": "test.txt"}, root),
    ),
    "superpixel_root": (
        "NuScenesDataModule",
        r"^superpixels",
        lambda root: written("NuScenesDataModule", {"superpixel_root": "superpixels"}, root),
    ),
    "nearest cls_nearest": (
        "NeighbourCropsDataModule",
        r"nearest\.npz$",
        lambda root: written("NeighbourCropsDataModule", {"cls_root": "classes", "cls_nearest": "cls_nearest.npz"}, root),
    ),
    "pairs faces": (
        "FaceRestorationDataModule",
        r"^(pairs|faces)/",
        lambda root: written("FaceRestorationDataModule", {"pairs": "pairs", "faces": "faces"}, root),
    ),
    "maps": ("FastMRIDataModule", r"^maps/", lambda root: written("FastMRIDataModule", {"maps": "maps"}, root)),
    "examples": ("SearchDataModule", r"^examples", lambda root: written("SearchDataModule", {"examples": "examples.jsonl"}, root)),
    "(a collection of TREC)": ("SearchDataModule", r"", _trec),
    "label_list": ("SemiSupervisedDataModule", r"^labels", _with_label_list),
    "tokenizer": ("TextDataModule", r"^tokenizer/", _with_tokenizer),
}
# written by us; encoded once by a network of the user's; read by `lit predict` alone, tests/datamodules/test_detection_data.py breaks it
NOT_READ = {"cache", "labels_folder", "images", "predict", "input", "stills"}
VALUES = r"\.(bin|label|npy|npz|h5|mat|jpe?g|tar|safetensors|pth)$|_batch(_\d)?$|/(train|test)$|ubyte$|\.txt$"
IN_FOLDERS = "|".join(
    [
        r"^(Generative)?ImageNet|^Harvested|^NoisyImages|^Kitti.*(bin|npy)$|^LatentData.*\.npy$|^Organ|^SuperRes",
        r"^FewShot.*imagenet.*JPEG$|^Semi.*JPEG$|^FastMRI|^CC359|^StanfordKnee",
    ]
)
OTHER_DATA: list[tuple[str, str, str]] = [  # kinds of corruption, datamodules and files, why nobody can tell it from other data
    ("zeroed", VALUES, "a block of zeros is black pixels, silence, class 0: these formats have no check sum of their values"),
    ("random|nan", r"_X\.bin$|/(train|val|test)\.bin$|ubyte$", "every byte is a pixel, every two are a token"),
    ("nan", r"\.label$", "the upper half of a label is the number of an instance, which isn't read"),
    ("missing", IN_FOLDERS, "files are those that lie in the folder: a release may have fewer"),
    ("other size", r"\.(jpe?g|png)$", "photographs have any size"),
    ("other size", r"cars_annos\.mat$", "the last image is gone: a release may have fewer"),
    ("other size", r"^LatentData.*celeba_256\.npy$", "all latents lie in one array, which has any size"),
    (
        "repeated rows",
        r"\.(npy|npz|h5|safetensors)$|^(FashionRetrieval|Instruction|SentencePairs|Ratings|Text)|examples\.jsonl$",
        "more of the same is data: rows have no ids",
    ),
    ("repeated rows", r"negative\.pt$", "a prompt has any number of tokens"),
    ("nan|1e300|huge claim", r"quality\.jsonl$", "its numbers are words of sentences"),
    ("huge claim", r"examples\.jsonl$", "a score may be any number that 32 bits hold"),
    ("missing", r"^Search.*qrels/(dev|test)\.tsv$", "where there are no judgements of one split, those of the other stand in for them"),
    ("missing|without key", r"^Text.*\.txt$", "every word is data, and a corpus may have fewer parts"),
    ("truncated", r"^Kitti.*\.lst$", "the last word of a line names the labels, which go by the name of the scan"),
    ("truncated", r"^FashionRetrieval.*(labels|shoes).*\.txt$", "a caption may end within a word"),
    ("truncated", r"^Text.*\.txt$|^Ratings", "a text may end within a word, a rating within a number"),
    ("missing", r"^Restoration|^FaceRestoration.*(train|faces)/", "images are those that lie in the folder"),
]


@pytest.fixture(autouse=True)
def _one_thread(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forks don't take the threads along; what is made at the first use lies in a cache of the tests."""
    monkeypatch.setenv("LIT_METHODS_CACHE", str(tmp_path_factory.getbasetemp() / "cache-of-corruptions"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def excused(kind: str, file: str) -> bool:
    """Whether data that are other ones than before can't be told from good ones; ``file`` begins with the datamodule's name."""
    return any(re.fullmatch(kinds, kind) and re.search(files, file, re.IGNORECASE) for kinds, files, _ in OTHER_DATA)


def trials(
    name: str, arguments: dict[str, Any], root: Path, chosen: Any, write: Callable[[Path], Given] | None = None
) -> Iterator[tuple[str, str, Outcome, bool]]:
    """Kind, file, outcome and whether it is right, of all trials of a release that ``chosen(kind, file)`` wants."""
    given = written(name, arguments, root) if write is None else write(root)
    before = read_all(name, given)
    assert read_all(name, given) == before, "the same twice"
    for path in representatives(root):
        file = path.relative_to(root).as_posix()
        for kind, break_it in KINDS.items():
            if not chosen(kind, file):
                continue
            broken = Broken(root, path, break_it)
            try:
                broken.__enter__()
            except Unfit:
                continue
            try:
                outcome = trial(name, given, before)
            finally:
                broken.__exit__()
            yield (
                kind,
                file,
                outcome,
                outcome.clear(path)
                or (outcome.kind == "differs" and excused(kind, f"{name}-{'-'.join(map(str, arguments.values()))}/{file}")),
            )
    assert read_all(name, given) == before, "all is as it was"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "arguments"), CASES, ids=IDS)
def test_every_corruption_is_told(name: str, arguments: dict[str, Any], tmp_path: Path, record_property: Any) -> None:
    found = list(trials(name, arguments, tmp_path / "root", lambda kind, file: True))
    record_property("tried", len(found))
    wrong = [(kind, file, outcome.kind, outcome.error, outcome.message[:160]) for kind, file, outcome, right in found if not right]
    assert len(found) > 8
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.slow
@pytest.mark.parametrize("which", FURTHER)
def test_every_corruption_of_further_files_is_told(which: str, tmp_path: Path, record_property: Any) -> None:
    name, files, write = FURTHER[which]
    found = list(trials(name, {}, tmp_path / "root", lambda kind, file: re.search(files, file) is not None, write))
    record_property("tried", len(found))
    wrong = [(kind, file, outcome.kind, outcome.error, outcome.message[:160]) for kind, file, outcome, right in found if not right]
    assert len(found) > 8
    assert not wrong, "\n".join(map(str, wrong))


def test_every_argument_that_names_a_file_is_broken_by_these_tests() -> None:
    """So that a datamodule, or a file that it takes, can't come without them."""
    assert {name for name, _ in CASES} == set(WITH_ROOT)
    files = {argument for name in datamodules.__all__ for argument in path_arguments(getattr(datamodules, name))}
    tried = {key for _, arguments in CASES for key in arguments if key in files}
    tried |= {argument for arguments in FURTHER for argument in arguments.split()}
    assert files - tried - NOT_READ == {"root"}


SAMPLE = [  # less than the tenth part: each kind, and each way of reading
    ("CIFARDataModule", {}, r"batches\.meta|data_batch_3"),
    ("RetrievalImagesDataModule", {}, r"images\.txt|101.*jpg"),
    ("OrganSlicesDataModule", {"name": "synapse"}, r"slice000\.npz"),
    ("LatentDataModule", {}, r"\.npy"),
    ("FewShotDataModule", {"name": "dtd"}, r"\.json"),
]


@pytest.mark.parametrize(("name", "arguments", "files"), SAMPLE, ids=[name for name, *_ in SAMPLE])
def test_some_corruptions_are_told(name: str, arguments: dict[str, Any], files: str, tmp_path: Path) -> None:
    start = time.process_time()
    found = list(trials(name, arguments, tmp_path / "root", lambda kind, file: re.search(files, file) is not None))
    wrong = [(kind, file, outcome.kind, outcome.error, outcome.message[:160]) for kind, file, outcome, right in found if not right]
    assert len(found) > 8
    assert not wrong, "\n".join(map(str, wrong))
    assert time.process_time() - start < 20


def test_broken_scans_are_skipped_and_counted(tmp_path: Path) -> None:
    for kind in ("truncated", "huge claim", "pipe", "other media"):
        root = tmp_path / kind.replace(" ", "-")
        given = written("NuScenesDataModule", {"version": "v1.0-mini"}, root)
        pictures = sorted((root / "samples" / "CAM_FRONT").iterdir())
        KINDS[kind](pictures[0])
        with pytest.raises(BrokenRecordError, match=re.escape(pictures[0].name)):
            read_all("NuScenesDataModule", given | {"cameras": 6})
        data = datamodules.NuScenesDataModule(**given, cameras=6, on_broken="skip")
        data.prepare_data()
        data.setup("fit")
        with pytest.warns(UserWarning, match=re.escape(pictures[0].name)):
            assert len(list(data.train_dataloader())) > 0
        assert data.train_set.num_skipped > 0, kind


def test_a_trial_notices_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"

    def outcome_of(read: Any) -> Outcome:
        monkeypatch.setattr(corruptions, "read_all", read)
        return trial("x", {}, "before")

    def late(*_: Any) -> str:
        time.sleep(60)
        return "before"

    def large(*_: Any) -> str:
        assert np.ones(100_000_000).sum()  # 800 MB
        return "before"

    def elsewhere(*_: Any) -> str:
        raise ValueError("something is wrong")

    def named(*_: Any) -> str:
        raise BrokenRecordError(path, "image", "is broken")

    monkeypatch.setattr(corruptions, "MEMORY", 1 << 29)
    assert outcome_of(lambda *_: "before").clear(path)
    assert outcome_of(named).clear(path)
    for read in (lambda *_: "after", elsewhere, large):
        assert not outcome_of(read).clear(path)
    monkeypatch.setattr(corruptions, "SECONDS", -1.8)
    assert outcome_of(late).kind == "late"
