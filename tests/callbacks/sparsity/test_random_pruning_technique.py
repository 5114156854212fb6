"""Random pruning on modules that aren't ours: densities, static masks, scores from a batch that leaves no trace."""

import copy
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler

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
from lit_methods.callbacks import ExactResume, RandomPruning, SparsityReport
from lit_methods.callbacks.sparsity.density import layer_density
from lit_methods.callbacks.sparsity.random_pruning import balanced_batch, layer_scores
from lit_methods.callbacks.sparsity.scores import kept_masks, kept_shares
from lit_methods.callbacks.twin import independent_copy, training_batches

SHAPES = [(4, 3, 3, 3), (8, 144), (4, 8)]  # of the helpers' small network
SIZE = sum(int(np.prod(shape)) for shape in SHAPES)


def loader(batch_size: int = 6, **kwargs: Any) -> DataLoader:
    return DataLoader(Images(48), batch_size=batch_size, **kwargs)


def pruning(method: str = "er", **kwargs: Any) -> RandomPruning:
    return RandomPruning(**{"density": 0.3, "method": method, "logits": "network", "samples_per_class": 3, **kwargs})


def fit(callback: pl.Callback, module: pl.LightningModule | None = None, data: Any = None, **kwargs: Any) -> pl.LightningModule:
    module = module or Classifier()
    trainer = tiny_trainer(**{"max_steps": 2, "callbacks": [callback], **kwargs})
    trainer.fit(module, loader() if data is None else data)
    return module


# ---- densities and masks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["uniform", "er", "erk", "erk_plus", "uniform_plus"])
def test_exact_masks_meet_the_layers_densities(method):
    callback = pruning(method, exact=True, density=0.4, last_density=0.9 if "plus" in method else None)
    fit(callback)
    wanted = layer_density(SHAPES, 0.4, method, last_density=0.9 if "plus" in method else None)
    kept = [kept / number for kept, number in callback.store.counts().values()]
    assert [abs(a - b) * size <= 1 for a, b, size in zip(kept, wanted, [108, 1152, 32], strict=True)] == [True] * 3
    assert sum(int(mask.sum()) for mask in callback.sparsity_masks().values()) == round(sum(map(np.prod, SHAPES)) * 0.4)


def test_bernoulli_masks_vary_around_the_density_and_follow_the_seed():
    def masks(seed: int, exact: bool = False) -> dict[str, Tensor]:
        callback = pruning("uniform", seed=seed, exact=exact)
        fit(callback, max_steps=1)
        return callback.sparsity_masks()

    drawn = [masks(seed) for seed in (0, 1, 0)]
    assert_state_dicts_equal(drawn[0], drawn[2])
    counts = [sum(int(mask.sum()) for mask in one.values()) for one in drawn[:2]]
    assert counts[0] != counts[1], "each entry by itself: totals differ"
    assert all(abs(count - 0.3 * SIZE) < 5 * (SIZE * 0.3 * 0.7) ** 0.5 for count in counts)


def test_the_masks_stay_and_dead_weights_are_zero():
    callback = pruning("erk")
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            seen.append({name: mask.clone() for name, mask in callback.sparsity_masks().items()})

    module = fit(callback, callbacks=[callback, Watch()], max_steps=6, max_epochs=1)
    assert len(seen) == 6
    for masks in seen[1:]:
        assert_state_dicts_equal(masks, seen[0])
    weights = dict(module.named_parameters())
    for name, mask in seen[0].items():
        assert not weights[name][~mask].any()
        assert weights[name][mask].any()


def test_plus_methods_find_the_layers_by_name():
    callback = pruning("uniform_plus", density=0.5, exact=True, first_layer="network.7", last_layer="network.0")
    fit(callback)
    kept = {name: kept / number for name, (kept, number) in callback.store.counts().items()}
    assert kept["network.7.weight"] == 1
    assert kept["network.0.weight"] == 0.5
    with pytest.raises(ValueError, match=r"first_layer is 'network\.9', which is none of the masked layers: network\.0\.weight"):
        fit(pruning("uniform_plus", first_layer="network.9"))


def test_masks_dont_depend_on_weights_of_the_same_seed():
    torch.manual_seed(0)  # as seed_everything: 0 does
    module = Classifier(nn.Sequential(nn.Flatten(), wide := nn.Linear(192, 400), nn.ReLU(), nn.Linear(400, 4)))
    torch.manual_seed(0)
    wide.reset_parameters()
    before = cloned_state(module)["network.1.weight"]
    callback = pruning("uniform", density=0.1, seed=0)
    fit(callback, module, max_steps=1)
    kept = before[callback.sparsity_masks()["network.1.weight"]]
    assert abs(float(kept.mean())) < 4 * float(before.std()) / len(kept) ** 0.5


