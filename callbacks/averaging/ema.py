"""A teacher whose weights are the moving average of a student's."""

from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lit_methods import distributed
from lit_methods.averages import cosine_decay, ema_update, half_life_decay, warmup_decay
from lit_methods.callbacks.ordering import OrderedCallback
from lit_methods.callbacks.targets import plain_module, plain_name, plain_parameter_name, refuse_lazy, refuse_sharded, select_modules
from lit_methods.callbacks.twin import copy_of
from lit_methods.checks import literals, naming, patterns, share
from lit_methods.frozen import Frozen
from lit_methods.steps import training_length

Schedule = Literal["constant", "warmup", "cosine"]
Buffers = Literal["copy", "average"]


class EMATeacher(OrderedCallback):
    """Keeps a frozen moving-average copy of the module, or of chosen submodules, as a teacher.

    Runs: the copy is made when fit starts, before the sanity check, from the weights of that moment. It advances when
    a training batch ends in which an optimiser stepped: accumulation doesn't speed it up. With manual optimisation and
    several optimisers it advances once per batch in which any of them stepped.
    The copy always evaluates, is not part of the module (no optimiser, no checkpoint of the module, no DDP), lives on
    the module's device, and is the same on all ranks: buffers are taken from rank 0, parameters are equal anyway. After
    fit it stays available, on the CPU. For evaluating and saving averaged weights use Lightning's
    ``EMAWeightAveraging``; both may be used together.
    Saves: the averages and the step of the last update, so that a resumed teacher is equal bit for bit. Saved under a
    key of its own per set of arguments: several teachers may be used together.
    Refuses: strategies that shard weights (FSDP, DeepSpeed), lazy layers without a shape, and callbacks that
    re-parametrise the module after fit has started.

    Args:
        targets: ``fnmatch`` patterns on submodule names; empty: the whole module. A pattern that matches a module and
            its parts makes a teacher of each.
        decay: In [0, 1]; the limit of "warmup", the start of "cosine".
        schedule: "constant"; "warmup": :func:`warmup_decay`; "cosine": :func:`cosine_decay`, from ``decay`` to 1.
        half_life: Optimiser steps in which a weight loses half its influence; takes the place of ``decay``.
        total_steps: Length of "cosine" in optimiser steps; None: ``trainer.estimated_stepping_batches``.
        buffers: "copy": running statistics are the student's; "average": floating-point ones are averaged like
            weights.
        float32: Keep the average in float32 where the weights have fewer bits.

    Raises:
        ValueError: An argument outside its range.
    """

    conflicts_with = {"ModelPruning": "pruning renames the weights while fit runs, so the teacher's no longer fit the student's"}  # noqa: RUF012

    def __init__(
        self,
        targets: Sequence[str] = (),
        decay: float = 0.999,
        schedule: Schedule = "constant",
        half_life: float | None = None,
        total_steps: int | None = None,
        buffers: Buffers = "copy",
        float32: bool = False,
    ) -> None:
        super().__init__()
        patterns(targets=targets)
        share(decay=decay)
        literals(EMATeacher, locals())
        self.targets = list(targets)
        self.decay = decay if half_life is None else half_life_decay(half_life)
        self.schedule = schedule
        self.total_steps = total_steps
        self.buffers = buffers
        self.float32 = float32
        self.teachers: dict[str, Frozen] = {}
        self._students: dict[str, nn.Module] = {}
        self._wide: dict[str, dict[str, Tensor]] = {}
        self._length: int | None = None
        self._latest_step = 0
        self._loaded: dict[str, Any] | None = None

    @property
    def state_key(self) -> str:
        """Differs between teachers of different arguments."""
        return self._generate_state_key(
            targets=self.targets, decay=self.decay, schedule=self.schedule, buffers=self.buffers, float32=self.float32
        )

    @property
    def teacher(self) -> Frozen:
        """The one teacher. With several targets ask ``teachers``, by qualified name.

        Raises:
            RuntimeError: Fit hasn't started, or there are several.
        """
        if len(self.teachers) != 1:
            have = (
                f"there are {len(self.teachers)}, ask teachers[name]: {list(self.teachers)}"
                if self.teachers
                else "it is made when fit starts"
            )
            raise RuntimeError(f"EMATeacher has no single teacher: {have}")
        return next(iter(self.teachers.values()))

    def decay_at(self, step: int) -> float:
        """Decay of the update that follows optimiser step ``step`` (0 is the first)."""
        if self.schedule == "warmup":
            return warmup_decay(step, self.decay)
        if self.schedule == "cosine":
            length = self._length if self.total_steps is None else self.total_steps
            if length is None:
                raise RuntimeError("EMATeacher doesn't know how long it trains before fit starts: give total_steps")
            return cosine_decay(step, length, self.decay)
        return self.decay

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check what can be checked early.

        Raises:
            ValueError: A strategy that shards weights, or a target that matches nothing.
        """
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        refuse_sharded(trainer, "EMATeacher")
        self.when_built(pl_module, lambda: self._check(pl_module))
        self.teachers, self._wide = {}, {}  # an earlier fit's
        self._latest_step = 0
        self._loaded = self._length = None

    def _check(self, pl_module: pl.LightningModule) -> None:
        self._choose(pl_module)
        for student in self._students.values():
            refuse_lazy(student, "EMATeacher")

    def _choose(self, pl_module: pl.LightningModule) -> None:
        with naming("EMATeacher"):
            self._students = {"": pl_module} if not self.targets else select_modules(pl_module, self.targets)
        self._students = {name: plain_module(module) for name, module in self._students.items()}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make the teachers: the weights are on their device, equal on all ranks, and restored if the run is resumed."""
        if self.schedule == "cosine":
            self._length = training_length(pl_module, self.total_steps)
        self._choose(pl_module)
        self.teachers = {name: Frozen(_bare_copy(module)) for name, module in self._students.items()}
        self._wide = {name: self._widened(frozen.module) for name, frozen in self.teachers.items()}
        if self._loaded is not None:
            self._restore(self._loaded)
            self._loaded = None

    def _widened(self, teacher: nn.Module) -> dict[str, Tensor]:
        half = (torch.bfloat16, torch.float16)
        return {name: t.detach().float() for name, t in _tensors(teacher).items() if self.float32 and t.dtype in half}

    def _averages(self, name: str) -> dict[str, Tensor]:
        """The tensors that are averaged: the teacher's own, or float32 ones in their place."""
        return {**_tensors(self.teachers[name].module), **self._wide[name]}

    @torch.no_grad()
    def _narrow(self, name: str) -> None:
        """Give the teacher the rounded averages."""
        own = _tensors(self.teachers[name].module)
        for n, wide in self._wide[name].items():
            own[n].copy_(wide)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Advance if an optimiser stepped."""
        if trainer.global_step > self._latest_step:
            self._latest_step = trainer.global_step
            self._advance(self.decay_at(trainer.global_step - 1))

    @torch.no_grad()
    def _advance(self, decay: float) -> None:
        for name, student in self._students.items():
            averages, source = self._averages(name), _tensors(student)
            if set(source) != set(averages):
                raise ValueError(
                    f"EMATeacher: parameters or buffers of {name or 'the module'} changed their names while fit ran "
                    f"({sorted(set(source) ^ set(averages))[:4]}): make the change before fit"
                )
            buffers = {plain_name(n) for n, _ in student.named_buffers()}
            copied = buffers if self.buffers == "copy" else set()
            moving = [n for n in averages if n not in copied]
            ema_update([averages[n] for n in moving], [source[n] for n in moving], decay)
            ema_update([averages[n] for n in averages if n in copied], [source[n] for n in averages if n in copied], 0.0)
            # running statistics differ between ranks until the next forward of DDP
            distributed.broadcast_tensors([averages[n] for n in averages if n in buffers])
            self._narrow(name)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and integers only; empty before there is a teacher, as when Lightning looks for a learning rate."""
        if not self.teachers:
            return self._loaded or {}
        return {
            "latest_step": self._latest_step,
            "averages": {name: {n: t.detach() for n, t in self._averages(name).items()} for name in self.teachers},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep the state until the teachers exist; Lightning calls this before ``on_fit_start``, its tuners also behind it."""
        if not state.get("averages"):
            return
        if self.teachers:
            self._restore(state)
        else:
            self._loaded = state

    @torch.no_grad()
    def _restore(self, state: dict[str, Any]) -> None:
        self._latest_step = int(state["latest_step"])
        for name in self.teachers:
            averages = self._averages(name)
            saved = state["averages"].get(name)
            if saved is not None:  # up to 0.1, weights that a callback of ours parametrises had other names
                saved = {n if n in averages else plain_parameter_name(n): tensor for n, tensor in saved.items()}
            if saved is None or set(saved) != set(averages):
                raise ValueError(
                    f"the checkpoint's teacher of {name or 'the module'} has other tensors than this run's: resume with the same "
                    "module and targets"
                )
            for n, tensor in averages.items():
                tensor.copy_(saved[n])
            self._narrow(name)

    def averaged(self) -> dict[str, Tensor]:
        """All averaged tensors, those of the teachers and their float32 versions, by their names in the module; to be changed in place."""
        tensors_of: dict[str, Tensor] = {}
        for target in self.teachers:
            prefix = f"{target}." if target else ""
            for tensors in (_tensors(self.teachers[target].module), self._wide[target]):
                tensors_of.update({prefix + name: tensor for name, tensor in tensors.items()})
        return tensors_of

    def leave(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let go of the module."""
        self._students = {}

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """The teachers go to the CPU like the module itself."""
        super().teardown(trainer, pl_module, stage)
        for name, frozen in self.teachers.items():
            frozen.to("cpu")
            self._wide[name] = {n: t.cpu() for n, t in self._wide[name].items()}


def _bare_copy(module: nn.Module) -> nn.Module:
    """A deep copy that belongs to nobody: no trainer, no wrapped step, no hooks of callbacks."""
    bare = copy_of(module)
    vars(bare).pop("training_step", None)
    return bare


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, also those that aren't saved, by name."""
    return {plain_name(name): tensor for name, tensor in [*module.named_parameters(), *module.named_buffers()]}
