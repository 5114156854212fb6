"""OPIS: how unequal the classes of a retrieval system are at one distance threshold (arXiv:2307.04047).

The definition of OPIS follows the paper's, as restated by third parties. What the paper says of its variant epsilon-OPIS could not be read:
the gap between the worst and the best classes here is our definition, and so are the trapezoid rule, the number of thresholds and the
interpolation of quantiles. No authors' code was found; golden vectors come from independent scripts.

Distances are those of unit embeddings, sqrt(2 - 2 cos); everything is computed in float64, in blocks of rows: no (N, N) matrix is made.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lit_methods import checks

_BLOCK = 2048  # rows and columns of a block: 32 MiB of distances
_RANGE = 1e-6  # width below which a range of thresholds is but rounding
_PAIRS = 5_000_000  # pairs that the calibration range is taken from


@dataclass(frozen=True)
class OPISResult:
    """Of T classes at n thresholds, all float64.

    Attributes:
        thresholds: (n,) distances.
        classes: (T,) int64, the classes with two samples or more, ascending.
        sensitivity: (T, n) share of pairs within the class that are accepted: 1 - false rejection rate.
        specificity: (T, n) share of pairs with one end in the class that are rejected: 1 - false acceptance rate.
        utility: (T, n) harmonic mean of the two.
        mean_utility: (n,) mean over classes.
        class_mean_utility: (T,) mean over the range.
        opis: Scalar, the variance of utility over classes, averaged over the range.
        eps_opis: Scalar, the squared gap between worst and best classes, averaged over the range.
    """

    thresholds: Tensor
    classes: Tensor
    sensitivity: Tensor
    specificity: Tensor
    utility: Tensor
    mean_utility: Tensor
    class_mean_utility: Tensor
    opis: Tensor
    eps_opis: Tensor


def check_rates(far_min: float, far_max: float) -> None:
    """Raise ValueError unless 0 < far_min < far_max < 1."""
    if not 0 < far_min < far_max < 1:
        raise ValueError(f"far_min={far_min} and far_max={far_max} are shares of negative pairs: give 0 < far_min < far_max < 1")


def _unit(embeddings: Tensor, labels: Tensor) -> Tensor:
    if embeddings.ndim != 2 or labels.shape != embeddings.shape[:1]:
        raise ValueError(f"embeddings must be (N, D) and labels (N,), got {tuple(embeddings.shape)} and {tuple(labels.shape)}")
    if not bool(embeddings.isfinite().all()):
        raise ValueError("the embeddings hold NaN or infinite values: training has diverged, or a record of the data is broken")
    return F.normalize(embeddings.detach().double(), dim=1)


def _distances(rows: Tensor, columns: Tensor) -> Tensor:
    """(R, C) distances of unit rows."""
    return (rows @ columns.T).mul_(-2).add_(2).clamp_(min=0).sqrt_()


def calibration_range(
    embeddings: Tensor, labels: Tensor, far_min: float = 1e-2, far_max: float = 1e-1, max_pairs: int = _PAIRS, seed: int = 0
) -> tuple[float, float, int]:
    """Distances at which the share of all negative pairs that would be accepted is ``far_min`` and ``far_max``.

    Args:
        embeddings: (N, D) floating point of any length.
        labels: (N,) integers.
        far_min: False acceptance rate of the lower end, in (0, 1).
        far_max: False acceptance rate of the upper end.
        max_pairs: More pairs than this are sampled.
        seed: Seed of the sample.

    Returns:
        d_min, d_max (linear quantiles), and the number of unordered negative pairs that they were taken from.

    Raises:
        ValueError: There is no negative pair, or the rates are out of order.
    """
    check_rates(far_min, far_max)
    unit, size = _unit(embeddings, labels), len(labels)
    if size * (size - 1) // 2 <= max_pairs:
        parts = []
        for start in range(0, size, _BLOCK):
            rows = slice(start, start + _BLOCK)
            later = torch.arange(size, device=unit.device) > torch.arange(size, device=unit.device)[rows, None]
            parts.append(_distances(unit[rows], unit)[later & (labels[rows, None] != labels)])
        distances = torch.cat(parts)
    else:
        generator = torch.Generator().manual_seed(seed)
        one, other = torch.randint(size, (2, max_pairs), generator=generator).to(labels.device)
        negative = labels[one] != labels[other]
        one, other = one[negative], other[negative]
        pieces = zip(one.split(_BLOCK * 8), other.split(_BLOCK * 8), strict=True)
        distances = torch.cat([(2 - 2 * (unit[i] * unit[j]).sum(1)).clamp(min=0).sqrt() for i, j in pieces])
    if not len(distances):
        raise ValueError(f"there is no negative pair among {size} samples: evaluation needs two classes or more")
    d_min, d_max = np.quantile(distances.cpu().numpy(), [far_min, far_max])
    return float(d_min), float(d_max), len(distances)


def _accepted(unit: Tensor, index: Tensor, num_classes: int, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """Accepted pairs of each class at each threshold: within the class (unordered), and with one end in it. (C, n) int64 both."""
    n, size = len(thresholds), len(unit)
    positive = torch.zeros(num_classes * n, dtype=torch.int64, device=unit.device)
    negative = torch.zeros_like(positive)
    farthest = thresholds[-1]
    for top in range(0, size, _BLOCK):
        for left in range(top, size, _BLOCK):
            distances = _distances(unit[top : top + _BLOCK], unit[left : left + _BLOCK])
            near = distances <= farthest  # the rest is accepted nowhere
            if left == top:
                near = near.triu_(1)
            row, column = near.nonzero(as_tuple=True)
            first = torch.searchsorted(thresholds, distances[row, column])  # the first threshold that accepts the pair
            one, other = index[top + row], index[left + column]
            alike = one == other
            positive += torch.bincount(one[alike] * n + first[alike], minlength=len(positive))
            apart = torch.cat([one[~alike], other[~alike]]) * n + first[~alike].repeat(2)
            negative += torch.bincount(apart, minlength=len(negative))
    return positive.view(num_classes, n).cumsum(1), negative.view(num_classes, n).cumsum(1)


def opis(embeddings: Tensor, labels: Tensor, d_min: float, d_max: float, num_thresholds: int = 101, epsilon: float = 0.1) -> OPISResult:
    """Operating-point inconsistency score over a range of thresholds.

    At threshold d a pair is accepted if its distance is at most d. Each class has a utility, the harmonic mean of the share of its own
    pairs that are accepted and the share of pairs with exactly one end in it that are rejected. OPIS is the variance of the utility over
    classes, and epsilon-OPIS the squared difference between the mean utilities of the k worst and the k best classes, k = max(1,
    ceil(epsilon T)) by mean utility; both averaged over [d_min, d_max] by the trapezoid rule.

    Args:
        embeddings: (N, D) floating point of any length.
        labels: (N,) integers. Classes of a single sample are left out of T and stay as negatives of the others.
        d_min: Lower end, a distance in [0, 2].
        d_max: Upper end, above ``d_min``.
        num_thresholds: n >= 2 equally spaced thresholds, both ends included.
        epsilon: Share of classes, in (0, 1].

    Raises:
        ValueError: A value lies outside its range, or there are no two classes or no class with two samples.
    """
    if not d_min < d_max:
        raise ValueError(f"d_min={d_min} must lie below d_max={d_max}: all negative pairs may be equally far apart")
    checks.at_least(2, num_thresholds=num_thresholds)
    checks.within("(0, 1]", "a share of classes", epsilon=epsilon)
    unit = _unit(embeddings, labels)
    classes, index, counts = labels.unique(return_inverse=True, return_counts=True)
    kept = counts >= 2
    if len(classes) < 2 or not bool(kept.any()):
        raise ValueError(
            f"{len(classes)} classes, the largest with {int(counts.max())} samples: two classes are needed, one with two samples"
        )
    thresholds = torch.from_numpy(np.linspace(d_min, d_max, num_thresholds)).to(unit.device)
    positive, negative = _accepted(unit, index, len(classes), thresholds)
    positive, negative, own = positive[kept].double(), negative[kept].double(), counts[kept, None].double()
    sensitivity = positive / (own * (own - 1) / 2)
    specificity = 1 - negative / (own * (len(labels) - own))
    both = sensitivity + specificity
    utility = torch.where(both > 0, 2 * sensitivity * specificity / both.clamp(min=torch.finfo(both.dtype).tiny), 0)
    mean = utility.mean(0)

    def average(values: Tensor) -> Tensor:
        return torch.trapezoid(values, thresholds) / (d_max - d_min)

    class_mean = average(utility)
    order = class_mean.argsort(stable=True)
    k = max(1, math.ceil(epsilon * len(order)))
    gap = utility[order[:k]].mean(0) - utility[order[-k:]].mean(0)
    score = average((utility - mean).square()).mean()
    return OPISResult(thresholds, classes[kept], sensitivity, specificity, utility, mean, class_mean, score, average(gap.square()))


def retrieval_scores(embeddings: Tensor, labels: Tensor, top_k: tuple[int, ...] = (1,)) -> dict[str, Tensor]:
    """Recall@k and MAP@R of every sample as a query among all others, by cosine.

    Recall@k: share of queries with a sample of their class among the k nearest. MAP@R (arXiv:2003.08505 (mem)): with R other samples
    in the query's class, the mean over ranks 1..R of the precision at those ranks that hold one of them, 0 at the others. Queries
    without another sample of their class are left out.

    Args:
        embeddings: (N, D) floating point of any length.
        labels: (N,) integers.
        top_k: Values of k, each at least 1.

    Returns:
        ``recall_at_<k>`` and ``map_at_r``, float64 scalars; NaN where no query is left.

    Raises:
        ValueError: The shapes don't fit, or a k is below 1.
    """
    if not top_k or min(top_k) < 1:
        raise ValueError(f"top_k is {list(top_k)}: give one number or more, each at least 1")
    unit = _unit(embeddings, labels)
    _, index, counts = labels.unique(return_inverse=True, return_counts=True)
    others = counts[index] - 1  # R of each sample
    deepest = min(max(*top_k, int(others.max())), len(labels) - 1)
    hits: dict[int, list[Tensor]] = {k: [] for k in top_k}
    precisions = []
    rank = torch.arange(1, deepest + 1, device=unit.device)
    step = max(1, min(_BLOCK, 4 * _BLOCK**2 // len(labels)))  # at most 128 MiB of cosines
    for start in range(0, len(labels), step):
        rows = torch.arange(start, min(start + step, len(labels)), device=unit.device)
        cosine = unit[rows] @ unit.T
        cosine[rows - start, rows] = -torch.inf
        right = index[cosine.topk(deepest, dim=1).indices] == index[rows, None]
        asked = others[rows] > 0
        for k in top_k:
            hits[k].append(right[asked, :k].any(1))
        own = others[rows][asked, None]
        inside = right[asked] & (rank <= own)
        precisions.append((inside.cumsum(1) / rank * inside).double().sum(1) / own[:, 0])
    recalls = {f"recall_at_{k}": torch.cat(parts).double().mean() for k, parts in hits.items()}
    return recalls | {"map_at_r": torch.cat(precisions).mean()}


class _Embeddings(Metric):
    """Keeps embeddings and labels of an evaluation."""

    is_differentiable = False
    full_state_update = False
    embeddings: list[Tensor]
    labels: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("embeddings", [], dist_reduce_fx="cat")
        self.add_state("labels", [], dist_reduce_fx="cat")

    def update(self, embeddings: Tensor, labels: Tensor) -> None:
        """Add a batch: (B, D) floating point and (B,) integers."""
        self.embeddings.append(embeddings.detach().float())
        self.labels.append(labels)

    def kept(self) -> tuple[Tensor, Tensor]:
        """All of it on the CPU, sorted by label, so that the number of ranks doesn't change sums."""
        embeddings, labels = dim_zero_cat(self.embeddings).cpu(), dim_zero_cat(self.labels).cpu()
        order = labels.argsort(stable=True)
        return embeddings[order], labels[order]


