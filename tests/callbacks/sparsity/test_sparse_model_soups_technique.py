"""IMP on modules that aren't ours: phases, learning rates, a start from a checkpoint; and the maths of soups against plain torch."""

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
from lit_methods.callbacks import IMP, ExactResume
from lit_methods.callbacks.sparsity.sparse_model_soups.core import (
    diversity,
    ensemble_probabilities,
    greedy_selection,
    masked_state,
    nominal_sparsity,
    pruned_masks,
    recalibrating,
    relative_norm_drop,
    retrain_rates,
    uniform_soup,
)

PHASES = {"sparsity": 0.9, "phases": 2, "dense_epochs": 1, "retrain_epochs": 1}  # epochs of 4 steps


def loader(size: int = 6) -> DataLoader:
    return DataLoader(Images(24), batch_size=size)


def fit(callback: pl.Callback, module: pl.LightningModule | None = None, epochs: int = 3, **kwargs: Any) -> pl.LightningModule:
    module = module or Classifier()
    extra = kwargs.pop("callbacks", [])
    tiny_trainer(max_epochs=epochs, callbacks=[callback, *extra], log_every_n_steps=1, **kwargs).fit(module, loader())
    return module


class Watch(pl.Callback):
    """Density, rate and momentum at the end of each step."""

    def __init__(self, callback: IMP) -> None:
        self.callback, self.density, self.rates, self.masks = callback, list[float](), list[float](), list[dict[str, Tensor]]()
        self.fresh: list[bool] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.fresh.append(not trainer.optimizers[0].state)

    def on_before_zero_grad(self, trainer: pl.Trainer, *_: Any) -> None:
        self.rates.append(float(trainer.optimizers[0].param_groups[0]["lr"]))

    def on_train_batch_end(self, *_: Any) -> None:
        self.density.append(self.callback.store.density())
        self.masks.append(dict(self.callback.sparsity_masks()))


# ---- phases ----------------------------------------------------------------------------------------------------------------------------


def test_a_run_goes_through_dense_training_and_phases():
    callback = IMP(**PHASES)
    watch = Watch(callback)
    module = fit(callback, callbacks=[watch], epochs=4)  # one epoch behind the last phase
    after = [1 - share for share in nominal_sparsity(0.9, 2)]
    assert watch.density == pytest.approx([1.0] * 4 + [after[0]] * 4 + [after[1]] * 8, abs=1e-3)
    assert [place for place, fresh in enumerate(watch.fresh) if fresh] == [0, 4, 8], "each phase forgets the momentum"
    for name, mask in watch.masks[-1].items():
        assert not (mask & ~watch.masks[4][name]).any(), "masks only shrink"
        assert not dict(module.named_parameters())[name][~mask].any()
    assert callback.phase == 2


@pytest.mark.parametrize("schedule", ["FT", "LRW", "SLR", "CLR", "LLR", "ALLR", None])
def test_each_step_has_the_rate_of_the_schedule(schedule):
    class Falling(Classifier):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.9)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), "interval": "step"},
            }

    rates = []

    class Used(pl.Callback):
        runs_after = ("IMP",)

        def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
            rates.append(optimizer.param_groups[0]["lr"])

    callback = IMP(**PHASES, schedule=schedule)
    fit(callback, Falling(), callbacks=[Used()])
    own = [0.2 * 0.9**step for step in range(12)]
    assert rates[:4] == pytest.approx(own[:4])
    if schedule is None:
        assert rates == pytest.approx(own)
    else:
        settings = {"norm_drop": callback.norm_drop, "fraction": callback.fraction}
        assert rates[8:] == pytest.approx(retrain_rates(torch.tensor(own[:4]), 4, schedule, **settings).tolist())


def test_phases_count_optimiser_steps_under_accumulation():
    callback = IMP(**PHASES)
    watch = Watch(callback)
    fit(callback, callbacks=[watch], accumulate_grad_batches=2)  # 2 steps an epoch
    assert [round(density, 2) for density in watch.density] == [1.0] * 4 + [0.32] * 4 + [0.1] * 4
    assert len(callback.rates) == 2


@pytest.mark.parametrize("selector", ["global", "uniform", "random"])
def test_selectors(selector):
    callback = IMP(0.8, 1, retrain_epochs=1, selector=selector)
    fit(callback, epochs=1)
    shares = list(callback.store.densities().values())
    assert callback.store.density() == pytest.approx(0.2, abs=1e-3)
    assert (max(shares) - min(shares) < 0.02) == (selector == "uniform")


