"""GroupSparsity: proximal step and penalty on anyone's weights."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from helpers import Classifier, Images, TwoOptimisers, assert_state_dicts_equal, cloned_state, left_behind, run_two_processes, tiny_trainer
from lit_methods.callbacks import GroupSparsity
from lit_methods.callbacks.sparsity.group_sparsity import group_norms, group_penalty, group_shrink


def loader(batch_size=6):
    return DataLoader(Images(), batch_size)


def fit(model, *callbacks, **kwargs):
    trainer = tiny_trainer(**{"max_steps": 4, "limit_val_batches": 0, "log_every_n_steps": 1} | kwargs, callbacks=list(callbacks))
    trainer.fit(model, loader())
    return trainer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shrinking_is_the_proximal_step(dtype):
    """It minimises 1/2 |W - V|^2 + t sum of norms: nothing near it is better, and small groups are exactly 0."""
    torch.manual_seed(0)
    weight, threshold = torch.randn(5, 3, 2).to(dtype), 1.2
    shrunk = group_shrink(weight, threshold, (0, 2))
    assert shrunk.dtype == dtype
    norms = group_norms(weight, (0, 2))
    assert norms.shape == (3,)

    def objective(w):
        return 0.5 * (w.double() - weight.double()).square().sum() + threshold * group_penalty(w.double(), (0, 2))

    if dtype != torch.bfloat16:
        best = objective(shrunk)
        assert all(objective(shrunk + 1e-2 * torch.randn(shrunk.shape, dtype=dtype)) > best for _ in range(50))
    dead = group_shrink(weight, float(norms.max()) + 1, (0, 2))
    assert torch.equal(dead, torch.zeros_like(dead))
    assert torch.equal(group_shrink(torch.zeros(2, 2), 0.0), torch.zeros(2, 2)), "no division by zero"


def test_the_gradient_at_a_group_of_zeros_is_zero():
    weight = torch.tensor([[3.0, 0.0], [4.0, 0.0]], requires_grad=True)
    penalty = group_penalty(weight)
    penalty.backward()
    assert float(penalty) == 5.0
    torch.testing.assert_close(weight.grad, torch.tensor([[0.6, 0.0], [0.8, 0.0]]))


def test_each_step_is_the_optimisers_and_then_the_proximal_one():
    plain, sparse = Classifier(), Classifier()
    assert_state_dicts_equal(cloned_state(plain), cloned_state(sparse))
    torch.manual_seed(1)
    fit(plain, max_steps=1)
    torch.manual_seed(1)
    callback = GroupSparsity(["network.5"], weight=2.0, over=[0])
    trainer = fit(sparse, callback, max_steps=1)
    expected = group_shrink(plain.network[5].weight, 0.1 * 2.0, (0,))  # learning rate 0.1
    torch.testing.assert_close(sparse.network[5].weight, expected, rtol=0, atol=0)
    assert torch.equal(sparse.network[0].weight, plain.network[0].weight)
    zeros = (group_norms(expected) == 0).float().mean()
    assert float(trainer.callback_metrics["group_sparsity/zero_groups"]) == float(zeros) > 0
    assert float(trainer.callback_metrics["group_sparsity/penalty"]) == pytest.approx(float(group_norms(expected).sum()))


def test_the_penalty_joins_the_gradient_and_its_step_size_is_ones_own():
    plain, penalised, stepped = Classifier(), Classifier(), Classifier()
    start = plain.network[5].weight.detach().clone()
    for model, callbacks in (
        (plain, []), (penalised, [GroupSparsity(["network.5"], weight=2.0, mode="penalty")]),
        (stepped, [GroupSparsity(["network.5"], weight=2.0, step_size=0.5)]),
    ):  # fmt: skip
        torch.manual_seed(1)
        fit(model, *callbacks, max_steps=1)
    direction = start / start.norm(dim=0, keepdim=True)
    torch.testing.assert_close(penalised.network[5].weight, plain.network[5].weight - 0.1 * 2.0 * direction, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(stepped.network[5].weight, group_shrink(plain.network[5].weight, 1.0), atol=0, rtol=0)


def test_accumulated_batches_shrink_once():
    plain, sparse = Classifier(), Classifier()
    for model, callbacks in ((plain, []), (sparse, [GroupSparsity(["network.5"], weight=1.0)])):
        torch.manual_seed(1)
        fit(model, *callbacks, max_steps=1, accumulate_grad_batches=2)
    assert torch.equal(sparse.network[5].weight, group_shrink(plain.network[5].weight, 0.1))


def test_with_optimisers_by_hand_each_shrinks_its_own():
    model, callback = TwoOptimisers(), GroupSparsity(["network.5", "network.7"], weight=50.0)
    fit(model, callback, max_steps=2)
    assert all((norms == 0).all() for norms in callback.norms().values())
    assert set(callback.norms()) == {"network.5.weight", "network.7.weight"}


def test_filters_of_convolutions_are_groups():
    model = Classifier()
    callback = GroupSparsity(["network.0"], weight=0.5, over=[1, 2, 3])
    fit(model, callback)
    assert callback.norms()["network.0.weight"].shape == (4,)


@pytest.mark.parametrize("raises", [None, RuntimeError])
@pytest.mark.parametrize("mode", ["proximal", "penalty"])
def test_nothing_is_left_behind(mode, raises):
    class Breaks(GroupSparsity):
        def on_train_batch_end(self, trainer, *rest):
            super().on_train_batch_end(trainer, *rest)
            if raises and trainer.global_step == 2:
                raise raises("stop")

    assert not left_behind(Classifier, lambda: Breaks(["network.5"], mode=mode), loader(), raises)


def test_after_a_run_the_optimiser_steps_alone():
    model, callback = Classifier(), GroupSparsity(["network.5"], weight=1.0)
    trainer = fit(model, callback)
    (optimizer,) = trainer.optimizers
    before = group_norms(model.network[5].weight.detach().clone())
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(group_norms(model.network[5].weight.detach()), before)


def test_a_second_fit_goes_on():
    model, callback = Classifier(), GroupSparsity(["network.5"], weight=1.0)
    fit(model, callback, max_steps=1)
    first = int((callback.norms()["network.5.weight"] == 0).sum())
    fit(model, callback, max_steps=4)
    assert int((callback.norms()["network.5.weight"] == 0).sum()) >= first
    assert len(callback.dashboard_media()["group_sparsity/weights"].rows) == 1


def test_two_of_them_log_under_names_of_their_own():
    figures = fit(Classifier(), GroupSparsity(["network.5"], weight=0.0), GroupSparsity(["network.7"], weight=1e3)).callback_metrics
    assert float(figures["group_sparsity/zero_groups"]) == 0
    assert float(figures["group_sparsity_2/zero_groups"]) == 1


def two():
    model = Classifier()
    callback = GroupSparsity(["network.5"], weight=1.0)
    fit(model, callback, devices=2, strategy="ddp")
    return cloned_state(model.network[5])


def test_two_processes_agree():
    torch.set_num_threads(1)
    one, other = run_two_processes(two)
    assert_state_dicts_equal(one, other)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"targets": ["network.5"], "weight": -1.0}, "weight is -1.0"),
        ({"targets": ["network.5"], "mode": "hard"}, "mode"),
        ({"targets": ["network.5"], "over": []}, r"over is \[\]: give the dimensions"),
        ({"targets": ["network.5"], "over": [0, 0]}, "each once"),
        ({"targets": "network.5"}, "give a list of patterns"),
    ],
)
def test_wrong_arguments_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        GroupSparsity(**arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"targets": ["network.50"]}, r"GroupSparsity: targets\[0\]='network.50' matches no submodule"),
        ({"targets": ["network.5"], "over": [2]}, r"over=\[2\] names no dimensions of network.5.weight \(8, 144\)"),
        ({"targets": ["network.5"], "over": [0, -2]}, "names no dimensions"),
        ({"targets": ["network.1"]}, "no weight of Classifier is left to prune"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_step(arguments, words):
    model = Classifier()
    before = cloned_state(model)
    with pytest.raises(ValueError, match=words):
        fit(model, GroupSparsity(**arguments))
    assert_state_dicts_equal(cloned_state(model), before)


def test_frozen_weights_are_refused_where_named():
    model = Classifier()
    model.network[5].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"network\.5\.weight.*frozen"):
        fit(model, GroupSparsity(["network.5"]))


def test_a_module_without_weights_to_choose_is_refused():
    with pytest.raises(ValueError, match="is left to prune"):
        fit(Classifier(nn.Sequential(nn.BatchNorm2d(3), nn.Flatten())), GroupSparsity())
