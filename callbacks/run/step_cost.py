"""Measures what a training step costs: seconds, memory, parameters, operations."""

import resource
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lit_methods.callbacks.ordering import OrderedCallback
from lit_methods.files import write_json
from lit_methods.runs.folder import run_dir

_MIB = 2**20


class StepCost(OrderedCallback):
    """Writes ``cost.json`` into the run's folder when ``fit`` ends: what its training steps took.

    A step is one training batch: with gradient accumulation several of them make one optimiser step. Its time goes from the end of the
    batch before to its own end, so the reading of its data is in it; the part until its start (data, and what other callbacks do between
    two batches) is recorded for itself, too. Steps behind a validation or at the start of an epoch are not timed, as more than a step
    lies between two batch ends there.

    ========================  ===========================================================================================================
    ``steps``                 optimiser steps of the whole fit (``trainer.global_step``)
    ``batches``               training batches of this process
    ``parameters``            trainable parameters at the start of training; with lazy layers at its end
    ``seconds``               time of each timed step after the warm-up, the first ``max_samples`` of them
    ``data_seconds``          of these the part until the step's start
    ``seconds_per_step``      median, as is ``data_seconds_per_step``; null where no step was timed
    ``peak_mib``              CUDA: ``torch.cuda.max_memory_allocated`` between start and end of training, everything included. CPU: how far
                              the highest resident memory of the process during training lies above that at its start. Linux measures
                              this exactly (the high-water mark is reset at the start); where it can't be reset, growth that stays below
                              an earlier peak isn't seen, and ``memory`` says so. Memory that the allocator had kept from before isn't
                              growth: compare runs in processes of their own
    ``memory``                which of the three: ``cuda``, ``resident`` or ``resident, above the earlier peak``
    ``flops_per_batch``       with ``flops``: floating-point operations of one training batch, forward, backward and optimiser, as
                              ``torch.utils.flop_counter`` knows them: matrix products, convolutions and attention; not what libraries such
                              as spconv compute in kernels of their own. Else null
    ``interrupted``           the run was stopped by a signal before its end
    ========================  ===========================================================================================================

    Runs: in the batch hooks; nothing waits for the device, unless ``synchronize`` asks for it. Rank 0 writes its own figures. A step whose
    operations are counted isn't timed.
    Saves: nothing in checkpoints.
    Refuses: nothing; any module and strategy will do.

    Args:
        warmup_steps: First steps that are not timed.
        synchronize: Wait for a CUDA device at the end of each step, so that times are those of the device. Slows the run a little.
        flops: Count the operations of the first step after the warm-up.
        max_samples: How many steps are kept.
    """

    def __init__(self, warmup_steps: int = 2, synchronize: bool = False, flops: bool = False, max_samples: int = 1000) -> None:
        super().__init__()
        self.warmup_steps, self.synchronize, self.flops, self.max_samples = warmup_steps, synchronize, flops, max_samples
        self._reset()

    def _reset(self) -> None:
        self._seconds: list[float] = []
        self._data_seconds: list[float] = []
        self._batches = self._parameters = 0
        self._ended: float | None = None  # end of the batch before, if the next step may be timed
        self._started = 0.0
        self._counter: Any = None
        self._flops: int | None = None
        self._peak: Callable[[], tuple[float, str]] = _nothing  # functions of the module, so that a callback can be pickled
        self._memory: tuple[float, str] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the measurement of memory."""
        self._reset()
        lazy = any(is_lazy(p) for p in pl_module.parameters())
        self._parameters = -1 if lazy else trainable(pl_module)  # -1: counted at the end, when all have a shape
        self._peak = peak_memory(pl_module.device)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The first step of an epoch isn't timed."""
        self._ended = None

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The step behind a validation isn't timed."""
        self._ended = None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """The data are there."""
        self._started = time.perf_counter()
        if self.flops and self._flops is None and self._batches >= self.warmup_steps:
            from torch.utils.flop_counter import FlopCounterMode

            self._counter = FlopCounterMode(display=False)
            self._counter.__enter__()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """A step is done."""
        counted = self._counter is not None
        if counted:
            self._stop_counting()
        if self.synchronize and pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        now = time.perf_counter()
        if self._ended is not None and not counted and self._batches >= self.warmup_steps and len(self._seconds) < self.max_samples:
            self._seconds.append(now - self._ended)
            self._data_seconds.append(self._started - self._ended)
        self._batches += 1
        self._ended = now

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End the measurement of memory."""
        if self._parameters < 0:
            self._parameters = trainable(pl_module)
        self._memory = self._peak()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the file."""
        folder = run_dir(trainer)  # on every rank: it may broadcast
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "cost.json", self.measured(trainer))

    def leave(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave no counter behind."""
        self._stop_counting()

    def _stop_counting(self) -> None:
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            self._flops, self._counter = self._counter.get_total_flops(), None

    def measured(self, trainer: pl.Trainer) -> dict[str, Any]:
        """The content of ``cost.json``."""
        peak, memory = self._memory or self._peak()
        return {
            "steps": trainer.global_step,
            "batches": self._batches,
            "parameters": self._parameters,
            "seconds_per_step": statistics.median(self._seconds) if self._seconds else None,
            "data_seconds_per_step": statistics.median(self._data_seconds) if self._data_seconds else None,
            "peak_mib": round(peak / _MIB, 1),
            "memory": memory,
            "flops_per_batch": self._flops,
            "device": str(trainer.strategy.root_device),
            "interrupted": bool(trainer.received_sigterm or trainer.interrupted),
            "seconds": [round(value, 6) for value in self._seconds],
            "data_seconds": [round(value, 6) for value in self._data_seconds],
        }


def trainable(module: nn.Module) -> int:
    """Number of trainable parameters; lazy ones without a shape are left out."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad and not is_lazy(p))


def peak_memory(device: torch.device) -> Callable[[], tuple[float, str]]:
    """Start to watch the memory; call the result at the end.

    Args:
        device: On CUDA the allocator's peak is taken, elsewhere the resident memory of this process.

    Returns:
        A function that gives bytes and how they were measured; see :class:`StepCost`.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return partial(_allocated, device)
    with suppress(OSError, KeyError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Linux: the high-water mark starts anew from here
        start = _process_status()["VmRSS"]
        if _process_status()["VmHWM"] <= start + 16 * _MIB:  # it did
            return partial(_grown_since, start)
    return partial(_above_peak, _highest_resident())


def _allocated(device: torch.device) -> tuple[float, str]:
    return float(torch.cuda.max_memory_allocated(device)), "cuda"


def _grown_since(start: float) -> tuple[float, str]:
    return _process_status()["VmHWM"] - start, "resident"


def _above_peak(before: float) -> tuple[float, str]:
    return _highest_resident() - before, "resident, above the earlier peak"


def _nothing() -> tuple[float, str]:
    return 0.0, "resident"


def _process_status() -> dict[str, float]:
    lines = (line.split() for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines())
    return {words[0].rstrip(":"): 1024.0 * int(words[1]) for words in lines if len(words) == 3 and words[2] == "kB"}


def _highest_resident() -> float:
    peak = float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB elsewhere
