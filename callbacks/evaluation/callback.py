"""Base of the callbacks that do the same in validation and test."""

from typing import Any, Literal

import lightning.pytorch as pl

from lit_methods.callbacks.ordering import OrderedCallback
from lit_methods.checks import naming

Split = Literal["val", "test"]


class EvaluationCallback(OrderedCallback):
    """Subclass it, and write once what validation and test share.

    Runs: :meth:`begin_evaluation` at the start of an evaluation epoch, :meth:`evaluate_batch` after each of its batches,
    :meth:`end_evaluation` at its end, on all ranks.
    The sanity check is an evaluation, too: ask ``trainer.sanity_checking``.
    """

    def begin_evaluation(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: Split) -> None:
        """Forget the evaluation before."""

    def evaluate_batch(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, split: Split, dataloader_idx: int
    ) -> None:
        """Take in a batch and what the module's step returned for it."""

    def end_evaluation(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: Split) -> None:
        """Log; still within the epoch, so that ``pl_module.log`` may be called."""

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """:meth:`begin_evaluation`."""
        self.begin_evaluation(trainer, pl_module, "val")

    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """:meth:`begin_evaluation`."""
        self.begin_evaluation(trainer, pl_module, "test")

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """:meth:`evaluate_batch`."""
        with naming(type(self).__name__):
            self.evaluate_batch(trainer, pl_module, outputs, batch, "val", dataloader_idx)

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """:meth:`evaluate_batch`."""
        with naming(type(self).__name__):
            self.evaluate_batch(trainer, pl_module, outputs, batch, "test", dataloader_idx)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """:meth:`end_evaluation`."""
        self.end_evaluation(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """:meth:`end_evaluation`."""
        self.end_evaluation(trainer, pl_module, "test")


__all__ = ["EvaluationCallback", "Split"]
