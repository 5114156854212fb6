"""LoRA by peft on modules that aren't ours: what is trained, saved and left."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from helpers import Images, assert_state_dicts_equal, cloned_state, kill_and_resume, left_behind, tiny_trainer
from lit_methods.callbacks import ExactResume, LoRA
from lit_methods.datamodules.loaders import make_loader


class Small(pl.LightningModule):
    """Two linear layers, trained by AdamW."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 4))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.02)


def loader() -> Any:
    return make_loader(Images(24), batch_size=6, shuffle=True, seed=0)


def lora(**options: Any) -> LoRA:
    return LoRA(**{"targets": ["network.1"], "rank": 3} | options)


def test_only_the_named_layer_changes_and_by_a_low_rank():
    pytest.importorskip("peft")
    module = Small()
    before, counts = cloned_state(module), []

    class Count(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            counts.append(sum(own.numel() for own in pl_module.parameters() if own.requires_grad))
            assert_state_dicts_equal(cloned_state(pl_module), before)  # under the names of the module alone

    tiny_trainer(max_epochs=1, limit_val_batches=0, callbacks=[lora(), Count()]).fit(module, loader())
    assert counts == [3 * (192 + 16)]
    after = cloned_state(module)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"network.1.weight"}
    assert torch.linalg.matrix_rank(after["network.1.weight"] - before["network.1.weight"], rtol=1e-4) == 3


def test_a_killed_run_ends_like_the_whole_one(tmp_path):
    pytest.importorskip("peft")
    whole, resumed = kill_and_resume(lambda: (Small(), loader(), [lora(), ExactResume()]), 4, 2, tmp_path)
    assert_state_dicts_equal(resumed, whole)


def test_nothing_is_left_behind():
    pytest.importorskip("peft")
    assert left_behind(Small, lora, loader()) == {}


def test_wrong_arguments_and_a_missing_library(monkeypatch):
    with pytest.raises(ValueError, match="targets is empty: name the layers"):
        LoRA([])
    with pytest.raises(ValueError, match="rank is 0"):
        lora(rank=0)
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ImportError, match=r'pip install "lit-methods\[peft\]"'):
        tiny_trainer(max_epochs=1, callbacks=[lora()]).fit(Small(), loader())
