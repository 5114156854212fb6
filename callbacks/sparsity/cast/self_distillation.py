"""Distillation of a network from its own dense self (CAST, arXiv:2509.25996, Eq. 13): the loss, and what it needs of anybody's module."""

import copy
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_methods.callbacks.features import FeatureCapture
from lit_methods.callbacks.targets import plain_module, select_modules
from lit_methods.callbacks.wrapping import attach, detach
from lit_methods.frozen import Frozen

# ---- the maths -------------------------------------------------------------------------------------------------------------------------


def kl_to_teacher(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, squared: bool = True, valid: Tensor | None = None
) -> Tensor:
    """KL(teacher || student) over the last dimension, mean over all others.

    Args:
        student_logits: (..., V) floating point.
        teacher_logits: Same shape; -inf removes a class.
        temperature: Divides both, > 0; CAST has none (1), AST has 2.
        squared: Multiply by ``temperature`` squared.
        valid: (...) bool, which entries count; None: all.

    Returns:
        Scalar >= 0 in float32 or wider; 0 where nothing counts.
    """
    with torch.autocast(student_logits.device.type, enabled=False):
        dtype = torch.promote_types(student_logits.dtype, torch.float32)
        log_p = (teacher_logits.to(dtype) / temperature).log_softmax(-1)
        log_q = (student_logits.to(dtype) / temperature).log_softmax(-1)
        p = log_p.exp()
        terms = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)
        mean = terms.mean() if valid is None else (terms * valid).sum() / valid.sum().clamp(min=1)
    return mean * temperature**2 if squared else mean


def convex_loss(kl: Tensor, own: Tensor, eta: float) -> Tensor:
    """Eq. 13: eta KL + (1 - eta) times the module's own loss."""
    return eta * kl + (1.0 - eta) * own


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    eta: float = 1 / 3,
    temperature: float = 1.0,
    squared: bool = True,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor]:
    """All of Eq. 13: convex sum of the KL to the teacher and the cross-entropy, over the same tokens.

    Args:
        student_logits: (..., V) floating point.
        teacher_logits: Same shape.
        targets: (...) int64 classes; ``ignore_index`` leaves an entry out of both parts.
        eta: Share of the KL, 0 to 1.
        temperature: Of the KL; the cross-entropy has none.
        squared: See :func:`kl_to_teacher`.
        ignore_index: See ``targets``.

    Returns:
        Loss, KL and cross-entropy: scalars in float32 or wider.
    """
    valid = targets != ignore_index
    kl = kl_to_teacher(student_logits, teacher_logits, temperature, squared, valid)
    with torch.autocast(student_logits.device.type, enabled=False):
        logits = student_logits.to(kl.dtype).flatten(0, -2)
        total = F.cross_entropy(logits, targets.flatten(), ignore_index=ignore_index, reduction="sum")
    ce = total / valid.sum().clamp(min=1)
    return convex_loss(kl, ce, eta), kl, ce


# ---- on anybody's module ---------------------------------------------------------------------------------------------------------------


