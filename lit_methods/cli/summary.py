"""The table of a module's parts before a run, and its closing lines: what came out, and where it is."""

import datetime
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint, RichModelSummary
from lightning.pytorch.utilities.model_summary import get_human_readable_count

from lit_methods.files import shown


class PartsTable(RichModelSummary):
    """Lightning's table of a module's parts, without FLOPs where none were counted: a module without ``example_input_array`` has "0"."""

    @staticmethod
    def summarize(
        summary_data: list[tuple[str, list[str]]],
        total_parameters: int,
        trainable_parameters: int,
        model_size: float,
        total_training_modes: dict[str, int],
        total_flops: int,
        **summarize_kwargs: Any,
    ) -> None:
        """Print it."""
        if total_flops:
            RichModelSummary.summarize(
                summary_data, total_parameters, trainable_parameters, model_size, total_training_modes, total_flops, **summarize_kwargs
            )
            return
        from rich import get_console
        from rich.table import Table

        columns = [(name, values) for name, values in summary_data if name != "FLOPs"]
        table = Table(header_style="bold")
        for name, _ in columns:
            table.add_column(name.strip(), justify="right" if "Params" in name else "left", no_wrap=name == "Name")
        for row in zip(*(values for _, values in columns), strict=True):
            table.add_row(*row)
        get_console().print(table)
        count = get_human_readable_count
        print(f"{count(total_parameters).strip()} parameters ({model_size:,.2f} MB), {count(trainable_parameters).strip()} of them trained")


def print_summary(trainer: pl.Trainer, folder: Path, seconds: float, metrics: int = 12) -> None:
    """Print final metrics, wall time and the places of checkpoints, report and logs.

    Args:
        trainer: After ``fit``, ``validate``, ``test`` or ``predict``.
        folder: The run's own folder.
        seconds: Wall time of the run.
        metrics: How many metrics to show at most.
    """
    rows = summary_rows(trainer, folder, seconds, metrics)
    width = max(len(label) for label, _ in rows)
    print()
    print("\n".join(f"{label:{width}}  {value}" for label, value in rows), flush=True)


def summary_rows(trainer: pl.Trainer, folder: Path, seconds: float, metrics: int = 12) -> list[tuple[str, str]]:
    """Rows of the summary as (label, value); only files that exist are named."""
    stage = str(getattr(trainer.state.fn, "value", trainer.state.fn))
    fitted = stage == "fit"
    took = str(datetime.timedelta(seconds=round(seconds)))
    steps = f", {trainer.global_step} steps" if fitted else ""
    rows = [("finished" if trainer.state.finished else "stopped", f"{stage}{steps}, {took}")]
    # test and validate print their own table
    values = {name: float(value) for name, value in trainer.callback_metrics.items()} if fitted else {}
    names = [name for name in values if not (name.endswith("_step") and f"{name[:-5]}_epoch" in values)]
    rows += [(name, f"{values[name]:.4g}") for name in names[:metrics]]
    if len(names) > metrics:
        rows.append(("...", f"{len(names) - metrics} more metrics in the logs"))
    for callback in trainer.checkpoint_callbacks if fitted else []:
        if isinstance(callback, ModelCheckpoint):
            rows += _checkpoints(callback, folder)
    logs = {Path(directory) for directory in (_log_folder(logger) for logger in trainer.loggers) if directory}
    places = [("report", folder / "report.html"), *(("logs", log) for log in sorted(logs)), ("profile", folder / "profiler")]
    return rows + [(label, shown(path)) for label, path in [*places, ("run folder", folder)] if path.exists()]


def _checkpoints(callback: ModelCheckpoint, folder: Path) -> list[tuple[str, str]]:
    rows = []
    if callback.best_model_path and Path(callback.best_model_path).exists():
        score = "" if callback.best_model_score is None else f"  ({callback.monitor} = {float(callback.best_model_score):.4g})"
        rows.append(("best checkpoint" if callback.monitor else "checkpoint", shown(Path(callback.best_model_path)) + score))
    if callback.last_model_path and Path(callback.last_model_path).exists():
        rows.append(("last checkpoint", shown(Path(callback.last_model_path))))
    return rows


def _log_folder(logger: Any) -> str | None:
    log_dir = getattr(logger, "log_dir", None)
    if log_dir:
        return str(log_dir)
    save_dir = logger.save_dir
    return None if save_dir is None else str(Path(save_dir) / "wandb" if type(logger).__name__ == "WandbLogger" else Path(save_dir))
