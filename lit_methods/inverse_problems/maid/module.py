"""Bilevel learning of hyperparameters by MAID or HOAG (arXiv:2308.10098), one iteration of the upper level per step.

Maths and origin: :mod:`lit_methods.inverse_problems.maid.core`; problems: :mod:`lit_methods.inverse_problems.problems`. Left out:
other solvers without derivatives than random search. Hyperparameters of somebody else's module: ``lit_methods.callbacks.BilevelTuning``.
"""

from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

from lit_methods import checks
from lit_methods.catalog import Technique
from lit_methods.inverse_problems.maid.core import Iteration, MAIDController, MAIDSettings, MAIDState, Solver
from lit_methods.inverse_problems.maid.hoag import HOAGController, HOAGState, Schedule
from lit_methods.inverse_problems.maid.random_search import RandomController, RandomState, require_optuna
from lit_methods.inverse_problems.problems import Name, Problem, make_problem
from lit_methods.optim import Iterations
from lit_methods.panels import Curve, ImageMedia, ImagePanel, Media, Panel
from lit_methods.seeds import own_seed
from lit_methods.steps import log_global

TECHNIQUE = Technique(
    slug="maid",
    short="MAID",
    title="An adaptively inexact first-order method for bilevel optimization with application to hyperparameter learning",
    arxiv="2308.10098",
    family="inverse_problems",
    form="module",
    classes=("lit_methods.BilevelLearning", "lit_methods.callbacks.BilevelTuning"),
    configs=("maid.yaml", "maid_weight_decay.yaml", "maid_tv.yaml", "maid_experts.yaml", "maid_tuning.yaml"),
    golden=("hypergrad", "backtrack", "solve"),
    claim="At the same budget of lower iterations, MAID that begins with an accuracy of 0.1 ends nearer to the optimum than with a fixed "
    "accuracy of 0.001.",
    summary="Learns hyperparameters through the solution of a lower problem, with solvers only as accurate as each decision needs.",
)

Method = Literal["maid", "hoag", "random"]


