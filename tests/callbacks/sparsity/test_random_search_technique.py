"""Random search on modules that aren't ours: which nodes go, what is scored, and what a run keeps."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from helpers import assert_state_dicts_equal, kill_and_resume, left_behind, run_two_processes, tiny_trainer
from lit_methods.callbacks import ExactResume, RandomSearch
from lit_methods.callbacks.sparsity.channels import _plan_of as plan_of
from lit_methods.callbacks.sparsity.channels import apply_plan, node_groups, node_masks, removed_entries
from lit_methods.callbacks.sparsity.random_search import core
from lit_methods.callbacks.targets import plain_modules
from lit_methods.datamodules.loaders import make_loader


class Foreign(pl.LightningModule):
    """A small residual convolutional network with batch norms, on tuples."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.inner = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 8, 3, padding=1))
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Flatten(), nn.Linear(8 * 36, 16), nn.Sigmoid(), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.inner(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def loader(size: int = 24, batch: int = 6) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(size, 1, 6, 6, generator=generator), torch.randint(3, (size,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=batch)


def search(**words: Any) -> RandomSearch:
    return RandomSearch(**{"sparsity": 0.5, "candidates": 5, **words})


@pytest.fixture(scope="module")
def fitted() -> tuple[RandomSearch, Foreign, pl.Trainer]:
    callback, module = search(), Foreign()
    trainer = tiny_trainer(callbacks=[callback], max_epochs=1, limit_val_batches=0)
    trainer.fit(module, loader())
    return callback, module, trainer


def test_nodes_go_with_rows_and_columns_and_those_of_a_sum_together(fitted) -> None:
    callback, module, _ = fitted
    assert callback.nodes == {"stem.0": (4, 8), "inner.0": (6, 12), "inner.3": (4, 8), "head.2": (8, 16)}
    stem, last = (weight.flatten(1).any(1) for weight in (module.stem[0].weight, module.inner[3].weight))
    assert torch.equal(stem, last), "channels of a sum are one node"
    assert torch.equal(module.inner[0].weight.transpose(0, 1).flatten(1).any(1), stem)
    assert torch.equal(module.head[2].weight.view(16, 8, 36).transpose(0, 1).flatten(1).any(1), stem), "a flattened map is 36 columns"
    assert module.head[4].weight.any(1).all(), "outputs stay"
    assert module.head[4].weight.any(0).sum() == 8


def test_the_masked_network_is_the_cut_one_and_its_parameters_are_counted(fitted) -> None:
    callback, module, _ = fitted
    groups, _ = node_groups(module, torch.randn(3, 1, 6, 6))
    keep = [module.get_parameter(f"{group.parts[0].module}.weight").flatten(1).any(1) for group in groups]
    cut = Foreign()
    cut.load_state_dict(module.state_dict())
    apply_plan(cut, plan_of(removed_entries(zip(groups, keep, strict=True))))
    x = torch.randn(4, 1, 6, 6)
    torch.testing.assert_close(cut.eval()(x), module.eval()(x), rtol=1e-4, atol=1e-5)
    effective, total = callback.parameters
    assert effective == sum(parameter.numel() for parameter in cut.parameters())
    assert total == sum(parameter.numel() for parameter in module.parameters())


def test_the_winner_has_the_lowest_loss_with_the_weights_of_the_start(fitted) -> None:
    callback, _, trainer = fitted
    start = Foreign()
    batch = next(iter(loader()))
    losses = []
    for place in range(5):
        other = search(candidates=5)
        drawn = start_masks(other, start, place)
        twin = Foreign().eval()
        for part in twin.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.train()
        with torch.no_grad():
            for name, mask in drawn.items():
                twin.get_parameter(name).mul_(mask)
            losses.append(float(nn.functional.cross_entropy(twin(batch[0]), batch[1])))
    assert callback.scores.tolist() == pytest.approx(losses, rel=1e-5)
    best = start_masks(callback, start, losses.index(min(losses)))
    assert all(torch.equal(callback.store.masks[name], mask) for name, mask in best.items())
    assert callback.passes == 5
    media = callback.dashboard_media()
    assert media["random_search/scores"].counts.sum() == 5
    assert [row[0] for row in media["random_search/search"].rows][-1] == losses.index(min(losses))
    assert float(trainer.callback_metrics["random_search/best_score"]) == pytest.approx(min(losses), rel=1e-5)


def start_masks(callback: RandomSearch, module: Foreign, place: int) -> dict[str, Tensor]:
    from lit_methods.seeds import own_seed

    generator = torch.Generator().manual_seed(own_seed(f"random_search {place}", callback.seed))
    groups, _ = node_groups(module, torch.randn(3, 1, 6, 6))
    pairs = [(group, core.random_nodes(group.channels, callback.sparsity, generator)) for group in groups]
    return node_masks(plain_modules(module), removed_entries(pairs))


@pytest.mark.parametrize(
    "words",
    [
        {"mode": "random"},
        {"mode": "dense"},
        {"space": "weight", "score": "accuracy"},
        {"score": "gradient_norm", "batches": 2},
        {"score": "synflow"},
        {"halving_steps": 2, "candidates": 6},
    ],
    ids=lambda words: ", ".join(f"{key} {value}" for key, value in words.items()),
)
def test_every_way_trains_a_sparse_network_and_leaves_nothing_behind(words: dict[str, Any]) -> None:
    callback, module = search(**words), Foreign()
    tiny_trainer(callbacks=[callback], max_epochs=1, limit_val_batches=0).fit(module, loader())
    for name, mask in callback.store.masks.items():
        assert not module.get_parameter(name)[~mask].any()
    density = callback.store.density()
    if callback.mode == "dense":
        assert density == 1
    elif callback.space == "weight":
        assert density == pytest.approx(0.5, abs=0.01)
    else:
        assert 0.2 < density < 0.4
    if callback.halving_steps:
        assert callback.passes == 6 * (1 + 2) + 3 * (1 + 4) + 2 * (1 + 8)
        assert callback.scores.isfinite().sum() == 2, "the last round"
    assert len(callback.scores) == (0 if callback.mode != "search" else callback.number)


def test_halves_go_on_and_ties_stay_with_the_earlier() -> None:
    assert core.fewer(torch.tensor([3.0, 1.0, 1.0, 2.0, 1.0]), [0, 1, 2, 3, 4]) == [1, 2, 4]
    assert core.fewer(torch.tensor([3.0, 1.0, 1.0, 2.0, 1.0]), [1, 2]) == [1]
    assert [core.kept_nodes(width, share) for width, share in ((10, 0.25), (10, 0.99), (1, 0.9), (4, 0.625))] == [8, 1, 1, 2]


def test_a_killed_run_ends_the_same_and_does_not_search_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    searches: list[int] = []
    original = RandomSearch._search
    monkeypatch.setattr(RandomSearch, "_search", lambda self, *args: (searches.append(1), original(self, *args))[1])
    data = loader().dataset

    def build() -> Any:
        return Foreign(), make_loader(data, 6, shuffle=True, seed=0, with_epoch=False), [search(), ExactResume()]

    whole, resumed = kill_and_resume(build, 6, 3, tmp_path, max_epochs=-1)
    assert_state_dicts_equal(resumed, whole)
    assert len(searches) == 2, "the whole run and the killed one"


def test_it_leaves_nothing_behind() -> None:
    assert not left_behind(Foreign, search, loader())


def _two() -> tuple[list[float], dict[str, Tensor]]:
    callback = search(candidates=5, batches=2)
    trainer = tiny_trainer(
        callbacks=[callback], max_epochs=1, limit_val_batches=0, devices=2, strategy="ddp", use_distributed_sampler=False
    )
    trainer.fit(Foreign(), loader())
    return callback.scores.tolist(), dict(callback.store.masks)


def test_two_processes_choose_what_one_chooses() -> None:
    alone = search(candidates=5, batches=2)
    tiny_trainer(callbacks=[alone], max_epochs=1, limit_val_batches=0).fit(Foreign(), loader())
    for scores, masks in run_two_processes(_two):
        assert scores == pytest.approx(alone.scores.tolist(), rel=1e-6)
        assert all(torch.equal(mask, alone.store.masks[name]) for name, mask in masks.items())


class Pictures(Foreign):
    """Puts out a picture."""

    def forward(self, x: Tensor) -> Tensor:
        return self.stem(x)


@pytest.mark.parametrize(
    ("words", "module", "says"),
    [
        ({"sparsity": 1.0}, Foreign, "sparsity"),
        ({"candidates": 0}, Foreign, "candidates"),
        ({"score": "luck"}, Foreign, "score"),
        ({"logits": "nothing"}, Foreign, "nothing"),
        ({}, Pictures, "expected logits"),
        ({"targets": ["head.4"]}, Foreign, "no hidden nodes"),
        ({"labels": 5}, Foreign, "labels"),
    ],
)
def test_mistakes_are_told(words: dict[str, Any], module: type[Foreign], says: str) -> None:
    with pytest.raises((ValueError, TypeError), match=says):
        tiny_trainer(callbacks=[search(**words)], max_epochs=1, limit_val_batches=0).fit(module(), loader())
