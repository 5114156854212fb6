"""IterativeSoftShrinkage: the maths against plain computations, and the callback on modules that aren't ours."""

import math
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

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
from lit_methods.callbacks import DynamicSparsity, EMATeacher, ExactResume, IterativeSoftShrinkage, SparsityReport
from lit_methods.callbacks.sparsity.issp import core
from lit_methods.callbacks.sparsity.issp.core import fitting_pattern, grow_penalty, parse_pick, pick_below_sample, pick_pruned, pruned_count

pytestmark = [pytest.mark.filterwarnings("ignore:.*before the switch"), pytest.mark.filterwarnings("ignore:.*stay dense")]
SHAPES = {"network.0.weight": (4, 3, 3, 3), "network.5.weight": (8, 144), "network.7.weight": (4, 8)}


def loader(batch_size: int = 6, shuffle: bool = False) -> DataLoader:
    return DataLoader(Images(24), batch_size=batch_size, shuffle=shuffle)


def shrinkage(**kwargs: Any) -> IterativeSoftShrinkage:
    return IterativeSoftShrinkage(**{"pr": 0.7, "prune_iters": 4, **kwargs})


class Adam(Classifier):
    """Without dropout, on Adam."""

    def __init__(self) -> None:
        super().__init__()
        self.network[3] = nn.Identity()  # type: ignore[index]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def fit(callback: pl.Callback, module: pl.LightningModule | None = None, steps: int = 6, **kwargs: Any) -> tuple[Any, pl.Trainer]:
    module = module or Adam()
    more = kwargs.pop("callbacks", [])
    data = kwargs.pop("data", None) or loader()
    trainer = tiny_trainer(**{"max_steps": steps, "callbacks": [callback, *more], "log_every_n_steps": 1, **kwargs})
    trainer.fit(module, data, kwargs.get("val"))
    return module, trainer


# ---- the maths -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "pr", "count"), [(1000, 0.9, 900), (7, 0.5, 4), (1000, 1.0, 995), (10, 1.0, 9), (1, 1.0, 0), (5, 0.0, 0)]
)
def test_counts_are_rounded_up_and_something_stays(number, pr, count):
    assert pruned_count(number, pr) == count


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_smallest_are_picked_ties_from_the_front(dtype):
    score = torch.tensor([3, 1, 2, 1, 1, 0, 5, 1], dtype=dtype).view(2, 4)
    pruned = pick_pruned(score, 0.5)
    assert pruned.shape == score.shape
    stable = score.flatten().float().argsort(stable=True)[:4]
    assert sorted(stable.tolist()) == pruned.flatten().nonzero().flatten().tolist() == [1, 3, 4, 5]
    assert not pick_pruned(score, 0.0).any()
    assert pick_pruned(torch.zeros(0), 0.5).shape == (0,)


@pytest.mark.parametrize(
    ("pick", "granularity", "n", "m"), [("min_2:4", 0, 2, 4), ("min_5:7", 16, 6, 8), ("min_9:10", 20, 9, 10), ("min_4:4", 8, 4, 4)]
)
def test_groups_lose_exactly_n_of_m(pick, granularity, n, m):
    torch.manual_seed(0)
    score = torch.randint(0, 3, (5, 8, 8)).float()  # many ties
    pruned = pick_pruned(score, 0.123, pick, granularity).flatten().view(-1, m)
    assert (pruned.sum(1) == n).all()
    order = score.flatten().view(-1, m).argsort(dim=1, stable=True)[:, :n]
    assert torch.equal(torch.zeros_like(pruned).scatter(1, order, True), pruned)


def test_patterns_that_dont_fit_are_refused():
    assert parse_pick("min") is parse_pick("fast") is None
    for wrong in ("max", "min_5", "min_5:4", "min_0:0", "min_a:b", "min_1:2:3"):
        with pytest.raises(ValueError, match="give 'min', 'fast', or 'min_N:M'"):
            parse_pick(wrong)
    assert fitting_pattern(19, 20, 0) == (19, 20)
    with pytest.raises(ValueError, match="min_19:20 fits no layers whose sizes have 4"):
        fitting_pattern(19, 20, 4)
    with pytest.raises(ValueError, match="which is no multiple of 4"):
        pick_pruned(torch.rand(6), 0.5, "min_2:4")
    with pytest.raises(ValueError, match="call pick_below_sample"):
        pick_pruned(torch.rand(6), 0.5, "fast")