class BilevelLearning(LightningModule):
    """Learns the hyperparameters theta of a lower problem, whose solution an upper loss judges.

    ``maid`` solves both levels only as accurately as a decision needs: it refuses gradients whose error may be as large as they are, takes
    a step where the loss surely falls, and lets the accuracy fall again afterwards. ``fixed_accuracy`` is its baseline, ``hoag`` another
    one, and ``random`` a search without gradients: optuna draws theta, and the best is kept.
    One training step is one iteration over the whole data.

    Runs: a training batch is the whole problem, the same each time; ``problem`` says which keys it has. All is computed in float64 without
    autocast. Under DDP every process has the whole problem and takes the same decisions, which gains no time. Validation solves the lower
    problem of its batch to ``evaluation_accuracy``.

    Saves: theta, the lower solution x (each solve begins there), the controller's state and the generator of its probes: a resumed run ends
    bit-equal.

    Refuses: batches without the problem's keys; a singular lower level; a resume with data of another size or another method; strategies
    that shard weights.

    Args:
        problem: ``quadratic``, ``weight_decay`` (logistic regression), ``tv`` or ``experts`` (denoising).
        method: ``maid``, ``hoag`` or ``random``, which needs optuna.
        epsilon: First accuracy of the lower solution, > 0; with ``fixed_accuracy`` the only one.
        delta: First residual of the linear systems; null: epsilon.
        beta: First step of the first line search.
        rho: Factor of the steps within a line search, in (0, 1).
        tau: Factor of epsilon and delta where they are too large, in (0, 1).
        nu: Factor of both after an accepted step, >= 1.
        growth: Factor of an accepted step for the next search, >= 1.
        eta: Error of a gradient that counts: at most 1 - eta of its length.
        fixed_accuracy: Never change epsilon and delta, and refuse no gradient.
        test: Of the line search: ``code``, as released, or ``paper``, Lemma 3.5.
        schedule: HOAG's accuracy: ``geometric``, ``quadratic`` or ``cubic``.
        momentum: Lower solves by FISTA; false: by gradient descent.
        max_iterations: Of one solve.
        solve_first: Solve the lower level before the first iteration, so that the first loss is one.
        budget: Lower iterations after which the training ends; null: never.
        search_width: ``random`` draws theta uniformly within so much of where it begins.
        filters: Of ``experts``.
        evaluation_accuracy: Accuracy of the lower solution in validation and test.
        seed: Of probes, of random draws, and of the first kernels of ``experts``.

    Raises:
        ValueError: A value outside its range.
        ImportError: ``random`` without optuna.
    """

    panels: ClassVar[tuple[Panel, ...]] = (
        Curve("Upper loss", ("bilevel/loss",), note="Of accepted steps; never rises with MAID.", goal="min"),
        Curve(
            "Upper loss on other data", ("bilevel/val_loss", "bilevel/val_gap"), note="Gap: to the optimum, where it is known.", goal="min"
        ),
        Curve("Accuracies", ("bilevel/epsilon", "bilevel/delta"), note="They fall where a step failed, and rise after one."),
        Curve("Error of the gradient over its length", ("bilevel/error_ratio",), note="Below 1 it surely points down."),
        Curve("Step", ("bilevel/step",), note="0: no step was found."),
        Curve("Iterations so far", ("bilevel/lower_iterations", "bilevel/cg_iterations"), note="What the method is to save."),
        ImagePanel("Hyperparameters, or a denoised image", "bilevel/pictures", note="Noisy, denoised, clean; else theta, blue to red."),
    )

    def __init__(
        self,
        problem: Name = "quadratic",
        method: Method = "maid",
        epsilon: float = 0.1,
        delta: float | None = None,
        beta: float = 0.1,
        rho: float = 0.5,
        tau: float = 0.5,
        nu: float = 1.05,
        growth: float = 10 / 9,
        eta: float = 1e-4,
        fixed_accuracy: bool = False,
        test: Literal["code", "paper"] = "code",
        schedule: Schedule = "geometric",
        momentum: bool = True,
        max_iterations: int = 2000,
        solve_first: bool = True,
        budget: int | None = None,
        search_width: float = 3.0,
        filters: int = 10,
        evaluation_accuracy: float = 1e-6,
        seed: int = 0,
    ) -> None:
        super().__init__()
        checks.literals(BilevelLearning, locals())
        checks.positive(epsilon=epsilon, delta=delta, beta=beta, search_width=search_width, evaluation_accuracy=evaluation_accuracy)
        checks.within("(0, 1)", rho=rho, tau=tau, eta=eta)
        checks.at_least(1, nu=nu, growth=growth, max_iterations=max_iterations, budget=budget, filters=filters)
        checks.at_least(0, seed=seed)
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.problem, self.filters, self.seed, self.budget = problem, filters, seed, budget
        self.solve_first, self.evaluation_accuracy = solve_first, evaluation_accuracy
        solver = Solver(momentum, 1.0, max_iterations)
        self.controller: MAIDController | HOAGController | RandomController
        if method == "maid":
            settings = MAIDSettings(
                rho=rho, tau=tau, nu=nu, growth=growth, eta=eta, fixed_accuracy=fixed_accuracy, test=test, probe=problem != "quadratic"
            )
            self.controller = MAIDController(settings, MAIDState(epsilon, epsilon if delta is None else delta, beta), solver)
            self.controller.generator.manual_seed(own_seed("maid probes", seed))
        elif method == "hoag":
            self.controller = HOAGController(schedule, HOAGState(epsilon), solver)
        else:
            require_optuna()
            self.controller = RandomController(search_width, own_seed("maid random", seed), RandomState(epsilon), solver)
        self.theta: torch.nn.Parameter | None
        self.register_parameter("theta", None)
        self.register_buffer("x", None)
        self._problem: Problem | None = None
        self._media: dict[str, Media] = {}

    # ---- state ---------------------------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Ask the datamodule for the problem, so that theta is there before the optimiser.

        Raises:
            ValueError: The strategy shards weights.
            RuntimeError: There is no datamodule with ``problem``.
        """
        strategy = type(self.trainer.strategy).__name__
        if any(word in strategy for word in ("FSDP", "DeepSpeed", "ModelParallel")):
            raise ValueError(f"BilevelLearning moves theta as a whole, but {strategy} shards it: use one process, or strategy='ddp'")
        self._problem = None
        if stage == "fit" and self.theta is None:
            batch = getattr(getattr(self.trainer, "datamodule", None), "problem", None)
            if batch is None:
                raise RuntimeError(
                    "BilevelLearning doesn't know its problem: use a datamodule with problem, or call start(batch) before fit"
                )
            self.start(batch)

    def start(self, batch: dict[str, Tensor]) -> None:
        """Make theta and x for a problem. A datamodule that has a ``problem`` is asked by itself.

        Args:
            batch: What a training batch will be.
        """
        theta, x = self._make(batch).start()
        self.theta, self.x = torch.nn.Parameter(theta.to(self.device)), x.to(self.device)

    def _make(self, batch: dict[str, Tensor]) -> Problem:
        return make_problem(self.problem, batch, self.filters, self.seed)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """With the controller's state."""
        controller = self.controller
        checkpoint["bilevel"] = {"state": controller.state.state_dict()}
        if isinstance(controller, MAIDController):
            checkpoint["bilevel"]["generator"] = controller.generator.get_state()
        else:
            checkpoint["bilevel"]["previous"] = controller.previous

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take sizes and the controller's state of a checkpoint.

        Raises:
            ValueError: A fit goes on with a problem of another size, or with another method.
        """
        for name in ("theta", "x"):
            saved, own = checkpoint["state_dict"].get(name), getattr(self, name)
            if saved is None:
                raise ValueError(f"the checkpoint has no {name}: it is of another module, or of one that never trained")
            if own is not None and own.shape != saved.shape:
                raise ValueError(
                    f"the checkpoint's {name} is {tuple(saved.shape)}, this problem needs {tuple(own.shape)}: give the same data"
                )
            value = saved.to(self.device, copy=True)
            setattr(self, name, torch.nn.Parameter(value) if name == "theta" else value)
        kept, controller = checkpoint["bilevel"], self.controller
        if set(kept["state"]) != set(controller.state.state_dict()):
            raise ValueError("the checkpoint is of another method: give the same, maid, hoag or random")
        controller.state.load_state_dict(kept["state"])
        if isinstance(controller, MAIDController):
            controller.generator.set_state(kept["generator"].cpu())
        else:
            controller.previous = kept["previous"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Nothing but the count of the iterations."""
        return Iterations([self.theta])

    # ---- training ------------------------------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> STEP_OUTPUT:
        """One iteration of the upper level."""
        if self._problem is None:
            self._problem = self._make(batch)
        with torch.autocast(self.device.type, enabled=False):
            found: Iteration = self.optimizers().step(closure=self._iterate)  # type: ignore[union-attr, call-arg, assignment]
        self._log(found)
        if self.budget is not None and self.controller.state.lower_iterations >= self.budget:
            self.trainer.should_stop = True
        return None

    def _iterate(self) -> Iteration:
        assert self._problem is not None
        assert self.theta is not None
        state, x = self.controller.state, self.x
        if self.solve_first and state.value is None:
            x, iterations = self.controller.solver(self._problem, self.theta, x, state.epsilon)
            state.lower_iterations += iterations
        found = self.controller.iterate(self._problem, self.theta.detach().clone(), x)  # a controller may keep what it is given
        with torch.no_grad():
            self.theta.copy_(found.theta)
            self.x = found.x
        return found

    def _log(self, found: Iteration) -> None:
        state = self.controller.state
        figures = found.figures() | {
            "loss": float("nan") if state.value is None else state.value,
            "epsilon": state.before if isinstance(state, HOAGState) else state.epsilon,
            "lower_iterations": state.lower_iterations,
            "cg_iterations": state.cg_iterations,
            "failures": state.failures,
        }
        if isinstance(state, MAIDState):
            figures["delta"] = state.delta
        self.log_dict({f"bilevel/{name}": float(value) for name, value in figures.items()}, batch_size=1)

    # ---- evaluation ----------------------------------------------------------------------------------------------------------------------

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """The upper loss of other data with theta."""
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """The upper loss of other data with theta."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """``x``: the solution of the lower problem with theta."""
        problem = self._make(batch)
        return {"x": self._solve(problem)}

    def _solve(self, problem: Problem) -> Tensor:
        assert self.theta is not None
        with torch.inference_mode(False), torch.autocast(self.device.type, enabled=False):
            theta, (_, x) = self.theta.detach().clone(), problem.start()
            return self.controller.solver(problem, theta, x.clone(), self.evaluation_accuracy)[0]

    def _evaluate(self, batch: dict[str, Tensor], stage: str) -> None:
        with torch.inference_mode(False):
            problem = self._make({name: value.clone() for name, value in batch.items()})
            x = self._solve(problem)
            assert self.theta is not None
            figures = {"loss": problem.upper(x).detach()}
            if (gap := problem.gap(self.theta.detach().clone())) is not None:
                figures["gap"] = gap
        if "label" in batch and "test_features" in batch:
            right = (batch["test_features"].flatten(0, -2).double() @ x).argmax(1) == batch["test_label"].flatten()
            figures["accuracy"] = right.double().mean()
        if "clean" in batch:
            figures["psnr"] = -10 * (x - batch["clean"].double()).square().mean().log10()
            images = torch.stack([batch["noisy"][0, 0].double(), x[0, 0], batch["clean"][0, 0].double()])
            self._draw((images.clamp(0, 1) * 255)[..., None].expand(-1, -1, -1, 3), "an image with noise, denoised, and without noise")
        else:
            theta = self.theta.detach().flatten()
            shares = 0.5 + theta / (2 * theta.abs().max().clamp(min=1e-12))
            self._draw(255 * torch.stack([shares, 1 - (2 * shares - 1).abs(), 1 - shares], -1)[None, None], "hyperparameters, one a column")
        log_global(self, {f"bilevel/{stage}_{name}": value for name, value in figures.items()}, batch_size=1)

    def _draw(self, images: Tensor, words: str) -> None:
        """(n, h, w, 3) in 0..255, side by side, at least 48 pixels high."""
        row = torch.cat(list(images.round().byte().cpu()), dim=1)
        scale = max(1, 48 // len(row))
        self._media = {"bilevel/pictures": ImageMedia(row.repeat_interleave(scale, 0).repeat_interleave(scale, 1).numpy().copy(), words)}

    def dashboard_media(self) -> dict[str, Media]:
        """Denoised images, or the hyperparameters."""
        return self._media
