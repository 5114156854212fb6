"""What is kept of a run on disk: every medium comes back as it was, nothing is written twice, and a broken file is named."""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lit_methods.panels import (
    CloudMedia,
    CloudPanel,
    Curve,
    HistogramMedia,
    HistogramPanel,
    ImageMedia,
    ImagePanel,
    Media,
    TableMedia,
    TablePanel,
)
from lit_methods.reports import record as run_record
from lit_methods.reports.page import Record, ReportData, Section, record_line, render_report
from lit_methods.reports.record import flat_config, load_run, run_facts, save_run

RNG = np.random.default_rng(0)
POINTS = RNG.normal(size=(40, 3))
MEDIA: dict[str, Media] = {
    "a/image": ImageMedia(RNG.integers(0, 256, (7, 5, 3), dtype=np.uint8), "noise <b>"),
    "a/cloud": CloudMedia(POINTS.astype(np.float32), RNG.integers(0, 256, (40, 3), dtype=np.uint8), "cloud"),
    "a/labelled": CloudMedia(POINTS, np.zeros((40, 3), np.uint8), "scan", np.arange(40, dtype=np.int16) % 3, ("car", "road")),
    "a/histogram": HistogramMedia(np.array([3, 0, 5]), np.array([0.0, 1.0, 2.0, 4.0])),
    "a/table": TableMedia(("name", "value"), (("x", 1.5), ("nan", math.nan), ("inf", -math.inf), ("none", None), ("yes", True), ("n", 3))),
    "a/../../odd": ImageMedia(np.zeros((2, 2, 3), np.uint8), "an odd key"),
}
PANELS = (
    Curve("Loss", ("a/loss", "a/other/*"), note="falls", goal="min"),
    ImagePanel("Image", "a/image", "note"),
    CloudPanel("Cloud", "a/cloud"),
    CloudPanel("Labelled", "a/labelled"),
    HistogramPanel("Histogram", "a/histogram"),
    TablePanel("Table", "a/table"),
    ImagePanel("Odd", "a/../../odd"),
    ImagePanel("Later", "a/later"),
)


def assert_media_equal(actual: Any, expected: Any) -> None:
    assert type(actual) is type(expected)
    for field in dataclasses.fields(expected):
        ours, theirs = getattr(actual, field.name), getattr(expected, field.name)
        if isinstance(theirs, np.ndarray):
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)
        else:
            assert repr(ours) == repr(theirs)  # repr: NaN equals NaN, True isn't 1


def make(media: dict[str, Media] | None = None) -> ReportData:
    return ReportData(
        title="run <script>",
        status="interrupted",
        sections=(Section("A", PANELS, MEDIA if media is None else media, "summary", "https://arxiv.org/abs/1"), Section("B", ())),
        history=[Record(3, 0, {"a/loss": 1.5}), Record(7, 1, {"a/loss": math.inf})],
        message="why",
        progress=(("Epoch", "2 of 9"), ("Duration", "3 s")),
        config="model: 1\n",
        checkpoints=(("checkpoints/last.ckpt", "best", "loss 1"),),
        facts={"Git": {"commit": "abc"}, "Empty": {}},
        notes="my notes",
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    data = make()
    (tmp_path / "metrics.jsonl").write_text("".join(map(record_line, data.history)))
    (tmp_path / "notes.md").write_text(data.notes)
    save_run(tmp_path, data)
    return tmp_path


def test_everything_comes_back(folder: Path) -> None:
    loaded, data = load_run(folder), make()
    for key, item in MEDIA.items():
        assert_media_equal(loaded.sections[0].media[key], item)
    assert list(loaded.sections[0].media) == list(MEDIA)
    assert [dataclasses.replace(section, media={}) for section in loaded.sections] == [
        dataclasses.replace(section, media={}) for section in data.sections
    ]
    assert dataclasses.replace(loaded, sections=()) == dataclasses.replace(data, sections=())
    assert render_report(loaded) == render_report(data)  # the same report, drawn again
    assert load_run(folder, media=False).sections[0].media == {}


def test_a_medium_is_written_once_and_deleted_when_it_is_gone(folder: Path) -> None:
    media = folder / "media"
    before = {path.name: path.stat().st_mtime_ns for path in media.iterdir()}
    assert len(before) == len(MEDIA)
    assert all(path.parent == media for path in folder.rglob("*.png"))  # whatever the key
    stranger = media / "holiday.png"
    stranger.write_bytes(b"mine")
    os.utime(media, (0, 0))
    save_run(folder, make())
    assert media.stat().st_mtime == 0  # nothing was created, renamed or deleted there
    changed = MEDIA | {"a/image": ImageMedia(np.ones((7, 5, 3), np.uint8), "ones")}
    del changed["a/table"]
    save_run(folder, make(changed))
    after = {path.name: path.stat().st_mtime_ns for path in media.iterdir()}
    assert {name for name in before if name not in after} == {name for name in before if name.startswith(("a-image", "a-table"))}
    assert {name: after[name] for name in before if name in after} == {name: before[name] for name in before if name in after}
    assert stranger.read_bytes() == b"mine"


def test_a_full_disk_leaves_the_old_record(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: str | bytes) -> None:
        raise OSError(28, "No space left on device")

    old = (folder / "report.json").read_bytes()
    monkeypatch.setattr(run_record, "write_atomically", full)
    with pytest.raises(OSError, match="No space"):
        save_run(folder, make({"a/image": ImageMedia(np.ones((7, 5, 3), np.uint8), "ones")}))
    assert (folder / "report.json").read_bytes() == old
    assert_media_equal(load_run(folder).sections[0].media["a/image"], MEDIA["a/image"])


def test_nothing_is_pickled(folder: Path) -> None:
    for path in folder.glob("media/*.npz"):
        with np.load(path, allow_pickle=False) as arrays:
            assert all(arrays[name].dtype != object for name in arrays.files)


@pytest.mark.parametrize(("extension", "key"), [("png", "a/image"), ("npz", "a/cloud"), ("json", "a/table")])
def test_a_broken_or_missing_medium_is_named(folder: Path, extension: str, key: str) -> None:
    (path,) = folder.glob(f"media/{key.replace('/', '-')}-*.{extension}")
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match=rf"{path.name}: broken.*'{key}'"):
        load_run(folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{path.name} is missing.*'{key}'.*copy media/"):
        load_run(folder)
    assert load_run(folder, media=False).title == "run <script>"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record.pop("sections"), "'sections' is missing"),
        (lambda record: record.update(format=99), "format 99, this version reads 1"),
        (lambda record: record.update(status="done"), "status 'done' is none of running, finished"),
        (lambda record: record["sections"][0]["panels"][0].update(kind="Surve"), "panel kind 'Surve' is none of Curve"),
        (lambda record: record["sections"][0]["panels"][1].update(tint="red"), "tint"),
        (lambda record: record["sections"][0]["media"]["a/image"].pop("file"), "the medium 'a/image' has no file"),
        (lambda record: record.update(progress=3), "not a record of a run"),
    ],
)
def test_a_broken_record_is_named(folder: Path, change: Any, message: str) -> None:
    path = folder / "report.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=f"report.json.*{message}"):
        load_run(folder)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"report\.json: not a record"):
        load_run(folder)


