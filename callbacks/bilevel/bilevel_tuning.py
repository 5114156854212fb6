"""Hyperparameters of any module, learned by MAID through the solution of its training (arXiv:2308.10098).

Maths: :mod:`lit_methods.inverse_problems.maid.core`, whose controller takes a problem of two levels; this file makes one of a module.
"""

import inspect
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import islice
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.func import functional_call

from lit_methods import checks
from lit_methods.callbacks.loss_term import LossTerm
from lit_methods.callbacks.targets import is_sharded, refuse_lazy
from lit_methods.callbacks.twin import has_validation, shadow, training_batches, validation_batches
from lit_methods.distributed import into_ranks, out_of_ranks, world_size
from lit_methods.errors import nearest
from lit_methods.inverse_problems.bilevel import hessian_product, largest_curvature, upper_hessian_product
from lit_methods.inverse_problems.maid.core import Iteration, MAIDController, MAIDSettings, MAIDState, Solver
from lit_methods.panels import Curve, Panel
from lit_methods.seeds import own_seed, seeded_noise

_MARGIN = 2.0  # a curvature estimated at one place is no bound of those around it


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _Step(nn.Module):
    """Calls a method of the module that it holds, so that ``functional_call`` reaches it."""

    def __init__(self, module: nn.Module, method: str) -> None:
        super().__init__()
        self.module, self.method = module, method

    def forward(self, batch: Any, batch_idx: int) -> Any:
        call = getattr(self.module, self.method)
        return call(*(batch, batch_idx)[: len(inspect.signature(call).parameters)])


