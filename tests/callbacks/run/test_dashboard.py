"""The Dashboard on real runs: what it gathers, records, renders, sends to the loggers, and what it leaves alone."""

import os
import re
import resource
import warnings
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from helpers import tiny_trainer
from lit_methods.callbacks.run.dashboard import Dashboard, _append, wandb_offline_without_login
from lit_methods.callbacks.run.providers import ask_for_media, gather_panels
from lit_methods.panels import (
    CloudMedia,
    CloudPanel,
    Curve,
    HistogramMedia,
    HistogramPanel,
    ImageMedia,
    ImagePanel,
    Media,
    Panel,
    TableMedia,
    TablePanel,
)
from lit_methods.reports.page import Record, read_history, record_line

STEPS = 16  # BoringModel: 64 samples in batches of one; limited to 8 batches in each of two epochs


class Shown(BoringModel):
    """Logs a value per step and one per epoch, and has one medium of each kind."""

    panels: ClassVar[tuple[Panel, ...]] = (
        Curve("Loss", ("shown/loss",), goal="min"),
        Curve("Score", ("shown/score/*",), goal="max"),
        Curve("Mean", ("shown/mean",), goal="min"),
        ImagePanel("Picture", "shown/image"),
        CloudPanel("Cloud", "shown/cloud"),
        TablePanel("Table", "shown/table"),
        HistogramPanel("Histogram", "shown/histogram"),
    )

    def __init__(self, fail_at: int = -1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.asked: list[int] = []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
        if self.global_step == self.hparams["fail_at"]:
            raise RuntimeError("the loss went <astray>")
        self.log("shown/loss", torch.tensor(100.0 - abs(self.global_step - 11)))
        self.log("shown/mean", float(self.global_step), on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("shown/score/a", 0.5 + 0.01 * self.global_step)

    def dashboard_media(self) -> dict[str, Media]:
        self.asked.append(self.global_step)
        points = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
        return {
            "shown/image": ImageMedia(np.full((8, 9, 3), 77, dtype=np.uint8), "a grey field"),
            "shown/cloud": CloudMedia(points, np.zeros((50, 3), dtype=np.uint8), "fifty points"),
            "shown/table": TableMedia(("name", "value"), (("a", 1.5), ("b", None))),
            "shown/histogram": HistogramMedia(*np.histogram(points, bins=7)),
        }


class Extra(pl.Callback):
    panels: ClassVar[tuple[Panel, ...]] = (Curve("Extra", ("extra/value",)), TablePanel("Notes", "extra/notes"))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        pl_module.log("extra/value", 2.0 * trainer.global_step)

    def dashboard_media(self) -> dict[str, Media]:
        return {"extra/notes": TableMedia(("note",), (("from the callback",),))}


def fit(folder: Path, module: pl.LightningModule | None = None, dashboard: Dashboard | None = None, **kwargs: Any) -> tuple[Any, Dashboard]:
    dashboard = dashboard or Dashboard()
    defaults = {"max_epochs": 2, "limit_train_batches": 8, "limit_val_batches": 1, "log_every_n_steps": 4, "default_root_dir": folder}
    callbacks = [dashboard, Extra(), *kwargs.pop("callbacks", [])]
    ckpt_path = kwargs.pop("ckpt_path", None)
    trainer = tiny_trainer(callbacks=callbacks, **(defaults | kwargs))
    trainer.fit(module or Shown(), ckpt_path=ckpt_path)
    return trainer, dashboard


def test_panels_come_from_module_and_callbacks_once() -> None:
    class Stranger(pl.Callback):
        panels = ("anything", 3)

    class Subclass(Extra):
        panels = (Curve("Extra", ("extra/value",)), Curve("More", ("extra/more",)))

    class Wrong(pl.Callback):
        panels = (Curve("x", ("x",)), "y")

    module, extra, again, subclass = Shown(), Extra(), Extra(), Subclass()
    providers, sections = gather_panels([module, Stranger(), extra, again, subclass, Dashboard()])
    assert providers == [module, extra, again, subclass]
    assert [section.title for section in sections] == ["Shown", "Extra", "Extra 2", "Subclass"]
    assert [len(section.panels) for section in sections] == [7, 2, 1, 1]  # a curve that is already shown isn't shown again
    with pytest.raises(TypeError, match=r"Wrong.panels\[1\] is a str, expected one of Curve"):
        gather_panels([Wrong()])


def test_media_must_fit_their_panels() -> None:
    class Liar:
        panels = (ImagePanel("Picture", "liar/image"),)
        media: ClassVar[dict[str, Any]] = {}

        def dashboard_media(self) -> dict[str, Any]:
            return self.media

    assert ask_for_media(Liar(), Liar.panels) == {}
    Liar.media = {"liar/imagine": TableMedia((), ())}
    with pytest.raises(
        ValueError, match=r"Liar.dashboard_media\(\) returned 'liar/imagine', which no panel declares; declared keys: liar/image"
    ):
        ask_for_media(Liar(), Liar.panels)
    Liar.media = {"liar/image": TableMedia((), ())}
    with pytest.raises(TypeError, match="is a TableMedia, but ImagePanel shows a ImageMedia"):
        ask_for_media(Liar(), Liar.panels)


def test_a_run_leaves_a_report_and_its_history(tmp_path: Path) -> None:
    trainer, dashboard = fit(tmp_path, callbacks=[LearningRateMonitor()])
    assert not trainer.loggers  # the recorder is gone again
    assert sorted(path.name for path in tmp_path.iterdir()) == ["media", "metrics.jsonl", "report.html", "report.json"]
    history = read_history(tmp_path / "metrics.jsonl")
    assert history == dashboard.history
    loss = {record.step: record.metrics["shown/loss"] for record in history if "shown/loss" in record.metrics}
    assert loss == {3: 92.0, 7: 96.0, 11: 100.0, 15: 96.0}  # at the loggers' rhythm: every fourth step
    assert [record.metrics["extra/value"] for record in history if "extra/value" in record.metrics] == [8.0, 16.0, 24.0, 32.0]
    assert [record.metrics["shown/mean"] for record in history if "shown/mean" in record.metrics] == [3.5, 11.5]  # once an epoch
    assert [record.epoch for record in history if "shown/score/a" in record.metrics] == [0, 1]
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    for expected in ('class="pill finished"', "a grey field", "from the callback", "fifty points", "fail_at: -1", "shown/mean", "2 of 2"):
        assert expected in text
    assert any(name.startswith("lr-") for record in history for name in record.metrics)  # other callbacks log to us too
    assert trainer.lightning_module.asked == [8, 16, 16]  # at each validation epoch's end, at the end of fit, never in between
    assert dashboard.state_dict() == {}


def test_lightnings_own_files_stay_where_they_were(tmp_path: Path) -> None:
    class Watch(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.log_dir, self.save_dir = trainer.log_dir, [c.dirpath for c in trainer.checkpoint_callbacks]

    seen = []
    for callbacks in ([], [Dashboard()]):
        watch = Watch()
        tiny_trainer(max_steps=1, default_root_dir=tmp_path, enable_checkpointing=True, callbacks=[watch, *callbacks]).fit(BoringModel())
        seen.append((watch.log_dir, watch.save_dir))
    assert seen[0] == seen[1]
    csv = CSVLogger(tmp_path)
    trainer, dashboard = fit(tmp_path, logger=csv)
    assert dashboard.folder == Path(csv.log_dir)
    assert trainer.loggers == [csv]


def test_an_exception_leaves_a_report_marked_as_interrupted(tmp_path: Path) -> None:
    module = Shown(fail_at=13)
    with pytest.raises(RuntimeError, match="astray"):
        fit(tmp_path, module)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert 'class="pill interrupted"' in text
    assert "RuntimeError: the loss went &lt;astray&gt;, at step 13" in text
    assert "a grey field" in text  # the last validation's media
    assert module.asked == [8]  # a broken module isn't asked
    assert [record.step for record in read_history(tmp_path / "metrics.jsonl") if "shown/loss" in record.metrics] == [3, 7, 11]


def test_an_exception_takes_the_recorder_off_the_trainer(tmp_path: Path) -> None:
    trainer = tiny_trainer(max_epochs=1, default_root_dir=tmp_path, callbacks=[Dashboard()])
    with pytest.raises(RuntimeError, match="astray"):
        trainer.fit(Shown(fail_at=1))
    assert trainer.loggers == []


def test_nothing_is_written_where_nothing_is_wanted(tmp_path: Path) -> None:
    module = Shown()
    fit(tmp_path, module, fast_dev_run=True)
    tiny_trainer(default_root_dir=tmp_path, callbacks=[Dashboard()]).predict(module)
    fit(tmp_path, module, dashboard=Dashboard(report=False))
    assert list(tmp_path.iterdir()) == []
    module.asked.clear()

    class Stop(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.found = list(tmp_path.iterdir())
            self.asked = list(module.asked)

    stop = Stop()
    fit(tmp_path, module, num_sanity_val_steps=1, callbacks=[stop])
    assert stop.found == []
    assert stop.asked == []


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pl.Trainer, "is_global_zero", property(lambda self: False))
    module = Shown()
    _, dashboard = fit(tmp_path, module)
    assert module.asked == []
    assert dashboard.history == []
    assert list(tmp_path.iterdir()) == []


def test_without_validation_each_epoch_renders(tmp_path: Path) -> None:
    module = Shown()
    fit(tmp_path, module, limit_val_batches=0)
    assert module.asked == [8, 16, 16]


def test_validate_and_test_render_too(tmp_path: Path) -> None:
    trainer = tiny_trainer(default_root_dir=tmp_path, callbacks=[Dashboard(title="Only a test")])
    module = Shown()
    trainer.validate(module, verbose=False)
    assert "shown/score/a" in (tmp_path / "report.html").read_text(encoding="utf-8")
    trainer.test(module, verbose=False)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<h1>Only a test</h1>" in text
    assert 'class="pill finished"' in text
    assert module.asked == [0, 0]


def test_a_resumed_run_goes_on_with_its_folders_history(tmp_path: Path) -> None:
    class Save(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 8:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    with pytest.raises(RuntimeError, match="astray"):
        fit(tmp_path, Shown(fail_at=13), callbacks=[Save()])
    fit(tmp_path, ckpt_path=tmp_path / "half.ckpt")
    steps = [record.step for record in read_history(tmp_path / "metrics.jsonl") if "shown/loss" in record.metrics]
    assert steps == [3, 7, 11, 15]  # what the killed run logged after the checkpoint was logged anew, once
    fit(tmp_path)
    assert [record.step for record in read_history(tmp_path / "metrics.jsonl") if "shown/loss" in record.metrics] == [3, 7, 11, 15]


def test_a_broken_history_is_set_aside(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("not json\n{}\n")
    with pytest.warns(UserWarning, match=r"metrics.jsonl, line 1: not a record.*metrics.jsonl.broken"):
        fit(tmp_path)
    assert (tmp_path / "metrics.jsonl.broken").read_text() == "not json\n{}\n"
    assert [record.step for record in read_history(tmp_path / "metrics.jsonl") if "shown/loss" in record.metrics] == [3, 7, 11, 15]


def test_an_unwritable_folder_gives_one_warning_and_no_more(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    dashboard = Dashboard()
    with pytest.warns(UserWarning, match="Dashboard can't write into") as caught:
        trainer, _ = fit(tmp_path / "file", dashboard=dashboard)
    assert trainer.global_step == STEPS
    assert sum("Dashboard can't write" in str(warning.message) for warning in caught) == 1


def test_the_report_shows_config_facts_and_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: {depth: 34}\n")
    (tmp_path / "git.json").write_text('{"commit": "0123abcd", "changes": ["a.py", "b.py"], "dirty": true}')
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", monitor="shown/score/a", mode="max")
    fit(tmp_path, enable_checkpointing=True, callbacks=[checkpoint])
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "model: {depth: 34}" in text
    assert "fail_at: -1" not in text
    assert "0123abcd" in text
    assert "a.py, b.py" in text
    assert f"<td>checkpoints/{Path(checkpoint.best_model_path).name}</td><td>best</td><td>shown/score/a 0.66</td>" in text


# ---- loggers ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_login")
def test_offline_only_without_a_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert not wandb_offline_without_login()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    Dashboard(offline_without_login=False)
    assert "WANDB_MODE" not in os.environ
    assert wandb_offline_without_login()
    assert os.environ["WANDB_MODE"] == "offline"
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv("WANDB_MODE", raising=False)
        monkeypatch.setenv(name, "online")
        assert not wandb_offline_without_login()
        monkeypatch.delenv(name)


def test_tensorboard_gets_pictures_and_histograms(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    fit(tmp_path, logger=logger)
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0, "histograms": 0}).Reload()
    assert [image.step for image in events.Images("shown/image")] == [7, 15]
    assert (events.Images("shown/image")[0].width, events.Images("shown/image")[0].height) == (9, 8)
    assert [histogram.histogram_value.num for histogram in events.Histograms("shown/histogram")] == [150.0, 150.0]
    for name in events.Tags()["scalars"]:
        steps = [event.step for event in events.Scalars(name)]
        assert steps == sorted(set(steps)) or name == "hp_metric", f"{name} is written twice"  # hp_metric: TensorBoard's own place holder
    epoch_ends = [(event.step, event.value) for event in events.Scalars("epoch") if event.step in (7, 15)]
    assert epoch_ends == [(7, 0), (15, 1)]


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("environment.json", b"{broken", "environment.json"),
        ("environment.json", b"[" * 100_000, "environment.json|recursion"),
        ("git.json", b"[1, 2]", "git.json"),
        ("git.json", b'"\xff"', "git.json"),
        ("config.yaml", "model: caf\u00e9\n".encode("latin-1"), ""),
        ("notes.md", b"\xff\xfe\x00", ""),
        ("metrics.jsonl", b'{"step": \xff\n{}\n', "metrics.jsonl.broken"),
        ("report.json/x", b"a folder in its place", "Dashboard can't write into"),
    ],
)
def test_a_broken_file_in_the_folder_is_one_warning(file: str, content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_bytes(content)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer, _ = fit(tmp_path)
    assert trainer.global_step == STEPS
    ours = [str(warning.message) for warning in caught if re.search(r"The run goes on|history starts anew", str(warning.message))]
    assert len(ours) == bool(said), ours
    assert not said or re.search(said, ours[0])
    if file != "report.json/x":
        assert 'class="pill finished"' in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_module_that_cannot_show_itself_trains_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Shown, "dashboard_media", lambda self: {}["colours"])
    with pytest.warns(UserWarning, match=r"Shown.dashboard_media\(\) raised KeyError: 'colours'. The run goes on") as caught:
        trainer, _ = fit(tmp_path)
    assert trainer.global_step == STEPS
    assert sum("dashboard_media" in str(warning.message) for warning in caught) == 1
    assert "from the callback" in (tmp_path / "report.html").read_text(encoding="utf-8"), "the others are shown"


def test_a_page_that_cannot_be_drawn_is_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_methods.callbacks.run.dashboard.render_report", lambda data: 1 / 0)
    with pytest.warns(UserWarning, match="ZeroDivisionError") as caught:
        trainer, _ = fit(tmp_path)
    assert trainer.global_step == STEPS
    assert sum("ZeroDivisionError" in str(warning.message) for warning in caught) == 1


def test_a_line_that_does_not_fit_on_the_disk_leaves_those_before_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _append(path, record_line(Record(1, 0, {"loss": 1.0})))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, limits[1]))
    try:
        with pytest.raises(OSError):
            _append(path, record_line(Record(2, 0, {"loss": 1.0})))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    _append(path, record_line(Record(3, 0, {"loss": 1.0})))
    assert [record.step for record in read_history(path)] == [1, 3]
