"""Samples from any consistency function, in one step or several, and from any denoiser, in many."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from lit_methods import checks

Consistency = Callable[[Tensor, Tensor], Tensor]


def check_sample_times(times: Sequence[float], sigma_min: float, sigma_max: float) -> None:
    """Raise ValueError unless levels of a sampler descend and lie between the smallest and the largest."""
    if list(times) != sorted(times, reverse=True) or any(not sigma_min < time < sigma_max for time in times):
        raise ValueError(f"sample_times are {list(times)}: give descending levels between {sigma_min} and {sigma_max}")


def multistep_sample(
    f: Consistency,
    start: Tensor,
    times: Sequence[float],
    noises: Sequence[Tensor] | None = None,
    *,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    clip: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Alternate x = f(x, t) and noise up to the next time, for each pair of times (arXiv:2303.01469, Algorithm 1).

    Args:
        f: Consistency function of (B, ...) and (B,) noise levels.
        start: (B, ...) noise times the first level.
        times: Descending levels t_1 > ... > t_n, n >= 2, clipped to [sigma_min, sigma_max] where noise of that size is added. f is called
            at all but the last, which is ``sigma_min``, so that no noise stays: (80, 0.002) is one step.
        noises: One for each time but the first, standard normal, like ``start``; None: drawn.
        sigma_min: Smallest level.
        sigma_max: Largest level.
        clip: Clamp every answer of f to [-1, 1], before noise is added.
        generator: For noises that are drawn.

    Returns:
        (B, ...).

    Raises:
        ValueError: Fewer than two times.
    """
    if len(times) < 2:
        raise ValueError(f"times are {list(times)}: give at least two, from the level of the noise down to sigma_min")
    x = start
    for number, (time, following) in enumerate(pairwise(times)):
        x = f(x, torch.full((len(x),), time, dtype=x.dtype, device=x.device))
        if clip:
            x = x.clamp(-1.0, 1.0)
        size = max(min(max(following, sigma_min), sigma_max) ** 2 - sigma_min**2, 0.0) ** 0.5
        if size > 0:
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device) if noises is None else noises[number]
            x = x + noise * size
    return x


Solver = Literal["heun", "euler", "sde"]


@torch.no_grad()
def denoise_sample(
    denoise: Callable[[Tensor, float], Tensor],
    start: Tensor,
    levels: Sequence[float],
    solver: Solver = "heun",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Follow the probability-flow ODE dx / dsigma = (x - D(x, sigma)) / sigma, or the reverse SDE, from noise to a sample.

    Heun's method and Euler's are those of EDM (arXiv:2206.00364, Algorithm 1). The step to level 0 is always Euler's. ``sde`` draws each
    next sample from its exact distribution given x and the denoised sample, as ancestral sampling does (arXiv:2011.13456, Appendix F).

    Args:
        denoise: D of (B, ...) and their level, a number -> the mean of the clean sample.
        start: (B, ...) noise times the first level.
        levels: Descending, > 0; a last step to 0 follows. N levels are N calls of D with ``euler`` and ``sde``, 2 N - 1 with ``heun``.
        solver: ``heun``, ``euler`` or ``sde``.
        generator: Draws the noise of ``sde``.

    Returns:
        (B, ...).

    Raises:
        ValueError: Levels that don't descend, or another solver.
    """
    checks.one_of(Solver, solver=solver)
    if not levels or any(low >= high for high, low in pairwise(levels)) or levels[-1] <= 0:
        raise ValueError(f"levels are {list(levels)[:4]}...: give descending numbers above 0")

    def slope(x: Tensor, level: float) -> tuple[Tensor, Tensor]:
        clean = denoise(x, level)
        return (x - clean) / level, clean

    x = start
    for level, following in pairwise([*levels, 0.0]):
        change, clean = slope(x, level)
        if solver == "sde":
            fresh = following * (level**2 - following**2) ** 0.5 / level
            kept = (following / level) ** 2
            x = clean + kept * (x - clean)
            if fresh > 0:
                x = x + fresh * torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
            continue
        moved = x + (following - level) * change
        if solver == "heun" and following > 0:
            moved = x + (following - level) * (change + slope(moved, following)[0]) / 2
        x = moved
    return x
