"""Length of a training run, and when and how to log."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule


def training_length(
    module: LightningModule, asked: int | None = None, *, what: str = "the schedule", instead: str | None = "total_steps"
) -> int:
    """Optimiser steps of the training, >= 1: as asked for, or as the trainer estimates.

    Args:
        module: A module in a trainer.
        asked: The user's number; None: the trainer's estimate.
        what: What ends with the training, for the message, such as ``"schedule='cosine'"``.
        instead: Argument or setting that would do without the trainer's estimate, for the message; None: there is none.

    Raises:
        ValueError: The training has no end.
    """
    if asked is not None:
        return asked
    estimate = module.trainer.estimated_stepping_batches
    if not 0 <= estimate < math.inf:
        ways = "max_steps or max_epochs" if instead is None else f"max_steps, max_epochs, or {instead}"
        raise ValueError(f"{what} needs an end, and this training has none: set {ways}")
    return max(1, int(estimate))


def remaining_steps(module: LightningModule, asked: int | None = None) -> int:
    """Optimiser steps of the fit that starts now, >= 1: as asked for, or as estimated less what the trainer did in a fit before."""
    return asked if asked is not None else max(1, training_length(module) - module.trainer.global_step)


def steps_per_epoch(module: LightningModule, what: str | None = None) -> int:
    """Optimiser steps of an epoch, rounded up.

    Args:
        module: A module in a trainer.
        what: What is counted in epochs, such as ``"milestones"``; None: nothing that matters.

    Returns:
        1 or more; 0 where the training loader has no length and nothing is counted in epochs.

    Raises:
        ValueError: Something is counted in epochs, and the training loader has no length.
    """
    trainer = module.trainer
    trainer.fit_loop.setup_data()  # the next line asks for the loader, and with max_steps alone nobody has made it yet
    batches = trainer.num_training_batches / trainer.accumulate_grad_batches
    if math.isfinite(batches):
        return max(1, math.ceil(batches))
    if what is not None:
        raise ValueError(f"{what} counts in epochs, and the training loader has no length: give the loader one, or use a schedule of steps")
    return 0


def gradient_norm(module: nn.Module) -> Tensor:
    """Norm of all gradients together."""
    return nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])


def logs_now(module: LightningModule) -> bool:
    """Whether what this step logs is written down: the rest needn't be computed."""
    every: int = module.trainer.log_every_n_steps  # type: ignore[attr-defined]
    stepped: int = module.trainer.fit_loop.epoch_loop._batches_that_stepped  # what Lightning counts: once for several optimisers
    return every > 0 and (stepped + 1) % every == 0


def log_global(module: LightningModule, values: Mapping[str, Tensor | float], **options: Any) -> None:
    """Log figures of an epoch that every rank has computed over the data of all ranks, so that they are equal everywhere.

    Args:
        module: A module in a trainer.
        values: Name -> figure, the same names on all ranks. Their mean over the ranks is what they are; Lightning takes it so as to know.
        **options: Further arguments of ``log_dict``.
    """
    placed = {name: value.to(module.device) if isinstance(value, Tensor) else value for name, value in values.items()}
    module.log_dict(placed, sync_dist=True, **options)


__all__ = ["gradient_norm", "log_global", "logs_now", "remaining_steps", "steps_per_epoch", "training_length"]
