"""DSL: the maths against plain computations, the callback against a loop written by hand, and on modules that aren't ours."""

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
    compiled_classifier,
    fingerprint,
    kill_and_resume,
    run_two_processes,
    tiny_trainer,
)
from lit_methods import LightGCN
from lit_methods.callbacks import DSL, EMATeacher, ExactResume
from lit_methods.callbacks.sparsity.dsl_recommendation import density_by_popularity, global_magnitude_masks, prune, regrow, update_mask
from lit_methods.datamodules import RatingsDataModule
from lit_methods.seeds import own_seed


def random_case(
    dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = (6, 9), seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=generator) < 0.4
    weight = torch.randn(shape, generator=generator, dtype=dtype) * mask
    return weight, mask, torch.randn(shape, generator=generator, dtype=dtype), torch.rand(shape, generator=generator)


# ---- the maths -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ratio", [0.005, 0.3, 1.0])
def test_an_update_prunes_the_smallest_and_grows_the_largest_gradients(dtype, ratio):
    weight, mask, gradient, uniform = random_case(torch.float32)
    weight, gradient = weight.to(dtype), gradient.to(dtype)
    new, removed = update_mask(weight, mask, gradient.abs(), ratio, uniform)
    active = sorted(weight[mask].abs().tolist())
    limit = active[math.ceil(ratio * len(active)) - 1]
    kept = weight.abs() > limit
    assert int(removed) == int(mask.sum() - kept.sum()) >= 1
    assert int(new.sum()) == int(mask.sum())
    assert (new & kept).sum() == kept.sum(), "what wasn't pruned stays"
    grown, passed = new & ~kept, ~new & ~kept
    assert gradient[grown].abs().min() >= gradient[passed].abs().max()


def test_active_zeros_go_too_and_growth_makes_up_for_them():
    weight = torch.tensor([0.0, 0.0, 3.0, -4.0, 0.0, 0.0])
    mask = torch.tensor([True, True, True, True, False, False])
    new, removed = update_mask(weight, mask, torch.tensor([0.1, 0.5, 9.0, 9.0, 0.6, 0.2]), 0.25, torch.zeros(6))
    assert int(removed) == 2  # one was asked for
    assert new.tolist() == [False, True, True, True, True, False]


def test_zero_scores_are_filled_at_random_among_the_inactive_only():
    kept = torch.zeros(400, dtype=torch.bool)
    kept[:100] = True
    score = torch.zeros(400)
    score[:100], score[100:110] = 5.0, 1e-9  # active ones would win by score
    seen = torch.zeros(400)
    for seed in range(40):
        new = regrow(kept, score, 60, torch.rand(400, generator=torch.Generator().manual_seed(seed)))
        assert int(new.sum()) == 160
        assert new[:110].all(), "active ones stay, positive scores come first"
        seen += new
    assert (seen[110:] > 0).all(), "every inactive position gets its chance"
    assert not (seen[110:] == 40).any()


def test_other_deaths():
    weight = torch.tensor([0.1, 0.5, 0.9, -0.2, -0.3, -0.8, 0.0, 0.0])
    mask = torch.tensor([True] * 7 + [False])  # one active zero
    gradient = torch.tensor([9.0, 0.1, 1.0, 1.0, 0.2, 1.0, 1.0, 1.0])
    assert prune(weight, mask, 0.5, "set").tolist() == [False, False, True, False, False, True, False, False]
    assert prune(weight, mask, 0.0, "set").equal(mask)
    # |w g| = .9 .05 .9 .2 .06 .8 0: the three smallest of seven go at a ratio of 3 / 7
    assert prune(weight, mask, 3 / 7, "taylor", gradient).tolist() == [True, False, True, True, False, True, False, False]
    assert prune(weight, mask, 0.9, "threshold", threshold=0.3).tolist() == [False, True, True, False, False, True, False, False]
    with pytest.raises(ValueError, match="none was given"):
        prune(weight, mask, 0.5, "taylor")
    with pytest.raises(ValueError, match="magnitude, set, taylor, threshold"):
        prune(weight, mask, 0.5, "luck")  # type: ignore[arg-type]


