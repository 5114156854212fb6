"""DDIM (arXiv:2010.02502): the steps of a short sampling and one step of it. Whoever calls it brings the noise."""

from typing import NamedTuple

import torch
from torch import Tensor


class DDIMSchedule(NamedTuple):
    """Steps of a sampling, the noisiest first; each field has S entries.

    Attributes:
        times: (S,) int64, steps t of the diffusion that the network is called at.
        shares: (S,) alpha-bar at these steps: the share of the signal's power.
        following: (S,) alpha-bar that each step goes to.
    """

    times: Tensor
    shares: Tensor
    following: Tensor


def ddim_schedule(shares: Tensor, steps: int) -> DDIMSchedule:
    """Equally spaced steps t = k (T // S) + 1, k = S - 1..0; the last one goes to alpha-bar of t = 0, as Stable Diffusion's sampler does.

    Args:
        shares: (T,) alpha-bar of all steps of the diffusion, falling.
        steps: S, 1..T.

    Raises:
        ValueError: More steps than there are.
    """
    if not 1 <= steps <= len(shares):
        raise ValueError(f"{steps} steps of {len(shares)}: give 1 to {len(shares)}")
    stride = len(shares) // steps
    times = (torch.arange(steps, device=shares.device) * stride + min(1, stride - 1)).flip(0)
    chosen = shares[times]
    return DDIMSchedule(times, chosen, torch.cat([chosen[1:], shares[:1]]))


def ddim_step(
    x: Tensor,
    eps: Tensor,
    share: Tensor,
    following: Tensor,
    eta: float = 0.0,
    noise: Tensor | None = None,
    clean: Tensor | None = None,
) -> Tensor:
    """sqrt(a') x0 + sqrt(1 - a' - s^2) eps + s noise, where x0 = (x - sqrt(1 - a) eps) / sqrt(a) (Eq. 12).

    Args:
        x: (B, ...) noisy samples.
        eps: Like ``x``, the noise that was predicted.
        share: a, scalar.
        following: a' > a, scalar.
        eta: 0: no noise is added; 1: as much as DDPM adds.
        noise: Like ``x``, standard normal; needed where ``eta`` isn't 0.
        clean: x0 where it isn't what ``eps`` says, because it was clamped; ``eps`` stays as it is.

    Raises:
        ValueError: ``eta`` without noise.
    """
    x0 = (x - (1 - share).sqrt() * eps) / share.sqrt() if clean is None else clean
    if eta == 0:
        return following.sqrt() * x0 + (1 - following).sqrt() * eps
    if noise is None:
        raise ValueError(f"eta={eta} adds noise: give noise like x")
    spread = eta * ((1 - following) / (1 - share) * (1 - share / following)).sqrt()
    return following.sqrt() * x0 + (1 - following - spread**2).clamp(min=0).sqrt() * eps + spread * noise


__all__ = ["DDIMSchedule", "ddim_schedule", "ddim_step"]
