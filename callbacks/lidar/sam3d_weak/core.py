"""Masks that spread a few labels over points, and consistency that trusts points by confidence and uncertainty (arXiv:2508.19909).

The paper's code is not public. The reliability loss is that of its predecessor RAC-Net (arXiv:2303.05164); its golden vectors were made
with wu-zhonghua/RAC-Net at 4e5272f (``pcr/engines/defaults.py``). How labels spread over masks is our reconstruction from the abstract,
and so are the views' deformations, which follow the description of PointWOLF (arXiv:2110.05379). The lifting of masks to points is the
family's: :mod:`lit_methods.lidar.lifting`. Order of this file: spreading, views, reliability.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_methods.seeds import seeded_noise

# -------------------------------------------------------------------------------------------------------------------------- spreading


class Spread(NamedTuple):
    """What :func:`spread_masks` finds.

    Attributes:
        votes: (N, C) int64, votes of the masks for each class.
        labels: (N,) int64, the given labels and the new ones.
    """

    votes: Tensor
    labels: Tensor


def vote_winners(votes: Tensor, ignore_index: int = 255) -> Tensor:
    """The class with most votes; ``ignore_index`` where two classes have as many, or none has any.

    Args:
        votes: (N, C) integers >= 0.
        ignore_index: Label without a class.

    Returns:
        (N,) int64.
    """
    if 0 in votes.shape:
        return torch.full((votes.shape[0],), ignore_index, dtype=torch.int64, device=votes.device)
    most, winner = votes.max(dim=1)
    alone = (votes == most[:, None]).sum(1) == 1
    return torch.where(alone & (most > 0), winner, ignore_index)


def spread_masks(
    mask_ids: Tensor, labels: Tensor, num_classes: int, min_purity: float = 1.0, min_count: int = 1, ignore_index: int = 255
) -> Spread:
    """Let the masks of every view spread the labels of a few points over all of their points.

    A mask with at least ``min_count`` labelled points, of which at least the share ``min_purity`` has the most frequent class c (of equally
    frequent ones the smallest), gives one vote for c to each of its points. An unlabelled point takes the class with most votes over
    the views; without votes, or with two classes in front, it stays unlabelled. Given labels stay.

    Args:
        mask_ids: (V, N) integers, mask of each point in each view; below 0: none. A number means another mask in each view.
        labels: (N,) integers in 0..C-1, or ``ignore_index`` for unlabelled points.
        num_classes: C.
        min_purity: Share in 0 to 1.
        min_count: Labelled points that a mask must have.
        ignore_index: Label of unlabelled points.

    Returns:
        Votes and labels.

    Raises:
        ValueError: A label is neither a class nor ``ignore_index``, or the numbers of points differ.
    """
    views, number = mask_ids.shape
    labels = labels.long()
    if labels.shape != (number,):
        raise ValueError(f"mask_ids are of {number} points and labels {tuple(labels.shape)}: give one label per point")
    labelled = labels != ignore_index
    if bool((labelled & ((labels < 0) | (labels >= num_classes))).any()):
        wrong = labels[labelled & ((labels < 0) | (labels >= num_classes))][0]
        raise ValueError(f"a point has the label {int(wrong)}: give classes 0 to {num_classes - 1}, or {ignore_index} for unlabelled ones")
    device = mask_ids.device
    view, point = (mask_ids >= 0).nonzero(as_tuple=True)
    # one number for each mask of each view
    ids = mask_ids[view, point].long()
    wide = int(ids.max()) + 1 if ids.numel() else 1
    mask, masks = view * wide + ids, views * wide
    if masks > len(mask):  # large numbers of few masks: numbered anew, so that counting takes no more room than the points
        found, mask = torch.unique(mask, return_inverse=True)
        masks = len(found)
    counted = labelled[point]
    pair = mask[counted] * num_classes + labels[point][counted]
    counts = torch.bincount(pair, minlength=masks * num_classes).view(masks, num_classes)
    total = counts.sum(1)
    # counts scaled, so that of equal ones the smallest class is largest
    chosen = (counts * num_classes - torch.arange(num_classes, device=device)).argmax(1) if masks else total
    most = counts.gather(1, chosen[:, None])[:, 0]
    speaks = (total >= max(min_count, 1)) & (most.double() / total.clamp(min=1) >= min_purity)
    heard = speaks[mask]
    place = point[heard] * num_classes + chosen[mask[heard]]
    votes = torch.bincount(place, minlength=number * num_classes).view(number, num_classes)
    return Spread(votes, torch.where(labelled, labels, vote_winners(votes, ignore_index)))


def spread_pseudo_labels(
    mask_ids: Tensor,
    labels: Tensor,
    pseudo_labels: Tensor,
    num_classes: int,
    min_purity: float = 0.9,
    min_count: int = 5,
    ignore_index: int = 255,
) -> Tensor:
    """Labels for points that have none, from the masks' votes on given labels and reliable pseudo-labels together.

    Args:
        mask_ids: (V, N) as in :func:`spread_masks`.
        labels: (N,) annotated and extended labels, which stay, or ``ignore_index``.
        pseudo_labels: (N,) classes of reliable points, or ``ignore_index``.
        num_classes: C.
        min_purity: Share in 0 to 1.
        min_count: Labelled points that a mask must have.
        ignore_index: Label of unlabelled points.

    Returns:
        (N,) int64: the votes' winners where ``labels`` has none, ``ignore_index`` everywhere else.
    """
    known = labels != ignore_index
    votes = spread_masks(mask_ids, torch.where(known, labels, pseudo_labels), num_classes, min_purity, min_count, ignore_index).votes
    return torch.where(known, ignore_index, vote_winners(votes, ignore_index))


# ------------------------------------------------------------------------------------------------------------------------------ views


def per_point(points_per_sample: Tensor, number: int) -> Tensor:
    """(N,) int64, the cloud of each point.

    Args:
        points_per_sample: (B,) int64.
        number: N, their sum, which is not read from the device.
    """
    clouds = torch.arange(len(points_per_sample), device=points_per_sample.device)
    return torch.repeat_interleave(clouds, points_per_sample, output_size=number)


def _extreme(values: Tensor, sample: Tensor, clouds: int, reduce: str) -> Tensor:
    """(B,) largest or smallest value of each cloud."""
    return values.new_zeros(clouds).scatter_reduce(0, sample, values, reduce, include_self=False)


def unit_spheres(positions: Tensor, sample: Tensor, clouds: int) -> tuple[Tensor, Tensor, Tensor]:
    """Positions of each cloud in a sphere of radius 1 around its mean.

    Args:
        positions: (N, 3).
        sample: (N,) int64, cloud of each point.
        clouds: B.

    Returns:
        Positions (N, 3), centres (B, 3), radii (B, 1).
    """
    size = positions.new_zeros(clouds).index_add(0, sample, positions.new_ones(len(positions))).clamp(min=1)
    centre = positions.new_zeros(clouds, 3).index_add(0, sample, positions) / size[:, None]
    away = positions - centre[sample]
    radius = _extreme(away.norm(dim=1), sample, clouds, "amax").clamp(min=1e-6)[:, None]
    return away / radius[sample], centre, radius


def farthest_points(positions: Tensor, sample: Tensor, clouds: int, number: int) -> Tensor:
    """Points of each cloud that lie far from each other: the first one, then again and again the one farthest from those before.

    Args:
        positions: (N, 3).
        sample: (N,) int64, cloud of each point, each with a point at least.
        clouds: B.
        number: M, points of each cloud; a cloud of fewer points has some twice.

    Returns:
        (B, M) int64 rows of ``positions``.
    """
    rows = torch.arange(len(positions), device=positions.device)
    chosen = _extreme(rows, sample, clouds, "amin")
    found, nearest = [chosen], torch.full_like(positions[:, 0], torch.inf)
    for _ in range(number - 1):
        nearest = torch.minimum(nearest, (positions - positions[chosen][sample]).square().sum(1))
        farthest = _extreme(nearest, sample, clouds, "amax")[sample]
        chosen = _extreme(rows.where(nearest == farthest, len(rows)), sample, clouds, "amin")
        found.append(chosen)
    return torch.stack(found, dim=1)


def random_points(points_per_sample: Tensor, uniform: Tensor) -> Tensor:
    """Points of each cloud at random, with repetition.

    Args:
        points_per_sample: (B,) int64.
        uniform: (B, M) numbers in [0, 1].

    Returns:
        (B, M) int64 rows of the concatenated clouds.
    """
    size = points_per_sample[:, None]
    within = torch.minimum((uniform * size).long(), size - 1)
    return within + (points_per_sample.cumsum(0) - points_per_sample)[:, None]


def _rotations(angles: Tensor) -> Tensor:
    """(..., 3, 3) rotations about x, then y, then z, from (..., 3) radians."""
    (cx, cy, cz), (sx, sy, sz) = angles.cos().unbind(-1), angles.sin().unbind(-1)
    rows = [cz * cy, cz * sy * sx - sz * cx, cz * sy * cx + sz * sx]
    rows += [sz * cy, sz * sy * sx + cz * cx, sz * sy * cx - cz * sx]
    rows += [-sy, cy * sx, cy * cx]
    return torch.stack(rows, dim=-1).unflatten(-1, (3, 3))


def locally_deformed(
    positions: Tensor,
    sample: Tensor,
    anchors: Tensor,
    uniform: Tensor,
    width: float = 0.5,
    rotation: float = 10.0,
    scale: float = 3.0,
    shift: float = 0.25,
) -> Tensor:
    """Smooth deformation of clouds: each anchor turns, stretches and moves its surroundings, and points take the weighted mean.

    Anchor m with position a maps x to ``y_m = a + R diag(s) (x - a) + t``, with angles of R in +-``rotation``, stretches s in 1 to
    ``scale``, shifts t in +-``shift``; x becomes ``sum_m k_m y_m / sum_m k_m`` with ``k_m = exp(-|x - a|^2 / (2 width^2))``.
    This is done in the unit sphere of each cloud, so that lengths are shares of its radius.

    Args:
        positions: (N, 3) of B clouds, one after the other.
        sample: (N,) int64, cloud of each point.
        anchors: (B, M) int64, rows of ``positions``.
        uniform: (B, M, 9) numbers in [0, 1], which choose angles, stretches and shifts.
        width: Standard deviation of the kernel, radii of the cloud.
        rotation: Largest angle about each axis, degrees.
        scale: Largest stretch, 1 or more.
        shift: Largest shift along each axis, radii of the cloud.

    Returns:
        (N, 3) in the order and the unit of ``positions``.
    """
    clouds = anchors.shape[0]
    inside, centre, radius = unit_spheres(positions, sample, clouds)
    angles = torch.deg2rad(rotation * (2 * uniform[..., :3] - 1))
    stretch, shifts = 1 + (scale - 1) * uniform[..., 3:6], shift * (2 * uniform[..., 6:] - 1)
    linear = _rotations(angles) * stretch[..., None, :]
    at = inside[anchors]
    away = inside[:, None] - at[sample]
    mapped = (linear[sample] @ away[..., None])[..., 0] + (at + shifts)[sample]
    kernel = (away.square().sum(-1) / (-2 * width**2)).softmax(dim=1)  # a softmax: far from all anchors the sum of kernels is 0
    deformed = (kernel[..., None] * mapped).sum(1)
    return deformed * radius[sample] + centre[sample]


def mixed(first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    """``share * first + (1 - share) * second``, with a share of its own for each point.

    Args:
        first: (N, D).
        second: (N, D), the same points in the same order.
        share: (N,) in [0, 1].
    """
    return share[:, None] * first + (1 - share[:, None]) * second


class Deformation(NamedTuple):
    """How much views are deformed; lengths are shares of a cloud's radius.

    Attributes:
        anchors: M, places of a cloud that have a deformation of their own.
        width: Standard deviation of their kernel.
        rotation: Largest angle about each axis, degrees.
        scale: Largest stretch, 1 or more.
        shift: Largest shift along each axis.
    """

    anchors: int = 4
    width: float = 0.5
    rotation: float = 10.0
    scale: float = 3.0
    shift: float = 0.25


class Views(NamedTuple):
    """Places of the points of all clouds (N, 3) in two deformed views, and in their mixture."""

    first: Tensor
    second: Tensor
    mixture: Tensor


def deformed_views(
    positions: Tensor, points_per_sample: Tensor, place: str, seed: int = 0, deformation: Deformation | None = None
) -> Views:
    """Two views of some clouds, deformed at random, and a mixture with a share of its own for each point.

    The first view's anchors are far from each other (PointWOLF), the second's anywhere.

    Args:
        positions: (N, 3) of B clouds, one after the other, in any unit of length.
        points_per_sample: (B,) int64.
        place: What the draw follows from, with ``seed``, such as the step and the rank.
        seed: The user's.
        deformation: How much; None: the defaults.
    """
    how = Deformation() if deformation is None else deformation
    clouds = len(points_per_sample)
    sample = per_point(points_per_sample, len(positions))
    kernels: dict[str, float] = {"width": how.width, "rotation": how.rotation, "scale": how.scale, "shift": how.shift}

    def uniform(what: str, *shape: int) -> Tensor:
        return torch.special.ndtr(seeded_noise(f"{place} {what}", seed, positions.new_empty(shape)))

    far = farthest_points(positions, sample, clouds, how.anchors)
    first = locally_deformed(positions, sample, far, uniform("first", clouds, how.anchors, 9), **kernels)
    anywhere = random_points(points_per_sample, uniform("anchors", clouds, how.anchors))
    second = locally_deformed(positions, sample, anywhere, uniform("second", clouds, how.anchors, 9), **kernels)
    return Views(first, second, mixed(second, first, uniform("shares", len(positions))))


@contextmanager
def frozen_batch_norm(module: nn.Module) -> Iterator[None]:
    """Inside, batch norm normalises by the batch, as in training, and its running means and counters stay as they are."""
    tracking = [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.track_running_stats]
    frozen = [part for part in tracking if part.training]  # in evaluation mode nothing moves, and the running means are used
    try:
        for part in frozen:
            part.track_running_stats = False
        yield
    finally:
        for part in frozen:
            part.track_running_stats = True


# ------------------------------------------------------------------------------------------------------------------------ reliability


class Reliability(NamedTuple):
    """Which points are trusted.

    Attributes:
        selected: (N,) bool.
        pseudo_labels: (N,) int64, class of the original cloud alone.
        confidence: (N,) largest mean probability over the three clouds.
        uncertainty: (N,) standard deviation (divided by 2) of the probability of that class.
    """

    selected: Tensor
    pseudo_labels: Tensor
    confidence: Tensor
    uncertainty: Tensor


class ReliabilityLoss(NamedTuple):
    """What :func:`reliability_loss` gives.

    Attributes:
        total: Sum of the two parts.
        reliable: Cross-entropy of reliable points in the three other clouds; 0 without such points.
        ambiguous: Divergence of the other points in the two augmented clouds; 0 without such points.
        reliability: The selection.
    """

    total: Tensor
    reliable: Tensor
    ambiguous: Tensor
    reliability: Reliability


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def reliable_points(logits: Tensor, logits_aug1: Tensor, logits_aug2: Tensor, tau: float = 0.7, kappa: float = 0.05) -> Reliability:
    """Points whose mean prediction over three views is confident (>= ``tau``) and whose class is certain (deviation < ``kappa``).

    Args:
        logits: (N, C) of the original cloud, any float dtype; computed in float32 or wider. No gradient flows.
        logits_aug1: (N, C) of one augmented cloud, the same points.
        logits_aug2: (N, C) of the other one.
        tau: Smallest confidence.
        kappa: Smallest uncertainty that isn't allowed any more.
    """
    with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
        probs = torch.stack([_wide(part.detach()).softmax(dim=1) for part in (logits, logits_aug1, logits_aug2)])
        confidence, index = probs.mean(0).max(dim=1)
        uncertainty = probs.std(0).gather(1, index[:, None])[:, 0]
        return Reliability((confidence >= tau) & (uncertainty < kappa), probs[0].argmax(1), confidence, uncertainty)


def _mean_where(values: Tensor, chosen: Tensor) -> Tensor:
    """Mean of the chosen values; 0 if there are none. Nothing is read from the device."""
    return (values * chosen).sum() / chosen.sum().clamp(min=1)


def _divergence(target: Tensor, logits: Tensor) -> Tensor:
    """(N,) KL(target || softmax(logits)) of logits, the target's without gradient."""
    log_target = _wide(target.detach()).log_softmax(dim=1)
    return F.kl_div(_wide(logits).log_softmax(dim=1), log_target, reduction="none", log_target=True).sum(1)


