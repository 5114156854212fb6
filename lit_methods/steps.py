"""Length of a training run, and when to log, in optimiser steps."""

import math

from lightning.pytorch import LightningModule
from torch import Tensor, nn


def training_length(module: LightningModule, asked: int | None) -> int:
    """Optimiser steps of the training: as asked for, or as the trainer estimates."""
    if asked is not None:
        return asked
    estimate = module.trainer.estimated_stepping_batches
    if not math.isfinite(estimate) or estimate < 1:
        raise ValueError("the schedule needs an end, and this training has none: set max_steps, max_epochs, or total_steps")
    return int(estimate)


def gradient_norm(module: nn.Module) -> Tensor:
    """Norm of all gradients together."""
    return nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])


def logs_now(module: LightningModule) -> bool:
    """Whether what this step logs is written down: the rest needn't be computed."""
    every: int = module.trainer.log_every_n_steps  # type: ignore[attr-defined]
    return every > 0 and (module.trainer.global_step + 1) % every == 0
