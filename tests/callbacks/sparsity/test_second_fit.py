"""A second fit with the same callback goes on with its masks; of a new module it starts anew; arguments stay as they were given."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import Classifier, Images, cloned_state, fingerprint, tiny_trainer
from lit_methods.callbacks import CAST, DSL, DynamicSparsity, IterativeSoftShrinkage, NMSparsity, RandomPruning, SparseIFT

STATIC: dict[str, Callable[[], Any]] = {
    "RandomPruning": lambda: RandomPruning(0.4),
    "RandomPruning, SNIP": lambda: RandomPruning(0.4, method="snip", positions="score", logits="network"),
    "DynamicSparsity": lambda: DynamicSparsity(0.4, "static"),
    "DSL": lambda: DSL(0.4, fix=True),
    "IterativeSoftShrinkage": lambda: IterativeSoftShrinkage(0.6, "random"),
    "SparseIFT": lambda: SparseIFT(0.5, "wide", "static", flops_tolerance=None),
    "CAST, naive": lambda: CAST(1, 2, "naive", distill_weight=0.0),
}
MOVING: dict[str, Callable[[], Any]] = {
    "RigL": lambda: DynamicSparsity(0.4, "rigl", interval=2),
    "SET": lambda: DynamicSparsity(0.4, "set", interval=2),
    "DSL": lambda: DSL(0.4, interval=3),
    "SparseIFT": lambda: SparseIFT(0.5, "wide", "rigl", interval=2, flops_tolerance=None),
    "ISS-P": lambda: IterativeSoftShrinkage(0.6, prune_iters=3),
    "NMSparsity": lambda: NMSparsity(1, 2),
    "CAST": lambda: CAST(1, 2, distill_weight=0.0),
}


class Adam(Classifier):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def loader() -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(Images(24), batch_size=6)


def masks(callback: Any) -> dict[str, Tensor]:
    return {name: mask.clone() for name, mask in callback.sparsity_masks().items()}


def arguments(callback: Any) -> dict[str, Any]:
    names = type(callback).__init__.__code__.co_varnames[1 : type(callback).__init__.__code__.co_argcount]
    return {name: copy.copy(getattr(callback, name)) for name in names if hasattr(callback, name)}


@pytest.mark.parametrize("how", ["another trainer", "the same trainer"])
@pytest.mark.parametrize("name", STATIC)
def test_static_masks_stay(name: str, how: str) -> None:
    module, callback = Adam(), STATIC[name]()
    trainer = tiny_trainer(max_epochs=1, callbacks=[callback])
    trainer.fit(module, loader())
    first, weights = masks(callback), cloned_state(module)
    assert any(not bool(mask.all()) for mask in first.values())
    if how == "the same trainer":
        trainer.fit_loop.max_epochs = 3
        trainer.fit(module, loader())
    else:
        tiny_trainer(max_epochs=2, callbacks=[callback]).fit(module, loader())
    second = masks(callback)
    assert all(torch.equal(second[key], mask) for key, mask in first.items())
    state = module.state_dict()
    assert all(not state[key][~mask].any() for key, mask in first.items())
    assert any(not torch.equal(state[key], weights[key]) for key in first), "it trained on"


@pytest.mark.parametrize("name", STATIC)
def test_a_new_module_starts_anew(name: str) -> None:
    callback, other = STATIC[name](), STATIC[name]()
    for _ in range(2):
        module = Adam()
        tiny_trainer(max_epochs=1, callbacks=[callback]).fit(module, loader())
    fresh = Adam()
    tiny_trainer(max_epochs=1, callbacks=[other]).fit(fresh, loader())
    assert all(torch.equal(mask, other.sparsity_masks()[key]) for key, mask in callback.sparsity_masks().items())
    assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in module.state_dict().items())


@pytest.mark.parametrize("name", [*STATIC, *MOVING])
def test_arguments_stay_as_they_were_given(name: str) -> None:
    callback = (STATIC | MOVING)[name]()
    before = arguments(callback)
    tiny_trainer(max_epochs=1, callbacks=[callback]).fit(Adam(), loader())
    assert arguments(callback) == before


@pytest.mark.parametrize("name", MOVING)
def test_moving_masks_go_on_from_where_they_were(name: str) -> None:
    module, callback = Adam(), MOVING[name]()
    tiny_trainer(max_epochs=1, callbacks=[callback]).fit(module, loader())
    first, names = masks(callback), {name: found for name, found in fingerprint(module).items() if name}
    alive = {key: module.state_dict()[key] != 0 for key in first}
    lost: list[bool] = []
    module.on_train_start = lambda: lost.extend(bool((module.state_dict()[key][mask] == 0).any()) for key, mask in alive.items())
    tiny_trainer(max_epochs=2, callbacks=[callback]).fit(module, loader())
    del module.on_train_start
    assert lost
    assert not any(lost), "no weight was set to 0"
    assert {name: found for name, found in fingerprint(module).items() if name} == names
    share = [sum(int(mask.sum()) for mask in m.values()) for m in (first, masks(callback))]
    assert share[0] == share[1]


@pytest.mark.parametrize(("first", "second"), [(1, 5), (5, 1)])
def test_the_schedule_is_as_long_as_the_fit(first: int, second: int) -> None:
    rigl, dsl, module = DynamicSparsity(0.4, interval=1, end_fraction=1.0), DSL(0.4, interval=1, targets=["network.5"]), Adam()
    rigl.skip = ["network.5"]
    for epochs in (first, second):
        tiny_trainer(max_epochs=epochs, callbacks=[rigl, dsl]).fit(module, loader())
        assert max(rigl.updates) == 4 * epochs - 1
        assert dsl.ratio(4 * epochs) == pytest.approx(dsl.min_ratio)
        assert dsl.ratio(4 * epochs - 1) > dsl.min_ratio


def test_on_the_same_trainer_the_schedule_counts_what_is_left() -> None:
    rigl, module = DynamicSparsity(0.4, interval=1, end_fraction=1.0), Adam()
    trainer = tiny_trainer(max_epochs=1, callbacks=[rigl])
    trainer.fit(module, loader())
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, loader())
    assert trainer.global_step == 12
    assert max(rigl.updates) == 7, "8 steps are left"


def test_a_second_fit_behind_the_switch_keeps_what_was_pruned() -> None:
    module, callback = Adam(), IterativeSoftShrinkage(0.6, prune_iters=3)
    for _ in range(2):
        tiny_trainer(max_epochs=1, callbacks=[callback]).fit(module, loader())
    first = masks(callback)
    longer = tiny_trainer(max_epochs=2, callbacks=[callback])
    longer.fit(module, loader())
    assert all(torch.equal(mask, first[key]) for key, mask in masks(callback).items())
    assert not any(callback._picks.last), "nothing was picked anew"
