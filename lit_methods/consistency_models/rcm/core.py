"""The losses of rCM (arXiv:2510.08431), its schedule and its sampler, as functions of networks of TrigFlow time.

Maths from the card of NVlabs/rcm@5b41aa9, rcm/models/t2v_model_distill_rcm.py, whose results are the golden vectors. sCM's weight w(t) and
its warm-up: arXiv:2410.11081. Score distillation: DMD2, arXiv:2405.14867. Notation: :mod:`~lit_methods.consistency_models.rcm.trigflow`.

A sample with a number that isn't finite has loss 0 and takes no part in the gradients. Where that is known before the network that is
differentiated, the sample is taken out of the network's input; masking afterwards, as in the authors' code, multiplies 0 by NaN in the
backward pass, and the weights are shared by the batch. Where the differentiated call itself overflows, its gradients can't be saved: see
:class:`~lit_methods.consistency_models.rcm.module.RCM`, which leaves such a gradient out.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lit_methods.consistency_models.levels import like
from lit_methods.consistency_models.rcm.trigflow import Predict, Wrapped, noisy, shift_time, trig_time

WarmupStyle = Literal["rcm", "scm"]
TangentMode = Literal["jvp", "semi_continuous", "discrete"]

MID_TIMES = (1.5, 1.4, 1.0)


def finite(*tensors: Tensor) -> Tensor:
    """(B,) bool: the samples in which every number of every tensor is finite."""
    return torch.stack([tensor.flatten(1).isfinite().all(1) for tensor in tensors]).all(0)


def only(good: Tensor, x: Tensor) -> Tensor:
    """0 in place of the other samples, in the values and in the gradients."""
    return torch.where(like(good, x), x, 0.0)


def placed(good: Tensor, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """Harmless inputs of a network for the other samples."""
    return only(good, x), torch.where(good, time, 0.5)


def total(x: Tensor) -> Tensor:
    """Sum over a sample: (B, ...) -> (B,)."""
    return x.flatten(1).sum(1)


# ---- consistency -----------------------------------------------------------------------------------------------------------------------


class VelocityTangent(NamedTuple):
    """The student's ``velocity`` F and cos t sin t dF/dt along a trajectory, ``tangent``; (B, ...) float64 without gradient."""

    velocity: Tensor
    tangent: Tensor


@torch.no_grad()
def velocity_tangent(
    student: Wrapped, x: Tensor, time: Tensor, drift: Tensor, mode: TangentMode = "jvp", step: float = 1e-4
) -> VelocityTangent:
    """The student's velocity, and its derivative along a trajectory of velocity ``drift``, times cos t sin t.

    The factor stands in the tangents of x and t already, so that nothing grows without bound on the way.

    Args:
        student: The student's network, a function of (x, t).
        x: (B, ...) float64.
        time: (B,) float64.
        drift: (B, ...), the teacher's velocity.
        mode: ``jvp``: exact. ``semi_continuous``: exact in x, a difference in t. ``discrete``: a difference in both.
        step: h of the differences.
    """
    factor = time.cos() * time.sin()
    wide = like(factor, x)
    if mode == "jvp":
        here, moved = student.with_tangent(x, time, wide * drift, factor)
        return VelocityTangent(here.velocity, moved.velocity)
    cos, sin = math.cos(step), math.sin(step)
    if mode == "discrete":
        velocity = student(x, time).velocity
        return VelocityTangent(velocity, wide * (cos * velocity - student(cos * x - sin * drift, time - step).velocity) / sin)
    here, moved = student.with_tangent(x, time, wide * drift, torch.zeros_like(time))
    return VelocityTangent(here.velocity, moved.velocity + wide * (cos * here.velocity - student(x, time - step).velocity) / sin)


class ScmLoss(NamedTuple):
    """The continuous-time consistency loss and what led to it; float64.

    Attributes:
        losses: (B,), 0 for samples with a number that isn't finite.
        xt: (B, ...) noisy samples.
        student: (B, ...) velocity of the student with its graph, 0 for those samples.
        teacher: (B, ...) velocity of the teacher, not masked.
        df_dt: (B, ...) -cos t (F - F_T) - (sin t x_t + tangent), not masked: for logs, its factors are mixed.
        tangent_norm: (B,) norm of g before it is normalised, 0 for those samples.
        good: (B,) bool, the other samples.
    """

    losses: Tensor
    xt: Tensor
    student: Tensor
    teacher: Tensor
    df_dt: Tensor
    tangent_norm: Tensor
    good: Tensor


