"""Segmentation of point clouds of which few points are labelled."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from lit_methods import checks
from lit_methods.lidar.point_losses import weighted_cross_entropy
from lit_methods.lidar.segmentor import PointEvaluation
from lit_methods.optim import adamw_one_cycle
from lit_methods.panels import Curve, Panel
from lit_methods.steps import training_length


class WeakPointSegmentor(PointEvaluation):
    """A network that gives each point a class, trained by cross-entropy on the points that have a label, each with its weight.

    Runs: batches with ``points`` (P, D), ``points_per_sample`` (B,), ``labels`` (P,), which are ``ignore_index`` for points without one,
    and, if labels differ in weight, ``weights`` (P,), such as those of :class:`lit_methods.datamodules.RoomsDataModule`. Callbacks that
    spread labels or add consistency attach to ``network``.

    Saves: the network.

    Refuses: a training without an end; names of another number of classes.

    Args:
        network: (points (P, D), points_per_sample (B,)) -> (P, num_classes) logits, such as ``PointNetOfCells`` or ``SparseUNet``.
        num_classes: Number of classes.
        ignore_index: Label of points that have none.
        class_names: Names of the classes; None numbers them.
        optimizer: ``sgd`` with Nesterov's momentum, or ``adamw``.
        learning_rate: Peak of the one-cycle schedule.
        weight_decay: Of the optimiser.
        momentum: Of SGD.
        pct_start: Share of the steps in which the learning rate rises.
        div_factor: Peak / first learning rate.
        final_div_factor: First / last learning rate.
    """

    panels: ClassVar[tuple[Panel, ...]] = (
        Curve("Loss on labelled points", ("segmentor/loss",), goal="min"),
        Curve("Labelled points of a batch", ("segmentor/labelled",), note="Share of the points; it rises when labels are spread."),
        *PointEvaluation.panels,
    )

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        ignore_index: int = 255,
        class_names: Sequence[str] | None = None,
        optimizer: Literal["sgd", "adamw"] = "sgd",
        learning_rate: float = 0.05,
        weight_decay: float = 1e-4,
        momentum: float = 0.9,
        pct_start: float = 0.05,
        div_factor: float = 10.0,
        final_div_factor: float = 1e4,
    ) -> None:
        super().__init__()
        checks.literals(WeakPointSegmentor, locals())
        checks.at_least(2, "classes", num_classes=num_classes)
        checks.positive(learning_rate=learning_rate, div_factor=div_factor, final_div_factor=final_div_factor)
        checks.at_least(0, weight_decay=weight_decay)
        checks.within("[0, 1)", "a momentum", momentum=momentum)
        checks.within("(0, 1)", "the share of the steps that rise", pct_start=pct_start)
        if 0 <= ignore_index < num_classes:
            raise ValueError(f"ignore_index is {ignore_index}, a class of num_classes={num_classes}: give another number, such as 255")
        self.save_hyperparameters(ignore=["network"])
        self.network = network
        self._judge_classes(num_classes, ignore_index, class_names)

    def point_logits(self, batch: dict[str, Any]) -> Tensor:
        """(P, num_classes) logits of every point of a batch."""
        return self.network(batch["points"], batch["points_per_sample"])  # type: ignore[no-any-return]

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Weighted cross-entropy of the labelled points."""
        labels, ignore = batch["labels"], self.hparams["ignore_index"]
        loss = weighted_cross_entropy(self.point_logits(batch), labels, batch.get("weights"), ignore)
        size = len(batch["points_per_sample"])
        self.log("segmentor/loss", loss.detach(), prog_bar=True, batch_size=size)
        self.log("segmentor/labelled", (labels != ignore).float().mean(), batch_size=size)
        return loss

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The optimiser with one cycle."""
        hp = self.hparams
        cycle = {name: hp[name] for name in ("pct_start", "div_factor", "final_div_factor")}
        if hp["optimizer"] == "adamw":
            return adamw_one_cycle(self, learning_rate=hp["learning_rate"], weight_decay=hp["weight_decay"], **cycle)
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(
            trained, lr=hp["learning_rate"], momentum=hp["momentum"], weight_decay=hp["weight_decay"], nesterov=hp["momentum"] > 0
        )
        # a run too short to rise gets the start of the shortest cycle that can
        steps = max(training_length(self, what="the one-cycle schedule", instead=None), int(1 / hp["pct_start"]) + 1)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, hp["learning_rate"], total_steps=steps, cycle_momentum=False, **cycle)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


__all__ = ["WeakPointSegmentor"]
