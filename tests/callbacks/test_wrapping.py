"""Additions come and go in any order; what was there before stays."""

import copy
import functools
import inspect
import itertools
from typing import Any

import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader

from helpers import fingerprint, tiny_trainer
from lit_methods.callbacks.wrapping import attach, built_by, detach, when_built


class Step(BoringModel):
    def training_step(self, batch: Any, batch_idx: int = 0) -> Any:  # type: ignore[override]
        return [batch]


def adds(word: str) -> Any:
    def add(output: list[Any], batch: Any) -> list[Any]:
        return [*output, word, batch]

    return add


def test_additions_run_in_order_and_see_the_batch() -> None:
    module = Step()
    attach(module, adds("a"))
    attach(module, adds("b"))
    assert module.training_step(3, 0) == [3, "a", 3, "b", 3]
    assert module.training_step(batch=4) == [4, "a", 4, "b", 4]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_leaving_in_any_order_leaves_nothing(order: tuple[int, ...]) -> None:
    module = Step()
    before = fingerprint(module)
    additions = [adds(word) for word in "abc"]
    for add in additions:
        attach(module, add)
    for gone, index in enumerate(order):
        assert len(module.training_step(0)) == 1 + 2 * (3 - gone)
        detach(module, additions[index])
        detach(module, additions[index])  # again: nothing happens
    assert fingerprint(module) == before
    assert module.training_step(0) == [0]


def test_an_own_step_of_the_instance_is_wrapped_and_put_back() -> None:
    module = Step()

    def own(batch: Any, batch_idx: int) -> Any:
        return ["own", batch]

    module.training_step = own  # type: ignore[method-assign]
    add = adds("a")
    attach(module, add)
    assert module.training_step(1, 0) == ["own", 1, "a", 1]
    detach(module, add)
    assert module.training_step is own


def test_a_compiled_step() -> None:
    module = Step()
    module.training_step = torch.compile(module.training_step, backend="eager")  # type: ignore[method-assign]
    compiled = module.training_step
    add = adds("a")
    attach(module, add)
    assert module.training_step(torch.ones(()), 0)[1] == "a"
    detach(module, add)
    assert module.training_step is compiled


def test_somebody_elses_wrapper_around_ours_stays() -> None:
    module = Step()
    add = adds("a")
    attach(module, add)
    ours = module.training_step

    @functools.wraps(ours)
    def theirs(*args: Any) -> Any:
        return ["theirs", *ours(*args)]

    module.training_step = theirs  # type: ignore[method-assign]
    detach(module, add)
    assert module.training_step is theirs
    assert module.training_step(1, 0) == ["theirs", 1]


@pytest.mark.parametrize("signature", ["batch", "batch_idx", "dataloader_iter"])
def test_lightning_still_reads_the_signature(signature: str) -> None:
    seen: list[Any] = []

    class OnlyBatch(BoringModel):
        def training_step(self, batch: Any) -> Any:  # type: ignore[override]
            return super().training_step(batch, 0)

    class Iterates(BoringModel):
        def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
            batch, batch_idx, _ = next(dataloader_iter)
            return super().training_step(batch, batch_idx)

    module = {"batch": OnlyBatch, "batch_idx": BoringModel, "dataloader_iter": Iterates}[signature]()
    parameters = list(inspect.signature(module.training_step).parameters)

    def add(output: Any, batch: Any) -> Any:
        seen.append(batch)
        return output

    attach(module, add)
    assert list(inspect.signature(module.training_step).parameters) == parameters
    tiny_trainer(max_steps=2).fit(module, DataLoader(torch.randn(8, 32), batch_size=4))
    assert len(seen) == 2
    if signature == "dataloader_iter":
        assert not isinstance(seen[0], torch.Tensor)  # the iterator itself
    else:
        assert seen[0].shape == (4, 32)


def test_a_deep_copy_of_the_module_can_be_made() -> None:
    module, add = Step(), adds("a")
    attach(module, add)
    twin = copy.deepcopy(module)
    detach(module, add)
    assert twin.training_step(0) == [0]  # the copy shares the wrapper, which adds nothing any more
    assert "training_step" not in vars(module)


def test_any_method_can_be_wrapped_and_an_addition_around_it_may_leave_the_call_out() -> None:
    module, seen = Step(), []
    before = fingerprint(module)

    def hold(call: Any, scheduler: Any, metric: Any) -> None:
        if scheduler != "waits":
            call(scheduler, metric)

    def note(output: None, scheduler: Any) -> None:
        seen.append(scheduler)

    attach(module, note, "lr_scheduler_step")
    attach(module, hold, "lr_scheduler_step", around=True)
    module.lr_scheduler_step("waits", None)  # type: ignore[arg-type]
    assert seen == [], "what stands outside keeps what stands inside from running"
    for add in (note, hold):
        detach(module, add, "lr_scheduler_step")
    scheduler = torch.optim.lr_scheduler.ConstantLR(torch.optim.SGD([torch.ones(1)], 0.1))
    for order in ((note, hold), (hold, note)):
        attach(module, note, "lr_scheduler_step")
        attach(module, hold, "lr_scheduler_step", around=True)
        module.lr_scheduler_step(scheduler, None)
        assert seen.pop() is scheduler
        for add in order:
            detach(module, add, "lr_scheduler_step")
            detach(module, add, "lr_scheduler_step")
        assert fingerprint(module) == before


def test_what_needs_the_layers_waits_for_the_hook_that_makes_them() -> None:
    class Late(BoringModel):
        def setup(self, stage: str) -> None:
            pass

        def configure_model(self) -> None:
            self.late = torch.nn.Linear(2, 2)

    done: list[bool] = []
    module = Late()
    before = fingerprint(module)
    assert (built_by(BoringModel()), built_by(module)) == (None, "configure_model")
    when_built(BoringModel(), lambda: done.append(True))
    assert done == [True], "at once"
    stop = when_built(module, lambda: done.append(hasattr(module, "late")))
    stop()
    stop()
    assert fingerprint(module) == before
    when_built(module, lambda: done.append(hasattr(module, "late")))
    module.setup("fit")
    assert done == [True]
    module.configure_model()
    assert done == [True, True], "behind the last hook"
    module.configure_model()
    assert done == [True, True], "once"
    assert "configure_model" not in vars(module)
