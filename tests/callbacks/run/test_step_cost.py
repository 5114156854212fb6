"""What StepCost measures, on modules whose cost is known."""

import json
import mmap
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from helpers import Classifier, Images, TwoOptimisers, fingerprint, tiny_trainer
from lit_methods.callbacks import StepCost
from lit_methods.callbacks.run.step_cost import peak_memory


def touch(mib: int) -> mmap.mmap:
    """Fresh memory, all of it resident. A tensor may get pages which its allocator kept from an earlier test: no growth."""
    fresh = mmap.mmap(-1, mib * 2**20)
    for start in range(0, len(fresh), mmap.PAGESIZE):
        fresh[start] = 1
    return fresh


class Slow(Classifier):
    """Sleeps in its step, and holds on to memory."""

    def __init__(self, seconds: float = 0.02, mib: int = 0) -> None:
        super().__init__()
        self.seconds, self.mib = seconds, mib

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, torch.Tensor]:
        time.sleep(self.seconds)
        if self.mib:
            touch(self.mib).close()
        return super().training_step(batch, batch_idx)


def fit(folder: Path, module: pl.LightningModule, cost: StepCost, data: Any = None, **settings: Any) -> dict[str, Any]:
    data = data or torch.utils.data.DataLoader(Images(24), batch_size=4)
    trainer = tiny_trainer(callbacks=[cost], default_root_dir=folder, **({"max_epochs": 2, "limit_val_batches": 0} | settings))
    trainer.fit(module, data)
    found: dict[str, Any] = json.loads((folder / "cost.json").read_text())
    return found


def test_steps_parameters_and_seconds(tmp_path: Path) -> None:
    module = Slow(0.02)
    module.network[0].requires_grad_(False)
    found = fit(tmp_path, module, StepCost(warmup_steps=2))
    assert (found["steps"], found["batches"]) == (12, 12)
    assert found["parameters"] == sum(p.numel() for p in module.parameters()) - sum(p.numel() for p in module.network[0].parameters())
    assert len(found["seconds"]) == 12 - 2 - 1, "neither the warm-up nor the first step of the second epoch"
    assert 0.02 <= found["seconds_per_step"] < 10.0  # seconds, whatever else the machine does
    assert all(part <= whole for part, whole in zip(found["data_seconds"], found["seconds"], strict=True))
    assert found["flops_per_batch"] is None
    assert found["interrupted"] is False
    plain = Slow(0.0)
    tiny_trainer(max_epochs=2, limit_val_batches=0).fit(plain, torch.utils.data.DataLoader(Images(24), batch_size=4))
    assert fingerprint(module) == fingerprint(plain), "nothing stays behind"


class SlowImages(Images):
    def __getitem__(self, draw: Any) -> tuple[torch.Tensor, torch.Tensor]:
        time.sleep(0.01)
        return super().__getitem__(draw)


def test_reading_data_is_in_the_step_and_for_itself(tmp_path: Path) -> None:
    found = fit(tmp_path, Classifier(), StepCost(), torch.utils.data.DataLoader(SlowImages(24), batch_size=4), max_epochs=1)
    assert found["data_seconds_per_step"] >= 0.04
    assert found["seconds_per_step"] >= found["data_seconds_per_step"]


def test_accumulated_batches_are_one_optimiser_step(tmp_path: Path) -> None:
    found = fit(tmp_path, Classifier(), StepCost(), accumulate_grad_batches=3)
    assert (found["steps"], found["batches"]) == (4, 12)


def test_manual_optimisation_is_measured_too(tmp_path: Path) -> None:
    found = fit(tmp_path, TwoOptimisers(), StepCost(), max_epochs=1)
    assert (found["steps"], found["batches"]) == (12, 6)


def test_operations_are_those_of_forward_and_backward(tmp_path: Path) -> None:
    class Linear(Classifier):
        def __init__(self) -> None:
            super().__init__(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4, bias=False)))

    found = fit(tmp_path, Linear(), StepCost(flops=True))
    product = 2 * 4 * 192 * 4  # batch x in x out, a multiplication and an addition each
    assert found["flops_per_batch"] == 2 * product, "forward, and the gradient of the weight"
    assert len(found["seconds"]) == 12 - 2 - 2, "the counted step and the first of the second epoch aren't timed"


def test_the_counter_is_left_when_the_step_fails(tmp_path: Path) -> None:
    class Broken(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 2:
                raise ValueError("broken")
            return super().training_step(batch, batch_idx)

    cost = StepCost(flops=True)
    with pytest.raises(ValueError, match="broken"):
        fit(tmp_path, Broken(), cost)
    assert cost._counter is None
    assert not torch.utils._python_dispatch._len_torch_dispatch_stack()
    assert not (tmp_path / "cost.json").exists()


def test_memory_is_the_growth_during_training(tmp_path: Path) -> None:
    touch(200).close()  # an earlier peak
    found = fit(tmp_path, Slow(0.0, mib=100), StepCost(), max_epochs=1)
    if found["memory"] == "resident":
        assert 95 <= found["peak_mib"] < 195
    else:
        assert found["peak_mib"] >= 0
    small = fit(tmp_path, Slow(0.0, mib=0), StepCost(), max_epochs=1)
    assert small["peak_mib"] < 90


def test_peak_memory_counts_from_its_start() -> None:
    peak = peak_memory(torch.device("cpu"))
    held = touch(64)
    bytes_, how = peak()
    assert how.startswith("resident")
    assert bytes_ >= 0
    if how == "resident":
        assert bytes_ >= 60 * 2**20
    held.close()


def test_steps_behind_a_validation_are_not_timed(tmp_path: Path) -> None:
    loader = torch.utils.data.DataLoader(Images(24), batch_size=4)
    trainer = tiny_trainer(callbacks=[cost := StepCost(warmup_steps=0)], default_root_dir=tmp_path, max_epochs=1, val_check_interval=2)
    trainer.fit(Classifier(), loader, loader)
    assert len(cost._seconds) == 3, "of six, the first and the two behind a validation within the epoch are left out"


def test_lazy_layers_are_counted_when_they_have_a_shape(tmp_path: Path) -> None:
    module = Slow(0.0)
    module.network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(4))
    assert fit(tmp_path, module, StepCost(), max_epochs=1)["parameters"] == 192 * 4 + 4
