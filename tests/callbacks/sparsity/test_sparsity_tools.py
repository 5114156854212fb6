"""Beside Lightning's tools a sparsity callback trains as it does alone: what a tuner tries is undone, masks and counts included.

That each tool works or is refused at all: ``tests/callbacks/test_lightning_tools.py``.
"""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn

from helpers import Images, assert_state_dicts_equal, cloned_state, tiny_trainer
from lit_methods.callbacks import (
    CAST,
    DSL,
    DynamicSparsity,
    IterativeSoftShrinkage,
    MaskedBNSparsity,
    NMSparsity,
    RandomPruning,
    SparseIFT,
    SparsityReport,
)

CALLBACKS: dict[str, Callable[[], Any]] = {
    "RandomPruning": lambda: RandomPruning(0.4),
    "SET": lambda: DynamicSparsity(0.4, "set", interval=2, end_fraction=1.0),
    "RigL": lambda: DynamicSparsity(0.4, "rigl", interval=2, end_fraction=1.0),
    "DSL": lambda: DSL(0.4, interval=2),
    "ISS-P": lambda: IterativeSoftShrinkage(0.5, prune_iters=4),
    "ISS-R": lambda: IterativeSoftShrinkage(0.5, "iss_r", prune_iters=4, reg_interval=1),
    "NMSparsity": lambda: NMSparsity(1, 2),
    "SR-STE": lambda: NMSparsity(1, 2, "srste"),
    "CAST": lambda: CAST(1, 2, distill="network", probe_interval=2),
    "CAST, naive": lambda: CAST(1, 2, "naive", distill="network"),
    "MaskedBNSparsity": lambda: MaskedBNSparsity("mask_sparsity", criterion="ratio"),
    "SparseIFT": lambda: SparseIFT(0.5, "wide", interval=2, flops_tolerance=None),
    "SparsityReport": SparsityReport,
}


class Small(pl.LightningModule):
    """A network with a batch norm, trained by AdamW with a schedule."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        inner = [nn.Linear(192, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU()]
        self.network = nn.Sequential(nn.Flatten(), *inner, nn.Linear(16, 4))
        self.lr = 0.01

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5), "interval": "step"}]


class Fetches(Small):
    def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
        return super().training_step(*next(dataloader_iter)[:2])


def loader() -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(Images(32), batch_size=4)


def result(module: pl.LightningModule, callback: Any) -> dict[str, Tensor]:
    masks = callback.sparsity_masks() if hasattr(callback, "sparsity_masks") else {}
    return cloned_state(module) | {f"mask of {name}": mask.clone() for name, mask in masks.items()}


def alone(name: str, module: type[Small] = Small, **kwargs: Any) -> dict[str, Tensor]:
    own, callback = module(), CALLBACKS[name]()
    tiny_trainer(max_epochs=1, callbacks=[callback], **kwargs).fit(own, loader())
    return result(own, callback)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", CALLBACKS)
def test_a_learning_rate_finder_changes_nothing(name: str, first: bool, tmp_path: Any) -> None:
    module, callback, finder = Small(), CALLBACKS[name](), LearningRateFinder(num_training_steps=5, update_attr=False)
    callbacks = [finder, callback] if first else [callback, finder]
    tiny_trainer(max_epochs=1, callbacks=callbacks, default_root_dir=tmp_path).fit(module, loader())
    assert finder.optimal_lr is not None
    tried = finder.optimal_lr.results["lr"]
    assert len(tried) > 2
    assert tried == sorted(set(tried)), "the trial's learning rate rises"
    assert_state_dicts_equal(result(module, callback), alone(name))


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_tuner_before_fit_changes_nothing(name: str, tmp_path: Any) -> None:
    module, callback = Small(), CALLBACKS[name]()
    trainer = tiny_trainer(max_epochs=1, callbacks=[callback], default_root_dir=tmp_path)
    Tuner(trainer).lr_find(module, train_dataloaders=loader(), num_training=5, update_attr=False)
    assert "training_step" not in vars(module)
    trainer.fit(module, loader())
    assert trainer.global_step == 8
    assert_state_dicts_equal(result(module, callback), alone(name))


@pytest.mark.parametrize("kwargs", [{"log_every_n_steps": 0}, {"log_every_n_steps": 1}], ids=["never logs", "always logs"])
@pytest.mark.parametrize("name", CALLBACKS)
def test_logging_changes_nothing(name: str, kwargs: dict[str, Any]) -> None:
    assert_state_dicts_equal(alone(name, **kwargs), alone(name))


@pytest.mark.parametrize("name", CALLBACKS)
def test_steps_that_take_an_iterator_train_alike(name: str) -> None:
    assert_state_dicts_equal(alone(name, Fetches), alone(name))


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_pickled_or_copied_callback_trains_alike(name: str) -> None:
    own, other = Small(), Small()
    pickled, used = pickle.loads(pickle.dumps(CALLBACKS[name]())), CALLBACKS[name]()
    tiny_trainer(max_epochs=1, callbacks=[pickled]).fit(own, loader())
    tiny_trainer(max_epochs=1, callbacks=[used]).fit(Small(), loader())
    pickle.dumps(used)
    copied = copy.deepcopy(used)
    tiny_trainer(max_epochs=1, callbacks=[copied]).fit(other, loader())
    assert_state_dicts_equal(result(own, pickled), result(other, copied))


def test_cast_with_labels_refuses_steps_that_take_an_iterator() -> None:
    with pytest.raises(ValueError, match="CAST with labels needs the batch of each step"):
        tiny_trainer(max_epochs=1, callbacks=[CAST(1, 2, distill="network", labels="label")]).fit(Fetches(), loader())


def test_the_report_counts_the_samples_of_steps_that_take_an_iterator() -> None:
    counts = []
    for make in (Small, Fetches):
        report = SparsityReport()
        tiny_trainer(max_epochs=1, callbacks=[report]).fit(make(), loader())
        counts.append(report._report["training"]["samples"])
    assert counts == [32, 32]