def scm_loss(
    student: Wrapped,
    teacher: Predict,
    x0: Tensor,
    noise: Tensor,
    time: Tensor,
    warmup: float = 1.0,
    scale: float = 100.0,
    tangent_eps: float = 0.1,
    warmup_style: WarmupStyle = "rcm",
    tangent_mode: TangentMode = "jvp",
    log_weight: Tensor | None = None,
) -> ScmLoss:
    """Continuous-time consistency distillation with normalised tangents: scale ||F - sg(F) - g||^2, gradient -2 scale g dF.

    Args:
        student: The student's network, a function of (x_t, t); its forward and its forward-mode derivative are taken.
        teacher: The teacher's network, a function of (x_t, t), guided where it is; no gradient.
        x0: (B, ...) clean samples of standard deviation 1.
        noise: Standard normal, like ``x0``.
        time: (B,) in (0, pi/2).
        warmup: r in [0, 1].
        scale: Factor of the loss.
        tangent_eps: Added to the norm of g.
        warmup_style: ``rcm``: g = -cos t sqrt(1 - r^2 sin^2 t) (F - F_T) - (r cos t sin t x_t + tangent), as in the authors' code. ``scm``:
            g = -cos^2 t (F - F_T) - r (cos t sin t x_t + tangent), as in arXiv:2410.11081. The same at r = 1.
        tangent_mode: See :func:`velocity_tangent`.
        log_weight: (B,) w(t), finite, with its graph: sCM's scale (e^w / D ||F - sg(F) - g||^2 - w), D numbers a sample. w learns to
            equalise the loss over times. None: no weight and no D.
    """
    x0, noise, time = x0.double(), noise.double(), time.double()
    xt = noisy(x0, noise, time)
    with torch.no_grad():
        drift = teacher(xt, time).velocity
        before, tangent = velocity_tangent(student, xt, time, drift, tangent_mode)
        good = finite(xt, drift, tangent, before)
    velocity = only(good, student(*placed(good, xt, time)).velocity)
    fixed = velocity.detach()
    with torch.no_grad():
        cos, sin = like(time.cos(), xt), like(time.sin(), xt)
        gap = fixed - drift
        if warmup_style == "rcm":
            g = -cos * (1 - (warmup * sin) ** 2).sqrt() * gap - (warmup * cos * sin * xt + tangent)
        else:
            g = -(cos**2) * gap - warmup * (cos * sin * xt + tangent)
        g = only(good, g)
        norm = total(g.square()).sqrt()
        g = g / like(norm + tangent_eps, g)
        df_dt = -cos * gap - (sin * xt + tangent)
    errors = total((velocity - fixed - g).square())
    if log_weight is not None:
        errors = only(good, log_weight.double().exp() / velocity[0].numel() * errors - log_weight)
    return ScmLoss(scale * errors, xt, velocity, drift, df_dt, norm, good)


class DcmLoss(NamedTuple):
    """The discrete consistency loss: ``losses`` (B,), first ``time`` (B,), ``xt`` (B, ...) there, ``good`` (B,) bool."""

    losses: Tensor
    time: Tensor
    xt: Tensor
    good: Tensor