class ModuleProblem:
    """The two levels of a module: x are its trained parameters in a row, theta its tuned tensors and logarithms of weight decays.

    h = mean over the lower batches of the loss of ``training_step`` + sum_i e^theta_i |x_i|^2 / 2, g = mean over the upper batches of the
    loss of ``upper_step``. Both are means over the ranks, each of its own batches. Everything runs in evaluation mode without autocast,
    with the same random numbers each time.

    Args:
        module: A copy that may be run, in evaluation mode.
        tuned: Names of the tensors that theta begins with.
        decayed: Names of the parameters of each weight decay, which theta ends with.
        lower: Batches of the lower loss.
        upper: Batches of the upper loss.
        upper_step: Method that gives the upper loss.
        dtype: In which losses are computed.
        seed: Of random numbers in the steps, and of the estimates of curvatures.
        convexity: mu; None: the smallest weight decay.
        smoothness: L; None: estimated where an iteration begins.
    """

    def __init__(
        self,
        module: nn.Module,
        tuned: Sequence[str],
        decayed: Sequence[Sequence[str]],
        lower: Sequence[Any],
        upper: Sequence[Any],
        upper_step: str,
        dtype: torch.dtype,
        seed: int,
        convexity: float | None = None,
        smoothness: float | None = None,
    ) -> None:
        self.dtype, self.seed, self.convexity, self.smoothness = dtype, seed, convexity, smoothness
        self.steps = {"lower": _Step(module, "training_step"), "upper": _Step(module, upper_step)}
        self.batches = {"lower": self._cast(list(lower)), "upper": self._cast(list(upper))}
        named = dict(module.named_parameters()) | dict(module.named_buffers())
        self.state = {f"module.{name}": self._cast(value.detach()) for name, value in named.items()}
        self.tuned = {name: named[name].shape for name in tuned}
        self.trained = {name: value.shape for name, value in module.named_parameters() if value.requires_grad}
        groups = {name: index for index, names in enumerate(decayed) for name in names}
        sizes = torch.tensor([shape.numel() for shape in self.trained.values()])
        which = torch.tensor([groups.get(name, len(decayed)) for name in self.trained])
        self.device = next(iter(self.state.values())).device
        self.which, self.decays = which.repeat_interleave(sizes).to(self.device), len(decayed)
        self._smoothness: dict[bytes, float] = {}
        self.x = self.start()
        self.upper_smoothness = _MARGIN * largest_curvature(upper_hessian_product(self, self.x), self._noise(self.x))

    def _cast(self, values: Any) -> Any:
        return apply_to_collection(values, Tensor, lambda value: value.to(self.dtype) if value.is_floating_point() else value)

    def _noise(self, x: Tensor) -> Tensor:
        return seeded_noise("bilevel curvature", self.seed, x)

    def start(self) -> Tensor:
        """The module's parameters, x."""
        return torch.cat([self.state[f"module.{name}"].flatten() for name in self.trained])

    def named(self, x: Tensor, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """The pieces of a row, by name."""
        pieces = x.split([shape.numel() for shape in shapes.values()])
        return {name: piece.view(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}

    def _mean(self, level: str, values: Mapping[str, Tensor]) -> Tensor:
        state = self.state | {f"module.{name}": value for name, value in values.items()}
        step, batches = self.steps[level], self.batches[level]
        devices = [self.device] if self.device.type == "cuda" else []
        losses = []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(own_seed("bilevel steps", self.seed))
            for index, batch in enumerate(batches):
                output = functional_call(step, dict(state), (batch, index))
                loss = output.get("loss") if isinstance(output, Mapping) else output
                if not isinstance(loss, Tensor) or loss.numel() != 1:
                    method, given = step.method, type(output).__name__
                    raise ValueError(
                        f"BilevelTuning: {method} returned {given} without a loss: return a tensor of one number or a dict with 'loss', or "
                        "name another method in upper_step"
                    )
                losses.append(loss.reshape(()))
        return out_of_ranks(torch.stack(losses).mean()) / world_size()

    def lower(self, x: Tensor, theta: Tensor) -> Tensor:
        """The lower loss h."""
        shared, given = into_ranks(x), into_ranks(theta)
        tuned = self.named(given[: len(theta) - self.decays], self.tuned) if self.tuned else {}
        return self._mean("lower", self.named(shared, self.trained) | tuned) + (self._decay(theta) * x.square()).sum() / 2

    def upper(self, x: Tensor) -> Tensor:
        """The upper loss g."""
        return self._mean("upper", self.named(into_ranks(x), self.trained))

    def unused(self, x: Tensor, theta: Tensor) -> list[str]:
        """Tuned tensors that the gradient of the lower loss doesn't depend on."""
        free, tuned = x.detach().requires_grad_(), self._leaves(theta)
        (gradient,) = torch.autograd.grad(self._mean("lower", self.named(free, self.trained) | tuned), free, create_graph=True)
        if not gradient.requires_grad:
            return list(tuned)
        slopes = torch.autograd.grad(gradient.square().sum(), list(tuned.values()), allow_unused=True)
        return [name for name, slope in zip(tuned, slopes, strict=True) if slope is None]

    def cheating(self, x: Tensor, theta: Tensor) -> list[str]:
        """Tuned tensors that the upper loss itself depends on."""
        tuned = self._leaves(theta)
        value = self._mean("upper", self.named(x, self.trained) | tuned)
        slopes = torch.autograd.grad(value, list(tuned.values()), allow_unused=True) if value.requires_grad else [None] * len(tuned)
        return [name for name, slope in zip(tuned, slopes, strict=True) if slope is not None and bool(slope.any())]

    def _leaves(self, theta: Tensor) -> dict[str, Tensor]:
        pieces = self.named(theta[: len(theta) - self.decays], self.tuned)
        return {name: piece.detach().clone().requires_grad_() for name, piece in pieces.items()}

    def _decay(self, theta: Tensor) -> Tensor:
        """The weight decay of each entry of x."""
        return torch.cat([theta[len(theta) - self.decays :].exp(), theta.new_zeros(1)])[self.which]

    def constants(self, theta: Tensor) -> tuple[float, float]:
        """Mu and L: as given, or the smallest decay, and twice the largest curvature where the iteration begins."""
        mu = float(self._decay(theta).min()) if self.convexity is None else self.convexity
        if self.smoothness is not None:
            return mu, max(mu, self.smoothness)
        key = theta.detach().cpu().numpy().tobytes()
        if key not in self._smoothness:
            self._smoothness[key] = _MARGIN * largest_curvature(hessian_product(self, self.x, theta), self._noise(self.x))
        return mu, max(mu, self._smoothness[key])


class BilevelTuning(LossTerm):
    """Tunes hyperparameters of any module while it trains, by MAID: min over theta of g(x*(theta)), x*(theta) the trained weights.

    theta are tensors of the module that its ``training_step`` uses, such as logarithms of loss weights, and logarithms of weight decays
    that this callback adds: h = loss + sum_i e^theta_i |x_i|^2 / 2. After every ``every_n_steps`` optimiser steps MAID makes one iteration:
    it solves h on the lower batches from the weights as they are, only as accurately as needed, searches for a step of theta along which
    the loss of the upper batches surely falls, and leaves the new theta and weights in the module, which trains on.

    Example, a weight decay each for a network's body and head, of which the first begins at e^-4:

        >>> tuning = BilevelTuning(weight_decay={"body.*": -4.0, "head.*": -2.0}, every_n_steps=100)

    Runs: the decays join the loss of ``training_step``. The first ``lower_batches`` of the training loader and ``upper_batches`` of the
    validation loader are read when fit starts, and stay on the device; their losses run on a copy that shares the weights, in evaluation
    mode, without autocast and without the terms of other callbacks. Under DDP each rank has its own batches, everything is averaged over
    ranks before a decision, and all take the same one. The bounds of MAID hold where h is strongly convex, as for the last layer of a
    network; elsewhere they are estimates. The optimiser's momentum doesn't know of the weights' jump.

    Saves: theta, the controller's numbers and the generator of its probes. A run that is killed within a line search begins the iteration
    anew and ends bit-equal.

    Refuses: what :class:`LossTerm` refuses; sharded weights; names that the module doesn't have; hyperparameters that an optimiser trains;
    weights without a decay where ``convexity`` isn't given; an upper loss that depends on theta itself; a lower loss that curves downwards.

    Args:
        hyperparameters: Names of buffers or frozen parameters of the module, of floating point, that ``training_step`` uses.
        weight_decay: Pattern of names of trained parameters -> logarithm of their weight decay at the start; each is a hyperparameter. The
            decay of the optimiser adds to it.
        every_n_steps: Optimiser steps between two iterations.
        lower_batches: Training batches of the lower loss; null: all.
        upper_batches: Validation batches of the upper loss; null: all.
        upper_step: Method (batch, batch_idx) of the module whose loss is the upper one; ``training_step`` gives its training loss on
            validation batches, without the decays above.
        epsilon: First accuracy of the weights that solve the lower level, and first residual of the linear systems.
        beta: First step of the first line search.
        nu: Factor of both accuracies after an accepted step, >= 1.
        convexity: Strong convexity mu of the lower loss; null: the smallest weight decay.
        smoothness: Bound of the lower loss's curvature; null: twice the largest one at the weights, by power iterations.
        max_iterations: Gradients of one solve, and of one linear system.
        probe: Estimate how the curvature changes, at weights drawn from a normal distribution, as the released code does; false: the lower
            loss is nearly quadratic.
        double: Solve in float64; false: in the module's own type.
        seed: Of probes, random numbers in the steps, and the order of batches where the loader draws it.

    Attributes:
        controller: MAID's solver with its state.
        theta: Hyperparameters in a row: the entries of ``hyperparameters``, then those of ``weight_decay``.

    Raises:
        ValueError: A value outside its range, or nothing to tune.
    """

    name = "bilevel_tuning"
    panels: ClassVar[tuple[Panel, ...]] = (
        Curve("Upper loss", ("bilevel_tuning/upper_loss",), note="Of the last accepted step; never rises.", goal="min"),
        Curve("Weight decays", ("bilevel_tuning/loss",), note="What they add to the training loss."),
        Curve("Hyperparameters", ("bilevel_tuning/theta_min", "bilevel_tuning/theta_mean", "bilevel_tuning/theta_max")),
        Curve("Accuracy", ("bilevel_tuning/epsilon",), note="Falls where a step failed, and rises after one."),
        Curve("Error of the gradient over its length", ("bilevel_tuning/error_ratio",), note="Below 1 it surely points down."),
        Curve("Step of the hyperparameters", ("bilevel_tuning/step",), note="0: no step was found."),
        Curve("Gradients of the lower loss so far", ("bilevel_tuning/lower_iterations", "bilevel_tuning/cg_iterations")),
    )

    def __init__(
        self,
        hyperparameters: Sequence[str] = (),
        weight_decay: dict[str, float] | None = None,
        every_n_steps: int = 50,
        lower_batches: int | None = None,
        upper_batches: int | None = None,
        upper_step: str = "training_step",
        epsilon: float = 0.1,
        beta: float = 1.0,
        nu: float = 1.05,
        convexity: float | None = None,
        smoothness: float | None = None,
        max_iterations: int = 2000,
        probe: bool = False,
        double: bool = True,
        seed: int = 0,
    ) -> None:
        checks.patterns(hyperparameters=hyperparameters)
        checks.at_least(1, every_n_steps=every_n_steps, lower_batches=lower_batches, upper_batches=upper_batches)
        checks.positive(epsilon=epsilon, beta=beta, convexity=convexity, smoothness=smoothness)
        checks.at_least(1, nu=nu, max_iterations=max_iterations)
        checks.at_least(0, seed=seed)
        super().__init__()
        self.hyperparameters, self.weight_decay = list(hyperparameters), dict(weight_decay or {})
        if not self.hyperparameters and not self.weight_decay:
            raise ValueError("BilevelTuning has nothing to tune: give names in hyperparameters, or patterns in weight_decay")
        self.every_n_steps, self.lower_batches, self.upper_batches = every_n_steps, lower_batches, upper_batches
        self.upper_step, self.convexity, self.smoothness = upper_step, convexity, smoothness
        self.double, self.seed = double, seed
        settings, state = MAIDSettings(nu=nu, probe=probe), MAIDState(epsilon, epsilon, beta)
        self.controller = MAIDController(settings, state, Solver(max_iterations=max_iterations))
        self.controller.generator.manual_seed(own_seed("maid probes", seed))
        self.theta: Tensor | None = None
        self._done = 0  # optimiser steps behind the last iteration
        self._decayed: list[list[str]] = []
        self._kept: tuple[list[Any], list[Any]] | None = None  # lower and upper batches

    # ---- names ---------------------------------------------------------------------------------------------------------------------------

    def hook_in(self, pl_module: pl.LightningModule) -> None:
        """Find the hyperparameters, when the module's layers are there."""
        super().hook_in(pl_module)
        with checks.naming(type(self).__name__):
            self._find(pl_module)

    def _find(self, module: pl.LightningModule) -> None:
        if is_sharded(module.trainer):
            strategy = type(module.trainer.strategy).__name__
            raise ValueError(f"the solver moves weights as a whole, but {strategy} shards them: use one process, or strategy='ddp'")
        if not has_validation(module.trainer):
            raise ValueError("fit has no validation data, which the upper loss needs: give some, and a limit_val_batches above 0")
        refuse_lazy(module, type(self).__name__)
        if not callable(getattr(module, self.upper_step, None)):
            raise ValueError(f"{type(module).__name__} has no method upper_step={self.upper_step!r}: name one that returns a loss")
        named: dict[str, Tensor] = dict(module.named_parameters()) | dict(module.named_buffers())
        for name in self.hyperparameters:
            if name not in named:
                near = ", ".join(nearest(name, named)) or "none is near"
                raise ValueError(f"{type(module).__name__} has no parameter or buffer {name!r}: {near}; names are those of its state dict")
            if not named[name].is_floating_point():
                raise ValueError(f"{name} is {named[name].dtype}: hyperparameters have derivatives, give a tensor of floating point")
            if named[name].requires_grad:
                raise ValueError(
                    f"{name} is a trained parameter, which the optimiser moves by itself: make it a buffer, or set requires_grad=False"
                )
        trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        self._decayed = [[name for name in trained if fnmatchcase(name, pattern)] for pattern in self.weight_decay]
        for pattern, names in zip(self.weight_decay, self._decayed, strict=True):
            if not names:
                near = ", ".join(nearest(pattern, trained)) or ", ".join(trained[:4])
                raise ValueError(f"weight_decay: {pattern!r} matches no trained parameter of {type(module).__name__}: there are {near}")
        everything = [name for names in self._decayed for name in names]
        if doubled := sorted({name for name in everything if everything.count(name) > 1}):
            raise ValueError(f"weight_decay: two patterns match {doubled[0]}: let each parameter have one decay")
        if self.convexity is None and (bare := [name for name in trained if name not in everything]):
            raise ValueError(
                f"{', '.join(bare[:3])} has no weight decay, so that the lower loss may have no single minimum: add a pattern for it, such "
                "as '*', or give convexity, a lower bound of the loss's curvature"
            )
        if self.theta is None or len(self.theta) != sum(named[name].numel() for name in self.hyperparameters) + len(self.weight_decay):
            decays = [torch.tensor([value]) for value in self.weight_decay.values()]
            tensors = [named[name].detach().cpu().flatten() for name in self.hyperparameters]
            self.theta = torch.cat([value.double() for value in (*tensors, *decays)])
            if not bool(self.theta.isfinite().all()):
                raise ValueError("a hyperparameter is NaN or infinite at the start")

    # ---- state ---------------------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Theta and MAID's numbers."""
        state: dict[str, Any] = {"controller": self.controller.state.state_dict(), "generator": self.controller.generator.get_state()}
        return state | {"done": self._done} | ({} if self.theta is None else {"theta": self.theta.clone()})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them back.

        Raises:
            ValueError: The checkpoint is of other hyperparameters.
        """
        theta = state_dict.get("theta")
        if theta is not None and self.theta is not None and theta.shape != self.theta.shape:
            raise ValueError(
                f"BilevelTuning: the checkpoint has {len(theta)} hyperparameters, here are {len(self.theta)}: give the same "
                "hyperparameters and weight_decay"
            )
        self.controller.state.load_state_dict(state_dict["controller"])
        self.controller.generator.set_state(state_dict["generator"].cpu())
        self._done = state_dict["done"]
        self.theta = None if theta is None else theta.double().cpu().clone()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read the batches, before a resumed loader is somewhere else, and put theta into the module.

        Raises:
            ValueError: There are no batches of one of the levels.
        """
        devices = [pl_module.device] if pl_module.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(own_seed("bilevel batches", self.seed))
            lower = list(islice(training_batches(trainer, type(self).__name__, "pass a DataLoader"), self.lower_batches))
            upper = list(islice(validation_batches(trainer), self.upper_batches))
        for batches, what in ((lower, "training"), (upper, "validation")):
            if not batches:
                raise ValueError(
                    f"BilevelTuning found no {what} batch: give a loader of {what} data, and a limit_{what[:3]}_batches above 0"
                )
        self._kept = lower, upper
        self._put(pl_module)

    def leave(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let go of the batches."""
        super().leave(trainer, pl_module)
        self._kept = None

    @torch.no_grad()
    def _put(self, module: pl.LightningModule) -> None:
        """Write theta's tensors into the module."""
        assert self.theta is not None
        named: dict[str, Tensor] = dict(module.named_parameters()) | dict(module.named_buffers())
        sizes = [named[name].numel() for name in self.hyperparameters]
        for name, value in zip(self.hyperparameters, self.theta[: sum(sizes)].split(sizes), strict=True):
            named[name].copy_(value.view(named[name].shape))

    # ---- training ------------------------------------------------------------------------------------------------------------------------

    def term(self, inputs: dict[str, Any]) -> Tensor:
        """sum_i e^theta_i |x_i|^2 / 2."""
        module = inputs["module"]
        assert self.theta is not None
        if not self._decayed:
            return torch.zeros((), device=module.device)
        named, decays = dict(module.named_parameters()), self.theta[len(self.theta) - len(self._decayed) :].exp().tolist()
        with torch.autocast(module.device.type, enabled=False):
            squares = [
                sum(decay / 2 * _wide(named[name]).square().sum() for name in names)
                for decay, names in zip(decays, self._decayed, strict=True)
            ]
            return torch.stack(squares).sum()  # type: ignore[arg-type]

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """One iteration, where it is due."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.global_step == self._done or trainer.global_step % self.every_n_steps:
            return
        self._done = trainer.global_step
        with checks.naming(type(self).__name__), torch.autocast(pl_module.device.type, enabled=False):
            found = self.iterate(trainer, pl_module)
        assert self.theta is not None
        state, theta = self.controller.state, self.theta
        figures = found.figures() | {
            "upper_loss": float("nan") if state.value is None else state.value,
            "epsilon": state.epsilon,
            "lower_iterations": state.lower_iterations,
            "cg_iterations": state.cg_iterations,
            "theta_min": float(theta.min()),
            "theta_mean": float(theta.mean()),
            "theta_max": float(theta.max()),
        }
        pl_module.log_dict({f"{self.name}/{name}": float(value) for name, value in figures.items()}, batch_size=1)

    def iterate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iteration:
        """One iteration of MAID from the module's weights, whose result stands in the module.

        Raises:
            ValueError: The module can't be copied or run so, or its losses aren't those of a bilevel problem.
        """
        assert self.theta is not None
        assert self._kept is not None
        dtype = torch.float64 if self.double else next(p.dtype for p in pl_module.parameters() if p.requires_grad)
        theta = self.theta.to(pl_module.device, dtype)
        words = (self.hyperparameters, self._decayed, *self._kept, self.upper_step, dtype, self.seed, self.convexity, self.smoothness)
        try:
            problem = ModuleProblem(shadow(trainer, pl_module), *words)
        except (RuntimeError, TypeError) as error:
            hint = " in float64 (double: false takes its own type)" if self.double else ""
            raise ValueError(f"the steps of {type(pl_module).__name__} can't be run on a copy{hint}: {error}") from error
        controller, x = self.controller, problem.x
        if controller.state.value is None:
            x, iterations = controller.solver(problem, theta, x, controller.state.epsilon)
            controller.state.lower_iterations += iterations
            if self.hyperparameters:
                self._check(problem, x, theta)
        found = controller.iterate(problem, theta, x)
        gradient = found.gradient
        assert gradient is not None
        if not (bool(found.theta.isfinite().all()) and bool(found.x.isfinite().all())) or float((gradient.q * gradient.upper).sum()) < 0:
            raise ValueError(
                "the lower loss curves downwards at the weights, or isn't finite, so that it has no minimum nearby: begin with larger "
                "weight decays, or tune after more training (every_n_steps)"
            )
        self.theta = found.theta.double().cpu()
        with torch.no_grad():
            named = dict(pl_module.named_parameters())
            for name, value in problem.named(found.x, problem.trained).items():
                named[name].copy_(value)
        self._put(pl_module)
        return found

    def _check(self, problem: ModuleProblem, x: Tensor, theta: Tensor) -> None:
        if found := problem.cheating(x, theta):
            raise ValueError(
                f"the loss of upper_step={self.upper_step!r} depends on {', '.join(found)} itself, which would be tuned to cheat it: name "
                "a method whose loss doesn't use it"
            )
        if found := problem.unused(x, theta):
            raise ValueError(
                f"the gradient of training_step's loss doesn't depend on {', '.join(found)}: use the tensor in training_step, without "
                "detaching it"
            )


__all__ = ["BilevelTuning", "ModuleProblem"]
