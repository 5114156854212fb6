"""Each function beside another way to compute the same, in one run: seconds, memory, and what callbacks add to a loop by hand.

    python benchmarks/authors.py [--rounds 15] [--threads 1] [--only NAME ...] [--with FILE] [--json FILE]

1. One row a function: the other formulation's seconds and peak memory over ours (above 1: ours is better), gradients included where there
   are any. A round calls both, the first of them in turns; the median of the rounds' ratios is printed, with quartiles. Before anything is
   timed, both must give the same numbers. The other formulations stand in this file: what one writes down first from the paper's formula,
   without a look at anybody's code. Trivial rows, a few elementwise operations that can hardly be written in two ways, are left out of the
   geometric mean. A row counts as slower where its upper quartile is below 1: some sides run the same operations.
2. A training step with a callback under Lightning, over a step of a loop of torch alone that does the same; both must end with the same
   weights.

``--with FILE`` puts functions of a Python file in the place of the other formulations: ``benchmarks/authors.md`` tells how, for the
authors' code. Use an idle machine. Both sides run in this process, on the CPU.
"""

import argparse
import dataclasses
import itertools
import json
import logging
import math
import runpy
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from labels import _adawac_ours, _adawac_plain, _coprompt_ours, _coprompt_plain, _epoch, _epoch_ours, _epoch_plain
from lidar import allocated_peak, plain_info_nce
from scipy.linalg import sqrtm
from scipy.optimize import linear_sum_assignment
from sparsity import _ByHand, nm_by_sorting, update_by_sorting
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lit_methods.functional as ours
from lit_methods import LabelStore
from lit_methods.callbacks import ADELE, TCM, ConR, NMSparsity
from lit_methods.callbacks.imbalanced_regression.fds.core import Buckets

TARGET = 2.0  # geometric mean of the time ratios without the trivial rows
STEP_TARGETS = {"N:M": 1.10, "TCM": 1.03, "ConR": 1.03, "ADELE": 1.03}
LEAST = 0.02  # seconds that one measurement lasts at least: short calls are repeated

Parts = tuple[Any, ...]


class Row(NamedTuple):
    """A function in two formulations, of the same inputs.

    Attributes:
        inputs: Generator -> what both are called with; gradients are taken for floating point tensors that require one.
        ours: Ours.
        other: The other formulation.
        trivial: Whether it can hardly be written in two ways.
        rtol: Relative tolerance of equality.
    """

    inputs: Callable[[torch.Generator], Parts]
    ours: Callable[..., Any]
    other: Callable[..., Any]
    trivial: bool = False
    rtol: float = 1e-4


# ---- inputs ----------------------------------------------------------------------------------------------------------------------------


def normal(g: torch.Generator, *shape: int, grad: bool = False) -> Tensor:
    return torch.randn(*shape, generator=g, requires_grad=grad)


def integers(g: torch.Generator, high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=g)


def unit(g: torch.Generator, *shape: int, grad: bool = False) -> Tensor:
    return F.normalize(normal(g, *shape), dim=-1).requires_grad_(grad)


def pairs_to_contrast(share: float) -> Callable[[torch.Generator], Parts]:
    return lambda g: (unit(g, 3000, 64, grad=True), unit(g, 3000, 64, grad=True), 0.07, torch.rand(3000, generator=g) < share)


# ---- lidar -----------------------------------------------------------------------------------------------------------------------------


def contrast_of_rows(a: Tensor, b: Tensor, temperature: float, mask: Tensor) -> Tensor:
    return plain_info_nce(a, b, temperature, mask)


def mean_by_sparse_product(embeddings: Tensor, groups: Tensor, number: int) -> Tensor:
    at = torch.stack([groups, torch.arange(len(groups))])
    belongs = torch.sparse_coo_tensor(at, torch.ones(len(groups)), (number, len(groups)))
    return torch.sparse.mm(belongs, embeddings) / (torch.sparse.sum(belongs, 1).to_dense()[:, None] + 1e-6)


def lovasz_by_class(probs: Tensor, labels: Tensor, ignore: int) -> Tensor:
    probs, labels = probs[labels != ignore], labels[labels != ignore]
    losses = []
    for c in labels.unique():
        own = (labels == c).float()
        errors, order = (own - probs[:, c]).abs().sort(descending=True)
        own = own[order]
        jaccard = 1 - (own.sum() - own.cumsum(0)) / (own.sum() + (1 - own).cumsum(0))
        losses.append(errors @ torch.cat([jaccard[:1], jaccard.diff()]))
    return torch.stack(losses).mean()


def segmentation_in_two_parts(logits: Tensor, labels: Tensor, ignore: int) -> Tensor:
    return F.cross_entropy(logits, labels, ignore_index=ignore) + 2 * lovasz_by_class(logits.softmax(1), labels, ignore)


# ---- metric learning and regression ----------------------------------------------------------------------------------------------------


def conr_in_exponentials(features: Tensor, targets: Tensor, predictions: Tensor, weights: Tensor) -> Tensor:
    own = F.normalize(features, dim=1)
    similar = own @ own.T / 0.07
    far, guess = (targets - targets.T).abs(), (predictions - predictions.T).abs()
    positive = ((far <= 1) & ~torch.eye(len(own), dtype=torch.bool)).float()
    negative = ((far > 1) & (guess <= 1)).float()
    push = weights * (0.01 * far).exp() * negative
    both = (positive * similar).exp().sum(1) + (push * similar.exp()).sum(1)
    each = -(positive * (similar.exp() / both[:, None]).log()).sum(1) / positive.sum(1).clamp(min=1)
    counted = (positive.sum(1) > 0) & (negative.sum(1) > 0)
    return (weights[:, 0] * each * counted).mean()


