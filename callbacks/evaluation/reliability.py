"""How far a classifier can be trusted: calibration, likelihood, unknown inputs, small adversarial changes.

The measures that "The Unreasonable Effectiveness of Random Pruning" (arXiv:2202.02643) reports beside accuracy. They are common ones:
expected calibration error (Guo et al., arXiv:1706.04599), maximum softmax probability as a detector of unknown inputs (Hendrycks and
Gimpel, arXiv:1610.02136), fast gradient sign method (Goodfellow et al., arXiv:1412.6572).
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from lit_methods import distributed
from lit_methods.callbacks.batch import Key, inputs_and_labels, logits_of, require_logits
from lit_methods.callbacks.evaluation.callback import EvaluationCallback, Split
from lit_methods.callbacks.twin import observed
from lit_methods.checks import at_least
from lit_methods.panels import Curve, Panel
from lit_methods.steps import log_global


def calibration_error(confidence: Tensor, correct: Tensor, bins: int = 15) -> Tensor:
    """Expected calibration error: mean over samples of |accuracy - mean confidence| of their bin (arXiv:1706.04599, eq. 3).

    Args:
        confidence: (N,) probability of the predicted class, in [0, 1].
        correct: (N,) bool, or 0 and 1.
        bins: Number of bins of equal width; bin k holds confidences in ((k - 1) / bins, k / bins], the first one also 0.

    Returns:
        Scalar in [0, 1] in the dtype of ``confidence``; NaN for N = 0.
    """
    edges = torch.arange(1, bins, device=confidence.device, dtype=confidence.dtype) / bins
    index = torch.bucketize(confidence, edges)
    gap = torch.zeros(bins, device=confidence.device, dtype=confidence.dtype)
    return gap.index_add(0, index, correct.to(confidence.dtype) - confidence).abs().sum() / len(confidence)


def negative_log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, C) logits, (B,) classes -> (B,) -log p(label), in nats."""
    return F.cross_entropy(logits, labels, reduction="none")


def detection_auroc(known: Tensor, unknown: Tensor) -> Tensor:
    """Area under the ROC curve of telling known from unknown inputs by a score that should be higher for known ones.

    Args:
        known: (N,) scores, such as maximum softmax probabilities, in [0, 1].
        unknown: (M,) scores of inputs from elsewhere.

    Returns:
        Scalar in [0, 1]; 0.5 is chance. It is the probability that a known input scores higher, ties counted half.
    """
    truth = torch.cat([torch.ones_like(known), torch.zeros_like(unknown)]).long()
    return binary_auroc(torch.cat([known, unknown]), truth)


def fast_gradient_sign(images: Tensor, gradient: Tensor, epsilon: Tensor | float, low: Tensor | float, high: Tensor | float) -> Tensor:
    """Images moved by ``epsilon`` along the sign of the loss's gradient, inside [low, high] (arXiv:1412.6572, section 4).

    Args:
        images: (B, ...) floating point.
        gradient: dL/d images, same shape.
        epsilon: >= 0, in units of ``images``, or a tensor that broadcasts: one value a channel for normalised images.
        low: Smallest value that an image may have; a number, or a tensor that broadcasts.
        high: Largest value, in the same form.
    """
    moved = images + epsilon * gradient.sign()
    bounds = [bound if isinstance(bound, Tensor) else images.new_tensor(bound) for bound in (low, high)]
    return moved.clamp(*bounds)


