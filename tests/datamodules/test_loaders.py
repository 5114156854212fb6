"""What a killed and resumed run sees, and what two ranks see, equals what one uninterrupted process sees."""

import contextlib
import os
from itertools import product
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import Dataset

from helpers import Killed, run_two_processes, tiny_trainer
from lit_methods import distributed
from lit_methods.callbacks.run.exact_resume import ExactResume
from lit_methods.datamodules.base import LoaderDataModule
from lit_methods.datamodules.loaders import RankSampler, ResumableLoader, make_loader


class Draws(Dataset):
    """Gives back what it was asked for, and a number that only (epoch, index) decides."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, draw: Any) -> Tensor:
        return torch.tensor(draw)


class Recorder(pl.LightningModule):
    """Keeps every batch it is given, and can die."""

    def __init__(self, die_at: int = -1, save_to: Path | None = None) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: list[Any] = []
        self.validated: list[Any] = []
        self.die_at, self.save_to, self.taken = die_at, save_to, 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        plain = {k: v.tolist() for k, v in batch.items()} if isinstance(batch, dict) else batch.tolist()
        self.seen.append(plain)
        return self.layer(torch.ones(1, 1)).sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated.append(batch.tolist())

    def on_train_batch_end(self, *_: Any) -> None:
        self.taken += 1
        if self.taken == self.die_at:
            assert self.save_to is not None
            self.trainer.save_checkpoint(self.save_to)
            raise Killed

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def one_loader(workers: int) -> Any:
    return make_loader(Draws(22), 4, shuffle=True, seed=5, num_workers=workers, drop_last=True)


def two_loaders(workers: int) -> Any:
    """Five batches of one beside two of the other, which therefore starts again within an epoch."""
    few = make_loader(Draws(7), 3, shuffle=True, seed=6, num_workers=workers, drop_last=True)
    return {"many": one_loader(workers), "few": few}


@pytest.mark.parametrize(
    ("loaders", "workers", "die_at", "kwargs"),
    [
        (one_loader, 0, 3, {"max_epochs": 3}),
        (one_loader, 0, 7, {"max_epochs": 3}),
        (one_loader, 0, 7, {"max_steps": 14}),
        (one_loader, 0, 5, {"max_epochs": 3}),  # after the last batch of an epoch
        (one_loader, 0, 10, {"max_steps": 14}),
        (one_loader, 0, 6, {"max_epochs": 3, "limit_train_batches": 4}),
        (one_loader, 0, 6, {"max_epochs": 3, "accumulate_grad_batches": 2}),  # 5 batches an epoch: the last step has one
        (one_loader, 2, 7, {"max_epochs": 3}),
        (one_loader, 2, 5, {"max_epochs": 2}),
        (two_loaders, 0, 3, {"max_epochs": 3}),
        (two_loaders, 0, 7, {"max_epochs": 3}),  # the shorter one stands exactly at its end
        (two_loaders, 0, 8, {"max_epochs": 3, "accumulate_grad_batches": 2}),
        (two_loaders, 2, 8, {"max_epochs": 2}),
    ],
)
def test_a_resumed_run_goes_on_with_the_next_batch(tmp_path: Path, loaders: Any, workers: int, die_at: int, kwargs: dict[str, Any]) -> None:
    whole = Recorder()
    tiny_trainer(**kwargs).fit(whole, loaders(workers))
    killed = Recorder(die_at, tmp_path / "a.ckpt")
    with contextlib.suppress(Killed):
        tiny_trainer(**kwargs).fit(killed, loaders(workers))
    resumed = Recorder()
    tiny_trainer(**kwargs).fit(resumed, loaders(workers), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert len(killed.seen) == die_at
    assert killed.seen + resumed.seen == whole.seen
    assert whole.seen[0] != whole.seen[kwargs.get("limit_train_batches", 5)]


BY_EPOCHS, BY_STEPS = {"max_epochs": 4}, {"max_steps": 18}
WHERE_SAVED = list(product([BY_EPOCHS, BY_STEPS], [(False, True), (True, True), (True, False)]))
WITH_WORKERS = [(BY_EPOCHS, (True, False)), (BY_STEPS, (False, True))]  # each value once: two processes a loader and epoch take seconds


@pytest.mark.parametrize(
    ("kwargs", "validate", "at_train_end", "workers"),
    [
        pytest.param(kwargs, *saved, workers, marks=pytest.mark.thorough if workers and (kwargs, saved) not in WITH_WORKERS else [])
        for workers in (0, 2)
        for kwargs, saved in WHERE_SAVED
    ],
)
def test_resume_from_the_checkpoint_of_an_epochs_end(
    tmp_path: Path, kwargs: dict[str, Any], validate: bool, at_train_end: bool, workers: int
) -> None:
    def fit(ckpt_path: Path | None, **kwargs: Any) -> list[Any]:
        module = Recorder()
        # ExactResume mends how Lightning restarts a run with max_steps
        callbacks = [ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=at_train_end), ExactResume()]
        trainer = tiny_trainer(enable_checkpointing=True, callbacks=callbacks, limit_val_batches=int(validate), **kwargs)
        val = make_loader(Draws(4), 2, shuffle=False, seed=0)
        trainer.fit(module, one_loader(workers), val, ckpt_path=ckpt_path, weights_only=True)
        return module.seen

    whole = fit(None, **kwargs)
    resumed = fit(tmp_path / "epoch=1.ckpt", **kwargs)
    assert len(whole) == (20 if "max_epochs" in kwargs else 18)
    assert resumed == whole[10:]


def test_epochs_differ_and_follow_from_the_seed() -> None:
    def draws(seed: int, epoch: int) -> list[tuple[int, int]]:
        sampler = RankSampler(range(50), 5, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert draws(1, 3) == draws(1, 3)
    assert {epoch for epoch, _ in draws(1, 3)} == {3}
    orders = [[index for _, index in draws(seed, epoch)] for seed, epoch in [(1, 3), (1, 4), (2, 3)]]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("size", [24, 25, 31, 47])
@pytest.mark.parametrize("drop_last", [False, True])
def test_global_batches_are_the_same_for_any_number_of_ranks(world_size: int, size: int, drop_last: bool) -> None:
    batch = 12 // world_size

    def per_rank(world_size: int, batch: int) -> list[list[int]]:
        samplers = [
            RankSampler(range(size), batch, rank=r, world_size=world_size, drop_last=drop_last, with_epoch=False) for r in range(world_size)
        ]
        draws = [list(sampler) for sampler in samplers]
        assert [len(sampler) for sampler in samplers] == [len(d) for d in draws]
        return draws

    alone, shared = per_rank(1, 12)[0], per_rank(world_size, batch)
    full = size // 12
    for k in range(full):
        dealt = [index for draws in shared for index in draws[k * batch : (k + 1) * batch]]
        assert dealt == alone[k * 12 : (k + 1) * 12]  # contiguous blocks, in rank order
    tail = [index for draws in shared for index in draws[full * batch :]]
    assert tail == alone[full * 12 :]
    assert len(tail) == (0 if drop_last else size - full * 12)
    assert sorted(index for draws in shared for index in draws) == sorted(alone)  # nothing twice


def test_a_plain_loop_resumes_and_shuffles_anew() -> None:
    loader = one_loader(0)
    passes = [[batch.tolist() for batch in loader] for _ in range(2)]
    assert [p[0][0][0] for p in passes] == [0, 1_000_000]  # nobody told the sampler of an epoch, yet the draws differ
    assert {i for b in passes[0] for _, i in b} != {i for b in passes[1] for _, i in b}
    third = iter(loader)
    begun = [next(third).tolist() for _ in range(2)]
    state = loader.state_dict()
    rest = [batch.tolist() for batch in third]
    other = one_loader(0)
    other.load_state_dict(state)
    assert other.state_dict() == state
    assert [batch.tolist() for batch in other] == rest
    assert len(begun) + len(rest) == len(other) == 5


def test_evaluation_sees_every_sample_once_in_order_with_epoch_0() -> None:
    module = Recorder()
    val = make_loader(Draws(7), 3, shuffle=False, seed=0)
    tiny_trainer(max_epochs=2).fit(module, one_loader(0), val)
    one_pass = [[[0, 0], [0, 1], [0, 2]], [[0, 3], [0, 4], [0, 5]], [[0, 6]]]
    assert module.validated == one_pass * 2


def test_state_is_plain_and_loading_draws_nothing_from_the_global_generators() -> None:
    before = torch.get_rng_state()
    loader = one_loader(0)
    next(iter(loader))
    assert all(type(value) is int for value in loader.state_dict().values())
    assert loader.state_dict() == {"epoch": 0, "repeat": 0, "batches": 1, "samples": 22, "seed": 5, "batch_size": 4, "world_size": 1}
    assert torch.equal(before, torch.get_rng_state())


class WorkerNoise(Draws):
    def __getitem__(self, draw: Any) -> Tensor:
        return torch.rand(())


def test_workers_are_seeded_from_the_loaders_seed() -> None:
    def noise(seed: int) -> Tensor:
        torch.manual_seed(int.from_bytes(os.urandom(4), "little"))
        return torch.cat(list(make_loader(WorkerNoise(8), 4, shuffle=True, seed=seed, num_workers=2)))

    assert torch.equal(noise(1), noise(1))
    assert not torch.equal(noise(1), noise(2))


def test_persistent_workers_yield_the_same() -> None:
    def passes(**kwargs: Any) -> list[Any]:
        loader = make_loader(Draws(22), 4, shuffle=True, seed=5, **kwargs)
        seen = []
        for epoch in range(2):
            loader.sampler.set_epoch(epoch)
            seen += [batch.tolist() for batch in loader]
        return seen

    assert passes(num_workers=2, persistent_workers=True) == passes()


def test_predict_and_overfit() -> None:
    class Predicts(Recorder):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return batch.tolist()

    loader = make_loader(Draws(5), 2, shuffle=False, seed=0)
    assert tiny_trainer().predict(Predicts(), loader) == [[[0, 0], [0, 1]], [[0, 2], [0, 3]], [[0, 4]]]
    module = Recorder()
    with pytest.warns(UserWarning, match="overfit"):
        tiny_trainer(overfit_batches=2, max_epochs=2).fit(module, one_loader(0))
    assert module.seen == [[0, 1, 2, 3], [4, 5, 6, 7]] * 2


def fit_on_this_rank(die_at: int, path: Path | None, resume: Path | None) -> list[Any]:
    class KeepsItself(Recorder):
        pass

    module = KeepsItself(die_at, path)
    loader = make_loader(Draws(22), 2, shuffle=True, seed=5, drop_last=True)
    assert isinstance(loader, ResumableLoader)
    trainer = tiny_trainer(max_epochs=2, devices=2, strategy="ddp")
    with contextlib.suppress(Killed):
        trainer.fit(module, loader, ckpt_path=resume, weights_only=True)
    assert distributed.world_size() == 2
    return module.seen


def test_two_ranks_see_what_one_process_sees_also_after_a_resume(tmp_path: Path) -> None:
    alone = Recorder()
    tiny_trainer(max_epochs=2).fit(alone, one_loader(0))
    first, second = run_two_processes(fit_on_this_rank, 3, tmp_path / "a.ckpt", None)
    assert [a + b for a, b in zip(first, second, strict=True)] == alone.seen[:3]
    first, second = run_two_processes(fit_on_this_rank, -1, None, tmp_path / "a.ckpt")
    assert [a + b for a, b in zip(first, second, strict=True)] == alone.seen[3:]


class OneSample(LoaderDataModule):
    def __init__(self) -> None:
        super().__init__(batch_size=2, num_workers=0, seed=0)
        self.train_set, self.val_set = Draws(8), Draws(1)


def refused_on_this_rank(stage: str) -> str:
    trainer = tiny_trainer(max_epochs=1, devices=2, strategy="ddp")
    with pytest.raises(ValueError) as error:
        getattr(trainer, stage)(Recorder(), datamodule=OneSample())
    return str(error.value)


def test_fewer_evaluation_samples_than_processes_are_refused_and_nobody_waits() -> None:
    for stage in ("validate", "fit"):
        first, second = run_two_processes(refused_on_this_rank, stage, timeout=60)
        assert first == second
        assert "1 samples of an evaluation can't be dealt to 2 processes" in first


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"a batch takes 4 on each of 1 .*lower batch_size until a batch takes 3 or fewer, or look"
    ) as small:
        make_loader(Draws(3), 4, shuffle=True, seed=0, drop_last=True)
    assert "drop_last" not in str(small.value), "no datamodule has such an argument"
    with pytest.raises(ValueError, match=r"use fewer processes \(trainer\.devices\)"):
        make_loader(Draws(3), 4, shuffle=True, seed=0, drop_last=True, rank=0, world_size=4)
    with pytest.raises(ValueError, match=r"no batch comes out of 0 samples.*look at why the data set is empty"):
        make_loader(Draws(0), 4, shuffle=False, seed=0)
    with pytest.raises(ValueError, match=r"last 1 of 1 samples can't be dealt to all 2 ranks.*use fewer processes") as few:
        make_loader(Draws(1), 4, shuffle=True, seed=0, rank=0, world_size=2)
    assert "drop_last" not in str(few.value), "there would be no batch then"
    with pytest.raises(ValueError, match=r"last 1 of 9 samples can't be dealt to all 2 ranks.*drop_last=True"):
        make_loader(Draws(9), 4, shuffle=True, seed=0, rank=0, world_size=2)
    with pytest.raises(ValueError, match="batch_size is 0"):
        make_loader(Draws(9), 0, shuffle=True, seed=0)
    with pytest.raises(ValueError, match="seed is -1"):
        make_loader(Draws(9), 1, shuffle=True, seed=-1)
    loader = one_loader(0)
    next(iter(loader))
    other = make_loader(Draws(22), 2, shuffle=True, seed=5, drop_last=True)
    other.load_state_dict(loader.state_dict())
    with pytest.raises(ValueError, match="batch_size was 4 and is 2"):
        next(iter(other))
    with pytest.raises(ValueError, match="lacks"):
        other.load_state_dict({"position": 3})
