"""InterLCM: a degraded image is the answer of a latent consistency model's first step; the steps behind it restore (arXiv:2502.02215).

Maths compared with sen-mao/InterLCM@2940f43 (basicsr/utils/lcm_utils.py, basicsr/losses/losses.py and the model in
basicsr/models/codeformer_joint_model.py) and the LCMScheduler of diffusers 0.28.2. Colour fixes stand in
:mod:`lit_methods.restoration.color`. Left out: the adaptive weight of the adversarial loss, which that code computes and doesn't use.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Predict = Callable[[Tensor, Tensor], Tensor]


# ---- schedule --------------------------------------------------------------------------------------------------------------------------


def lcm_timesteps(steps: int, origin: int = 50, train_steps: int = 1000) -> Tensor:
    """Times of a latent consistency model: ``steps`` of the ``origin`` times k T / origin - 1 that it was distilled at, the noisiest first.

    The chosen ones are number floor(i origin / steps), i = 0..steps - 1: four steps of 50 are 999, 759, 499, 259.

    Args:
        steps: n, 1 to ``origin``.
        origin: Times of the distillation.
        train_steps: T, times of the diffusion.

    Returns:
        (n,) int64, falling.

    Raises:
        ValueError: More steps than times.
    """
    if not 1 <= origin <= train_steps or not 1 <= steps <= origin:
        raise ValueError(f"{steps} steps of {origin} times of {train_steps} can't be: give 1 <= steps <= origin <= train_steps")
    known = (torch.arange(1, origin + 1) * (train_steps // origin) - 1).flip(0)
    return known[(torch.arange(steps, dtype=torch.float64) * (origin / steps)).floor().long()]


class LCMSchedule(NamedTuple):
    """Steps of a latent consistency model, the noisiest first; each field has n entries.

    Attributes:
        times: (n,) int64.
        shares: (n,) alpha-bar: the share of the signal's power.
        skip: (n,) how much of the noisy latents stays in the answer; about 1e-8.
        out: (n,) how much of the predicted start there is in it; about 1.
    """

    times: Tensor
    shares: Tensor
    skip: Tensor
    out: Tensor


def lcm_schedule(shares: Tensor, times: Tensor, timestep_scaling: float = 10.0, sigma_data: float = 0.5) -> LCMSchedule:
    """What a latent consistency model computes with at its times: alpha-bar, and the scalings of s = ``timestep_scaling`` t.

    The scalings are d^2 / (s^2 + d^2) and s / sqrt(s^2 + d^2), with d = ``sigma_data``.

    Args:
        shares: (T,) alpha-bar of all times of the diffusion.
        times: (n,) int64, such as :func:`lcm_timesteps`.
        timestep_scaling: Factor of the times.
        sigma_data: Of the scalings.

    Raises:
        ValueError: A time that ``shares`` hasn't.
    """
    if len(times) == 0 or int(times.min()) < 0 or int(times.max()) >= len(shares):
        raise ValueError(f"times are {times.tolist()}: give some of 0 to {len(shares) - 1}")
    scaled = timestep_scaling * times.double()
    power = scaled.square() + sigma_data**2
    wide = torch.promote_types(shares.dtype, torch.float32)
    skip, out = (values.to(shares.device, wide) for values in (sigma_data**2 / power, scaled / power.sqrt()))
    return LCMSchedule(times.to(shares.device), shares[times.to(shares.device)].to(wide), skip, out)


# ---- the chain -------------------------------------------------------------------------------------------------------------------------


def renoise(denoised: Tensor, noise: Tensor, share: Tensor) -> Tensor:
    """sqrt(a) x + sqrt(1 - a) noise.

    Args:
        denoised: (B, ...) clean latents.
        noise: Like it, standard normal.
        share: a, scalar: alpha-bar of the time that comes next.
    """
    return share.sqrt() * denoised + (1 - share).sqrt() * noise


def consistency_answer(z: Tensor, eps: Tensor, share: Tensor, skip: Tensor, out: Tensor) -> Tensor:
    """``out`` (z - sqrt(1 - a) eps) / sqrt(a) + ``skip`` z, in float32 or wider: at t = 999 the division is by 0.07.

    Args:
        z: (B, ...) noisy latents.
        eps: Like ``z``, the noise that the network predicted.
        share: a, scalar: alpha-bar of the time.
        skip: Scalar of :class:`LCMSchedule`.
        out: Scalar of :class:`LCMSchedule`.
    """
    wide = torch.promote_types(z.dtype, torch.float32)
    with torch.autocast(z.device.type, enabled=False):
        z, eps = z.to(wide), eps.to(wide)
        return out * ((z - (1 - share).sqrt() * eps) / share.sqrt()) + skip * z


class Chain(NamedTuple):
    """What each step made.

    Attributes:
        latents: (B, ...) after each step: noised for the next one, but for the last.
        denoised: (B, ...) answers of the steps.
    """

    latents: list[Tensor]
    denoised: list[Tensor]


def consistency_chain(z: Tensor, predict: Predict, schedule: LCMSchedule, noises: Sequence[Tensor], first: int = 0) -> Chain:
    """Steps ``first``..n - 1 of a latent consistency model, each of which calls its network once; fresh noise between them.

    Args:
        z: (B, ...) noisy latents of step ``first``.
        predict: (B, ...) and time (B,) int64 -> the noise in them.
        schedule: n steps.
        noises: Standard normal, like ``z``: one less than there are steps to make.
        first: Step that ``z`` belongs to.
    """
    latents, denoised = [], []
    last = len(schedule.times) - 1
    for step in range(first, last + 1):
        time = schedule.times[step]
        answer = consistency_answer(z, predict(z, time.expand(len(z))), schedule.shares[step], schedule.skip[step], schedule.out[step])
        z = answer if step == last else renoise(answer, noises[step - first], schedule.shares[step + 1])
        latents.append(z)
        denoised.append(answer)
    return Chain(latents, denoised)


def restore_from_low_quality(lq: Tensor, predict: Predict, schedule: LCMSchedule, noises: Sequence[Tensor]) -> Chain:
    """Takes the latents of the degraded image for the answer of step 0, noises them for step 1, and makes steps 1..n - 1.

    The network is called n - 1 times. With n = 1 it isn't called: the answer is ``lq``.

    Args:
        lq: (B, ...) latents of the degraded image, times the autoencoder's factor.
        predict: (B, ...) and time (B,) int64 -> the noise in them.
        schedule: n steps.
        noises: n - 1, standard normal, like ``lq``.

    Returns:
        n entries each; the first of ``denoised`` is ``lq``.

    Raises:
        ValueError: Another number of noises.
    """
    steps = len(schedule.times)
    if len(noises) != steps - 1:
        raise ValueError(f"{steps} steps need {steps - 1} noises, got {len(noises)}")
    if steps == 1:
        return Chain([lq], [lq])
    z = renoise(lq, noises[0], schedule.shares[1])
    further = consistency_chain(z, predict, schedule, noises[1:], first=1)
    return Chain([z, *further.latents], [lq, *further.denoised])


def guidance_embedding(scale: float, width: int = 256) -> Tensor:
    """The sinusoidal embedding of 1000 (scale - 1), by which a guidance-distilled network knows the strength of its guidance.

    Args:
        scale: Of classifier-free guidance, 1: none.
        width: Even.

    Returns:
        (1, width) float32.
    """
    half = width // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float64) * (-math.log(10000.0) / (half - 1)))
    angles = 1000 * (scale - 1) * frequencies
    return torch.cat([angles.sin(), angles.cos()])[None].float()


# ---- losses ----------------------------------------------------------------------------------------------------------------------------


class RestorationLoss(NamedTuple):
    """Scalars: what is minimised, mean absolute difference, and the adversarial term without its weight (0 without scores)."""

    total: Tensor
    pixel: Tensor
    gan: Tensor


def restoration_loss(
    output: Tensor,
    target: Tensor,
    perceptual: Tensor | float,
    scores: Tensor | None,
    step: int,
    gan_start: int = 10001,
    pixel_weight: float = 1.0,
    perceptual_weight: float = 1.0,
    gan_weight: float = 0.1,
) -> RestorationLoss:
    """``pixel_weight`` mean |output - target| + ``perceptual_weight`` P, and ``gan_weight`` times -mean D(output) in steps > ``gan_start``.

    Args:
        output: (B, C, H, W) restored images.
        target: The same shape.
        perceptual: P, scalar.
        scores: D(output), any shape; None: not computed.
        step: Number of the optimiser step.
        gan_start: Last step without the adversarial term.
        pixel_weight: Of the absolute difference.
        perceptual_weight: Of P.
        gan_weight: Of the adversarial term.
    """
    pixel = F.l1_loss(output, target)
    gan = output.new_zeros(()) if scores is None else -scores.mean()
    total = pixel_weight * pixel + perceptual_weight * perceptual + (gan_weight if step > gan_start else 0.0) * gan
    return RestorationLoss(total, pixel, gan)


def critic_hinge(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """Mean relu(1 - D(target)) and mean relu(1 + D(output)); a discriminator minimises their sum.

    Args:
        real: D(target), any shape.
        fake: D(output), any shape.
    """
    return F.relu(1 - real).mean(), F.relu(1 + fake).mean()


__all__ = [
    "Chain",
    "LCMSchedule",
    "RestorationLoss",
    "consistency_answer",
    "consistency_chain",
    "critic_hinge",
    "guidance_embedding",
    "lcm_schedule",
    "lcm_timesteps",
    "renoise",
    "restoration_loss",
    "restore_from_low_quality",
]
