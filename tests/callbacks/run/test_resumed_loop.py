"""A run goes on right behind the hook that saved: nothing of a batch, a validation or an epoch is lost, and nothing is done twice."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping
from torch import Tensor, nn
from torchmetrics import MeanMetric

from helpers import Images, assert_state_dicts_equal, cloned_state, small_network, tiny_trainer
from lit_methods.callbacks import Dashboard, ExactResume
from lit_methods.datamodules.loaders import make_loader


class Watched(pl.LightningModule):
    """Logs per step and per epoch, by value and by metric; one schedule counts epochs, one waits for a figure of the validation."""

    def __init__(self, by_hand: bool = False) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.network, self.mean = small_network(), MeanMetric()
        self.automatic_optimization = not by_hand

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        for optimiser in () if self.automatic_optimization else self.optimizers():  # type: ignore[union-attr]
            optimiser.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self.network(batch[0]), batch[1]))
            optimiser.step()
        loss = nn.functional.cross_entropy(self.network(batch[0]), batch[1])
        self.mean.update(loss)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("most", loss, on_step=False, on_epoch=True, reduce_fx="max")
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        torch.rand(3)
        self.log("val_loss", nn.functional.cross_entropy(self.network(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        if not self.automatic_optimization:
            return [torch.optim.SGD(self.network[:5].parameters(), lr=0.01), torch.optim.SGD(self.network[5:].parameters(), lr=0.01)]
        optimiser = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        waits = torch.optim.lr_scheduler.ReduceLROnPlateau(optimiser, factor=0.7, patience=0, threshold=10.0, threshold_mode="abs")
        every_step = {"scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(optimiser, patience=2), "monitor": "loss", "interval": "step"}
        return [optimiser], [
            torch.optim.lr_scheduler.ExponentialLR(optimiser, 0.9),
            {"scheduler": waits, "monitor": "val_loss", "strict": False},
            every_step,
        ]


class Counts(pl.Callback):
    """How often each hook was called in the run; the end of an epoch moves the weights."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        torch.rand(2)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.calls["on_validation_end"] += not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.calls["on_train_epoch_end"] += 1
        pl_module.log("epochs", float(self.calls["on_train_epoch_end"]))
        with torch.no_grad():
            for parameter in pl_module.parameters():
                parameter.mul_(1 - 0.01 * torch.rand(()))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.calls["on_train_end"] += 1

    def state_dict(self) -> dict[str, Any]:
        return dict(self.calls)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.calls = Counter(state_dict)


class SaveEverywhere(Checkpoint):
    """Saves in each hook in which Lightning's checkpoints, or ours, are saved; Lightning calls it behind all other callbacks."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.number = folder, 0

    def save(self, trainer: pl.Trainer, hook: str) -> None:
        if not trainer.sanity_checking:
            trainer.save_checkpoint(self.folder / f"{self.number:03d}-{hook}.ckpt")
            self.number += 1

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not pl_module.automatic_optimization or not trainer.fit_loop._should_accumulate():  # gradients aren't saved
            self.save(trainer, "on_train_batch_end")

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.save(trainer, "on_validation_batch_end")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.save(trainer, "on_validation_end")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.save(trainer, "on_train_epoch_end")


class Data(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        return make_loader(Images(), 5, shuffle=True, seed=0, drop_last=True)  # four batches

    def val_dataloader(self) -> Any:
        return make_loader(Images(8), 4, shuffle=False, seed=0)


def fit(folder: Path, seed: int, options: dict[str, Any], extra: list[pl.Callback], checkpoint: Path | None = None) -> dict[str, Any]:
    """Train to the end in ``folder``; everything that must be the same after a resume."""
    pl.seed_everything(seed, verbose=False)
    given = {"log_every_n_steps": 1} | options
    module, counts = Watched(given.pop("by_hand", False)), Counts()
    callbacks = [counts, Dashboard(), ExactResume(), *extra]
    if given.pop("stops", False):
        callbacks.append(EarlyStopping("val_loss", patience=1, mode="max", min_delta=9.0))
    trainer = tiny_trainer(default_root_dir=folder, callbacks=callbacks, enable_checkpointing=bool(extra), **given)
    trainer.fit(module, datamodule=Data(), ckpt_path=checkpoint, weights_only=True)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "weights": cloned_state(module),
        "optimisers": [optimiser.state_dict() for optimiser in trainer.optimizers],
        "schedules": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "step and epoch": (trainer.global_step, trainer.current_epoch, trainer.fit_loop.epoch_loop._batches_that_stepped),
        "calls": dict(counts.calls),
        "rows": rows,
        "callback metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "draws": torch.rand(2),
    }


def assert_same(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert_state_dicts_equal(actual["weights"], expected["weights"])
    for name in ("step and epoch", "calls", "rows", "schedules", "callback metrics"):
        assert actual[name] == expected[name], name
    torch.testing.assert_close(actual["optimisers"], expected["optimisers"], rtol=0, atol=0)
    assert torch.equal(actual["draws"], expected["draws"])


RUNS = {
    "epochs": {"max_epochs": 2},
    "steps": {"max_steps": 8},
    "ends in mid-epoch": {"max_steps": 6, "log_every_n_steps": 2},
    "validates twice an epoch": {"max_epochs": 2, "val_check_interval": 2},
    "validates by steps": {"max_steps": 8, "val_check_interval": 3, "check_val_every_n_epoch": None},
    "validates every other epoch": {"max_epochs": 3, "check_val_every_n_epoch": 2},
    "accumulates": {"max_epochs": 2, "accumulate_grad_batches": 3},
    "accumulates by steps": {"max_steps": 4, "accumulate_grad_batches": 2, "num_sanity_val_steps": 1},
    "without validation": {"max_steps": 8, "limit_val_batches": 0},
    "stops early": {"max_epochs": 6, "stops": True},
    "by hand": {"max_epochs": 2, "by_hand": True},
    "by hand, by steps": {"max_steps": 12, "by_hand": True},
}
FAST = ("epochs", "validates by steps")


@pytest.mark.parametrize("run", [run if run in FAST else pytest.param(run, marks=pytest.mark.thorough) for run in RUNS])
def test_every_checkpoint_of_a_run_leads_to_its_end(run: str, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    whole = fit(tmp_path, 0, RUNS[run], [SaveEverywhere(saved)])
    checkpoints = sorted(saved.iterdir())
    hooks = {path.stem.partition("-")[2] for path in checkpoints}
    assert {"on_train_batch_end", "on_train_epoch_end"} <= hooks
    for path in checkpoints:
        resumed = fit(tmp_path, 1, RUNS[run], [], path)  # metrics.jsonl goes on behind the checkpoint already: as after a late kill
        try:
            assert_same(resumed, whole)
        except AssertionError as error:
            raise AssertionError(f"{run}, {path.name}: {error}") from error
