"""Signals: when a run obeys, how several processes agree, SLURM's requeue."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.environments import SLURMEnvironment

from faults import FewImages
from helpers import Classifier, run_two_processes, tiny_trainer
from lit_methods.callbacks import Preemption
from lit_methods.callbacks.run.preemption import Preempted


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Python's own answer to Ctrl-C, also where the tests run in the background, which a shell starts deaf to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class SignalAt(pl.Callback):
    """Sends a signal to its own process in the middle of a step, or of a validation."""

    def __init__(self, step: int, number: int = signal.SIGTERM, rank: int = 0, validation: bool = False) -> None:
        self.step, self.number, self.rank, self.validation = step, number, rank, validation

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if not self.validation and trainer.global_step == self.step and trainer.global_rank == self.rank:
            os.kill(os.getpid(), self.number)

    def on_validation_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.validation and trainer.global_step == self.step and not trainer.sanity_checking:
            os.kill(os.getpid(), self.number)


def fit(folder: Path, *callbacks: pl.Callback, **kwargs: Any) -> tuple[pl.Trainer, Preempted | None]:
    """Train 3 epochs of 6 steps with a validation behind each."""
    trainer = tiny_trainer(max_epochs=3, default_root_dir=folder, callbacks=[*callbacks], enable_checkpointing=True, **kwargs)
    try:
        trainer.fit(Classifier(), datamodule=FewImages())
    except Preempted as preempted:
        return trainer, preempted
    return trainer, None


def saved_step(folder: Path) -> int:
    return int(torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"])


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGINT, 130)])
def test_it_stops_behind_the_current_step(number: int, status: int, tmp_path: Path) -> None:
    before = signal.getsignal(number)
    trainer, preempted = fit(tmp_path, Preemption(), SignalAt(3, number))
    assert preempted is not None
    assert preempted.code == status
    assert isinstance(preempted, SystemExit)
    assert trainer.global_step == saved_step(tmp_path) == 4
    assert signal.getsignal(number) == before


def test_a_second_interrupt_stops_at_once(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:  # Lightning's answer to KeyboardInterrupt
        fit(tmp_path, Preemption(), SignalAt(3, signal.SIGINT), SignalAt(3, signal.SIGINT))
    assert not isinstance(stopped.value, Preempted)
    assert not (tmp_path / "checkpoints" / "last.ckpt").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_who_handles_interrupts_keeps_them(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        trainer, preempted = fit(tmp_path, Preemption(), SignalAt(3, signal.SIGINT))
        assert preempted is None
        assert trainer.global_step == 18
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_accumulated_gradients_are_waited_for(tmp_path: Path) -> None:
    trainer, preempted = fit(tmp_path, Preemption(), SignalAt(1), accumulate_grad_batches=2)
    assert preempted is not None
    assert trainer.fit_loop.epoch_loop.batch_progress.current.ready == 4
    assert saved_step(tmp_path) == 2


class Validations(pl.Callback):
    def __init__(self) -> None:
        self.seen: list[tuple[int, bool]] = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seen.append((trainer.global_step, Path(trainer.default_root_dir, "checkpoints", "last.ckpt").is_file()))


@pytest.mark.parametrize("validation", [False, True])
def test_a_validation_that_is_due_is_not_lost(validation: bool, tmp_path: Path) -> None:
    """The signal comes in the last step of the epoch, or in the validation behind it: saved before the validation has ended."""
    validations = Validations()
    trainer, preempted = fit(tmp_path, Preemption(), SignalAt(6 if validation else 5, validation=validation), validations)
    assert preempted is not None
    assert validations.seen == [(6, True)]
    assert trainer.global_step == saved_step(tmp_path) == 7


class CountCollectives(pl.Callback):
    """How often this process asked the others, apart from DDP's own gradients."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.count, self.real = 0, dist.all_reduce

        def counted(tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, **kwargs: Any) -> Any:
            self.count += op == dist.ReduceOp.MAX
            return self.real(tensor, op, **kwargs)

        dist.all_reduce = counted  # type: ignore[assignment]

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        dist.all_reduce = self.real

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        dist.all_reduce = self.real


def in_two_processes(folder: str, rank: int, agree_seconds: float) -> tuple[int, int | None, int]:
    counter = CountCollectives()
    callbacks = [Preemption(agree_seconds), SignalAt(1, rank=rank), counter]
    trainer, preempted = fit(Path(folder), *callbacks, devices=2, strategy="ddp", use_distributed_sampler=False)
    return trainer.global_step, None if preempted is None else int(preempted.code or 0), counter.count


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_process_stops_all_behind_the_same_step(rank: int, tmp_path: Path) -> None:
    (first, status, _), (second, other, _) = run_two_processes(in_two_processes, str(tmp_path), rank, 1e-9)
    assert first == second == saved_step(tmp_path) == 2
    assert (status, other) == (143, 0), "a launcher must not kill rank 0 because of the others"


def test_agreement_is_rare(tmp_path: Path) -> None:
    (first, status, asked), (second, _, _) = run_two_processes(in_two_processes, str(tmp_path), 1, 3600.0)
    assert (first, second, status) == (9, 9, None), "the run was over before the next agreement"
    assert asked == 1


@pytest.mark.parametrize(
    ("number", "requeue", "called"), [(signal.SIGUSR1, True, True), (signal.SIGTERM, True, False), (signal.SIGUSR1, False, False)]
)
def test_slurm_is_asked_to_start_the_job_again(
    number: int, requeue: bool, called: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"JOB_ID": "77", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0", "JOB_NAME": "x"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    program = tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/called\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    _, preempted = fit(tmp_path, Preemption(requeue=requeue), SignalAt(2, number), plugins=[SLURMEnvironment(auto_requeue=True)])
    assert preempted is not None
    assert (tmp_path / "called").is_file() == called
    assert not called or (tmp_path / "called").read_text() == "requeue 77\n"
    assert not list(tmp_path.rglob("hpc_ckpt*")), "Lightning's own handler would save in the middle of a step"


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="agree_seconds"):
        Preemption(agree_seconds=0)
