"""The maths of DLoRAL (arXiv:2506.15591): cross-frame retrieval, stages and their weights, score distillation, motion mask, tiles.

Golden vectors: authors' code, yjsunnn/DLoRAL at 40c1308, files ``cross_frame_retrieval/cfr_main.py``,
``cross_frame_retrieval/uncertainty_topk.py``, ``train_DLoRAL.py``, ``DLoRAL_model.py``, ``test_DLoRAL.py``. Warping is
:func:`lit_methods.restoration.flow.flow_warp`, the colour fix :mod:`lit_methods.restoration.color`. Left out: the tagger that writes the
prompts, and the flow loss by Farneback's method, which has no gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lit_methods import checks
from lit_methods.restoration.flow import Padding, flow_warp

# ---- stages ----------------------------------------------------------------------------------------------------------------------------

CONSISTENCY, DETAIL, JOINT = 0, 1, 2  # what is trained: one adapter, the other one, or both at once


class StageWeights(NamedTuple):
    """What an optimiser step trains, and the factors of its losses.

    Attributes:
        stage: 0: C-LoRA and retrieval; 1: D-LoRA; 2: both, a baseline.
        l2: Factor of the squared error.
        lpips: Factor of the perceptual distance.
        csd: Factor of score distillation; the term is left out of stage 0 whatever it is.
        consistency: Factor of the flow's difference.
    """

    stage: int
    l2: float
    lpips: float
    csd: float
    consistency: float


@dataclass(frozen=True)
class StageSchedule:
    """DLoRAL's stages: consistency, detail, consistency, detail, with weights that change linearly behind each switch.

    Args:
        quality_iter: Last optimiser step of the first consistency stage.
        quality_iter_1_final: Last step of the detail stage behind it.
        quality_iter_2: Steps of the second consistency stage; all further ones are a detail stage.
        transition_steps: Steps in which the weights change.
        lambda_l2: Weight of the squared error, constant.
        lambda_lpips: Weight of the perceptual distance; 0.02 of it in the first stage.
        lambda_csd: Weight of score distillation in the detail stages.
        lambda_consistency: Weight of the flow's difference in the detail stages; twice as much in the others.

    Raises:
        ValueError: A number outside its range, or stages in another order.
    """

    quality_iter: int = 5000
    quality_iter_1_final: int = 13000
    quality_iter_2: int = 5000
    transition_steps: int = 1000
    lambda_l2: float = 1.0
    lambda_lpips: float = 2.0
    lambda_csd: float = 1.0
    lambda_consistency: float = 10.0

    def __post_init__(self) -> None:
        checks.at_least(0, "optimiser steps", quality_iter=self.quality_iter, quality_iter_2=self.quality_iter_2)
        checks.at_least(0, "optimiser steps", transition_steps=self.transition_steps)
        _weights(self)
        if self.quality_iter_1_final < self.quality_iter:
            raise ValueError(
                f"quality_iter_1_final is {self.quality_iter_1_final}, before quality_iter={self.quality_iter}: it is the last step of the "
                "detail stage behind that"
            )

    def at(self, step: int) -> StageWeights:
        """Stage and weights of optimiser step ``step``, counted from 0; a switch is behind the step that ends a stage."""
        first, second = self.quality_iter, self.quality_iter_1_final
        third, ramp = second + self.quality_iter_2, self.transition_steps
        l2, lpips, csd, flow = self.lambda_l2, self.lambda_lpips, self.lambda_csd, self.lambda_consistency
        if step <= first:
            return StageWeights(CONSISTENCY, l2, 0.02 * lpips, 0.0, 2 * flow)
        if step <= first + ramp:
            share = (step - first) / ramp
            return StageWeights(DETAIL, l2, lpips * (0.02 + 0.98 * share), share * csd, flow * (2 - share))
        if step <= second:
            return StageWeights(DETAIL, l2, lpips, csd, flow)
        if step <= second + ramp:
            return StageWeights(CONSISTENCY, l2, lpips, csd, flow * (1 + (step - second) / ramp))
        if step <= third:
            return StageWeights(CONSISTENCY, l2, lpips, csd, 2 * flow)
        if step <= third + ramp:
            return StageWeights(DETAIL, l2, lpips, csd, flow * (2 - (step - third) / ramp))
        return StageWeights(DETAIL, l2, lpips, csd, flow)


@dataclass(frozen=True)
class FixedStage:
    """One stage for the whole training: what DLoRAL is compared with.

    Args:
        kind: ``consistency``: C-LoRA and retrieval alone, with the weights of the first stage; ``detail``: D-LoRA alone; ``joint``: both
            adapters at once, which are one of twice the rank, with all losses.
        lambda_l2: Weight of the squared error.
        lambda_lpips: Weight of the perceptual distance.
        lambda_csd: Weight of score distillation.
        lambda_consistency: Weight of the flow's difference.

    Raises:
        ValueError: Another kind, or a weight below 0.
    """

    kind: Literal["consistency", "detail", "joint"] = "joint"
    lambda_l2: float = 1.0
    lambda_lpips: float = 2.0
    lambda_csd: float = 1.0
    lambda_consistency: float = 10.0

    def __post_init__(self) -> None:
        checks.one_of(("consistency", "detail", "joint"), kind=self.kind)
        _weights(self)

    def at(self, step: int) -> StageWeights:
        """The same for every step."""
        if self.kind == "consistency":
            return StageWeights(CONSISTENCY, self.lambda_l2, 0.02 * self.lambda_lpips, 0.0, 2 * self.lambda_consistency)
        stage = DETAIL if self.kind == "detail" else JOINT
        return StageWeights(stage, self.lambda_l2, self.lambda_lpips, self.lambda_csd, self.lambda_consistency)


def _weights(schedule: StageSchedule | FixedStage) -> None:
    for name in ("lambda_l2", "lambda_lpips", "lambda_csd", "lambda_consistency"):
        checks.within("[0, inf)", "a weight", **{name: getattr(schedule, name)})


class Terms(NamedTuple):
    """Losses of a step, scalars; those of several frames are sums over the frames.

    Attributes:
        l2: Mean squared error of the frames.
        lpips: Perceptual distance.
        consistency: Difference of the flows, :func:`lit_methods.restoration.flow.flow_difference`.
        csd: Score distillation, :func:`csd_loss`; None where it is left out.
    """

    l2: Tensor
    lpips: Tensor
    consistency: Tensor
    csd: Tensor | None = None


def weighted_loss(terms: Terms, weights: StageWeights) -> Tensor:
    """Sum of the terms times their factors."""
    loss = weights.l2 * terms.l2 + weights.lpips * terms.lpips + weights.consistency * terms.consistency
    return loss if terms.csd is None else loss + weights.csd * terms.csd


def has_csd(weights: StageWeights) -> bool:
    """Whether a step takes score distillation: not in a consistency stage, whatever its factor is there."""
    return weights.stage != CONSISTENCY and weights.csd > 0


# ---- cross-frame retrieval -------------------------------------------------------------------------------------------------------------


def cross_frame_attention(
    query: Tensor, key: Tensor, value: Tensor, threshold: Tensor, temperature: float, topk: int | None = None, chunk: int | None = None
) -> Tensor:
    """sum_j ReLU((q_i k_j / sqrt(d) - t_i) / tau) v_j: attention without a softmax, whose rows may be empty.

    Args:
        query: (B, heads, N, d).
        key: (B, heads, M, d).
        value: (B, heads, M, d).
        threshold: t, (B, heads, N).
        temperature: tau > 0.
        topk: Only so many positions of a query count, those of the highest similarity, and those that tie with the last of them; None, or
            M and more: all.
        chunk: Queries that are compared at once: memory is heads x chunk x M in the place of heads x N x M, also for the gradient, which
            computes each chunk anew. None: all.

    Returns:
        (B, heads, N, d) in float32 or wider: similarities stay so under autocast.
    """
    with torch.autocast(query.device.type, enabled=False):
        wide = torch.promote_types(query.dtype, torch.float32)
        query, key, value, threshold = (part.to(wide) for part in (query, key, value, threshold))
        if chunk is None or chunk >= query.shape[2]:
            return _attend(query, key, value, threshold, temperature, topk)
        answers = []
        for start in range(0, query.shape[2], chunk):
            given = (query[:, :, start : start + chunk], key, value, threshold[:, :, start : start + chunk], temperature, topk)
            if torch.is_grad_enabled():
                answers.append(checkpoint(_attend, *given, use_reentrant=False, preserve_rng_state=False))
            else:
                answers.append(_attend(*given))
        return torch.cat(answers, dim=2)


def _gated(query: Tensor, key: Tensor, threshold: Tensor, temperature: float, topk: int | None) -> Tensor:
    similarity = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    gated = torch.relu((similarity - threshold[..., None]) / temperature)
    if topk is not None and topk < key.shape[2]:
        last = similarity.topk(topk, dim=-1).values[..., -1:]
        gated = gated * (similarity >= last)
    return gated


def _attend(query: Tensor, key: Tensor, value: Tensor, threshold: Tensor, temperature: float, topk: int | None) -> Tensor:
    return _gated(query, key, threshold, temperature, topk) @ value


def empty_rows(query: Tensor, key: Tensor, threshold: Tensor, chunk: int | None = None) -> Tensor:
    """Share of the queries (B, heads, N, d) that no key (B, heads, M, d) reaches the threshold (B, heads, N) of: scalar."""
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        rows = []
        for start in range(0, query.shape[2], chunk or query.shape[2]):
            part = slice(start, start + (chunk or query.shape[2]))
            highest = (query[:, :, part].float() @ key.float().transpose(-1, -2)).amax(-1) / query.shape[-1] ** 0.5
            rows.append((highest <= threshold[:, :, part]).float())
        return torch.cat(rows, dim=2).mean()


class Retrieved(NamedTuple):
    """What retrieval finds for a frame, all like its latent.

    Attributes:
        aligned: The previous latent, warped.
        retrieved: What is added to the current one.
        fused: Current latent and what was found.
        empty: Share of queries without any match, scalar; None unless it was asked for.
    """

    aligned: Tensor
    retrieved: Tensor
    fused: Tensor
    empty: Tensor | None

    @property
    def unet_input(self) -> Tensor:
        """Aligned and fused latents beside each other: (B, 2 C, h, w)."""
        return torch.cat([self.aligned, self.fused], dim=1)


class CrossFrameRetrieval(nn.Module):
    """CFR: fuses a latent with what is alike in the aligned one of the previous frame, wherever that stands.

    Memory: the similarities of all pairs of positions: heads (h w)^2 numbers unless ``chunk`` is given, 600 MB for 64 x 64 latents.

    Args:
        channels: Of a latent.
        heads: Number of heads.
        embed_dim: Width of a head.
        temperature: tau; a constant, 3000 in the paper's code, which makes what is found small at first.
        topk: See :func:`cross_frame_attention`; the paper describes it, its code has none.
        chunk: See :func:`cross_frame_attention`.

    Raises:
        ValueError: A number outside its range.
    """

    def __init__(
        self,
        channels: int = 4,
        heads: int = 9,
        embed_dim: int = 64,
        temperature: float = 3000.0,
        topk: int | None = None,
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        checks.at_least(1, channels=channels, heads=heads, embed_dim=embed_dim, topk=topk, chunk=chunk)
        checks.positive(temperature=temperature)
        self.channels, self.heads, self.temperature, self.topk, self.chunk = channels, heads, temperature, topk, chunk
        self.query_conv = nn.Conv2d(channels, heads * embed_dim, 1)
        self.key_conv = nn.Conv2d(channels, heads * embed_dim, 1)
        self.value_conv = nn.Conv2d(channels, heads * embed_dim, 1)
        self.proj_out = nn.Conv2d(heads * embed_dim, channels, 1)
        self.threshold_fc = nn.Linear(embed_dim, 1)

    def _heads(self, x: Tensor) -> Tensor:
        """(B, heads d, h, w) -> (B, heads, h w, d)."""
        return x.flatten(2).unflatten(1, (self.heads, -1)).transpose(2, 3)

    def forward(self, current: Tensor, previous: Tensor, flow: Tensor, padding_mode: Padding = "zeros", measure: bool = False) -> Retrieved:
        """Align and fuse.

        Args:
            current: (B, C, h, w).
            previous: Like ``current``.
            flow: (B, 2, h, w) from the current to the previous frame, in pixels of the latents.
            padding_mode: Of the warping.
            measure: Also count the queries without a match.

        Raises:
            ValueError: The latents have other channels.
        """
        if current.shape[1] != self.channels or previous.shape != current.shape:
            raise ValueError(
                f"latents are {tuple(current.shape)} and {tuple(previous.shape)}: CrossFrameRetrieval was made for {self.channels} channels"
            )
        aligned = flow_warp(previous, flow.to(previous.dtype), padding_mode)
        query, key, value = (
            self._heads(self.query_conv(current)),
            self._heads(self.key_conv(aligned)),
            self._heads(self.value_conv(aligned)),
        )
        threshold = self.threshold_fc(query).squeeze(-1)
        found = cross_frame_attention(query, key, value, threshold, self.temperature, self.topk, self.chunk)
        found = found.transpose(2, 3).flatten(1, 2).unflatten(2, current.shape[-2:])  # (B, heads d, h, w)
        retrieved = self.proj_out(found.to(self.proj_out.weight.dtype))
        return Retrieved(aligned, retrieved, current + retrieved, empty_rows(query, key, threshold, self.chunk) if measure else None)


def restored_latent(fused: Tensor, eps: Tensor) -> Tensor:
    """The one step: z - eps, the network's answer taken off as it is, without noise levels."""
    return fused - eps


