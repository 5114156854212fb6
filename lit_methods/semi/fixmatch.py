"""FixMatch: pseudo labels from weak views for strong ones (arXiv:2001.07685), a baseline and what others are built on.

Golden vectors of its loss are among ShrinkMatch's (``out_loss_certain`` and ``out_loss_certain_hard_label``).
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_methods import checks
from lit_methods.distributed import gather_rows
from lit_methods.semi.alignment import MarginalQueue, advance, align
from lit_methods.semi.base import Schedule, SemiBatch, SemiSupervised

Alignment = Literal["none", "queue", "ema"]


def certain_loss(logits: Tensor, probability: Tensor, certain: Tensor, hard: bool = False) -> Tensor:
    """FixMatch's loss: cross-entropy of the strong view with the weak view's prediction, summed over certain rows, divided by all rows.

    Args:
        logits: (B, C) of the strong view.
        probability: (B, C) of the weak view, no gradient.
        certain: (B,) bool.
        hard: The target is the likeliest class; else the whole distribution.

    Returns:
        Scalar.
    """
    target = probability.argmax(dim=1) if hard else probability
    return (F.cross_entropy(logits, target, reduction="none") * certain).mean()


class FixMatch(SemiSupervised):
    """Cross-entropy of the labelled images, and of the strong views of those unlabelled ones whose weak view is certain.

    The loss is H(y, p(x)) + lambda_u mean(1[max p(weak) >= tau] H(p(weak), p(strong))). With ``unlabelled_weight: 0`` it is supervised
    training with the same passes.

    Runs: batches of ``SemiSupervisedDataModule``. One forward pass takes labelled, weak and strong images together, so that batch norm has
    the statistics of all three. Works with any precision (distributions are made in float32), DDP (batch means are those of all ranks) and
    accumulation (running means advance once for each micro-batch). Beside the panels ``semi/unlabelled_loss`` and ``semi/contributing``,
    the share of unlabelled images that it learns from, are logged.

    Saves: the network and the running means.

    Refuses: views of several sizes; a schedule with an end in a training without one.

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
        no_decay_norms: Leave parameters with one dimension, biases and norms, out of weight decay.
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
        checks.within("(0, 1]", "a probability", threshold=threshold)
        checks.one_of(Alignment, distribution_alignment=distribution_alignment)
        checks.at_least(0, unlabelled_weight=unlabelled_weight)
        checks.at_least(1, "batches", queue_length=queue_length)
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
