"""Media and files in the form that W&B and TensorBoard take."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

from lit_methods.catalog import techniques_in
from lit_methods.panels import CloudMedia, HistogramMedia, ImageMedia, Media
from lit_methods.reports.html import subsample

STEP = "trainer/global_step"  # the horizontal axis that Lightning's WandbLogger logs with every metric


def add_tags(logger: WandbLogger, candidates: list[Any]) -> None:
    """Tag the run with the slugs of the techniques in it, by which ``lit dashboard`` finds it."""
    slugs = [entry.slug for entry in techniques_in(type(candidate).__name__ for candidate in candidates)]
    run = logger.experiment
    missing = [slug for slug in slugs if slug not in (run.tags or ())]
    if missing:
        run.tags = (*(run.tags or ()), *missing)


def write_epoch_once(logger: TensorBoardLogger) -> None:
    """Leave out an epoch that stands at this step already: Lightning adds it to the figures of validation and to those of training.

    Calling this again for the same logger does nothing.
    """
    if "log_metrics" not in vars(logger):
        # no closure: strategies that spawn processes pickle the logger
        logger.log_metrics = functools.partial(_without_known_epoch, logger, {})  # type: ignore[method-assign]


def _without_known_epoch(logger: TensorBoardLogger, last: dict[str, Any], metrics: Mapping[str, float], step: int | None = None) -> None:
    now = {"step": step, "epoch": metrics.get("epoch")}
    kept = {name: value for name, value in metrics.items() if name != "epoch" or now != last}
    last |= now
    type(logger).log_metrics(logger, kept, step)


def log_artifact(logger: WandbLogger, name: str, path: Path, step: int) -> None:
    import wandb

    run = logger.experiment
    artifact = wandb.Artifact(f"{name}-{run.id}", type="mask", metadata={STEP: step})
    artifact.add_file(str(path))  # copied at once, so that a later version doesn't change this one
    run.log_artifact(artifact, aliases=["latest", f"step-{step}"])


def for_wandb(item: Media) -> Any:
    import wandb

    if isinstance(item, ImageMedia):
        return wandb.Image(item.pixels, caption=item.alt)
    if isinstance(item, CloudMedia):
        cloud = subsample(item, 100_000)
        return wandb.Object3D(np.concatenate([cloud.points, cloud.colors], axis=1, dtype=np.float64))
    if isinstance(item, HistogramMedia):
        return wandb.Histogram(np_histogram=(item.counts, item.edges))
    return wandb.Table(columns=list(item.columns), data=[list(row) for row in item.rows], allow_mixed_types=True)


def to_tensorboard(writer: Any, key: str, item: Media, step: int) -> None:
    if isinstance(item, ImageMedia):
        writer.add_image(key, item.pixels, step, dataformats="HWC")
    elif isinstance(item, HistogramMedia):
        counts, edges = np.asarray(item.counts, dtype=np.float64), np.asarray(item.edges, dtype=np.float64)
        middle = (edges[1:] + edges[:-1]) / 2
        writer.add_histogram_raw(
            key,
            min=float(edges[0]),
            max=float(edges[-1]),
            num=int(counts.sum()),
            sum=float(counts @ middle),
            sum_squares=float(counts @ middle**2),
            bucket_limits=edges[1:].tolist(),
            bucket_counts=counts.tolist(),
            global_step=step,
        )


__all__ = ["STEP", "add_tags", "for_wandb", "log_artifact", "to_tensorboard", "write_epoch_once"]
