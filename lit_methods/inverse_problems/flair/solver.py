"""FLAIR and its baselines for one batch: a frozen flow, an operator, and the measured error curve that makes the weights."""

import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lit_methods import checks
from lit_methods.inverse_problems.flair.baselines import dps, flow_chef, flow_dps, red_diff
from lit_methods.inverse_problems.flair.core import (
    FlairSettings,
    Problem,
    Trace,
    calibrated_weights,
    flair_solve,
    flow_matching_error,
    largest_pull,
    residual,
    time_grid,
    weight_at,
)
from lit_methods.inverse_problems.flair.priors import FlowPrior
from lit_methods.inverse_problems.operators import Inpainting, as_operator, check_adjoint
from lit_methods.seeds import own_seed

Method = Literal["flair", "red_diff", "flow_dps", "flow_chef", "dps"]
Weighting = Literal["calibrated", "linear", "constant"]
LARGEST_PULL = 1.5  # a step moves mu by the share w(t) / t towards the model's prediction, and diverges above 2


def noise_of(owner: str, seed: int, numbers: list[int], shape: tuple[int, ...], like: Tensor) -> Tensor:
    """(B, *shape) normal noise, each row of its own generator, which follows from owner, seed and the image's number alone.

    So an image gets the same noise in any batch, on any rank and device.
    """
    generators = [torch.Generator().manual_seed(own_seed(f"{owner} {number}", seed)) for number in numbers]
    rows = [torch.randn(shape, generator=generator, dtype=torch.float32) for generator in generators]  # the same in any precision
    return torch.stack(rows).to(like) if rows else like.new_empty(0, *shape)


class Restored(NamedTuple):
    """What a solver made of a batch.

    Attributes:
        images: (B, C, H, W) restored.
        start: (B, C, H, W) image of the pseudo-inverse of y.
        residual: (B,) mean square of A x - y.
        traces: One for each time.
        seconds: For an image.
    """

    images: Tensor
    start: Tensor
    residual: Tensor
    traces: list[Trace]
    seconds: float