def test_a_second_fit_goes_on_with_the_next_phase():
    callback = IMP(0.9, 2, retrain_epochs=1)
    module = fit(callback, epochs=1)
    first = dict(callback.sparsity_masks())
    fit(callback, module, epochs=1)
    assert callback.phase == 2
    assert all(not (mask & ~first[name]).any() for name, mask in callback.sparsity_masks().items())
    last = dict(callback.sparsity_masks())
    fit(callback, module, epochs=1)
    assert_state_dicts_equal(dict(callback.sparsity_masks()), last)
    fit(callback, Classifier(), epochs=1)
    assert callback.phase == 1, "another module starts anew"


# ---- start -----------------------------------------------------------------------------------------------------------------------------


def test_phases_in_runs_of_their_own_are_the_phases_of_one_run(tmp_path):
    whole = IMP(**PHASES, skip=["network.7"])
    wanted = fit(whole)
    dense, one, two = (
        IMP(**PHASES, skip=["network.7"]),
        *(IMP(0.9, 2, 1, start=str(tmp_path / f"{i}.ckpt"), skip=["network.7"]) for i in range(2)),
    )
    for place, callback in enumerate((dense, one, two)):
        trainer = tiny_trainer(max_epochs=1, callbacks=[callback])
        pl.seed_everything(place, verbose=False)  # weights come from start, whatever the module was drawn with
        module = Classifier()
        if place:
            nn.init.normal_(module.network[0].weight)
        trainer.fit(module, loader())
        trainer.save_checkpoint(tmp_path / f"{place}.ckpt")
    assert (dense.phase, one.phase, two.phase) == (0, 1, 2)
    assert two.rates == whole.rates
    assert two.store.density() == whole.store.density()
    assert set(cloned_state(module)) == set(cloned_state(wanted))
    with pytest.raises(ValueError, match=r"is behind phase 2, and phases is 2: nothing is left to prune"):
        fit(IMP(0.9, 2, 1, start=str(tmp_path / "2.ckpt"), skip=["network.7"]))
    with pytest.raises(ValueError, match=r"was made by IMP.*give the same targets and skip"):
        fit(IMP(0.9, 2, 1, start=str(tmp_path / "1.ckpt")))
    with pytest.raises(ValueError, match="another architecture"):
        fit(IMP(0.9, 2, 1, start=str(tmp_path / "1.ckpt"), skip=["network.0"]), Classifier(nn.Sequential(nn.Flatten(), nn.Linear(192, 4))))


def test_a_trained_model_from_elsewhere_starts_with_the_optimisers_own_rate(tmp_path):
    torch.save(Classifier().state_dict(), tmp_path / "dense.pt")
    callback = IMP(0.5, 1, 1, start=str(tmp_path / "dense.pt"))
    fit(callback, epochs=1)
    assert callback.rates == [[0.1]]
    assert float(callback._plan.max()) == pytest.approx(0.1)


# ---- what must hold everywhere ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kill_at", [2, 4, 6])  # in the dense part, at a phase's start, in mid-phase
def test_a_killed_run_ends_like_a_whole_one(kill_at, tmp_path):
    from lit_methods.datamodules.loaders import make_loader

    def build() -> Any:
        data = make_loader(Images(24), 6, shuffle=True, training=True, seed=0, num_workers=0, trainer=None)
        return Classifier(), data, [IMP(**PHASES), ExactResume()]

    whole, resumed = kill_and_resume(build, 11, kill_at, tmp_path, max_epochs=3)
    assert_state_dicts_equal(resumed, whole)
    assert float((whole["network.5.weight"] == 0).double().mean()) > 0.5


def in_two_processes() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    callback = IMP(**PHASES)
    module = Classifier()
    tiny_trainer(max_epochs=3, callbacks=[callback], devices=2, strategy="ddp").fit(module, loader(3))
    return {name: p.detach().clone() for name, p in module.named_parameters()}, dict(callback.sparsity_masks())


