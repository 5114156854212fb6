"""Averaged weights for evaluation: what samples and validation use, while training goes on with its own."""

import math
from typing import Any, Literal

from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

from lit_methods.averages import ema_update, power_decay, power_exponent


class WeightEMA(WeightAveraging):
    """Lightning's ``WeightAveraging`` with the averages of consistency models.

    Runs: the average follows after every optimiser step. During validation, at the end of training and in ``state_dict`` of checkpoints
    the module has the averaged weights; a resumed run goes on with its own, which stand in the checkpoint, too. Lightning gives the module
    its own weights back before the module's ``on_validation_epoch_end``: draw samples in ``validation_step``. Buffers are copied.
    Not for a teacher: that is ``EMATeacher``. Not with strategies that shard weights.

    Args:
        decay: Share of itself that a ``constant`` average keeps at a step, in [0, 1]: 0.99993 for iCT on CIFAR-10.
        profile: ``constant``, or ``power``: :func:`power_decay`, which never forgets by a fixed number of steps (rCM: ``width`` 0.1).
        width: Of ``power``, see :func:`power_exponent`.
        shift: Of ``power``: steps that are taken as done before the first.

    Raises:
        ValueError: An argument outside its range.
    """

    def __init__(
        self, decay: float = 0.9999, profile: Literal["constant", "power"] = "constant", width: float = 0.1, shift: int = 0
    ) -> None:
        if not 0 <= decay <= 1 or not math.isfinite(decay):
            raise ValueError(f"decay is {decay}: give a number from 0 to 1")
        if profile not in ("constant", "power"):
            raise ValueError(f"profile is {profile!r}: give 'constant' or 'power'")
        if shift < 0:
            raise ValueError(f"shift is {shift}: give a number of steps, 0 or more")
        self.decay, self.profile, self.width, self.shift = decay, profile, width, shift
        self._exponent = power_exponent(width) if profile == "power" else 0.0
        self._now = decay
        super().__init__(use_buffers=False, multi_avg_fn=self._average)

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
