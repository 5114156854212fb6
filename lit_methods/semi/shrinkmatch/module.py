"""ShrinkMatch: uncertain images are learned from, too, in a class space that is shrunk until they are certain (arXiv:2308.06777).

Golden vectors come from LiheYoung/ShrinkMatch@c4339b8. The maths stand in :mod:`~lit_methods.semi.shrinkmatch.core` and
:mod:`~lit_methods.semi.alignment`. Left out: SimMatch's instance loss, which the authors add on ImageNet.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from lit_methods import checks
from lit_methods.catalog import Technique
from lit_methods.distributed import gather_rows
from lit_methods.panels import Curve, Panel
from lit_methods.semi.alignment import advance
from lit_methods.semi.base import Schedule, SemiSupervised
from lit_methods.semi.fixmatch import Alignment, FixMatch, certain_loss
from lit_methods.semi.shrinkmatch.core import shrink, uncertain_loss

TECHNIQUE = Technique(
    slug="shrinkmatch",
    short="ShrinkMatch",
    title="Shrinking Class Space for Enhanced Certainty in Semi-Supervised Learning",
    arxiv="2308.06777",
    family="semi",
    form="module",
    classes=("lit_methods.ShrinkMatch", "lit_methods.FixMatch", "lit_methods.datamodules.SemiSupervisedDataModule"),
    configs=("shrinkmatch.yaml", "fixmatch.yaml"),
    golden=("loss", "loss_logits_variant", "distribution_alignment", "lr_schedule"),
    claim="With two labels a class on small digits, ShrinkMatch reaches a higher accuracy than FixMatch after the same number of steps.",
    summary="Few labels: learns from uncertain images, too, among the classes that leave the prediction certain; FixMatch as baseline.",
)


def auxiliary_head(feature_dim: int, num_classes: int, slope: float = 0.1) -> nn.Sequential:
    """Two layers of a quarter of the width with batch norm and (leaky) ReLU, and a linear one.

    Args:
        feature_dim: d >= 4.
        num_classes: C.
        slope: Slope of the leaky ReLU; 0 on ImageNet.
    """
    hidden = max(1, feature_dim // 4)
    return nn.Sequential(
        nn.Linear(feature_dim, hidden), nn.BatchNorm1d(hidden), nn.LeakyReLU(slope),
        nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden), nn.LeakyReLU(slope),
        nn.Linear(hidden, num_classes),
    )  # fmt: skip


class ShrinkMatch(FixMatch):
    """FixMatch, and beside it a term for the uncertain images.

    The likeliest class of an uncertain weak view stays, the runners-up are removed until it is certain among the rest, and the strong view
    learns to tell it from these, by an auxiliary head that is used in training only: lambda_u r mean(max p(weak) 1[certain now] H(shrunk)).
    The term is weighted by the weak view's confidence and by a running mean r of the share of certain images (continuous over epochs: the
    released CIFAR script starts it anew in each). ``ranks: raw`` takes ranks and confidences from the predictions before alignment, as the
    authors do on STL-10 and SVHN.

    Runs: as :class:`FixMatch`.

    Saves: beside FixMatch's the auxiliary head and the running share.

    Refuses: what FixMatch refuses.

    Args:
        backbone: (B, ...) images -> (B, feature_dim).
        feature_dim: Width of the backbone's output.
        num_classes: C.
        threshold: tau.
        unlabelled_weight: lambda_u of both terms.
        hard_labels: The target of certain images is the likeliest class (STL-10, SVHN); else the whole distribution.
        distribution_alignment: ``queue`` (CIFAR, ImageNet), ``ema`` (STL-10) or ``none`` (SVHN).
        queue_length: Batch means in the queue: 32 (CIFAR) or 256 (ImageNet).
        ranks: ``aligned`` or ``raw``.
        ratio_momentum: Momentum of the running share of certain images.
        slope: Slope of the auxiliary head's leaky ReLU.
        learning_rate: Full one.
        momentum: Nesterov momentum of SGD.
        weight_decay: Not for parameters with one dimension, unless ``no_decay_norms`` is off.
        no_decay_norms: Leave parameters with one dimension, biases and norms, out of weight decay.
        schedule: See ``FixMatch``.
        warmup_epochs: Epochs of linear rise.

    Raises:
        ValueError: An argument outside its range.
    """

    panels: ClassVar[tuple[Panel, ...]] = (
        *SemiSupervised.panels,
        Curve("Parts of the unlabelled loss", ("semi/certain_loss", "semi/shrink_loss")),
        Curve("Running share of certain images", ("semi/certain_ratio",), note="Weighs the term of the uncertain ones."),
        Curve(
            "Unlabelled images that are learned from", ("semi/contributing",), note="The certain ones, and those that shrinking makes so."
        ),
        Curve("Rank at which the shrinking stops", ("semi/cut",)),
        Curve("Uncertain images that stay uncertain", ("semi/never_certain",)),
    )

    certain_ratio: Tensor
    ratio_known: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        feature_dim: int,
        num_classes: int,
        threshold: float = 0.95,
        unlabelled_weight: float = 1.0,
        hard_labels: bool = False,
        distribution_alignment: Alignment = "queue",
        queue_length: int = 32,
        ranks: str = "aligned",
        ratio_momentum: float = 0.999,
        slope: float = 0.1,
        learning_rate: float = 0.03,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        no_decay_norms: bool = True,
        schedule: Schedule = "seven_sixteenths",
        warmup_epochs: int = 0,
    ) -> None:
        checks.one_of(("aligned", "raw"), ranks=ranks)
        checks.share(ratio_momentum=ratio_momentum)
        checks.at_least(0, slope=slope)
        super().__init__(
            backbone, feature_dim, num_classes, threshold=threshold, unlabelled_weight=unlabelled_weight, hard_labels=hard_labels,
            distribution_alignment=distribution_alignment, queue_length=queue_length, learning_rate=learning_rate, momentum=momentum,
            weight_decay=weight_decay, no_decay_norms=no_decay_norms, schedule=schedule, warmup_epochs=warmup_epochs,
        )  # fmt: skip
        self.save_hyperparameters(ignore=["backbone"])
        self.ranks, self.ratio_momentum = ranks, ratio_momentum
        self.auxiliary = auxiliary_head(feature_dim, num_classes, slope)
        self.register_buffer("certain_ratio", torch.zeros(()))
        self.register_buffer("ratio_known", torch.zeros((), dtype=torch.bool))

    def weak_prediction(self, logits: Tensor) -> Tensor:
        """As in FixMatch; the raw distributions are kept for ``ranks: raw``."""
        self._raw = logits.detach().float().softmax(dim=1)
        p = super().weak_prediction(logits)
        certain = gather_rows(p.amax(dim=1) >= self.threshold, with_grad=False).float().mean()
        advance(self.certain_ratio, self.ratio_known, certain, self.ratio_momentum)
        return p

    def unlabelled_loss(self, strong_logits: Tensor, strong_features: Tensor, p: Tensor, certain: Tensor) -> dict[str, Tensor]:
        """Certain images in all classes, the others in the shrunk class space."""
        auxiliary = self.auxiliary(strong_features)
        with torch.autocast(auxiliary.device.type, enabled=False):
            shrunk = shrink(p if self.ranks == "aligned" else self._raw, self.threshold)
            sure = certain_loss(strong_logits, p, certain, self.hard_labels)
            unsure = uncertain_loss(auxiliary.float(), p, certain, shrunk)
        uncertain = ~certain
        count = uncertain.sum()
        return {
            "unlabelled": sure + self.certain_ratio * unsure,
            "certain_loss": sure,
            "shrink_loss": unsure,
            "certain_ratio": self.certain_ratio.clone(),
            "contributing": (certain | shrunk.reached).float().mean(),
            "cut": (shrunk.cut * uncertain).sum() / count,
            "never_certain": (uncertain & ~shrunk.reached).sum() / count,
        }