def dcm_loss(
    student: Predict,
    teacher: Predict,
    x0: Tensor,
    noise: Tensor,
    uniform: Tensor,
    total_steps: int = 48,
    skip: int = 1,
    shift: float = 5.0,
    scale: float = 100.0,
) -> DcmLoss:
    """Discrete consistency distillation: scale ||x0(x_t0, t0) - sg x0(x_skip, t_skip)||^2, ``skip`` Euler steps of the teacher apart.

    Args:
        student: The student's network, a function of (x_t, t).
        teacher: The teacher's network, a function of (x_t, t).
        x0: (B, ...).
        noise: Like ``x0``.
        uniform: (B,) in [0, 1).
        total_steps: Intervals of the time axis.
        skip: Intervals that a pair spans, 1 <= skip <= total_steps.
        shift: See :func:`~lit_methods.consistency_models.rcm.trigflow.shift_time`.
        scale: Factor of the loss.

    Raises:
        ValueError: Another ``skip``.
    """
    if not 1 <= skip <= total_steps:
        raise ValueError(f"skip is {skip}: give 1 to total_steps={total_steps}")
    x0, noise, uniform = x0.double(), noise.double(), uniform.double() * (1 - skip / total_steps)
    steps = torch.arange(skip + 1, dtype=torch.float64, device=x0.device)[:, None] / total_steps
    times = trig_time(shift_time(1 - (uniform + steps).clamp(max=1.0), shift))  # (skip + 1, B), descending
    start = x = noisy(x0, noise, times[0])
    with torch.no_grad():
        for now, following in pairwise(times):
            x = x - like(now - following, x) * teacher(x, now).velocity
        target = student(x, times[-1]).x0
        good = finite(start, target)
    answer = student(*placed(good, start, times[0])).x0
    losses = scale * total((only(good, answer) - only(good, target)).square())
    return DcmLoss(losses, times[0], start, good)


# ---- score distillation ----------------------------------------------------------------------------------------------------------------


class Simulation(NamedTuple):
    """Samples of the student, ``x0`` (B, ...), and the ``times`` (n - 1, B) between its steps."""

    x0: Tensor
    times: Tensor


def simulate(student: Predict, start: Tensor, noises: Tensor, draws: Tensor | None = None) -> Simulation:
    """Backward simulation: samples of the student in n steps, of which the last one has a graph.

    Args:
        student: The student's network, a function of (x_t, t).
        start: (B, ...) standard normal, taken as x at pi/2.
        noises: (n - 1, B, ...) standard normal.
        draws: (n - 1, B) times, of which the running minimum is taken; None: 1.5, 1.4, 1.0, for n <= 4.

    Raises:
        ValueError: More steps than fixed times.
    """
    if draws is None:
        if len(noises) > len(MID_TIMES):
            raise ValueError(f"{len(noises) + 1} steps have no fixed times: give draws, or at most {len(MID_TIMES) + 1} steps")
        draws = torch.tensor(MID_TIMES[: len(noises)], dtype=torch.float64, device=start.device)[:, None].expand(-1, len(start))
    times = draws.double().cummin(0).values if len(draws) else draws.double()
    x = start.double()
    time = torch.full((len(x),), math.pi / 2, dtype=torch.float64, device=x.device)
    for noise, following in zip(noises, times, strict=True):
        with torch.no_grad():
            x = noisy(student(x, time).x0, noise.double(), following)
        time = following
    good = finite(x, time[:, None])
    made = student(*placed(good, x, time)).x0
    return Simulation(torch.where(like(good, x), made, math.nan), times)  # a lost sample is no sample of the student


class DmdLoss(NamedTuple):
    """The score distillation loss; float64.

    Attributes:
        losses: (B,), 0 for samples with a number that isn't finite.
        xt: (B, ...) the student's samples with noise.
        fake: (B, ...) clean samples by the fake score.
        teacher: (B, ...) by the teacher.
        weight: (B,) mean |G - teacher|.
        good: (B,) bool.
    """

    losses: Tensor
    xt: Tensor
    fake: Tensor
    teacher: Tensor
    weight: Tensor
    good: Tensor


def dmd_loss(fake: Predict, teacher: Predict, samples: Tensor, noise: Tensor, time: Tensor, scale: float = 1.0) -> DmdLoss:
    """Score distillation: scale ||G - sg(G - (x0_fake - x0_teacher) / weight)||^2, whose gradient is that of the reverse KL.

    Args:
        fake: Score of the student's samples; no gradient.
        teacher: Score of the data, guided where it is; no gradient.
        samples: (B, ...) G, with its graph.
        noise: Standard normal, like ``samples``.
        time: (B,) in (0, pi/2).
        scale: Factor of the loss.
    """
    time = time.double()
    with torch.no_grad():
        fixed = samples.detach().double()
        xt = noisy(fixed, noise.double(), time)
        x0_fake, x0_teacher = fake(xt, time).x0, teacher(xt, time).x0
        weight = (fixed - x0_teacher).abs().flatten(1).mean(1).clamp(min=1e-5)
        grad = (x0_fake - x0_teacher) / like(weight, fixed)
        good = finite(fixed, grad)
        target = only(good, fixed - grad)
    losses = scale * total((only(good, samples.double()) - target).square())
    return DmdLoss(losses, xt, x0_fake, x0_teacher, weight, good)


