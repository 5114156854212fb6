"""What semi-supervised methods share: the batch, the network with its evaluation and optimiser, the diagnostics of pseudo labels."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from lit_methods import checks
from lit_methods.distributed import gather_rows
from lit_methods.evaluated import Evaluated, Part
from lit_methods.optim import scheduled, seven_sixteenths_cosine, warmup_then_epoch_cosine
from lit_methods.panels import Curve, Panel, TableMedia, TablePanel
from lit_methods.steps import log_global, steps_per_epoch, training_length

Schedule = Literal["seven_sixteenths", "epoch_cosine", "constant"]


@dataclass(frozen=True)
class SemiBatch:
    """A training batch, taken apart; see :class:`~lit_methods.datamodules.SemiSupervisedDataModule`.

    Attributes:
        image: (B_x, ...) labelled images.
        label: (B_x,) int64.
        index: (B_x,) int64, position among the labelled images.
        weak: (B_u, ...).
        strong: S tensors (B_u, ...).
        truth: (B_u,) int64 labels of the unlabelled images, for diagnostics; None where unknown.
    """

    image: Tensor
    label: Tensor
    index: Tensor
    weak: Tensor
    strong: list[Tensor]
    truth: Tensor | None


def take_apart(batch: dict[str, Any]) -> SemiBatch:
    """A batch of labelled and unlabelled images as :class:`SemiBatch`.

    Raises:
        KeyError: Something is missing; the message says what was found.
    """
    try:
        labelled, unlabelled = batch["labelled"], batch["unlabelled"]
        fields = labelled["image"], labelled["label"], labelled["index"], unlabelled["weak"], list(unlabelled["strong"])
    except KeyError as problem:
        have = {name: sorted(part) if isinstance(part, dict) else type(part).__name__ for name, part in batch.items()}
        raise KeyError(
            f"the training batch has no {problem}: semi-supervised training needs labelled image, label, index and unlabelled weak, "
            f"strong; it got {have}. SemiSupervisedDataModule makes such batches of any classification datamodule"
        ) from None
    return SemiBatch(*fields, unlabelled.get("label"))


class SemiSupervised(Evaluated):
    """Base: a backbone with a linear head, evaluation, optimiser and the diagnostics of pseudo labels.

    Subclasses give :meth:`losses`. ``forward`` gives logits. Evaluation uses the weights as they are: attach ``WeightEMA``. Parts of the
    loss are logged as ``semi/<part>``, the counts of pseudo labels as a table per class after each validation.
    """

    panels: ClassVar[tuple[Panel, ...]] = (
        Curve("Loss", ("semi/loss", "semi/labelled_loss"), goal="min"),
        Curve("Accuracy", ("semi/val_accuracy",), goal="max"),
        Curve("Unlabelled images above the threshold", ("semi/mask_ratio",), note="Share of the unlabelled batch."),
        Curve("Accuracy of pseudo labels", ("semi/pseudo_accuracy",), note="Above the threshold; needs the true labels, for diagnosis."),
        TablePanel("Pseudo labels per class", "semi/pseudo_labels", note="Since the last validation."),
    )

    seen: Tensor
    covered: Tensor
    right: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        feature_dim: int,
        num_classes: int,
        learning_rate: float,
        momentum: float,
        weight_decay: float,
        no_decay_norms: bool,
        schedule: Schedule,
        warmup_epochs: int,
    ) -> None:
        super().__init__()
        checks.at_least(2, "classes", num_classes=num_classes)
        checks.at_least(1, "the width of the backbone", feature_dim=feature_dim)
        checks.one_of(Schedule, schedule=schedule)
        checks.positive(learning_rate=learning_rate)
        checks.within("[0, 1)", momentum=momentum)
        checks.at_least(0, weight_decay=weight_decay, warmup_epochs=warmup_epochs)
        self.backbone, self.head = backbone, nn.Linear(feature_dim, num_classes)
        self.feature_dim, self.num_classes = feature_dim, num_classes
        self._recipe = (learning_rate, momentum, weight_decay, no_decay_norms, schedule, warmup_epochs)
        self.eval_loss = MeanMetric()
        self.eval_accuracy = MulticlassAccuracy(num_classes, average="micro")
        for name in ("seen", "covered", "right"):  # per class, since the last validation
            self.register_buffer(name, torch.zeros(num_classes, dtype=torch.int64))

    def features(self, images: Tensor) -> Tensor:
        """(B, ...) images -> (B, feature_dim).

        Raises:
            ValueError: The backbone gives something else.
        """
        features = self.backbone(images)
        if features.ndim != 2 or features.shape[1] != self.feature_dim:
            raise ValueError(
                f"the backbone gives {tuple(features.shape)} for {len(images)} images, expected (.., feature_dim={self.feature_dim}): "
                "take off its classifier (timm: num_classes=0) and set feature_dim to its width"
            )
        return features

    def forward(self, images: Tensor) -> Tensor:
        """(B, ...) images -> (B, C) logits."""
        return self.head(self.features(images))

    def losses(self, batch: SemiBatch) -> dict[str, Tensor]:
        """``loss``, and parts of it that are logged under their names."""
        raise NotImplementedError

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The total loss."""
        parts = self.losses(take_apart(batch))
        loss = parts.pop("loss")
        self.log("semi/loss", loss.detach(), prog_bar=True)
        self.log_dict({f"semi/{name}": value.detach() for name, value in parts.items()})
        return loss

    def observe(self, pseudo_label: Tensor, certain: Tensor, truth: Tensor | None) -> dict[str, Tensor]:
        """Mask ratio, and the accuracy of the pseudo labels above the threshold; counts per class on the way.

        Args:
            pseudo_label: (B,) int64.
            certain: (B,) bool.
            truth: (B,) int64 or None.
        """
        logs = {"mask_ratio": certain.float().mean()}
        if truth is not None:
            right = certain & (pseudo_label == truth)
            for counter, rows in ((self.seen, torch.ones_like(certain)), (self.covered, certain), (self.right, right)):
                counter.scatter_add_(0, truth, rows.long())
            logs["pseudo_accuracy"] = right.sum() / certain.sum()  # NaN where there is none
        return logs

    # ---- evaluation --------------------------------------------------------------------------------------------------------------------

    def _evaluate(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        logits = self(batch["image"]).float()
        self.eval_loss.update(F.cross_entropy(logits, batch["label"]), weight=len(logits))
        self.eval_accuracy.update(logits.argmax(dim=1), batch["label"])

    def on_validation_epoch_end(self) -> None:
        """Accuracy over all ranks, and the table of pseudo labels."""
        super().on_validation_epoch_end()
        counts = torch.stack([gather_rows(c[None], with_grad=False).sum(0) for c in (self.seen, self.covered, self.right)]).tolist()
        known = tuple(getattr(getattr(self.trainer, "datamodule", None), "class_names", ()))[: self.num_classes]
        names = (*known, *range(len(known), self.num_classes))  # the data may have fewer classes than the module
        rows = tuple((str(name), *own) for name, *own in zip(names, *counts, strict=True))
        self._media["semi/pseudo_labels"] = TableMedia(("class", "unlabelled images", "above the threshold", "right"), rows)
        for counter in (self.seen, self.covered, self.right):
            counter.zero_()

    def _log_evaluation(self, part: Part) -> None:
        for name, metric in (("loss", self.eval_loss), ("accuracy", self.eval_accuracy)):
            log_global(self, {f"semi/{part}_{name}": metric.compute()}, prog_bar=True)
            metric.reset()

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """``logits`` (B, C), and ``label`` where the batch has one."""
        return {"logits": self(batch["image"])} | ({"label": batch["label"]} if "label" in batch else {})

    # ---- optimiser ---------------------------------------------------------------------------------------------------------------------

    def trained_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """What the optimiser gets."""
        return ((name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """SGD with Nesterov momentum, a learning rate per step."""
        rate, momentum, decay, no_decay_norms, schedule, warmup = self._recipe
        per_epoch = steps_per_epoch(self, "warmup_epochs" if warmup else f"schedule={schedule!r}" if schedule == "epoch_cosine" else None)
        total = -1 if schedule == "constant" else training_length(self, what=f"schedule={schedule!r}", instead=None)
        own = dict(self.trained_parameters())
        bare = {name for name, parameter in own.items() if parameter.ndim < 2} if no_decay_norms else set()
        groups: list[dict[str, Any]] = [
            {"params": [own[name] for name in own if name not in bare]},
            {"params": [own[name] for name in own if name in bare], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.SGD(
            [group for group in groups if group["params"]], lr=rate, momentum=momentum, nesterov=momentum > 0, weight_decay=decay
        )

        def factor(step: int) -> float:
            if schedule == "seven_sixteenths":
                return seven_sixteenths_cosine(step, total, warmup * per_epoch)
            if schedule == "epoch_cosine":
                return warmup_then_epoch_cosine(step, per_epoch, math.ceil(total / per_epoch), warmup)
            return 1.0

        return scheduled(optimizer, factor)