# ---- classifier score distillation -----------------------------------------------------------------------------------------------------


def csd_loss(
    latents: Tensor,
    noise: Tensor,
    t: Tensor,
    shares: Tensor,
    teacher: Callable[[Tensor, Tensor, Any], Tensor],
    prompt: Any,
    negative: Any,
    cfg: float = 7.5,
) -> Tensor:
    """Classifier score distillation: latents move from what a frozen model expects of the negative prompt to what guidance makes of it.

    z_t = sqrt(a) z + sqrt(1 - a) n; x0(eps) = (z_t - sqrt(1 - a) eps) / sqrt(a); the gradient is (x0(eps_u) - x0(eps_cfg)) / mean|z -
    x0(eps_cfg)|, where eps_cfg = eps_u + cfg (eps_c - eps_u), and the loss is the mean of its square, so that d loss / dz is twice the
    gradient over the number of elements. Where the mean is 0, so is the gradient.

    Args:
        latents: z, (B, C, h, w).
        noise: n, like ``latents``.
        t: (B,) int64, steps of the diffusion.
        shares: a, (B,): alpha-bar at these steps.
        teacher: (z_t, t, condition) -> noise; no gradient goes through it.
        prompt: Condition of eps_c.
        negative: Condition of eps_u.
        cfg: Guidance.

    Returns:
        Scalar in float32 or wider.
    """
    with torch.no_grad():
        wide = torch.promote_types(latents.dtype, torch.float32)
        z = latents.to(wide)
        share = shares.to(wide).view(-1, *(1,) * (z.ndim - 1))
        noisy = share.sqrt() * z + (1 - share).sqrt() * noise.to(wide)
        without, given = (teacher(noisy.to(latents.dtype), t, words).to(wide) for words in (negative, prompt))

        def clean(eps: Tensor) -> Tensor:
            return (noisy - (1 - share).sqrt() * eps) / share.sqrt()

        real, fake = clean(without + cfg * (given - without)), clean(without)
        weight = (z - real).abs().mean(dim=tuple(range(1, z.ndim)), keepdim=True)
        gradient = torch.where(weight > 0, (fake - real) / weight.clamp(min=torch.finfo(wide).tiny), torch.zeros_like(z))
        target = z - gradient
    return (latents.to(wide) - target).square().mean()


