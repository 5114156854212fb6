"""Declared order is applied, once, without losing a ``setup``; contradictions are explained."""

import itertools
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
)
from torch import Tensor

from helpers import Classifier, Images, tiny_trainer
from lit_methods.callbacks.averaging.ema import EMATeacher
from lit_methods.callbacks.loss_term import LossTerm
from lit_methods.callbacks.ordering import OrderedCallback, sort_callbacks
from lit_methods.callbacks.run.exact_resume import ExactResume
from lit_methods.datamodules.loaders import make_loader


class Plain(pl.Callback):
    pass


class First(OrderedCallback):
    runs_before = ("Base",)


class Base(OrderedCallback):
    pass


class Derived(Base):
    pass


class Last(OrderedCallback):
    runs_after = ("test_ordering.Base", "First")


def names(callbacks: list[pl.Callback]) -> list[str]:
    return [type(callback).__name__ for callback in callbacks]


def test_every_order_of_the_input_is_sorted() -> None:
    for order in itertools.permutations([First(), Derived(), Last(), Plain()]):
        placed = names(sort_callbacks(order))
        assert placed.index("First") < placed.index("Derived") < placed.index("Last")


def test_stable() -> None:
    callbacks = [Plain(), Derived(), Plain(), Base()]
    assert sort_callbacks(callbacks) == callbacks
    assert names(sort_callbacks([Last(), Plain(), First()])) == ["Plain", "First", "Last"]


def test_a_dotted_name_means_that_class_alone() -> None:
    class Picky(OrderedCallback):
        runs_before = ("elsewhere.Base", "lightning.pytorch.callbacks.ModelCheckpoint")

    assert names(sort_callbacks([Base(), ModelCheckpoint(), Picky()])) == ["Base", "Picky", "ModelCheckpoint"]


def test_two_of_a_kind() -> None:
    class Selfish(OrderedCallback):
        runs_before = ("OrderedCallback",)

    pair = [Selfish(), Selfish()]
    assert sort_callbacks([Base(), *pair])[:2] == pair


def test_cycles_and_conflicts_say_why() -> None:
    class A(OrderedCallback):
        runs_before = ("B",)

    class B(OrderedCallback):
        runs_before = ("C",)

    class C(OrderedCallback):
        runs_before = ("A",)
        conflicts_with = {"Plain": "both want the last word"}  # noqa: RUF012

    with pytest.raises(ValueError, match=r"A must come after C.*C must come after B.*B must come after A"):
        sort_callbacks([A(), B(), Base(), C()])
    with pytest.raises(ValueError, match="C and Plain can't be used together: both want the last word"):
        sort_callbacks([Plain(), C()])

    class Typo(OrderedCallback):
        runs_before = "Plain"

    with pytest.raises(TypeError, match="must be a sequence"):
        sort_callbacks([Plain(), Typo()])


def test_the_trainer_is_sorted_and_every_setup_runs_once() -> None:
    calls: list[tuple[str, str]] = []

    def recording(base: type[pl.Callback]) -> pl.Callback:
        class Recording(base):  # type: ignore[misc, valid-type]
            def setup(self, *args: Any, **kwargs: Any) -> None:
                calls.append(("setup", base.__name__))
                super().setup(*args, **kwargs)

            def on_train_start(self, *_: Any) -> None:
                calls.append(("start", base.__name__))

        return Recording()

    callbacks = [recording(base) for base in (Last, Base, Plain, First)]
    trainer = tiny_trainer(max_steps=1, callbacks=callbacks)
    handed_over = trainer.callbacks
    trainer.fit(Classifier(), make_loader(Images(), 8, shuffle=True, seed=0))
    assert [name for hook, name in calls if hook == "setup"] == ["Last", "Base", "Plain", "First"]
    assert [name for hook, name in calls if hook == "start"] == ["Plain", "First", "Base", "Last"]
    assert trainer.callbacks is not handed_over
    assert len(trainer.callbacks) == len(handed_over)