def test_set_prunes_nothing_of_a_side_that_is_empty():
    weight = torch.tensor([0.1, 0.5, 0.9])
    assert prune(weight, torch.ones(3, dtype=torch.bool), 0.6, "set").tolist() == [False, True, True]


def test_the_lottery_ticket_compares_all_tensors():
    masks = global_magnitude_masks({"a": torch.tensor([[1.0, -9.0]]), "b": torch.tensor([8.0, 0.1, 7.0, 0.2])}, 0.5)
    assert masks["a"].tolist() == [[False, True]]
    assert masks["b"].tolist() == [True, False, True, False]


def test_density_by_popularity_orders_the_rows():
    mask = torch.tensor([[1, 1], [0, 0], [1, 0], [1, 1]]).bool()
    assert density_by_popularity(mask, torch.tensor([7, 1, 3, 9]), groups=2) == [(2.0, 0.25), (8.0, 1.0)]
    assert len(density_by_popularity(mask, torch.tensor([7, 1, 3, 9]))) == 4


# ---- the callback ----------------------------------------------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):
    def __init__(self, size: int = 16) -> None:
        generator = torch.Generator().manual_seed(3)
        self.x, self.y = torch.randn(size, 10, generator=generator), torch.randn(size, 6, generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


class Regression(pl.LightningModule):
    def __init__(self, optimizer: str = "adam") -> None:
        super().__init__()
        torch.manual_seed(5)
        self.layer, self.kind = nn.Linear(10, 6), optimizer

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return (self.layer(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.kind == "sgd":
            return torch.optim.SGD(self.parameters(), lr=0.05)
        return torch.optim.Adam(self.parameters(), lr=0.05)


def rows() -> DataLoader:
    return DataLoader(Rows(), batch_size=4)


def test_a_run_is_the_papers_loop():
    """The same in plain PyTorch: step, mask, and at every third step prune and grow by the gradient of the step just taken."""
    module, callback = Regression(), DSL(density=0.4, interval=3, seed=2)
    tiny_trainer(max_epochs=3, callbacks=[callback]).fit(module, rows())
    plain = Regression()
    weight, mask = plain.layer.weight, torch.rand(6, 10, generator=torch.Generator().manual_seed(own_seed("DSL", 2))) < 0.4
    optimizer, step = plain.configure_optimizers(), 0
    with torch.no_grad():
        weight *= mask
    for _ in range(3):
        for batch in rows():
            optimizer.zero_grad()
            plain.training_step(batch, 0).backward()
            optimizer.step()
            step += 1
            with torch.no_grad():
                weight *= mask
                if step % 3 == 0:
                    ratio = 0.005 + 0.495 * (1 + math.cos(math.pi * step / 12)) / 2
                    size = weight.abs().flatten().sort().values
                    kept = weight.abs() > size[int((~mask).sum()) + math.ceil(ratio * int(mask.sum())) - 1]
                    count = int(mask.sum() - kept.sum())
                    best = (weight.grad.abs() * ~kept).flatten().argsort(descending=True)[:count]
                    mask = kept.clone()
                    mask.view(-1)[best] = True
                    weight *= mask
    assert step == 12
    assert torch.equal(callback.sparsity_masks()["layer.weight"], mask)
    assert_state_dicts_equal(module.state_dict(), plain.state_dict())


WAYS = [(Classifier, growth, death) for growth in ("gradient", "random", "random_unfired") for death in ("magnitude", "set", "taylor")]
WAYS += [(TwoOptimisers, "gradient", "magnitude"), (compiled_classifier, "gradient", "magnitude")]


@pytest.mark.parametrize(("make", "growth", "death"), WAYS)
def test_the_budget_holds_on_any_module(make, growth, death):
    module, plain = make(), make()
    callback = DSL(density=0.3, interval=1, growth=growth, death=death, seed=1)
    first: dict[str, Tensor] = {}

    class Budget(pl.Callback):
        def on_mask_updated(self, trainer: pl.Trainer, pl_module: pl.LightningModule, source: DSL) -> None:
            first.update({name: mask.clone() for name, mask in source.sparsity_masks().items() if name not in first})
            assert {name: int(mask.sum()) for name, mask in source.sparsity_masks().items()} == {n: int(m.sum()) for n, m in first.items()}
            for name, mask in source.sparsity_masks().items():
                assert not source.store.weights[name][~mask].any()

    data = DataLoader(Images(24), batch_size=6)
    tiny_trainer(max_epochs=1).fit(plain, data)
    tiny_trainer(max_epochs=2, callbacks=[Budget(), callback]).fit(module, data)
    assert fingerprint(module) == fingerprint(plain)
    masks = callback.sparsity_masks()
    assert any(not torch.equal(first[name], mask) for name, mask in masks.items())
    for name, mask in masks.items():
        assert not (mask & ~callback.fired[name]).any(), "what is active was active at some time"
        assert not (first[name] & ~callback.fired[name]).any()


def test_unfired_positions_come_first():
    callback = DSL(density=0.3, interval=1, growth="random_unfired", initial_ratio=0.5, min_ratio=0.5)
    tiny_trainer(max_steps=2, callbacks=[callback]).fit(Regression(), rows())
    fired, mask = callback.fired["layer.weight"], callback.sparsity_masks()["layer.weight"]
    assert int(fired.sum()) == int(mask.sum()) + 2 * math.ceil(0.5 * int(mask.sum())), "no growth was spent on a position seen before"


def test_fixed_masks_stay_and_a_momentum_grows():
    still, moving = DSL(density=0.4, interval=1, fix=True, seed=4), DSL(density=0.4, interval=1, growth="momentum", seed=4)
    start = torch.rand(6, 10, generator=torch.Generator().manual_seed(own_seed("DSL", 4))) < 0.4
    for callback in (still, moving):
        tiny_trainer(max_steps=6, callbacks=[callback]).fit(Regression(), rows())
    assert torch.equal(still.sparsity_masks()["layer.weight"], start)
    assert not torch.equal(moving.sparsity_masks()["layer.weight"], start)
    assert moving.sparsity_masks()["layer.weight"].sum() == start.sum()
    with pytest.raises(ValueError, match=r"no moments of 'layer\.weight'"):
        tiny_trainer(max_steps=2, callbacks=[DSL(density=0.4, interval=1, growth="momentum")]).fit(Regression("sgd"), rows())


@pytest.mark.parametrize("clean", [False, True])
def test_adam_remembers_dead_weights_unless_told_not_to(clean):
    module, callback = Regression(), DSL(density=0.4, interval=2, mask_optimizer_state=clean)
    trainer = tiny_trainer(max_steps=5, callbacks=[callback])
    trainer.fit(module, rows())
    (optimizer,) = trainer.optimizers
    dead = ~callback.sparsity_masks()["layer.weight"]
    assert bool(optimizer.state[module.layer.weight]["exp_avg"][dead].any()) != clean


def test_vectors_are_masked_when_asked_for():
    callback = DSL(density=0.5, interval=2, include_vectors=True, start="lottery_ticket")
    tiny_trainer(max_steps=4, callbacks=[callback]).fit(Regression(), rows())
    masks = callback.sparsity_masks()
    assert sorted(masks) == ["layer.bias", "layer.weight"]
    assert int(sum(mask.sum() for mask in masks.values())) == 33  # half of 60 + 6


def test_what_cannot_work_is_refused():
    class Table(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(4, 3, sparse=True)

    with pytest.raises(ValueError, match="sparse=False"):
        tiny_trainer(max_steps=1, callbacks=[DSL(targets=["table"])]).fit(Table(), rows())
    with pytest.raises(ValueError, match="the schedule needs an end, and this training has none"):
        tiny_trainer(max_epochs=-1, max_steps=-1, callbacks=[DSL()]).fit(Regression(), rows())
    for wrong, message in (
        ({"density": 0.0}, "density is 0.0"),
        ({"interval": 0}, "interval is 0"),
        ({"min_ratio": 2.0}, "min_ratio is 2.0"),
        ({"growth": "luck"}, "gradient, random, random_unfired, momentum"),
        ({"growth": "momentum", "mask_gradients": True}, "set mask_gradients"),
        ({"death_threshold": -1.0}, "death_threshold is -1.0"),
        ({"total_steps": 0}, "total_steps is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            DSL(**wrong)


def lightgcn_parts(**kwargs: Any) -> tuple[LightGCN, RatingsDataModule, list[pl.Callback]]:
    pl.seed_everything(0, verbose=False)
    model = LightGCN(200, 150, embedding_dim=8, num_layers=2, min_lr=None)
    return (
        model,
        RatingsDataModule(batch_size=1024),
        [DSL(**{"density": 0.3, "interval": 2, "targets": ["embedding"], **kwargs}), ExactResume()],
    )


@pytest.mark.parametrize("growth", ["gradient", "random_unfired"])
def test_a_killed_run_ends_like_an_uninterrupted_one(growth, tmp_path):
    callbacks: list[DSL] = []

    def build() -> tuple[LightGCN, RatingsDataModule, list[pl.Callback]]:
        model, data, parts = lightgcn_parts(growth=growth)
        callbacks.append(parts[0])  # type: ignore[arg-type]
        return model, data, parts

    whole, resumed = kill_and_resume(build, steps=7, kill_at=3, tmp_path=tmp_path, limit_val_batches=0)
    assert_state_dicts_equal(resumed, whole)
    first, _, last = callbacks
    assert torch.equal(first.history.ever["embedding.weight"], last.history.ever["embedding.weight"]), "ITOP goes on too"


def two_ranks() -> tuple[Tensor, Tensor]:
    model, _, parts = lightgcn_parts()
    data = RatingsDataModule(batch_size=512)
    tiny_trainer(max_steps=4, devices=2, strategy="ddp", callbacks=parts, use_distributed_sampler=False, limit_val_batches=0).fit(
        model, datamodule=data
    )
    return parts[0].sparsity_masks()["embedding.weight"], model.embedding.weight.detach()  # type: ignore[attr-defined]


def test_two_processes_end_like_one_at_the_same_global_batch():
    (mask, weight), (other_mask, other_weight) = run_two_processes(two_ranks)
    assert torch.equal(mask, other_mask)
    assert torch.equal(weight, other_weight)
    model, data, parts = lightgcn_parts()
    tiny_trainer(max_steps=4, callbacks=parts, limit_val_batches=0).fit(model, datamodule=data)
    assert torch.equal(parts[0].sparsity_masks()["embedding.weight"], mask)  # type: ignore[attr-defined]
    torch.testing.assert_close(model.embedding.weight.detach(), weight, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dsl_first", [True, False])
def test_an_averaged_copy_is_masked_too(dsl_first):
    callback, teacher = DSL(density=0.3, interval=2), EMATeacher(decay=0.5)
    parts = [callback, teacher] if dsl_first else [teacher, callback]
    tiny_trainer(max_steps=4, callbacks=parts).fit(Regression(), rows())
    dead = ~callback.sparsity_masks()["layer.weight"]
    assert not teacher.averaged()["layer.weight"][dead].any()


def test_the_dashboard_sees_who_has_dimensions():
    model, data, parts = lightgcn_parts()
    callback = parts[0]
    assert isinstance(callback, DSL)
    assert callback.dashboard_media() == {}
    trainer = tiny_trainer(max_steps=4, callbacks=parts, limit_val_batches=0)
    trainer.fit(model, datamodule=data)
    media = callback.dashboard_media()
    assert media["dsl/active_per_row"].counts.sum() == 350  # type: ignore[union-attr]
    table = media["dsl/groups"]
    kinds = [row[0] for row in table.rows]  # type: ignore[union-attr]
    assert kinds == ["users"] * 10 + ["items"] * 10
    mean = sum(row[3] * size for row, size in zip(table.rows, [20] * 10 + [15] * 10, strict=True)) / 350  # type: ignore[union-attr]
    assert mean == pytest.approx(callback.store.density(), abs=1e-3)
    logged = trainer.callback_metrics
    assert float(logged["dsl/itop"]) > float(logged["dsl/density"]) > 0.25
    assert float(logged["dsl/ratio"]) == pytest.approx(0.005)
    assert torch.equal(callback.dashboard_artifacts()["dsl_masks"]["embedding.weight"], callback.sparsity_masks()["embedding.weight"])
