"""One dashboard for every technique: W&B, TensorBoard and a self-contained ``report.html`` from panels that are declared once."""

import contextlib
import datetime
import errno
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lit_methods.callbacks.ordering import OrderedCallback
from lit_methods.callbacks.run.exact_resume import ExactResume
from lit_methods.callbacks.run.loggers import STEP, add_tags, for_wandb, log_artifact, to_tensorboard, write_epoch_once
from lit_methods.callbacks.run.providers import ProviderError, ask_for_artifacts, ask_for_media, gather_panels, save_tensors, tensors_digest
from lit_methods.files import write_atomically
from lit_methods.panels import Curve, Media
from lit_methods.reports.page import Record, ReportData, Section, Status, read_history, record_line, render_report
from lit_methods.reports.record import read_config, read_notes, run_facts, save_run
from lit_methods.runs.folder import RunFolder, run_dir
from lit_methods.runs.wandb import attempt, has_login, keep_training


class _Recorder(DummyLogger):
    """Hands on what the trainer logs: the same names, values and steps that every logger gets, at the same times."""

    def __init__(self, trainer: pl.Trainer, receive: Callable[[dict[str, float], int | None], None]) -> None:
        super().__init__()
        self._trainer, self._receive = trainer, receive

    @property
    def save_dir(self) -> str:
        """What Lightning takes without any logger, so that checkpoints and ``trainer.log_dir`` stay where they were."""
        return self._trainer.default_root_dir

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._receive(metrics, step)


