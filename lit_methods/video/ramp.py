"""How many epochs a ramp of a training takes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lit_methods.steps import steps_per_epoch, training_length

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule


def ramp_epochs(module: LightningModule, asked: int | None = None) -> int:
    """Epochs of the ramp, >= 1: as asked for, else those of the training, also where it is given in steps.

    Args:
        module: A module in a trainer.
        asked: The user's number; None: all epochs of the training.

    Raises:
        ValueError: The training has no end.
    """
    if asked is not None:
        return asked
    epochs = module.trainer.max_epochs
    if epochs is None or epochs < 1:
        return math.ceil(training_length(module, what="the ramp", instead="ramp_epochs") / steps_per_epoch(module, "the ramp"))
    return epochs


__all__ = ["ramp_epochs"]
