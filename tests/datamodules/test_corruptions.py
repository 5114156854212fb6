"""Every datamodule with a root, its release broken in every way: an error that names the file, or the same data, in seconds.

What can't be told from other data is let through, and listed in ``OTHER_DATA`` with the reason.
"""

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import corruptions
import numpy as np
import pytest
import torch
from corruptions import KINDS, Broken, Outcome, Unfit, read_all, representatives, trial
from test_fake_releases import CASES, written

from lit_methods import datamodules
from lit_methods.datamodules.errors import BrokenRecordError

IDS = [f"{name}-{'-'.join(map(str, arguments.values()))}" for name, arguments in CASES]
VALUES = r"\.(bin|label|npy|npz|h5|mat|jpe?g|tar|safetensors|pth)$|_batch(_\d)?$|/(train|test)$|ubyte$|\.txt$"
IN_FOLDERS = (
    r"^(Generative)?ImageNet|^Harvested|^Kitti.*(bin|npy)$|^LatentData.*\.npy$|^Organ|^SuperRes|^FewShot.*imagenet.*JPEG$|^Semi.*JPEG$"
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
        r"\.(npy|npz|h5|safetensors)$|^(FashionRetrieval|Instruction|SentencePairs|Ratings|Text)",
        "more of the same is data: rows have no ids",
    ),
    ("missing|without key", r"^Text.*\.txt$", "every word is data, and a corpus may have fewer parts"),
    ("truncated", r"^Kitti.*\.lst$", "the last word of a line names the labels, which go by the name of the scan"),
    ("truncated", r"^FashionRetrieval.*(labels|shoes).*\.txt$", "a caption may end within a word"),
    ("truncated", r"^Text.*\.txt$|^Ratings", "a text may end within a word, a rating within a number"),
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


def trials(name: str, arguments: dict[str, Any], root: Path, chosen: Any) -> Iterator[tuple[str, str, Outcome, bool]]:
    """Kind, file, outcome and whether it is right, of all trials of a release that ``chosen(kind, file)`` wants."""
    given = written(name, arguments, root)
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