def test_the_fast_pick_takes_its_threshold_from_the_sample():
    score = torch.tensor([0.0, 1, 2, 3, 4, 5, 6, 7])
    assert pick_below_sample(score, torch.tensor([6.0, 2.0, 4.0, 5.0]), 0.5).tolist() == [True] * 5 + [False] * 3  # below 5
    assert pick_below_sample(score, score, 0.9).sum() == 7
    assert pick_below_sample(score, score, 1.0).sum() == 7, "the largest stays"
    torch.manual_seed(1)
    large = torch.rand(100_000)
    share = pick_below_sample(large, large[torch.randint(100_000, (core.SAMPLE,))], 0.9).float().mean()
    assert abs(float(share) - 0.9) < 0.01


def test_shrinking_adds_up_and_hard_thresholding_clears_whatever_was_there():
    weight, pruned = torch.tensor([1.0, 2.0, math.inf]), torch.tensor([True, False, True])
    assert core.shrink(weight, pruned, 0.0).tolist() == [0.0, 2.0, 0.0]
    assert core.shrink(weight, pruned, 1.0).tolist() == weight.tolist()
    weight = torch.tensor([0.5, 2.0, -4.0, 3.0])
    for _ in range(3):
        weight, pruned = core.shrink_step(weight, 0.25, 0.9)
    assert pruned.tolist() == [True, False, False, False]
    torch.testing.assert_close(weight, torch.tensor([0.5 * 0.9**3, 2.0, -4.0, 3.0]))


def test_the_penalty_grows_where_picked_and_never_falls():
    penalty = torch.zeros(3)
    for pruned in ([True, True, False], [True, False, False], [True, False, True]):
        penalty = grow_penalty(penalty, torch.tensor(pruned), 0.2, limit=0.5)
    torch.testing.assert_close(penalty, torch.tensor([0.5, 0.2, 0.2]))


def test_the_structure_stays_dynamic_the_softer_the_more():
    """The mechanism: in an MLP on the digits, Adam 1e-3, 20 epochs, the pick changes most at ratio 0.99, least with hard thresholding."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, labels = torch.tensor(digits.images.reshape(-1, 64) / 16, dtype=torch.float32), torch.tensor(digits.target)

    def flips(ratio: float) -> int:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
        layers = [layer.weight for layer in network if isinstance(layer, nn.Linear)]
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
        before, changed = None, 0
        for _ in range(20):
            for rows in torch.randperm(1200).split(64):
                optimizer.zero_grad()
                F.cross_entropy(network(images[rows]), labels[rows]).backward()
                optimizer.step()
                with torch.no_grad():
                    steps = [core.shrink_step(weight, 0.95, ratio) for weight in layers]
                    for weight, (new, _) in zip(layers, steps, strict=True):
                        weight.copy_(new)
                picked = torch.cat([pruned.flatten() for _, pruned in steps])
                changed += 0 if before is None else int((picked != before).sum())
                before = picked
        return changed

    soft, softer, hard = flips(0.95), flips(0.99), flips(0.0)
    assert softer > 1.3 * soft, (softer, soft, hard)
    assert soft > 1.1 * hard, (softer, soft, hard)


# ---- the callback ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["iss_p", "iht"])
def test_it_is_the_loop_of_the_paper(method):
    """Against a loop by hand: Adam's step, pick, shrink; then masked steps."""
    steps, switch, ratio = 7, 4, 0.8
    module, _ = fit(shrinkage(method=method, ratio=ratio, prune_iters=switch), steps=steps)
    twin = Adam()
    optimizer, layers = twin.configure_optimizers(), {name: dict(twin.named_parameters())[name] for name in SHAPES}
    batches = [batch for _ in range(2) for batch in loader()]
    for step, (images, labels) in enumerate(batches[:steps], start=1):
        optimizer.zero_grad()
        F.cross_entropy(twin.network(images), labels).backward()
        optimizer.step()
        with torch.no_grad():
            for weight in layers.values():
                if step <= switch:
                    order = weight.abs().flatten().argsort(stable=True)[: math.ceil(0.7 * weight.numel())]
                    pruned = torch.zeros(weight.numel(), dtype=torch.bool).scatter(0, order, True).view(weight.shape)
                    weight[pruned] *= ratio if method == "iss_p" else 0.0
                    if step == switch:
                        weight.mask = ~pruned  # type: ignore[attr-defined]
                if step >= switch:
                    weight *= weight.mask  # type: ignore[attr-defined]
    assert_state_dicts_equal(cloned_state(module), cloned_state(twin), atol=1e-6)