def test_too_late_for_setup_is_refused() -> None:
    class Reparametrises(OrderedCallback):
        set_up_before = ("WeightAveraging",)

    def fit(*callbacks: pl.Callback) -> None:
        tiny_trainer(max_steps=1, callbacks=list(callbacks)).fit(Classifier(), make_loader(Images(), 8, shuffle=True, seed=0))

    fit(Base(), Reparametrises(), EMAWeightAveraging())
    with pytest.raises(ValueError, match=r"Reparametrises must be set up before EMAWeightAveraging.*put Reparametrises first"):
        fit(Base(), EMAWeightAveraging(), Reparametrises())
    fit(*sort_callbacks([Base(), EMAWeightAveraging(), Reparametrises()]))

    class NeedsAverages(OrderedCallback):
        set_up_after = ("WeightAveraging",)

    fit(Base(), EMAWeightAveraging(), NeedsAverages())
    with pytest.raises(ValueError, match=r"EMAWeightAveraging must be set up before NeedsAverages.*put EMAWeightAveraging first"):
        fit(NeedsAverages(), Base(), EMAWeightAveraging())
    needs, averages = NeedsAverages(), EMAWeightAveraging()
    assert sort_callbacks([needs, averages]) == [averages, needs]


class Term(LossTerm):
    def term(self, inputs: dict[str, Any]) -> Tensor:
        return inputs["features"]["network.5"].square().mean()


OURS = {
    "LossTerm": lambda: Term(["network.5"]),
    "EMATeacher": lambda: EMATeacher(["network"], decay=0.5),
    "whole EMATeacher": lambda: EMATeacher(decay=0.5),
    "ExactResume": ExactResume,
}
THEIRS = {
    "EMAWeightAveraging": lambda: EMAWeightAveraging(decay=0.5),
    "StochasticWeightAveraging": lambda: StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1),
    "ModelPruning": lambda: ModelPruning("l1_unstructured", amount=0.5),
    "ModelCheckpoint": lambda: ModelCheckpoint(save_last=True),
    "GradientAccumulationScheduler": lambda: GradientAccumulationScheduler({0: 1, 1: 2}),
}


def end_weights(callbacks: list[pl.Callback], tmp_path: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    pl.seed_everything(1, verbose=False)
    module = Classifier()
    data = make_loader(Images(), 8, shuffle=True, seed=0, drop_last=True)
    trainer = tiny_trainer(max_epochs=3, callbacks=callbacks, default_root_dir=tmp_path, enable_checkpointing=True, limit_val_batches=1)
    trainer.fit(module, data, make_loader(Images(), 8, shuffle=False, seed=0))
    teachers = [(c.targets, c.teacher.module) for c in callbacks if isinstance(c, EMATeacher)]
    return dict(module.state_dict()), {f"{targets} {n}": t for targets, teacher in teachers for n, t in teacher.state_dict().items()}


@pytest.mark.parametrize("theirs", THEIRS)
@pytest.mark.parametrize("ours", OURS)
def test_with_lightnings_own_in_both_orders(ours: str, theirs: str, tmp_path: Any) -> None:
    orders = [[OURS[ours](), THEIRS[theirs]()], [THEIRS[theirs](), OURS[ours]()]]
    if "EMATeacher" in ours and theirs == "ModelPruning":
        for order in orders:
            with pytest.raises(ValueError, match="EMATeacher and ModelPruning can't be used together: pruning renames"):
                end_weights(order, tmp_path)
        return
    (first, first_teacher), (second, second_teacher) = (end_weights(order, tmp_path) for order in orders)
    for one, other in ((first, second), (first_teacher, second_teacher)):
        assert set(one) == set(other)
        assert all(torch.equal(one[name], other[name]) for name in one)
    if ours == "LossTerm":  # it isn't there in vain beside the other
        without, _ = end_weights([THEIRS[theirs]()], tmp_path)
        assert not torch.equal(without["network.0.weight"], first["network.0.weight"])


@pytest.mark.parametrize("pair", list(itertools.combinations(OURS, 2)))
def test_our_own_pairs(pair: tuple[str, str], tmp_path: Any) -> None:
    one, other = (end_weights([OURS[name]() for name in order], tmp_path) for order in (pair, pair[::-1]))
    for first, second in zip(one, other, strict=True):
        assert set(first) == set(second)
        assert all(torch.equal(first[name], second[name]) for name in first)