class Reliability(EvaluationCallback):
    """Logs calibration error, likelihood, accuracy under attack and detection of unknown inputs, for any classifier.

    Runs: after each validation and test batch one forward pass, and for the attack a forward pass, a backward pass to the inputs and
    another forward pass, in evaluation mode; with ``unknown``, one pass over its validation (or test) loader at the end. Random numbers
    and gradients of weights aren't touched. All ranks' samples count together. The sanity check before fit measures as well, and logs
    nothing: what can't be measured is refused before the first step.
    Saves: nothing.
    Refuses: modules without logits, batches and logits of another form.

    Args:
        logits: Method or submodule that maps the inputs of a batch to (B, classes) logits; ``forward``: the module itself.
        inputs: Key or position of the inputs in a batch; null: ``image``, or 0.
        labels: Key or position of the labels; null: ``label``, or 1.
        bins: Number of bins of the calibration error.
        fgsm_epsilon: Size of the attack in units of pixels in [0, 1]; 0: no attack.
        mean: Per channel, what was subtracted from pixels in [0, 1].
        std: Per channel, what they were divided by then.
        unknown: Datamodule whose inputs belong to none of the classes, such as CIFAR-100 for a network of CIFAR-10; null: none.
            It must treat pixels as the module's own datamodule does (mean, standard deviation, size).
        every_n_epochs: Validation epochs from one measurement to the next; testing always measures.

    Raises:
        TypeError: In ``setup``, the module has nothing to get logits from.
        ValueError: An argument out of range; while running, batches or logits of another form.
    """

    runs_before: ClassVar[Sequence[str]] = ("Dashboard",)
    panels: ClassVar[tuple[Panel, ...]] = (
        Curve("Calibration error", ("reliability/val_ece", "reliability/test_ece"), note="|confidence - accuracy| in bins.", goal="min"),
        Curve("Negative log-likelihood", ("reliability/val_nll", "reliability/test_nll"), goal="min"),
        Curve(
            "Accuracy, clean and under attack",
            ("reliability/val_accuracy", "reliability/val_fgsm_accuracy", "reliability/test_accuracy", "reliability/test_fgsm_accuracy"),
            goal="max",
        ),
        Curve(
            "Detection of unknown inputs (AUROC)",
            ("reliability/val_ood_auroc", "reliability/test_ood_auroc"),
            note="By the largest softmax probability; 0.5 is chance.",
            goal="max",
        ),
    )

    def __init__(
        self,
        logits: str = "forward",
        inputs: Key = None,
        labels: Key = None,
        bins: int = 15,
        fgsm_epsilon: float = 8 / 255,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        unknown: pl.LightningDataModule | None = None,
        every_n_epochs: int = 1,
    ) -> None:
        super().__init__()
        at_least(1, bins=bins, every_n_epochs=every_n_epochs)
        if not 0 <= fgsm_epsilon <= 1:
            raise ValueError(
                f"fgsm_epsilon is {fgsm_epsilon}: pixels lie in [0, 1], so give a number from 0 to 1, such as 0.0314 for 8/255"
            )
        if len(mean) != len(std) or min(std, default=0.0) <= 0:
            raise ValueError(f"mean={list(mean)} and std={list(std)} must have one number a channel each, std above 0")
        self.logits, self.inputs, self.labels, self.bins = logits, inputs, labels, bins
        self.fgsm_epsilon, self.mean, self.std = fgsm_epsilon, tuple(mean), tuple(std)
        self.unknown, self.every_n_epochs = unknown, every_n_epochs
        self._twin: pl.LightningModule | None = None  # what is run on the attacked and unknown inputs
        self._rows: list[Tensor] = []  # per batch (B, 4): confidence, hit, -log p, hit under attack

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a module without logits; read the unknown inputs."""
        super().setup(trainer, pl_module, stage)
        self.when_built(pl_module, lambda: require_logits(pl_module, self.logits, type(self).__name__))
        if self.unknown is not None and stage != "predict":
            self.unknown.prepare_data()
            self.unknown.setup("validate")

    def begin_evaluation(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: Split) -> None:
        """Forget the epoch before."""
        self._rows, self._twin = [], None

    def leave(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let go of the copy."""
        self._twin = None

    def _skipped(self, trainer: pl.Trainer) -> bool:
        fitting = trainer.state.fn == "fit" and not trainer.sanity_checking
        return fitting and (trainer.current_epoch + 1) % self.every_n_epochs != 0

    def evaluate_batch(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, split: Split, dataloader_idx: int
    ) -> None:
        """Measure a batch of the first loader."""
        if dataloader_idx == 0 and not self._skipped(trainer):
            if self._twin is None:
                self._twin = observed(trainer, pl_module, type(self).__name__)
            with isolate_rng(pl_module.device.type == "cuda"):
                self._measure(self._twin, batch)

    def _measure(self, pl_module: pl.LightningModule, batch: Any) -> None:
        images, labels = (part.to(pl_module.device) for part in inputs_and_labels(batch, self.inputs, self.labels))
        with torch.inference_mode(False), torch.enable_grad():
            images, labels = images.detach().clone(), labels.clone()  # out of inference mode, which knows no gradients
            attacked = self.fgsm_epsilon > 0
            logits = logits_of(pl_module, self.logits, images.requires_grad_(attacked)).float()
            losses = negative_log_likelihood(logits, labels)
            confidence, predicted = logits.detach().softmax(1).max(1)
            hit = predicted == labels
            hit_attacked = torch.zeros_like(hit)
            if attacked:
                (gradient,) = torch.autograd.grad(losses.sum(), images)
                shape = (-1, *[1] * (images.ndim - 2))
                mean, std = images.new_tensor(self.mean).view(shape), images.new_tensor(self.std).view(shape)
                worse = fast_gradient_sign(images.detach(), gradient, self.fgsm_epsilon / std, -mean / std, (1 - mean) / std)
                with torch.no_grad():
                    hit_attacked = logits_of(pl_module, self.logits, worse).argmax(1) == labels
        self._rows.append(torch.stack([confidence, hit, losses.detach(), hit_attacked], dim=1).float())

    def end_evaluation(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: Split) -> None:
        """Log all samples of all ranks together."""
        if self._skipped(trainer) or trainer.sanity_checking:
            self._rows, self._twin = [], None
            return
        mine = torch.cat([torch.empty(0, 4, device=pl_module.device), *self._rows])
        confidence, hit, loss, attacked = distributed.gather_rows(mine, with_grad=False).T.contiguous()
        values = {"accuracy": hit.mean(), "ece": calibration_error(confidence, hit, self.bins), "nll": loss.mean()}
        if self.fgsm_epsilon > 0:
            values["fgsm_accuracy"] = attacked.mean()
        if self.unknown is not None:
            values["ood_auroc"] = detection_auroc(confidence, self._unknown_confidence(self._twin or pl_module))
        log_global(pl_module, {f"reliability/{split}_{name}": value for name, value in values.items()})
        self._rows, self._twin = [], None

    @torch.no_grad()
    def _unknown_confidence(self, pl_module: pl.LightningModule) -> Tensor:
        """Largest softmax probabilities of all unknown inputs; every rank sees all of them."""
        assert self.unknown is not None
        confidences = []
        with isolate_rng(pl_module.device.type == "cuda"):  # a loader takes a seed for its workers from the global generator
            for batch in self.unknown.val_dataloader():
                images = inputs_and_labels(batch, self.inputs, self.labels)[0].to(pl_module.device)
                confidences.append(logits_of(pl_module, self.logits, images).float().softmax(1).amax(1))
        return torch.cat(confidences)
