"""The teacher follows its recursion on optimiser steps, survives a kill, and is invisible to the module."""

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel, ManualOptimBoringModel
from lightning.pytorch.demos.transformer import LightningTransformer
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from helpers import (
    Classifier,
    Images,
    TwoOptimisers,
    assert_state_dicts_equal,
    cloned_state,
    compiled_classifier,
    fingerprint,
    kill_and_resume,
    resnet_classifier,
    run_two_processes,
    tiny_trainer,
)
from lit_methods.averages import cosine_decay, ema_update, half_life_decay, warmup_decay
from lit_methods.callbacks.averaging.ema import EMATeacher
from lit_methods.callbacks.features import FeatureCapture
from lit_methods.callbacks.run.exact_resume import ExactResume
from lit_methods.datamodules.loaders import make_loader


def images(batch_size: int = 8, **kwargs: Any) -> DataLoader:
    return make_loader(Images(), batch_size, shuffle=True, seed=3, drop_last=True, **kwargs)


# ---- the functions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", [0.0, 0.3, 0.99, 1.0])
def test_update_equals_the_formula(dtype: torch.dtype, decay: float) -> None:
    average = [torch.randn(3, 4).to(dtype), torch.randn(()).to(dtype)]
    source = [torch.randn(3, 4).to(dtype), torch.randn(()).to(dtype)]
    expected = [decay * a.double() + (1 - decay) * s.double() for a, s in zip(average, source, strict=True)]
    ema_update(average, source, decay)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    for a, e in zip(average, expected, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), e, atol=tolerance, rtol=tolerance)
    if decay == 0:
        assert all(torch.equal(a, s) for a, s in zip(average, source, strict=True))


def test_update_mixes_dtypes_copies_integers_and_keeps_digits() -> None:
    wide, narrow = torch.zeros(2), torch.ones(2, dtype=torch.bfloat16)
    count, flag = torch.tensor(3), torch.tensor(False)
    for _ in range(100):
        ema_update([wide, count, flag], [narrow, torch.tensor(8), torch.tensor(True)], 0.999)
    torch.testing.assert_close(wide, torch.full((2,), 1 - 0.999**100), atol=1e-5, rtol=0)
    assert (count.item(), flag.item()) == (8, True)
    started = torch.ones(2, requires_grad=True)
    ema_update([started], [torch.zeros(2, requires_grad=True)], 0.5)  # leaves of a graph are no obstacle
    assert started.tolist() == [0.5, 0.5]
    assert started.grad_fn is None


def test_update_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"decay is 1\.5"):
        ema_update([], [], 1.5)
    with pytest.raises(ValueError, match="1 averaged tensors don't fit the 2"):
        ema_update([torch.ones(1)], [torch.ones(1), torch.ones(1)], 0.5)
    with pytest.raises(ValueError, match="don't fit"):
        ema_update([torch.ones(1)], [torch.ones(2)], 0.5)


def test_schedules() -> None:
    assert warmup_decay(0, 0.99) == pytest.approx(0.1)
    assert warmup_decay(8, 0.99) == pytest.approx(0.5)
    assert warmup_decay(10_000, 0.99) == 0.99
    assert cosine_decay(0, 100, 0.9) == pytest.approx(0.9)
    assert cosine_decay(50, 100, 0.9) == pytest.approx(0.95)
    assert cosine_decay(25, 100, 0.9) == pytest.approx(1 - 0.1 * (math.sqrt(0.5) + 1) / 2)
    assert cosine_decay(100, 100, 0.9) == cosine_decay(500, 100, 0.9) == pytest.approx(1.0)
    assert half_life_decay(250) ** 250 == pytest.approx(0.5)
    with pytest.raises(ValueError, match="half_life is 0"):
        half_life_decay(0)


# ---- the callback ------------------------------------------------------------------------------------------------------


class History(pl.Callback):
    """The student's tensors at the start and after every optimiser step, seen from outside."""

    def __init__(self, of: str = "") -> None:
        self.of, self.states = of, []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.states = [cloned_state(pl_module.get_submodule(self.of))]

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step == len(self.states):
            self.states.append(cloned_state(pl_module.get_submodule(self.of)))


