"""Runs of the ``lit`` command in real processes that are killed at chosen moments. Torch is imported once, the processes are forked."""

import contextlib
import multiprocessing as mp
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from helpers import Images
from lit_methods.catalog import techniques
from lit_methods.datamodules.loaders import make_loader
from lit_methods.runs.checkpoints import AtomicCheckpointIO

FIRST, MID, WRITE, BETWEEN = "before the first checkpoint", "mid-epoch", "during checkpoint write", "between epochs"
PHASES = (FIRST, MID, WRITE, BETWEEN)

# imported once, by the process that all runs are forked from
PRELOADED = ["lit_methods.cli.lightning_cli", "lit_methods.callbacks.run.dashboard", "lit_methods.callbacks.run.preemption"]
PRELOADED += [name.rpartition(".")[0] for entry in techniques().values() for name in entry.classes]
PRELOADED += ["spconv.pytorch", "lit_methods.datamodules.driving.nuscenes"]

_pipe: Connection | None = None
_saved = False


def tell(phase: str) -> None:
    """Say where the run is."""
    if _pipe is not None:
        _pipe.send(phase if _saved else FIRST)


class Trace(pl.Callback):
    """Tells the phases of training."""

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        tell(MID)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        tell(BETWEEN)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        tell(BETWEEN)


class FewImages(pl.LightningDataModule):
    """24 small images in batches of 4, and 8 for validation."""

    def __init__(self, num_workers: int = 0) -> None:
        super().__init__()
        self.num_workers = num_workers

    def train_dataloader(self) -> Any:
        return make_loader(Images(), 4, shuffle=True, seed=0, num_workers=self.num_workers, trainer=self.trainer)

    def val_dataloader(self) -> Any:
        return make_loader(Images(8), 4, shuffle=False, seed=0, trainer=self.trainer)


def _child(words: list[str], folder: str, log: str, pipe: Connection) -> None:
    global _pipe
    os.setsid()  # a group of its own, killed as a whole
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.chdir(folder)
    torch.set_num_threads(1)
    _pipe = pipe
    save = AtomicCheckpointIO.save_checkpoint

    def told(self: AtomicCheckpointIO, *args: Any, **kwargs: Any) -> None:
        global _saved
        pipe.send(WRITE if _saved else FIRST)
        save(self, *args, **kwargs)
        _saved = True
        tell(MID)

    AtomicCheckpointIO.save_checkpoint = told  # type: ignore[method-assign]
    from lit_methods.cli.main import main

    sys.argv = ["lit", *words]
    status = main(words)
    sys.stdout.flush()
    os._exit(status)


@dataclass
class Run:
    """A started command."""

    process: Any
    pipe: Connection
    log: Path
    phases: list[str] = field(default_factory=list)

    def wait_for(self, reached: Callable[[list[str]], bool], timeout: float = 240) -> bool:
        """Wait until the phases that were told satisfy ``reached``; False when the run ended before."""
        deadline = time.monotonic() + timeout
        while not reached(self.phases):
            if not self.pipe.poll(max(0.0, deadline - time.monotonic())):
                raise TimeoutError(f"the run told only {self.phases}\n{self.log.read_text()[-3000:]}")
            if not self._read():
                return False
        return True

    def _read(self) -> bool:
        try:
            self.phases.append(self.pipe.recv())
        except (EOFError, OSError):
            return False
        return True

    def send(self, number: int) -> None:
        """A signal to the whole process group; nothing when it is gone."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def end(self, timeout: float = 240) -> int:
        """Exit status, negative for a signal; ``phases`` is complete then."""
        deadline = time.monotonic() + timeout
        while self.pipe.poll(max(0.0, deadline - time.monotonic())) and self._read():
            pass
        self.process.join(max(0.0, deadline - time.monotonic()) + 5)
        if self.process.exitcode is None:
            self.send(signal.SIGKILL)
            raise TimeoutError(f"the run did not end within {timeout:.0f} s\n{self.log.read_text()[-3000:]}")
        return int(self.process.exitcode)


def start(words: list[str], folder: Path, log: Path) -> Run:
    """Start ``lit <words>`` in ``folder`` as the leader of a process group of its own."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(words, str(folder), str(log), send))
    process.start()
    send.close()
    return Run(process, receive, log)
