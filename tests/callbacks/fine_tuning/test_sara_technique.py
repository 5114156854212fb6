"""SaRA on modules that aren't ours: what is chosen and moves, memory of the optimiser, re-selection, resume, deltas."""

import copy
import math
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from helpers import (
    Classifier,
    Images,
    TwoOptimisers,
    assert_state_dicts_equal,
    cloned_state,
    kill_and_resume,
    left_behind,
    resnet_classifier,
    run_two_processes,
    tiny_trainer,
)
from lit_methods.callbacks import S2FT, EMATeacher, ExactResume, MaskedAdamW, SaRA
from lit_methods.callbacks.fine_tuning.delta import fuse, load_delta, unfuse
from lit_methods.callbacks.fine_tuning.sara import core
from lit_methods.datamodules.loaders import make_loader


class Small(Classifier):
    """Convolution, group norm, linear; trained by AdamW."""

    def __init__(self, lr: float = 0.02) -> None:
        torch.manual_seed(7)
        layers = [nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 16), nn.ReLU(), nn.Linear(16, 4)]
        super().__init__(nn.Sequential(*layers))
        self.lr = lr

    def configure_optimizers(self) -> torch.optim.Optimizer:  # type: ignore[override]
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


RANKED = {"rank_weight": 0.05, "rank_min_size": 3, "rank_min_entries": 5}


def sara(**options: Any) -> SaRA:
    return SaRA(**{"threshold": None, "share": 0.3, "progressive_steps": 2, **RANKED} | options)


def loader(number: int = 24) -> DataLoader:
    return DataLoader(Images(number), batch_size=6)


def fit(callback: Any, module: pl.LightningModule | None = None, **options: Any) -> pl.LightningModule:
    module = Small() if module is None else module
    callbacks = callback if isinstance(callback, list) else [callback]
    tiny_trainer(**{"max_epochs": 1, "limit_val_batches": 0, "callbacks": callbacks} | options).fit(module, loader())
    return module


# ---- the maths -------------------------------------------------------------------------------------------------------------------------


def test_the_threshold_of_a_share():
    weights = [torch.tensor([[1.0, -2.0], [3.0, 0.0]]), torch.tensor([-5.0])]
    assert core.threshold_of(weights, 0.4) == 2.0
    assert core.threshold_of(weights, 0.0) == 0.0
    assert core.threshold_of(weights, 1.0) == math.inf
    assert core.small_weights(torch.tensor([0.0, 1.0, -1.0, 0.5]), 1.0).tolist() == [True, False, False, True]


