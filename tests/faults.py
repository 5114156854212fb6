"""Runs of the ``lit`` command in processes of their own that are killed at chosen moments."""

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

import forks
from helpers import HANGS, Images, given_pipe
from lit_methods.datamodules.loaders import make_loader
from lit_methods.runs.checkpoints import AtomicCheckpointIO

FIRST, MID, WRITE, BETWEEN = "before the first checkpoint", "mid-epoch", "during checkpoint write", "between epochs"
PHASES = (FIRST, MID, WRITE, BETWEEN)

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


def child() -> int:
    """Run the ``lit`` command in ``sys.argv``, and tell its phases through the pipe that this process was given; its exit status."""
    global _pipe
    pipe = _pipe = given_pipe()
    save = AtomicCheckpointIO.save_checkpoint

    def told(self: AtomicCheckpointIO, *args: Any, **kwargs: Any) -> None:
        global _saved
        pipe.send(WRITE if _saved else FIRST)
        save(self, *args, **kwargs)
        _saved = True
        tell(MID)

    AtomicCheckpointIO.save_checkpoint = told  # type: ignore[method-assign]
    from lit_methods.cli.main import main

    return main(sys.argv[1:])


@dataclass
class Run:
    """A started command."""

    process: forks.Fork
    pipe: Connection
    log: Path
    phases: list[str] = field(default_factory=list)

    def wait_for(self, reached: Callable[[list[str]], bool], timeout: float = HANGS) -> bool:
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
        self.process.kill(number)

    def end(self, timeout: float = HANGS) -> int:
        """Exit status, negative for a signal; ``phases`` is complete then."""
        deadline = time.monotonic() + timeout
        while self.pipe.poll(max(0.0, deadline - time.monotonic())) and self._read():
            pass
        try:
            return self.process.wait(max(0.0, deadline - time.monotonic()) + 5)
        except TimeoutError:
            self.send(signal.SIGKILL)
            raise TimeoutError(f"the run did not end within {timeout:.0f} s\n{self.log.read_text()[-3000:]}") from None


def start(words: list[str], folder: Path, log: Path) -> Run:
    """Start ``lit <words>`` in ``folder`` as the leader of a process group of its own."""
    forks.hold()
    ours, theirs = socket.socketpair()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    code = "import sys, faults; sys.exit(faults.child())"
    with open(os.devnull) as nothing, log.open("a") as out, theirs:
        descriptors = (nothing.fileno(), out.fileno(), out.fileno(), theirs.fileno())
        process = forks.fork(["-c", code, *words], folder, environment, descriptors)
    return Run(process, Connection(ours.detach()), log)
