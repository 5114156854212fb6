"""EPG: images straight from pixels, by pre-training an encoder and fine-tuning it with a decoder (arXiv:2510.12586). Both stages' maths.

Golden vectors come from AMAP-ML/EPG@bf76f78 (rcm/rcm_denoiser.py, rcm/resample.py) and @8b57ede (rcm/utils.py), transcribed. The curriculum
of pairs stands in :mod:`~lit_methods.consistency_models.curricula`, the metric in :mod:`~lit_methods.consistency_models.metrics`, the
samplers in :mod:`~lit_methods.consistency_models.sampling`. Left out: FID, which needs the weights of Inception.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_methods.consistency_models.levels import karras_levels, like
from lit_methods.consistency_models.metrics import detached_pseudo_huber, square
from lit_methods.consistency_models.pairs import consistency_pair_loss
from lit_methods.distributed import gather_rows, rank

Map = Callable[..., Tensor]


Gather = Callable[[Tensor], Tensor]


TemperatureSchedule = Literal["constant", "interpolated", "cosine"]


def cosines(query: Tensor, keys: Tensor) -> Tensor:
    """Cosine of each row of (B, C) with each of (M, C): (B, M), in float32 or wider also under autocast."""
    with torch.autocast(query.device.type, enabled=False):
        wide = torch.promote_types(query.dtype, torch.float32)
        query = query.to(wide)
        size = torch.linalg.vector_norm(query, dim=1, keepdim=True).clamp_min(1e-12)
        return (query @ F.normalize(keys.to(wide), dim=1).T) / size  # divided behind the product, where there is less to divide


def cosine_info_nce(query: Tensor, keys: Tensor, temperature: float | Tensor) -> Tensor:
    """logsumexp_j(cos_ij / tau) - cos_ii / tau for each row i: row i of the keys is its positive, all others are negatives.

    Args:
        query: (B, C).
        keys: (M, C), M >= B; give them without a gradient. The rows behind the first B are negatives only.
        temperature: tau > 0, one for the batch.

    Returns:
        (B,) >= 0, float32 or wider.

    Raises:
        ValueError: Fewer keys than rows.
    """
    if len(keys) < len(query):
        raise ValueError(f"{len(query)} rows have only {len(keys)} keys: give each row its own key first, then further negatives")
    logits = cosines(query, keys) / temperature
    return F.cross_entropy(logits, torch.arange(len(query), device=query.device), reduction="none")


def resolution_shift(height: int, base_resolution: int | None = 64) -> float:
    """Height / 64, by which every sigma is multiplied: neighbouring pixels of larger images are alike. None as the base: 1."""
    return 1.0 if base_resolution is None else height / base_resolution


class PretrainLevels(NamedTuple):
    """The levels of a step, shifted: t and t2 of the consistency, t0 of the contrast."""

    high: float
    low: float
    clean: float


def pretrain_levels(
    index: int, count: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0, shift: float = 1.0
) -> PretrainLevels:
    """Level ``index`` + 1, level ``index`` and sigma_min, each times ``shift``.

    Args:
        index: 1..N-1 of the lower level, ascending. One for the whole global batch, so that all negatives have the same noise level.
        count: N.
        sigma_min: Smallest level.
        sigma_max: Largest level.
        rho: Spacing of the levels.
        shift: :func:`resolution_shift`.
    """
    low, high = karras_levels(count, sigma_min, sigma_max, rho)[index - 1 : index + 1].tolist()
    return PretrainLevels(shift * high, shift * low, shift * sigma_min)


def encode(encoder: Callable[..., Any], x: Tensor, sigma: Tensor, *condition: Tensor, sigma_data: float = 0.5) -> Any:
    """encoder(x / sqrt(sigma^2 + sigma_data^2), ln(sigma) / 4, ...) of noisy samples (B, ...) and levels (B,)."""
    wide = sigma.to(torch.promote_types(sigma.dtype, torch.float32))
    return encoder(like((wide**2 + sigma_data**2).rsqrt(), x).to(x.dtype) * x, wide.log() / 4, *condition)


class PretrainLoss(NamedTuple):
    """Losses of stage 1, (B,) each, and what was compared: (query, keys) of the first contrast and of the consistency."""

    contrastive: Tensor
    consistency: Tensor
    contrasted: tuple[Tensor, Tensor]
    aligned: tuple[Tensor, Tensor]


def pretrain_loss(
    encoder: Map,
    projector: Map,
    target_encoder: Map,
    target_projector: Map,
    x: Tensor,
    view1: Tensor,
    view2: Tensor,
    noise: Tensor,
    levels: PretrainLevels,
    *,
    sigma_data: float = 0.5,
    contrastive_temperature: float = 0.2,
    consistency_temperature: float = 0.1,
    with_consistency: bool = True,
    gather: Gather = Tensor.detach,
) -> PretrainLoss:
    """Contrast of two views with almost no noise, and agreement of an image's features at two neighbouring levels (arXiv:2510.12586).

    The keys of the contrast come from the averaged target, behind its projector. Those of the consistency are features of the ONLINE
    encoder, before the projector. Neither has a gradient.

    Args:
        encoder: E: (B, ...) and (B,) noise condition -> (B, D).
        projector: g: (B, D) -> (B, C).
        target_encoder: Average of ``encoder``.
        target_projector: Average of ``projector``.
        x: (B, ...) images.
        view1: Augmented images, like ``x``.
        view2: Other augmented images, like ``x``.
        noise: Like ``x``: one for all five noisy inputs.
        levels: What :func:`pretrain_levels` gives.
        sigma_data: Standard deviation of the data.
        contrastive_temperature: tau of the contrast.
        consistency_temperature: tau of the consistency, at these levels.
        with_consistency: False: the contrast alone (MoCo v3), the consistency is 0.
        gather: (B, C) -> (M, C) keys of all processes, those of this one first.
    """

    def noisy(network: Map, image: Tensor, level: float) -> Tensor:
        sigma = torch.full((len(image),), level, dtype=torch.promote_types(image.dtype, torch.float32), device=image.device)
        encoded: Tensor = encode(network, image + level * noise, sigma, sigma_data=sigma_data)
        return encoded

    with torch.no_grad():
        key1, key2 = (gather(target_projector(noisy(target_encoder, view, levels.clean))) for view in (view1, view2))
    query1, query2 = (projector(noisy(encoder, view, levels.clean)) for view in (view1, view2))
    contrastive = cosine_info_nce(query1, key2, contrastive_temperature) + cosine_info_nce(query2, key1, contrastive_temperature)
    if not with_consistency:
        return PretrainLoss(contrastive, torch.zeros_like(contrastive), (query1, key2), (query1, key2))
    with torch.no_grad():
        keys = gather(noisy(encoder, x, levels.low))
    query = noisy(encoder, x, levels.high)
    return PretrainLoss(contrastive, cosine_info_nce(query, keys, consistency_temperature), (query1, key2), (query, keys))


def consistency_temperature(
    schedule: TemperatureSchedule,
    start: float,
    end: float,
    sigma: float,
    progress: float,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
) -> float:
    """Temperature of the consistency at a step.

    Args:
        schedule: ``constant``: ``start`` (the released configs). ``interpolated``: linear in sigma, ``start`` at sigma_min, ``end`` at
            sigma_max. ``cosine``: from ``start`` to ``end`` over training, along half a cosine.
        start: > 0.
        end: > 0; not used by ``constant``.
        sigma: The higher level, before the resolution shift.
        progress: Share of the training that is done, in [0, 1].
        sigma_min: Smallest level.
        sigma_max: Largest level.
    """
    if schedule == "constant":
        return start
    share = (sigma - sigma_min) / (sigma_max - sigma_min) if schedule == "interpolated" else (1 - math.cos(math.pi * progress)) / 2
    return start + (end - start) * share


def neighbour_labels(query: Tensor, bank: Tensor, labels: Tensor, count: int, leave_out: bool) -> Tensor:
    """Label that most of the ``count`` nearest rows of the bank have, by cosine.

    Args:
        query: (N, D).
        bank: (M, D).
        labels: (M,) int64 of the bank.
        count: At most M - 1.
        leave_out: Row i of the bank doesn't vote for row i of the query (then N = M).

    Returns:
        (N,) int64.
    """
    likeness = cosines(query, bank)
    if leave_out:
        likeness.fill_diagonal_(-torch.inf)
    nearest = labels[likeness.topk(min(count, len(bank) - 1), dim=1).indices]
    return nearest.mode(1).values


def gather_keys(keys: Tensor) -> Tensor:
    """Keys of all ranks without a gradient, this rank's first, so that the positives lie on the diagonal."""
    every = gather_rows(keys, with_grad=False)
    if len(every) == len(keys):
        return every
    ranks = gather_rows(torch.full((len(keys),), rank(), device=keys.device), with_grad=False)
    return every[(ranks != rank()).byte().argsort(stable=True)]