class CriticLoss(NamedTuple):
    """The fake score's loss: ``losses`` (B,), noisy samples ``xt``, its ``prediction`` of the clean ones (B, ...), ``good`` (B,) bool."""

    losses: Tensor
    xt: Tensor
    prediction: Tensor
    good: Tensor


def critic_loss(fake: Predict, samples: Tensor, noise: Tensor, time: Tensor, scale: float = 1.0) -> CriticLoss:
    """Denoising of the student's samples: scale ||G - x0_fake(x_t, t)||^2 / sin^2 t, a flow-matching loss.

    Args:
        fake: The critic's network, a function of (x_t, t), with its graph.
        samples: (B, ...) G; detached.
        noise: Like ``samples``.
        time: (B,) in (0, pi/2).
        scale: Factor of the loss.
    """
    samples, noise, time = samples.detach().double(), noise.double(), time.double()
    xt = noisy(samples, noise, time)
    good = finite(xt)
    safe, when = placed(good, xt, time)
    prediction = fake(safe, when).x0
    losses = scale * total((only(good, samples) - only(good, prediction)).square()) / when.sin() ** 2
    return CriticLoss(losses, xt, prediction, good)


# ---- schedule and sampling -------------------------------------------------------------------------------------------------------------


class Phase(NamedTuple):
    """What an iteration does.

    Attributes:
        is_student: The student is trained, else the fake score.
        effective: Student iterations before this one; in the critic's phase, and this one's number there.
        effective_critic: Critic iterations before this one.
        simulation_steps: n of the phase in force.
        warmup_ratio: r.
    """

    is_student: bool
    effective: int
    effective_critic: int
    simulation_steps: int
    warmup_ratio: float


def phase_at(iteration: int, tangent_warmup: int = 1000, student_every: int = 5, max_steps: int = 4, dmd: bool = True) -> Phase:
    """The phase of an iteration, counted from 0.

    Args:
        iteration: >= 0.
        tangent_warmup: H: iterations of the student alone, over which r rises to 1.
        student_every: f: after these, one iteration in f is the student's.
        max_steps: Backward simulations take 1 to this many steps, in turn.
        dmd: Without score distillation every iteration is the student's.
    """
    after = iteration - tangent_warmup
    alone = not dmd or after < 0
    is_student = alone or after % student_every == 0
    effective = iteration if alone else tangent_warmup + after // student_every
    critic = iteration - effective - 1
    ratio = min(1.0, iteration / tangent_warmup) if tangent_warmup else 1.0
    return Phase(is_student, effective, critic, (effective if is_student else critic) % max_steps + 1, ratio)


@torch.no_grad()
def sample(
    student: Predict, start: Tensor, noises: Sequence[Tensor] | Tensor, mid_times: Sequence[float] = (), sigma_max: float = 80.0
) -> Tensor:
    """Samples in ``len(mid_times) + 1`` steps, from arctan(sigma_max) over ``mid_times`` to 0.

    Args:
        student: The student's network, a function of (x_t, t).
        start: (B, ...) standard normal.
        noises: Standard normal, like ``start``, at least one for each of ``mid_times``.
        mid_times: Descending, in (0, arctan(sigma_max)).
        sigma_max: Where sampling starts; larger: sharper and less diverse.

    Returns:
        (B, ...) float64.
    """
    times = [math.atan(sigma_max), *(float(time) for time in mid_times)]
    x = start.double()
    for index, time in enumerate(times):
        x = student(x, torch.full((len(x),), time, dtype=torch.float64, device=x.device)).x0
        if index + 1 < len(times):
            x = math.cos(times[index + 1]) * x + math.sin(times[index + 1]) * noises[index].double()
    return x


__all__ = ["critic_loss", "dcm_loss", "dmd_loss", "phase_at", "sample", "scm_loss", "simulate", "velocity_tangent"]
