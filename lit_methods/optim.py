"""Learning rates over a training, as factors of the full one, and optimisers that several modules share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from lit_methods.steps import training_length

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule
    from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig

# ---- factors of the learning rate, from the optimiser steps (or epochs) done -----------------------------------------------------------


def linear_rise(step: int, warmup_steps: int) -> float:
    """Linear rise that ends at 1 after ``warmup_steps`` steps; the first step has 1 / (``warmup_steps`` + 1)."""
    return min(1.0, (step + 1) / (warmup_steps + 1))


def warmup_cosine(step: int, total_steps: int, warmup_steps: int = 0, final: float = 0.0) -> float:
    """Linear rise to 1, then half a cosine down to ``final``, which holds from ``total_steps`` on.

    Args:
        step: Steps done, >= 0.
        total_steps: Steps of the whole training, the rise among them.
        warmup_steps: Steps of the rise; the first one has 1 / ``warmup_steps``.
        final: Factor at the end, in [0, 1]; 1: constant.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2


def learning_rate_factor(
    step: int,
    *,
    total_steps: int,
    steps_per_epoch: int,
    schedule: Literal["constant", "cosine", "multistep"],
    milestones: Sequence[int] = (),
    gamma: float = 0.1,
    warmup_epochs: float = 0.0,
    warmup_start: float = 0.0,
    minimum: float = 0.0,
) -> float:
    """The schedules of image classification: a linear rise, then constant, half a cosine, or steps down.

    Args:
        step: Optimiser steps done, >= 0.
        total_steps: Steps of the whole training.
        steps_per_epoch: Optimiser steps per epoch.
        schedule: ``constant``; ``cosine``: half a cosine from the end of the warm-up to the last step; ``multistep``: times ``gamma`` at
            each milestone.
        milestones: Epochs, counted from the start of training.
        gamma: Factor at a milestone.
        warmup_epochs: Epochs of linear rise from ``warmup_start`` to 1; 0: none.
        warmup_start: Factor at step 0 of a warm-up.
        minimum: Factor at the end of the cosine.

    Returns:
        Factor >= 0; 1 is the full learning rate.
    """
    warmup = round(warmup_epochs * steps_per_epoch)
    if step < warmup:
        return warmup_start + (1 - warmup_start) * step / warmup
    if schedule == "cosine":
        return warmup_cosine(step - warmup, total_steps - warmup, final=minimum)
    if schedule == "multistep":
        return gamma ** sum(step >= milestone * steps_per_epoch for milestone in milestones)
    return 1.0


def seven_sixteenths_cosine(step: int, total_steps: int, warmup_steps: int = 0) -> float:
    """cos(7 pi t / (16 T)) behind a linear warm-up: FixMatch's schedule (arXiv:2001.07685, section 4); never below 0.

    Args:
        step: Optimiser steps done, >= 0.
        total_steps: Steps of the whole training, the warm-up among them.
        warmup_steps: Steps of linear rise from 0.
    """
    if step < warmup_steps:
        return step / max(1, warmup_steps)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return max(0.0, math.cos(7 / 16 * math.pi * progress))


def warmup_then_epoch_cosine(step: int, steps_per_epoch: int, epochs: int, warmup_epochs: int = 0) -> float:
    """Linear per step over the warm-up, then half a cosine that changes once per epoch (SimMatchV2's recipe).

    Args:
        step: Optimiser steps done, >= 0.
        steps_per_epoch: Optimiser steps per epoch, >= 1.
        epochs: Epochs of the whole training, the warm-up among them.
        warmup_epochs: Epochs of linear rise; the first step has 1 / (number of warm-up steps).
    """
    epoch = step // steps_per_epoch
    if epoch < warmup_epochs:
        return (step + 1) / (warmup_epochs * steps_per_epoch)
    return warmup_cosine(epoch - warmup_epochs, epochs - warmup_epochs)


def warmup_cosine_rate(
    epoch: int, learning_rate: float, total_epochs: int, warmup_epochs: int = 1, warmup_learning_rate: float = 1e-5
) -> float:
    """Learning rate of an epoch: constant at first, then a cosine over ``total_epochs`` which starts only then and so doesn't reach 0.

    Prompt learning's schedule, from KaiyangZhou/Dassl.pytorch@c61a1b5 (dassl/optim/lr_scheduler.py).

    Args:
        epoch: Epochs done, from 0.
        learning_rate: Rate of the first epoch after the warm-up.
        total_epochs: Epochs of the whole training, >= 1.
        warmup_epochs: First epochs, with ``warmup_learning_rate``.
        warmup_learning_rate: Rate of the warm-up.
    """
    if epoch < warmup_epochs:
        return warmup_learning_rate
    return learning_rate * (1 + math.cos(math.pi * (epoch - warmup_epochs) / total_epochs)) / 2