def test_numbers_of_the_paper():
    assert core.sara_learning_rate(2e-3) == pytest.approx(4.97e-4, rel=1e-3)
    assert core.sara_learning_rate(2e-4) == pytest.approx(9.3e-4, rel=3e-3)
    assert [core.is_reselection(step, 2) for step in (2, 3, 4)] == [False, True, False]
    assert not any(core.is_reselection(step, -1) for step in range(5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_penalty_has_the_gradient_of_autograd(dtype):
    torch.manual_seed(0)
    weight, mask = torch.randn(5, 7, dtype=dtype, requires_grad=True), torch.rand(5, 7) < 0.5
    loss, grad = core.nuclear_norm(weight, mask, 0.3)
    wanted = 0.3 * torch.linalg.matrix_norm(weight * mask, "nuc")
    torch.testing.assert_close(loss, wanted.detach())
    torch.testing.assert_close(grad, torch.autograd.grad(wanted, weight)[0] * mask)
    nothing = core.nuclear_norm(weight, torch.zeros_like(mask), 0.3)
    assert nothing[0] == 0
    assert not nothing[1].any()
    assert core.effective_rank(torch.eye(4)) == pytest.approx(4)
    assert core.effective_rank(torch.zeros(3, 3)) == 0


def test_the_masked_optimiser_is_adamw_on_its_mask():
    torch.manual_seed(0)
    start, mask = torch.randn(4, 6), torch.rand(4, 6) < 0.5
    ours, torchs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    masked, plain = MaskedAdamW([ours], lr=0.1), torch.optim.AdamW([torchs], lr=0.1)
    masked.set_mask(ours, mask)
    for _ in range(4):
        ours.grad = torch.randn(4, 6)
        torchs.grad = ours.grad.clone()
        masked.step()
        plain.step()
    torch.testing.assert_close(ours[mask], torchs[mask])
    assert torch.equal(ours[~mask], start[~mask])
    assert masked.state[ours]["exp_avg"].shape == (int(mask.sum()),)
    with pytest.raises(ValueError, match="have no moments: it must lie inside the one before"):
        masked.set_mask(ours, torch.ones_like(mask))
    with pytest.raises(ValueError, match=r"give a bool mask of the parameter's shape \(4, 6\)"):
        masked.set_mask(ours, mask[0])


def test_the_optimisers_state_is_saved():
    torch.manual_seed(0)

    def make(start: Tensor) -> tuple[nn.Parameter, MaskedAdamW]:
        weight = nn.Parameter(start.clone())
        return weight, MaskedAdamW([weight], lr=0.1)

    weight, optimizer = make(torch.randn(5, 5))
    optimizer.set_mask(weight, torch.rand(5, 5) < 0.5)
    weight.grad = torch.randn(5, 5)
    optimizer.step()
    other, resumed = make(weight.detach())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert resumed.state[other]["index"].dtype == torch.int64
    for own, steps in ((weight, optimizer), (other, resumed)):
        own.grad = weight.grad.clone()
        steps.step()
    assert torch.equal(weight, other)


# ---- the callback ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choose", ["smallest", "largest", "random"])
def test_only_the_chosen_entries_move(choose):
    module = Small()
    before = cloned_state(module)
    callback = sara(choose=choose, progressive_steps=-1)
    fit(callback, module)
    delta = callback.delta()
    for name, value in cloned_state(module.network).items():
        old, chosen = before[f"network.{name}"], torch.zeros(value.numel(), dtype=torch.bool)
        if name in delta.entries:
            chosen[delta.entries[name].index] = True
        assert torch.equal(value.flatten()[~chosen], old.flatten()[~chosen]), name
        if choose == "smallest":
            assert torch.equal(chosen, old.flatten().abs() < delta.notes["threshold"])
    total = sum(value.numel() for value in before.values())
    assert delta.numel == pytest.approx(0.3 * total, rel=0.1)
    assert delta.numel == int(0.3 * total) or choose != "smallest"


def test_gradient_and_moments_are_those_of_the_entries():
    seen = {}

    class Look(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            seen["dense"] = [name for name, own in pl_module.named_parameters() if own.grad is not None and own.ndim > 1]
            seen["grad"] = sum(own.grad.numel() for own in pl_module.parameters() if own.grad is not None)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            (optimizer,) = trainer.optimizers
            assert isinstance(optimizer, MaskedAdamW)
            seen.setdefault("moments", []).append(sum(state["exp_avg"].numel() for state in optimizer.state.values()))

    callback = sara()
    fit([callback, Look()])
    assert not seen["dense"]
    assert seen["grad"] == callback.delta().numel == seen["moments"][0] == seen["moments"][1]
    assert seen["moments"][2] < seen["moments"][1], "the re-selection before the third step drops moments"


def test_what_has_grown_past_the_threshold_is_frozen():
    states = []

    class Keep(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            states.append(cloned_state(pl_module))

    callback = sara(rank_weight=0.0)
    fit([callback, Keep()], Small(lr=0.05))
    tau = callback.delta().notes["threshold"]
    grown = 0
    for name, value in states[1].items():
        large = value.abs() >= tau
        grown += int((large & (states[0][name] != value)).sum())
        assert torch.equal(states[3][name][large], value[large]), name
    assert grown > 10
    assert any(not torch.equal(states[3][name], value) for name, value in states[1].items())


@pytest.mark.parametrize("kill_at", [1, 2, 3])
def test_a_killed_run_ends_like_the_whole_one(kill_at, tmp_path):
    shift = iter([0.0, 0.0, 0.3])  # the resumed process builds other weights, of which it would choose others

    def build() -> tuple[Any, Any, list[pl.Callback]]:
        module = Small()
        with torch.no_grad():
            module.network[4].weight.add_(next(shift))
        return module, make_loader(Images(24), batch_size=6, shuffle=True, seed=0), [sara(), ExactResume()]

    whole, resumed = kill_and_resume(build, 4, kill_at, tmp_path)
    assert_state_dicts_equal(resumed, whole)


def in_two_processes(devices: int) -> dict[str, Tensor]:
    module = Small()
    data = make_loader(Images(24), batch_size=6 // devices, shuffle=False, seed=0)
    options = {"devices": devices, "strategy": "ddp"} if devices > 1 else {}
    tiny_trainer(max_epochs=1, limit_val_batches=0, callbacks=[sara()], **options).fit(module, data)
    return cloned_state(module)


def test_two_processes_end_like_one():
    first, second = run_two_processes(in_two_processes, 2)
    assert_state_dicts_equal(first, second)
    assert_state_dicts_equal(first, in_two_processes(1), atol=1e-5)


def test_nothing_is_left_behind():
    assert left_behind(Small, sara, loader()) == {}
    assert all(parameter.requires_grad for parameter in fit(sara()).parameters())


@pytest.mark.parametrize("build", [resnet_classifier, TwoOptimisers])
def test_modules_of_others(build):
    module = fit(sara(progressive_steps=1), build())
    assert all(value.isfinite().all() for value in module.state_dict().values() if value.is_floating_point())


def test_channels_last_weights():
    module = Small().to(memory_format=torch.channels_last)
    base, callback = copy.deepcopy(module), sara()
    fit(callback, module)
    fuse(base.network, callback.delta())
    assert_state_dicts_equal(cloned_state(base), cloned_state(module))


def test_bf16_accumulation_clipping_and_a_teacher():
    module = fit([sara(), EMATeacher(decay=0.5)], precision="bf16-mixed", accumulate_grad_batches=2, gradient_clip_val=0.1)
    assert all(value.isfinite().all() and value.dtype == torch.float32 for value in module.state_dict().values())


def test_tied_tensors_are_left_out():
    transformers = pytest.importorskip("transformers")
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)

    class Language(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = transformers.GPT2LMHeadModel(
                transformers.GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2, n_positions=8, **dropout)
            )

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.model(batch, labels=batch).loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    module, callback = Language(), sara()
    base = copy.deepcopy(module.model)
    with pytest.warns(UserWarning, match=r"leaves out tensors.*model.transformer.wte.weight, model.lm_head.weight \(tied\)"):
        tiny_trainer(max_epochs=1, limit_val_batches=0, callbacks=[callback]).fit(module, DataLoader(torch.arange(8).repeat(4, 1), 2))
    assert module.model.lm_head.weight is module.model.transformer.wte.weight
    fuse(base, callback.delta())
    assert_state_dicts_equal(cloned_state(base), cloned_state(module.model))


def test_a_delta_goes_on_and_comes_off(tmp_path):
    base, module, callback = Small().network, Small(), sara()
    fit(callback, module)
    start = cloned_state(base)
    fused = fuse(base, load_delta(callback.save_delta(tmp_path / "sara.safetensors")))
    assert_state_dicts_equal(cloned_state(base), cloned_state(module.network))
    unfuse(base, fused)
    assert_state_dicts_equal(cloned_state(base), start)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": None}, r"threshold is None and share is None"),
        ({"threshold": 0.1}, r"threshold is 0.1 and share is 0.3"),
        ({"threshold": -1.0, "share": None}, r"threshold is -1.0"),
        ({"share": 1.5}, r"share is 1.5"),
        ({"progressive_steps": -2}, r"progressive_steps is -2"),
        ({"choose": "largest"}, r"choose='largest' knows no threshold"),
        ({"rank_weight": -1.0}, r"rank_weight is -1.0"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        sara(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1e-12, "share": None, "targets": ["network.4"]}, r"SaRA: no entry lies below the threshold 1e-12, the smallest is"),
        ({"skip": ["nowhere"]}, r"SaRA: skip pattern 'nowhere' matches no submodule of Small"),
        ({"targets": ["network.2"]}, r"SaRA: Small has no tensor to train"),
    ],
)
def test_what_cannot_work_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        fit(sara(**options))


def test_one_callback_of_the_family():
    with pytest.raises(ValueError, match="can't be used together: each freezes what the other one trains"):
        fit([sara(), S2FT()])