@pytest.mark.parametrize("make", [Classifier, TwoOptimisers, compiled_classifier, resnet_classifier])
@pytest.mark.parametrize("method", ["iss_p", "assl"])
def test_dense_before_the_switch_and_exactly_sparse_after_it(make, method):
    if make is resnet_classifier and method == "assl":
        pytest.skip("covered by iss_p: the same path")
    module, plain, callback = make(), make(), shrinkage(method=method, prune_iters=2, ratio=0.99, reg_interval=1)
    batch_size = 12 if make is resnet_classifier else 6
    seen: dict[int, float] = {}
    told: list[int] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            weights = callback.store.weights.values()
            seen[trainer.fit_loop.total_batch_idx + 1] = float(
                sum((weight == 0).sum() for weight in weights) / sum(w.numel() for w in weights)
            )

        def on_mask_updated(self, trainer: pl.Trainer, *_: Any) -> None:
            told.append(trainer.fit_loop.total_batch_idx + 1)

    epochs = 2 if make is resnet_classifier else 1
    tiny_trainer(max_steps=1).fit(plain, loader(batch_size))
    tiny_trainer(max_epochs=epochs, callbacks=[callback, Watch()]).fit(module, loader(batch_size))
    assert fingerprint(module) == fingerprint(plain)
    assert seen[1] < 0.01
    assert told[1:] == [2]
    wanted = {name: pruned_count(weight.numel(), 0.7) for name, weight in callback.store.weights.items()}
    for batch in (2, 3, 4):
        assert seen[batch] == pytest.approx(sum(wanted.values()) / sum(w.numel() for w in callback.store.weights.values()), abs=1e-6)
    for name, (kept, number) in callback.store.counts().items():
        assert number - kept == wanted[name], name


def test_two_optimisers_count_their_own_steps():
    callback = shrinkage(prune_iters=3)
    fit(callback, TwoOptimisers(), steps=8)  # four batches
    assert callback._steps == [4, 4]
    assert callback.store.density() == pytest.approx(1 - sum(pruned_count(math.prod(s), 0.7) for s in SHAPES.values()) / 1292)


def test_figures_are_computed_at_the_batches_that_are_logged_also_with_two_optimisers(monkeypatch):
    callback, looked = shrinkage(prune_iters=8), []
    whole = IterativeSoftShrinkage._magnitudes
    monkeypatch.setattr(IterativeSoftShrinkage, "_magnitudes", lambda self: looked.append(max(self._steps)) or whole(self))
    fit(callback, TwoOptimisers(), steps=16, log_every_n_steps=4)
    assert looked == [4, 8]


def test_weights_come_back_under_soft_shrinkage():
    callback = shrinkage(ratio=0.99, prune_iters=12)
    fit(callback, steps=12)
    assert int(callback._flips) > 0
    changed = [int((callback._picks.last[name] != callback._picks.first[name]).sum()) for name in SHAPES]
    assert sum(changed) > 0
    assert {name: int(mask.sum()) for name, mask in callback._picks.last.items()} == {
        name: pruned_count(math.prod(shape), 0.7) for name, shape in SHAPES.items()
    }


