"""Averaged weights for evaluation: what samples and validation use, while training goes on with its own."""

import math
from typing import Any, Literal

import numpy as np
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

from lit_methods.callbacks.averaging.ema import ema_update


def power_exponent(s: float) -> float:
    """Exponent gamma of the power profile whose average has the relative width s (arXiv:2312.02696, Eq. 126 and rCM's code).

    The largest real root of gamma^3 + 7 gamma^2 + (16 - s^-2) gamma + (12 - s^-2).

    Args:
        s: Standard deviation of the average's weights over time, as a share of the training time; in (0, 0.28).

    Raises:
        ValueError: No such profile.
    """
    if not 0 < s < 12**-0.5:
        raise ValueError(f"s is {s}: give a width above 0 and below {12**-0.5:.4f}, for example 0.1")
    roots = np.roots([1.0, 7.0, 16.0 - s**-2, 12.0 - s**-2])
    return float(max(root.real for root in roots if abs(root.imag) < 1e-8 * max(1.0, abs(root))))


def power_decay(step: int, exponent: float) -> float:
    """beta_k = (1 - 1 / (k + 1))^(gamma + 1), how much the average keeps at step k; 0 for k < 1."""
    return 0.0 if step < 1 else (1.0 - 1.0 / (step + 1)) ** (exponent + 1.0)


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
