"""Distillation of any module from its own dense self: what the loss (Eq. 13 of CAST, arXiv:2509.25996) needs of it."""

from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lit_methods.callbacks.batch import logits_from
from lit_methods.callbacks.features import FeatureCapture
from lit_methods.callbacks.targets import plain_module, select_modules
from lit_methods.callbacks.twin import copy_of
from lit_methods.callbacks.wrapping import attach, detach
from lit_methods.frozen import Frozen

Mix = Callable[[pl.LightningModule, Tensor, Tensor, Tensor, Any], Tensor]
"""The module, its own loss, logits of student and teacher, and the batch -> the loss in the place of its own."""


class DenseSelf:
    """A frozen copy of one submodule that sees what the submodule sees, and a loss of the two in the place of the module's.

    Args:
        pl_module: A module with automatic optimisation, still as it will be when it teaches.
        name: Submodule whose output are the logits; None: the one child with parameters. Its forward hooks act on the copy, too; what such
            a hook uses outside of the submodule is that of the module that is trained.
        who: Name of the technique, for messages.
        mix: Makes the loss.

    Attributes:
        name: Name of the submodule.
        teacher: The copy: evaluates, never learns.

    Raises:
        ValueError: The module calls backward itself, or it isn't clear which submodule is meant.
    """

    def __init__(self, pl_module: pl.LightningModule, name: str | None, who: str, mix: Mix) -> None:
        if not pl_module.automatic_optimization:
            own = f"{type(pl_module).__name__} calls backward itself (automatic_optimization = False)"
            raise ValueError(f"{who} distils through the loss, but {own}: set distill_weight to 0, and add kl_to_teacher to the loss there")
        if name is None:
            children = [name for name, child in pl_module.named_children() if any(True for _ in child.parameters())]
            if len(children) != 1:
                there = f"{type(pl_module).__name__} has {len(children)} with parameters ({', '.join(children) or 'none'})"
                raise ValueError(f"{who} distils the logits of one submodule, and {there}: name it by distill, or set distill_weight to 0")
            (name,) = children
        self.name, self.who, self.mix = name, who, mix
        self.teacher = Frozen(copy_of(self._student(pl_module)))
        self._module: pl.LightningModule | None = pl_module
        self._features = FeatureCapture(pl_module, [name], active=False)
        attach(pl_module, self._add)

    def _student(self, pl_module: pl.LightningModule) -> nn.Module:
        return plain_module(next(iter(select_modules(pl_module, [self.name]).values())))

    def copy_student(self, pl_module: pl.LightningModule) -> None:
        """Let the teacher have the weights of the forward pass of this moment, those of rank 0 under DDP."""
        self.teacher.module.load_state_dict(self._student(pl_module).state_dict())

    @torch.no_grad()
    def fingerprint(self) -> Tensor:
        """(parameters, 2) sums of the teacher's weights and of their sizes, to know it again."""
        return torch.stack([torch.stack([p.double().sum(), p.double().abs().sum()]).cpu() for p in self.teacher.module.parameters()])

    def listen(self, on: bool) -> None:
        """Keep what the student sees, in training steps alone."""
        self._features.clear()
        self._features.active = on

    def _add(self, output: Any, batch: Any) -> Any:
        """Behind ``training_step``: put the mixed loss in the place of its own."""
        if output is None or self._module is None or not self._features.active:  # a tuner's trial calls no callbacks
            return output
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            given = f"training_step of {type(self._module).__name__} returned {type(output).__name__} without a loss"
            raise TypeError(f"{given}: {self.who} needs a tensor, a dict with 'loss', or None")
        calls, arguments = (next(iter(kept.values())) for kept in (self._features.calls, self._features.arguments))
        if not calls:
            raise ValueError(f"{self.who}: training_step didn't call {self.name!r}: name the submodule that gives the logits by distill")
        (args, kwargs), answer = arguments[-1], calls[-1]
        self._features.clear()
        student, teacher = (logits_from(output, f"{self.who}: {self.name!r}") for output in (answer, self.teacher(*args, **kwargs)))
        mixed = self.mix(self._module, loss, student, teacher, batch)
        return {**output, "loss": mixed} if isinstance(output, Mapping) else mixed

    def close(self) -> None:
        """Leave the module as it was; the teacher stays, on the CPU. A second call does nothing."""
        self._features.close()
        if self._module is not None:
            detach(self._module, self._add)
            self._module = None
        self.teacher.to("cpu")
