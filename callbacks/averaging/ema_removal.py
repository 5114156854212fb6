"""Takes the moving average out of a module's teacher: the student teaches itself (iCT, arXiv:2310.14189, Section 3.2)."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from lit_methods.callbacks.features import one_submodule
from lit_methods.callbacks.ordering import OrderedCallback
from lit_methods.callbacks.targets import plain_module, refuse_lazy, refuse_sharded
from lit_methods.checks import naming


class EMARemoval(OrderedCallback):
    """Makes a module's teacher a plain copy of its student, always: the student teaches itself, without a gradient.

    For any LightningModule with a student and a teacher branch of the same layers: consistency training, BYOL, mean teacher. It is the
    opposite of ``EMATeacher``. The teacher's weights and buffers are set to the student's when fit starts, after every step of an optimiser
    and before every batch, so that the module's own update of the teacher, wherever it stands, has nothing left to average. The two
    branches don't share storage: an update in two parts, ``mul_`` and then ``add_``, would change the student, too.

    Runs: in training. Cost: a copy of the weights a step. The teacher stays as the module uses it, in its mode.
    Saves: nothing; checkpoints hold both branches, and may be resumed with or without it.
    Refuses: strategies that shard weights; branches that differ, and a teacher that an optimiser trains.

    Args:
        student: Name of the submodule that learns.
        teacher: Name of the submodule that follows.

    Raises:
        ValueError: When fit starts, there is no such submodule, the two differ, or an optimiser trains the teacher.
    """

    def __init__(self, student: str, teacher: str) -> None:
        super().__init__()
        if student == teacher:
            raise ValueError(f"student and teacher are both {student!r}: name two submodules")
        self.student, self.teacher = student, teacher
        self._source: list[Tensor] = []
        self._copy: list[Tensor] = []
        self._hooks: list[Any] = []

    def _branches(self, pl_module: pl.LightningModule) -> tuple[nn.Module, nn.Module]:
        with naming("EMARemoval"):
            student, teacher = (plain_module(one_submodule(pl_module, getattr(self, name), name)[1]) for name in ("student", "teacher"))
        return student, teacher

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find both, and compare them."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        refuse_sharded(trainer, "EMARemoval")
        self.when_built(pl_module, lambda: self._compare(pl_module))

    def _compare(self, pl_module: pl.LightningModule) -> None:
        for branch in self._branches(pl_module):
            refuse_lazy(branch, "EMARemoval")
        pairs = [
            {name: (tuple(value.shape), value.dtype) for name, value in _state(branch).items()} for branch in self._branches(pl_module)
        ]
        if pairs[0] != pairs[1]:
            odd = next(name for name in {**pairs[0], **pairs[1]} if pairs[0].get(name) != pairs[1].get(name))
            raise ValueError(
                f"EMARemoval: {self.student!r} and {self.teacher!r} differ in {odd} ({pairs[0].get(odd)} and {pairs[1].get(odd)}): a "
                "teacher can be the copy of a student of the same layers alone"
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Copy; weights are on their device and restored by now."""
        student, teacher = self._branches(pl_module)
        trained = {id(parameter) for one in trainer.optimizers for group in one.param_groups for parameter in group["params"]}
        if any(id(parameter) in trained for parameter in teacher.parameters()):
            raise ValueError(f"EMARemoval: an optimiser trains {self.teacher!r}, which is to follow {self.student!r}: leave it out there")
        mine, theirs = _state(student), _state(teacher)
        self._source, self._copy = list(mine.values()), [theirs[name] for name in mine]
        self._follow()
        self._hooks = [optimiser.register_step_post_hook(self._follow) for optimiser in trainer.optimizers]
        rank_zero_info(f"EMARemoval: {self.teacher} is a copy of {self.student}, not its average; {len(self._copy)} tensors")

    @torch.no_grad()
    def _follow(self, *_: Any) -> None:
        torch._foreach_copy_(self._copy, self._source)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Undo what the module made of the teacher since the optimiser's step."""
        self._follow()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Copy once more: the module may have averaged behind the last step, or another callback lent weights for good."""
        self._follow()

    def leave(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let go of both."""
        for hook in self._hooks:
            hook.remove()
        self._source, self._copy, self._hooks = [], [], []


def _state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, also those that aren't saved."""
    return {name: tensor.detach() for name, tensor in [*module.named_parameters(), *module.named_buffers()]}