def test_two_processes_prune_alike():
    (state, masks), (other_state, other_masks) = run_two_processes(in_two_processes)
    assert_state_dicts_equal(state, other_state)
    assert_state_dicts_equal(masks, other_masks)
    gone = sum(int((~mask).sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())
    assert gone == pytest.approx(0.9, abs=1e-3)


def test_on_a_resnet_and_on_a_language_model_with_tied_embeddings():
    callback = IMP(0.9, 1, 1)
    module = fit(callback, resnet_classifier(), epochs=1, limit_train_batches=1)
    assert len(callback.store.masks) == 21, "20 convolutions and the classifier; no norm"
    assert (
        sum(int((p == 0).sum()) for p in callback.store.weights.values())
        >= 0.9 * sum(p.numel() for p in callback.store.weights.values()) - 1
    )
    transformers = pytest.importorskip("transformers")

    class Language(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=8))

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.model(input_ids=batch, labels=batch).loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    callback, module = IMP(0.5, 1, 1), Language()
    tiny_trainer(max_epochs=1, callbacks=[callback]).fit(module, DataLoader(torch.randint(0, 32, (8, 8)), batch_size=4))
    assert module.model.lm_head.weight is module.model.transformer.wte.weight
    assert not any("wte" in name or "lm_head" in name for name in callback.store.masks), "tied to an embedding: left dense"
    assert callback.store.density() == pytest.approx(0.5, abs=1e-3)


def test_nothing_is_left_behind():
    assert left_behind(Classifier, lambda: IMP(0.9, 1, 1), loader()) == {}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"sparsity": 1.0}, r"sparsity"),
        ({"phases": 0}, "phases"),
        ({"retrain_epochs": 0}, "retrain_epochs"),
        ({"dense_epochs": -1}, "dense_epochs"),
        ({"peak": 0.0}, "peak"),
        ({"warmup_share": 1.0}, "warmup_share"),
        ({"schedule": "linear"}, "FT, LRW, SLR, CLR, LLR, ALLR"),
        ({"selector": "l1"}, "global, uniform, random"),
        ({"start": "dense.ckpt", "dense_epochs": 2}, "set it to 0"),
    ],
)
def test_bad_arguments_are_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        IMP(**arguments)


def test_what_cannot_work_is_refused_before_training():
    with pytest.raises(ValueError, match=r"IMP: phases count the steps of one optimiser, but TwoOptimisers has 2"):
        fit(IMP(0.5, 1, 1), TwoOptimisers())
    with pytest.raises(ValueError, match=r"IMP: LRW replays the last 8 learning rates of the original training, of which 4 are known"):
        fit(IMP(0.5, 1, 2, dense_epochs=1, schedule="LRW"))
    with pytest.raises(FileNotFoundError, match=r"none\.ckpt does not exist"):
        fit(IMP(0.5, 1, 1, start="none.ckpt"))


# ---- the maths -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_counts_are_exact_and_ties_go_to_the_first(dtype):
    weights = {"a": torch.ones(3, 4, dtype=dtype), "b": torch.full((5,), 2.0, dtype=dtype)}
    masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    once = pruned_masks(weights, masks, 0.5)
    assert int(once["b"].sum()) == 5
    assert int(once["a"].sum()) == 17 - 8 - 5
    assert once["a"].flatten()[:4].all()
    twice = pruned_masks(weights, once, 0.5, "uniform")
    assert [int(mask.sum()) for mask in twice.values()] == [2, 3], "round half to even: 2 of 4, 2 of 5"
    assert_state_dicts_equal(pruned_masks(weights, masks, 0.0), masks)
    assert not any(mask.any() for mask in pruned_masks(weights, masks, 1.0).values())
    assert pruned_masks({}, {}, 0.5) == {}
    zeros = {"a": torch.zeros(4, dtype=dtype)}
    assert int(pruned_masks(zeros, {"a": torch.tensor([True, False, True, True])}, 0.5)["a"].sum()) == 1
    assert float(relative_norm_drop(zeros, {"a": torch.zeros(4, dtype=torch.bool)})) == 0


def test_norm_drop():
    weights = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([[12.0]])}
    masks = {"a": torch.tensor([False, False]), "b": torch.tensor([[True]])}
    assert float(relative_norm_drop(weights, masks)) == pytest.approx(5 / 13)