def recursion(states: list[dict[str, Tensor]], decays: list[float], averaged_buffers: bool = False) -> dict[str, Tensor]:
    average = {name: value.double() for name, value in states[0].items()}
    for state, decay in zip(states[1:], decays, strict=True):
        for name, value in state.items():
            buffer = "running" in name or "num_batches" in name
            if (buffer and not averaged_buffers) or "num_batches" in name:
                average[name] = value.double()
            else:
                average[name] = decay * average[name] + (1 - decay) * value.double()
    return average


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(
    ("kwargs", "decays"),
    [
        ({"decay": 0.7}, [0.7] * 4),
        ({"decay": 0.7, "buffers": "average"}, [0.7] * 4),
        ({"decay": 0.15, "schedule": "warmup"}, [0.1, 0.15, 0.15, 0.15]),
        ({"decay": 0.6, "schedule": "cosine"}, [cosine_decay(i, 4, 0.6) for i in range(4)]),
        ({"decay": 0.6, "schedule": "cosine", "total_steps": 8}, [cosine_decay(i, 8, 0.6) for i in range(4)]),
        ({"half_life": 2.0}, [0.5**0.5] * 4),
    ],
)
def test_follows_the_recursion_on_optimiser_steps(accumulate: int, kwargs: dict[str, Any], decays: list[float]) -> None:
    ema, history = EMATeacher(["network"], **kwargs), History("network")
    trainer = tiny_trainer(max_steps=4, accumulate_grad_batches=accumulate, callbacks=[ema, history])
    trainer.fit(Classifier(), images(4))
    expected = recursion(history.states, decays, kwargs.get("buffers") == "average")
    teacher = {name: value.double() for name, value in ema.teacher.module.state_dict().items()}
    assert_state_dicts_equal(teacher, expected, atol=1e-6)
    assert not torch.equal(teacher["0.weight"], history.states[-1]["0.weight"].double())


class OfflineTransformer(LightningTransformer):
    def prepare_data(self) -> None:
        """The demo would download its text here."""


def boring_data() -> DataLoader:
    return DataLoader(torch.randn(12, 32), batch_size=4)


def words() -> DataLoader:
    tokens = torch.randint(0, 20, (6, 5))
    return DataLoader(TensorDataset(tokens, tokens.roll(-1, 1)), batch_size=2)


