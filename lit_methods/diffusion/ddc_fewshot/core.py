"""DDC's maths: diffusion with a cosine schedule, phasic content, directional distribution consistency, guided sampling (arXiv:2309.03729).

Written anew after the paper and the behaviour of sjtuplayer/few-shot-diffusion@e67e64e (train-whole.py, unet.py, model/ddpm.py,
style_loss/loss.py, util/resizer.py), with which the golden vectors were made. Left out: learned variances, weights of the noise loss by the
signal-to-noise ratio (1 in all of the authors' settings).

Images are in [-1, 1]. ``shares`` is alpha-bar of all steps, (T,) float64 and falling; ``t`` are steps, (B,) int64 in 0..T-1.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_methods import checks
from lit_methods.diffusion.ddim import ddim_step
from lit_methods.diffusion.denoisers import Denoise

NoiseLoss = Literal["l1", "l2"]
Draw = Callable[[Tensor], Tensor]  # standard normal noise like a tensor


# ---- diffusion -------------------------------------------------------------------------------------------------------------------------


def cosine_shares(steps: int = 1000, offset: float = 0.008) -> Tensor:
    """alpha-bar of the cosine schedule, whose betas are clipped at 0.999 (arXiv:2102.09672, Eq. 17).

    Args:
        steps: T.
        offset: s.

    Returns:
        (T,) float64, falling.
    """
    time = torch.arange(steps + 1, dtype=torch.float64) / steps
    signal = ((time + offset) / (1 + offset) * (math.pi / 2)).cos().square()
    return (1 - (1 - signal[1:] / signal[:-1]).clamp(0, 0.999)).cumprod(0)


def widened(x: Tensor) -> Tensor:
    """The same in float32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _at(values: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """Entries of a table at steps (B,), to be multiplied with ``like`` (B, ...)."""
    return values.to(t.device)[t].to(like.dtype).reshape(-1, *(1,) * (like.ndim - 1))


def noised(x: Tensor, noise: Tensor, t: Tensor, shares: Tensor) -> Tensor:
    """x_t = sqrt(a_t) x + sqrt(1 - a_t) noise.

    Args:
        x: (B, ...) images.
        noise: Like ``x``, standard normal.
        t: (B,) steps.
        shares: (T,).
    """
    return _at(shares.sqrt(), t, x) * x + _at((1 - shares).sqrt(), t, x) * noise


def predicted_clean(x_t: Tensor, eps: Tensor, t: Tensor, shares: Tensor) -> Tensor:
    """x0 that the predicted noise leaves, clamped to [-1, 1]: where it is clamped, it has no gradient.

    Args:
        x_t: (B, ...) noisy images.
        eps: Like ``x_t``, the predicted noise.
        t: (B,) steps.
        shares: (T,).
    """
    return (_at((1 / shares).sqrt(), t, x_t) * x_t - _at((1 / shares - 1).sqrt(), t, x_t) * eps).clamp(-1, 1)


class Posterior(NamedTuple):
    """Distribution of x_(t-1), given x_t and x0: ``mean`` (B, ...), ``variance`` (B, 1, ...), which is 0 at step 0."""

    mean: Tensor
    variance: Tensor


def posterior(clean: Tensor, x_t: Tensor, t: Tensor, shares: Tensor) -> Posterior:
    """q(x_(t-1) | x_t, x0) of DDPM (arXiv:2006.11239, Eq. 6 and 7).

    Args:
        clean: (B, ...) x0.
        x_t: Like ``clean``.
        t: (B,) steps.
        shares: (T,).
    """
    before = torch.cat([shares.new_ones(1), shares[:-1]])
    kept = shares / before  # alpha
    of_clean = (1 - kept) * before.sqrt() / (1 - shares)
    of_noisy = (1 - before) * kept.sqrt() / (1 - shares)
    variance = (1 - kept) * (1 - before) / (1 - shares)
    return Posterior(_at(of_clean, t, x_t) * clean + _at(of_noisy, t, x_t) * x_t, _at(variance, t, x_t))


def noise_loss(eps: Tensor, noise: Tensor, kind: NoiseLoss = "l1") -> Tensor:
    """Mean error of the predicted noise for each sample.

    Args:
        eps: (B, ...) predicted noise.
        noise: Like ``eps``, the noise itself.
        kind: ``l1``: absolute differences; ``l2``: squares.

    Returns:
        (B,) float32 or wider.
    """
    gap = widened(eps) - noise
    return (gap.abs() if kind == "l1" else gap.square()).flatten(1).mean(1)


# ---- phases ----------------------------------------------------------------------------------------------------------------------------


def phase_share(t: Tensor, switch_step: float = 300) -> Tensor:
    """m(t) = 1 / (1 + exp(-(t - T_s))): how much content the network sees. It rises from 0 to 1 within a few steps around T_s.

    Args:
        t: (B,) steps.
        switch_step: T_s.

    Returns:
        (B,) float64 in [0, 1].
    """
    return torch.sigmoid(t.double() - switch_step)


def mix_content(content: Tensor, noise: Tensor, t: Tensor, switch_step: float = 300) -> Tensor:
    """Mixed content: m(t) c + (1 - m(t)) z.

    Args:
        content: (B, ...) features of the content image.
        noise: z, like ``content``, standard normal.
        t: (B,) steps.
        switch_step: T_s.
    """
    share = phase_share(t, switch_step).to(content.dtype).reshape(-1, *(1,) * (content.ndim - 1))
    return share * content + (1 - share) * noise


class Weights(NamedTuple):
    """Factors of each sample, (B,) float64: of the adaptation's loss, and of the noise loss on target images."""

    adaptation: Tensor
    diffusion: Tensor


def phasic_weights(t: Tensor, steps: int = 1000, base: float = 20.0, exponent: float = 0.9) -> Weights:
    """Factors of the authors' code: a = base^(t / T), and base^exponent - a.

    Args:
        t: (B,) steps; above ``exponent`` T the second factor is negative.
        steps: T.
        base: Ratio of the first factor between t = T and t = 0.
        exponent: Where the second factor is 0, as a share of T.
    """
    growing = base ** (t.double() / steps)
    return Weights(growing, base**exponent - growing)


def paper_weights(t: Tensor, steps: int = 1000, switch_step: float = 300, power: float = 1.0) -> Weights:
    """m(t) (1 - w(t)) and w(t) = 1 - (t / T)^power, as in Eq. 7 of the paper.

    Args:
        t: (B,) steps.
        steps: T.
        switch_step: T_s.
        power: alpha; the paper's value stands in an appendix that wasn't available.
    """
    falling = 1 - (t.double() / steps) ** power
    return Weights(phase_share(t, switch_step) * (1 - falling), falling)


def weighted_mean(losses: Tensor, weight: Tensor) -> Tensor:
    """Mean over the batch of weight times loss.

    Args:
        losses: (B,).
        weight: (B,), of any floating dtype.
    """
    return (weight.to(losses.dtype) * losses).mean()


# ---- consistency of distributions ------------------------------------------------------------------------------------------------------


def domain_direction(mean_source: Tensor, mean_target: Tensor) -> Tensor:
    """Direction d between the domains: mean of the target's features - mean of the source's.

    Args:
        mean_source: (D,) or (1, D).
        mean_target: Like ``mean_source``.

    Returns:
        (1, D).
    """
    return (mean_target - mean_source).reshape(1, -1)


def ddc_distance(generated: Tensor, source: Tensor, direction: Tensor) -> Tensor:
    """Directional distribution consistency: mean over D of (f_G - (f_A + d))^2. Features aren't normalised.

    Args:
        generated: f_G, (B, D) features of what was generated.
        source: f_A, (B, D) features of what it was generated from; no gradient flows into them.
        direction: d, (1, D).

    Returns:
        (B,) float32 or wider.
    """
    generated, source, direction = widened(generated), widened(source.detach()), widened(direction.detach())
    return (generated - (source + direction)).square().mean(1)


def cosine_distance(generated: Tensor, source: Tensor, direction: Tensor) -> Tensor:
    """The directional loss of StyleGAN-NADA: 1 - cos(f_G - f_A, d), which leaves the length of the way free (arXiv:2108.00946).

    Args:
        generated: (B, D).
        source: (B, D); no gradient flows into them.
        direction: (1, D).

    Returns:
        (B,) float32 or wider, in [0, 2].
    """
    generated, source, direction = widened(generated), widened(source.detach()), widened(direction.detach())
    return 1 - F.cosine_similarity(generated - source, direction, dim=1)


def pairwise_divergence(generated: Tensor, source: Tensor) -> Tensor:
    """Cross-domain correspondence: KL of the softmax over a sample's cosines with the others, source to generated (arXiv:2104.06820).

    It looks at the samples' likeness to each other alone: any rotation of all of them leaves it as it is.

    Args:
        generated: (B, D).
        source: (B, D); no gradient flows into them.

    Returns:
        (B,) float32 or wider, >= 0; 0 with fewer than three samples, since two have one other each.
    """
    generated, source = widened(generated), widened(source.detach())
    count = len(generated)
    if count < 2:
        return generated.sum(1) * 0
    others = ~torch.eye(count, dtype=torch.bool, device=generated.device)

    def shares(features: Tensor) -> Tensor:
        unit = F.normalize(features, dim=1)
        return (unit @ unit.T)[others].view(count, count - 1).log_softmax(1)

    return F.kl_div(shares(generated), shares(source), reduction="none", log_target=True).sum(1)


def adaptation_loss(
    consistency: Tensor, style: Tensor, weight: Tensor, consistency_weight: float = 1.0, style_weight: float = 1.0
) -> Tensor:
    """Mean over the batch of weight (consistency_weight consistency + style_weight style).

    Args:
        consistency: (B,).
        style: (B,).
        weight: (B,), of any floating dtype.
        consistency_weight: beta_f.
        style_weight: beta_s.
    """
    return weighted_mean(consistency_weight * consistency + style_weight * style, weight)


# ---- style -----------------------------------------------------------------------------------------------------------------------------


def gram_matrix(features: Tensor) -> Tensor:
    """F F^T / (C H W) of feature maps.

    Args:
        features: (B, C, H, W).

    Returns:
        (B, C, C) float32 or wider.
    """
    with torch.autocast(features.device.type, enabled=False):
        rows = widened(features).flatten(2)
        return rows @ rows.mT / (rows.shape[1] * rows.shape[2])


def gram_distance(generated: Sequence[Tensor], reference: Sequence[Tensor]) -> Tensor:
    """Sum over layers and entries of squared differences of Gram matrices.

    Args:
        generated: One (B, C, C) for each layer.
        reference: As many, (B, C, C) or (1, C, C).

    Returns:
        (B,).
    """
    gaps = [(ours - theirs).square().flatten(1).sum(1) for ours, theirs in zip(generated, reference, strict=True)]
    return torch.stack(gaps).sum(0)


# ---- low frequencies -------------------------------------------------------------------------------------------------------------------


def _cubic(x: Tensor) -> Tensor:
    """Keys' kernel with a = -0.5."""
    x = x.abs()
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return torch.where(x <= 1, near, torch.where(x <= 2, far, torch.zeros_like(x)))


@lru_cache(maxsize=64)
def _resizing(size: int, length: int) -> Tensor:
    """Bicubic resizing of a line as a matrix (length, size) float64: the kernel widens where pixels get fewer, edges are mirrored."""
    scale = length / size
    stretch = min(scale, 1.0)
    centre = (torch.arange(length, dtype=torch.float64) + 0.5) / scale - 0.5
    reach = math.ceil(4 / stretch) + 2
    first = torch.ceil(centre - 2 / stretch - 1e-9).long() - 1
    place = first[:, None] + torch.arange(reach)
    weight = _cubic((centre[:, None] - place) * stretch)
    weight = weight / weight.sum(1, keepdim=True)
    mirrored = torch.cat([torch.arange(size), torch.arange(size).flip(0)])[place.remainder(2 * size)]
    return torch.zeros(length, size, dtype=torch.float64).scatter_add_(1, mirrored, weight)


def lowpass(x: Tensor, factor: int) -> Tensor:
    """Phi: bicubic reduction by a factor with anti-aliasing, and bicubic enlargement.

    Args:
        x: (B, C, H, W).
        factor: N; sides that aren't multiples of it are divided by it and rounded up.

    Returns:
        Like ``x``.
    """
    ways = []
    for size in x.shape[-2:]:
        few = math.ceil(size / factor)
        ways.append((_resizing(few, size) @ _resizing(size, few)).to(x))
    return ways[0] @ x @ ways[1].mT


# ---- sampling --------------------------------------------------------------------------------------------------------------------------


def sampling_times(start: int, steps: int) -> list[int]:
    """Steps of a sampling, the noisiest first; the last is -1, the image itself.

    Args:
        start: Steps of the diffusion that are gone through: the first is ``start`` - 1.
        steps: Network calls.

    Returns:
        ``steps`` + 1 numbers.
    """
    return torch.linspace(-1, start - 1, steps + 1, dtype=torch.float32).int().flip(0).tolist()  # type: ignore[no-any-return]


@dataclass(frozen=True)
class StructureGuidance:
    """Cross-domain structure guidance: low frequencies of a sample are replaced by those of the source image, seen by the target model.

    Args:
        factor: N of the low-pass: 8, or 4, which keeps more of the content.
        above: Guide while the step that is gone to lies above this one.
        style_rounds: M; M - 1 further rounds let the target model give the reference more of its style. 0 and 1: none.

    Raises:
        ValueError: A number below its range.
    """

    factor: int = 8
    above: int = 400
    style_rounds: int = 0

    def __post_init__(self) -> None:
        checks.at_least(1, "a factor that images are reduced by", factor=self.factor)
        checks.at_least(0, "a step", above=self.above)
        checks.at_least(0, "rounds", style_rounds=self.style_rounds)


class Ancestral(NamedTuple):
    """x_(t-1) that was drawn, and x0 that was predicted; each (B, ...)."""

    x: Tensor
    clean: Tensor


def ancestral_step(denoise: Denoise, x: Tensor, time: int, shares: Tensor, content: Any, draw: Draw) -> Ancestral:
    """One step of DDPM; at step 0 no noise is drawn.

    Args:
        denoise: (x_t, t, content) -> noise.
        x: (B, ...) at step ``time``.
        time: Step.
        shares: (T,).
        content: Handed to ``denoise``.
        draw: Gives noise like a tensor.
    """
    t = torch.full((len(x),), time, dtype=torch.int64, device=x.device)
    clean = predicted_clean(x, denoise(x, t, content), t, shares)
    mean, variance = posterior(clean, x, t, shares)
    return Ancestral(mean if time == 0 else mean + variance.sqrt() * draw(x), clean)


def guide_structure(
    denoise: Denoise, x: Tensor, source: Tensor, time: int, shares: Tensor, guidance: StructureGuidance, content: Any, draw: Draw
) -> Tensor:
    """Low frequencies of a reference: x - Phi(x) + Phi(r), where r is the noised source image after one step of the target model.

    Args:
        denoise: (x_t, t, content) -> noise, the target model.
        x: (B, C, H, W) at step ``time``.
        source: Like ``x``, the source image.
        time: Step.
        shares: (T,).
        guidance: Filter and rounds.
        content: Handed to ``denoise``.
        draw: Gives noise like a tensor.
    """
    t = torch.full((len(x),), time, dtype=torch.int64, device=x.device)
    made = ancestral_step(denoise, noised(source, draw(source), t, shares), time, shares, content, draw)
    for _ in range(guidance.style_rounds - 1):
        made = ancestral_step(denoise, noised(made.clean, draw(source), t, shares), time, shares, content, draw)
    return x + lowpass(made.x - x, guidance.factor)


@torch.no_grad()
def ddim_from(
    denoise: Denoise,
    start: Tensor,
    times: Sequence[int],
    shares: Tensor,
    draw: Draw,
    eta: float = 1.0,
    content: Any = None,
    content_until: int = 0,
    source: Tensor | None = None,
    guidance: StructureGuidance | None = None,
) -> Tensor:
    """DDIM between given steps, with content and structure of a source image.

    The predicted x0 is clamped, the predicted noise stays as it is. Noises are drawn in this order: of the DDIM step, of the noised source,
    of its ancestral step, then two for each further round.

    Args:
        denoise: (x_t, t, content) -> noise.
        start: (B, C, H, W) at the first step.
        times: Descending steps, the last -1.
        shares: (T,).
        draw: Gives noise like a tensor.
        eta: 0: no noise is added; 1: as much as DDPM adds.
        content: Handed to ``denoise``; None: no content.
        content_until: Content is given while the step that is gone to is at least this one, so never in the last.
        source: Like ``start``, the source image, for the guidance.
        guidance: None: no guidance.

    Returns:
        (B, C, H, W) in [-1, 1].
    """
    x = start
    for time, following in pairwise(times):
        t = torch.full((len(x),), time, dtype=torch.int64, device=x.device)
        eps = denoise(x, t, content if following >= content_until else None)
        clean = predicted_clean(x, eps, t, shares)
        if following < 0:
            return clean
        now, then = shares[time].to(x), shares[following].to(x)
        x = ddim_step(x, eps, now, then, eta, draw(x), clean)
        if guidance is not None and source is not None and following > guidance.above:
            x = guide_structure(denoise, x, source, following, shares, guidance, content, draw)
    return x


def translation_start(source: Tensor, noise: Tensor, start_step: int, shares: Tensor) -> Tensor:
    """The source image with the noise of the step that translation begins at.

    Args:
        source: (B, C, H, W).
        noise: Like ``source``, standard normal.
        start_step: Step; at most T - 1.
        shares: (T,).
    """
    t = torch.full((len(source),), min(start_step, len(shares) - 1), dtype=torch.int64, device=source.device)
    return noised(source, noise, t, shares)


# ---- evaluation ------------------------------------------------------------------------------------------------------------------------


def intra_cluster_distance(distances: Tensor, nearest: Tensor, clusters: int) -> Tensor:
    """Diversity: mean distance of two samples that are nearest to the same target image, averaged over target images that have two.

    With LPIPS as the distance it is the paper's IC-LPIPS.

    Args:
        distances: (N, N) of the samples.
        nearest: (N,) int64, the target image that each is nearest to.
        clusters: Number of target images.

    Returns:
        Scalar; 0 if no target image has two samples.
    """
    member = F.one_hot(nearest, clusters).to(distances.dtype)
    inside = ((distances @ member) * member).sum(0) - (distances.diagonal()[:, None] * member).sum(0)
    count = member.sum(0)
    means = inside / (count * (count - 1)).clamp(min=1)
    has_two = (count > 1).to(distances.dtype)
    return (means * has_two).sum() / has_two.sum().clamp(min=1)


__all__ = [
    "StructureGuidance",
    "cosine_shares",
    "ddc_distance",
    "ddim_from",
    "domain_direction",
    "gram_distance",
    "gram_matrix",
    "guide_structure",
    "intra_cluster_distance",
    "mix_content",
    "pairwise_divergence",
    "paper_weights",
    "phase_share",
    "phasic_weights",
]
