"""Networks as functions of TrigFlow time, whatever time they were trained with.

Notation of sCM (arXiv:2410.11081) at a data standard deviation of 1: x_t = cos t x0 + sin t z with t in [0, pi/2], F = dx_t/dt, so
x0 = cos t x_t - sin t F. The scalings for rectified flow are those of NVlabs/rcm@5b41aa9, rcm/utils/denoiser_scaling.py and
rcm/utils/timestep_utils.py. All of it is float64; networks are called in the dtype of the data.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lit_methods.consistency_models.levels import like


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
        time_scale: Factor of the rectified-flow time that the network is told.
    """
    total = time.cos() + time.sin()
    return FlowScalings(1 / total, -time.sin() / total, 1 / total, time_scale * flow_time(time))


def flow_time(time: Tensor) -> Tensor:
    """Rectified-flow time u = sin t / (sin t + cos t) of TrigFlow time."""
    return time.sin() / (time.sin() + time.cos())


def trig_time(flow: Tensor) -> Tensor:
    """TrigFlow time arctan(u / (1 - u)) of rectified-flow time u in [0, 1]."""
    return torch.atan2(flow, 1 - flow)


def shift_time(flow: Tensor, shift: float = 5.0) -> Tensor:
    """Shift u / (1 + (shift - 1) u): rectified-flow time with more mass at large noise; u in [0, 1]."""
    return shift * flow / (1 + (shift - 1) * flow)


def noisy(x0: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """x_t = cos t x0 + sin t z: (B, ...), (B, ...) and (B,) -> (B, ...)."""
    return like(time.cos(), x0) * x0 + like(time.sin(), x0) * noise


def _jvp(function: Callable[..., Any], at: tuple[Tensor, ...], along: tuple[Tensor, ...]) -> tuple[Any, Any]:
    both: Any = torch.func.jvp(function, at, along)
    return both[0], both[1]


@dataclass(frozen=True)
class Wrapped:
    """A network as a function of (x_t, t), and its derivative along a direction. Make one with :func:`rectified_flow` or :func:`trigflow`.

    A network with a true attribute ``takes_tangents`` is asked for its derivative itself, as ``network(x, time, *condition,
    tangents=(tangent of x, tangent of time)) -> (value, tangent)``; ``torch.func.jvp`` goes through any other.

    Attributes:
        network: (B, ...), (B,) and conditions -> (B, ...).
        dtype: That the network is called in; the time is float32 at least.
        condition: Passed on.
        time_scale: Factor of a rectified-flow network's time; None: the network is F(x_t, t) itself.
    """

    network: Callable[..., Any]
    dtype: torch.dtype
    condition: tuple[Tensor, ...] = ()
    time_scale: float | None = None

    def __call__(self, x: Tensor, time: Tensor) -> Prediction:
        """(B, ...) and (B,) times in (0, pi/2] -> x0 and velocity."""
        x, time = x.double(), time.double()
        return self._answer(x, time, self.network(*self._question(x, time), *self.condition))

    def with_tangent(self, x: Tensor, time: Tensor, tangent_x: Tensor, tangent_time: Tensor) -> tuple[Prediction, Prediction]:
        """Prediction at (x, time), and its derivative along the tangents; all float64, of the shapes of a call."""
        at, along = (x, time), (tangent_x, tangent_time)
        if not getattr(self.network, "takes_tangents", False):
            return _jvp(self.__call__, at, along)
        asked, moved = _jvp(self._question, at, along)
        value, tangent = self.network(*asked, *self.condition, tangents=moved)
        return _jvp(self._answer, (*at, value.double()), (*along, tangent.double()))

    def _question(self, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """What the network is told."""
        wide = torch.promote_types(self.dtype, torch.float32)
        if self.time_scale is None:
            return x.to(self.dtype), time.to(wide)
        scalings = flow_scalings(time, self.time_scale)
        return (like(scalings.inp, x) * x).to(self.dtype), scalings.noise.to(wide)

    def _answer(self, x: Tensor, time: Tensor, answer: Tensor) -> Prediction:
        """What its answer means."""
        cos, sin, answer = like(time.cos(), x), like(time.sin(), x), answer.double()
        if self.time_scale is None:
            return Prediction(cos * x - sin * answer, answer)
        scalings = flow_scalings(time, self.time_scale)
        x0 = like(scalings.skip, x) * x + like(scalings.out, x) * answer
        return Prediction(x0, (cos * x - x0) / sin)


def rectified_flow(network: Callable[..., Any], dtype: torch.dtype, *condition: Tensor, time_scale: float = 1000.0) -> Wrapped:
    """A velocity network v(x, 1000 u, condition) of rectified flow, as a function of (x_t, t); arguments as in :class:`Wrapped`."""
    return Wrapped(network, dtype, condition, time_scale)


def trigflow(network: Callable[..., Any], dtype: torch.dtype, *condition: Tensor) -> Wrapped:
    """A network that is F(x_t, t, condition) itself, as in sCM; arguments as in :class:`Wrapped`."""
    return Wrapped(network, dtype, condition)


def guided(conditional: Predict, unconditional: Predict, guidance: float) -> Predict:
    """Classifier-free guidance: unconditional + guidance (conditional - unconditional), of x0 as of the velocity; 1 or less: none."""
    if guidance <= 1:
        return conditional

    def predict(x: Tensor, time: Tensor) -> Prediction:
        pairs = zip(unconditional(x, time), conditional(x, time), strict=True)
        return Prediction(*(without + guidance * (with_ - without) for without, with_ in pairs))

    return predict


class VelocityDenoiser(nn.Module):
    """D(x, sigma) of variance-exploding noise, from a network that gives the velocity at TrigFlow times: x0 = cos t x_t - sin t F(x_t, t).

    Args:
        velocity: F of (B, ...) samples, (B,) times t = arctan(sigma) and labels, such as ``RingTeacher``.
    """

    def __init__(self, velocity: nn.Module) -> None:
        super().__init__()
        self.velocity = velocity

    def forward(self, x: Tensor, sigma: Tensor, *condition: Tensor) -> Tensor:
        """(B, ...) x0 + sigma z and (B,) -> the mean of x0."""
        time = sigma.atan()
        cos, sin = like(time.cos(), x), like(time.sin(), x)
        answer: Tensor = cos * cos * x - sin * self.velocity(cos * x, time, *condition)
        return answer
