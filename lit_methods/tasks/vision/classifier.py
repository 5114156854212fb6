"""Image classification with any network: the module that techniques for classifiers attach to."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError, MulticlassConfusionMatrix

from lit_methods import checks
from lit_methods.evaluated import Evaluated, Part
from lit_methods.optim import learning_rate_factor, scheduled
from lit_methods.panels import Curve, Panel, TableMedia, TablePanel
from lit_methods.runs.checkpoints import load_into
from lit_methods.steps import log_global, steps_per_epoch, training_length

Loss = Literal["cross_entropy", "bce"]
Schedule = Literal["constant", "cosine", "multistep"]
_LARGEST_TABLE = 20  # classes


# ---- the maths -------------------------------------------------------------------------------------------------------------------------


def classification_loss(logits: Tensor, targets: Tensor, loss: Loss = "cross_entropy", label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy, or the mean of C binary cross-entropies.

    Label smoothing mixes the targets with the uniform distribution: ``(1 - s) * target + s / C``.

    Args:
        logits: (B, C) floating point.
        targets: (B,) int64 classes, or (B, C) shares of the classes that sum to 1.
        loss: ``cross_entropy``: softmax, mean over samples. ``bce``: sigmoid, mean over samples and classes, as in "ResNet strikes back"
            (arXiv:2110.00476).
        label_smoothing: s in [0, 1].

    Returns:
        Scalar >= 0 in float32 or wider.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if loss == "cross_entropy":
            targets = targets.to(logits.dtype) if targets.ndim == 2 else targets
            return F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
        classes = logits.shape[1]
        shares = F.one_hot(targets, classes) if targets.ndim == 1 else targets
        shares = shares.to(logits.dtype) * (1 - label_smoothing) + label_smoothing / classes
        return F.binary_cross_entropy_with_logits(logits, shares)


def mixup(images: Tensor, labels: Tensor, share: Tensor | float, num_classes: int) -> tuple[Tensor, Tensor]:
    """Each image mixed with its counterpart in the reversed batch: mixup (arXiv:1710.09412) with the pairing that timm uses.

    Args:
        images: (B, ...) floating point.
        labels: (B,) int64 in 0..num_classes-1.
        share: Share of the image itself, in [0, 1]; the counterpart has the rest.
        num_classes: C.

    Returns:
        (B, ...) images and (B, C) shares of the classes, in the dtype of ``images``.
    """
    targets = F.one_hot(labels, num_classes).to(images.dtype)
    return share * images + (1 - share) * images.flip(0), share * targets + (1 - share) * targets.flip(0)


# ---- the module ------------------------------------------------------------------------------------------------------------------------


class ImageClassifier(Evaluated):
    """Trains a network to tell the classes of images.

    Runs: batches have ``image`` (B, C, H, W) float32 and ``label`` (B,) int64, such as those of ``DigitsDataModule``, ``CIFARDataModule``
    and ``ImageNetDataModule``. ``forward`` takes the images and returns (B, num_classes) logits. Evaluation counts every image once on any
    number of ranks, without mixup and label smoothing; in training under mixup, accuracy means hits of the class whose share is larger. The
    test also gives the expected calibration error in 15 bins (arXiv:1706.04599).

    Saves: the network.

    Refuses: a cosine in a training without an end; epochs of a loader without a length.

    Args:
        network: Images -> (B, num_classes) logits, such as ``MLP``, ``CifarResNet`` or ``TimmNetwork``.
        num_classes: Number of classes.
        class_names: For the table of confusions; None numbers the classes.
        optimizer: ``sgd``, ``adam`` (weight decay joins the gradient) or ``adamw`` (decoupled).
        learning_rate: The full one, after the warm-up.
        base_batch_size: Multiply ``learning_rate``, ``warmup_lr`` and ``min_lr`` by (samples per optimiser step, all ranks and accumulated
            batches counted) / ``base_batch_size``; None: take them as they are.
        momentum: SGD's momentum.
        nesterov: Nesterov momentum for SGD.
        betas: Adam's and AdamW's two momentum decay rates.
        eps: Adam's and AdamW's addend to the denominator.
        weight_decay: Factor of the optimiser.
        no_decay_norms: Leave biases, norms and whatever the network lists in ``no_weight_decay()`` without weight decay.
        schedule: ``constant``, ``cosine`` or ``multistep``; changes with every optimiser step.
        milestones: Epochs at which ``multistep`` multiplies the learning rate by ``gamma``.
        gamma: See ``milestones``.
        warmup_epochs: Epochs of linear rise from ``warmup_lr``; may be a fraction; 0: none.
        warmup_lr: Learning rate of the first step of a warm-up.
        min_lr: Where the cosine ends.
        loss: ``cross_entropy``, or ``bce``: a binary cross-entropy for each class.
        label_smoothing: 0 to 1; of the training loss.
        mixup: Parameter of the Beta distribution from which each batch draws its share, > 0; 0: no mixup. Drawn from torch's global
            generator of the CPU, which the ``ExactResume`` callback keeps in the checkpoint.
        pretrained: Checkpoint that ``network`` starts from; None: as it was built.
        pretrained_prefix: What stands before the network's names in that file: ``network.`` in the checkpoints of this class, ``""`` in a
            state dict of the network alone.

    Raises:
        ValueError: A value lies outside its range, or ``pretrained`` doesn't fit the network.
    """

    panels: ClassVar[tuple[Panel, ...]] = (
        Curve("Classification loss", ("classifier/loss", "classifier/val_loss", "classifier/test_loss"), goal="min"),
        Curve(
            "Accuracy",
            ("classifier/accuracy", "classifier/val_accuracy", "classifier/test_accuracy"),
            note="Training: of single batches. Held-out: over all images.",
            goal="max",
        ),
        Curve("Calibration error on test", ("classifier/test_ece",), note="|confidence - accuracy|, 15 bins.", goal="min"),
        TablePanel("Confusions", "classifier/confusion", note="Rows: true class. Columns: images that were given this class."),
    )

    def __init__(
        self,
        network: nn.Module,
        num_classes: int = 10,
        class_names: Sequence[str] | None = None,
        optimizer: Literal["sgd", "adam", "adamw"] = "sgd",
        learning_rate: float = 0.1,
        base_batch_size: int | None = None,
        momentum: float = 0.9,
        nesterov: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        no_decay_norms: bool = False,
        schedule: Schedule = "cosine",
        milestones: Sequence[int] = (),
        gamma: float = 0.1,
        warmup_epochs: float = 0.0,
        warmup_lr: float = 0.0,
        min_lr: float = 0.0,
        loss: Loss = "cross_entropy",
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        pretrained: Path | None = None,
        pretrained_prefix: str = "network.",
    ) -> None:
        super().__init__()
        checks.at_least(2, "classes", num_classes=num_classes)
        checks.literals(ImageClassifier, locals())
        checks.positive(learning_rate=learning_rate)
        checks.share(label_smoothing=label_smoothing)
        checks.within("[0, 1)", momentum=momentum)
        checks.betas(betas=betas)
        checks.at_least(1, "samples", base_batch_size=base_batch_size)
        checks.at_least(0, eps=eps, weight_decay=weight_decay, gamma=gamma, warmup_epochs=warmup_epochs, warmup_lr=warmup_lr, min_lr=min_lr)
        checks.at_least(0, mixup=mixup)
        for epoch in milestones:
            checks.at_least(0, "an epoch", milestones=epoch)
        if schedule == "multistep" and not milestones:
            raise ValueError("schedule='multistep' needs milestones: give the epochs at which the learning rate falls, such as [80, 120]")
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(f"class_names has {len(class_names)} names, but num_classes={num_classes}")
        self.save_hyperparameters(ignore=["network"])
        self.network = network
        if pretrained is not None:
            load_into(network, pretrained, pretrained_prefix)
        self.class_names = tuple(class_names or (str(c) for c in range(num_classes)))
        self.eval_loss = MeanMetric()
        self.eval_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.eval_confusion = MulticlassConfusionMatrix(num_classes) if num_classes <= _LARGEST_TABLE else None
        self.eval_calibration = MulticlassCalibrationError(num_classes, n_bins=15, norm="l1")

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) images -> (B, num_classes) logits."""
        return self.network(images)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Loss of a batch."""
        hp, images, labels = self.hparams, batch["image"], batch["label"]
        targets = labels
        if hp["mixup"] > 0:
            alpha = torch.tensor(float(hp["mixup"]))
            share = torch.distributions.Beta(alpha, alpha).sample()  # stays on the CPU, where a scalar goes with any device
            images, targets = mixup(images, labels, share, hp["num_classes"])
        logits = self(images)
        loss = classification_loss(logits, targets, hp["loss"], hp["label_smoothing"])
        likeliest = targets.argmax(dim=1) if targets.ndim == 2 else targets
        size = len(labels)
        self.log("classifier/loss", loss.detach(), prog_bar=True, batch_size=size)
        self.log("classifier/accuracy", (logits.detach().argmax(dim=1) == likeliest).float().mean(), batch_size=size)
        return loss

    def _evaluate(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        logits, labels = self(batch["image"]), batch["label"]
        self.eval_loss.update(classification_loss(logits, labels, self.hparams["loss"]), weight=len(labels))
        predicted = logits.argmax(dim=1)
        self.eval_accuracy.update(predicted, labels)
        if self.eval_confusion is not None:
            self.eval_confusion.update(predicted, labels)
        if self.trainer.testing:
            self.eval_calibration.update(logits.float().softmax(dim=1), labels)

    def _log_evaluation(self, part: Part) -> None:
        figures = {f"classifier/{part}_loss": self.eval_loss.compute(), f"classifier/{part}_accuracy": self.eval_accuracy.compute()}
        log_global(self, figures, prog_bar=True)
        self.eval_loss.reset()
        self.eval_accuracy.reset()
        if self.eval_confusion is not None:
            counts = self.eval_confusion.compute().tolist()
            rows = tuple((name, *row) for name, row in zip(self.class_names, counts, strict=True))
            self._media["classifier/confusion"] = TableMedia(("true class", *self.class_names), rows)
            self.eval_confusion.reset()
        if part == "test":
            log_global(self, {"classifier/test_ece": self.eval_calibration.compute()})
            self.eval_calibration.reset()

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Logits and labels of a batch.

        Returns:
            ``logits`` (B, num_classes), and ``label`` (B,) int64 as it stands in the batch, where it has one.
        """
        return {"logits": self(batch["image"])} | ({"label": batch["label"]} if "label" in batch else {})

    # ---- optimiser -------------------------------------------------------------------------------------------------------------------

    def parameter_groups(self) -> list[dict[str, object]]:
        """Trainable parameters; with ``no_decay_norms`` in two groups, those with and those without weight decay."""
        trained = {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}
        if not self.hparams["no_decay_norms"]:
            return [{"params": list(trained.values())}]
        listed = {f"network.{name}" for name in getattr(self.network, "no_weight_decay", set)()}
        bare = {name for name, parameter in trained.items() if parameter.ndim < 2 or name in listed}
        decayed = [parameter for name, parameter in trained.items() if name not in bare]
        return [{"params": decayed}, {"params": [trained[name] for name in trained if name in bare], "weight_decay": 0.0}]

    def _batch_factor(self) -> float:
        base = self.hparams["base_batch_size"]
        if base is None:
            return 1.0
        size = getattr(self.trainer.train_dataloader, "batch_size", None)
        if size is None:
            raise ValueError(f"base_batch_size={base} needs one training loader with a batch_size: set it to null and scale by hand")
        return size * self.trainer.world_size * self.trainer.accumulate_grad_batches / base

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Optimiser and learning rate per step."""
        hp = self.hparams
        in_epochs = hp["schedule"] == "multistep" or hp["warmup_epochs"]
        per_epoch = steps_per_epoch(self, "milestones and warmup_epochs" if in_epochs else None)
        total = training_length(self, what="schedule='cosine'", instead=None) if hp["schedule"] == "cosine" else -1
        rate = hp["learning_rate"]
        groups, decay = self.parameter_groups(), hp["weight_decay"]
        scaled = rate * self._batch_factor()
        optimizer: torch.optim.Optimizer
        if hp["optimizer"] == "sgd":
            optimizer = torch.optim.SGD(groups, lr=scaled, momentum=hp["momentum"], nesterov=hp["nesterov"], weight_decay=decay)
        else:
            kind = torch.optim.AdamW if hp["optimizer"] == "adamw" else torch.optim.Adam
            optimizer = kind(groups, lr=scaled, betas=tuple(hp["betas"]), eps=hp["eps"], weight_decay=decay)

        def factor(step: int) -> float:
            return learning_rate_factor(
                step,
                total_steps=total,
                steps_per_epoch=per_epoch,
                schedule=hp["schedule"],
                milestones=hp["milestones"],
                gamma=hp["gamma"],
                warmup_epochs=hp["warmup_epochs"],
                warmup_start=hp["warmup_lr"] / rate,
                minimum=hp["min_lr"] / rate,
            )

        return scheduled(optimizer, factor)


__all__ = ["ImageClassifier", "classification_loss", "mixup"]