def test_a_record_cannot_point_out_of_the_folder(folder: Path) -> None:
    path = folder / "report.json"
    outside = folder / "outside.json"
    outside.write_text('{"columns": ["secret"], "rows": []}')
    record = json.loads(path.read_text())
    record["sections"][0]["media"]["a/table"]["file"] = "../outside.json"
    path.write_text(json.dumps(record))
    with pytest.raises(FileNotFoundError, match=r"media/outside.json is missing"):
        load_run(folder)


def test_a_folder_with_metrics_alone_still_works(tmp_path: Path) -> None:
    folder = tmp_path / "probe" / "20260101-120000"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(record_line(Record(3, 0, {"loss": 1.5})))
    (folder / "git.json").write_text('{"commit": "abc", "dirty": false, "changes": []}')
    (folder / "environment.json").write_text('{"command": ["lit", "fit", "a b"], "gpus": ["x", "y"], "cuda": null}')
    loaded = load_run(folder)
    assert (loaded.title, loaded.status) == ("probe · 20260101-120000", "unknown")
    assert loaded.history == [Record(3, 0, {"loss": 1.5})]
    assert loaded.facts == {
        "Git": {"commit": "abc", "dirty": "False"},
        "Environment": {"command": "lit fit 'a b'", "gpus": "x, y"},
    }
    assert "loss" in render_report(loaded)
    with pytest.raises(FileNotFoundError, match="is no run"):
        load_run(tmp_path)
    (folder / "git.json").write_text("[")
    with pytest.raises(ValueError, match=r"git\.json: not a JSON object"):
        run_facts(folder)


def test_a_config_is_flattened_by_class() -> None:
    text = """
seed: 1
model: {class_path: a.b.Net, init_args: {widths: [1, 2], deep: {x: null}, empty: {}}}
trainer:
  callbacks:
  - {class_path: lit.EMA, init_args: {decay: 0.9}}
  - {class_path: lit.Stop}
  - {class_path: lit.EMA, init_args: {decay: 0.5}}
"""
    assert flat_config(text) == {
        "seed": "1",
        "model.class_path": "a.b.Net",
        "model.widths": "[1, 2]",
        "model.deep.x": "null",
        "model.empty": "{}",
        "trainer.callbacks[EMA].class_path": "lit.EMA",
        "trainer.callbacks[EMA].decay": "0.9",
        "trainer.callbacks[Stop].class_path": "lit.Stop",
        "trainer.callbacks[EMA 2].class_path": "lit.EMA",
        "trainer.callbacks[EMA 2].decay": "0.5",
    }
    assert flat_config("") == {}
    assert flat_config("a: [") == {"config": "a: ["}  # not YAML: compared as a whole


def test_the_dashboard_keeps_what_its_report_shows(tmp_path: Path) -> None:
    from lightning.pytorch.demos.boring_classes import BoringModel

    from helpers import tiny_trainer
    from lit_methods.callbacks.run.dashboard import Dashboard

    class Shown(BoringModel):
        panels = (Curve("Loss", ("shown/loss",), goal="min"), ImagePanel("Picture", "shown/image"))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("shown/loss", float(batch_idx))
            return super().training_step(batch, batch_idx)

        def dashboard_media(self) -> dict[str, Media]:
            return {"shown/image": MEDIA["a/image"]}

    (tmp_path / "notes.md").write_text("mine")
    tiny_trainer(
        max_epochs=1, limit_train_batches=3, limit_val_batches=1, log_every_n_steps=1, callbacks=[Dashboard()], default_root_dir=tmp_path
    ).fit(Shown())
    loaded = load_run(tmp_path)
    assert loaded.status == "finished"
    assert dict(loaded.progress)["Step"] == "3"
    assert [record.metrics["shown/loss"] for record in loaded.history if "shown/loss" in record.metrics] == [0.0, 1.0, 2.0]
    (section,) = loaded.sections
    assert section.panels == Shown.panels
    assert_media_equal(section.media["shown/image"], MEDIA["a/image"])
    assert render_report(loaded) == (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "mine" in render_report(loaded)
