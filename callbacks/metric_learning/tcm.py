"""TCM: a threshold-consistent margin loss for open-world metric learning (arXiv:2307.04047), attached to any module with embeddings.

No authors' code was found. Golden vectors come from KevinMusgrave/pytorch-metric-learning@216a792 (losses/tcm_loss.py) and from independent
scripts. The measure that goes with it, OPIS, stands in :mod:`lit_methods.tasks.metric_learning.opis`.
"""

from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_methods.callbacks.batch import Key, rows_of, values_of_batch
from lit_methods.callbacks.loss_term import LossTerm
from lit_methods.catalog import Technique
from lit_methods.checks import at_least
from lit_methods.panels import Curve, Panel

TECHNIQUE = Technique(
    slug="tcm",
    short="TCM",
    title="Threshold-Consistent Margin Loss for Open-World Deep Metric Learning",
    arxiv="2307.04047",
    family="metric_learning",
    form="callback",
    classes=(
        "lit_methods.callbacks.TCM",
        "lit_methods.OPIS",
        "lit_methods.MetricLearning",
        "lit_methods.ProxySoftmax",
        "lit_methods.RetrievalScores",
    ),
    configs=("tcm.yaml",),
    golden=("loss", "calibration_range", "opis"),
    claim="On synthetic classes that training has not seen, TCM lowers OPIS, the spread of the classes' utility at one distance threshold, "
    "against the base loss alone.",
    summary="Adds a loss of the hard pairs beyond two absolute cosine margins, so that all classes can be told apart by one threshold.",
)


class TCMLoss(NamedTuple):
    """Scalars of a batch: the loss, its two parts before their weights, and the numbers of hard ordered pairs (int64)."""

    loss: Tensor
    positive: Tensor
    negative: Tensor
    hard_positives: Tensor
    hard_negatives: Tensor


def tcm_loss(
    embeddings: Tensor,
    labels: Tensor,
    margin_pos: float = 0.9,
    margin_neg: float = 0.5,
    weight_pos: float = 1.0,
    weight_neg: float = 1.0,
) -> TCMLoss:
    """The loss of the hard pairs: positives whose cosine is at most ``margin_pos``, negatives whose cosine is at least ``margin_neg``.

    ``weight_pos * mean(margin_pos - s) + weight_neg * mean(s - margin_neg)``, each mean over the hard pairs alone: as pairs become easy,
    the remaining ones keep their full weight. A pair that lies exactly at its margin counts and adds 0. Without a hard pair a part is 0.

    Args:
        embeddings: (B, D) floating point of any length; they are normalised here.
        labels: (B,) integers.
        margin_pos: m+, a cosine.
        margin_neg: m-, a cosine.
        weight_pos: lambda+ >= 0.
        weight_neg: lambda- >= 0.

    Returns:
        Scalars in float32 or wider. Pairs are ordered, i != j; unordered pairs give the same loss.

    Raises:
        ValueError: The shapes don't fit.
    """
    if embeddings.ndim != 2 or labels.shape != embeddings.shape[:1]:
        raise ValueError(f"embeddings must be (B, D) and labels (B,), got {tuple(embeddings.shape)} and {tuple(labels.shape)}")
    with torch.autocast(embeddings.device.type, enabled=False):
        unit = F.normalize(embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)), dim=1)
        cosine = unit @ unit.T
        alike = labels[:, None] == labels[None, :]
        others = ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
        hard_positive = alike & others & (cosine <= margin_pos)
        hard_negative = ~alike & (cosine >= margin_neg)
        counts = hard_positive.sum(), hard_negative.sum()
        zero = cosine.new_zeros(())
        positive = torch.where(hard_positive, margin_pos - cosine, zero).sum() / counts[0].clamp(min=1)
        negative = torch.where(hard_negative, cosine - margin_neg, zero).sum() / counts[1].clamp(min=1)
        return TCMLoss(weight_pos * positive + weight_neg * negative, positive, negative, *counts)


class TCM(LossTerm):
    """Adds the threshold-consistent margin loss of a module's embeddings to its loss.

    lambda+ * mean(m+ - s) over hard pairs of one class + lambda- * mean(s - m-) over hard pairs of two classes, s their cosine.

    Runs: around ``training_step``, on what ``embedding`` puts out there; no second forward pass is made. Where the submodule sees several
    views of the batch, in one call (views one behind the other) or in several, each view has the batch's labels. Batches must hold several
    samples of each class, or there are no positive pairs: the panel of hard pairs shows it.
    Saves: nothing.
    Refuses: embeddings without a row for each sample, and labels that aren't integers (B,).

    Args:
        embedding: Name or ``fnmatch`` pattern of the submodule; it must match one.
        labels: Key or position of the labels in the batch; None: ``label`` of a dictionary, 1 of a sequence.
        margin_pos: Cosine above which a pair of one class is near enough.
        margin_neg: Cosine below which a pair of two classes is far enough.
        weight_pos: Factor of the positive part.
        weight_neg: Factor of the negative part.
        gather_ranks: Pairs of all ranks, with gradient; False: each rank has its own pairs.
        weight: Factor of the whole term.

    Raises:
        ValueError: The margins don't lie in -1 to 1 with ``margin_neg <= margin_pos``, or a factor is negative.
    """

    name = "tcm"
    panels: ClassVar[tuple[Panel, ...]] = (
        Curve("TCM", ("tcm/loss", "tcm/positive", "tcm/negative"), note="Mean distance of hard pairs from their margin."),
        Curve(
            "Hard pairs", ("tcm/hard_positives", "tcm/hard_negatives"), note="Ordered pairs of a batch. None at all: the term does nothing."
        ),
    )

    def __init__(
        self,
        embedding: str = "network",
        labels: Key = None,
        margin_pos: float = 0.9,
        margin_neg: float = 0.5,
        weight_pos: float = 1.0,
        weight_neg: float = 1.0,
        gather_ranks: bool = True,
        weight: float = 1.0,
    ) -> None:
        if not -1 <= margin_neg <= margin_pos <= 1:
            raise ValueError(f"margin_neg={margin_neg} and margin_pos={margin_pos} are cosines: give -1 <= margin_neg <= margin_pos <= 1")
        at_least(0, weight_pos=weight_pos, weight_neg=weight_neg)
        super().__init__([embedding], weight)
        self.labels, self.gather_ranks = labels, gather_ranks
        self.margin_pos, self.margin_neg, self.weight_pos, self.weight_neg = margin_pos, margin_neg, weight_pos, weight_neg

    def term(self, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the batch's embeddings.

        Raises:
            ValueError: The target matches several submodules, or embeddings and labels don't fit.
        """
        embeddings = rows_of(inputs["feature_calls"], self.targets[0], "embedding")
        labels = values_of_batch(inputs["batch"], self.labels, ("label", 1), len(embeddings), "labels").flatten()
        if labels.is_floating_point():
            raise ValueError(f"the batch's labels are {labels.dtype}: TCM needs classes, as integers: name such ones by labels")
        if self.gather_ranks:
            embeddings, labels = self.gather(embeddings), self.gather(labels)
        pairs = tcm_loss(embeddings, labels, self.margin_pos, self.margin_neg, self.weight_pos, self.weight_neg)
        logs = {
            "positive": pairs.positive,
            "negative": pairs.negative,
            "hard_positives": pairs.hard_positives.float(),
            "hard_negatives": pairs.hard_negatives.float(),
        }
        return pairs.loss, logs


__all__ = ["TCM", "TCMLoss", "tcm_loss"]
