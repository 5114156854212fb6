"""rCM: a diffusion model distilled into one of 1 to 4 steps, by continuous-time consistency with score regularisation (arXiv:2510.08431).

Maths from the card of NVlabs/rcm@5b41aa9: rcm/models/t2v_model_distill_rcm.py, rcm/utils/denoiser_scaling.py, rcm/utils/timestep_utils.py,
whose results are the golden vectors. sCM (arXiv:2410.11081), score distillation alone (DMD2, arXiv:2405.14867, without its GAN loss)
and discrete consistency distillation are settings of the same module. Attention with its derivative:
:mod:`~lit_methods.consistency_models.attention_jvp`. Left out: sCM's learned weight, sharded weights, context parallelism, GAN losses.

Notation: x_t = cos t x0 + sin t z with t in [0, pi/2] (TrigFlow), F = dx_t/dt, so x0 = cos t x_t - sin t F. All of it is float64; networks
are called in the dtype of the data.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lit_methods import distributed
from lit_methods.callbacks.ema import ema_update
from lit_methods.callbacks.weight_ema import power_decay, power_exponent
from lit_methods.consistency_models.evaluation import sliced_wasserstein
from lit_methods.consistency_models.levels import like
from lit_methods.frozen import Frozen
from lit_methods.panels import Curve, ImageMedia, ImagePanel, Media, Panel

Wrapper = Literal["rectified_flow", "trigflow"]
Consistency = Literal["scm", "dcm", "none"]
WarmupStyle = Literal["rcm", "scm"]
TangentMode = Literal["jvp", "semi_continuous", "discrete"]
Profile = Literal["power", "constant"]

MID_TIMES = (1.5, 1.4, 1.0)

# ---- networks as functions of TrigFlow time --------------------------------------------------------------------------------------------


class Prediction(NamedTuple):
    """What a network says of x_t: the clean sample and the velocity dx_t/dt, (B, ...) float64 each."""

    x0: Tensor
    velocity: Tensor


Predict = Callable[[Tensor, Tensor], Prediction]


class FlowScalings(NamedTuple):
    """x0 = skip x_t + out v(inp x_t, noise) for a rectified-flow network v, each like the time."""

    skip: Tensor
    out: Tensor
    inp: Tensor
    noise: Tensor


def flow_scalings(time: Tensor, time_scale: float = 1000.0) -> FlowScalings:
    """Scalings that turn a rectified-flow network into one of TrigFlow time.

    Args:
        time: Any shape, in [0, pi/2].
        time_scale: Of the rectified-flow time that the network is told.
    """
    total = time.cos() + time.sin()
    return FlowScalings(1 / total, -time.sin() / total, 1 / total, time_scale * time.sin() / total)


def flow_time(time: Tensor) -> Tensor:
    """Rectified-flow time u = sin t / (sin t + cos t) of TrigFlow time."""
    return time.sin() / (time.sin() + time.cos())


def trig_time(flow: Tensor) -> Tensor:
    """TrigFlow time arctan(u / (1 - u)) of rectified-flow time u in [0, 1]."""
    return torch.atan2(flow, 1 - flow)


def shift_time(flow: Tensor, shift: float = 5.0) -> Tensor:
    """Shift u / (1 + (shift - 1) u): rectified-flow time with more mass at large noise; u in [0, 1]."""
    return shift * flow / (1 + (shift - 1) * flow)


def rectified_flow(network: Callable[..., Tensor], dtype: torch.dtype, *condition: Tensor, time_scale: float = 1000.0) -> Predict:
    """A velocity network v(x, 1000 u, condition), as a function of (x_t, t).

    Args:
        network: (B, ...), (B,) and conditions -> (B, ...).
        dtype: That the network is called in; the time is float32 at least.
        condition: Passed on.
        time_scale: Of the time that it is told.
    """

    def predict(x: Tensor, time: Tensor) -> Prediction:
        x, time = x.double(), time.double()
        skip, out, inp, noise = flow_scalings(time, time_scale)
        v = network((like(inp, x) * x).to(dtype), noise.to(_wide(dtype)), *condition).double()
        x0 = like(skip, x) * x + like(out, x) * v
        return Prediction(x0, (like(time.cos(), x) * x - x0) / like(time.sin(), x))

    return predict


def trigflow(network: Callable[..., Tensor], dtype: torch.dtype, *condition: Tensor) -> Predict:
    """A network that is F(x_t, t, condition) itself (sCM with sigma_data 1); arguments as for :func:`rectified_flow`."""

    def predict(x: Tensor, time: Tensor) -> Prediction:
        x, time = x.double(), time.double()
        velocity = network(x.to(dtype), time.to(_wide(dtype)), *condition).double()
        return Prediction(like(time.cos(), x) * x - like(time.sin(), x) * velocity, velocity)

    return predict


def guided(conditional: Predict, unconditional: Predict, guidance: float) -> Predict:
    """Classifier-free guidance: unconditional + guidance (conditional - unconditional), of x0 as of the velocity; 1 or less: none."""
    if guidance <= 1:
        return conditional

    def predict(x: Tensor, time: Tensor) -> Prediction:
        pairs = zip(unconditional(x, time), conditional(x, time), strict=True)
        return Prediction(*(without + guidance * (with_ - without) for without, with_ in pairs))

    return predict


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _noisy(x0: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    return like(time.cos(), x0) * x0 + like(time.sin(), x0) * noise


def _finite(*tensors: Tensor) -> Tensor:
    """(B,) bool: the samples in which every number of every tensor is finite."""
    return torch.stack([tensor.flatten(1).isfinite().all(1) for tensor in tensors]).all(0)


def _only(good: Tensor, x: Tensor) -> Tensor:
    """0 in place of the other samples, in the values and in the gradients."""
    return torch.where(like(good, x), x, 0.0)


def _placed(good: Tensor, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """Harmless inputs for the other samples: a NaN that has been in a network is in all its gradients, masked afterwards or not."""
    return _only(good, x), torch.where(good, time, 0.5)


def _sum(x: Tensor) -> Tensor:
    return x.flatten(1).sum(1)


# ---- losses ----------------------------------------------------------------------------------------------------------------------------


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


def velocity_tangent(student: Predict, x: Tensor, time: Tensor, drift: Tensor, mode: TangentMode = "jvp", step: float = 1e-4) -> Tensor:
    """Cos t sin t dF/dt along a trajectory of velocity ``drift``, without gradient.

    The factor stands in the tangents of x and t already, so that nothing grows without bound on the way.

    Args:
        student: Of (x, t).
        x: (B, ...) float64.
        time: (B,) float64.
        drift: (B, ...), the teacher's velocity.
        mode: ``jvp``: exact. ``semi_continuous``: exact in x, a difference in t. ``discrete``: a difference in both.
        step: h of the differences.
    """
    factor = time.cos() * time.sin()
    wide = like(factor, x)

    def velocity(x: Tensor, time: Tensor) -> Tensor:
        return student(x, time).velocity

    with torch.no_grad():
        if mode == "jvp":
            exact: Tensor = torch.func.jvp(velocity, (x, time), (wide * drift, factor))[1]
            return exact
        here = velocity(x, time)
        cos, sin = math.cos(step), math.sin(step)
        if mode == "discrete":
            return wide * (cos * here - velocity(cos * x - sin * drift, time - step)) / sin
        spatial: Tensor = torch.func.jvp(lambda x: velocity(x, time), (x,), (wide * drift,))[1]
        return spatial + wide * (cos * here - velocity(x, time - step)) / sin


def scm_loss(
    student: Predict,
    teacher: Predict,
    x0: Tensor,
    noise: Tensor,
    time: Tensor,
    warmup: float = 1.0,
    scale: float = 100.0,
    tangent_eps: float = 0.1,
    warmup_style: WarmupStyle = "rcm",
    tangent_mode: TangentMode = "jvp",
) -> ScmLoss:
    """Continuous-time consistency distillation with normalised tangents: scale ||F - sg(F) - g||^2, gradient -2 scale g dF.

    Samples with a number that isn't finite have loss and gradient 0: they are taken out before the network that is differentiated, so that
    the gradients of its weights stay finite (the authors' code masks after it, where 0 times NaN is NaN).

    Args:
        student: Of (x_t, t); its forward and its forward-mode derivative are taken.
        teacher: Of (x_t, t), guided where it is; no gradient.
        x0: (B, ...) clean samples of standard deviation 1.
        noise: Standard normal, like ``x0``.
        time: (B,) in (0, pi/2).
        warmup: r in [0, 1].
        scale: Of the loss.
        tangent_eps: Added to the norm of g.
        warmup_style: ``rcm``: g = -cos t sqrt(1 - r^2 sin^2 t) (F - F_T) - (r cos t sin t x_t + tangent), as in the authors' code. ``scm``:
            g = -cos^2 t (F - F_T) - r (cos t sin t x_t + tangent), as in arXiv:2410.11081. The same at r = 1.
        tangent_mode: See :func:`velocity_tangent`.
    """
    x0, noise, time = x0.double(), noise.double(), time.double()
    xt = _noisy(x0, noise, time)
    with torch.no_grad():
        drift = teacher(xt, time).velocity
        tangent = velocity_tangent(student, xt, time, drift, tangent_mode)
        good = _finite(xt, drift, tangent)
    velocity = _only(good, student(*_placed(good, xt, time)).velocity)
    fixed = velocity.detach()
    with torch.no_grad():
        cos, sin = like(time.cos(), xt), like(time.sin(), xt)
        gap = fixed - drift
        if warmup_style == "rcm":
            g = -cos * (1 - (warmup * sin) ** 2).sqrt() * gap - (warmup * cos * sin * xt + tangent)
        else:
            g = -(cos**2) * gap - warmup * (cos * sin * xt + tangent)
        g = _only(good, g)
        norm = _sum(g.square()).sqrt()
        g = g / like(norm + tangent_eps, g)
        df_dt = -cos * gap - (sin * xt + tangent)
    losses = scale * _sum((velocity - fixed - g).square())
    return ScmLoss(losses, xt, velocity, drift, df_dt, norm, good)


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
        student: Of (x_t, t).
        teacher: Of (x_t, t).
        x0: (B, ...).
        noise: Like ``x0``.
        uniform: (B,) in [0, 1).
        total_steps: Intervals of the time axis.
        skip: Intervals that a pair spans, 1 <= skip <= total_steps.
        shift: See :func:`shift_time`.
        scale: Of the loss.

    Raises:
        ValueError: Another ``skip``.
    """
    if not 1 <= skip <= total_steps:
        raise ValueError(f"skip is {skip}: give 1 to total_steps={total_steps}")
    x0, noise, uniform = x0.double(), noise.double(), uniform.double() * (1 - skip / total_steps)
    steps = torch.arange(skip + 1, dtype=torch.float64, device=x0.device)[:, None] / total_steps
    times = trig_time(shift_time(1 - (uniform + steps).clamp(max=1.0), shift))  # (skip + 1, B), descending
    start = x = _noisy(x0, noise, times[0])
    with torch.no_grad():
        for now, following in pairwise(times):
            x = x - like(now - following, x) * teacher(x, now).velocity
        target = student(x, times[-1]).x0
        good = _finite(start, target)
    found = student(*_placed(good, start, times[0])).x0
    losses = scale * _sum((_only(good, found) - _only(good, target)).square())
    return DcmLoss(losses, times[0], start, good)


class Simulation(NamedTuple):
    """Samples of the student, ``x0`` (B, ...), and the ``times`` (n - 1, B) between its steps."""

    x0: Tensor
    times: Tensor


def simulate(student: Predict, start: Tensor, noises: Tensor, draws: Tensor | None = None) -> Simulation:
    """Backward simulation: samples of the student in n steps, of which the last one has a graph.

    Args:
        student: Of (x_t, t).
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
            x = _noisy(student(x, time).x0, noise.double(), following)
        time = following
    return Simulation(student(*_placed(_finite(x, time[:, None]), x, time)).x0, times)


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
        scale: Of the loss.
    """
    time = time.double()
    with torch.no_grad():
        fixed = samples.detach().double()
        xt = _noisy(fixed, noise.double(), time)
        x0_fake, x0_teacher = fake(xt, time).x0, teacher(xt, time).x0
        weight = (fixed - x0_teacher).abs().flatten(1).mean(1).clamp(min=1e-5)
        grad = (x0_fake - x0_teacher) / like(weight, fixed)
        good = _finite(fixed, grad)
        target = _only(good, fixed - grad)
    losses = scale * _sum((_only(good, samples.double()) - target).square())
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
        fake: Of (x_t, t), with its graph.
        samples: (B, ...) G; detached.
        noise: Like ``samples``.
        time: (B,) in (0, pi/2).
        scale: Of the loss.
    """
    samples, noise, time = samples.detach().double(), noise.double(), time.double()
    xt = _noisy(samples, noise, time)
    good = _finite(xt)
    safe, when = _placed(good, xt, time)
    prediction = fake(safe, when).x0
    losses = scale * _sum((_only(good, samples) - _only(good, prediction)).square()) / when.sin() ** 2
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
        student: Of (x_t, t).
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


# ---- a teacher that is known in closed form --------------------------------------------------------------------------------------------


class RingTeacher(nn.Module):
    """The exact velocity F(x_t, t) of equal Gaussians on a circle, for trials: a teacher without weights. Use ``wrapper: trigflow``.

    Args:
        modes: Number of Gaussians.
        radius: Of the circle.
        noise: Standard deviation of each Gaussian in each coordinate, > 0.
    """

    def __init__(self, modes: int = 8, radius: float = 1.35, noise: float = 0.05) -> None:
        super().__init__()
        if modes < 1 or noise <= 0:
            raise ValueError(f"modes={modes}, noise={noise}: give at least one mode, and noise above 0")
        angles = torch.arange(modes, dtype=torch.float64) * (2 * math.pi / modes)
        self.register_buffer("centres", radius * torch.stack([angles.cos(), angles.sin()], dim=1))
        self.noise = noise

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(B, 2) and (B,) in [0, pi/2] -> (B, 2)."""
        centres = self.get_buffer("centres").double()
        cos, sin = time.double().cos()[:, None, None], time.double().sin()[:, None, None]
        away = x.double()[:, None] - cos * centres  # (B, modes, 2)
        variance = (cos * self.noise) ** 2 + sin**2
        share = (-away.square().sum(-1, keepdim=True) / (2 * variance)).softmax(1)
        x0, z = centres + cos * self.noise**2 / variance * away, sin / variance * away
        return (share * (cos * z - sin * x0)).sum(1).to(x.dtype)

    def evaluate(self, samples: Tensor) -> dict[str, Tensor]:
        """Share of samples (N, 2) within 3 standard deviations of a mode, ``quality``, and the number of ``modes`` with more than 2 %."""
        distance, mode = torch.cdist(samples.double(), self.get_buffer("centres").double()).min(1)
        shares = (mode[:, None] == torch.arange(len(self.get_buffer("centres")), device=mode.device)).double().mean(0)
        return {"quality": (distance < 3 * self.noise).double().mean(), "modes": (shares > 0.02).sum().double()}


# ---- the module ------------------------------------------------------------------------------------------------------------------------


class RCM(LightningModule):
    """Distils a diffusion or flow model into a student that draws a sample in 1 to 4 steps.

    Iterations (``accumulate`` batches each) are counted by the module, and the count is saved. At first ``pretrain_iterations`` fit the
    student to the teacher's velocity, for a student that doesn't start as a copy. Then, by :func:`phase_at`, an iteration trains the
    student, with the consistency loss and, after the warm-up, the score distillation loss, two backward passes and one optimiser step; or
    it trains the critic, a copy of the student that learns the score of the student's samples. The average of the student's weights and
    the learning rates advance in their own phase. Samples and validation use the average.

    Baselines: sCM is ``dmd_weight: 0``; discrete consistency distillation is ``consistency: dcm`` with ``dmd_weight: 0``; score
    distillation alone is ``consistency: none`` with ``tangent_warmup: 0``.

    Batches: ``image`` (B, ...) floating point of standard deviation 1, and what ``condition`` names. Networks train in eval mode, without
    dropout and with fixed running statistics, which have no place in a derivative. Random numbers follow from the seed of the run,
    iteration and rank alone. Optimisation is manual: use ``accumulate`` here, not in the trainer, which counts the steps of all
    optimisers as ``global_step``. Under DDP gradients are averaged once an iteration. Not with strategies that shard weights. Checkpoints
    hold student, critic, average, optimisers and the count; the teacher is made anew.

    Logged: ``rcm/consistency_loss``, ``rcm/tangent_norm`` (mean ln of the norm of g before it is normalised, which tells more than the
    loss), ``rcm/df_dt``, ``rcm/bad_samples`` (with numbers that aren't finite), ``rcm/dmd_loss``, ``rcm/dmd_weight`` (mean |G -
    x0_teacher|), ``rcm/critic_loss``, ``rcm/pretrain_loss``, ``rcm/student_phase``, ``rcm/simulation_steps``, ``rcm/warmup_ratio``,
    ``rcm/ema_decay``; ``rcm/val_sw2`` and ``rcm/val_sw2_<n>_steps``, the sliced Wasserstein distance of as many samples as validation
    data to these; and what the teacher's ``evaluate(samples) -> dict`` says, if it has one, as ``rcm/val_<name>``.

    Args:
        teacher: v(x, 1000 u) or F(x, t), see ``wrapper``: (B, ...), (B,) and a condition, if any -> (B, ...). Frozen.
        student: Of the same signature; None: a copy of the teacher.
        wrapper: ``rectified_flow``: networks are velocities of rectified flow; ``trigflow``: they are F(x_t, t).
        consistency: ``scm`` (rCM and sCM), ``dcm`` or ``none``.
        consistency_weight: Factor of that loss.
        dmd_weight: Factor of score distillation; 0: none, and no critic.
        guidance: Of the teacher; 1 or less: none.
        condition: Key of the condition in the batch, such as ``label``; None: there is none.
        null_condition: What the unconditional teacher is told, where the batch has no ``null_<condition>``: a number that fills the
            condition.
        time_mean: Of ln tan t of the consistency loss: 0.7 (Wan 1.3B), 1.5 (14B).
        time_std: Of ln tan t.
        time_shift: Of the times of score distillation and critic, see :func:`shift_time`.
        tangent_warmup: H, iterations in which r rises to 1, without score distillation: 1000 (1.3B), 0 (14B).
        student_every: One iteration in so many is the student's afterwards: 5 (1.3B), 10 (14B).
        max_simulation_steps: Samples of the student take 1 to this many steps, in turn.
        fixed_times: Simulate with the times 1.5, 1.4, 1.0 instead of random ones.
        tangent_eps: Added to the norm of g.
        warmup_style: See :func:`scm_loss`.
        tangent_mode: See :func:`velocity_tangent`; ``jvp`` is exact.
        dcm_steps: Intervals of the time axis, for ``dcm``.
        dcm_skip: Intervals between the two points of a pair.
        pretrain_iterations: Of regression to the teacher, before iteration 0.
        pretrain_learning_rate: Of Adam there.
        learning_rate: Of AdamW of the student.
        critic_learning_rate: Of AdamW of the critic.
        betas: Of both.
        weight_decay: Of both.
        lr_warmup: Iterations of its phase over which each learning rate rises to its value.
        ema_profile: ``power``, see :func:`lit_methods.callbacks.weight_ema.power_decay`, or ``constant``.
        ema_width: Of ``power``.
        ema_shift: Of ``power``: iterations that are taken as done before.
        ema_decay: Of ``constant``.
        accumulate: Batches per iteration.
        reduction: ``mean`` over the batch, or ``sum``, as the authors, whose batch is 1.
        sigma_max: Where sampling starts: 80; 1600 is sharper and less diverse.
        mid_times: Of the steps after the first.
        sample_steps: Numbers of steps that validation and predictions use.
        grid: Samples of a picture; 0: none.

    Raises:
        ValueError: An argument outside its range, or two that contradict each other.
    """

    panels: ClassVar[tuple[Panel, ...]] = (
        Curve(
            "Tangent",
            ("rcm/tangent_norm", "rcm/df_dt"),
            note="Mean ln of the norm before normalisation: falls as the student becomes consistent.",
        ),
        Curve("Losses", ("rcm/consistency_loss", "rcm/dmd_loss", "rcm/critic_loss", "rcm/pretrain_loss")),
        Curve("Phases", ("rcm/student_phase", "rcm/warmup_ratio", "rcm/ema_decay", "rcm/simulation_steps")),
        Curve("Bad samples", ("rcm/bad_samples",), note="Samples of a batch that were left out: a number wasn't finite.", goal="min"),
        Curve("Distance of samples to data", ("rcm/val_sw2*",), note="Sliced Wasserstein; lower is better.", goal="min"),
        Curve("Quality", ("rcm/val_quality*",), note="Share of samples near a mode, where the teacher knows its modes.", goal="max"),
        Curve("Modes", ("rcm/val_modes*",), note="How many modes have samples.", goal="max"),
        ImagePanel("Samples", "rcm/samples", note="From the averaged weights, a row or a panel for each number of steps."),
    )

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module | None = None,
        wrapper: Wrapper = "rectified_flow",
        consistency: Consistency = "scm",
        consistency_weight: float = 100.0,
        dmd_weight: float = 1.0,
        guidance: float = 1.0,
        condition: str | None = None,
        null_condition: float = 0,
        time_mean: float = 0.7,
        time_std: float = 1.6,
        time_shift: float = 5.0,
        tangent_warmup: int = 1000,
        student_every: int = 5,
        max_simulation_steps: int = 4,
        fixed_times: bool = False,
        tangent_eps: float = 0.1,
        warmup_style: WarmupStyle = "rcm",
        tangent_mode: TangentMode = "jvp",
        dcm_steps: int = 48,
        dcm_skip: int = 1,
        pretrain_iterations: int = 0,
        pretrain_learning_rate: float = 1e-3,
        learning_rate: float = 2e-6,
        critic_learning_rate: float = 4e-7,
        betas: tuple[float, float] = (0.0, 0.999),
        weight_decay: float = 0.01,
        lr_warmup: int = 0,
        ema_profile: Profile = "power",
        ema_width: float = 0.1,
        ema_shift: int = 0,
        ema_decay: float = 0.99,
        accumulate: int = 1,
        reduction: Literal["mean", "sum"] = "mean",
        sigma_max: float = 80.0,
        mid_times: Sequence[float] = MID_TIMES,
        sample_steps: Sequence[int] = (1, 2, 4),
        grid: int = 16,
    ) -> None:
        super().__init__()
        choices: tuple[tuple[str, str, Any], ...] = (
            ("wrapper", wrapper, Wrapper),
            ("consistency", consistency, Consistency),
            ("warmup_style", warmup_style, WarmupStyle),
            ("tangent_mode", tangent_mode, TangentMode),
            ("ema_profile", ema_profile, Profile),
            ("reduction", reduction, Literal["mean", "sum"]),
        )
        for name, value, known in choices:
            if value not in get_args(known):
                raise ValueError(f"{name} is {value!r}: give one of {', '.join(get_args(known))}")
        at_least_one = {"student_every": student_every, "max_simulation_steps": max_simulation_steps, "accumulate": accumulate}
        for name, count in at_least_one.items():
            if count < 1:
                raise ValueError(f"{name} is {count}: give 1 or more")
        not_negative = {"tangent_warmup": tangent_warmup, "pretrain_iterations": pretrain_iterations, "lr_warmup": lr_warmup}
        for name, size in {
            **not_negative,
            "ema_shift": ema_shift,
            "dmd_weight": dmd_weight,
            "consistency_weight": consistency_weight,
        }.items():
            if size < 0:
                raise ValueError(f"{name} is {size}: give 0 or more")
        if not 1 <= dcm_skip <= dcm_steps:
            raise ValueError(f"dcm_skip is {dcm_skip}: give 1 to dcm_steps={dcm_steps}")
        if not 0 <= ema_decay <= 1:
            raise ValueError(f"ema_decay is {ema_decay}: give a number from 0 to 1")
        if consistency == "none" and (dmd_weight == 0 or tangent_warmup > 0):
            raise ValueError("consistency: none leaves score distillation alone: give a dmd_weight above 0 and tangent_warmup: 0")
        if fixed_times and max_simulation_steps > len(MID_TIMES) + 1:
            raise ValueError(f"there are fixed_times for {len(MID_TIMES) + 1} steps, not for max_simulation_steps={max_simulation_steps}")
        if guidance > 1 and condition is None:
            raise ValueError(f"guidance is {guidance}, but there is no condition: name its key in the batch, or give guidance: 1")
        top = math.atan(sigma_max)
        if list(mid_times) != sorted(mid_times, reverse=True) or any(not 0 < time < top for time in mid_times):
            raise ValueError(f"mid_times are {list(mid_times)}: give descending times between 0 and arctan(sigma_max) = {top:.4f}")
        if not sample_steps or any(not 1 <= steps <= len(mid_times) + 1 for steps in sample_steps):
            raise ValueError(f"sample_steps are {list(sample_steps)}: give numbers from 1 to {len(mid_times) + 1}, one more than mid_times")
        if student is None:
            student = copy.deepcopy(teacher)
        if not any(True for _ in student.parameters()):
            raise ValueError(f"the student, a {type(student).__name__}, has no weights: give a student, for a teacher without weights")
        self.save_hyperparameters(ignore=["teacher", "student"])
        self.automatic_optimization = False
        self.teacher = Frozen(teacher)
        self.student = student.requires_grad_(True)
        self.critic = copy.deepcopy(student) if dmd_weight > 0 else None
        self.average = copy.deepcopy(student).requires_grad_(False)
        self.sample_steps = tuple(sample_steps)
        self._exponent = power_exponent(ema_width) if ema_profile == "power" else 0.0
        self._done = 0  # iterations, those of pretraining too
        self._batches = 0  # of the iteration under way
        self._seed: int | None = None
        self._samples: dict[int, Tensor] = {}
        self._seen: list[tuple[Tensor, dict[int, Tensor]]] = []

    # ---- networks ------------------------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, time: Tensor, *condition: Tensor) -> Prediction:
        """x0 and velocity that the averaged student predicts: (B, ...), (B,) TrigFlow times -> (B, ...) float64 twice."""
        return self._predict(self.average, x.dtype, condition)(x, time)

    def _predict(self, network: nn.Module, dtype: torch.dtype, condition: tuple[Tensor, ...]) -> Predict:
        wrap = rectified_flow if self.hparams["wrapper"] == "rectified_flow" else trigflow
        return wrap(network, dtype, *condition)

    def _teach(self, batch: dict[str, Tensor], dtype: torch.dtype, condition: tuple[Tensor, ...]) -> Predict:
        hp = self.hparams
        conditional = self._predict(self.teacher, dtype, condition)
        if hp["guidance"] <= 1:
            return conditional
        null = batch.get(f"null_{hp['condition']}", torch.full_like(condition[0], hp["null_condition"]))
        return guided(conditional, self._predict(self.teacher, dtype, (null,)), hp["guidance"])

    def _condition(self, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        name = self.hparams["condition"]
        return () if name is None else (batch[name],)

    def on_train_epoch_start(self) -> None:
        """Dropout and running statistics have no place in a derivative."""
        for network in (self.student, self.critic, self.average):
            if network is not None:
                network.eval()

    # ---- random numbers ------------------------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Take over the seed of the run; refuse what can't work."""
        strategy = type(self.trainer.strategy).__name__
        if any(word in strategy for word in ("FSDP", "DeepSpeed", "ModelParallel")):
            raise ValueError(f"RCM differentiates whole networks forwards, but {strategy} shards them: use strategy='ddp'")
        if self._seed is None:
            self._seed = torch.initial_seed() % 2**63

    def generator(self) -> torch.Generator:
        """Random numbers of this batch: other ones on each rank, the same after a resume."""
        import numpy as np

        assert self._seed is not None
        words = np.random.SeedSequence([self._seed, self._done, self._batches, self.global_rank]).generate_state(2)
        return torch.Generator(self.device).manual_seed(int(words[0]) << 31 ^ int(words[1]))

    def normal(self, shape: Sequence[int], like: Tensor, generator: torch.Generator) -> Tensor:
        """Standard normal numbers of ``shape``, of the dtype and on the device of ``like``."""
        return torch.randn(*shape, generator=generator, dtype=like.dtype, device=like.device)

    def uniform(self, shape: Sequence[int], like: Tensor, generator: torch.Generator) -> Tensor:
        """Uniform float64 numbers in [0, 1) on the device of ``like``."""
        return torch.rand(*shape, generator=generator, dtype=torch.float64, device=like.device)

    def _consistency_times(self, x: Tensor, generator: torch.Generator) -> Tensor:
        hp = self.hparams
        return (hp["time_mean"] + hp["time_std"] * self.normal((len(x),), x.double(), generator)).exp().atan()

    def _score_times(self, shape: Sequence[int], x: Tensor, generator: torch.Generator) -> Tensor:
        # a time of 0 has no score
        return trig_time(shift_time(self.uniform(shape, x, generator), self.hparams["time_shift"])).clamp(min=1e-6)

    # ---- training ------------------------------------------------------------------------------------------------------------------------

    @property
    def iteration(self) -> int:
        """Iterations done; negative while the student is pretrained."""
        return self._done - int(self.hparams["pretrain_iterations"])

    def phase(self) -> Phase:
        """Of the iteration under way, 0 while the student is pretrained."""
        hp = self.hparams
        settings = (hp["tangent_warmup"], hp["student_every"], hp["max_simulation_steps"])
        return phase_at(max(0, self.iteration), *settings, dmd=self.critic is not None)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """One batch; at the last one of an iteration an optimiser steps."""
        phase, x, generator = self.phase(), batch["image"], self.generator()
        device = self.device.type
        # the cached casts of weights that a call without gradient leaves behind would cut the graph of the next call
        casts = torch.autocast(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device), cache_enabled=False)
        with casts, self._unsynchronised():
            if self.iteration < 0:
                name = "pretrain"
                self._backward(self._pretrain_losses(batch, x, generator))
            elif phase.is_student:
                name = "student"
                for losses in self._student_losses(batch, x, generator, phase):
                    self._backward(losses)
            else:
                name = "critic"
                self._backward(self._critic_losses(batch, x, generator, phase))
        self._batches += 1
        if self._batches == self.hparams["accumulate"]:
            self._step(name, phase)

    def _pretrain_losses(self, batch: dict[str, Tensor], x: Tensor, generator: torch.Generator) -> Tensor:
        time = self._consistency_times(x, generator)
        xt = _noisy(x.double(), self.normal(x.shape, x, generator).double(), time)
        condition = self._condition(batch)
        target = self._predict(self.teacher, x.dtype, condition)(xt, time).velocity
        losses = (self._predict(self.student, x.dtype, condition)(xt, time).velocity - target).square().flatten(1).mean(1)
        self.log("rcm/pretrain_loss", losses.detach().mean())
        return losses

    def _student_losses(self, batch: dict[str, Tensor], x: Tensor, generator: torch.Generator, phase: Phase) -> Iterator[Tensor]:
        hp, condition = self.hparams, self._condition(batch)
        student, teacher = self._predict(self.student, x.dtype, condition), self._teach(batch, x.dtype, condition)
        self.log_dict({"rcm/student_phase": 1.0, "rcm/warmup_ratio": phase.warmup_ratio})
        if hp["consistency"] == "scm":
            noise, time = self.normal(x.shape, x, generator), self._consistency_times(x, generator)
            styles = (hp["warmup_style"], hp["tangent_mode"])
            found = scm_loss(student, teacher, x, noise, time, phase.warmup_ratio, hp["consistency_weight"], hp["tangent_eps"], *styles)
            logs = {
                "rcm/consistency_loss": found.losses.detach().mean(),
                "rcm/tangent_norm": found.tangent_norm.clamp(min=1e-12).log().mean(),
                "rcm/df_dt": _sum(found.df_dt.square()).sqrt().mean(),
                "rcm/bad_samples": (~found.good).sum().double(),
            }
            self.log_dict(logs)
            yield found.losses
        elif hp["consistency"] == "dcm":
            noise, uniform = self.normal(x.shape, x, generator), self.uniform((len(x),), x, generator)
            settings = (hp["dcm_steps"], hp["dcm_skip"], hp["time_shift"], hp["consistency_weight"])
            pair = dcm_loss(student, teacher, x, noise, uniform, *settings)
            self.log_dict({"rcm/consistency_loss": pair.losses.detach().mean(), "rcm/bad_samples": (~pair.good).sum().double()})
            yield pair.losses
        if self.critic is not None and self.iteration >= hp["tangent_warmup"]:
            made = self._simulate(student, x, generator, phase.simulation_steps)
            noise, time = self.normal(x.shape, x, generator), self._score_times((len(x),), x, generator)
            scored = dmd_loss(self._predict(self.critic, x.dtype, condition), teacher, made.x0, noise, time, hp["dmd_weight"])
            self.log_dict({"rcm/dmd_loss": scored.losses.detach().mean(), "rcm/dmd_weight": scored.weight.mean()})
            self.log("rcm/simulation_steps", float(phase.simulation_steps))
            yield scored.losses

    def _critic_losses(self, batch: dict[str, Tensor], x: Tensor, generator: torch.Generator, phase: Phase) -> Tensor:
        assert self.critic is not None
        condition = self._condition(batch)
        with torch.no_grad():
            made = self._simulate(self._predict(self.student, x.dtype, condition), x, generator, phase.simulation_steps)
        noise, time = self.normal(x.shape, x, generator), self._score_times((len(x),), x, generator)
        losses = critic_loss(self._predict(self.critic, x.dtype, condition), made.x0, noise, time).losses
        self.log("rcm/critic_loss", losses.detach().mean())
        self.log_dict({"rcm/student_phase": 0.0, "rcm/simulation_steps": float(phase.simulation_steps)})
        return losses

    def _simulate(self, student: Predict, x: Tensor, generator: torch.Generator, steps: int) -> Simulation:
        start, noises = self.normal(x.shape, x, generator), self.normal((steps - 1, *x.shape), x, generator)
        draws = None if self.hparams["fixed_times"] else self._score_times((steps - 1, len(x)), x, generator)
        return simulate(student, start, noises, draws)

    # ---- optimisation --------------------------------------------------------------------------------------------------------------------

    def _unsynchronised(self) -> AbstractContextManager[None]:
        """DDP expects a gradient of every weight in every backward pass; here they are averaged by hand, once an iteration."""
        wrapped = self.trainer.strategy.model
        return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) else nullcontext()

    def _backward(self, losses: Tensor) -> None:
        loss = losses.mean() if self.hparams["reduction"] == "mean" else losses.sum()
        self.manual_backward(loss / self.hparams["accumulate"])

    def _step(self, name: str, phase: Phase) -> None:
        index = self._roles().index(name)
        optimizers, schedulers = self.optimizers(), self.lr_schedulers()
        optimizer = optimizers[index] if isinstance(optimizers, list) else optimizers
        scheduler = schedulers[index] if isinstance(schedulers, list) else schedulers
        network = self.critic if name == "critic" else self.student
        assert network is not None
        _average_gradients(network)
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()  # type: ignore[call-arg]
        hp = self.hparams
        if name == "student":
            decay = power_decay(phase.effective + hp["ema_shift"], self._exponent) if hp["ema_profile"] == "power" else hp["ema_decay"]
            ema_update(_state(self.average), _state(self.student), decay)
            self.log("rcm/ema_decay", decay)
        self._done += 1
        self._batches = 0
        if name == "pretrain" and self.iteration == 0:  # what comes starts from the student as it is now
            for follower in (self.average, self.critic):
                if follower is not None:
                    ema_update(_state(follower), _state(self.student), 0.0)

    def _roles(self) -> list[str]:
        found = ["student"] + ["critic"] * (self.critic is not None)
        return found + ["pretrain"] * (self.hparams["pretrain_iterations"] > 0)

    def configure_optimizers(self) -> Any:
        """AdamW for student and critic, Adam for pretraining, each with a learning rate that counts the iterations of its own phase."""
        hp = self.hparams
        common = {"betas": tuple(hp["betas"]), "weight_decay": hp["weight_decay"]}
        optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(self.student.parameters(), lr=hp["learning_rate"], **common)]
        if self.critic is not None:
            optimizers.append(torch.optim.AdamW(self.critic.parameters(), lr=hp["critic_learning_rate"], **common))
        if hp["pretrain_iterations"] > 0:
            optimizers.append(torch.optim.Adam(self.student.parameters(), lr=hp["pretrain_learning_rate"]))
        warmup = hp["lr_warmup"]
        rise = (lambda step: min(1.0, (step + 1) / (warmup + 1))) if warmup else (lambda step: 1.0)
        return optimizers, [torch.optim.lr_scheduler.LambdaLR(optimizer, rise) for optimizer in optimizers]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The count and the seed; an iteration that is under way begins anew."""
        checkpoint["rcm"] = {"done": self._done, "seed": self._seed}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take them over."""
        state = checkpoint.get("rcm", {})
        self._done, self._seed, self._batches = state.get("done", 0), state.get("seed"), 0

    # ---- sampling ------------------------------------------------------------------------------------------------------------------------

    def sample(self, noise: Tensor, steps: int = 1, *condition: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Samples of the averaged student.

        Args:
            noise: (B, ...) standard normal, the shape of a batch of data.
            steps: 1 to ``len(mid_times) + 1``.
            condition: (B, ...), with ``condition``.
            generator: Of the noise between steps, on the device of ``noise``.

        Returns:
            (B, ...), dtype of ``noise``.

        Raises:
            ValueError: Another number of steps.
        """
        hp = self.hparams
        if not 1 <= steps <= len(hp["mid_times"]) + 1:
            raise ValueError(f"{steps} steps need {steps - 1} mid_times: give them, or fewer steps")
        between = [torch.randn(noise.shape, generator=generator, dtype=noise.dtype, device=noise.device) for _ in range(steps - 1)]
        student = self._predict(self.average, noise.dtype, condition)
        return sample(student, noise, between, hp["mid_times"][: steps - 1], hp["sigma_max"]).to(noise.dtype)

    def _draw(self, batch: dict[str, Tensor], seed: int) -> dict[int, Tensor]:
        """Steps -> as many samples as the batch has, of the same noise each time."""
        data = batch["image"]
        noise = torch.randn(data.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32).to(data)
        again = {steps: torch.Generator(data.device).manual_seed(seed + 1) for steps in self.sample_steps}
        return {steps: self.sample(noise, steps, *self._condition(batch), generator=again[steps]) for steps in self.sample_steps}

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Draw as many samples as there are data."""
        self._seen.append((batch["image"], self._draw(batch, 2 * (batch_idx * distributed.world_size() + distributed.rank()))))

    def on_validation_epoch_end(self) -> None:
        """Say how far the samples are from the data."""
        self._evaluate("val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """As in validation."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """As in validation, ``rcm/test_...``."""
        self._evaluate("test")

    def _evaluate(self, split: str) -> None:
        data, drawn = (list(part) for part in zip(*self._seen, strict=True))
        self._seen = []
        found = {steps: torch.cat([part[steps] for part in drawn]) for steps in self.sample_steps}
        known = getattr(self.teacher.module, "evaluate", None)
        for place, (steps, samples) in enumerate(found.items()):
            values = {"sw2": sliced_wasserstein(samples.flatten(1).float(), torch.cat(data).flatten(1).float())}
            values |= known(samples) if known is not None else {}
            ending = "" if place == 0 else f"_{steps}_steps"
            self.log_dict({f"rcm/{split}_{name}{ending}": value for name, value in values.items()}, sync_dist=True)
        self._samples = {steps: samples.detach().float().cpu() for steps, samples in found.items()}

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """``<n>_steps`` -> as many samples as the batch has, for each of ``sample_steps``."""
        drawn = self._draw(batch, 2_000_001 + 2 * (batch_idx * distributed.world_size() + distributed.rank()))
        return {f"{steps}_steps": samples for steps, samples in drawn.items()}

    def dashboard_media(self) -> dict[str, Media]:
        """A grid of samples where they are images, a picture of their density where they are points in the plane."""
        count = self.hparams["grid"]
        first = next(iter(self._samples.values()), None)
        if first is None or count == 0:
            return {}
        steps = ", ".join(str(steps) for steps in self._samples)
        if first.ndim == 2 and first.shape[1] == 2:
            picture = torch.cat([_density(samples) for samples in self._samples.values()], dim=1)
            return {"rcm/samples": ImageMedia(picture.numpy(), alt=f"where samples of {steps} steps lie in the plane, one panel each")}
        if first.ndim == 4 and first.shape[1] in (1, 3):
            from torchvision.utils import make_grid

            rows = torch.cat([samples[:count] for samples in self._samples.values()]).add(1).div(2).clamp(0, 1)
            grid = make_grid(rows, nrow=min(count, len(first)), padding=1).mul(255).round().byte().permute(1, 2, 0)
            return {"rcm/samples": ImageMedia(grid.contiguous().numpy(), alt=f"samples in {steps} steps, one row each")}
        return {}


def _density(points: Tensor, size: int = 256, reach: float = 2.2) -> Tensor:
    """Points (N, 2) as light on a dark square of twice ``reach``: (size, size, 3) uint8."""
    import numpy as np

    edges = np.linspace(-reach, reach, size + 1)
    counts, _, _ = np.histogram2d(-points[:, 1].numpy(), points[:, 0].numpy(), bins=(edges, edges))
    light = torch.from_numpy(np.sqrt(np.minimum(counts, 4) / 4))[..., None]
    dark, bright = (torch.tensor(colour, dtype=torch.float64) for colour in ((13, 20, 33), (125, 200, 250)))
    return (dark + light * (bright - dark)).round().byte()


def _average_gradients(network: nn.Module) -> None:
    """Mean over the processes, in one message for each dtype."""
    if distributed.world_size() == 1:
        return
    groups: dict[torch.dtype, list[Tensor]] = {}
    for parameter in network.parameters():
        if parameter.requires_grad:
            if parameter.grad is None:  # the same message on every rank
                parameter.grad = torch.zeros_like(parameter)
            groups.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for gradients in groups.values():
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= distributed.world_size()
        for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


def _state(module: nn.Module) -> list[Tensor]:
    return [*(parameter.data for parameter in module.parameters()), *module.buffers()]
