"""Similarities learned from given ones: the smallest host of losses on two lists of similarities."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.classification import binary_average_precision

from lit_methods import checks, distributed
from lit_methods.evaluated import Evaluated, Part
from lit_methods.panels import Curve, Panel
from lit_methods.self_supervised.probe import rank_correlation
from lit_methods.steps import log_global


class SimilarityRegression(Evaluated):
    """Predicts a similarity in [-1, 1] from numbers, by squared error; judged by what it puts on top.

    The network is two linear layers with tanh behind each. ``ContinuousAPLoss`` with ``alone: true`` trains it by ranking in place of the
    squared error.

    Runs: batches have ``input`` (B, inputs) and ``target`` (B,). After validation the average precision of the items whose target is among
    the highest ``top_share`` is logged, and the rank correlation with all targets, over all ranks.

    Saves: nothing beside the network.

    Refuses: arguments out of range.

    Args:
        inputs: Numbers of an item.
        hidden: Numbers in the hidden layer.
        learning_rate: Of Adam.
        top_share: Share of the items, those with the highest targets, that shall be found.

    Raises:
        ValueError: An argument outside its range.
    """

    panels: ClassVar[tuple[Panel, ...]] = (
        Curve("Average precision of the top", ("similarity/val_ap",), note="Of the items with the highest targets.", goal="max"),
        Curve("Rank correlation", ("similarity/val_spearman",), note="Spearman's, over all held-out items.", goal="max"),
        Curve("Squared error", ("similarity/loss",), goal="min"),
    )

    def __init__(self, inputs: int = 16, hidden: int = 32, learning_rate: float = 0.01, top_share: float = 0.1) -> None:
        super().__init__()
        checks.at_least(1, inputs=inputs, hidden=hidden)
        checks.positive(learning_rate=learning_rate)
        checks.within("(0, 1)", "a share", top_share=top_share)
        self.save_hyperparameters()
        self.network = nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, 1), nn.Tanh())
        self._seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs) -> (B,) similarities."""
        return self.network(x).flatten()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Squared error of a batch."""
        loss = F.mse_loss(self(batch["input"]).float(), batch["target"])
        self.log("similarity/loss", loss.detach(), batch_size=len(batch["input"]))
        return loss

    def _evaluate(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._seen.append((self(batch["input"]).float(), batch["target"]))

    def _log_evaluation(self, part: Part) -> None:
        if not self._seen:
            return
        predicted, targets = (distributed.gather_rows(torch.cat(values), with_grad=False) for values in zip(*self._seen, strict=True))
        self._seen = []
        top = targets >= targets.quantile(1 - self.hparams["top_share"])
        figures = {"ap": binary_average_precision((predicted + 1) / 2, top.long()), "spearman": rank_correlation(predicted, targets)}
        log_global(self, {f"similarity/{part}_{name}": value for name, value in figures.items()}, prog_bar=True)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """``similarity`` (B,)."""
        return {"similarity": self(batch["input"])}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.hparams["learning_rate"])


__all__ = ["SimilarityRegression"]
