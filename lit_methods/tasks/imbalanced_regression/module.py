"""Regression of one number, or of one at each pixel, from data whose labels are skewed."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lit_methods import checks
from lit_methods.evaluated import Evaluated, Part
from lit_methods.panels import Curve, Panel
from lit_methods.steps import log_global
from lit_methods.tasks.imbalanced_regression.losses import RegressionLoss, regression_loss
from lit_methods.tasks.imbalanced_regression.metrics import REGIONS, ShotMetrics


class ImbalancedRegression(Evaluated):
    """Trains features and a regressor on them, and measures errors by how often a label occurs in training.

    Runs: batches have ``image`` (B, ...), or another key by ``inputs``; ``target``, (B,) or (B, 1, H, W) float32; ``weight`` of the same
    shape where the data are re-weighted; in evaluation ``count`` of the same shape, the number of training samples with the label. Targets
    that aren't finite aren't evaluated, and maps of another size than their targets are resized in evaluation. ``ConR`` and ``FDS`` find
    the submodules ``backbone`` and ``regressor``. Errors are given for ``all``, ``many``, ``median`` and ``low`` shots; regions without a
    sample are left out. Beside the panels ``regression/val_rmse_<region>`` is logged, and with ``delta1`` ``regression/val_delta1``.

    Saves: backbone and regressor.

    Refuses: evaluation data without ``count``; outputs that aren't one number for each target.

    Args:
        backbone: Images -> (B, D) features, or (B, C, h, w).
        regressor: Features -> (B, 1), or (B, 1, H, W).
        loss: ``l1``, ``mse``, ``huber``, ``focal_l1``, ``focal_mse`` or ``balanced_mse``.
        noise_sigma: Standard deviation of the noise that ``balanced_mse`` assumes, in the unit of the target.
        many: A label with more training samples is many-shot.
        few: With fewer: low-shot.
        inputs: Key of the input in the batch.
        delta1: Log the share of predictions within a factor of 1.25 of the target, for depth.
        optimizer: ``adam`` or ``sgd`` (momentum 0.9).
        learning_rate: At the start.
        weight_decay: Weight decay of the optimiser; it joins the gradient.
        milestones: Epochs at which the learning rate is multiplied by ``gamma``.
        gamma: See ``milestones``.

    Raises:
        ValueError: A value lies outside its range.
    """

    panels: ClassVar[tuple[Panel, ...]] = (
        Curve("Regression loss", ("regression/loss",), goal="min"),
        Curve("Mean absolute error", ("regression/val_mae_*",), note="By the number of training samples with the label.", goal="min"),
        Curve("Geometric mean of errors", ("regression/val_gm_*",), goal="min"),
    )

    def __init__(
        self,
        backbone: nn.Module,
        regressor: nn.Module,
        loss: RegressionLoss = "l1",
        noise_sigma: float = 1.0,
        many: int = 100,
        few: int = 20,
        inputs: str = "image",
        delta1: bool = False,
        optimizer: Literal["adam", "sgd"] = "adam",
        learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
        milestones: Sequence[int] = (),
        gamma: float = 0.1,
    ) -> None:
        super().__init__()
        checks.literals(ImbalancedRegression, locals())
        checks.positive(learning_rate=learning_rate, noise_sigma=noise_sigma)
        checks.at_least(0, weight_decay=weight_decay, gamma=gamma)
        for epoch in milestones:
            checks.at_least(0, "an epoch", milestones=epoch)
        self.save_hyperparameters(ignore=["backbone", "regressor"])
        self.backbone, self.regressor = backbone, regressor
        self.kind: RegressionLoss = loss
        self.eval_shots = ShotMetrics(many, few)
        self.eval_delta1 = MeanMetric() if delta1 else None

    def forward(self, images: Tensor) -> Tensor:
        """Images -> predictions."""
        return self.regressor(self.backbone(images))  # type: ignore[no-any-return]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The weighted loss."""
        target = batch["target"]
        loss = regression_loss(self._as(self._predict(batch), target), target, batch.get("weight"), self.kind, self.hparams["noise_sigma"])
        self.log("regression/loss", loss.detach(), prog_bar=True, batch_size=len(target))
        return loss

    def _predict(self, batch: dict[str, Tensor]) -> Tensor:
        key = self.hparams["inputs"]
        if key not in batch:
            raise ValueError(f"the batch has no {key!r}, it has {list(batch)}: name the key of the input by inputs")
        return self(batch[key])  # type: ignore[no-any-return]

    @staticmethod
    def _as(predictions: Tensor, target: Tensor) -> Tensor:
        if predictions.numel() != target.numel():
            raise ValueError(f"the regressor puts out {tuple(predictions.shape)} for targets {tuple(target.shape)}: one number for each")
        return predictions.reshape(target.shape)

    def _evaluate(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Adds a batch to the metrics."""
        target = batch["target"].float()
        predictions = self._predict(batch).float()
        if predictions.ndim == 4 and predictions.shape[2:] != target.shape[2:]:
            predictions = nn.functional.interpolate(predictions, target.shape[2:], mode="bilinear", align_corners=True)
        predictions = self._as(predictions, target)
        counts = batch.get("count")
        if counts is None:
            raise ValueError(
                f"evaluation needs the key 'count', the number of training samples with the label; the batch has {list(batch)}"
            )
        valid = target.isfinite()  # pixels that aren't evaluated are NaN
        self.eval_shots.update(predictions[valid], target[valid], counts[valid])
        if self.eval_delta1 is not None:
            guess, truth = predictions[valid].clamp(min=1e-6), target[valid].clamp(min=1e-6)
            self.eval_delta1.update((torch.maximum(guess / truth, truth / guess) < 1.25).float())

    def _log_evaluation(self, part: Part) -> None:
        scores = self.eval_shots.compute()
        logs: dict[str, Any] = {}
        for region in REGIONS:
            if not bool(scores[f"{region}_l1"].isnan()):  # the region is empty
                logs[f"mae_{region}"], logs[f"gm_{region}"] = scores[f"{region}_l1"], scores[f"{region}_gmean"]
                logs[f"rmse_{region}"] = scores[f"{region}_mse"].sqrt()
        if self.eval_delta1 is not None:
            logs["delta1"] = self.eval_delta1.compute()
            self.eval_delta1.reset()
        log_global(self, {f"regression/{part}_{name}": value.float() for name, value in logs.items()})
        self.eval_shots.reset()

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """``prediction`` (B, ...), and ``target`` where the batch has it."""
        return {"prediction": self._predict(batch)} | ({"target": batch["target"]} if "target" in batch else {})

    def configure_optimizers(self) -> torch.optim.Optimizer | OptimizerLRSchedulerConfig:
        """Adam or SGD, the learning rate falling at milestones."""
        hp, trained = self.hparams, [p for p in self.parameters() if p.requires_grad]
        optimizer: torch.optim.Optimizer
        if hp["optimizer"] == "adam":
            optimizer = torch.optim.Adam(trained, lr=hp["learning_rate"], weight_decay=hp["weight_decay"])
        else:
            optimizer = torch.optim.SGD(trained, lr=hp["learning_rate"], momentum=0.9, weight_decay=hp["weight_decay"])
        if not hp["milestones"]:
            return optimizer
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(hp["milestones"]), hp["gamma"])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "epoch"}}


__all__ = ["ImbalancedRegression"]