# ---- motion, tiles ---------------------------------------------------------------------------------------------------------------------


def frame_difference_mask(frames: Tensor) -> Tensor:
    """Pixels that change more than the mean pixel does.

    Args:
        frames: (T, 1, H, W) grey frames of a clip, at 1/8 of its size in the authors' code.

    Returns:
        (1, H, W), 1 where the unbiased variance over the frames is at least its mean and not 0, else 0, in the dtype of ``frames``; all 0
        for one frame.
    """
    if len(frames) < 2:
        return torch.zeros_like(frames[:1].sum(0))
    variance = frames.var(dim=0, unbiased=True)
    return ((variance >= variance.mean()) & (variance != 0)).to(frames.dtype)


def tile_weights(height: int, width: int, variance: float = 0.01) -> Tensor:
    """A Gaussian of the place in a tile, its sides taken as 1, highest in the middle: (height, width) float32."""

    def side(length: int) -> Tensor:
        place = (torch.arange(length, dtype=torch.float64) - (length - 1) / 2) / length
        return torch.exp(-place.square() / (2 * variance))

    return torch.outer(side(height), side(width)).float()


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles of a side begin, so that neighbours share ``overlap`` pixels or more and the last one ends with the side.

    Raises:
        ValueError: The overlap is no smaller than the tile.
    """
    if not 0 <= overlap < tile:
        raise ValueError(f"overlap is {overlap} and tile {tile}: give fewer pixels than a tile has")
    if length <= tile:
        return [0]
    return [*range(0, length - tile, tile - overlap), length - tile]


def in_tiles(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], tile: int, overlap: int, variance: float = 0.01) -> Tensor:
    """A function of latents, computed tile by tile, the answers averaged with Gaussian weights.

    Args:
        function: Parts of the inputs, each (B, ., h, w) -> (B, C, h, w).
        inputs: Tensors (B, ., H, W) of one size.
        tile: Side of a tile; inputs that are no larger are one tile.
        overlap: Pixels that neighbours share at least.
        variance: Of the Gaussian, of sides that are 1.

    Returns:
        (B, C, H, W).
    """
    height, width = inputs[0].shape[-2:]
    rows, columns = tile_starts(height, tile, overlap), tile_starts(width, tile, overlap)
    if len(rows) == len(columns) == 1:
        return function(*inputs)
    total: Tensor | None = None
    count = inputs[0].new_zeros(1, 1, height, width, dtype=torch.float32)
    for top in rows:
        for left in columns:
            place = (..., slice(top, top + tile), slice(left, left + tile))
            part = function(*(given[place] for given in inputs))
            weights = tile_weights(part.shape[-2], part.shape[-1], variance).to(part.device)
            if total is None:
                total = part.new_zeros(*part.shape[:2], height, width, dtype=torch.promote_types(part.dtype, torch.float32))
            total[place] += weights * part
            count[place] += weights
    assert total is not None
    return total / count


__all__ = [
    "CONSISTENCY",
    "DETAIL",
    "JOINT",
    "CrossFrameRetrieval",
    "FixedStage",
    "Retrieved",
    "StageSchedule",
    "StageWeights",
    "Terms",
    "cross_frame_attention",
    "csd_loss",
    "empty_rows",
    "frame_difference_mask",
    "has_csd",
    "in_tiles",
    "restored_latent",
    "tile_starts",
    "tile_weights",
    "weighted_loss",
]