def conr_dense_in_exponentials(features: Tensor, targets: Tensor, predictions: Tensor) -> Tensor:
    own = F.normalize(features.flatten(1), dim=1)
    similar = own @ own.T / 0.07
    y, guess = (part.flatten(1).mean(1, keepdim=True) for part in (targets, predictions))
    far = (y - y.T).abs()
    positive = ((far <= 0.2) & ~torch.eye(len(own), dtype=torch.bool)).float()
    negative = ((far > 0.2) & ((guess - guess.T).abs() <= 0.2)).float()
    both = (positive * similar).exp().sum(1) + (0.2 * far * negative * similar.exp()).sum(1)
    each = -(positive * (similar.exp() / both[:, None]).log()).sum(1) / (positive.sum(1) + 1)
    return (each * ((positive.sum(1) > 0) & (negative.sum(1) > 0))).mean()


def tcm_by_pairs(embeddings: Tensor, labels: Tensor) -> Tensor:
    own = F.normalize(embeddings, dim=1)
    cosine, alike = own @ own.T, labels[:, None] == labels
    a, p = torch.where(alike & ~torch.eye(len(labels), dtype=torch.bool))
    b, n = torch.where(~alike)
    positive, negative = cosine[a, p], cosine[b, n]
    hard = positive[positive <= 0.9], negative[negative >= 0.5]
    parts = [0.9 - hard[0], hard[1] - 0.5]
    return torch.stack([part.mean() if len(part) else part.sum() for part in parts]).sum()


def arcface_by_one_hot(embeddings: Tensor, proxies: Tensor, labels: Tensor) -> Tensor:
    cosine = F.linear(F.normalize(embeddings), F.normalize(proxies))
    moved = (cosine.clamp(-1 + 1e-7, 1 - 1e-7).acos() + 0.3).clamp(max=math.pi).cos()
    own = F.one_hot(labels, len(proxies)).float()
    return F.cross_entropy(16 * (own * moved + (1 - own) * cosine), labels)


def retrieval_by_sorting(embeddings: Tensor, labels: Tensor) -> Tensor:
    own = F.normalize(embeddings, dim=1)
    order = (own @ own.T).fill_diagonal_(-math.inf).argsort(dim=1, descending=True)[:, :-1]
    right = labels[order] == labels[:, None]
    number = right.sum(1)
    precision = right.cumsum(1) / torch.arange(1, right.shape[1] + 1)
    inside = torch.arange(right.shape[1]) < number[:, None]
    return torch.stack([right[:, 0].double().mean(), ((precision * right * inside).double().sum(1) / number).mean()])


def calibrate_by_bucket(features: Tensor, labels: Tensor, state: Any, buckets: Any) -> Tensor:
    result = features.clone()
    for label in labels.unique():
        row, mine = int(label) - buckets.first, labels == label
        ratio = (state.smoothed_variance[row] / state.variance[row]).clamp(0.1, 10).sqrt()
        result[mine] = (features[mine] - state.mean[row]) * ratio + state.smoothed_mean[row]
    return result


def fds_inputs(g: torch.Generator) -> Parts:
    """256 features, labels 1 to 98 of 100 buckets, and statistics of an epoch."""
    buckets = Buckets(0, 99)
    state = ours.fds_initial_state(buckets, 512)
    means = {name: normal(g, 100, 512) for name in ("mean", "smoothed_mean")}
    variances = {name: torch.rand(100, 512, generator=g) + 0.5 for name in ("variance", "smoothed_variance")}
    labels = torch.cat([torch.arange(1, 99), integers(g, 98, 158) + 1]).float()
    return normal(g, 256, 512), labels, dataclasses.replace(state, **means, **variances, begun=True), buckets


def balanced_mse_of_gaussians(predictions: Tensor, targets: Tensor) -> Tensor:
    logits = torch.distributions.Normal(predictions[:, None], 1.0).log_prob(targets[None])
    return 2 * F.cross_entropy(logits, torch.arange(len(targets)))


# ---- noisy labels ----------------------------------------------------------------------------------------------------------------------


def corrected_by_loops(labels: Tensor, prediction: Tensor, confidence: Tensor, classes: Sequence[int]) -> Tensor:
    results = []
    for old, guess, sure in zip(labels, prediction, confidence, strict=True):
        new, present = old.clone(), [int(c) for c in old.unique() if c != 255]
        foreground = [c for c in present if c]
        if foreground and not set(foreground) & set(classes):
            results.append(new)
            continue
        for c in {0, *classes}:
            if not foreground or c in present:
                new[(guess == c) & (old != guess) & (sure > 0.8)] = c
        lost = 2 * (new != 0).sum() < (old != 0).sum() and (new == 0).sum() > 0.95 * new.numel()
        results.append(old if lost else new)
    return torch.stack(results)


