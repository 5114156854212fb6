"""Errors of a regression by how often a label occurs in training: many, median and few shots.

Golden vectors come from BorealisAI/ConR@ad6a8c9, agedb-dir/utils.py (``shot_metrics``).
"""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lit_methods import checks

REGIONS = ("all", "many", "median", "low")


def label_counts(labels: Tensor, train_labels: Tensor) -> Tensor:
    """How often each label occurs among the training labels, exactly.

    Args:
        labels: (N,) numbers.
        train_labels: (M,) numbers.

    Returns:
        (N,) int64.
    """
    dtype = torch.promote_types(labels.dtype, train_labels.dtype)
    known, counts = train_labels.to(dtype).unique(return_counts=True)
    if not len(known):
        return torch.zeros(labels.shape, dtype=torch.int64)
    place = torch.searchsorted(known, labels.to(dtype).contiguous()).clamp(max=len(known) - 1)
    return torch.where(known[place] == labels, counts[place], 0)


def regions(counts: Tensor, many: int = 100, few: int = 20) -> Tensor:
    """(4, N) bool: which samples belong to all, many (count > ``many``), median and low (count < ``few``) shots.

    Args:
        counts: (N,) training samples with the sample's label.
        many: Strict lower bound of many.
        few: Strict upper bound of low; 0 training samples are low.

    Raises:
        ValueError: ``few`` lies above ``many + 1``: a sample would be both.
    """
    if few > many + 1:
        raise ValueError(f"few={few} must not lie above many={many}")
    most, least = counts > many, counts < few
    return torch.stack([torch.ones_like(most), most, ~most & ~least, least])


def _sums(predictions: Tensor, labels: Tensor, counts: Tensor, many: int, few: int) -> Tensor:
    """(4 regions, 4) float64: number of samples, sums of squared error, absolute error and its logarithm."""
    error = (predictions.double() - labels.double()).abs()
    terms = torch.stack([torch.ones_like(error), error.square(), error, error.log()], dim=1)
    inside = regions(counts, many, few)
    return torch.where(inside[..., None], terms, 0).sum(1)  # no product: the logarithm of 0 is -inf


def _scores(sums: Tensor) -> dict[str, Tensor]:
    number, *totals = sums.T
    means = [total / number for total in totals]  # NaN where a region is empty
    kinds = (("mse", means[0]), ("l1", means[1]), ("gmean", means[2].exp()))
    return {f"{region}_{kind}": values[row] for row, region in enumerate(REGIONS) for kind, values in kinds}


def shot_metrics(predictions: Tensor, labels: Tensor, counts: Tensor, many: int = 100, few: int = 20) -> dict[str, Tensor]:
    """Mean squared error, mean absolute error and geometric mean of absolute errors, over all samples and over each region.

    Args:
        predictions: (N,) numbers.
        labels: (N,) numbers.
        counts: (N,) number of training samples with the label, as of :func:`label_counts`.
        many: More are many shots.
        few: Fewer are low.

    Returns:
        ``<region>_mse``, ``<region>_l1`` and ``<region>_gmean`` for ``all``, ``many``, ``median`` and ``low``: float64 scalars, NaN where a
        region is empty. A single error of 0 makes the geometric mean 0.

    Raises:
        ValueError: The shapes differ.
    """
    if not predictions.shape == labels.shape == counts.shape or labels.ndim != 1:
        shapes = ", ".join(str(tuple(part.shape)) for part in (predictions, labels, counts))
        raise ValueError(f"predictions, labels and counts must be (N,) all three, got {shapes}")
    return _scores(_sums(predictions, labels, counts, many, few))


class ShotMetrics(Metric):
    """:func:`shot_metrics` over an evaluation set, as a metric of torchmetrics: sums alone are kept.

    Args:
        many: More training samples with the label are many shots.
        few: Fewer are low.
        kwargs: Arguments of ``torchmetrics.Metric``.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    sums: Tensor

    def __init__(self, many: int = 100, few: int = 20, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        checks.at_least(0, "samples", few=few)
        checks.at_least(few, "samples, no fewer than few,", many=many)
        self.many, self.few = many, few
        self.add_state("sums", torch.zeros(4, 4, dtype=torch.float64), dist_reduce_fx="sum")
        self.set_dtype(torch.float64)

    def update(self, predictions: Tensor, labels: Tensor, counts: Tensor) -> None:
        """Add a batch of (B,) each."""
        added = _sums(predictions.detach(), labels, counts, self.many, self.few)
        self.sums = self.sums + added  # not in place: after `validate` the sums are an inference tensor

    def compute(self) -> dict[str, Tensor]:
        """As :func:`shot_metrics`."""
        return _scores(self.sums)


__all__ = ["REGIONS", "ShotMetrics", "label_counts", "regions", "shot_metrics"]