class Pixels(nn.Module):
    """From images in [-1, 1] to what networks see, and back.

    Args:
        mean: Mean of the pixels in [0, 1], for each channel or for all.
        std: By what they are divided then, for each channel or for all; (0.5,) for both leaves images as they are.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float] = (0.5,), std: Sequence[float] = (0.5,)) -> None:
        super().__init__()
        if len(mean) != len(std) or min(std) <= 0:
            raise ValueError(f"pixel_mean {list(mean)} and pixel_std {list(std)} must be as many numbers, the second above 0")
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32), persistent=False)

    def _fit(self, values: Tensor, x: Tensor) -> Tensor:
        return values.float().view(1, -1, *[1] * (x.ndim - 2))

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, ...) in [-1, 1] -> float32 of about 0.5 standard deviation."""
        wide = image.float()
        return ((wide + 1) / 2 - self._fit(self.mean, wide)) / self._fit(self.std, wide)

    def back(self, x: Tensor) -> Tensor:
        """The inverse."""
        return 2 * (x * self._fit(self.std, x) + self._fit(self.mean, x)) - 1

    def clamp(self, x: Tensor) -> Tensor:
        """Keep it within what images in [-1, 1] become."""
        return self(self.back(x).clamp(-1, 1))


def shift_of(x: Tensor, base_resolution: int | None) -> float:
    """:func:`resolution_shift` of images (B, C, H, W); 1 for what has no height."""
    return resolution_shift(x.shape[-2], base_resolution) if x.ndim == 4 else 1.0