class FlowInverseSolver(nn.Module):
    """Restores images from y = A x + noise with a frozen flow as prior, by FLAIR or a baseline.

    Gradients are switched on inside, also under ``torch.inference_mode``. mu is float32 or wider, whatever the model's type.

    Args:
        prior: Flow model; it is asked, and not trained, here.
        operator: A: a ``LinearOperator``, or one of deepinv's.
        settings: FLAIR's; the samplers take ``steps``, ``lr_data`` and ``data_steps``.
        method: ``flair``; ``red_diff``, ``flow_dps``, ``flow_chef``, ``dps``: baselines.
        weighting: w(t): ``calibrated``: from the error curve. ``linear``: ``weight`` t. ``constant``: ``weight`` times ``ts_min``, which
            RED-diff takes in any case; so w(t) / t is at most ``weight``.
        weight: See ``weighting``.
        weights: NumPy file (.npy) of N numbers at linspace(1, 0, N) in the place of the measured curve: weights, if its name has
            ``reg_weight`` in it, else mean squared errors of the model.
        calibration_times: N of the error curve that is measured.
        reg_shift: Added to calibrated weights of mean 1; None: the last one is taken off.
        regularizer_weight: Factor of calibrated weights; None: such that w(t) / t is at most 1.
        start: ``pseudo_inverse``: mu begins at E(A+ y). ``noise``: at random.
        eta: Share of fresh noise in FlowDPS.
        seed: Seed of all noise, with the image's number.
    """

    error: Tensor
    prior: FlowPrior

    def __init__(
        self,
        prior: FlowPrior,
        operator: Any,
        settings: FlairSettings,
        method: Method = "flair",
        weighting: Weighting = "calibrated",
        weight: float = 0.8,
        weights: Path | None = None,
        calibration_times: int = 100,
        reg_shift: float | None = 0.0,
        regularizer_weight: float | None = 0.5,
        start: Literal["pseudo_inverse", "noise"] = "pseudo_inverse",
        eta: float = 0.5,
        seed: int = 0,
    ) -> None:
        super().__init__()
        checks.literals(FlowInverseSolver, locals())
        checks.at_least(0, weight=weight, regularizer_weight=regularizer_weight)
        checks.share(eta=eta)
        checks.at_least(2, calibration_times=calibration_times)
        self.__dict__["prior"] = prior  # the module's own part, not a second one
        self.operator, self.settings = as_operator(operator), settings
        self.method, self.weighting, self.weight, self.reg_shift = method, weighting, weight, reg_shift
        self.regularizer_weight, self.start, self.eta, self.seed = regularizer_weight, start, eta, seed
        self.given = None if weights is None else _read(Path(weights).expanduser())
        self.direct = weights is not None and "reg_weight" in Path(weights).name
        self.register_buffer("error", torch.zeros(calibration_times, dtype=torch.float64))

    @property
    def constant_weight(self) -> float:
        """The weight of RED-diff."""
        return self.weight * self.settings.ts_min

    # ---- weights -------------------------------------------------------------------------------------------------------------------------

    @property
    def calibrated(self) -> bool:
        """Whether there is a curve, measured or given."""
        return self.given is not None or bool(self.error.any())

    def curve_weights(self) -> Tensor:
        """(N,) float64 weights on the CPU, at linspace(1, 0, N).

        Raises:
            ValueError: Nothing has been measured.
        """
        times = torch.linspace(1, 0, len(self.error), dtype=torch.float64)
        if self.weighting != "calibrated":
            return self.weight * times if self.weighting == "linear" else torch.full_like(times, self.constant_weight)
        if not self.calibrated:
            raise ValueError(
                "the weights aren't calibrated: give --ckpt_path of a run of `lit fit`, whose validation measures them, weights= a file, "
                "or weighting=linear"
            )
        error = self.error.cpu() if self.given is None else self.given
        if self.regularizer_weight is not None:
            return error * self.regularizer_weight if self.direct else calibrated_weights(error, self.reg_shift, self.regularizer_weight)
        weights = error if self.direct else calibrated_weights(error, self.reg_shift, 1.0)
        return weights / largest_pull(weights, self.settings.ts_min).clamp(min=1e-12)

    def schedule(self) -> list[float]:
        """w(t) at each time of the optimisation; warns where a step would overshoot."""
        weights = self.curve_weights()
        pull = float(largest_pull(weights, self.settings.ts_min)) * self.settings.lr_reg
        if pull > LARGEST_PULL:
            rank_zero_warn(
                f"FLAIR: w(t) / t reaches {pull:.2f}, and above 2 the regulariser's step diverges: multiply regularizer_weight by "
                f"{1 / pull:.2f}, or set it to null"
            )
        found: list[float] = weight_at(weights, time_grid(self.settings.steps, self.settings.ts_min)).tolist()
        return found

    @torch.no_grad()
    def errors(self, images: Tensor, numbers: list[int]) -> Tensor:
        """(B, N) float64 mean squared errors of the model's velocity for clean images at each of linspace(1, 0, N)."""
        x0 = _wide(self.prior.encode(images))
        times = torch.linspace(1, 0, len(self.error), dtype=torch.float64).tolist()
        noise = noise_of("flair calibration", self.seed, numbers, (len(times), *x0.shape[1:]), x0)
        columns = []
        for place, t in enumerate(times):
            x1 = noise[:, place]
            columns.append(flow_matching_error(self._velocity((1 - t) * x0 + t * x1, t), x0, x1).double())
        return torch.stack(columns, 1)

    # ---- solving -------------------------------------------------------------------------------------------------------------------------

    def check(self, images: Tensor) -> None:
        """Raise unless the operator takes such images and its adjoint is one.

        Raises:
            ValueError: It doesn't, or it isn't.
        """
        check_adjoint(self.operator, _wide(images[:1]))

    def measure(self, images: Tensor, numbers: list[int], noise: float, degraded: bool) -> Tensor:
        """Measurements of a batch: A x + noise, or the images themselves where they have been degraded already.

        Args:
            images: (B, C, H, W).
            numbers: Of the images, which seed the noise.
            noise: Standard deviation.
            degraded: The images are measurements; of an inpainting's, what its mask leaves.
        """
        if degraded and not isinstance(self.operator, Inpainting):
            return _wide(images)
        y = self.operator.forward(images)
        return y if degraded or not noise else y + noise * noise_of("flair measurement", self.seed, numbers, tuple(y.shape[1:]), y)

    def restore(self, y: Tensor, numbers: list[int]) -> Restored:
        """Solve for a batch of measurements (B, ...) of images with these numbers."""
        with torch.inference_mode(False), torch.enable_grad():
            return self._restore(y.clone(), numbers)

    def _restore(self, y: Tensor, numbers: list[int]) -> Restored:
        began, s, traces = time.perf_counter(), self.settings, list[Trace]()
        with torch.no_grad():
            first = self.operator.pseudo_inverse(y)
            mu = _wide(self.prior.encode(first))
        drawn = noise_of("flair", self.seed, numbers, (s.steps + 2, *mu.shape[1:]), mu)

        def noises(number: int) -> Tensor:
            return drawn[:, number]

        if self.start == "noise":
            mu = noises(s.steps + 1)

        def project(latents: Tensor) -> Tensor:
            x = _wide(self.prior.decode(latents))
            return _wide(self.prior.encode(x - self.operator.pseudo_inverse(self.operator.forward(x)) + first))

        problem = Problem(y, self._velocity, self._predict, project)
        if self.method == "flair":
            mu = flair_solve(problem, mu, noises, self.schedule(), s, traces.append)
        elif self.method == "red_diff":
            mu = red_diff(problem, mu, noises, self.constant_weight, s, traces.append)
        elif self.method == "flow_dps":
            mu = flow_dps(problem, noises, s, self.eta, traces.append)
        else:
            mu = (flow_chef if self.method == "flow_chef" else dps)(problem, noises, s, traces.append)
        with torch.no_grad():
            images = _wide(self.prior.decode(mu))
            left = residual(problem, mu)
        if images.is_cuda:
            torch.cuda.synchronize()
        return Restored(images, first, left, traces, (time.perf_counter() - began) / max(1, len(y)))

    def _velocity(self, x: Tensor, t: float) -> Tensor:
        return self.prior.velocity(x, torch.full((len(x),), t, device=x.device, dtype=x.dtype)).to(x.dtype)

    def _predict(self, latents: Tensor) -> Tensor:
        return self.operator.forward(_wide(self.prior.decode(latents)))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _read(path: Path) -> Tensor:
    """(N,) float64 out of a NumPy file.

    Raises:
        ValueError: It isn't there, or holds something else.
    """
    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"weights={str(path)!r} can't be read ({error}): give a .npy file of numbers") from error
    if values.ndim != 1 or len(values) < 2 or values.dtype.kind not in "fiu" or not (values >= 0).all():
        raise ValueError(f"weights={str(path)!r} holds {values.dtype} {values.shape}: give two or more numbers >= 0 at linspace(1, 0, N)")
    return torch.from_numpy(values.astype(np.float64))


__all__ = ["FlowInverseSolver", "Restored", "noise_of"]
