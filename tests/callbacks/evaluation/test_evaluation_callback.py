"""One method serves validation and test."""

from typing import Any

import lightning.pytorch as pl

from helpers import Classifier, Images, tiny_trainer
from lit_methods.callbacks.evaluation.callback import EvaluationCallback, Split
from lit_methods.datamodules.loaders import make_loader


class Tested(Classifier):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:  # type: ignore[override]
        """Two loaders ask for the third argument."""

    def test_step(self, batch: Any, batch_idx: int) -> int:
        return batch_idx


class Notes(EvaluationCallback):
    def __init__(self) -> None:
        super().__init__()
        self.notes: list[tuple[Any, ...]] = []

    def begin_evaluation(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: Split) -> None:
        self.notes.append(("begin", split))

    def evaluate_batch(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, split: Split, dataloader_idx: int
    ) -> None:
        self.notes.append((len(batch[0]), outputs, split, dataloader_idx))

    def end_evaluation(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: Split) -> None:
        pl_module.log(f"notes/{split}", float(len(self.notes)))
        self.notes.append(("end", split))


def test_validation_and_test_come_through_the_same_methods() -> None:
    loader = make_loader(Images(), 12, shuffle=False, seed=0)
    notes = Notes()
    trainer = tiny_trainer(callbacks=[notes])
    trainer.validate(Tested(), [loader, loader], verbose=False)
    batches = [(12, None, "val", 0)] * 2 + [(12, None, "val", 1)] * 2
    assert notes.notes == [("begin", "val"), *batches, ("end", "val")]
    assert trainer.callback_metrics["notes/val"] == 5
    notes.notes.clear()
    trainer.test(Tested(), loader, verbose=False)
    assert notes.notes == [("begin", "test"), (12, 0, "test", 0), (12, 1, "test", 0), ("end", "test")]
    assert trainer.callback_metrics["notes/test"] == 3
