"""Supervised feature dictionaries, and what a sparse autoencoder is measured by against them (arXiv:2405.08366).

An activation a of a prompt with known attributes (indirect object, subject, order) is written as b + sum_i v_(i, value of i). Such a
dictionary is computed, not trained; it approximates, edits and explains nearly perfectly where the attributes are all there is, and so
says how far an autoencoder's features fall short.

Golden vectors come from amakelov/sae@1d3ab32 (circuit_utils.py, sae_interp.py, sae_variants.py, sae_interventions.py), whose code has no
licence and was read, not copied. Left out: ``mean_ablate_subspace``, which subtracts a vector from a projection before the dot product
there, and codes by Adam, which go where :func:`mse_codes` gets at once.

Shapes: N samples, d numbers in an activation, h features of an autoencoder, A attributes with U_i values each.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# ---- supervised dictionaries -----------------------------------------------------------------------------------------------------------


class SupervisedCodes(NamedTuple):
    """A supervised dictionary: (d,) bias, and (U_i, d) codes of each attribute; a value that never occurred has a code of zeros."""

    bias: Tensor
    codes: list[Tensor]


class AttributeSums(NamedTuple):
    """All that a supervised dictionary is computed from; sums of two parts of the data are those of the whole.

    With X the (N, 1 + sum U_i) design of a column of ones and the one-hot values: (1 + sum U_i, d) X^T A and (1 + sum U_i, 1 + sum U_i)
    X^T X, which counts how often two values occur together. Both are float64.
    """

    totals: Tensor
    counts: Tensor


def _design(ids: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """(N, 1 + sum U_i) float64: ones, then the one-hot values of each attribute."""
    hot = [torch.nn.functional.one_hot(one.long(), size) for one, size in zip(ids, sizes, strict=True)]
    return torch.cat([hot[0].new_ones(len(hot[0]), 1), *hot], 1).double()


def attribute_sums(activations: Tensor, ids: Sequence[Tensor], sizes: Sequence[int]) -> AttributeSums:
    """X^T A and X^T X of a part of the data.

    Args:
        activations: (N, d) floating point.
        ids: Of each attribute the (N,) integer values, 0 to U_i - 1.
        sizes: U_i of each attribute.

    Raises:
        ValueError: There is no attribute, or shapes or values don't fit.
    """
    if not ids or len(ids) != len(sizes) or any(one.shape != activations.shape[:1] for one in ids):
        shapes = [tuple(one.shape) for one in ids]
        raise ValueError(f"activations {tuple(activations.shape)} need ids (N,) and a size for each attribute, got {shapes}, {list(sizes)}")
    for place, (one, size) in enumerate(zip(ids, sizes, strict=True)):
        if one.numel() and not 0 <= int(one.min()) <= int(one.max()) < size:
            raise ValueError(f"ids[{place}] must lie in 0 to {size - 1}, got {int(one.min())} to {int(one.max())}")
    design = _design(ids, sizes)
    return AttributeSums(design.T @ activations.double(), design.T @ design)


def mean_codes(sums: AttributeSums, sizes: Sequence[int]) -> SupervisedCodes:
    """Means: b = E[a] and v_(i, u) = E[a | value of i is u] - b; unbiased where attributes are independent and balanced.

    Args:
        sums: Of all data, from :func:`attribute_sums`.
        sizes: U_i of each attribute.
    """
    number = sums.counts.diagonal()[:, None]
    means = sums.totals / number.clamp(min=1)
    bias = means[0]
    return SupervisedCodes(bias, list(torch.where(number > 0, means - bias, 0)[1:].split(list(sizes))))


def mse_codes(sums: AttributeSums, sizes: Sequence[int]) -> SupervisedCodes:
    """Least squares of the activations on the one-hot values: (X^T X)^+ X^T A, the solution of the smallest norm.

    The design has not full rank, so many codes reconstruct alike: compare reconstructions, not codes.

    Args:
        sums: Of all data, from :func:`attribute_sums`.
        sizes: U_i of each attribute.
    """
    solution = torch.linalg.pinv(sums.counts, rtol=1e-10, hermitian=True) @ sums.totals
    return SupervisedCodes(solution[0], list(solution[1:].split(list(sizes))))


def reconstruct_by_codes(codes: SupervisedCodes, ids: Sequence[Tensor]) -> Tensor:
    """(N, d) b + sum_i v_(i, value of i).

    Args:
        codes: The dictionary.
        ids: Of each attribute the (N,) values.
    """
    return codes.bias + torch.stack([code[one] for code, one in zip(codes.codes, ids, strict=True)]).sum(0)


def edit_arithmetic(activations: Tensor, code: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """Replace a value's code: a - v_old + v_new.

    Args:
        activations: (N, d).
        code: (U, d) codes of the attribute.
        old: (N,) value that it has.
        new: (N,) value that it should have.
    """
    return activations - code[old] + code[new]


def edit_subspace(activations: Tensor, code: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """Replace all that lies in the direction of a value's code: a - (a . u) u + v_new with u = v_old / |v_old|.

    Edits of several attributes depend on their order.

    Args:
        activations: (N, d).
        code: (U, d) codes of the attribute; one of length 0 has no direction, so nothing is removed.
        old: (N,) value that it has.
        new: (N,) value that it should have.
    """
    direction = torch.nn.functional.normalize(code[old], dim=1, eps=torch.finfo(code.dtype).tiny)
    return activations - (activations * direction).sum(1, keepdim=True) * direction + code[new]


def matched_pairs(ids: Tensor, others: Tensor) -> Tensor:
    """Of each sample the counterfactual: a sample with another value of the attribute and the same of everything else.

    Among the samples that are alike in ``others``, the first of the next larger value; behind the largest the first of the smallest.

    Args:
        ids: (N,) integer values of the attribute.
        others: (N, M) integer values of all else that must be equal; M may be 0.

    Returns:
        (N,) int64 index of the counterfactual, -1 where there is none.
    """
    if not len(ids):
        return ids.new_zeros(0, dtype=torch.int64)
    group = torch.unique(others, dim=0, return_inverse=True)[1] if others.shape[1] else torch.zeros_like(ids, dtype=torch.int64)
    order = torch.argsort(ids, stable=True)
    order = order[torch.argsort(group[order], stable=True)]  # by group, then by value
    cells = torch.stack([group, ids.long()], 1)[order]
    cell = torch.unique_consecutive(cells, dim=0, return_inverse=True)[1]
    place = torch.arange(len(ids), device=ids.device)
    first = torch.full_like(place, len(ids)).scatter_reduce(0, cell, place, "amin")[: int(cell[-1]) + 1]  # where each cell begins
    begin = torch.full_like(place, len(ids)).scatter_reduce(0, cells[:, 0], place, "amin")  # where each group begins
    following = torch.cat([first, first.new_zeros(1)])[cell + 1]
    following = torch.where(cells[following, 0] == cells[:, 0], following, begin[cells[:, 0]])
    following = torch.where((cell + 1 < len(first)), following, begin[cells[:, 0]])
    partner = torch.where(cells[following, 1] == cells[:, 1], -1, order[following])
    return torch.empty_like(partner).scatter(0, order, partner)


# ---- axis 1: approximation -------------------------------------------------------------------------------------------------------------


def sufficiency(replaced: Tensor, clean: Tensor, ablated: Tensor) -> Tensor:
    """|LD - LD_ablated| / |LD_clean - LD_ablated|: what of a logit difference is left when reconstructions replace activations.

    Args:
        replaced: Mean logit difference with reconstructions.
        clean: With the activations.
        ablated: With the mean activation everywhere.
    """
    return (replaced - ablated).abs() / (clean - ablated).abs()


def necessity(removed: Tensor, clean: Tensor, ablated: Tensor) -> Tensor:
    """(LD_clean - LD) / (LD_clean - LD_ablated): what is lost when the mean and the error of the reconstruction replace activations.

    Args:
        removed: Mean logit difference with mean + activation - reconstruction.
        clean: With the activations.
        ablated: With the mean activation everywhere.
    """
    return (clean - removed) / (clean - ablated)


# ---- axis 2: sparse control ------------------------------------------------------------------------------------------------------------


class GreedyEdit(NamedTuple):
    """(N, d) edited activations, (N, k) features in the order they were picked, (N, k) distance to the target behind each pick."""

    edited: Tensor
    features: Tensor
    residuals: Tensor


def greedy_edit(
    activations: Tensor, clean: Tensor, counterfactual: Tensor, directions: Tensor, delta: Tensor, k: int, scale: float = 1.0
) -> GreedyEdit:
    """Exchange k features, clean for counterfactual, that bring the activation nearest to its target, whatever they mean.

    c_j = (f_j(counterfactual) - f_j(clean)) d_j; k times the j with the smallest |sum + c_j - delta| joins the sum, and its c_j becomes
    0. Where nothing helps that is a feature with c_j = 0, which may have been picked before; the first index of equals.

    Args:
        activations: (N, d) clean activations.
        clean: (N, h) features of these.
        counterfactual: (N, h) features of the counterfactual activations.
        directions: (h, d) decoder directions.
        delta: (N, d) counterfactual minus clean activations, or minus reconstructions.
        k: Picks, 1 or more.
        scale: What maps normalised activations back; the edited ones are multiplied by it.

    Raises:
        ValueError: k is below 1.
    """
    if k < 1:
        raise ValueError(f"k={k}: an edit needs 1 feature or more")
    change = counterfactual - clean
    squares, rest = directions.square().sum(1), delta
    features, residuals = [], []
    for _ in range(k):  # |c_j - rest|^2 without |rest|^2, and no (N, h, d)
        pick = (change * (change * squares - 2 * (rest @ directions.T))).argmin(1, keepdim=True)
        rest = rest - change.gather(1, pick) * directions[pick[:, 0]]
        change = change.scatter(1, pick, 0.0)
        features.append(pick[:, 0])
        residuals.append(rest.norm(dim=1))
    return GreedyEdit((activations + delta - rest) * scale, torch.stack(features, 1), torch.stack(residuals, 1))


class GuidedEdit(NamedTuple):
    """(N, d) edited activations, and (N, k) features removed and added, by rank."""

    edited: Tensor
    removed: Tensor
    added: Tensor


def guided_edit(
    activations: Tensor,
    clean: Tensor,
    counterfactual: Tensor,
    directions: Tensor,
    order: Tensor,
    old: Tensor,
    new: Tensor,
    k: int,
    scale: float = 1.0,
) -> GuidedEdit:
    """Remove the k features that stand for the old value and add the k that stand for the new one.

    Of the features active on the clean activation the first k in the old value's ranking are removed with their values; of those active
    on the counterfactual the first k in the new value's ranking are added with theirs. Where fewer are active, inactive ones fill up; their
    value is 0.

    Args:
        activations: (N, d) clean activations.
        clean: (N, h) features of these.
        counterfactual: (N, h) features of the counterfactual activations.
        directions: (h, d) decoder directions.
        order: (U, h) ranking of the features for each value, best first.
        old: (N,) value of the clean activations.
        new: (N,) value of the counterfactual ones.
        k: Features removed and added; at most h.
        scale: What maps normalised activations back; the edited ones are multiplied by it.
    """

    def chosen(features: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        ranking = order[value]
        active_first = torch.argsort((features.gather(1, ranking) == 0).byte(), dim=1, stable=True)
        picked = ranking.gather(1, active_first)[:, :k]
        kept = torch.zeros_like(features).scatter(1, picked, features.gather(1, picked))
        return picked, kept @ directions

    removed, leaving = chosen(clean, old)
    added, coming = chosen(counterfactual, new)
    return GuidedEdit((activations - leaving + coming) * scale, removed, added)


def feature_weights(features: Tensor, directions: Tensor) -> Tensor:
    """(N, h) f_j d_j . r / |r|^2 with r = sum_j f_j d_j: the share of each feature in a reconstruction without its bias; rows sum to 1.

    Args:
        features: (N, h).
        directions: (h, d). A row whose r is 0 gets NaN.
    """
    total = features @ directions
    return features * (total @ directions.T) / total.square().sum(1, keepdim=True)


def code_weights(codes: SupervisedCodes, ids: Sequence[Tensor]) -> Tensor:
    """(N, A) :func:`feature_weights` of the attributes of a supervised dictionary.

    Args:
        codes: The dictionary.
        ids: Of each attribute the (N,) values.
    """
    parts = torch.stack([code[one] for code, one in zip(codes.codes, ids, strict=True)], 1)
    total = parts.sum(1)
    return (parts @ total[:, :, None])[:, :, 0] / total.square().sum(1, keepdim=True)


def removed_weight(weights: Tensor, features: Tensor) -> Tensor:
    """(N,) sum of the weights of the edited features.

    Args:
        weights: (N, h) of the clean activations, from :func:`feature_weights`.
        features: (N, k) edited features; one that stands there twice counts twice.
    """
    return weights.gather(1, features).sum(1)


def l2_distance(target: Tensor, edited: Tensor) -> Tensor:
    """Mean over samples of |target - edited|.

    Args:
        target: (N, d) counterfactual activations.
        edited: (N, d).
    """
    return (target - edited).norm(dim=1).mean()


def attribution_distance(target: Tensor, edited: Tensor, gradient: Tensor) -> Tensor:
    """Mean over all N d entries of |(target - edited) * gradient|.

    Args:
        target: (N, d) counterfactual activations.
        edited: (N, d).
        gradient: (N, d) of the logit difference at the target.
    """
    return ((target - edited) * gradient).abs().mean()


# ---- axis 3: interpretability ----------------------------------------------------------------------------------------------------------


class ActivityCounts(NamedTuple):
    """(h, U) samples of each value on which a feature is active, (h,) on which it is active at all, (U,) samples of each value; int64."""

    joint: Tensor
    active: Tensor
    values: Tensor


def activity_counts(active: Tensor, ids: Tensor, size: int) -> ActivityCounts:
    """Counts of a part of the data; those of two parts add up.

    Args:
        active: (N, h) bool.
        ids: (N,) integer values of an attribute, 0 to U - 1.
        size: U.
    """
    hot = torch.nn.functional.one_hot(ids.long(), size).to(torch.float64)
    joint = (active.to(torch.float64).T @ hot).round().long()
    return ActivityCounts(joint, active.sum(0), hot.sum(0).long())


class ActivityScores(NamedTuple):
    """(h, U) float32 precision |P_j and u| / |P_j|, recall |P_j and u| / |u| and F1 of each feature for each value; NaN is 0 / 0."""

    precision: Tensor
    recall: Tensor
    f1: Tensor


def f1_scores(counts: ActivityCounts) -> ActivityScores:
    """How well a feature's activity tells a value.

    Args:
        counts: Of all data.
    """
    joint = counts.joint.float()
    precision, recall = joint / counts.active[:, None], joint / counts.values
    return ActivityScores(precision, recall, 2 * precision * recall / (precision + recall))


def best_values(f1: Tensor) -> tuple[Tensor, Tensor]:
    """(h,) largest F1 of each feature and the value that has it; NaN ranks as -inf.

    Args:
        f1: (h, U).
    """
    best = f1.nan_to_num(nan=-torch.inf).max(1)
    return best.values, best.indices


def value_order(f1: Tensor, max_group_size: int) -> Tensor:
    """(h, G) values of each feature in falling F1, NaN last, equals by index; G is at most U.

    Args:
        f1: (h, U).
        max_group_size: G.
    """
    return f1.nan_to_num(nan=-torch.inf).argsort(dim=1, descending=True, stable=True)[:, :max_group_size]


def feature_order(f1: Tensor) -> Tensor:
    """(U, h) features for each value in falling F1, NaN last, equals by index: the ranking that :func:`guided_edit` takes.

    Args:
        f1: (h, U).
    """
    return f1.nan_to_num(nan=-torch.inf).argsort(dim=0, descending=True, stable=True).T


def union_f1(counts: ActivityCounts, order: Tensor) -> Tensor:
    """(h, G) float32 F1 of the union of the first 1 to G values: 2 p r / (p + r + 1e-8), NaN for a feature that is never active.

    Args:
        counts: Of all data.
        order: (h, G) values of each feature, from :func:`value_order`.
    """
    joint = counts.joint.gather(1, order).cumsum(1).float()
    precision, recall = joint / counts.active[:, None], joint / counts.values[order].cumsum(1)
    return 2 * precision * recall / (precision + recall + 1e-8)


__all__ = [
    "ActivityCounts",
    "ActivityScores",
    "AttributeSums",
    "GreedyEdit",
    "GuidedEdit",
    "SupervisedCodes",
    "activity_counts",
    "attribute_sums",
    "attribution_distance",
    "best_values",
    "code_weights",
    "edit_arithmetic",
    "edit_subspace",
    "f1_scores",
    "feature_order",
    "feature_weights",
    "greedy_edit",
    "guided_edit",
    "l2_distance",
    "matched_pairs",
    "mean_codes",
    "mse_codes",
    "necessity",
    "reconstruct_by_codes",
    "removed_weight",
    "sufficiency",
    "union_f1",
    "value_order",
]