def merged_by_loops(labels: Tensor, probabilities: Tensor, needs: Tensor) -> Tensor:
    results = []
    for old, p in zip(labels, probabilities, strict=True):
        new, guess = old.clone(), p.argmax(0)
        sure = (p[1:].max(0).values > 0.8) | (p[0] > 0.95)
        free = [0, *[c for c in range(1, len(p)) if needs[c]]]
        for before in free:
            for after in free:
                if after == 0 or (old == after).any():
                    new[sure & (old == before) & (guess == after)] = after
        results.append(new)
    return torch.stack(results)


def scales_by_divergence(a: Tensor, b: Tensor, c: Tensor, labels: Tensor) -> Tensor:
    probs = [one.softmax(1) for one in (a, b, c)]
    mixture = (sum(probs) / 3).clamp(1e-3, 1 - 1e-3)
    ce = sum(F.cross_entropy(one / 3, labels, ignore_index=255, reduction="none").mean() for one in (a, b, c))
    parts = [F.kl_div(mixture.log(), p.clamp(min=1e-30), reduction="none").sum(1) for p in probs]
    largest = (mixture * (labels != 255)[:, None]).flatten(1).max(1).values
    return ce + (sum(parts) * (largest >= 0.8)[:, None, None]).mean()


def counts_by_class(prediction: Tensor, labels: Tensor, classes: int) -> Tensor:
    valid = labels != 255
    rows = [[(p & t).sum(), p.sum(), t.sum()] for c in range(classes) for p, t in [((prediction == c) & valid, (labels == c) & valid)]]
    return torch.tensor(rows).T


# ---- sparsity --------------------------------------------------------------------------------------------------------------------------


def largest_by_sorting(score: Tensor, count: int) -> Tensor:
    kept = torch.zeros(score.numel(), dtype=torch.bool)
    kept[score.flatten().argsort(descending=True, stable=True)[:count]] = True
    return kept.view_as(score)


def smallest_by_sorting(score: Tensor, share: float) -> Tensor:
    pruned = torch.zeros(score.numel(), dtype=torch.bool)
    pruned[score.flatten().argsort(stable=True)[: math.ceil(share * score.numel())]] = True
    return pruned.view_as(score)


def groups_by_sorting(score: Tensor, n: int, m: int) -> Tensor:
    groups = score.reshape(-1, m)
    order = groups.argsort(dim=1, stable=True)
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order[:, :n], True).view_as(score)


def shrunk_by_sorting(weight: Tensor, share: float, ratio: float) -> Tensor:
    pruned = smallest_by_sorting(weight.abs(), share)
    result = weight.clone()
    result[pruned] *= ratio
    return result


def global_masks_by_sorting(scores: Sequence[Tensor], density: float) -> list[Tensor]:
    every = torch.cat([score.flatten() for score in scores]).sort(descending=True).values
    return [score >= every[int(density * len(every)) - 1] for score in scores]


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    p, q = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
    return 4 * (p * (p.log() - q.log())).sum(-1).mean()


