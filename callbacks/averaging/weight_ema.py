"""Averaged weights for evaluation: what samples and validation use, while training goes on with its own."""

from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

from lit_methods.averages import ema_update, power_decay, power_exponent
from lit_methods.callbacks.targets import refuse_lazy
from lit_methods.callbacks.twin import WithoutGraph
from lit_methods.checks import at_least, one_of, share

Profile = Literal["constant", "power"]


class WeightEMA(WeightAveraging):
    """Lightning's ``WeightAveraging`` with the averages of consistency models.

    Runs: the average follows after every optimiser step. During validation and at the end of training the module has the averaged weights.
    Lightning gives it its own weights back before its ``on_validation_epoch_end``: draw samples in ``validation_step``. Buffers are copied.
    Saves: in ``state_dict`` of checkpoints the module has the averaged weights; a resumed run goes on with its own, which stand there, too.
    Refuses: strategies that shard weights, lazy layers without a shape, and layers that the
    module makes in its ``setup``. It is not for a teacher: that is ``EMATeacher``.

    Args:
        decay: Share of itself that a ``constant`` average keeps at a step, in [0, 1]: 0.99993 for iCT on CIFAR-10.
        profile: ``constant``, or ``power``: :func:`power_decay`, which never forgets by a fixed number of steps (rCM: ``width`` 0.1).
        width: Relative width of the ``power`` profile, see :func:`power_exponent`.
        shift: Steps that the ``power`` profile takes as done before the first.

    Raises:
        ValueError: An argument outside its range.
    """

    def __init__(self, decay: float = 0.9999, profile: Profile = "constant", width: float = 0.1, shift: int = 0) -> None:
        share(decay=decay)
        one_of(Profile, profile=profile)
        at_least(0, "a number of steps", shift=shift)
        self.decay, self.profile, self.width, self.shift = decay, profile, width, shift
        self._exponent = power_exponent(width) if profile == "power" else 0.0
        self._now = decay
        super().__init__(use_buffers=False, multi_avg_fn=self._average)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Make the average.

        Raises:
            ValueError: A lazy layer has no shape yet.
        """
        if stage == "fit":
            refuse_lazy(pl_module, "WeightEMA")
        with WithoutGraph():  # Lightning copies the module
            super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make sure that nothing is missing in the average.

        Raises:
            ValueError: The module has made layers in its ``setup``, behind that of callbacks.
        """
        super().on_fit_start(trainer, pl_module)
        copied = {} if self._average_model is None else dict(self._average_model.module.named_parameters())
        if missing := [name for name, _ in pl_module.named_parameters() if name not in copied]:
            raise ValueError(
                f"WeightEMA averages a copy of {type(pl_module).__name__} that was made before its setup, and lacks {missing[0]} (and "
                f"{len(missing) - 1} more): make layers in __init__ or in configure_model"
            )

    def decay_at(self, step: int) -> float:
        """Share that the average keeps at optimiser step ``step``, counted from 0."""
        return self.decay if self.profile == "constant" else power_decay(step + self.shift, self._exponent)

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """After every optimiser step."""
        if step_idx is None:
            return False
        self._now = self.decay_at(step_idx)
        return True

    def _average(self, averages: Any, current: Any, _: Tensor | int) -> None:
        ema_update(list(averages), list(current), self._now)
