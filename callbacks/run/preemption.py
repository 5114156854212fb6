"""A run that is asked to leave (SIGTERM, SIGUSR1, Ctrl-C) saves itself behind the current step, and the same command goes on later."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lit_methods.callbacks.ordering import OrderedCallback
from lit_methods.checks import positive
from lit_methods.runs.folder import run_dir

EXIT_STATUS = 143  # 128 + SIGTERM, for SIGUSR1 too: not 0, which Kubernetes takes for a finished job
INTERRUPTED = 130  # 128 + SIGINT, as a shell reports Ctrl-C
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))  # Windows lacks the second
MOST_STEPS = 1000  # between two agreements, however short the steps are


class Preempted(SIGTERMException):
    """Ends a run that was asked to leave and has saved itself; a ``SystemExit``.

    Args:
        name: Name of the signal.
        checkpoint: What was saved.
        status: Exit status of this process: 143 (130 after Ctrl-C) on rank 0, 0 on the others (Lightning's and torchrun's launchers kill
            all processes as soon as one of them fails, rank 0 in the middle of its last report).
    """

    def __init__(self, name: str, checkpoint: Path, status: int = EXIT_STATUS) -> None:
        super().__init__(status)
        self.name, self.checkpoint = name, checkpoint

    def __str__(self) -> str:
        return f"stopped by {self.name}, saved {self.checkpoint}"


class Preemption(OrderedCallback):
    """Turns SIGTERM, SIGUSR1 and Ctrl-C into a checkpoint and a clean exit; ``lit fit`` adds it to every run that saves checkpoints.

    Behind the first optimiser step after the signal, ``<run folder>/checkpoints/last.ckpt`` is written and :class:`Preempted` ends the fit
    with exit status 143, or 130 after Ctrl-C; a second Ctrl-C ends it at once. Where a validation or the end of the epoch is due right
    behind that step, the checkpoint is written at once, too, but the run ends one step later, so that no validation is lost. A signal that
    arrives during a validation is obeyed behind it; with a single process a checkpoint is written at once.

    Several processes: a signal to any one of them stops all of them behind the same step. They agree by one all-reduce
    of two numbers about every ``agree_seconds``; the same reduction settles after how many steps they ask again, from
    the time that steps took. Other steps communicate nothing. Lightning's own handler is put aside while fit runs: it
    broadcasts from inside the signal handler, in the middle of other collectives, and hears rank 0 only.

    SLURM: with ``requeue`` and Lightning's ``SLURMEnvironment(auto_requeue=True)``, ``scontrol requeue`` is called for
    the job behind the checkpoint, on Lightning's requeue signal (SIGUSR1) only: SIGTERM comes from ``scancel`` as well.

    Runs: in ``on_train_batch_end``. Signals are handled from the start of training (the sanity check, too) to the end
    of fit; before that, the system's default ends the process, and nothing is lost.
    Saves: nothing of its own.
    Refuses: nothing; any module and strategy will do.

    Args:
        agree_seconds: Seconds between two agreements of several processes, > 0; the longest time that a signal waits
            before the step that obeys it.
        requeue: Ask SLURM to start the job again; the command must then go on by itself (``--resume auto``).
    """

    def __init__(self, agree_seconds: float = 2.0, requeue: bool = False) -> None:
        super().__init__()
        positive(agree_seconds=agree_seconds)
        self.agree_seconds, self.requeue = agree_seconds, requeue
        self._forget()

    def _forget(self) -> None:
        self._received: int | None = None
        self._saved = False
        self._steps, self._wait, self._asked = 0, 1, time.monotonic()

    # ---- hooks -----------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget an earlier run, and stand behind all callbacks but those that save: what they do at the end of a step belongs to it."""
        super().setup(trainer, pl_module, stage)
        others = [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
        place = next((index for index, callback in enumerate(others) if isinstance(callback, Checkpoint)), len(others))
        trainer.callbacks = [*others[:place], self, *others[place:]]  # type: ignore[attr-defined]
        self._forget()

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen."""
        self._listen(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen."""
        self._asked = time.monotonic()
        self._listen(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Save and stop when asked to, at the end of an optimiser step."""
        loop = trainer.fit_loop.epoch_loop
        if pl_module.automatic_optimization and loop._should_accumulate():  # gradients aren't saved
            return
        if not self._agree(trainer):
            return
        path = self._save(trainer)
        epoch_ends = loop._num_ready_batches_reached() or loop._should_check_val_fx(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]
        if epoch_ends and not self._saved:
            self._saved = True
            return
        if self.requeue:
            self._requeue(trainer)
        status = INTERRUPTED if self._received == signal.SIGINT else EXIT_STATUS
        raise Preempted(self._name, path, status if trainer.is_global_zero else 0)

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Save at once, in case that the validation outlasts the time that is left."""
        fitting = trainer.state.fn == "fit" and trainer.global_step > 0 and not trainer.sanity_checking
        if self._received is not None and fitting and not self._saved and trainer.world_size == 1:
            self._saved = True
            self._save(trainer)

    def leave(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give Ctrl-C back; Lightning gives the other signals back."""
        if signal.getsignal(signal.SIGINT) == self._receive:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    # ---- the parts -------------------------------------------------------------------------------------------------

    def _listen(self, trainer: pl.Trainer) -> None:
        """Take the signals; Lightning gives them back when the fit ends, also by an exception."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) != self._receive:
                    signal.signal(number, self._receive)
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where somebody else handles or ignores it
                signal.signal(signal.SIGINT, self._receive)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self._received is not None:
            raise KeyboardInterrupt
        if self._received is None:  # only a note: anything more could run in the middle of a collective
            self._received = number
            hurry = " (Ctrl-C again: stop at once)" if number == signal.SIGINT else ""
            with contextlib.suppress(OSError):  # the terminal may be closed, which is how some signals come about
                os.write(2, f"\n{self._name} received: saving a checkpoint behind the current step{hurry}\n".encode())

    @property
    def _name(self) -> str:
        return "a signal to another process" if self._received is None else signal.Signals(self._received).name

    def _agree(self, trainer: pl.Trainer) -> bool:
        """Whether to stop now: the same answer on all ranks, which communicate only when the step is due."""
        if trainer.world_size == 1:
            return self._received is not None
        self._steps += 1
        if self._steps < self._wait and not self._saved:
            return False
        now = time.monotonic()
        affordable = int(self.agree_seconds * self._steps / max(now - self._asked, 1e-9))
        wait = min(max(affordable, 1), MOST_STEPS)
        vote = torch.tensor([int(self._received is not None), -wait], device=trainer.strategy.root_device)
        dist.all_reduce(vote, op=dist.ReduceOp.MAX)  # anyone asked; the smallest number of steps
        asked, wait = vote.tolist()
        self._steps, self._wait, self._asked = 0, -wait, now
        return bool(asked)

    def _save(self, trainer: pl.Trainer) -> Path:
        path = run_dir(trainer) / "checkpoints" / "last.ckpt"
        for callback in trainer.checkpoint_callbacks:  # it goes on with this file, rather than with a last-v1.ckpt
            if isinstance(callback, ModelCheckpoint) and callback.save_last and Path(callback.dirpath or "") == path.parent:
                callback.last_model_path = str(path)
        trainer.save_checkpoint(path)
        rank_zero_info(f"{self._name}: saved {path} at step {trainer.global_step:,}")
        return path

    def _requeue(self, trainer: pl.Trainer) -> None:
        environment: Any = getattr(trainer._accelerator_connector, "cluster_environment", None)
        if not isinstance(environment, SLURMEnvironment) or not environment.auto_requeue or not trainer.is_global_zero:
            return
        if self._received is not None and self._received != (environment.requeue_signal or signal.SIGUSR1):
            return
        array = os.environ.get("SLURM_ARRAY_JOB_ID")
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]
        try:
            subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True, timeout=30)
            rank_zero_info(f"SLURM starts job {job} again")
        except (OSError, subprocess.SubprocessError) as error:
            said = getattr(error, "stderr", "") or error
            rank_zero_warn(f"`scontrol requeue {job}` failed ({said}): submit the job again, it goes on from the checkpoint")
