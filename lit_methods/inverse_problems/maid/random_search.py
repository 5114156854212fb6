"""Random search, what MAID is compared with where nothing is differentiated: optuna draws hyperparameters, and the best ones are kept."""

import importlib.util
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lit_methods.inverse_problems.bilevel import BilevelProblem
from lit_methods.inverse_problems.maid.core import Iteration, Numbers, Search, Solver
from lit_methods.seeds import own_seed


def require_optuna() -> None:
    """Raise unless optuna is installed.

    Raises:
        ImportError: It isn't.
    """
    if importlib.util.find_spec("optuna") is None:
        raise ImportError("method='random' draws with optuna, which isn't installed: pip install 'lit-methods[tuning]'")


@dataclass
class RandomState(Numbers):
    """What changes during a run.

    Attributes:
        epsilon: Accuracy of every lower solve; it stays.
        value: g of the best hyperparameters; None: before the first.
        iteration: Draws so far.
        lower_iterations: Iterations of all lower solves.
        cg_iterations: 0: nothing is differentiated.
        failures: Draws that weren't better.
    """

    epsilon: float = 0.1
    value: float | None = None
    iteration: int = 0
    lower_iterations: int = 0
    cg_iterations: int = 0
    failures: int = 0


@dataclass
class RandomController:
    """The search: one draw an iteration, uniform within ``width`` around where theta began, by optuna's ``RandomSampler``.

    Attributes:
        width: Of the draws, to either side.
        seed: Of the draws; draw k follows from it and k alone.
        state: What changes.
        solver: For the lower level, to the accuracy ``state.epsilon``.
        previous: Where theta began.
    """

    width: float = 3.0
    seed: int = 0
    state: RandomState = field(default_factory=RandomState)
    solver: Solver = field(default_factory=Solver)
    previous: Tensor | None = None
    _study: Any = None

    def draw(self, theta: Tensor) -> Tensor:
        """Uniform numbers in [-1, 1] of theta's shape."""
        import optuna

        if self._study is None:
            level = optuna.logging.get_verbosity()
            optuna.logging.set_verbosity(optuna.logging.WARNING)  # it tells of each new study
            self._study = optuna.create_study()
            optuna.logging.set_verbosity(level)
        self._study.sampler = optuna.samplers.RandomSampler(seed=own_seed("random search", self.seed + self.state.iteration) % 2**32)
        interval = optuna.distributions.FloatDistribution(-1.0, 1.0)
        trial = self._study.ask({str(index): interval for index in range(theta.numel())})
        self._study.tell(trial, state=optuna.trial.TrialState.PRUNED)  # its value is kept here: a resumed run has no study
        return theta.new_tensor([trial.params[str(index)] for index in range(theta.numel())]).view(theta.shape)

    def iterate(self, problem: BilevelProblem, theta: Tensor, x: Tensor) -> Iteration:
        """One draw, which is kept if g is smaller there."""
        state = self.state
        if state.value is None:
            state.value, self.previous = float(problem.upper(x)), theta
        assert self.previous is not None
        moved = self.previous + self.width * self.draw(theta)
        solution, used = self.solver(problem, moved, x, state.epsilon)
        value, better = float(problem.upper(solution)), False
        if value < state.value:
            theta, x, state.value, better = moved, solution, value, True
        state.iteration += 1
        state.lower_iterations += used
        state.failures += not better
        step = float(torch.linalg.vector_norm(moved - self.previous)) if better else 0.0
        return Iteration(theta, x, None, [Search(better, step, theta, x, state.value, used, 1)])


__all__ = ["RandomController", "RandomState", "require_optuna"]
