"""Takes the moving average out of a module's teacher: the student teaches itself (iCT, arXiv:2310.14189, Section 3.2)."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn

from lit_methods.callbacks.ordering import OrderedCallback
from lit_methods.callbacks.sparsity.callback import refuse_sharded
from lit_methods.callbacks.targets import plain_module, select_modules


class EMARemoval(OrderedCallback):
    """Ties a module's teacher to its student: both have the same weights, always, and the teacher gets no gradient.

    For any LightningModule with a student and a teacher branch of the same layers: consistency training, BYOL, mean teacher. The teacher's
    tensors become those of the student (their storage is shared), so that the module's own update of the teacher changes nothing, and no
    memory is spent on a second set. It is the opposite of ``EMATeacher``.

    Runs: from the start of fit, before the sanity check. During validation and after fit both branches have tensors of their own, equal
    ones, so that callbacks which lend averaged weights can be used together with it. Saves: nothing; checkpoints hold both branches, and
    may be resumed with or without it. The teacher stays as the module uses it, in its mode.
    Not with strategies that shard weights.

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
        self._tied: list[Any] = []

    def _branches(self, pl_module: pl.LightningModule) -> tuple[nn.Module, nn.Module]:
        found = [plain_module(next(iter(select_modules(pl_module, [name]).values()))) for name in (self.student, self.teacher)]
        return found[0], found[1]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find both, and compare them."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        refuse_sharded(trainer, "EMARemoval")
        pairs = [
            {name: (tuple(value.shape), value.dtype) for name, value in branch.state_dict(keep_vars=True).items()}
            for branch in self._branches(pl_module)
        ]
        if pairs[0] != pairs[1]:
            odd = next(name for name in {**pairs[0], **pairs[1]} if pairs[0].get(name) != pairs[1].get(name))
            raise ValueError(
                f"EMARemoval: {self.student!r} and {self.teacher!r} differ in {odd} ({pairs[0].get(odd)} and {pairs[1].get(odd)}): a "
                "teacher can be tied to a student of the same layers alone"
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tie them; weights are on their device and restored by now."""
        _, teacher = self._branches(pl_module)
        trained = {id(parameter) for one in trainer.optimizers for group in one.param_groups for parameter in group["params"]}
        if any(id(parameter) in trained for parameter in teacher.parameters()):
            raise ValueError(f"EMARemoval: an optimiser trains {self.teacher!r}, which is to follow {self.student!r}: leave it out there")
        self._tie(pl_module)
        rank_zero_info(f"EMARemoval: {self.teacher} has the weights of {self.student}; {len(self._tied)} tensors")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tensors of their own: callbacks that lend averaged weights for validation swap tensor by tensor."""
        self._untie()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tie them again."""
        if trainer.state.fn == "fit":
            self._tie(pl_module)

    def _tie(self, pl_module: pl.LightningModule) -> None:
        mine, theirs = (dict(branch.state_dict(keep_vars=True)) for branch in self._branches(pl_module))
        self._tied = list(theirs.values())
        for name, value in theirs.items():
            value.data = mine[name].data

    def _untie(self) -> None:
        tied, self._tied = self._tied, []
        for value in tied:
            value.data = value.data.clone()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Tensors of their own again."""
        self._untie()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Tensors of their own again: Lightning doesn't call ``teardown`` here."""
        self._untie()