# ---- scores ----------------------------------------------------------------------------------------------------------------------------


def two_layers(dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_() for shape in ((5, 4), (3, 5))]
    return weights, torch.randn(6, 4, generator=generator, dtype=dtype), torch.tensor([0, 1, 2, 0, 1, 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_snip_is_the_slope_of_a_factor_on_each_weight(dtype):
    weights, x, y = two_layers(dtype)

    def loss(factors: Tensor) -> Tensor:
        first, second = factors[:20].view(5, 4), factors[20:].view(3, 5)
        return F.cross_entropy((x @ (weights[0] * first).T).tanh() @ (weights[1] * second).T, y)

    expected = torch.autograd.functional.jacobian(loss, torch.ones(35, dtype=dtype)).abs()
    found = layer_scores(lambda x: (x @ weights[0].T).tanh() @ weights[1].T, weights, x, y, "snip")
    torch.testing.assert_close(torch.cat([score.flatten() for score in found]), expected)


def test_grasp_is_the_hessian_gradient_product_of_both_halves():
    weights, x, y = two_layers(torch.float64)
    flat = torch.cat([weight.detach().flatten() for weight in weights])

    def loss(flat: Tensor, part: slice) -> Tensor:
        return F.cross_entropy((x[part] @ flat[:20].view(5, 4).T).tanh() @ flat[20:].view(3, 5).T / 50, y[part])

    halves = slice(0, 3), slice(3, 6)
    gradient = sum(torch.autograd.functional.jacobian(lambda w, part=part: loss(w, part), flat) for part in halves)
    hessian = sum(torch.autograd.functional.hessian(lambda w, part=part: loss(w, part), flat) for part in halves)
    expected = -flat * (hessian @ gradient)
    found = layer_scores(lambda x: (x @ weights[0].T).tanh() @ weights[1].T, weights, x, y, "grasp", temperature=50.0)
    torch.testing.assert_close(torch.cat([score.flatten() for score in found]), expected / expected.sum().abs())


def test_ties_with_the_threshold_stay():
    scores = [torch.tensor([3.0, 1.0, 1.0]), torch.tensor([1.0, 0.0])]
    assert kept_shares(scores, 0.4) == [1.0, 0.5]
    assert kept_shares(scores, 0.6, "highest") == [2 / 3, 1.0]
    assert [mask.tolist() for mask in kept_masks(scores, 0.2)] == [[True, False, False], [False, False]]


def test_balanced_batches_are_sorted_and_read_no_more_than_needed():
    read = []

    def batches():
        for labels in ([2, 0, 0, 0], [1, 1, 2, 0], [0, 1, 2, 2]):
            read.append(labels)
            yield torch.tensor(labels) * 10.0 + torch.arange(4), torch.tensor(labels)

    inputs, labels = balanced_batch(batches(), 2, 3)
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert inputs.tolist() == [1.0, 2.0, 10.0, 11.0, 20.0, 22.0]
    assert len(read) == 2
    with pytest.raises(ValueError, match="4 training samples of class 1, but samples_per_class is 5") as caught:
        balanced_batch(((x, y) for x, y in [(torch.zeros(9), torch.tensor([0] * 5 + [1] * 4))]), 5, 2)
    assert "lower it" in str(caught.value)
    with pytest.raises(ValueError, match="labels reach from 0 to 3"):
        balanced_batch([(torch.zeros(2), torch.tensor([0, 3]))], 1, 3)


@pytest.mark.parametrize("method", ["snip", "grasp", "global_magnitude"])
@pytest.mark.parametrize("make", [Classifier, TwoOptimisers, compiled_classifier])
def test_scores_give_shares_and_positions_are_forgotten(method, make):
    by_score, at_random = pruning(method, positions="score", redraw=False), pruning(method, exact=True, redraw=False)
    plain = fit(pl.Callback(), make())
    for callback in (by_score, at_random):
        assert fingerprint(fit(callback, make())) == fingerprint(plain)
    ours, theirs = by_score.store.counts(), at_random.store.counts()
    assert all(abs(ours[name][0] - theirs[name][0]) <= 1 for name in ours), "the same shares"
    assert any(not torch.equal(mask, at_random.sparsity_masks()[name]) for name, mask in by_score.sparsity_masks().items())
    assert sum(kept for kept, _ in ours.values()) == pytest.approx(0.3 * SIZE, abs=2)
    assert by_score.sparsity_card.criterion == ("magnitude" if method == "global_magnitude" else "gradient")
    assert at_random.sparsity_card.criterion == "random"


def test_magnitude_positions_are_the_largest_weights():
    module, callback = Classifier(), pruning("global_magnitude", positions="score", density=0.25)
    before = {name: value.abs() for name, value in cloned_state(module).items()}
    fit(callback, module, max_steps=1)
    masks = callback.sparsity_masks()
    smallest_kept = min(float(before[name][mask].min()) for name, mask in masks.items())
    assert all(float(before[name][~mask].max()) <= smallest_kept for name, mask in masks.items() if not mask.all())


class Noted(Classifier):
    """Remembers how things stood just after the masks were made."""

    def on_fit_start(self) -> None:
        masks = next(c for c in self.trainer.callbacks if isinstance(c, RandomPruning)).sparsity_masks()
        self.noted = cloned_state(self), torch.get_rng_state(), np.random.get_state()[1].copy(), masks  # noqa: NPY002


@pytest.mark.parametrize("method", ["snip", "grasp"])
def test_scoring_leaves_weights_statistics_generators_and_loader_alone(method):
    torch.manual_seed(5)
    data = loader(sampler=RandomSampler(Images(48), generator=torch.Generator().manual_seed(1)), generator=torch.Generator().manual_seed(2))
    states = [torch.get_rng_state(), data.generator.get_state(), data.sampler.generator.get_state()]
    module = Noted()
    before = cloned_state(module)
    torch.set_rng_state(states[0])
    orders = []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
            orders.append(batch[1].clone())

    callback = pruning(method)
    tiny_trainer(max_steps=1, callbacks=[callback, Look()]).fit(module, data)
    state, rng, _, masks = module.noted
    assert torch.equal(rng, states[0])
    for name, value in before.items():
        mask = masks.get(name, torch.ones_like(value, dtype=torch.bool))
        assert torch.equal(state[name], value * mask), f"{name} was changed by more than the mask"
    fresh = loader(sampler=RandomSampler(Images(48), generator=torch.Generator().manual_seed(1)))
    assert torch.equal(orders[0], next(iter(fresh))[1]), "the first batch is that of an untouched loader"


def test_snip_redraws_in_a_copy_alone():
    module, plain = Classifier(), Classifier()
    one, other = pruning("snip", redraw=True, positions="score"), pruning("snip", redraw=False, positions="score")
    fit(one, module, max_steps=1)
    fit(other, plain, max_steps=1)
    assert any(not torch.equal(mask, other.sparsity_masks()[name]) for name, mask in one.sparsity_masks().items())
    fresh = cloned_state(Classifier())
    mask = one.sparsity_masks()["network.7.weight"]
    assert torch.allclose(module.network[7].weight[mask], fresh["network.7.weight"][mask], atol=0.2), "one step away from where it began"


def test_the_batch_comes_as_the_loader_would_bring_it_whatever_the_workers():
    trainer = tiny_trainer(max_steps=1)
    data = loader(num_workers=1)
    trainer.fit(Classifier(), data)
    first = next(training_batches(trainer))
    assert torch.equal(first[0], Images(48).images[:6])
    assert data.num_workers == 1
    trainer.fit_loop._data_source.instance = iter([1])
    with pytest.raises(ValueError, match="from a training DataLoader, got list_iterator"):
        next(training_batches(trainer))


# ---- wiring ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["er", "snip", "grasp"])
def test_a_killed_run_ends_like_an_uninterrupted_one(method, tmp_path):
    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            from lit_methods.datamodules.loaders import make_loader

            return make_loader(Images(24), batch_size=6, seed=0, shuffle=True, with_epoch=False)

    def make():
        return Classifier(), Data(), [pruning(method), ExactResume()]

    whole, resumed = kill_and_resume(make, 6, 3, tmp_path)
    assert_state_dicts_equal(resumed, whole)


def train_in_two_processes(method: str) -> tuple[dict, dict]:
    module, callback = Classifier(), pruning(method)
    trainer = tiny_trainer(max_epochs=1, limit_train_batches=2, callbacks=[callback], devices=2, strategy="ddp", accelerator="cpu")
    trainer.fit(module, loader(12))
    return {name: p.detach().clone() for name, p in module.named_parameters()}, dict(callback.sparsity_masks())


@pytest.mark.parametrize("method", ["er", "grasp"])
def test_two_processes_have_the_same_masks(method):
    (state, masks), (other_state, other_masks) = run_two_processes(train_in_two_processes, method)
    assert_state_dicts_equal(state, other_state)
    assert_state_dicts_equal(masks, other_masks)
    assert 0.2 < sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values()) < 0.4


def test_the_copy_waits_for_no_other_process_and_shares_nothing():
    module = Classifier(nn.Sequential(nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4), nn.Flatten(), nn.Linear(144, 4))).eval()
    trainer = tiny_trainer()
    trainer.strategy.connect(module)
    twin = independent_copy(trainer, module)
    assert not any(isinstance(layer, nn.SyncBatchNorm) for layer in twin.modules())
    assert isinstance(module.network[1], nn.SyncBatchNorm)
    images = Images(6).images
    twin.network(images)
    assert twin.network[1].running_mean.abs().sum() > 0, "in training mode"
    assert module.network[1].running_mean.abs().sum() == 0
    with torch.no_grad():
        twin.network[0].weight.zero_()
    assert module.network[0].weight.abs().min() > 0


