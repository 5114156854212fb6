"""What the module of either stage of EPG does: the shift of its levels, its optimiser, and the length of its schedule."""

from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from lit_methods.consistency_models.epg.core import shift_of
from lit_methods.optim import scheduled, warmup_cosine
from lit_methods.steps import gradient_norm, logs_now


class Stage(LightningModule):
    """Base of both stages, whose arguments say the resolution, the learning rate and its schedule."""

    total_steps: int | None

    def shift(self, x: Tensor) -> float:
        """By which the levels of these images are multiplied."""
        return shift_of(x, self.hparams["base_resolution"])

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the norm of the gradient, before it is clipped."""
        if logs_now(self):
            self.log("epg/grad_norm", gradient_norm(self))

    def adamw(self, parameters: Iterable[nn.Parameter]) -> OptimizerLRSchedulerConfig:
        """AdamW with a warm-up, then a cosine over ``total_steps`` or a constant rate."""
        hp, total = self.hparams, self.total_steps or 1
        optimizer = torch.optim.AdamW(parameters, lr=hp["learning_rate"], betas=tuple(hp["betas"]), weight_decay=hp["weight_decay"])
        final = 0.0 if hp["schedule"] == "cosine" else 1.0
        return scheduled(optimizer, lambda step: warmup_cosine(step, total, hp["warmup_steps"], final))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The schedule's length belongs to the run."""
        checkpoint["epg"] = {"total_steps": self.total_steps}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it over."""
        self.total_steps = checkpoint.get("epg", {}).get("total_steps", self.total_steps)
