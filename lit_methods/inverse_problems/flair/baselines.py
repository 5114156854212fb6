"""What FLAIR is compared with, on the same problem, prior and noise: RED-diff on the flow, FlowDPS, FlowChef, DPS.

The last three follow the flow's ODE from noise and correct it by the data: FlowDPS (arXiv:2503.08136), FlowChef (arXiv:2412.00100), DPS
(arXiv:2209.14687) on the flow. They take ``steps``, ``lr_data`` and ``data_steps`` of the settings; of DPS ``lr_data`` is the length of a
step along the gradient of the distance, and ``data_steps`` doesn't count. Written from their equations in FLAIR's setting; that details are
the authors' is not verified (?). All solve a :class:`~lit_methods.inverse_problems.flair.core.Problem`.
"""

from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from lit_methods.inverse_problems.flair.core import (
    FlairSettings,
    Noises,
    Problem,
    Trace,
    Watch,
    data_gradient,
    data_loss,
    flair_solve,
    predicted_clean,
    predicted_noise,
    residual,
)


def red_diff(problem: Problem, mu: Tensor, noises: Noises, weight: float, settings: FlairSettings, watch: Watch) -> Tensor:
    """RED-diff on the flow: fresh noise at each time, constant weight, one gradient step on data and regulariser together."""
    constant = replace(settings, alpha="none", joint=True, tied=False)
    return flair_solve(problem, mu, noises, [weight] * settings.steps, constant, watch)


def _watch(watch: Watch, problem: Problem, t: float, clean: Tensor, steps: int) -> None:
    left = residual(problem, clean)
    watch(Trace(t, clean, left, torch.full_like(left, torch.nan), 0.0, torch.full_like(left, steps, dtype=torch.int64)))


def _times(steps: int) -> list[tuple[float, float]]:
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
    return list(pairwise(times))


def flow_dps(problem: Problem, noises: Noises, settings: FlairSettings, eta: float, watch: Watch) -> Tensor:
    """FlowDPS: the clean prediction goes a few steps towards the data, and is mixed again with predicted and fresh noise."""
    x = noises(0)
    for number, (t, after) in enumerate(_times(settings.steps), 1):
        with torch.no_grad():
            v = problem.velocity(x, t).to(x.dtype)
        clean, start = predicted_clean(x, v, t), predicted_noise(x, v, t)
        for _ in range(settings.data_steps):
            clean = clean - settings.lr_data * data_gradient(clean, problem.y, problem.predict)[1]
        mixed = (1 - eta) ** 0.5 * start + eta**0.5 * noises(number)
        x = (1 - after) * clean + after * mixed
        _watch(watch, problem, t, clean, settings.data_steps)
    return x


def flow_chef(problem: Problem, noises: Noises, settings: FlairSettings, watch: Watch) -> Tensor:
    """FlowChef: the data's gradient at the clean prediction moves x_t itself, as if the model were the identity; then a step of the ODE."""
    x = noises(0)
    for t, after in _times(settings.steps):
        with torch.no_grad():
            v = problem.velocity(x, t).to(x.dtype)
        for _ in range(settings.data_steps):
            x = x - settings.lr_data * data_gradient(predicted_clean(x, v, t), problem.y, problem.predict)[1]
        _watch(watch, problem, t, predicted_clean(x, v, t), settings.data_steps)
        x = x + (after - t) * v
    return x


def dps(problem: Problem, noises: Noises, settings: FlairSettings, watch: Watch) -> Tensor:
    """DPS: a step of the ODE, less the gradient of |A(D(x0(x_t))) - y| through the model; the one method that differentiates it."""
    x = noises(0)
    for t, after in _times(settings.steps):
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            v = problem.velocity(leaf, t).to(x.dtype)
            clean = predicted_clean(leaf, v, t)
            distance = data_loss(problem.predict(clean), problem.y).clamp(min=1e-20).sqrt()
            (gradient,) = torch.autograd.grad(distance.sum(), leaf)
        x = (x + (after - t) * v - settings.lr_data * gradient).detach()
        _watch(watch, problem, t, clean.detach(), 1)
    return x
