"""How long the training is that gamma falls over."""

import math
from typing import Literal

from lightning.pytorch import LightningModule

from lit_methods.steps import steps_per_epoch, training_length

CoarseSchedule = Literal["epoch", "step"]


def planned_progress(module: LightningModule, schedule: CoarseSchedule) -> int:
    """Planned epochs or optimiser steps of the whole training, >= 1: what the trainer was told, not what was run so far.

    Args:
        module: A module in a trainer.
        schedule: What is counted.

    Raises:
        ValueError: The training has no end.
    """
    what = "gamma, which falls to the end of the training,"
    epochs = module.trainer.max_epochs
    if schedule == "epoch" and epochs is not None and epochs > 0:
        return epochs
    steps = training_length(module, what=what, instead=None)
    return steps if schedule == "step" else max(1, math.ceil(steps / steps_per_epoch(module, what)))


__all__ = ["CoarseSchedule", "planned_progress"]