def needs_width(encoder: nn.Module) -> int:
    """D of an encoder's feature."""
    width = getattr(encoder, "width", None)
    if not isinstance(width, int):
        raise ValueError(f"{type(encoder).__name__} doesn't say how wide its feature is: give it an attribute `width`")
    return width


def nearest_level(sigma: Tensor, levels: Tensor) -> Tensor:
    """Index, from 0, of the level that is nearest to each sigma.

    Args:
        sigma: (B,).
        levels: (N,) ascending.

    Returns:
        (B,) int64.
    """
    above = torch.bucketize(sigma, levels).clamp(1, len(levels) - 1)
    return above - (sigma - levels[above - 1] <= levels[above] - sigma).long()


def denoising_weight(index: Tensor, levels: Tensor) -> Tensor:
    """1 / (sigma_i - sigma_{i-1}): of the levels as they are, before any shift.

    Args:
        index: (B,) int64 from 0; the smallest level, which has none below it, gets the gap to the next one.
        levels: (N,) ascending.
    """
    gaps = levels.diff()
    return 1 / gaps[(index - 1).clamp(min=0)]


def denoising_loss(answer: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean((x0 - x)^2): (B, ...), (B, ...) and (B,) -> (B,)."""
    with torch.autocast(x.device.type, enabled=False):
        wide = torch.promote_types(answer.dtype, torch.float32)
        return weight * square(answer.to(wide), x.to(wide))


class TuningLoss(NamedTuple):
    """Losses of the consistency fine-tuning, (B,) each, both answers (B, ...), and 1 / (t - r) (B,)."""

    consistency: Tensor
    perceptual: Tensor
    student: Tensor
    teacher: Tensor
    weight: Tensor


def inverse_distance(upper: Tensor, lower: Tensor) -> Tensor:
    """1 / (t - r); 0 where both are equal."""
    gap = upper - lower
    return torch.where(gap > 0, 1 / gap.clamp(min=torch.finfo(gap.dtype).tiny), 0.0)


def consistency_tuning_loss(
    student: Callable[..., Tensor],
    teacher: Callable[..., Tensor],
    x: Tensor,
    noise: Tensor,
    upper: Tensor,
    lower: Tensor,
    *condition: Tensor,
    c: float = 0.06,
    warmup: bool = False,
    perceptual: Map | None = None,
    temperature: float = 0.1,
    gather: Gather = Tensor.detach,
) -> TuningLoss:
    """S / sg sqrt(S + c^2) / (t - r) with S = sum((f(x + t n, t) - sg f-(x + r n, r))^2), and the contrast of answers with images.

    Args:
        student: f of (B, ...) and (B,), with the boundary at the shifted sigma_min.
        teacher: f-: in EPG f itself. It gets no gradient, and drops the same units.
        x: (B, ...) data.
        noise: n, like ``x``.
        upper: (B,) t, shifted.
        lower: (B,) r <= t, shifted.
        condition: Further arguments of both.
        c: Scale of the distance.
        warmup: The answer is compared with ``x`` itself, and not contrasted: stage 0 of the curriculum.
        perceptual: Frozen map (B, ...) -> (B, C) of images without noise, whose gradient reaches its input; None: no contrast.
        temperature: Temperature of the contrast.
        gather: (B, C) -> (M, C) keys of all processes, those of this one first.
    """
    weight = inverse_distance(upper, lower)
    other = (lambda *_: x) if warmup else teacher
    pair = consistency_pair_loss(student, other, x, noise, lower, upper, partial(detached_pseudo_huber, c=c), weight, *condition)
    contrast = torch.zeros_like(pair.losses)
    if perceptual is not None and not warmup:
        with torch.no_grad():
            keys = gather(perceptual(x))
        contrast = cosine_info_nce(perceptual(pair.student), keys, temperature)
    return TuningLoss(pair.losses, contrast, pair.student, pair.teacher, weight)


def interval_guidance(
    denoise: Callable[..., Tensor], x: Tensor, sigma: float, labels: Tensor, null: int, scale: float, interval: tuple[float, float]
) -> Tensor:
    """D(x; null) + scale (D(x; labels) - D(x; null)) while sigma lies in the interval, D(x; labels) elsewhere (arXiv:2404.07724).

    Args:
        denoise: D of (B, ...) and (B,) labels.
        x: (B, ...).
        sigma: Level, before the resolution shift.
        labels: (B,) int64.
        null: Label of no class.
        scale: 1: no guidance.
        interval: Above the first, up to the second.
    """
    told = denoise(x, labels)
    if scale == 1 or not interval[0] < sigma <= interval[1]:
        return told
    untold = denoise(x, torch.full_like(labels, null))
    return untold + scale * (told - untold)


__all__ = [
    "consistency_temperature", "consistency_tuning_loss", "cosine_info_nce", "denoising_loss", "denoising_weight", "interval_guidance",
    "nearest_level", "neighbour_labels", "pretrain_levels", "pretrain_loss", "resolution_shift",
]  # fmt: skip