def test_gradient_norm_of_the_first_step_counts_kept_weights_alone():
    norms = []

    class Norm(pl.Callback):
        def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer) -> None:
            masks = callback.sparsity_masks()
            grads = [p.grad * masks.get(name, torch.ones_like(p, dtype=torch.bool)) for name, p in pl_module.named_parameters()]
            norms.append(float(torch.cat([grad.flatten() for grad in grads]).norm()))

    callback = pruning("er", mask_gradients=False)
    trainer = tiny_trainer(max_epochs=1, callbacks=[Norm(), callback])
    trainer.fit(Classifier(), loader())
    assert float(trainer.callback_metrics["random_pruning/gradient_norm_at_init"]) == pytest.approx(norms[0], rel=1e-6)
    assert norms[0] != norms[-1]
    assert float(trainer.callback_metrics["random_pruning/density"]) == pytest.approx(callback.store.density())
    (table,) = callback.dashboard_media().values()
    assert [row[0] for row in table.rows] == ["network.0.weight", "network.5.weight", "network.7.weight"]
    assert table.rows[1][3] == pytest.approx(layer_density(SHAPES, 0.3, "er")[1])
    assert callback.dashboard_artifacts()["random_pruning_masks"].keys() == callback.sparsity_masks().keys()


@pytest.mark.parametrize("first", [True, False])
def test_the_report_calls_it_static(first):
    callback, report = pruning("er", exact=True), SparsityReport(strict=True, mask_check_every_n=1)
    module, trainer = Classifier(), tiny_trainer(max_epochs=1, callbacks=[callback, report] if first else [report, callback])
    trainer.fit(module, loader())
    assert float(trainer.callback_metrics["sparsity/itop"]) == pytest.approx(callback.store.density())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"density": 0.0}, r"density is 0.0: give a share in \(0, 1\]"),
        ({"method": "ERK"}, "method is 'ERK': give one of uniform, uniform_plus, er"),
        ({"method": "er", "positions": "score"}, "positions='score' needs scores, which 'er' has not"),
        ({"last_density": 1.5}, "last_density is 1.5"),
        ({"temperature": 0.0}, "temperature is 0.0"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        pruning(**arguments)


def test_modules_and_data_that_scores_cant_use_are_refused():
    unused = Classifier()
    unused.unused = nn.Linear(3, 3)
    with pytest.raises(TypeError, match="has no 'forward' that maps inputs to them: give logits the name"):
        fit(pruning("snip", logits="forward"))
    with pytest.raises(ValueError, match=r"returns \(6, 4, 6, 6\), expected logits \(6, classes\)"):
        fit(pruning("snip", logits="network.0", skip=["network.5", "network.7"]))
    with pytest.raises(ValueError, match="snip scores need weights that take part in the loss"):
        fit(pruning("snip"), unused)
    with pytest.raises(ValueError, match="the batch has no 'x', it has 2 parts"):
        fit(pruning("grasp", inputs="x"))
    with pytest.raises(ValueError, match=r"samples of class \d, but samples_per_class is 40"):
        fit(pruning("grasp", samples_per_class=40))


def test_scores_that_are_not_finite_are_refused():
    data = copy.deepcopy(Images(12))
    data.images[0] = float("nan")
    with pytest.raises(ValueError, match="snip scores aren't finite"):
        fit(pruning("snip"), data=DataLoader(data, batch_size=6))


def test_scores_that_tie_are_no_threshold():
    callback = RandomPruning(0.4, method="snip", logits="network", samples_per_class=1)
    trainer = tiny_trainer(max_epochs=1, callbacks=[callback])
    with pytest.raises(ValueError, match=r"method='snip' would keep 100.0% of the weights where density is 40.0%"):
        trainer.fit(resnet_classifier(), DataLoader(Images(), batch_size=12))
    assert trainer.global_step == 0
