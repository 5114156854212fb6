"""Downstream LiDAR segmentation: linear probing, fine-tuning, semi-supervised training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from lit_methods import checks
from lit_methods.evaluated import Evaluated, Part
from lit_methods.lidar import pictures
from lit_methods.lidar.point_losses import segmentation_losses
from lit_methods.lidar.point_metrics import PointIoU, iou_rows, mean_iou
from lit_methods.optim import adamw_one_cycle
from lit_methods.panels import CloudPanel, Curve, Panel, TableMedia, TablePanel
from lit_methods.runs.checkpoints import load_into
from lit_methods.steps import log_global


class PointEvaluation(Evaluated):
    """Base of modules that give the points of clouds a class: IoU, pictures and predictions.

    Subclasses write :meth:`point_logits` and the training, call :meth:`_judge_classes` in their constructor, and have ``ignore_index``
    among their hyperparameters.
    """

    panels: ClassVar[tuple[Panel, ...]] = (
        Curve(
            "mIoU on held-out scans", ("segmentor/val_miou", "segmentor/test_miou"), note="Mean over the classes that occur.", goal="max"
        ),
        Curve("IoU per class", ("segmentor/val_iou/*",), goal="max"),
        TablePanel("IoU per class, last validation", "segmentor/iou"),
        CloudPanel("Prediction", "segmentor/prediction", note="A held-out scan, colour: predicted class."),
        CloudPanel("Truth", "segmentor/truth", note="The same scan, colour: label; grey is ignored."),
    )

    def _judge_classes(self, num_outputs: int, ignore_index: int, class_names: Sequence[str] | None) -> None:
        """Make the metrics, and settle the names of the classes."""
        self.val_iou, self.test_iou = PointIoU(num_outputs, ignore_index), PointIoU(num_outputs, ignore_index)
        classes = len(self.val_iou.counted)
        self.class_names = tuple(class_names or (str(c) for c in self.val_iou.counted))
        if len(self.class_names) != classes:
            raise ValueError(
                f"class_names has {len(self.class_names)} names, but {classes} classes are counted (num_outputs without ignore_index)"
            )

    def point_logits(self, batch: dict[str, Any]) -> Tensor:
        """(N, num_outputs) logits of every point of a batch."""
        raise NotImplementedError

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """The same as :meth:`point_logits`."""
        return self.point_logits(batch)

    def _evaluate(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Add the points of a batch to the confusion matrix, and draw those of the first one."""
        predicted = self.point_logits(batch).argmax(dim=1)
        (self.test_iou if self.trainer.testing else self.val_iou).update(predicted, batch["labels"])
        if batch_idx == 0 and self.trainer.is_global_zero:
            self._draw(batch, predicted)

    def _log_evaluation(self, part: Part) -> None:
        metric = self.val_iou if part == "val" else self.test_iou
        iou = metric.iou()
        metric.reset()
        log_global(self, {f"segmentor/{part}_miou": mean_iou(iou)}, prog_bar=True)
        present = {name: value.float() for name, value in zip(self.class_names, iou, strict=True) if not value.isnan()}
        log_global(self, {f"segmentor/{part}_iou/{name}": value for name, value in present.items()})
        self._media["segmentor/iou"] = TableMedia(("class", "IoU, %"), iou_rows(iou, self.class_names))

    def _draw(self, batch: dict[str, Any], predicted: Tensor) -> None:
        first = int(batch["points_per_sample"][0])
        points = batch["points"][:first, :3]
        for key, labels in (("prediction", predicted), ("truth", batch["labels"])):
            self._media[f"segmentor/{key}"] = pictures.label_cloud(
                points, labels[:first], self.class_names, f"{key}, scan {batch['token'][0]}"
            )

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Labels of the scans of a batch, which ``SubmissionWriter`` writes to files.

        Returns:
            ``token`` list[str] and ``labels`` list of (n_i,) int64 training ids, one entry per scan, never the
            ignored id.
        """
        logits = self.point_logits(batch)
        ignore = self.hparams["ignore_index"]
        if 0 <= ignore < logits.shape[1]:  # a submission has no ignored class
            logits = logits.index_fill(1, torch.tensor([ignore], device=logits.device), -torch.inf)
        return {"token": batch["token"], "labels": list(logits.argmax(dim=1).split(batch["points_per_sample"].tolist()))}


class PointSegmentor(PointEvaluation):
    """A 3D backbone and one linear layer: SuperFlow's downstream protocol.

    The loss is cross-entropy and 2 x Lovasz-softmax on voxels, the metric mIoU on points. A voxel's label is that of its first point; a
    point's prediction is that of its voxel.

    Runs: batches of :class:`lit_methods.datamodules.NuScenesDataModule` with ``mode: segment``, or ``semi_supervised``: there the batch
    holds ``labelled`` and ``unlabelled`` clouds, and the ``TemporalVoting`` callback puts voted labels of an EMA teacher into the latter
    before the step.

    Saves: backbone and linear layer.

    Refuses: unlabelled clouds without voted labels; a checkpoint of another architecture; a training without an end.

    Args:
        backbone_3d: (points, points_per_sample) -> ``VoxelFeatures`` with an attribute ``out_channels``, such as
            ``MinkUNet``.
        num_outputs: Width of the linear layer; 17 for nuScenes: 16 classes and the ignored one.
        ignore_index: Label that takes no part in loss and metric.
        class_names: Names of the classes without the ignored one; None numbers them.
        pretrained: Checkpoint whose ``backbone_3d.`` weights are loaded; None starts at random.
        protocol: ``linear_probe`` trains the linear layer alone on the frozen backbone, ``finetune`` trains all.
        lp_bn_train: In a linear probe, keep batch norm in batch-statistics mode and its running means moving, as the
            official code does by accident; False is a frozen backbone in the strict sense.
        lovasz_weight: Factor of the Lovasz term.
        unlabelled_weight: Factor of the loss on voted pseudo-labels.
        learning_rate: Peak of the one-cycle schedule.
        weight_decay: AdamW's weight decay.
        pct_start: Share of the steps in which the learning rate rises.
    """

    panels: ClassVar[tuple[Panel, ...]] = (
        Curve(
            "Segmentation loss", ("segmentor/loss", "segmentor/loss_ce", "segmentor/loss_lovasz", "segmentor/loss_unlabelled"), goal="min"
        ),
        *PointEvaluation.panels,
    )

    def __init__(
        self,
        backbone_3d: nn.Module,
        num_outputs: int = 17,
        ignore_index: int = 16,
        class_names: Sequence[str] | None = None,
        pretrained: Path | None = None,
        protocol: Literal["linear_probe", "finetune"] = "finetune",
        lp_bn_train: bool = False,
        lovasz_weight: float = 2.0,
        unlabelled_weight: float = 1.0,
        learning_rate: float = 0.001,
        weight_decay: float = 0.01,
        pct_start: float = 0.2,
    ) -> None:
        super().__init__()
        checks.at_least(2, "outputs", num_outputs=num_outputs)
        checks.at_least(0, lovasz_weight=lovasz_weight, unlabelled_weight=unlabelled_weight, weight_decay=weight_decay)
        checks.positive(learning_rate=learning_rate)
        checks.within("(0, 1)", "the share of the steps that rise", pct_start=pct_start)
        self.save_hyperparameters(ignore=["backbone_3d"])
        self.backbone_3d = backbone_3d
        if pretrained is not None:
            load_into(backbone_3d, pretrained, "backbone_3d.")
        self.head = nn.Linear(int(backbone_3d.out_channels), num_outputs)  # type: ignore[arg-type]
        if protocol == "linear_probe":
            backbone_3d.requires_grad_(False)
        self._judge_classes(num_outputs, ignore_index, class_names)
        self.train(self.training)  # Lightning never calls train() before a first validation

    def train(self, mode: bool = True) -> "PointSegmentor":
        """A probed backbone stays in evaluation mode, unless ``lp_bn_train``."""
        super().train(mode)
        if self.hparams["protocol"] == "linear_probe" and not self.hparams["lp_bn_train"]:
            self.backbone_3d.eval()
        return self

    def point_logits(self, batch: dict[str, Any]) -> Tensor:
        """(N, num_outputs) logits of every point of a cloud; ``TemporalVoting`` refines what this returns outside training."""
        voxels = self.backbone_3d(batch["points"], batch["points_per_sample"])
        return self.head(voxels.features)[voxels.point2voxel]

    def _losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        voxels = self.backbone_3d(batch["points"], batch["points_per_sample"])
        hp = self.hparams
        return segmentation_losses(self.head(voxels.features), batch["labels"][voxels.first_point], hp["ignore_index"], hp["lovasz_weight"])

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Supervised loss, plus the weighted loss on voted labels in semi-supervised training."""
        labelled = batch.get("labelled", batch)
        losses = self._losses(labelled)
        loss = losses["total"]
        logs = {"loss_ce": losses["ce"], "loss_lovasz": losses["lovasz"]}
        if "unlabelled" in batch:
            if "labels" not in batch["unlabelled"]:
                raise ValueError("batch['unlabelled'] has no labels: add the EMATeacher and TemporalVoting (pseudo_labels: true) callbacks")
            logs["loss_unlabelled"] = self._losses(batch["unlabelled"])["total"]
            loss = loss + self.hparams["unlabelled_weight"] * logs["loss_unlabelled"]
        size = len(labelled["token"])
        self.log_dict({f"segmentor/{name}": value.detach() for name, value in logs.items()}, batch_size=size)
        self.log("segmentor/loss", loss.detach(), prog_bar=True, batch_size=size)
        return loss

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW with one cycle over what is trained."""
        hp = self.hparams
        return adamw_one_cycle(self, learning_rate=hp["learning_rate"], weight_decay=hp["weight_decay"], pct_start=hp["pct_start"])