# ---- optimisers ------------------------------------------------------------------------------------------------------------------------


def scheduled(
    optimizer: torch.optim.Optimizer, factor: Callable[[int], float], interval: Literal["step", "epoch"] = "step"
) -> OptimizerLRSchedulerConfig:
    """An optimiser whose learning rate is multiplied by ``factor`` of the steps or epochs done, as ``configure_optimizers`` returns it."""
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": interval}}


def cosine_to_the_end(
    module: LightningModule, optimizer: torch.optim.Optimizer, what: str, minimum: float = 0.0
) -> OptimizerLRSchedulerConfig:
    """An optimiser whose learning rate falls to ``minimum`` along half a cosine, a step at a time, until the training ends.

    Args:
        module: A module in a trainer, which says how many steps there are.
        optimizer: What steps.
        what: What asks for the end, for the message of a training that has none.
        minimum: Learning rate at the end.
    """
    steps = training_length(module, what=what, instead=None)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps, eta_min=minimum)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def adamw_by_shares(module: LightningModule) -> OptimizerLRSchedulerConfig:
    """AdamW of what is trained, with warm-up and cosine per step, by hyperparameters that are called as usual.

    Args:
        module: Its ``hparams`` have ``learning_rate``, ``betas``, ``eps``, ``weight_decay``, and as shares of all steps or of the rate
            ``warmup_share`` and ``final_share``; 0 and 1: a constant rate.

    Raises:
        ValueError: The training has no end, and the schedule needs one.
    """
    hp = module.hparams
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=hp["learning_rate"], betas=tuple(hp["betas"]), eps=hp["eps"], weight_decay=hp["weight_decay"]
    )
    if hp["warmup_share"] == 0 and hp["final_share"] == 1:
        return scheduled(optimizer, lambda step: 1.0)
    total = training_length(module, what="the schedule of warmup_share and final_share", instead=None)
    return scheduled(optimizer, lambda step: warmup_cosine(step, total, round(hp["warmup_share"] * total), hp["final_share"]))


def adamw_one_cycle(
    module: LightningModule,
    *,
    learning_rate: float,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    pct_start: float = 0.2,
    div_factor: float = 25.0,
    final_div_factor: float = 100.0,
) -> OptimizerLRSchedulerConfig:
    """AdamW with a cosine one-cycle schedule per optimiser step, as ``configure_optimizers`` returns it.

    Args:
        module: A module in a trainer, which says how many steps there are; its parameters with ``requires_grad`` are trained.
        learning_rate: Peak of the cycle.
        weight_decay: AdamW's decoupled weight decay.
        betas: AdamW's two momentum decay rates.
        eps: AdamW's addend to the denominator.
        pct_start: Share of the steps that rise.
        div_factor: Peak / first learning rate.
        final_div_factor: First / last learning rate.

    Raises:
        ValueError: The training has no end.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=weight_decay, betas=betas, eps=eps)
    # OneCycleLR divides by the length of the rise less one: a run too short to rise gets the start of the shortest cycle that can
    shortest = int(1 / pct_start) + 1
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=learning_rate,
        total_steps=max(training_length(module, what="the one-cycle schedule", instead=None), shortest),
        pct_start=pct_start,
        anneal_strategy="cos",
        cycle_momentum=False,
        div_factor=div_factor,
        final_div_factor=final_div_factor,
    )
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Iterations(torch.optim.Optimizer):
    """Counts iterations as optimiser steps, so that ``max_steps`` and checkpoints work; the closure does all the work.

    Args:
        parameters: What the closure moves, in place and without gradients.
    """

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.0})

    def step(self, closure: Any = None) -> Any:
        """Run the iteration."""
        return closure()


def repoint(scheduler: Any, old: torch.optim.Optimizer, new: torch.optim.Optimizer) -> None:
    """Let a scheduler, and those inside it, see another optimiser."""
    if getattr(scheduler, "optimizer", None) is old:
        scheduler.optimizer = new
    for inner in getattr(scheduler, "_schedulers", ()):
        repoint(inner, old, new)


__all__ = [
    "adamw_one_cycle", "cosine_to_the_end", "learning_rate_factor", "linear_rise", "repoint", "scheduled", "seven_sixteenths_cosine",
    "warmup_cosine", "warmup_cosine_rate", "warmup_then_epoch_cosine",
]  # fmt: skip
