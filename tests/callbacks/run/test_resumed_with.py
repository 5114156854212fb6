"""A resume says what is other than it was when the checkpoint was saved, and names both values."""

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from helpers import Classifier, Images, KillAt, tiny_trainer
from lit_methods.callbacks import CAST, ExactResume, IterativeSoftShrinkage
from lit_methods.datamodules.loaders import make_loader


class Adam(Classifier):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def fit(callback: pl.Callback | None, checkpoint: Path | None = None, save: Path | None = None, seed: int = 0, **options: Any) -> None:
    callbacks = [*([callback] if callback else []), ExactResume(), *([ModelCheckpoint(save, filename="{step}")] if save else [])]
    given = {"max_epochs": 2, "limit_val_batches": 0, "enable_checkpointing": save is not None} | options
    trainer = tiny_trainer(callbacks=callbacks, **given)
    trainer.fit(Adam(), make_loader(Images(), 8, shuffle=True, seed=seed), ckpt_path=checkpoint)


def saved_with(callback: pl.Callback | None, folder: Path) -> Path:
    fit(callback, save=folder, max_epochs=1)
    return folder / "step=3.ckpt"


def cast(**arguments: Any) -> CAST:
    return CAST(**{"targets": ["network.7"], "n": 2, "m": 4, "total_steps": 6} | arguments)


def shrinkage(**arguments: Any) -> IterativeSoftShrinkage:
    return IterativeSoftShrinkage(**{"ratio": 0.7, "prune_iters": 4, "reg_interval": 1} | arguments)


@pytest.mark.parametrize(
    ("make", "changed", "said"),
    [
        (cast, {"n": 1}, "CAST goes on with other arguments .*: n was 2 and is 1"),
        (cast, {"m": 8, "n": 4}, "n was 2 and is 4, m was 4 and is 8"),
        (shrinkage, {"ratio": 0.5}, "IterativeSoftShrinkage goes on with other arguments .*: .*ratio was 0.7 and is 0.5"),
        (shrinkage, {"method": "iht"}, "method was 'iss_p' and is 'iht'"),
    ],
)
def test_arguments_that_have_changed_are_named(make: Any, changed: dict[str, Any], said: str, tmp_path: Path) -> None:
    checkpoint = saved_with(make(), tmp_path)
    with pytest.warns(UserWarning, match=said):
        fit(make(**changed), checkpoint)


def test_nothing_is_said_where_nothing_has_changed(tmp_path: Path) -> None:
    checkpoint = saved_with(shrinkage(), tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(shrinkage(), checkpoint)
    assert not [str(warning.message) for warning in caught if "goes on with" in str(warning.message)]


def test_the_technique_that_is_missing_is_named(tmp_path: Path) -> None:
    checkpoint = saved_with(cast(), tmp_path)
    with pytest.raises((ValueError, RuntimeError), match=r"saved in a run with CAST, which this run lacks: add it again"):
        fit(None, checkpoint)


def test_a_technique_that_the_checkpoint_lacks_is_named(tmp_path: Path) -> None:
    checkpoint = saved_with(None, tmp_path)
    with pytest.raises((ValueError, RuntimeError), match=r"this run has CAST, and the checkpoint was saved without"):
        fit(cast(), checkpoint)


def test_another_seed_of_the_data_at_an_epochs_end_is_named(tmp_path: Path) -> None:
    checkpoint = saved_with(None, tmp_path)
    with pytest.warns(UserWarning, match="another order of the data than its checkpoint was saved with: seed was 0 and is 5"):
        fit(None, checkpoint, seed=5)


def test_another_seed_of_the_data_in_mid_epoch_is_refused(tmp_path: Path) -> None:
    trainer = tiny_trainer(callbacks=[ExactResume(), KillAt(2, tmp_path / "a.ckpt")], max_epochs=1, limit_val_batches=0)
    with pytest.raises(Exception, match=""):
        trainer.fit(Adam(), make_loader(Images(), 8, shuffle=True, seed=0))
    with pytest.raises(ValueError, match="seed was 0 and is 5"):
        fit(None, tmp_path / "a.ckpt", seed=5)