class Dashboard(OrderedCallback):
    """Shows what every technique of a run declares: curves, histograms, pictures, point clouds and tables.

    It asks the LightningModule and all callbacks for ``panels`` and ``dashboard_media()`` (see :mod:`lit_methods.panels`) and writes

    - ``report.html``, ``metrics.jsonl`` and what ``lit report`` draws the report from again (``report.json``, ``media/``) into the run's
      folder. They are replaced as a whole at each validation epoch end (training epoch end without validation), at the end of fit, validate
      and test, and when the run breaks off, then marked as interrupted;
    - ``artifacts/<name>.pt`` for what ``dashboard_artifacts()`` returns, such as masks, at the same times where it has changed;
    - to each ``WandbLogger``: axes and summaries (best and last value) of the declared metrics, and the media and artifacts at the same
      times. If W&B fails in mid-run (server, process, disk), one warning tells so and the training goes on;
    - to each ``TensorBoardLogger``: pictures and histograms.

    Scalar metrics reach the loggers through ``self.log`` as ever; the dashboard reads along at the loggers' rhythm
    (``Trainer(log_every_n_steps=...)``) and adds nothing to other steps.

    Runs: on rank 0 alone, so ``dashboard_media()`` and ``dashboard_artifacts()`` must not call a collective. Nothing is written during the
    sanity check, with ``fast_dev_run`` and in ``predict``. A full disk, an unwritable folder, a broken file in the run's folder, or
    an error while something is drawn gives one warning and never stops the training.
    Saves: beside :class:`ExactResume`, the number of rows in ``metrics.jsonl``. A run that is resumed in its own folder goes on behind
    these rows, so that none is there twice and none is lost; a new run in an old folder replaces both files.
    Refuses: panels that are none of ours, media that no panel declares or of another type, artifacts whose name can't be a file's.

    Args:
        title: Heading of the report; by default the run's name, the module's class and the folder's name.
        report: Write ``report.html``, ``report.json``, ``media/`` and ``metrics.jsonl``.
        offline_without_login: Set ``WANDB_MODE=offline`` for this process where no W&B login is found and the variable is unset: W&B then
            never asks for a key, and ``wandb sync`` uploads the run later.

    Raises:
        TypeError: In ``setup``, for a panel that is none of ours; while running, for media of another type than its panel.
        ValueError: While running, for media under a key that no panel declares, or artifacts with a bad name or with a name twice.
    """

    def __init__(self, title: str | None = None, report: bool = True, offline_without_login: bool = True) -> None:
        super().__init__()
        self.title, self.report = title, report
        if offline_without_login:  # here, as Lightning starts W&B before any hook of a callback
            wandb_offline_without_login()
        self.folder: Path | None = None
        self.history: list[Record] = []
        self._providers: list[Any] = []
        self._sections: list[Section] = []
        self._artifact_providers: list[Any] = []
        self._defined: set[tuple[int, str]] = set()  # W&B logger and metric
        self._artifacts: dict[str, str] = {}  # name -> digest of what was kept last
        self._recorder: _Recorder | None = None
        self._active = self._fresh = self._warned = False
        self._told: set[str] = set()  # kinds of trouble that were told
        self._started = 0.0
        self._exact = False  # what is logged behind a checkpoint is logged again after a resume
        self._rows: int | None = None  # of the history, when the checkpoint was saved with which the run goes on

    def state_dict(self) -> dict[str, Any]:
        """The number of rows of the history."""
        return {"rows": len(self.history)} if self._active and self._exact else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep it until training starts."""
        self._rows = state_dict.get("rows")

    # ---- hooks -------------------------------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Gather the panels and start to read along."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # sections stand as the user has listed them
        super().setup(trainer, pl_module, stage)
        folder = run_dir(trainer)  # on every rank: it may broadcast
        silent = bool(trainer.fast_dev_run) or stage == "predict"  # type: ignore[attr-defined]
        self._active = trainer.is_global_zero and not silent
        if silent:
            return
        if self._recorder is None:  # on every rank, so that all see the same list of loggers
            self._recorder = _Recorder(trainer, lambda metrics, step: self._record(trainer, metrics, step))
            trainer.loggers = [*trainer.loggers, self._recorder]
        if not self._active:
            return
        if folder != self.folder:
            self.folder, self.history, self._fresh, self._artifacts, self._defined = folder, [], True, {}, set()
        self._started = time.monotonic()
        self._exact = any(isinstance(callback, ExactResume) for callback in callbacks)
        self._providers, self._sections = gather_panels([pl_module, *callbacks])
        self._artifact_providers = [candidate for candidate in (pl_module, *callbacks) if hasattr(candidate, "dashboard_artifacts")]
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                keep_training(logger, self._define_new_metrics)
                attempt(logger, partial(add_tags, logger, [pl_module, *callbacks]))
            elif isinstance(logger, TensorBoardLogger):
                write_epoch_once(logger)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on with the folder's history where a resumed fit starts, or drop what an earlier run left there."""
        if self._active and (self._fresh or self._rows is not None):
            with self._warned_only():
                self._begin(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Render where no validation does."""
        if not trainer.enable_validation:
            self._render(trainer, pl_module, "running", ask=True)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Render at the end of each validation epoch."""
        if not trainer.sanity_checking:
            self._render(trainer, pl_module, "running" if trainer.state.fn == TrainerFn.FITTING else "finished", ask=True)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Render at the end of a test."""
        self._render(trainer, pl_module, "finished", ask=True)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Render the whole run; the loggers have its media already."""
        self._render(trainer, pl_module, "finished", ask=True, media_to_loggers=False)
        if self._active and self.report and self.folder is not None and not self._warned:
            rank_zero_info(f"Report: {self.folder / 'report.html'}")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave a report of what there is, marked as interrupted; the module isn't asked, it may be broken."""
        message = f"{type(exception).__name__}{f': {exception}' if str(exception) else ''}, at step {trainer.global_step:,}"
        try:
            self._render(trainer, pl_module, "interrupted", message=message)
        except Exception as error:  # must not hide why the run broke off
            rank_zero_warn(f"Dashboard could not write the last report: {type(error).__name__}: {error}")
        finally:
            super().on_exception(trainer, pl_module, exception)

    def leave(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the recorder off the trainer."""
        if self._recorder is not None:
            trainer.loggers = [logger for logger in trainer.loggers if logger is not self._recorder]
            self._recorder = None
        self._active, self._rows = False, None
        self._providers, self._artifact_providers = [], []

    # ---- history -----------------------------------------------------------------------------------------------------------------------

    def _record(self, trainer: pl.Trainer, metrics: dict[str, float], step: int | None) -> None:
        if self._active:
            with self._warned_only():
                self._keep(trainer, metrics, step)

    def _keep(self, trainer: pl.Trainer, metrics: dict[str, float], step: int | None) -> None:
        values = {name: float(value) for name, value in metrics.items() if name != "epoch"}
        if not values:
            return
        if self._fresh:
            self._begin(trainer)
        epoch = metrics.get("epoch", trainer.current_epoch)
        record = Record(trainer.global_step if step is None else int(step), int(epoch), values)
        self.history.append(record)
        if self.report:
            self._write(lambda folder: _append(folder / "metrics.jsonl", record_line(record)))

    def _begin(self, trainer: pl.Trainer) -> None:
        """Take over the folder's history: in fit up to the checkpoint, else all of it."""
        self._fresh = False
        path = cast(Path, self.folder) / "metrics.jsonl"
        if self.report and path.is_file():
            try:
                self.history = read_history(path)
            except (OSError, ValueError) as error:
                rank_zero_warn(f"{error}. The file is kept as {path.name}.broken, the history starts anew.")
                self._write(lambda folder: os.replace(path, folder / f"{path.name}.broken"))
                self.history = []
        if trainer.state.fn == TrainerFn.FITTING:
            self.history = self._up_to_here(trainer)
        self._rows = None
        if self.report and (self.history or path.is_file()):
            self._write(lambda folder: write_atomically(folder / "metrics.jsonl", "".join(map(record_line, self.history))))

    def _up_to_here(self, trainer: pl.Trainer) -> list[Record]:
        """The rows that were there when the checkpoint was saved; what came behind it is done again."""
        if self._rows is not None and self._exact:
            return self.history[: self._rows]
        # loggers count batches from 0 where a module steps by hand, else steps
        done = trainer.global_step
        if done and not trainer.lightning_module.automatic_optimization:
            done = trainer.fit_loop.epoch_loop._batches_that_stepped + 1
        return [record for record in self.history if record.step < done]

    def _write(self, write: Callable[[Path], None]) -> None:
        with self._warned_only():
            cast(Path, self.folder).mkdir(parents=True, exist_ok=True)
            write(cast(Path, self.folder))

    @contextlib.contextmanager
    def _warned_only(self) -> Iterator[None]:
        """Turn any error into one warning: a report isn't worth a training."""
        try:
            yield
        except Exception as error:
            self._warn("write", f"Dashboard can't write into {self.folder}: {error if isinstance(error, OSError) else repr(error)}")
            self._warned = True

    def _warn(self, kind: str, what: str) -> None:
        if kind not in self._told:
            rank_zero_warn(f"{what}. The run goes on, its report is not up to date.")
        self._told.add(kind)

    # ---- rendering ---------------------------------------------------------------------------------------------------------------------

    def _render(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        status: Status,
        message: str = "",
        ask: bool = False,
        media_to_loggers: bool = True,
    ) -> None:
        if not self._active:
            return
        if ask:
            pairs = zip(self._providers, self._sections, strict=True)
            self._sections = [replace(section, media={**section.media, **self._media_of(provider, section)}) for provider, section in pairs]
            if media_to_loggers:
                with self._warned_only():
                    self._send_media(trainer)
            self._keep_artifacts(trainer)
        if self.report:
            with self._warned_only():
                data = self._report_data(trainer, pl_module, status, message)
                self._write(lambda folder: save_run(folder, data))
                self._write(lambda folder: write_atomically(folder / "report.html", render_report(data)))

    def _media_of(self, provider: Any, section: Section) -> dict[str, Media]:
        try:
            return ask_for_media(provider, section.panels)
        except ProviderError as error:
            self._warn(type(provider).__name__, str(error))
            return {}

    def _report_data(self, trainer: pl.Trainer, pl_module: pl.LightningModule, status: Status, message: str) -> ReportData:
        folder = cast(Path, self.folder)
        epochs = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else None
        done = trainer.current_epoch if status == "finished" else trainer.current_epoch + 1
        elapsed = datetime.timedelta(seconds=round(time.monotonic() - self._started))
        progress = [("Started", f"{datetime.datetime.now() - elapsed:%Y-%m-%d %H:%M}"), ("Duration", _duration(elapsed))]
        if trainer.state.fn == TrainerFn.FITTING:
            progress = [("Epoch", f"{done:,} of {epochs:,}" if epochs else f"{done:,}"), ("Step", f"{trainer.global_step:,}"), *progress]
        progress.append(("Device", f"{trainer.world_size} x {pl_module.device.type}, {trainer.precision}"))
        is_ours = any(isinstance(callback, RunFolder) for callback in trainer.callbacks)  # type: ignore[attr-defined]  # runs/<name>/<time>
        try:
            kept_facts = run_facts(folder)
        except Exception as error:  # they are read from files
            self._warn("facts", str(error))
            kept_facts = {}
        return ReportData(
            title=self.title or " · ".join([*([folder.parent.name] if is_ours else []), type(pl_module).__name__, folder.name]),
            status=status,
            sections=tuple(self._sections),
            history=self.history,
            message=message,
            progress=tuple(progress),
            config=read_config(folder) or _hyperparameters(pl_module),
            checkpoints=tuple(_checkpoints(trainer, folder)),
            notes=read_notes(folder),
            facts={
                "Model": {
                    "class": f"{type(pl_module).__module__}.{type(pl_module).__qualname__}",
                    "parameters": f"{sum(p.numel() for p in pl_module.parameters()):,}",
                    "trainable": f"{sum(p.numel() for p in pl_module.parameters() if p.requires_grad):,}",
                },
                **kept_facts,
            },
        )

    def _define_new_metrics(self, logger: WandbLogger, metrics: Mapping[str, float]) -> None:
        """Tell W&B axis and summary of each declared metric before its first value.

        By name, as W&B keeps no best value for a glob like ``segmentor/iou/*`` where Lightning has defined ``*``.
        """
        new = [name for name in metrics if (id(logger), name) not in self._defined]
        self._defined.update((id(logger), name) for name in new)
        curves = [panel for section in self._sections for panel in section.panels if isinstance(panel, Curve)] if new else []
        for curve in reversed(curves):  # the first one that shows a metric decides
            for name in curve.select(new):
                full = f"{logger._prefix}{logger.LOGGER_JOIN_CHAR}{name}" if logger._prefix else name
                summary = f"{curve.goal},last" if curve.goal else "last"
                logger.experiment.define_metric(full, step_metric=STEP, step_sync=True, summary=summary)

    def _send_media(self, trainer: pl.Trainer) -> None:
        media: dict[str, Media] = {}
        for section in self._sections:
            for key, item in section.media.items():
                media[key if key not in media else f"{key} ({section.title})"] = item
        if not media:
            return
        step = self.history[-1].step if self.history else trainer.global_step
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                row = {**{key: for_wandb(item) for key, item in media.items()}, STEP: step}
                attempt(logger, lambda logger=logger, row=row: logger.experiment.log(row))  # type: ignore[misc]
            elif isinstance(logger, TensorBoardLogger):
                for key, item in media.items():
                    to_tensorboard(logger.experiment, key, item, step)

    def _keep_artifacts(self, trainer: pl.Trainer) -> None:
        try:
            artifacts = ask_for_artifacts(self._artifact_providers)
        except ProviderError as error:
            self._warn("artifacts", str(error))
            return
        for name, tensors in artifacts.items():
            digest = tensors_digest(tensors)
            if self._artifacts.get(name) == digest:
                continue
            self._artifacts[name] = digest
            path = cast(Path, self.folder) / "artifacts" / f"{name}.pt"
            self._write(lambda _, path=path, tensors=tensors: save_tensors(path, tensors))  # type: ignore[misc]
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger) and path.is_file():
                    attempt(logger, partial(log_artifact, logger, name, path, trainer.global_step))


# ---- facts -----------------------------------------------------------------------------------------------------------------------------


def wandb_offline_without_login() -> bool:
    """Set ``WANDB_MODE=offline`` in this process if W&B has no key and no mode is chosen; W&B would ask for one, or fail.

    See :func:`lit_methods.runs.wandb.has_login` for where a key is looked for. W&B reads the variable once, so that after a
    ``wandb.login(key=...)`` in this process it has no effect.

    Returns:
        Whether the mode was set here.
    """
    if "WANDB_MODE" in os.environ or has_login():
        return False
    os.environ["WANDB_MODE"] = "offline"
    return True


def _append(path: Path, text: str) -> None:
    """Add a line, the whole of it or nothing: on a full disk the lines before it can still be read."""
    content = text.encode()
    with path.open("ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        try:
            if file.write(content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            file.truncate(end)
            raise


def _duration(elapsed: datetime.timedelta) -> str:
    minutes, seconds = divmod(int(elapsed.total_seconds()), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _hyperparameters(pl_module: pl.LightningModule) -> str:
    """The module's ``save_hyperparameters`` as YAML, for runs without the ``lit`` command."""
    plain = json.loads(json.dumps(dict(pl_module.hparams), default=str))
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True) if plain else ""


def _checkpoints(trainer: pl.Trainer, folder: Path) -> list[tuple[str, str, str]]:
    """Path (relative to the folder where it lies there), role and score of what the checkpoint callbacks have kept."""
    rows: dict[str, tuple[str, str]] = {}
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            rows.update({path: ("kept", f"{callback.monitor} {float(score):.5g}") for path, score in callback.best_k_models.items()})
            if callback.best_model_path:
                score = "" if callback.best_model_score is None else f"{callback.monitor} {float(callback.best_model_score):.5g}"
                rows[callback.best_model_path] = ("best" if callback.monitor else "latest", score)
            if callback.last_model_path:
                rows.setdefault(callback.last_model_path, ("last", ""))
    return [(os.path.relpath(path, folder) if Path(path).is_relative_to(folder) else path, *row) for path, row in rows.items()]