STRANGERS = {
    "boring": (BoringModel, boring_data, "layer"),
    "manual": (ManualOptimBoringModel, boring_data, "layer"),
    "two optimisers": (TwoOptimisers, images, "network"),
    "transformer": (lambda: OfflineTransformer(vocab_size=20), words, "model"),
    "resnet18": (resnet_classifier, images, "network"),
    "compiled": (compiled_classifier, images, "network"),
}


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("name", STRANGERS)
def test_a_strangers_module_gets_a_teacher_and_is_left_as_it_was(name: str, whole: bool) -> None:
    build, data, target = STRANGERS[name]
    torch._dynamo.reset()

    def train(callbacks: list[pl.Callback]) -> pl.LightningModule:
        pl.seed_everything(0, verbose=False)
        module = build()
        tiny_trainer(max_steps=2, limit_val_batches=0, callbacks=callbacks).fit(module, data())
        return module

    alone = train([])
    ema = EMATeacher([] if whole else [target], decay=0.5)
    module = train([ema])
    assert_state_dicts_equal(module.state_dict(), alone.state_dict())
    assert {k: v for k, v in fingerprint(module).items() if k} == {k: v for k, v in fingerprint(alone).items() if k}
    assert sorted(vars(module)) == sorted(vars(alone))
    assert not any("teacher" in key for key in module.state_dict())
    teacher = ema.teacher.module
    assert not any(m.training for m in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    student = module if whole else module.get_submodule(target)
    assert sum(p.numel() for p in teacher.parameters()) == sum(p.numel() for p in student.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(teacher.parameters(), student.parameters(), strict=True))


def test_the_copy_is_fresh_evaluates_and_does_not_disturb_features() -> None:
    seen: dict[str, Any] = {}

    class Distils(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:  # type: ignore[override]
            with FeatureCapture(self, ["network.7"]) as features:
                student = self.network(batch[0])
                teacher = ema.teacher(batch[0])
                seen["calls"] = len(features.calls["network.7"])
            seen["first"] = seen.get("first", torch.equal(ema.teacher.module[0].weight, self.network[0].weight))  # type: ignore[index]
            seen["repeats"] = torch.equal(teacher, ema.teacher(batch[0]))
            seen["gradient"] = teacher.requires_grad
            return (student - teacher).square().mean()

    ema = EMATeacher(["network"], decay=0.9)
    with pytest.raises(RuntimeError, match="made when fit starts"):
        _ = ema.teacher
    trainer = tiny_trainer(max_steps=2, callbacks=[ema], num_sanity_val_steps=1)
    trainer.fit(Distils(), images(), images())
    assert seen == {"calls": 1, "first": True, "repeats": True, "gradient": False}


def test_several_teachers_and_state_keys() -> None:
    ema = EMATeacher(["network.[57]"], decay=0.9)
    other = EMATeacher(["network.0"], decay=0.5)
    trainer = tiny_trainer(max_steps=2, callbacks=[ema, other])
    trainer.fit(Classifier(), images())
    assert list(ema.teachers) == ["network.5", "network.7"]
    with pytest.raises(RuntimeError, match="there are 2, ask teachers"):
        _ = ema.teacher
    assert ema.state_key != other.state_key


def test_float32_average_of_bf16_weights_keeps_moving() -> None:
    def drift(float32: bool) -> tuple[float, torch.dtype, dict[str, Any]]:
        ema, history = EMATeacher(["layer"], decay=0.998, float32=float32), History("layer")
        pl.seed_everything(0, verbose=False)
        trainer = tiny_trainer(max_steps=30, limit_val_batches=0, precision="bf16-true", callbacks=[ema, history], max_epochs=20)
        trainer.fit(BoringModel(), boring_data())
        expected = recursion(history.states, [0.998] * 30)["weight"]
        state = ema.state_dict()["averages"]["layer"]["weight"]
        return (state.double() - expected).abs().max().item(), ema.teacher.module.weight.dtype, state.dtype

    wide_error, dtype, saved = drift(float32=True)
    assert (dtype, saved) == (torch.bfloat16, torch.float32)  # the teacher computes as the student does
    assert wide_error < 1e-6
    narrow_error, _, saved = drift(float32=False)
    assert saved == torch.bfloat16
    assert narrow_error > 100 * wide_error


@pytest.mark.parametrize("float32", [False, True])
@pytest.mark.parametrize("kill_at", [2, 4])
def test_killed_and_resumed(tmp_path: Path, kill_at: int, float32: bool) -> None:
    """The module learns from its teacher, so a teacher that isn't restored exactly shows in the module's weights."""

    class Distils(Classifier):
        ema: EMATeacher

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:  # type: ignore[override]
            return (self.network(batch[0]) - 2 * type(self).ema.teacher(batch[0]) - 1).square().mean()

    teachers = []

    def build() -> tuple[pl.LightningModule, Any, list[pl.Callback]]:
        Distils.ema = EMATeacher(["network"], decay=0.5, schedule="warmup", float32=float32)
        teachers.append(Distils.ema)
        return Distils(), images(), [ExactResume(), Distils.ema]

    precision = "bf16-true" if float32 else "32-true"
    whole, resumed = kill_and_resume(build, 6, kill_at, tmp_path, precision=precision)
    assert_state_dicts_equal(resumed, whole)
    uninterrupted, _, again = teachers
    assert_state_dicts_equal(again.state_dict()["averages"]["network"], uninterrupted.state_dict()["averages"]["network"])
    assert again.state_dict()["latest_step"] == 6
    saved = torch.load(tmp_path / "killed.ckpt", weights_only=True)
    assert not any("teacher" in key for key in saved["state_dict"])


def train_on_two_ranks(steps: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    ema = EMATeacher(["network"], decay=0.5)
    module = Classifier()
    tiny_trainer(max_steps=steps, devices=2, strategy="ddp", callbacks=[ema]).fit(module, images(4))
    return cloned_state(ema.teacher.module), cloned_state(module.network)


def test_equal_on_all_ranks_running_statistics_too() -> None:
    (first, student), (second, other) = run_two_processes(train_on_two_ranks, 3)
    assert not torch.equal(student["1.running_mean"], other["1.running_mean"])  # the students' differ
    assert_state_dicts_equal(first, second)
    assert torch.equal(first["1.running_mean"], student["1.running_mean"])  # rank 0 decides


def without_batch_statistics() -> tuple[EMATeacher, Classifier]:
    torch.manual_seed(5)
    return EMATeacher(["network"], decay=0.5), Classifier(nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.Tanh(), nn.Linear(6, 4)))


def train_plain_on_two_ranks() -> dict[str, Tensor]:
    ema, module = without_batch_statistics()
    tiny_trainer(max_steps=4, devices=2, strategy="ddp", callbacks=[ema]).fit(module, images(4))
    return cloned_state(ema.teacher.module)


def test_two_ranks_equal_one_process() -> None:
    ema, module = without_batch_statistics()
    tiny_trainer(max_steps=4, callbacks=[ema]).fit(module, images(8))
    for teacher in run_two_processes(train_plain_on_two_ranks):
        assert_state_dicts_equal(teacher, cloned_state(ema.teacher.module), atol=1e-6)


def test_refusals_say_what_to_do() -> None:
    with pytest.raises(ValueError, match="decay is 2"):
        EMATeacher(decay=2)
    with pytest.raises(ValueError, match="schedule is 'linear'"):
        EMATeacher(schedule="linear")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="buffers is 'keep'"):
        EMATeacher(buffers="keep")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\['network'\]"):
        EMATeacher("network")
    with pytest.raises(ValueError, match="matches no submodule of Classifier; nearest"):
        tiny_trainer(max_steps=1, callbacks=[EMATeacher(["netwrk"])]).fit(Classifier(), images())
    with pytest.raises(ValueError, match="this training has none: set max_steps, max_epochs, or total_steps"):
        tiny_trainer(max_epochs=-1, callbacks=[EMATeacher(schedule="cosine")]).fit(Classifier(), images())
    trainer = tiny_trainer()
    trainer.strategy.__class__ = type("Sharded", (FSDPStrategy,), {})  # stands in for a strategy that needs GPUs
    trainer.strategy.__class__.__name__ = "FSDPStrategy"
    with pytest.raises(ValueError, match="FSDPStrategy shards them: use strategy='ddp'"):
        EMATeacher().setup(trainer, Classifier(), "fit")


def test_a_module_changed_while_fit_runs_is_reported() -> None:
    class Grows(Classifier):
        def on_train_start(self) -> None:
            self.network.add_module("extra", nn.Linear(4, 4))

    with pytest.raises(ValueError, match=r"network changed their names while fit ran \(\['extra.bias', 'extra.weight'\]\)"):
        tiny_trainer(max_steps=1, callbacks=[EMATeacher(["network"])]).fit(Grows(), images())


def test_a_checkpoint_of_another_module_is_reported(tmp_path: Path) -> None:
    ema = EMATeacher(["network.5"])
    trainer = tiny_trainer(max_steps=1, callbacks=[ema])
    trainer.fit(Classifier(), images())
    other = EMATeacher(["network.0"])
    other.load_state_dict(ema.state_dict())
    module = Classifier()
    trainer = tiny_trainer(max_steps=1)
    trainer.strategy.connect(module)
    other._loaded = ema.state_dict()
    with pytest.raises(ValueError, match=r"teacher of network\.0 has other tensors.*same module and targets"):
        other.on_fit_start(trainer, module)


def test_a_second_fit_has_its_own_length() -> None:
    ema, module = EMATeacher(schedule="cosine", decay=0.5), Classifier()
    for steps in (4, 12):
        tiny_trainer(max_steps=steps, callbacks=[ema]).fit(module, images())
        assert ema.total_steps is None
        assert ema.decay_at(steps // 2) == pytest.approx(cosine_decay(steps // 2, steps, 0.5))
    with pytest.raises(RuntimeError, match="give total_steps"):
        EMATeacher(schedule="cosine").decay_at(0)


def test_lightnings_tuner_saves_and_restores_within_fit() -> None:
    class Rated(Classifier):
        lr = 0.1

    def run(find: bool) -> dict[str, Tensor]:
        ema = EMATeacher(["network"], decay=0.5)
        finders = [pl.callbacks.LearningRateFinder(num_training_steps=3, update_attr=False)] if find else []
        pl.seed_everything(0, verbose=False)
        module = Rated(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)))
        tiny_trainer(max_steps=4, callbacks=[ema, *finders]).fit(module, DataLoader(Images(), 8))
        return cloned_state(ema.teacher.module)

    assert_state_dicts_equal(run(True), run(False))


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_layers_that_make_their_weight_at_each_call(norm: Any) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), norm(nn.Linear(192, 4)))
    ema = EMATeacher(["network"], decay=0.0)
    module = Classifier(network)
    tiny_trainer(max_steps=3, callbacks=[ema]).fit(module, images())
    x = torch.randn(2, 3, 8, 8)
    module.eval()
    torch.testing.assert_close(ema.teacher(x), module.network(x), rtol=1e-3, atol=1e-4)


def test_lazy_layers_are_refused() -> None:
    module = Classifier(nn.Sequential(nn.Flatten(), nn.LazyLinear(4)))
    with pytest.raises(ValueError, match=r"EMATeacher needs all weights when fit starts, but .*1\.weight.* has no shape yet"):
        tiny_trainer(max_steps=1, callbacks=[EMATeacher()]).fit(module, images())
