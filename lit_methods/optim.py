"""Optimiser recipes that several techniques share."""

from collections.abc import Iterable

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import nn


def adamw_one_cycle(
    module: LightningModule,
    parameters: Iterable[nn.Parameter],
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
        module: Its trainer says how many steps there are.
        parameters: What is trained.
        learning_rate: Peak of the cycle.
        weight_decay: Decoupled.
        betas: Of AdamW.
        eps: Of AdamW.
        pct_start: Share of the steps that rise.
        div_factor: Peak / first learning rate.
        final_div_factor: First / last learning rate.
    """
    optimizer = torch.optim.AdamW(list(parameters), lr=learning_rate, weight_decay=weight_decay, betas=betas, eps=eps)
    # OneCycleLR divides by the length of the rise less one: a run too short to rise gets the start of the shortest cycle that can
    shortest = int(1 / pct_start) + 1
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=learning_rate,
        total_steps=max(int(module.trainer.estimated_stepping_batches), shortest),
        pct_start=pct_start,
        anneal_strategy="cos",
        cycle_momentum=False,
        div_factor=div_factor,
        final_div_factor=final_div_factor,
    )
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
