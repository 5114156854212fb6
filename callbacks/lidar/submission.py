"""Predictions of a point segmentor as files in the benchmark's submission layout."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info

from lit_methods.runs.folder import run_dir


class SubmissionWriter(pl.Callback):
    """Writes what ``predict_step`` returns, one file per scan, through the datamodule's ``write_labels``.

    Runs: at the end of every predict batch; on several ranks each writes the scans that it predicted, so their files never meet. A file
    appears whole or not at all.
    Saves: nothing in checkpoints.
    Refuses: datamodules without ``write_labels``, and modules whose ``predict_step`` doesn't return {"token": list of B names, "labels":
    list of B (n_i,) integer tensors, training ids}.

    nuScenes: ``lidarseg/<split>/<token>_lidarseg.bin`` (uint8, challenge classes 1..16) and ``<split>/submission.json``. KITTI layout:
    ``sequences/<sequence>/predictions/<frame>.label`` (uint32, raw ids).

    Args:
        output: Folder of the submission; null: ``predictions/`` in the run's folder.
    """

    def __init__(self, output: Path | None = None) -> None:
        super().__init__()
        self.output = None if output is None else Path(output)
        self.num_written = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a datamodule that can't write its benchmark's files."""
        if stage == "predict" and not callable(getattr(getattr(trainer, "datamodule", None), "write_labels", None)):
            have = type(getattr(trainer, "datamodule", None)).__name__
            raise ValueError(
                f"SubmissionWriter needs a datamodule with write_labels(token, labels, folder), such as NuScenesDataModule; got {have}"
            )

    def folder(self, trainer: pl.Trainer) -> Path:
        """Where the files go."""
        return run_dir(trainer) / "predictions" if self.output is None else self.output

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count anew."""
        self.num_written = 0

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Write the scans of a batch."""
        if not isinstance(outputs, dict) or not {"token", "labels"} <= set(outputs):
            got = sorted(outputs) if isinstance(outputs, dict) else type(outputs).__name__
            raise ValueError(
                f"{type(pl_module).__name__}.predict_step must return a dict with 'token' and 'labels' for SubmissionWriter, got {got}"
            )
        tokens, labels = outputs["token"], outputs["labels"]
        if not isinstance(labels, Sequence) or len(tokens) != len(labels):
            raise ValueError(
                f"predict_step must return one label tensor per token, got {len(tokens)} tokens and {type(labels).__name__} of "
                f"{len(labels)}"
            )
        for token, scan in zip(tokens, labels, strict=True):
            trainer.datamodule.write_labels(token, scan, self.folder(trainer))  # type: ignore[attr-defined]
            self.num_written += 1

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the datamodule write what goes with the labels, and say where the files are."""
        close = getattr(trainer.datamodule, "close_predictions", None)  # type: ignore[attr-defined]
        if trainer.is_global_zero and callable(close):
            close(self.folder(trainer))
        rank_zero_info(f"predictions of {self.num_written} scans (this process) are in {self.folder(trainer)}")