class OPIS(_Embeddings):
    """OPIS, epsilon-OPIS and the calibration range of an evaluation set, as a metric of torchmetrics.

    ``compute`` runs on the CPU in float64, in blocks of rows. Memory: the embeddings, some blocks, and up to
    ``max_pairs`` distances.

    Args:
        far_min: False acceptance rate at the lower end of the range.
        far_max: At the upper end.
        num_thresholds: Equally spaced thresholds.
        epsilon: Share of worst and best classes in epsilon-OPIS.
        max_pairs: Negative pairs that the range is taken from; more are sampled.
        seed: Seed of that sample.
        kwargs: Arguments of ``torchmetrics.Metric``.
    """

    higher_is_better = False

    def __init__(
        self,
        far_min: float = 1e-2,
        far_max: float = 1e-1,
        num_thresholds: int = 101,
        epsilon: float = 0.1,
        max_pairs: int = _PAIRS,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_rates(far_min, far_max)
        checks.at_least(2, "thresholds", num_thresholds=num_thresholds)
        checks.within("(0, 0.5]", "a share of the classes", epsilon=epsilon)
        checks.at_least(1, "pairs", max_pairs=max_pairs)
        self.far_min, self.far_max, self.num_thresholds, self.epsilon = far_min, far_max, num_thresholds, epsilon
        self.max_pairs, self.seed = max_pairs, seed

    def result(self) -> OPISResult | None:
        """Everything, the utility of each class at each threshold included, of what is here, without asking other ranks.

        Returns:
            None if the range is a single point: the embeddings have collapsed.
        """
        embeddings, labels = self.kept()
        d_min, d_max, _ = calibration_range(embeddings, labels, self.far_min, self.far_max, self.max_pairs, self.seed)
        return opis(embeddings, labels, d_min, d_max, self.num_thresholds, self.epsilon) if d_max - d_min > _RANGE else None

    def compute(self) -> dict[str, Tensor]:
        """Scores of everything that was added.

        Returns:
            Scalars, float64: ``opis``, ``eps_opis``, ``d_min``, ``d_max``; and, at the middle of the range, ``far``, ``frr``, ``far_std``,
            ``frr_std``: mean and standard deviation over classes of the rates of false acceptance and false rejection.

        Raises:
            ValueError: There are no pairs, or samples of different classes are all equally far apart.
        """
        result = self.result()
        if result is None:
            raise ValueError("samples of different classes are all equally far apart: there is no range of thresholds for OPIS")
        return summary(result)


def summary(result: OPISResult) -> dict[str, Tensor]:
    """The scalars of :meth:`OPIS.compute`."""
    middle = len(result.thresholds) // 2
    far, frr = 1 - result.specificity[:, middle], 1 - result.sensitivity[:, middle]
    rates = {"far": far.mean(), "frr": frr.mean(), "far_std": far.std(correction=0), "frr_std": frr.std(correction=0)}
    return {"opis": result.opis, "eps_opis": result.eps_opis, "d_min": result.thresholds[0], "d_max": result.thresholds[-1]} | rates


class RetrievalScores(_Embeddings):
    """Recall@k and MAP@R of an evaluation set, all samples against all others: :func:`retrieval_scores` as a metric of torchmetrics.

    Args:
        top_k: Values of k.
        kwargs: Arguments of ``torchmetrics.Metric``.
    """

    higher_is_better = True

    def __init__(self, top_k: tuple[int, ...] = (1,), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for k in top_k:
            checks.at_least(1, "neighbours", top_k=k)
        self.top_k = tuple(top_k)

    def scores(self) -> dict[str, Tensor]:
        """``recall_at_<k>`` and ``map_at_r`` of what is here, without asking other ranks."""
        return retrieval_scores(*self.kept(), self.top_k)

    def compute(self) -> dict[str, Tensor]:
        """``recall_at_<k>`` and ``map_at_r`` of everything that was added."""
        return self.scores()


__all__ = ["OPIS", "OPISResult", "RetrievalScores", "calibration_range", "opis", "retrieval_scores", "summary"]
