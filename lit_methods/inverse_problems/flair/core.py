"""FLAIR's maths: inverse problems by a frozen flow model, whose variational mean is optimised (arXiv:2506.02680).

From the paper and prs-eth/FLAIR@c4f55f7 (var_post_samp.py, pipelines/sd3.py), which has no licence, so this is written anew and compared
with vectors of that code. Conventions: x_t = (1 - t) x0 + t x1 with x1 ~ N(0, 1), so t = 1 is noise; the velocity is E[x1 - x0 | x_t]. No
gradient ever goes through the model. Left out: the bilinear variant of the degradation, which is an operator like any other.

Tensors are of one device and floating dtype, (B, ...) with any further dimensions; a time is a Python number in [0, 1].
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lit_methods import checks

Alpha = Literal["1-t", "0.9(1-t)", "0.5(1-t)", "(1-t)^2", "sqrt(1-t)", "t", "tsqrt", "tcbrt", "sine", "none"]
Direction = Literal["v", "sigma", "sigma2"]
Velocity = Callable[[Tensor, float], Tensor]
Predict = Callable[[Tensor], Tensor]
Noises = Callable[[int], Tensor]


def flow_matching_error(velocity: Tensor, x0: Tensor, x1: Tensor) -> Tensor:
    """(B,) mean square of velocity - (x1 - x0), each (B, ...): the loss of flow matching, and at one time a point of the error curve."""
    return (velocity - (x1 - x0)).square().flatten(1).mean(1)


# ---- weights ---------------------------------------------------------------------------------------------------------------------------


def time_grid(steps: int, ts_min: float = 0.18) -> Tensor:
    """The times of the optimisation, falling: linspace(1, ts_min, steps + 2) without its ends.

    Args:
        steps: n >= 1.
        ts_min: Lower end, in [0, 1).

    Returns:
        (n,) float64 in (ts_min, 1).
    """
    return torch.linspace(1, ts_min, steps + 2, dtype=torch.float64)[1:-1]


def calibrated_weights(error: Tensor, shift: float | None = 0.0, regularizer_weight: float = 0.5) -> Tensor:
    """CRW: the weight of the regulariser at each time of the error curve, the inverse of the model's error with mean 1.

    Args:
        error: (N,) mean squared error of the velocity at times linspace(1, 0, N), >= 0; NaN where it wasn't measured.
        shift: Added to the weights of mean 1; None: the last weight, that of t = 0, is taken off instead.
        regularizer_weight: Factor of all.

    Returns:
        (N,) >= 0, NaN where ``error`` is.
    """
    inverse = 1 / (error + 1e-7)
    weights = inverse / inverse.nansum() * len(error)
    weights = weights - weights[-1] if shift is None else weights + shift
    return weights.clamp(min=0) * regularizer_weight


def nearest_time(times: Tensor, count: int) -> Tensor:
    """Index of the nearest of linspace(1, 0, count) to each time; the first of two that are as near.

    Args:
        times: (M,) in [0, 1].
        count: N >= 1, the length of the error curve.

    Returns:
        (M,) int64 in 0..N - 1.
    """
    grid = torch.linspace(1, 0, count, dtype=times.dtype, device=times.device)
    return (times[:, None] - grid).abs().argmin(1)


def weight_at(weights: Tensor, times: Tensor) -> Tensor:
    """w(t): (N,) weights at linspace(1, 0, N), and (M,) times -> (M,) the weight of the nearest of them."""
    return weights[nearest_time(times, len(weights))]


def largest_pull(weights: Tensor, ts_min: float = 0.18) -> Tensor:
    """The largest w(t) / t over the times of the error curve that are at least ``ts_min``.

    v - u = (mu - x0) / t, where x0 is the model's prediction, so a step moves mu towards x0 by the share w(t) / t: above 2 it diverges.

    Args:
        weights: (N,) at linspace(1, 0, N).
        ts_min: The smallest time that is used.

    Returns:
        Scalar >= 0. Times at 0 are left out.
    """
    times = torch.linspace(1, 0, len(weights), dtype=torch.float64, device=weights.device)
    used = (times >= ts_min) & (times > 0)
    return (weights.double()[used] / times[used]).max()


# ---- one step --------------------------------------------------------------------------------------------------------------------------


def alpha_at(t: float, mode: Alpha = "1-t") -> float:
    """Share of the kept prediction in the noise at time t.

    Args:
        t: In [0, 1].
        mode: ``1-t`` as in the paper; its multiples ``0.9(1-t)`` and ``0.5(1-t)``, ``(1-t)^2``, ``sqrt(1-t)``; ``t``, ``tsqrt``, ``tcbrt``
            (its roots), ``sine``: sin(pi t / 2); ``none``: fresh noise alone.

    Returns:
        In [0, 1].

    Raises:
        ValueError: Another mode.
    """
    values = {
        "1-t": 1 - t,
        "0.9(1-t)": 0.9 * (1 - t),
        "0.5(1-t)": 0.5 * (1 - t),
        "(1-t)^2": (1 - t) ** 2,
        "sqrt(1-t)": math.sqrt(1 - t),
        "t": t,
        "tsqrt": math.sqrt(t),
        "tcbrt": t ** (1 / 3),
        "sine": math.sin(math.pi * t / 2),
        "none": 0.0,
    }
    checks.one_of(values, alpha=mode)
    return values[mode]


def adjusted_noise(x1_hat: Tensor, fresh: Tensor, alpha: float) -> Tensor:
    """DTA: alpha x1_hat + sqrt(1 - alpha^2) fresh, of the model's own prediction of the start noise and of fresh noise, (B, ...) each."""
    return alpha * x1_hat + math.sqrt(max(0.0, 1 - alpha**2)) * fresh


