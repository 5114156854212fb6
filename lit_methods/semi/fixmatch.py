"""FixMatch: pseudo labels from weak views for strong ones (arXiv:2001.07685), and what the methods built on it share.

Golden vectors of its loss are among ShrinkMatch's (``out_loss_certain`` and ``out_loss_certain_hard_label``).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from lit_methods.distributed import gather_rows
from lit_methods.optim import scheduled, seven_sixteenths_cosine, warmup_then_epoch_cosine
from lit_methods.panels import Curve, Media, Panel, TableMedia, TablePanel
from lit_methods.semi.alignment import MarginalQueue, align, moving_marginal
from lit_methods.semi.shrink import certain_loss
from lit_methods.steps import steps_per_epoch, training_length

Alignment = Literal["none", "queue", "ema"]
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


class SemiSupervised(LightningModule):
    """Base: a backbone with a linear head, evaluation, optimiser and the diagnostics of pseudo labels.

    Subclasses give :meth:`losses`. ``forward`` gives logits. Evaluation uses the weights as they are: attach ``WeightEMA``.

    Logged: ``semi/loss``, ``semi/labelled_loss`` and the subclass's parts; ``semi/mask_ratio``, the share of unlabelled images above the
    threshold; ``semi/pseudo_accuracy``, the accuracy of their pseudo labels where the true ones are known; ``semi/val_accuracy``,
    ``semi/val_loss``, ``semi/test_accuracy``; a table of both per class after each validation.
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
        if num_classes < 2 or feature_dim < 1:
            raise ValueError(f"num_classes={num_classes}, feature_dim={feature_dim}: give 2 or more classes, and the width of the backbone")
        if schedule not in get_args(Schedule):
            raise ValueError(f"schedule={schedule!r} is not one of {', '.join(get_args(Schedule))}")
        if learning_rate <= 0:
            raise ValueError(f"learning_rate={learning_rate}: give a number above 0")
        self.backbone, self.head = backbone, nn.Linear(feature_dim, num_classes)
        self.feature_dim, self.num_classes = feature_dim, num_classes
        self._recipe = (learning_rate, momentum, weight_decay, no_decay_norms, schedule, warmup_epochs)
        self.eval_loss = MeanMetric()
        self.eval_accuracy = MulticlassAccuracy(num_classes, average="micro")
        for name in ("seen", "covered", "right"):  # per class, since the last validation
            self.register_buffer(name, torch.zeros(num_classes, dtype=torch.int64))
        self._media: dict[str, Media] = {}

    def features(self, images: Tensor) -> Tensor:
        """(B, ...) images -> (B, feature_dim).

        Raises:
            ValueError: The backbone gives something else.
        """
        found = self.backbone(images)
        if found.ndim != 2 or found.shape[1] != self.feature_dim:
            raise ValueError(
                f"the backbone gives {tuple(found.shape)} for {len(images)} images, expected (.., feature_dim={self.feature_dim}): "
                "take off its classifier (timm: num_classes=0) and set feature_dim to its width"
            )
        return found

    def forward(self, images: Tensor) -> Tensor:
        """(B, ...) images -> (B, C) logits."""
        return self.head(self.features(images))

    def losses(self, batch: SemiBatch) -> dict[str, Tensor]:
        """``loss``, and parts of it that are logged under their names."""
        raise NotImplementedError

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The total loss."""
        found = self.losses(take_apart(batch))
        loss = found.pop("loss")
        self.log("semi/loss", loss.detach(), prog_bar=True)
        self.log_dict({f"semi/{name}": value.detach() for name, value in found.items()})
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

    def _evaluate(self, batch: dict[str, Tensor]) -> None:
        logits = self(batch["image"]).float()
        self.eval_loss.update(F.cross_entropy(logits, batch["label"]), weight=len(logits))
        self.eval_accuracy.update(logits.argmax(dim=1), batch["label"])

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Adds a batch to the metrics."""
        self._evaluate(batch)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Adds a batch to the metrics."""
        self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        """Accuracy over all ranks, and the table of pseudo labels."""
        self._log_evaluation("val")
        counts = torch.stack([gather_rows(c[None], with_grad=False).sum(0) for c in (self.seen, self.covered, self.right)]).tolist()
        names = getattr(getattr(self.trainer, "datamodule", None), "class_names", ()) or range(self.num_classes)
        rows = tuple((str(name), *own) for name, *own in zip(names, *counts, strict=True))
        self._media["semi/pseudo_labels"] = TableMedia(("class", "unlabelled images", "above the threshold", "right"), rows)
        for counter in (self.seen, self.covered, self.right):
            counter.zero_()

    def on_test_epoch_end(self) -> None:
        """Accuracy over all ranks."""
        self._log_evaluation("test")

    def _log_evaluation(self, stage: str) -> None:
        for name, metric in (("loss", self.eval_loss), ("accuracy", self.eval_accuracy)):
            self.log(f"semi/{stage}_{name}", metric.compute(), prog_bar=True)
            metric.reset()

    def dashboard_media(self) -> dict[str, Media]:
        """The table."""
        return self._media

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


class FixMatch(SemiSupervised):
    """Cross-entropy of the labelled images, and of the strong views of those unlabelled ones whose weak view is certain.

    One forward pass takes labelled, weak and strong images together, so that batch norm has the statistics of all three. With
    ``unlabelled_weight: 0`` it is supervised training with the same passes.

    Works with any precision (distributions are made in float32), DDP (batch means are those of all ranks) and accumulation (running means
    advance once for each micro-batch). Saved: the running means. Logged beside the base's: ``semi/unlabelled_loss``, and
    ``semi/contributing``, the share of unlabelled images that it learns from.

    Args:
        backbone: (B, ...) images -> (B, feature_dim).
        feature_dim: Width of the backbone's output.
        num_classes: C.
        threshold: tau, the least probability of a certain prediction.
        unlabelled_weight: lambda_u.
        hard_labels: The target is the likeliest class (FixMatch); else the whole distribution.
        distribution_alignment: ``none``; ``queue``: by the mean of the last batch means; ``ema``: by a moving average (0.999).
        queue_length: Batch means in the queue.
        learning_rate: Full one.
        momentum: Nesterov momentum of SGD.
        weight_decay: Not for parameters with one dimension, unless ``no_decay_norms`` is off.
        no_decay_norms: See there.
        schedule: ``seven_sixteenths``: cos(7 pi t / 16 T) per step; ``epoch_cosine``: half a cosine per epoch; ``constant``.
        warmup_epochs: Epochs of linear rise.

    Raises:
        ValueError: An argument outside its range.
    """

    marginal: Tensor
    marginal_known: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        feature_dim: int,
        num_classes: int,
        threshold: float = 0.95,
        unlabelled_weight: float = 1.0,
        hard_labels: bool = True,
        distribution_alignment: Alignment = "none",
        queue_length: int = 32,
        learning_rate: float = 0.03,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        no_decay_norms: bool = True,
        schedule: Schedule = "seven_sixteenths",
        warmup_epochs: int = 0,
    ) -> None:
        super().__init__(backbone, feature_dim, num_classes, learning_rate, momentum, weight_decay, no_decay_norms, schedule, warmup_epochs)
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold={threshold} is a probability: give more than 0, at most 1")
        if distribution_alignment not in get_args(Alignment):
            raise ValueError(f"distribution_alignment={distribution_alignment!r} is not one of {', '.join(get_args(Alignment))}")
        self.save_hyperparameters(ignore=["backbone"])
        self.threshold, self.unlabelled_weight, self.hard_labels = threshold, unlabelled_weight, hard_labels
        self.distribution_alignment = distribution_alignment
        self.marginals = MarginalQueue(queue_length, num_classes) if distribution_alignment == "queue" else None
        if distribution_alignment == "ema":
            self.register_buffer("marginal", torch.zeros(num_classes))
            self.register_buffer("marginal_known", torch.zeros((), dtype=torch.bool))

    @torch.no_grad()
    def weak_prediction(self, logits: Tensor) -> Tensor:
        """(B, C) logits of the weak views -> distributions after alignment; the running mean advances."""
        raw = logits.float().softmax(dim=1)
        if self.distribution_alignment == "none":
            return raw
        mean = gather_rows(raw, with_grad=False).mean(dim=0)
        if self.marginals is not None:
            return align(raw, self.marginals.push(mean))
        advance(self.marginal, self.marginal_known, mean, 0.999)
        return align(raw, self.marginal)

    def unlabelled_loss(self, strong_logits: Tensor, strong_features: Tensor, p: Tensor, certain: Tensor) -> dict[str, Tensor]:
        """``unlabelled``, what is added to the labelled loss before the weight, and parts to log."""
        return {"unlabelled": certain_loss(strong_logits, p, certain, self.hard_labels), "contributing": certain.float().mean()}

    def losses(self, batch: SemiBatch) -> dict[str, Tensor]:
        """Labelled loss plus weighted unlabelled loss; the mean over strong views if there are several."""
        sizes = [len(batch.image), len(batch.weak), *map(len, batch.strong)]
        if len({view.shape[1:] for view in batch.strong} | {batch.weak.shape[1:]}) > 1:
            raise ValueError(f"{type(self).__name__} passes all views at once, so they need one size: set strong_views to 1")
        features = self.features(torch.cat([batch.image, batch.weak, *batch.strong]))
        logits = self.head(features)
        with torch.autocast(logits.device.type, enabled=False):
            labelled, weak, *strong = logits.float().split(sizes)
            p = self.weak_prediction(weak)
            certain = p.amax(dim=1) >= self.threshold
            supervised = F.cross_entropy(labelled, batch.label)
        parts: list[dict[str, Tensor]] = [
            self.unlabelled_loss(one, own, p, certain) for one, own in zip(strong, features.split(sizes)[2:], strict=True)
        ]
        means = {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}
        unlabelled = means.pop("unlabelled")
        observed = self.observe(p.argmax(dim=1), certain, batch.truth)
        return {
            "loss": supervised + self.unlabelled_weight * unlabelled, "labelled_loss": supervised, "unlabelled_loss": unlabelled,
            **means, **observed,
        }  # fmt: skip


@torch.no_grad()
def advance(average: Tensor, known: Tensor, value: Tensor, momentum: float) -> None:
    """:func:`moving_marginal` in place, where the bool tensor ``known`` says whether there is an average yet; it is True from then on."""
    average.copy_(torch.where(known, moving_marginal(average, value, momentum), value))
    known.fill_(True)