def test_short_phases_and_peaks():
    history = torch.tensor([0.0, 0.4, 0.3, 0.1])
    assert retrain_rates(history, 5, "LLR", original_warmup=1).tolist() == pytest.approx([0.4 * (1 - j / 5) for j in range(5)]), (
        "no warm-up"
    )
    rates = retrain_rates(history, 20, "CLR", original_warmup=1, peak=2.0)
    assert rates[:3].tolist() == pytest.approx([0.0, 1.0, 2.0])
    assert rates[3:].tolist() == pytest.approx([0.1 + 1.9 * (1 + math.cos(math.pi * j / 18)) / 2 for j in range(17)])
    assert float(retrain_rates(history, 20, "SLR", original_warmup=1, peak=0.8).max()) == pytest.approx(0.8)
    assert float(retrain_rates(history, 2, "ALLR", original_warmup=1, norm_drop=0.0, fraction=0.5).max()) == pytest.approx(0.2), (
        "at least n / S"
    )
    assert float(retrain_rates(history, 2, "ALLR", original_warmup=1, norm_drop=1.0, fraction=0.5).max()) == pytest.approx(0.4), (
        "at most the peak"
    )
    with pytest.raises(ValueError, match="of which 4 are known"):
        retrain_rates(history, 5, "LRW")


def test_the_mean_of_models_leaves_counters_alone():
    states = [{"w": torch.tensor([1.0, 3.0]), "h": torch.tensor([1.0], dtype=torch.bfloat16), "n": torch.tensor(3)} for _ in range(3)]
    states[1] = {"w": torch.tensor([4.0, 0.0]), "h": torch.tensor([2.5], dtype=torch.bfloat16), "n": torch.tensor(9)}
    mean = uniform_soup(iter(states))
    assert mean["w"].tolist() == [2.0, 2.0]
    assert (mean["h"].dtype, float(mean["h"])) == (torch.bfloat16, 1.5)
    assert int(mean["n"]) == 3
    with pytest.raises(ValueError, match=r"model 2 has another architecture than the first: w \(3,\) against \(2,\)"):
        uniform_soup([states[0], {**states[1], "w": torch.zeros(3)}])
    with pytest.raises(ValueError, match="at least one model"):
        uniform_soup([])
    masked = masked_state({"w": torch.tensor([math.inf, 2.0]), "b": torch.ones(1)}, {"w": torch.tensor([False, True])})
    assert masked["w"].tolist() == [0.0, 2.0]


def test_the_greedy_soup_keeps_what_does_not_harm():
    asked = []

    def evaluate(places: list[int]) -> float:
        asked.append(places)
        return {(1, 2): 0.7, (1, 2, 0): 0.6, (1, 2, 3): 0.7}[tuple(places)]

    assert greedy_selection([0.5, 0.7, 0.7, 0.1], evaluate) == ([1, 2, 3], 0.7)
    assert asked == [[1, 2], [1, 2, 0], [1, 2, 3]], "ties in the order of the input"
    assert greedy_selection([0.2], evaluate) == ([0], 0.2)


def test_diversity_by_hand():
    found = diversity(torch.tensor([[3.0, 0.0], [0.0, 4.0], [3.0, 0.0]]))
    assert found["max_l2_distance"] == 5
    assert found["min_l2_distance"] == 0
    assert float(found["mean_l2_distance"]) == pytest.approx(10 / 3)
    assert float(found["max_angle_deg"]) == pytest.approx(90)
    assert float(found["min_angle_deg"]) == pytest.approx(0, abs=1e-3)
    assert float(found["max_barycentre_distance"]) == pytest.approx(math.hypot(2, 8 / 3))
    assert {float(value) for value in diversity(torch.ones(1, 2)).values()} == {0.0}
    logits = torch.tensor([[[0.0, 0.0]], [[math.log(3), 0.0]]])
    assert ensemble_probabilities(logits)[0].tolist() == pytest.approx([(0.5 + 0.75) / 2, (0.5 + 0.25) / 2])


def test_recalibration_equals_torchs():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).train()
    other = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    other.load_state_dict(network.state_dict())
    batches = [torch.randn(8, 3) + 1 for _ in range(3)]
    with recalibrating(network):
        for batch in batches:
            assert not network(batch).requires_grad
    torch.optim.swa_utils.update_bn(batches, other)
    assert_state_dicts_equal(network.state_dict(), other.state_dict())
    assert network[1].momentum == 0.1
    assert float(network[1].running_mean.abs().sum()) > 0