def reliability_loss(
    logits: Tensor, logits_aug1: Tensor, logits_aug2: Tensor, logits_mix: Tensor, tau: float = 0.7, kappa: float = 0.05
) -> ReliabilityLoss:
    """Hard pseudo-labels for reliable points, soft consistency for the others; RAC-Net's loss.

    Reliable points: mean of CE(aug1) + CE(aug2) + CE(mix) with the class of the original cloud. Others: mean of KL(p || p_aug1) +
    KL(p || p_aug2), p being the original cloud's prediction. A part without points is 0, where the authors' code gives NaN.

    Args:
        logits: (N, C) of the original cloud, any float dtype; computed in float32 or wider. No gradient flows into it.
        logits_aug1: (N, C) of one augmented cloud, the same points in the same order.
        logits_aug2: (N, C) of the other one.
        logits_mix: (N, C) of the mixture of both.
        tau: Smallest confidence of a reliable point.
        kappa: Reliable points have a smaller uncertainty.
    """
    found = reliable_points(logits, logits_aug1, logits_aug2, tau, kappa)
    with torch.autocast(logits.device.type, enabled=False):
        hard = [F.cross_entropy(_wide(part), found.pseudo_labels, reduction="none") for part in (logits_aug1, logits_aug2, logits_mix)]
        soft = [_divergence(logits, part) for part in (logits_aug1, logits_aug2)]
        reliable = _mean_where(hard[0] + hard[1] + hard[2], found.selected)
        ambiguous = _mean_where(soft[0] + soft[1], ~found.selected)
        return ReliabilityLoss(reliable + ambiguous, reliable, ambiguous, found)


def consistency_loss_of_views(logits: Tensor, logits_aug1: Tensor, logits_aug2: Tensor) -> Tensor:
    """Plain consistency, the baseline: mean over all points of KL(p || p_aug1) + KL(p || p_aug2), p without gradient.

    Args:
        logits: (N, C) of the original cloud, any float dtype; computed in float32 or wider.
        logits_aug1: (N, C) of one augmented cloud, the same points in the same order.
        logits_aug2: (N, C) of the other one.
    """
    with torch.autocast(logits.device.type, enabled=False):
        both = _divergence(logits, logits_aug1) + _divergence(logits, logits_aug2)
        return both.sum() / max(len(both), 1)


__all__ = [
    "Deformation",
    "Reliability",
    "ReliabilityLoss",
    "Spread",
    "Views",
    "consistency_loss_of_views",
    "deformed_views",
    "frozen_batch_norm",
    "locally_deformed",
    "reliability_loss",
    "reliable_points",
    "spread_masks",
    "spread_pseudo_labels",
    "vote_winners",
]
