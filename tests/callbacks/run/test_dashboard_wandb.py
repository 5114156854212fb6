"""W&B through the Dashboard, read back from the offline run's own log; W&B that fails; the same figures in every logger."""

import csv
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from test_dashboard import Extra, Shown, fit
from torch import Tensor

import lit_methods.runs.wandb as wandb_runs
from helpers import HANGS, tiny_trainer
from lit_methods.callbacks.run.dashboard import Dashboard
from lit_methods.callbacks.run.providers import ask_for_artifacts, save_tensors, tensors_digest
from lit_methods.cli.main import main
from lit_methods.panels import Curve
from lit_methods.reports.page import read_history
from lit_methods.runs.folder import RunFolder
from wandb_log import kill_service, read_run, transaction_log
from wandb_server import WandbServer

wandb = pytest.importorskip("wandb")
STEP = "trainer/global_step"


@pytest.fixture(autouse=True)
def own_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No run of one test goes on in another."""
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "wandb-data"))  # copies of artifacts
    yield
    wandb.finish()


@pytest.fixture
def fresh_wandb(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """W&B reads its environment anew, before the test and after it."""
    wandb.teardown()
    yield monkeypatch
    wandb.teardown()


def wandb_logger(folder: Path, **kwargs: Any) -> WandbLogger:
    return WandbLogger(project="test", save_dir=folder, **kwargs)


# ---- what is logged --------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_login")
def test_an_offline_run_holds_every_panel_and_no_more(tmp_path: Path) -> None:
    dashboard = Dashboard()
    assert os.environ["WANDB_MODE"] == "offline"
    fit(tmp_path, dashboard=dashboard, logger=wandb_logger(tmp_path))
    wandb.finish()
    run = read_run(tmp_path)
    assert run.exit_code == 0
    for panel in (*Shown.panels, *Extra.panels):
        if isinstance(panel, Curve):
            assert panel.select(run.names), f"nothing of {panel} was logged"
        else:  # per validation epoch, not per step, and at the step of the metrics beside it
            assert run.steps(panel.key) == [7, 15], panel
    assert run.steps("shown/score/a") == run.steps("shown/mean") == [7, 15]
    assert run.steps("shown/loss") == [3, 7, 11, 15]  # the rhythm of log_every_n_steps
    assert run.values("shown/loss") == [92.0, 96.0, 100.0, 96.0]
    kinds = {"shown/image": "image-file", "shown/cloud": "object3D-file", "shown/table": "table-file", "shown/histogram": "histogram"}
    for key, kind in kinds.items():
        for value in run.values(key):
            assert value["_type"] == kind
            assert kind == "histogram" or (run.folder / "files" / value["path"]).is_file()
    declared = {"shown/loss", "shown/score/a", "shown/mean", "extra/value", "extra/notes"} | set(kinds)
    assert set(run.names) == declared | {STEP, "epoch"}  # nothing per parameter
    (log,) = run.folder.glob("*.wandb")  # W&B may still be writing when a test looks: the reader stops at a record that isn't whole
    whole, content = len(list(transaction_log(log))), log.read_bytes()
    log.write_bytes(content[:-3])
    assert len(list(transaction_log(log))) == whole - 1


@pytest.mark.usefixtures("no_login")
def test_metrics_have_their_axis_and_summaries(tmp_path: Path) -> None:
    fit(tmp_path, logger=wandb_logger(tmp_path))
    wandb.finish()
    run = read_run(tmp_path)
    for name in ("shown/loss", "shown/mean", "shown/score/a", "extra/value"):
        assert run.metrics[name].step_metric == STEP
    loss, score, value = (run.metrics[name].summary for name in ("shown/loss", "shown/score/a", "extra/value"))
    assert (loss.min, loss.max, loss.last) == (True, False, True)
    assert (score.min, score.max, score.last) == (False, True, True)
    assert (value.min, value.max, value.last) == (False, False, True)  # neither direction is better
    assert run.summary["shown/loss"] == {"last": 96.0, "min": 92.0}
    assert run.summary["shown/mean"] == {"last": 11.5, "min": 3.5}
    assert run.summary["shown/score/a"] == {"last": pytest.approx(0.66), "max": pytest.approx(0.66)}


def test_group_job_type_tags_config_and_git_reach_the_run(tmp_path: Path, fresh_wandb: pytest.MonkeyPatch) -> None:
    for name, value in {"RUN_GROUP": "superflow-claim", "JOB_TYPE": "baseline", "TAGS": "claim,seed-3"}.items():
        fresh_wandb.setenv(f"WANDB_{name}", value)

    class SuperFlow(Shown):  # its name is that of a class in the catalogue
        pass

    git = {"commit": "0" * 40, "branch": "main", "dirty": True, "changes": ["a.py | 2 +-"]}
    fresh_wandb.setattr("lit_methods.runs.folder.git_state", lambda folder: git)
    folder = RunFolder(tmp_path / "run", {"model": {"depth": 34}, "seed_everything": 3})
    fit(tmp_path, SuperFlow(), logger=wandb_logger(tmp_path), callbacks=[folder])
    wandb.finish()
    run = read_run(tmp_path)
    assert (run.run.run_group, run.run.job_type) == ("superflow-claim", "baseline")
    assert run.tags == ["claim", "seed-3", "superflow"]
    assert run.config["model"] == {"depth": 34}
    assert run.config["seed_everything"] == 3
    assert run.config["git"] == {"commit": "0" * 40, "branch": "main", "dirty": True}


@pytest.mark.parametrize("log_model", [True, "all"])
def test_checkpoints_are_artifacts_offline_too(log_model: Any, tmp_path: Path) -> None:
    logger = wandb_logger(tmp_path, log_model=log_model)
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", monitor="shown/score/a", mode="min", save_top_k=2)  # the first one is best
    fit(tmp_path, logger=logger, enable_checkpointing=True, callbacks=[checkpoint])
    wandb.finish()
    run = read_run(tmp_path)
    models = [artifact for artifact in run.artifacts if artifact.type == "model"]
    assert len(models) == 2
    assert {artifact.name for artifact in models} == {f"model-{run.run.run_id}"}
    assert ["best" in artifact.aliases for artifact in models].count(True) == 1
    assert all("latest" in artifact.aliases for artifact in models)
    for artifact in models:
        (entry,) = artifact.manifest.contents
        content = torch.load(entry.local_path, weights_only=True)
        assert ("best" in artifact.aliases) == (content["global_step"] == 8)


def test_every_logger_gets_the_same_figures(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loggers = [CSVLogger(tmp_path, name="csv", version=""), TensorBoardLogger(tmp_path, name="tb", version=""), wandb_logger(tmp_path)]
    folder = RunFolder(tmp_path / "run")
    trainer, _ = fit(tmp_path, logger=loggers, callbacks=[folder])
    assert trainer.loggers == loggers
    wandb.finish()
    own: dict[str, dict[int, float]] = {}
    for record in read_history(tmp_path / "run" / "metrics.jsonl"):
        for name, value in record.metrics.items():
            own.setdefault(name, {})[record.step] = value
    assert set(own) == {"shown/loss", "shown/mean", "shown/score/a", "extra/value"}
    with (tmp_path / "csv" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    events = EventAccumulator(str(tmp_path / "tb"), size_guidance={"scalars": 0}).Reload()
    run = read_run(tmp_path / "wandb")
    for name, expected in own.items():
        in_csv = {int(row["step"]): float(row[name]) for row in rows if row.get(name)}
        in_tensorboard = {event.step: event.value for event in events.Scalars(name)}
        in_wandb = dict(zip(run.steps(name), run.values(name), strict=True))
        for found in (in_csv, in_tensorboard, in_wandb):
            assert found == pytest.approx(expected), name
    media = {panel.key for panel in (*Shown.panels, *Extra.panels) if not isinstance(panel, Curve)}
    assert set(run.names) - media == set(own) | {STEP, "epoch"}
    assert set(rows[0]) == set(own) | {"step", "epoch"}
    assert set(events.Tags()["scalars"]) == set(own) | {"epoch", "hp_metric"}  # TensorBoard's own place holder


# ---- artifacts -------------------------------------------------------------------------------------------------------------------------


class Masks(pl.Callback):
    """Keeps a mask that changes in the second epoch, and one that never does; has no panels."""

    def dashboard_artifacts(self) -> dict[str, dict[str, Tensor]]:
        return {"masks": {"layer.weight": self.mask[::2]}, "fixed": {"half": torch.ones(2, dtype=torch.bfloat16)}}

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.mask = torch.arange(6) < (2 if trainer.global_step <= 8 else 4)


def test_artifacts_are_kept_and_logged_when_they_change(tmp_path: Path) -> None:
    fit(tmp_path, logger=wandb_logger(tmp_path), callbacks=[Masks(), RunFolder(tmp_path / "run")])
    wandb.finish()
    kept = torch.load(tmp_path / "run" / "artifacts" / "masks.pt", weights_only=True)
    assert kept["layer.weight"].tolist() == [True, True, False]
    assert kept["layer.weight"].untyped_storage().nbytes() == 3  # not the tensor that it is a view of
    assert sorted(path.name for path in (tmp_path / "run" / "artifacts").iterdir()) == ["fixed.pt", "masks.pt"]
    run = read_run(tmp_path / "wandb")
    id = run.run.run_id
    masks = [artifact for artifact in run.artifacts if artifact.type == "mask"]
    assert [(artifact.type, artifact.name) for artifact in masks] == [
        ("mask", f"masks-{id}"),
        ("mask", f"fixed-{id}"),
        ("mask", f"masks-{id}"),  # a second version of one, after the second epoch; none at the end of fit
    ]
    first, _, second = masks
    assert "step-8" in first.aliases
    assert {"latest", "step-16"} <= set(second.aliases)
    versions = [torch.load(artifact.manifest.contents[0].local_path, weights_only=True)["layer.weight"] for artifact in (first, second)]
    assert [version.tolist() for version in versions] == [[True, False, False], [True, True, False]]


def test_artifacts_are_checked(tmp_path: Path) -> None:
    class Provider:
        def __init__(self, content: Any) -> None:
            self.dashboard_artifacts = lambda: content

    mask = {"w": torch.ones(2, dtype=torch.bool)}
    assert ask_for_artifacts([Provider({"a": mask}), Provider({"b": mask})]) == {"a": mask, "b": mask}
    with pytest.raises(ValueError, match="'a', which another callback or the module returns, too"):
        ask_for_artifacts([Provider({"a": mask}), Provider({"a": mask})])
    with pytest.raises(ValueError, match=r"the name '../a': use letters"):
        ask_for_artifacts([Provider({"../a": mask})])
    with pytest.raises(TypeError, match="must be a dict of tensors, got dict"):
        ask_for_artifacts([Provider({"a": {"w": np.ones(2)}})])
    # names, dtypes and shapes count, not only the bytes
    digests = {
        tensors_digest(tensors)
        for tensors in ({"w": torch.zeros(4)}, {"v": torch.zeros(4)}, {"w": torch.zeros(2, 2)}, {"w": torch.zeros(4, dtype=torch.int32)})
    }
    assert len(digests) == 4
    assert tensors_digest({"w": torch.arange(4).reshape(2, 2).T}) == tensors_digest({"w": torch.tensor([[0, 2], [1, 3]])})
    assert len({tensors_digest({"w": torch.tensor(1.0)}), tensors_digest({"w": torch.zeros(0)})}) == 2


def test_an_artifact_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "artifacts" / "masks.pt"
    save_tensors(path, {"w": torch.ones(2)})

    def full(content: Any, file: Path) -> None:
        file.write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"masks.pt: PytorchStreamWriter"):
        save_tensors(path, {"w": torch.zeros(2)})
    assert [found.name for found in path.parent.iterdir()] == ["masks.pt"]
    assert torch.load(path, weights_only=True)["w"].tolist() == [1.0, 1.0]
    with pytest.warns(UserWarning, match="Dashboard can't write into"):  # and a run goes on
        trainer, _ = fit(tmp_path / "run", callbacks=[Masks()])
    assert trainer.global_step == 16


# ---- W&B that fails --------------------------------------------------------------------------------------------------------------------


class At(pl.Callback):
    """Calls something when a step is reached."""

    def __init__(self, step: int, action: Any) -> None:
        self.step, self.action = step, action

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.action()


def messages(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(warning.message) for warning in caught if "W&B" in str(warning.message)]


@pytest.mark.usefixtures("fresh_wandb")
def test_a_dead_wandb_process_costs_one_warning(tmp_path: Path) -> None:
    loggers = [wandb_logger(tmp_path, log_model="all"), CSVLogger(tmp_path, name="csv", version="")]
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", save_last=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer, _ = fit(
            tmp_path,
            logger=loggers,
            enable_checkpointing=True,
            callbacks=[At(2, kill_service), Masks(), checkpoint, RunFolder(tmp_path / "run")],
        )
        loggers[0].log_hyperparams({"late": 1})  # type: ignore[attr-defined]
        loggers[0].experiment.config.update({"later": 1})  # type: ignore[attr-defined]
        wandb_runs.finish_runs(trainer.loggers)
    (message,) = messages(caught)
    assert "W&B failed: the run goes on without it." in message
    assert "wandb sync" in message
    assert trainer.global_step == 16
    assert 'class="pill finished"' in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert (tmp_path / "checkpoints" / "last.ckpt").is_file()
    with (tmp_path / "csv" / "metrics.csv").open() as file:
        assert [row["shown/loss"] for row in csv.DictReader(file) if row["shown/loss"]] == ["92.0", "96.0", "100.0", "96.0"]
    # the next run of this process is whole again, and no continuation
    fit(tmp_path / "next", logger=wandb_logger(tmp_path / "next"))
    wandb.finish()
    assert read_run(tmp_path / "next").values("shown/loss") == [92.0, 96.0, 100.0, 96.0]


def test_an_error_in_any_call_of_the_logger_costs_one_warning(tmp_path: Path) -> None:
    class Broken(WandbLogger):
        def log_metrics(self, *args: Any, **kwargs: Any) -> None:
            raise wandb.errors.CommError("the server\nsays no")

    logger = Broken(project="test", save_dir=tmp_path)
    with pytest.warns(UserWarning, match="CommError: the server\\.") as caught:
        trainer, _ = fit(tmp_path, logger=logger)
    assert len(messages(list(caught))) == 1
    assert trainer.global_step == 16
    wandb.finish()
    assert read_run(tmp_path).steps("shown/image") == [7, 15]  # what could be logged was


@pytest.mark.usefixtures("fresh_wandb")
def test_a_server_that_goes_away_does_not_stop_the_run(tmp_path: Path, fresh_wandb: pytest.MonkeyPatch) -> None:
    with WandbServer() as server:
        settings = {"MODE": "online", "API_KEY": "0" * 40, "BASE_URL": server.url, "FINISH_TIMEOUT": "2"}
        for name, value in settings.items():
            fresh_wandb.setenv(f"WANDB_{name}", value)
        callbacks = [At(2, server.stop), Dashboard()]
        trainer = tiny_trainer(
            logger=wandb_logger(tmp_path), max_steps=4, log_every_n_steps=1, callbacks=callbacks, default_root_dir=tmp_path
        )
        trainer.fit(FailsAt())
        assert "UpsertBucket" in server.operations  # it was online
        wandb_runs.finish_runs(trainer.loggers)  # gives up after the two seconds
    assert trainer.global_step == 4
    assert read_run(tmp_path).values("loss") == [0.0, 1.0, 2.0, 3.0]  # for `wandb sync`


@pytest.mark.usefixtures("fresh_wandb")
def test_without_a_server_at_the_start_the_run_is_offline(tmp_path: Path, fresh_wandb: pytest.MonkeyPatch) -> None:
    with WandbServer() as server:
        server.stop()
        for name, value in {"MODE": "online", "API_KEY": "0" * 40, "BASE_URL": server.url, "INIT_TIMEOUT": "1"}.items():
            fresh_wandb.setenv(f"WANDB_{name}", value)
        logger = wandb_logger(tmp_path)
        with pytest.warns(UserWarning, match="W&B can't be reached, so the run stays offline"):
            wandb_runs.open_runs([CSVLogger(tmp_path), logger])
    logger.log_metrics({"loss": 1.5}, step=0)
    wandb_runs.finish_runs([logger])
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert read_run(folder).values("loss") == [1.5]


def test_wandb_sync_sends_what_an_offline_run_left(tmp_path: Path) -> None:
    fit(tmp_path, logger=wandb_logger(tmp_path))
    wandb.finish()
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    with WandbServer() as server:
        environment = os.environ | {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": server.url, "WANDB_MODE": "online"}
        command = [sys.executable, "-m", "wandb", "sync", str(folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANGS, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    assert [row["shown/loss"] for row in server.history if "shown/loss" in row] == [92.0, 96.0, 100.0, 96.0]


# ---- the command -----------------------------------------------------------------------------------------------------------------------


def test_lit_closes_the_run_also_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_DATA_DIR")
    words = "fit --config configs/logger/wandb.yaml --model test_dashboard_wandb.FailsAt --trainer.max_steps 4 --trainer.accelerator cpu"
    quiet = "--trainer.enable_progress_bar false --trainer.log_every_n_steps 1"
    model = "--trainer.logger.log_model true"
    assert main([*words.split(), *quiet.split(), *model.split(), "--run_root", "whole"]) == 0
    assert wandb.run is None
    with pytest.raises(RuntimeError, match="gone astray"):
        main([*words.split(), *quiet.split(), "--model.step", "2", "--run_root", "broken"])
    assert wandb.run is None
    whole, broken = read_run(tmp_path / "whole"), read_run(tmp_path / "broken")
    assert (whole.exit_code, broken.exit_code) == (0, 1)
    assert whole.values("loss") == [0.0, 1.0, 2.0, 3.0]
    assert broken.values("loss") == [0.0, 1.0]
    assert whole.config["model"]["class_path"] == "test_dashboard_wandb.FailsAt"
    staged = [Path(artifact.manifest.contents[0].local_path) for artifact in whole.artifacts]
    assert staged
    assert all(path.is_relative_to(whole.folder.parent) for path in staged)  # copies of checkpoints, in the run's folder, not at home
    assert "WANDB_DATA_DIR" not in os.environ


class FailsAt(BoringModel):
    """Logs its step as the loss and fails at one; negative: never."""

    def __init__(self, step: int = -1) -> None:
        super().__init__()
        self.fail_step = step

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        if self.global_step == self.fail_step:
            raise RuntimeError("gone astray")
        self.log("loss", float(self.global_step))
        return super().training_step(batch, batch_idx)


def test_a_silent_logger_is_still_a_logger(tmp_path: Path) -> None:
    logger = wandb_logger(tmp_path)
    trainer = tiny_trainer(logger=logger, max_steps=1, default_root_dir=tmp_path, callbacks=[Dashboard()])
    trainer.fit(BoringModel())
    pickle.dumps(logger)  # as strategies that spawn processes do
    id = logger.experiment.id
    with pytest.warns(UserWarning, match="ConnectionError: no message"):
        wandb_runs.attempt(logger, lambda: (_ for _ in ()).throw(ConnectionError()))
    assert isinstance(logger.experiment, wandb_runs.LostRun)
    assert logger.version == id
    trainer.fit(BoringModel())  # the same logger in a second run: silent, and no error
    logger.log_metrics({"a": 1.0}, step=2)
    logger.experiment.log({"a": 1})
    assert logger.experiment.summary["a"].anything() is not None