class DenseSelf:
    """A frozen copy of one submodule that sees what the submodule sees, and the KL of the two in the module's loss.

    Args:
        pl_module: A module with automatic optimisation, still as it will be when it teaches.
        name: Submodule whose output are the logits; None: the one child with parameters.
        who: For error messages.
        eta: Share of the KL in the loss.
        temperature: See :func:`kl_to_teacher`.
        squared: See there.
        labels: Key of the batch's labels, aligned with the logits, if some entries must not count; None: all count.
        ignore_index: Label of entries that don't count.

    Attributes:
        name: Of the submodule.
        teacher: The copy: evaluates, never learns.

    Raises:
        ValueError: The module calls backward itself, or it isn't clear which submodule is meant.
    """

    def __init__(
        self,
        pl_module: pl.LightningModule,
        name: str | None,
        *,
        who: str,
        eta: float,
        temperature: float,
        squared: bool,
        labels: str | None,
        ignore_index: int,
    ) -> None:
        if not pl_module.automatic_optimization:
            raise ValueError(
                f"{who} distils through the loss that training_step returns, but {type(pl_module).__name__} calls backward itself "
                "(automatic_optimization = False): set distill_weight to 0, and add kl_to_teacher to the loss there"
            )
        if name is None:
            children = [name for name, child in pl_module.named_children() if any(True for _ in child.parameters())]
            if len(children) != 1:
                raise ValueError(
                    f"{who} distils the logits of one submodule, and {type(pl_module).__name__} has {len(children)} with parameters "
                    f"({', '.join(children) or 'none'}): name it by distill, or set distill_weight to 0"
                )
            (name,) = children
        self.name, self.who, self.eta, self.temperature, self.squared = name, who, eta, temperature, squared
        self.labels, self.ignore_index = labels, ignore_index
        student = self._student(pl_module)
        twin = copy.deepcopy(plain_module(student))
        for module in twin.modules():
            module._forward_hooks.clear()
        self.teacher = Frozen(twin)
        self._module: pl.LightningModule | None = pl_module
        self._features = FeatureCapture(pl_module, [name], active=False)
        attach(pl_module, self._add)

    def _student(self, pl_module: pl.LightningModule) -> nn.Module:
        return next(iter(select_modules(pl_module, [self.name]).values()))

    def copy_student(self, pl_module: pl.LightningModule) -> None:
        """Let the teacher have the weights of the forward pass of this moment, those of rank 0 under DDP."""
        self.teacher.module.load_state_dict(plain_module(self._student(pl_module)).state_dict())

    @torch.no_grad()
    def fingerprint(self) -> Tensor:
        """(parameters, 2) sums of the teacher's weights and of their sizes, to know it again."""
        return torch.stack([torch.stack([p.double().sum(), p.double().abs().sum()]).cpu() for p in self.teacher.module.parameters()])

    def listen(self, on: bool) -> None:
        """Keep what the student sees, in training steps alone."""
        self._features.clear()
        self._features.active = on

    def _add(self, output: Any, batch: Any) -> Any:
        """Behind ``training_step``: mix the KL into the loss."""
        if output is None:
            return None
        assert self._module is not None
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"training_step of {type(self._module).__name__} returned {type(output).__name__} without a loss: {self.who} needs a "
                "tensor, a dict with 'loss', or None"
            )
        calls, arguments = (next(iter(kept.values())) for kept in (self._features.calls, self._features.arguments))
        if not calls:
            raise ValueError(f"{self.who}: training_step didn't call {self.name!r}: name the submodule that gives the logits by distill")
        (args, kwargs), answer = arguments[-1], calls[-1]
        self._features.clear()
        student, teacher = self._logits(answer), self._logits(self.teacher(*args, **kwargs))
        kl = kl_to_teacher(student, teacher, self.temperature, self.squared, self._valid(batch, student))
        prefix = self.who.lower()
        self._module.log_dict({f"{prefix}/ce": loss.detach(), f"{prefix}/kl": kl.detach()})
        mixed = convex_loss(kl, loss, self.eta)
        return {**output, "loss": mixed} if isinstance(output, Mapping) else mixed

    def _valid(self, batch: Any, logits: Tensor) -> Tensor | None:
        if self.labels is None:
            return None
        if not isinstance(batch, Mapping) or self.labels not in batch:
            there = list(batch) if isinstance(batch, Mapping) else type(batch).__name__
            raise ValueError(f"{self.who}: labels is {self.labels!r}, but the batch has {there}: name the key of the labels, or null")
        valid: Tensor = batch[self.labels] != self.ignore_index
        if valid.shape != logits.shape[:-1]:
            raise ValueError(
                f"{self.who}: the batch's {self.labels!r} are {tuple(valid.shape)}, but the logits {tuple(logits.shape)}: the labels must "
                "be aligned with them"
            )
        return valid

    def _logits(self, output: Any) -> Tensor:
        found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if found is None and isinstance(output, Mapping):
            found = output.get("logits")
        if not isinstance(found, Tensor) or found.ndim < 2:
            raise ValueError(
                f"{self.who}: {self.name!r} returned {type(output).__name__}, expected logits (..., classes), or something with logits: "
                "name another submodule by distill"
            )
        return found

    def close(self) -> None:
        """Leave the module as it was; the teacher stays, on the CPU. A second call does nothing."""
        self._features.close()
        if self._module is not None:
            detach(self._module, self._add)
            self._module = None
        self.teacher.to("cpu")


__all__ = ["DenseSelf", "convex_loss", "distillation_loss", "kl_to_teacher"]
