"""What is drawn after a resume is what would have been drawn without the kill."""

import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor, nn
from torch.utils.data import DataLoader

from helpers import Classifier, Images, assert_state_dicts_equal, cloned_state, kill_and_resume, run_two_processes, tiny_trainer
from lit_methods import distributed
from lit_methods.callbacks.run.exact_resume import ExactResume, capture_random_state, restore_random_state
from lit_methods.datamodules.loaders import make_loader


def draw() -> list[float]:
    """One number from every global generator, also a Gaussian: Python and NumPy keep the second of a pair."""
    return [torch.rand(()).item(), random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn()]  # noqa: NPY002


def test_captured_state_is_restored_after_a_trip_through_a_file(tmp_path: Path) -> None:
    draw()  # leaves half a pair of Gaussians behind
    torch.save(capture_random_state(torch.device("cpu")), tmp_path / "state")
    expected = [draw(), draw()]
    pl.seed_everything(99, verbose=False)
    assert draw() != expected[0]
    restore_random_state(torch.load(tmp_path / "state", weights_only=True))
    assert [draw(), draw()] == expected


class Noisy(BoringModel):
    """Lightning's demo with dropout, and noise from all generators in the step and in the validation."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Dropout(0.3), nn.Linear(32, 2))  # type: ignore[assignment]

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return super().training_step(batch * (1 + sum(draw())), batch_idx)

    def validation_step(self, batch: Tensor, batch_idx: int) -> Any:
        draw()
        return super().validation_step(batch, batch_idx)


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 20

    def __getitem__(self, draw: tuple[int, int]) -> Tensor:
        return torch.from_numpy(np.random.default_rng(draw).normal(size=32)).float()


class Data(pl.LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        return make_loader(Rows(), 4, shuffle=True, seed=1, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        return make_loader(Rows(), 4, shuffle=False, seed=1)


@pytest.mark.parametrize("kill_at", [3, 5, 7])
@pytest.mark.parametrize("kwargs", [{}, {"limit_val_batches": 0}, {"num_sanity_val_steps": 2}, {"val_check_interval": 2}])
def test_bit_equal_after_a_kill(tmp_path: Path, kill_at: int, kwargs: dict[str, Any]) -> None:
    whole, resumed = kill_and_resume(lambda: (Noisy(), Data(), [ExactResume()]), 12, kill_at, tmp_path, **kwargs)
    assert_state_dicts_equal(resumed, whole)


def test_without_the_callback_it_differs(tmp_path: Path) -> None:
    whole, resumed = kill_and_resume(lambda: (Noisy(), Data(), []), 12, 7, tmp_path)
    assert not torch.equal(whole["layer.1.weight"], resumed["layer.1.weight"])


@pytest.mark.parametrize("length", [{"max_epochs": 3}, {"max_steps": 13}])
@pytest.mark.parametrize("at_train_end", [True, False])
def test_bit_equal_after_a_resume_at_an_epochs_end(tmp_path: Path, length: dict[str, int], at_train_end: bool) -> None:
    def fit(seed: int, ckpt_path: Path | None) -> dict[str, Tensor]:
        pl.seed_everything(seed, verbose=False)
        module = Noisy()
        save = ModelCheckpoint(tmp_path / str(seed), filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=at_train_end)
        trainer = tiny_trainer(enable_checkpointing=True, callbacks=[save, ExactResume()], **length)
        trainer.fit(module, datamodule=Data(), ckpt_path=ckpt_path, weights_only=True)
        assert trainer.global_step == length.get("max_steps", 15)
        return cloned_state(module) | {"epoch": torch.tensor(trainer.current_epoch)}

    whole = fit(0, None)
    assert_state_dicts_equal(fit(1, tmp_path / "0" / "epoch=0.ckpt"), whole)


def test_validation_takes_nothing_from_training(tmp_path: Path) -> None:
    def fit(limit_val_batches: int) -> dict[str, Tensor]:
        pl.seed_everything(3, verbose=False)
        module = Noisy()
        trainer = tiny_trainer(max_epochs=2, callbacks=[ExactResume()], limit_val_batches=limit_val_batches, val_check_interval=2)
        trainer.fit(module, datamodule=Data())
        return cloned_state(module)

    assert_state_dicts_equal(fit(2), fit(0))


def test_a_checkpoint_saved_within_validation_holds_the_state_of_training(tmp_path: Path) -> None:
    class Saves(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            self.training = torch.get_rng_state()

        def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            self.validation = torch.get_rng_state()
            trainer.save_checkpoint(tmp_path / "a.ckpt")

    saves = Saves()
    tiny_trainer(max_epochs=1, limit_val_batches=1, callbacks=[ExactResume(), saves]).fit(Noisy(), datamodule=Data())
    (saved,) = torch.load(tmp_path / "a.ckpt", weights_only=True)["lit_methods.ExactResume"]
    assert not torch.equal(saves.training, saves.validation)
    assert torch.equal(saved["torch"], saves.training)


def test_other_checkpoints_are_taken_with_a_warning(tmp_path: Path) -> None:
    def resume(path: Path) -> None:
        trainer = tiny_trainer(max_steps=3, limit_val_batches=0, callbacks=[ExactResume()])
        trainer.fit(Noisy(), datamodule=Data(), ckpt_path=path)

    trainer = tiny_trainer(max_steps=2, limit_val_batches=0)
    trainer.fit(Noisy(), datamodule=Data())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.warns(UserWarning, match="saved without ExactResume"):
        resume(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=False)
    checkpoint["lit_methods.ExactResume"] = [capture_random_state()] * 2
    torch.save(checkpoint, tmp_path / "b.ckpt")
    with pytest.warns(UserWarning, match="saved by 2 ranks and is resumed by 1"):
        resume(tmp_path / "b.ckpt")


def train_with_a_stream_per_rank(tmp_path: Path, resume: bool) -> tuple[dict[str, Tensor], float]:
    pl.seed_everything(100 * resume + distributed.rank(), verbose=False)
    module = Classifier()
    callbacks = [ExactResume(), ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)]
    trainer = tiny_trainer(max_steps=5, devices=2, strategy="ddp", callbacks=callbacks, enable_checkpointing=True, limit_val_batches=0)
    data = make_loader(Images(), 4, shuffle=True, seed=1, drop_last=True)
    trainer.fit(module, data, ckpt_path=tmp_path / "step=2.ckpt" if resume else None, weights_only=True)
    return cloned_state(module), torch.rand(()).item()


def test_every_rank_gets_its_own_stream_back(tmp_path: Path) -> None:
    (whole, draw_0), (_, draw_1) = run_two_processes(train_with_a_stream_per_rank, tmp_path, False)
    (resumed, again_0), (_, again_1) = run_two_processes(train_with_a_stream_per_rank, tmp_path, True)
    assert draw_0 != draw_1
    assert (again_0, again_1) == (draw_0, draw_1)
    assert_state_dicts_equal(resumed, whole)


class AsksForSteps(Classifier):
    """Lightning sets its loaders up before it has read the checkpoint."""

    def configure_optimizers(self):  # type: ignore[no-untyped-def,override]
        optimiser = super().configure_optimizers()
        total = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.1, total_iters=total)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def test_a_module_that_asks_for_the_number_of_steps_goes_on_with_the_next_batch(tmp_path: Path) -> None:
    def build() -> tuple[pl.LightningModule, Any, list[pl.Callback]]:
        return AsksForSteps(), make_loader(Images(24), 4, shuffle=True, seed=0), [ExactResume()]

    whole, resumed = kill_and_resume(build, 5, 2, tmp_path, max_epochs=2)
    assert_state_dicts_equal(resumed, whole)