@pytest.mark.parametrize("method", ["scratch", "random"])
def test_baselines_that_start_sparse_keep_their_mask(method):
    before = cloned_state(Adam())
    module, _ = fit(callback := shrinkage(method=method, seed=1), steps=4)
    for name, mask in callback.sparsity_masks().items():
        assert int((~mask).sum()) == pruned_count(mask.numel(), 0.7)
        assert not dict(module.named_parameters())[name][~mask].any()
        largest = before[name].abs()[mask].min() >= before[name].abs()[~mask].max()
        assert bool(largest) == (method == "scratch"), name
    assert callback.sparsity_card.regime == "sparse_to_sparse"
    assert not callback._flips


def test_one_shot_pruning_trains_as_if_it_were_not_there_until_the_switch():
    plain, _ = fit(pl.Callback(), steps=3)
    module, _ = fit(callback := shrinkage(method="l1", prune_iters=3), steps=3)
    state, dense = cloned_state(module), cloned_state(plain)
    for name, mask in callback.sparsity_masks().items():
        assert torch.equal(state[name], dense[name] * mask)
        assert dense[name].abs()[mask].min() >= dense[name].abs()[~mask].max()


class Gradients(pl.Callback):
    """What the optimiser gets, and what autograd made."""

    def __init__(self) -> None:
        self.raw: list[Tensor] = []
        self.given: list[Tensor] = []

    def on_after_backward(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.raw.append(pl_module.network[5].weight.grad.clone())

    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        if self.raw and len(self.given) < len(self.raw):
            self.given.append(pl_module.network[5].weight.grad.clone())


@pytest.mark.parametrize("method", ["iss_r", "assl"])
def test_the_penalty_joins_the_gradient_of_picked_weights(method):
    callback = shrinkage(
        method=method, prune_iters=6, reg_interval=2, reg_delta=0.25, reg_limit=0.4, stabilize_iters=3 if method == "assl" else 0
    )
    weights, gradients, penalties = [], [], []

    class Look(Adam):
        def on_before_optimizer_step(self, optimizer: Any) -> None:  # after those of the callbacks
            weights.append(self.network[5].weight.detach().clone())
            gradients.append(self.network[5].weight.grad.clone())
            penalties.append(callback._penalty.get("network.5.weight", torch.zeros(8, 144)).clone())

    raw = Gradients()
    fit(callback, Look(), steps=6, callbacks=[raw])
    for weight, gradient, penalty, own in zip(weights, gradients, penalties, raw.raw, strict=True):
        torch.testing.assert_close(gradient, own + penalty * weight)
    levels = [sorted(set(penalty.flatten().tolist())) for penalty in penalties]
    assert levels[0] == levels[1] == [0.0], "grows after steps 2 and 4"
    assert levels[2] == [0.0, 0.25]
    if method == "assl":
        assert levels[4] == [0.0, 0.25], "the last three steps are without growth"
        first = Adam().network[5].weight.detach().abs()
        assert torch.equal(penalties[2] > 0, pick_pruned(first, 0.7)), "picked before the first step"
    else:
        assert max(levels[4]) == pytest.approx(0.4), "the limit"
    assert callback.store.density() < 0.4
    assert not callback._penalty


def test_the_default_delta_reaches_the_limit_when_growth_ends():
    assert IterativeSoftShrinkage(method="iss_r").reg_delta == pytest.approx(1e-4)
    assert IterativeSoftShrinkage(method="assl", prune_iters=143_150, stabilize_iters=43_150).reg_delta == pytest.approx(1e-4)


def test_the_fast_pick_of_small_layers_is_nearly_exact():
    fit(callback := shrinkage(pick="fast"), steps=5)
    assert [float((~mask).float().mean()) for mask in callback.sparsity_masks().values()] == pytest.approx([0.7] * 3, abs=0.03)


def test_groups_are_raised_to_fit_all_layers():
    with pytest.raises(ValueError, match="min_5:7 fits no layers whose sizes have 4"):
        fit(shrinkage(pick="min_5:7"))
    callback = shrinkage(pick="min_1:3", pr=0.0)
    fit(callback, steps=5)
    for mask in callback.sparsity_masks().values():
        assert ((~mask).flatten().view(-1, 4).sum(1) == 2).all(), "1:3 became 2:4"
    assert callback.sparsity_card.granularity == "n:m"


def test_moments_of_kept_weights_stay_at_the_switch():
    class Before(pl.Callback):
        def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
            self.step = optimizer.state[pl_module.network[5].weight].get("step")

    module, trainer = fit(callback := shrinkage(prune_iters=3), steps=3, callbacks=[Before()])
    plain, other = fit(shrinkage(prune_iters=30), steps=3)
    weight, mask = module.network[5].weight, callback.sparsity_masks()["network.5.weight"]
    ours, theirs = trainer.optimizers[0].state[weight], other.optimizers[0].state[plain.network[5].weight]
    assert torch.equal(ours["exp_avg"][mask], theirs["exp_avg"][mask])
    assert not ours["exp_avg"][~mask].any()
    assert int(ours["step"]) == 3


class Falling(Adam):
    """Its learning rate halves after two steps."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2], gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Rates(pl.Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.seen.append(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize(("hold", "method", "changes_after"), [(True, "iss_p", 6), (False, "iss_p", 2), (True, "scratch", 2)])
def test_schedulers_count_from_the_switch(hold, method, changes_after):
    module = Falling()
    fit(shrinkage(method=method, hold_lr=hold), module, steps=8, callbacks=[rates := Rates()])
    assert rates.seen == [0.01] * changes_after + [0.005] * (8 - changes_after)
    assert "lr_scheduler_step" not in vars(module)


def test_several_callbacks_hold_and_let_go_in_any_order():
    module = Falling()
    one, other = shrinkage(targets=["network.0"], prune_iters=2), shrinkage(targets=["network.5"], prune_iters=5)
    fit(one, module, steps=8, callbacks=[other, rates := Rates()])
    assert rates.seen == [0.01] * 7 + [0.005], "the longest holds"
    assert "lr_scheduler_step" not in vars(module)
    assert one.state_key != other.state_key


class Broken(Falling):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 2:
            raise ZeroDivisionError
        return super().training_step(batch, batch_idx)


def test_nothing_stays_behind_when_fit_raises():
    module, trainer = Broken(), tiny_trainer(max_epochs=1, callbacks=[shrinkage()])
    with pytest.raises(ZeroDivisionError):
        trainer.fit(module, loader())
    assert "lr_scheduler_step" not in vars(module)


@pytest.mark.parametrize("kill_at", [3, 5, 6])
@pytest.mark.parametrize("method", ["iss_p", "iss_r", "assl"])
def test_a_killed_run_ends_like_an_uninterrupted_one(method, kill_at, tmp_path):
    class Data(pl.LightningDataModule):
        def train_dataloader(self) -> Any:
            from lit_methods.datamodules.loaders import make_loader

            return make_loader(Images(24), batch_size=6, seed=0, shuffle=True)

    made: list[IterativeSoftShrinkage] = []

    def make() -> Any:
        made.append(shrinkage(method=method, prune_iters=5, ratio=0.98, reg_interval=2, stabilize_iters=1))
        return Falling(), Data(), [made[-1], ExactResume()]

    whole, resumed = kill_and_resume(make, 9, kill_at, tmp_path)
    assert_state_dicts_equal(resumed, whole)
    assert_state_dicts_equal(made[2].state_dict()["masks"], made[0].state_dict()["masks"])
    assert int(made[2]._flips) == int(made[0]._flips)
    assert made[0].store.density() < 0.4


def train_in_two_processes(pick: str) -> tuple[dict, dict, int, dict]:
    module, callback = Probed(), shrinkage(prune_iters=2, pick=pick, ratio=0.9, targets=["network.5"], probe="losses")
    core.SAMPLE = 200  # so that the layer is sampled
    tiny_trainer(max_epochs=1, callbacks=[callback], devices=2, strategy="ddp", accelerator="cpu").fit(module, loader(3), loader(3))
    state = {name: p.detach().clone() for name, p in module.named_parameters()}
    return state, dict(callback.sparsity_masks()), callback._steps[0], dict(callback._switch)


@pytest.mark.parametrize("pick", ["min", "fast"])
def test_two_processes_pick_the_same(pick):
    (state, masks, steps, measured), (other_state, other_masks, _, same) = run_two_processes(train_in_two_processes, pick)
    assert steps > 2
    assert_state_dicts_equal(measured, same)
    assert set(measured) == {"share_above_at_switch", "probe_before", "probe_after", "probe_drop"}
    assert_state_dicts_equal(state, other_state)
    assert_state_dicts_equal(masks, other_masks)
    assert 0.2 < float(masks["network.5.weight"].float().mean()) < 0.4


def test_the_fast_sample_differs_from_step_to_step_and_repeats(monkeypatch):
    monkeypatch.setattr(core, "SAMPLE", 50)
    one, again, other = shrinkage(pick="fast"), shrinkage(pick="fast"), shrinkage(pick="fast", seed=1)
    torch.manual_seed(0)
    weight = torch.randn(40, 50)
    state = torch.get_rng_state()
    first = one._pick("w", weight, 1)
    assert torch.equal(first, again._pick("w", weight, 1))
    assert not torch.equal(first, one._pick("w", weight, 2))
    assert not torch.equal(first, other._pick("w", weight, 1))
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    assert 0.5 < float(first.float().mean()) < 0.9


def test_accumulation_shrinks_once_per_step_and_bf16_keeps_the_count():
    callback = shrinkage(prune_iters=2)
    fit(callback, steps=3, accumulate_grad_batches=2, precision="bf16-mixed", gradient_clip_val=1.0, max_epochs=-1)
    assert callback._steps == [3]
    for name, (kept, number) in callback.store.counts().items():
        assert number - kept == pruned_count(number, 0.7), name


@pytest.mark.parametrize("first", [True, False])
def test_averaged_copies_and_the_report_follow(first):
    callback, teacher, report = shrinkage(prune_iters=3), EMATeacher(decay=0.5), SparsityReport(mask_check_every_n=1)
    order = [teacher, report] if first else []
    trainer = tiny_trainer(max_epochs=2, callbacks=[*order, callback, *([] if first else [teacher, report])])
    trainer.fit(Adam(), loader())
    averaged = teacher.averaged()
    for name, mask in callback.sparsity_masks().items():
        assert not averaged[name][~mask].any()
        assert averaged[name][mask].any()
    assert "sparsity/density" in " ".join(trainer.callback_metrics)


# ---- what is shown ---------------------------------------------------------------------------------------------------------------------


class Probed(Adam):
    """Offers a value for each sample."""

    def losses(self, batch: Any) -> Tensor:
        assert not self.training
        return F.cross_entropy(self.network(batch[0]), batch[1], reduction="none")


def test_the_probe_sees_the_network_just_before_and_after_the_switch():
    module, callback = Probed(), shrinkage(prune_iters=4, probe="losses", ratio=0.9, pr=0.9)
    data = loader()
    state_after: dict[str, Tensor] = {}

    class Keep(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 4:
                state_after.update(cloned_state(pl_module))
                assert pl_module.training

    trainer = tiny_trainer(max_epochs=2, callbacks=[callback, Keep()], log_every_n_steps=1)
    trainer.fit(module, data, data)
    dense, _ = fit(shrinkage(prune_iters=400, ratio=0.9, pr=0.9), Probed(), steps=4)
    found = {name: float(trainer.callback_metrics[f"issp/probe_{name}"]) for name in ("before", "after", "drop")}

    def mean(state: dict[str, Tensor]) -> float:
        twin = Probed()
        twin.load_state_dict(state)
        twin.eval()
        with torch.no_grad():
            return float(torch.cat([twin.losses(batch) for batch in data]).mean())

    assert found["before"] == pytest.approx(mean(cloned_state(dense)), rel=1e-5)
    assert found["after"] == pytest.approx(mean(state_after), rel=1e-5)
    assert found["drop"] == pytest.approx(found["before"] - found["after"], abs=1e-6)
    assert found["before"] != found["after"]
    pruned = torch.cat([cloned_state(dense)[name][~mask].abs() for name, mask in callback.sparsity_masks().items()])
    assert float(trainer.callback_metrics["issp/share_above_at_switch"]) == pytest.approx(float((pruned > 1e-3).float().mean()), abs=1e-6)


def test_the_probe_changes_nothing_about_training():
    results = []
    for probe in (None, "losses"):
        module = Probed()
        torch.manual_seed(3)
        trainer = tiny_trainer(max_epochs=2, callbacks=[shrinkage(probe=probe)])
        trainer.fit(module, loader(shuffle=True), loader())
        results.append(cloned_state(module))
    assert_state_dicts_equal(*results)
    with pytest.raises(ValueError, match="probe is 'nothing', but Adam has no such method"):
        fit(shrinkage(probe="nothing"))


def test_logs_and_table():
    logged: dict[str, list[float]] = {}

    class Logs(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            for name, value in trainer.logged_metrics.items():
                logged.setdefault(name, []).append(float(value))

    callback = shrinkage(prune_iters=4, ratio=0.9)
    module, trainer = fit(callback, steps=8, callbacks=[Logs()])
    sizes = {name: dict(module.named_parameters())[name].detach().abs() for name in SHAPES}
    masks = callback.sparsity_masks()
    kept = torch.cat([sizes[name][masks[name]] for name in SHAPES])
    assert float(trainer.callback_metrics["issp/magnitude_kept"]) == pytest.approx(float(kept.mean()), rel=1e-5)
    assert float(trainer.callback_metrics["issp/magnitude_pruned"]) == 0
    assert 0 < float(trainer.callback_metrics["issp/overlap"]) <= 1
    assert float(trainer.callback_metrics["issp/density"]) == pytest.approx(callback.store.density())
    assert logged["issp/mask_flips"][4:] == [0.0] * 4, "none after the switch"
    assert sum(logged["issp/mask_flips"]) == pytest.approx(100 * int(callback._flips))
    assert float(trainer.callback_metrics["issp/grad_norm_smallest"]) <= float(trainer.callback_metrics["issp/grad_norm"])
    (table,) = callback.dashboard_media().values()
    assert [row[0] for row in table.rows] == list(SHAPES)
    assert table.rows[1][2] == pytest.approx(pruned_count(1152, 0.7) / 1152)
    assert table.rows[1][3] == 0
    assert table.rows[1][5] > 0
    assert callback.dashboard_artifacts()["issp_masks"].keys() == SHAPES.keys()


def test_gradients_are_measured_per_layer_before_the_penalty():
    callback, raw = shrinkage(method="iss_r", reg_interval=1, reg_delta=0.3), Gradients()
    fit(callback, steps=3, callbacks=[raw])
    norm, variance = callback._gradient_stats["network.5.weight"].tolist()
    assert norm == pytest.approx(float(raw.raw[-1].norm()), rel=1e-5)
    assert variance == pytest.approx(float(raw.raw[-1].var(correction=0)), rel=1e-4)


def test_a_training_without_the_switch_says_so():
    with pytest.warns(UserWarning, match="the switch comes after prune_iters=50: its weights will stay dense"):
        module, _ = fit(shrinkage(prune_iters=50), steps=2)
    assert all((weight != 0).all() for name, weight in module.named_parameters() if name in SHAPES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pr": 1.5}, r"pr is 1.5: give a number in \[0, 1\]"),
        ({"ratio": -0.1}, "ratio is -0.1"),
        ({"method": "ISS-P"}, "method is 'ISS-P': give one of iss_p, iht"),
        ({"prune_iters": 0}, r"prune_iters is 0: give optimiser steps in \[1, inf\)"),
        ({"stabilize_iters": 4}, "stabilize_iters=4 are the last of prune_iters=4"),
        ({"reg_limit": 0.0}, r"reg_limit is 0.0: give a number in \(0, inf\)"),
        ({"pick": "max"}, "pick is 'max'"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        shrinkage(**arguments)


def test_another_mask_callback_on_the_same_weights_is_refused():
    with pytest.raises(ValueError, match="both mask"):
        fit(shrinkage(), callbacks=[DynamicSparsity(0.3)])
    with pytest.raises(ValueError, match="can't be used together"):
        fit(shrinkage(), callbacks=[pl.callbacks.StochasticWeightAveraging(swa_lrs=0.1)])