def guided_velocity(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: v_u + scale (v_c - v_u); 1: the conditional velocity alone."""
    return unconditional + scale * (conditional - unconditional)


def predicted_noise(x_t: Tensor, velocity: Tensor, t: float) -> Tensor:
    """The start noise that the velocity at x_t leads to: x1 = x_t + (1 - t) v."""
    return x_t + (1 - t) * velocity


def predicted_clean(x_t: Tensor, velocity: Tensor, t: float) -> Tensor:
    """The clean sample that the velocity at x_t leads to: x0 = x_t - t v."""
    return x_t - t * velocity


def regulariser_direction(
    mu: Tensor, noise: Tensor, x_t: Tensor, velocity: Tensor, t: float, weight: float | Tensor, mode: Direction = "v"
) -> Tensor:
    """What is subtracted from mu, times the learning rate: the sum over elements has this gradient, its mean would not.

    Args:
        mu: (B, ...).
        noise: (B, ...) that x_t was made with.
        x_t: (1 - t) mu + t noise.
        velocity: (B, ...) of the model at x_t.
        t: In (0, 1); ``sigma2`` divides by 1 - t.
        weight: w(t) >= 0.
        mode: ``v``: w (v - u) with the path's velocity u = noise - mu. ``sigma``: w (x1 - noise) with the predicted noise x1. ``sigma2``:
            the same times t / (1 - t).

    Returns:
        (B, ...).

    Raises:
        ValueError: Another mode.
    """
    if mode == "v":
        return weight * (velocity - (noise - mu))
    if mode not in ("sigma", "sigma2"):
        raise ValueError(f"mode is {mode!r}: give one of {', '.join(get_args(Direction))}")
    gap = weight * (predicted_noise(x_t, velocity, t) - noise)
    return gap * (t / (1 - t)) if mode == "sigma2" else gap


class Regularised(NamedTuple):
    """What the regulariser says at one time; (B, ...) each.

    Attributes:
        noise: Noise of this step.
        x_t: (1 - t) mu + t noise.
        velocity: Of the model at x_t.
        x1_hat: Predicted start noise, for the next step.
        direction: What is subtracted from mu, times the learning rate.
    """

    noise: Tensor
    x_t: Tensor
    velocity: Tensor
    x1_hat: Tensor
    direction: Tensor


def regulariser_step(
    mu: Tensor,
    x1_hat: Tensor,
    fresh: Tensor,
    t: float,
    velocity: Velocity,
    weight: float | Tensor,
    alpha: Alpha = "1-t",
    mode: Direction = "v",
) -> Regularised:
    """One look at the prior: noise by DTA, the model's velocity, and where it pulls mu. No gradient is kept.

    Args:
        mu: (B, ...) mean.
        x1_hat: Start noise that the step before predicted; at first the start noise itself.
        fresh: N(0, 1) like ``mu``.
        t: In (0, 1).
        velocity: (x_t, t) -> velocity like x_t.
        weight: w(t).
        alpha: See :func:`alpha_at`.
        mode: See :func:`regulariser_direction`.
    """
    with torch.no_grad():
        noise = adjusted_noise(x1_hat, fresh, alpha_at(t, alpha))
        x_t = (1 - t) * mu + t * noise
        v = velocity(x_t, t).to(mu.dtype)
        return Regularised(noise, x_t, v, predicted_noise(x_t, v, t), regulariser_direction(mu, noise, x_t, v, t, weight, mode))


# ---- data ------------------------------------------------------------------------------------------------------------------------------


def data_loss(predicted: Tensor, y: Tensor) -> Tensor:
    """Sum of squares of A(D(mu)) - y for each sample: (B, ...) twice -> (B,)."""
    return (predicted - y).square().flatten(1).sum(1)


def data_gradient(mu: Tensor, y: Tensor, predict: Predict) -> tuple[Tensor, Tensor]:
    """:func:`data_loss` of mu, and its gradient through operator and decoder: (B,) and like ``mu``."""
    with torch.enable_grad():
        leaf = mu.detach().requires_grad_()
        loss = data_loss(predict(leaf), y)
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), gradient


class DataFit(NamedTuple):
    """What hard data consistency made of mu.

    Attributes:
        mu: (B, ...).
        before: (B,) squared error before.
        after: (B,) squared error behind it.
        steps: (B,) int64, steps taken.
    """

    mu: Tensor
    before: Tensor
    after: Tensor
    steps: Tensor


def fit_data(
    mu: Tensor, y: Tensor, predict: Predict, weight: float | Tensor, learning_rate: float, steps: int = 15, tolerance: float = 1e-4
) -> DataFit:
    """HDC: gradient steps on weight * |A(D(mu)) - y|^2 until each sample's error is below ``tolerance`` times its number of measurements.

    A sample that has come so far stays where it is: the authors test the sum over a batch of one, and this is the same there.

    Args:
        mu: (B, ...).
        y: (B, ...) measurements.
        predict: mu -> A(D(mu)), like ``y``.
        weight: lambda(t) >= 0.
        learning_rate: Of plain gradient descent on the sum of squares.
        steps: At most so many, >= 0.
        tolerance: Of the mean square, the variance of the noise.
    """
    limit = tolerance * y[0].numel() if len(y) else 0.0
    active = torch.ones(len(mu), dtype=torch.bool, device=mu.device)
    used = torch.zeros(len(mu), dtype=torch.int64, device=mu.device)
    mu, before, known = mu.detach(), None, False
    for _ in range(steps):
        loss, gradient = data_gradient(mu, y, predict)
        before = loss if before is None else before
        active = active & ~(loss < limit)  # a NaN goes on, and is seen
        if known := not bool(active.any()):  # one wait; it saves passes of the decoder
            break
        mu = torch.where(active.view(-1, *[1] * (mu.ndim - 1)), mu - learning_rate * (weight * gradient), mu)
        used = used + active
    if not known:
        with torch.no_grad():
            loss = data_loss(predict(mu), y)
    return DataFit(mu, loss if before is None else before, loss, used)


# ---- the whole -------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FlairSettings:
    """How mu is optimised.

    Attributes:
        steps: Times, n.
        ts_min: Below this time the model isn't asked.
        alpha: Share of the kept prediction in the noise, see :func:`alpha_at`; ``none``: without DTA.
        mode: See :func:`regulariser_direction`.
        lr_reg: Learning rate of the regulariser.
        lr_data: Learning rate of the data term.
        data_steps: Steps of the data term at each time, at most.
        tolerance: Mean square at which they stop.
        likelihood_weight: Factor of the data term.
        tied: The data term is weighted by w(t), too; False: by ``likelihood_weight`` alone.
        joint: One gradient step on data and regulariser together at each time, in the place of HDC.
        lr_projection: Learning rate of the soft projection for t > 0.7; 0: without.
    """

    steps: int = 50
    ts_min: float = 0.18
    alpha: Alpha = "1-t"
    mode: Direction = "v"
    lr_reg: float = 1.0
    lr_data: float = 0.1
    data_steps: int = 15
    tolerance: float = 1e-4
    likelihood_weight: float = 1.0
    tied: bool = True
    joint: bool = False
    lr_projection: float = 0.0

    def __post_init__(self) -> None:
        checks.one_of(Alpha, alpha=self.alpha)
        checks.one_of(Direction, mode=self.mode)
        checks.at_least(1, steps=self.steps)
        checks.within("[0, 1)", "a time", ts_min=self.ts_min)
        checks.at_least(0, data_steps=self.data_steps, tolerance=self.tolerance, likelihood_weight=self.likelihood_weight)
        checks.at_least(0, lr_reg=self.lr_reg, lr_data=self.lr_data, lr_projection=self.lr_projection)


class Problem(NamedTuple):
    """What is to be solved, the same for all methods.

    Attributes:
        y: (B, ...) measurements.
        velocity: (x_t, t) -> velocity of the prior.
        predict: Latents -> A(D(latents)), like ``y``; gradients go through it.
        project: Latents -> the latents of the same image with its measured part replaced, E(x - A+ A x + A+ y); for the soft projection.
    """

    y: Tensor
    velocity: Velocity
    predict: Predict
    project: Predict | None = None


class Trace(NamedTuple):
    """What one time left behind.

    Attributes:
        t: The time.
        mu: (B, ...) mean, or the sampler's prediction of the clean latents.
        residual: (B,) mean square of A(D(mu)) - y.
        gap: (B,) root mean square of v - u, or NaN where a method has none.
        weight: w(t).
        steps: (B,) int64 steps on the data.
    """

    t: float
    mu: Tensor
    residual: Tensor
    gap: Tensor
    weight: float
    steps: Tensor


Watch = Callable[[Trace], None]


def _nothing(trace: Trace) -> None:
    """Nobody watches."""


def root_mean_square(values: Tensor) -> Tensor:
    """(B, ...) -> (B,)."""
    return values.flatten(1).square().mean(1).sqrt()


def soft_projection(mu: Tensor, problem: Problem, learning_rate: float) -> Tensor:
    """A step mu - lr (mu - mu_p), where mu_p has what was measured in the place of what mu says there."""
    if problem.project is None:
        raise ValueError("lr_projection needs a problem with project: give the latents of x - A+ A x + A+ y")
    with torch.no_grad():
        return mu - learning_rate * (mu - problem.project(mu))


def flair_solve(
    problem: Problem, mu: Tensor, noises: Noises, weights: Sequence[float], settings: FlairSettings, watch: Watch = _nothing
) -> Tensor:
    """The whole method: mu of the last time. Its image is D(mu).

    Args:
        problem: Measurements, prior, operator.
        mu: (B, ...) start, the latents of the pseudo-inverse of y.
        noises: Number -> N(0, 1) like ``mu``: 0 is the start noise, i the fresh noise of step i = 1..n.
        weights: w(t) at each of :func:`time_grid`.
        settings: How.
        watch: Is shown each time; what it is given is not copied.

    Returns:
        (B, ...) mean.
    """
    s, y = settings, problem.y
    x1_hat, mu = noises(0), mu.detach()
    for number, (t, weight) in enumerate(zip(time_grid(s.steps, s.ts_min).tolist(), weights, strict=True), 1):
        prior = regulariser_step(mu, x1_hat, noises(number), t, problem.velocity, weight, s.alpha, s.mode)
        gap = root_mean_square(prior.velocity - (prior.noise - mu))
        data_weight = s.likelihood_weight * (weight if s.tied else 1.0)
        if s.joint:  # both gradients at the same mu
            loss, gradient = data_gradient(mu, y, problem.predict)
            mu = mu - s.lr_reg * prior.direction - s.lr_data * data_weight * gradient
            fit = DataFit(mu, loss, _loss(problem, mu), torch.ones_like(loss, dtype=torch.int64))
        else:
            mu = mu - s.lr_reg * prior.direction
            if s.lr_projection and t > 0.7:
                mu = soft_projection(mu, problem, s.lr_projection)
            fit = fit_data(mu, y, problem.predict, data_weight, s.lr_data, s.data_steps, s.tolerance)
        mu, x1_hat = fit.mu, prior.x1_hat
        watch(Trace(t, mu, fit.after / y[0].numel(), gap, weight, fit.steps))
    return mu


@torch.no_grad()
def _loss(problem: Problem, mu: Tensor) -> Tensor:
    return data_loss(problem.predict(mu), problem.y)


def residual(problem: Problem, mu: Tensor) -> Tensor:
    """(B,) mean square of A(D(mu)) - y."""
    return _loss(problem, mu) / problem.y[0].numel()


__all__ = [
    "DataFit",
    "FlairSettings",
    "Problem",
    "Regularised",
    "Trace",
    "adjusted_noise",
    "alpha_at",
    "calibrated_weights",
    "fit_data",
    "flair_solve",
    "flow_matching_error",
    "guided_velocity",
    "largest_pull",
    "nearest_time",
    "predicted_clean",
    "predicted_noise",
    "regulariser_direction",
    "regulariser_step",
    "time_grid",
    "weight_at",
]