def distilled(student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
    valid = targets != -100
    kl = F.kl_div(student[valid].log_softmax(-1), teacher[valid].softmax(-1), reduction="batchmean")
    return kl / 3 + 2 * F.cross_entropy(student[valid], targets[valid]) / 3


def statistics_by_index(weight: Tensor, mask: Tensor) -> Tensor:
    removed, kept = weight[~mask].abs(), weight[mask].abs()
    return torch.stack([removed.mean(), kept.mean(), removed.mean() / kept.mean(), (removed < 1e-4).float().mean()])


def scaled_by_repeating(weight: Tensor, scale: Tensor) -> Tensor:
    return weight * scale.repeat_interleave(weight.shape[1] // scale.shape[1], dim=1)


def masked_by_product(weight: Tensor) -> Tensor:
    return (weight * nm_by_sorting(weight.detach(), 2, 4)).square().sum()


def penalised(gamma: Tensor, grad: Tensor, prune: Tensor) -> Tensor:
    return grad + 5e-4 * gamma.sign() * prune.float()


def adam_by_tensor(weights: list[Tensor], squares: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    weights, squares = [weight.clone() for weight in weights], [square.clone() for square in squares]
    for weight, square, grad in zip(weights, squares, grads, strict=True):
        square.mul_(0.999).add_(0.001 * grad**2)
        weight -= 1e-3 * (grad / (1 - 0.9)) / ((square / (1 - 0.999)).sqrt() + 1e-8)
    return weights


def adam_in_place(weights: list[Tensor], squares: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    weights, squares = [weight.clone() for weight in weights], [square.clone() for square in squares]
    ours.adam_update_(weights, squares, grads, grads, step=0, lr=1e-3, betas=(0.9, 0.999), eps=1e-8)
    return weights


def average_in_place(average: list[Tensor], source: list[Tensor]) -> list[Tensor]:
    average = [one.clone() for one in average]
    ours.ema_update(average, source, 0.99)
    return average


def average_by_tensor(average: list[Tensor], source: list[Tensor]) -> list[Tensor]:
    average = [one.clone() for one in average]
    for old, new in zip(average, source, strict=True):
        old.copy_(0.99 * old + 0.01 * new)
    return average


# ---- consistency models ----------------------------------------------------------------------------------------------------------------


def huber_of_norm(a: Tensor, b: Tensor) -> Tensor:
    return ((a - b).pow(2).sum((1, 2, 3)) + 0.03**2).sqrt() - 0.03


def cosine_contrast(query: Tensor, keys: Tensor) -> Tensor:
    cosine = F.normalize(query, dim=1) @ F.normalize(keys, dim=1).T
    return F.cross_entropy(cosine / 0.1, torch.arange(len(query)), reduction="none")


def frechet_by_root(samples: Tensor, data: Tensor) -> Tensor:
    a, b = samples.double(), data.double()
    gap = (a.mean(0) - b.mean(0)).square().sum()
    first, second = torch.cov(a.T), torch.cov(b.T)
    root = np.real(sqrtm((first @ second).numpy())).trace()
    return (gap + first.trace() + second.trace() - 2 * root).float()


def coverage_by_sorting(samples: Tensor, data: Tensor) -> Tensor:
    def covered(points: Tensor, manifold: Tensor) -> Tensor:
        reach = torch.cdist(manifold, manifold).sort(1).values[:, 3]
        return (torch.cdist(points, manifold) <= reach).any(1).float().mean()

    return torch.stack([covered(samples, data), covered(data, samples)])


def assigned_by_distance(x: Tensor, noise: Tensor) -> Tensor:
    apart = torch.cdist(x.flatten(1), noise.flatten(1)).square()
    return torch.from_numpy(linear_sum_assignment(apart.numpy())[1])


# ---- semi-supervised, prompting, recommendation, superresolution -----------------------------------------------------------------------


def propagated_by_inverse(probability: Tensor, embedding: Tensor, bank: Tensor, labels: Tensor) -> Tensor:
    nearest = (embedding @ bank.T).argsort(dim=1, descending=True)[:, :64]
    points = torch.cat([embedding[:, None], bank[nearest]], dim=1)
    known = torch.cat([probability[:, None], F.one_hot(labels, probability.shape[1]).float()[nearest]], dim=1)
    away = (points @ points.mT / 0.1).masked_fill(torch.eye(65, dtype=torch.bool), -math.inf).softmax(2)
    return (0.9 * torch.linalg.inv(torch.eye(65) - 0.1 * away) @ known)[:, 0]


def shrunk_by_loops(logits: Tensor, probability: Tensor, certain: Tensor) -> Tensor:
    losses = []
    for scores, p, sure in zip(logits, probability, certain, strict=True):
        order = p.argsort(descending=True, stable=True)
        for cut in range(2, len(p)):
            if p[order[0]] / (p[order[0]] + p[order[cut:]].sum()) >= 0.95:
                left = torch.cat([order[:1], order[cut:]])
                losses.append(p[order[0]] * ~sure * F.cross_entropy(scores[left][None], torch.tensor([0])))
                break
        else:
            losses.append(scores.sum() * 0)
    return torch.stack(losses).mean()


def ranking_by_user(scores: Tensor, known: Tensor, target: Tensor) -> Tensor:
    order = scores.masked_fill(known, -math.inf).topk(20, dim=1).indices
    hits, number = target.gather(1, order).float(), target.sum(1)
    gain = 1 / torch.arange(2, 22).float().log2()
    best = torch.stack([gain[: min(20, int(n))].sum() for n in number]).clamp(min=float(gain[-1]))
    return torch.stack([hits.sum(1) / number.clamp(min=1), hits.sum(1) / 20, (hits * gain).sum(1) / best])


def similarity_by_windows(sr: Tensor, hr: Tensor) -> Tensor:
    weights = torch.tensor([65.481, 128.553, 24.966], dtype=torch.float64).view(1, 3, 1, 1)
    a, b = ((image.double() * weights).sum(1, keepdim=True) + 16 for image in (sr, hr))
    at = torch.arange(11, dtype=torch.float64) - 5
    line = (-at.square() / 4.5).exp()
    window = (line[:, None] * line / line.sum() ** 2).view(1, 1, 11, 11)
    mean_a, mean_b = F.conv2d(a, window), F.conv2d(b, window)
    var_a, var_b = F.conv2d(a * a, window) - mean_a**2, F.conv2d(b * b, window) - mean_b**2
    both = F.conv2d(a * b, window) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return ((2 * mean_a * mean_b + c1) * (2 * both + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean((1, 2, 3))


def tower_distance(student: Tensor, teacher: Tensor) -> Tensor:
    return (1 - (student / student.norm(dim=1, keepdim=True) * (teacher / teacher.norm(dim=1, keepdim=True))).sum(1)).mean()


# ---- the table -------------------------------------------------------------------------------------------------------------------------


def dense_scores(g: torch.Generator) -> Parts:
    return (normal(g, 1024, 4096).abs(),)


def segmented_points(g: torch.Generator) -> Parts:
    return normal(g, 20_000, 17, grad=True), integers(g, 17, 20_000), 16


def annotated(g: torch.Generator) -> Parts:
    old = integers(g, 4, 8, 16, 16).repeat_interleave(8, 1).repeat_interleave(8, 2) * 3
    return old, integers(g, 12, 8, 128, 128), torch.rand(8, 128, 128, generator=g), [1, 3, 5, 6]


def several_scales(g: torch.Generator) -> Parts:
    """Logits of three scales, and labels."""
    return *((4 * normal(g, 4, 21, 64, 64)).requires_grad_() for _ in range(3)), integers(g, 21, 4, 64, 64)


def parameters(g: torch.Generator) -> list[Tensor]:
    return [normal(g, *shape) for shape in [(64, 64, 3, 3)] * 30 + [(64,)] * 120]


def users(g: torch.Generator) -> Parts:
    return normal(g, 256, 10_000), torch.rand(256, 10_000, generator=g) < 0.01, torch.rand(256, 10_000, generator=g) < 0.002


ROWS: dict[str, Row] = {
    "info_nce, 40 % of 3,000 rows": Row(pairs_to_contrast(0.4), ours.info_nce, contrast_of_rows),
    "info_nce, all of 3,000 rows": Row(pairs_to_contrast(2.0), ours.info_nce, contrast_of_rows),
    "group_mean": Row(
        lambda g: (normal(g, 40_000, 64, grad=True), integers(g, 3000, 40_000), 3000),
        lambda *a: ours.group_mean(*a)[0],
        mean_by_sparse_product,
    ),
    "lovasz_softmax": Row(
        lambda g: (normal(g, 20_000, 17).softmax(1).requires_grad_(), integers(g, 17, 20_000), 16), ours.lovasz_softmax, lovasz_by_class
    ),
    "segmentation_losses": Row(segmented_points, lambda *a: ours.segmentation_losses(*a)["total"], segmentation_in_two_parts),
    "conr_loss": Row(
        lambda g: (normal(g, 256, 512, grad=True), *(10 * torch.rand(256, 1, generator=g) for _ in range(3))),
        lambda *a: ours.conr_loss(*a).loss,
        conr_in_exponentials,
    ),
    "conr_dense_loss": Row(
        lambda g: (normal(g, 32, 64, 14, 14, grad=True), *(normal(g, 32, 1, 1, 1) + normal(g, 32, 1, 56, 56) for _ in range(2))),
        lambda *a: ours.conr_dense_loss(*a).loss,
        conr_dense_in_exponentials,
    ),
    "FDS, statistics of an epoch": Row(lambda g: _epoch(), _epoch_ours, _epoch_plain),
    "fds_calibrate": Row(fds_inputs, lambda *a: ours.fds_calibrate(*a, epoch=5), calibrate_by_bucket),
    "regression_loss, balanced_mse": Row(
        lambda g: (normal(g, 512, grad=True), normal(g, 512)),
        lambda *a: ours.regression_loss(*a, loss="balanced_mse"),
        balanced_mse_of_gaussians,
    ),
    "tcm_loss": Row(
        lambda g: ((normal(g, 512, 128) + 2 * normal(g, 1, 128)).requires_grad_(), integers(g, 64, 512)),
        lambda *a: ours.tcm_loss(*a).loss,
        tcm_by_pairs,
    ),
    "proxy_softmax, angle": Row(
        lambda g: (normal(g, 128, 512, grad=True), normal(g, 1000, 512, grad=True), integers(g, 1000, 128)),
        lambda *a: ours.proxy_softmax(*a, margin=0.3, margin_on="angle"),
        arcface_by_one_hot,
    ),
    "retrieval_scores": Row(
        lambda g: (normal(g, 2000, 64), torch.arange(2000) % 100),
        lambda *a: torch.stack(list(ours.retrieval_scores(*a).values())),
        retrieval_by_sorting,
    ),
    "adawac_loss": Row(
        lambda g: (
            *(normal(g, 16, 9, 112, 112, grad=True) for _ in range(2)),
            *(integers(g, 9, 16, 112, 112) for _ in range(2)),
            *(normal(g, 16, 64, 7, 7, grad=True) for _ in range(2)),
            torch.full((16, 2), 0.5),
        ),
        _adawac_ours,
        _adawac_plain,
    ),
    "corrected_labels": Row(annotated, ours.corrected_labels, corrected_by_loops),
    "merged_labels": Row(
        lambda g: (
            integers(g, 6, 8, 64, 64),
            (4 * normal(g, 8, 6, 64, 64)).softmax(1),
            torch.tensor([0, 1, 0, 1, 1, 0]),
        ),
        ours.merged_labels,
        merged_by_loops,
    ),
    "multiscale_consistency": Row(
        several_scales, lambda a, b, c, y: sum(ours.multiscale_consistency([a, b, c], y)[:2]), scales_by_divergence
    ),
    "class_counts": Row(lambda g: (integers(g, 21, 4, 256, 256), integers(g, 21, 4, 256, 256), 21), ours.class_counts, counts_by_class),
    "nm_mask 2:4": Row(lambda g: (normal(g, 1024, 4096), 2, 4), ours.nm_mask, nm_by_sorting),
    "nm_mask 4:8": Row(lambda g: (normal(g, 1024, 4096), 4, 8), ours.nm_mask, nm_by_sorting),
    "nm_mask 8:16": Row(lambda g: (normal(g, 1024, 4096), 8, 16), ours.nm_mask, nm_by_sorting),
    "nm_mask 1:16": Row(lambda g: (normal(g, 1024, 4096), 1, 16), ours.nm_mask, nm_by_sorting),
    "keep_largest": Row(lambda g: (*dense_scores(g), 400_000), ours.keep_largest, largest_by_sorting),
    "update_mask, RigL": Row(
        lambda g: (
            w := normal(g, 512, 4096) * (m := ours.keep_largest(torch.rand(512, 4096, generator=g), 200_000)),
            m,
            torch.rand(w.shape, generator=g),
            0.3,
            200_000,
        ),
        ours.update_mask,
        update_by_sorting,
    ),
    "pick_pruned, smallest": Row(lambda g: (*dense_scores(g), 0.9), ours.pick_pruned, smallest_by_sorting),
    "pick_pruned, 15 of 16": Row(
        lambda g: (*dense_scores(g), 15, 16), lambda s, n, m: ours.pick_pruned(s, 0.9, f"min_{n}:{m}"), groups_by_sorting
    ),
    "shrink_step": Row(
        lambda g: (normal(g, 512, 4096), 0.9, 0.97), lambda *a: ours.shrink_step(*a)[0], shrunk_by_sorting
    ),
    "kept_masks, all layers": Row(
        lambda g: ([torch.rand(512, 1024, generator=g) for _ in range(4)], 0.1), ours.kept_masks, global_masks_by_sorting
    ),
    "kl_to_teacher": Row(
        lambda g: (normal(g, 512, 8000, grad=True), normal(g, 512, 8000)), lambda s, t: ours.kl_to_teacher(s, t, 2.0), divergence
    ),
    "distillation_loss": Row(
        lambda g: (
            normal(g, 512, 8000, grad=True),
            normal(g, 512, 8000),
            torch.where(torch.rand(512, generator=g) < 0.2, -100, integers(g, 8000, 512)),
        ),
        lambda *a: ours.distillation_loss(*a)[0],
        distilled,
    ),
    "magnitude_statistics": Row(
        lambda g: (w := normal(g, 1024, 2048) * 1e-3, ours.nm_mask(w, 2, 4)),
        lambda w, m: torch.stack(list(ours.magnitude_statistics([w], [m]).values())),
        statistics_by_index,
    ),
    "scaled_weight": Row(
        lambda g: (normal(g, 1024, 1024, grad=True), normal(g, 1024, 64, grad=True)),
        lambda *a: ours.scaled_weight(*a).sum(),
        lambda *a: scaled_by_repeating(*a).sum(),
    ),
    "AdamS's update": Row(
        lambda g: (parameters(g), [part.square() for part in parameters(g)], parameters(g)), adam_in_place, adam_by_tensor
    ),
    "ema_update": Row(lambda g: (parameters(g), parameters(g)), average_in_place, average_by_tensor),
    "sparse_gradient, l1": Row(
        lambda g: (normal(g, 512), normal(g, 512), torch.arange(512) % 2 == 0),
        lambda *a: ours.sparse_gradient(*a, "l1", 5e-4),
        penalised,
        trivial=True,
    ),
    "decay_pruned": Row(
        lambda g: (normal(g, 512, 512), w := normal(g, 512, 512), ours.nm_mask(w, 2, 4)),
        lambda *a: ours.decay_pruned(*a, 2e-4),
        lambda grad, weight, mask: grad + 2e-4 * (1 - mask.float()) * weight,
        trivial=True,
    ),
    "pseudo_huber": Row(
        lambda g: (normal(g, 32, 3, 32, 32, grad=True), normal(g, 32, 3, 32, 32)),
        lambda *a: ours.pseudo_huber(*a, 0.03),
        huber_of_norm,
        trivial=True,
    ),
    "cosine_info_nce": Row(
        lambda g: (normal(g, 128, 256, grad=True), normal(g, 128, 256)), lambda q, k: ours.cosine_info_nce(q, k, 0.1), cosine_contrast
    ),
    "frechet_distance": Row(lambda g: (normal(g, 900, 128), normal(g, 900, 128) + 1), ours.frechet_distance, frechet_by_root, rtol=1e-3),
    "precision_recall": Row(
        lambda g: (normal(g, 1500, 16), normal(g, 1500, 16)), lambda *a: torch.stack(ours.precision_recall(*a)), coverage_by_sorting
    ),
    "couple": Row(lambda g: (normal(g, 128, 3, 16, 16), normal(g, 128, 3, 16, 16)), lambda *a: ours.couple(*a).match, assigned_by_distance),
    "propagate": Row(
        lambda g: (normal(g, 32, 10).softmax(1), unit(g, 32, 128), unit(g, 500, 128), integers(g, 10, 500)),
        lambda *a: ours.propagate(*a, neighbours=64, temperature=0.1, alpha=0.1),
        propagated_by_inverse,
    ),
    "ShrinkMatch's term": Row(
        lambda g: (normal(g, 64, 100, grad=True), (3 * normal(g, 64, 100)).softmax(1), torch.rand(64, generator=g) < 0.3),
        lambda logits, p, sure: ours.uncertain_loss(logits, p, sure, ours.shrink(p, 0.95)),
        shrunk_by_loops,
    ),
    "coprompt_loss": Row(
        lambda g: (
            normal(g, 64, 512, grad=True),
            normal(g, 1000, 512, grad=True),
            normal(g, 64, 512),
            normal(g, 1000, 512),
            integers(g, 1000, 64),
        ),
        _coprompt_ours,
        _coprompt_plain,
    ),
    "embedding_consistency": Row(
        lambda g: (normal(g, 1000, 512, grad=True), normal(g, 1000, 512)), ours.embedding_consistency, tower_distance
    ),
    "ranking_metrics": Row(
        users,
        lambda *a: torch.stack([value for name, value in ours.ranking_metrics(*a, k=20).items() if name != "counted"]),
        ranking_by_user,
    ),
    "ssim_y": Row(
        lambda g: tuple(integers(g, 256, 2, 3, 128, 128) / 255 for _ in range(2)), ours.ssim_y, similarity_by_windows
    ),
}  # fmt: skip


# ---- measuring -------------------------------------------------------------------------------------------------------------------------


def flat(value: Any) -> list[Tensor]:
    """The tensors of a result."""
    return [value] if isinstance(value, Tensor) else [tensor for part in value for tensor in flat(part)]


def call(function: Callable[..., Any], inputs: Parts) -> list[Tensor]:
    """A result and its gradients."""
    learns = [part for part in inputs if isinstance(part, Tensor) and part.requires_grad]
    results = flat(function(*inputs))
    if learns:
        results += torch.autograd.grad(results[0].sum(), learns)
    return [result.detach() for result in results]


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return low, middle, high


def compare(row: Row, rounds: int) -> dict[str, Any]:
    """Ratios of a row, both sides of which must give the same."""
    inputs = row.inputs(torch.Generator().manual_seed(0))
    sides = {"ours": row.ours, "other": row.other}
    for mine, its in zip(call(row.ours, inputs), call(row.other, inputs), strict=True):
        scale = float(its.abs().max()) if its.numel() and its.is_floating_point() else 0.0
        torch.testing.assert_close(mine, its, rtol=row.rtol, atol=1e-5 * scale, check_dtype=False)
    begin = time.perf_counter()
    call(row.ours, inputs)
    repeats = max(1, math.ceil(LEAST / (time.perf_counter() - begin)))
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds):
        for name in sides if turn % 2 else reversed(sides):
            begin = time.perf_counter()
            for _ in range(repeats):
                call(sides[name], inputs)
            seconds[name].append((time.perf_counter() - begin) / repeats)
    peaks = {name: allocated_peak(lambda side=side: call(side, inputs)) for name, side in sides.items()}  # type: ignore[misc]
    return {
        "ours_ms": 1e3 * statistics.median(seconds["ours"]),
        "time": quartiles([other / own for other, own in zip(seconds["other"], seconds["ours"], strict=True)]),
        "ours_mb": peaks["ours"] / 1e6,
        "memory": max(1, peaks["other"]) / max(1, peaks["ours"]),
        "trivial": row.trivial,
    }


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


# ---- steps -----------------------------------------------------------------------------------------------------------------------------


class Network(pl.LightningModule):
    """A ResNet-like body, a head of classes or of a number, and a segmentor, trained by what the batch has."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        wide = 64
        layers: list[nn.Module] = [nn.Conv2d(3, wide, 3, padding=1), nn.ReLU()]
        layers += [part for _ in range(4) for part in (nn.Conv2d(wide, wide, 3, padding=1), nn.BatchNorm2d(wide), nn.ReLU())]
        if kind == "N:M":
            inner = [part for _ in range(6) for part in (nn.Linear(1024, 1024), nn.ReLU())]
            layers = [nn.Flatten(), nn.Linear(3 * 32 * 32, 1024), nn.ReLU(), *inner, nn.Linear(1024, 10)]
        elif kind == "ADELE":
            layers.append(nn.Conv2d(wide, 8, 1))
        else:
            layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(wide, 128)]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(128, 1 if kind == "ConR" else 10) if kind in ("TCM", "ConR") else nn.Identity()

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, the features and the answer."""
        features = self.body(batch["image"])
        answer = self.head(features)
        if self.kind == "ConR":
            return F.l1_loss(answer[:, 0], batch["label"].float()), features, answer
        return F.cross_entropy(answer, batch["mask" if self.kind == "ADELE" else "label"]), features, answer

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)[0]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class Clock(pl.Callback):
    """Notes the end of each batch."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *args: Any) -> None:
        self.ends.append(time.perf_counter())


def one_batch(kind: str) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    size = 256 if kind == "N:M" else 8 if kind == "ADELE" else 32
    return {
        "image": normal(g, size, 3, 32, 32),
        "label": integers(g, 10, size),
        "mask": integers(g, 8, size, 32, 32),
        "index": torch.arange(size),
    }


def callback(kind: str, folder: Path) -> pl.Callback:
    """What is attached under Lightning."""
    if kind == "N:M":
        return NMSparsity(2, 4, "ste", targets=["body.*"])
    if kind == "TCM":
        return TCM("body", weight=0.5)
    if kind == "ConR":
        return ConR(features="body", predictions="head", labels="label", weight=0.5)
    batch = one_batch(kind)
    store = LabelStore.create(folder / "labels", batch["mask"].numpy().astype(np.int64))
    return ADELE(num_classes=8, network="body", tracked="mask", scales=[1.0], store=store, loader=[batch])


def lightning_steps(kind: str, steps: int) -> tuple[list[float], dict[str, Tensor]]:
    """Seconds of each step under Lightning, and the weights at the end."""
    module, clock = Network(kind), Clock()
    loader: Any = DataLoader([one_batch(kind)] * steps, batch_size=None)  # type: ignore[arg-type]
    silent: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    with tempfile.TemporaryDirectory() as folder:
        callbacks = [callback(kind, Path(folder)), clock]
        trainer = pl.Trainer(accelerator="cpu", max_epochs=1, callbacks=callbacks, default_root_dir=folder, **silent)
        trainer.fit(module, train_dataloaders=loader)
    return list(itertools.starmap(lambda a, b: b - a, itertools.pairwise(clock.ends))), module.state_dict()


def steps_by_hand(kind: str, steps: int) -> tuple[list[float], dict[str, Tensor]]:
    """Seconds of each step of a loop of torch alone, and the weights at the end."""
    module, seconds = Network(kind), []
    optimizer = module.configure_optimizers()
    counts = torch.zeros(3, 8, dtype=torch.int64)
    if kind == "N:M":
        for layer in [part for part in module.body if isinstance(part, nn.Linear)]:
            layer.forward = lambda x, layer=layer: F.linear(x, _ByHand.apply(layer.weight), layer.bias)  # type: ignore[misc, method-assign]
    module.train()
    batch = one_batch(kind)
    for _ in range(steps):
        begin = time.perf_counter()
        optimizer.zero_grad()
        loss, features, answer = module.loss(batch)
        if kind == "TCM":
            loss = loss + 0.5 * ours.tcm_loss(features, batch["label"]).loss
        elif kind == "ConR":
            loss = loss + 0.5 * ours.conr_loss(features, batch["label"], answer).loss
        loss.backward()
        optimizer.step()
        if kind == "ADELE":
            counts += ours.class_counts(answer.detach().float().argmax(1), batch["mask"], 8)
        seconds.append(time.perf_counter() - begin)
    return seconds[1:], module.state_dict()


def compare_steps(kind: str, rounds: int, steps: int) -> tuple[float, float, float]:
    """Ratio of a step under Lightning to one by hand."""
    ratios = []
    for turn in range(rounds):
        found = {}
        for side in (lightning_steps, steps_by_hand) if turn % 2 else (steps_by_hand, lightning_steps):
            found[side.__name__] = side(kind, steps)
        (own, weights), (bare, expected) = found["lightning_steps"], found["steps_by_hand"]
        if not turn:
            values = {name.replace("parametrizations.weight.original", "weight"): value for name, value in weights.items()}
            for name, latent in expected.items():
                masked = kind == "N:M" and latent.ndim == 2  # what the callback leaves behind at the end
                value = latent * ours.nm_mask(latent, 2, 4) if masked else latent
                torch.testing.assert_close(values[name], value, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{kind}, {name}: {text}")
        ratios.append(statistics.median(own[2:]) / statistics.median(bare[2:]))
    return quartiles(ratios)


def main() -> int:
    """Measure, print, and say whether the targets are met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="measurements of each figure (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=12, help="training steps of a fit, the first three untimed (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: %(default)s)")
    parser.add_argument("--only", nargs="*", default=[], help="rows and callbacks whose names hold one of these words")
    parser.add_argument("--with", dest="adapters", type=Path, help="a Python file with OTHER = {name of a row: function}")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)

    def asked(name: str) -> bool:
        return not options.only or any(word in name for word in options.only)

    rows = dict(ROWS)
    if options.adapters:
        others = runpy.run_path(str(options.adapters))["OTHER"]
        if unknown := sorted(set(others) - set(rows)):
            parser.error(f"{options.adapters}: no rows are called {', '.join(unknown)}; there are {', '.join(rows)}")
        rows = {name: rows[name]._replace(other=other) for name, other in others.items()}
    figures: dict[str, Any] = {"torch": torch.__version__, "threads": options.threads, "rounds": options.rounds, "rows": {}, "steps": {}}
    print(f"{'other / ours':34}{'ours ms':>9}{'time':>8}{'quartiles':>16}{'ours MB':>9}{'memory':>8}")
    for name, row in rows.items():
        if asked(name):
            found = figures["rows"][name] = compare(row, options.rounds)
            low, middle, high = found["time"]
            between = f"{low:.2f} to {high:.2f}"
            line = f"{name:34}{found['ours_ms']:9.2f}{middle:8.2f}{between:>16}{found['ours_mb']:9.2f}{found['memory']:8.2f}"
            print(line + ("  trivial" if row.trivial else ""), flush=True)
    missed = []
    for title, chosen in (
        ("all rows", list(figures["rows"].values())),
        ("without trivial rows", [found for found in figures["rows"].values() if not found["trivial"]]),
    ):
        if chosen:
            means = [geometric_mean([found["time"][1] for found in chosen]), geometric_mean([found["memory"] for found in chosen])]
            figures[title] = means
            print(f"geometric mean of {len(chosen)} rows, {title}: time {means[0]:.2f}, memory {means[1]:.2f}")
    if "without trivial rows" in figures:
        time_mean, memory_mean = figures["without trivial rows"]
        missed += [f"time {time_mean:.2f} < {TARGET}"] * (time_mean < TARGET) + [f"memory {memory_mean:.2f} < 1"] * (memory_mean < 1)
    missed += [f"{name}: {found['time'][1]:.2f} < 1" for name, found in figures["rows"].items() if found["time"][2] < 1]
    for kind, target in STEP_TARGETS.items():
        if asked(kind) and not options.adapters:
            low, middle, high = figures["steps"][kind] = compare_steps(kind, options.rounds, options.steps)
            print(f"a step with {kind} / by hand: {middle:.3f} ({low:.3f} to {high:.3f}), target {target}", flush=True)
            missed += [f"{kind}: {middle:.3f} > {target}"] * (middle > target)
    print("targets: " + ("; ".join(missed) + ": MISSED" if missed else "met"))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
