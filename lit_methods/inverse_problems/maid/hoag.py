"""HOAG, what MAID is compared with: hypergradients whose accuracy follows a schedule (Pedregosa 2016, as MAID's paper uses it)."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lit_methods.inverse_problems.bilevel import BilevelProblem
from lit_methods.inverse_problems.maid.core import Hypergradient, Iteration, Numbers, Search, Solver, hypergradient

Schedule = Literal["geometric", "quadratic", "cubic"]


def scheduled_accuracy(start: float, iteration: int, schedule: Schedule) -> float:
    """Accuracy of iteration k = 0, 1, ...: start * 0.9^k, start / (k + 1)^2 or start / (k + 1)^3."""
    if schedule == "geometric":
        return start * 0.9**iteration
    return float(start / (iteration + 1) ** (2 if schedule == "quadratic" else 3))


@dataclass
class HOAGState(Numbers):
    """What changes during a run.

    Attributes:
        epsilon: Accuracy of the first iteration, of which all others follow.
        rate: L_lambda, the inverse of the step; 0: before the first step.
        value: Last g; None: before the first.
        moved: Length of the last step.
        before: Accuracy of the last iteration.
        iteration: Iterations so far.
        lower_iterations: Iterations of all lower solves.
        cg_iterations: Those of all linear systems.
        failures: Steps taken back.
    """

    epsilon: float = 0.1
    rate: float = 0.0
    value: float | None = None
    moved: float = 0.0
    before: float = 0.0
    iteration: int = 0
    lower_iterations: int = 0
    cg_iterations: int = 0
    failures: int = 0


@dataclass
class HOAGController:
    """The solver.

    Attributes:
        schedule: Of the accuracy.
        state: What changes.
        solver: For the lower level.
        previous: theta before the last step, to go back to.
    """

    schedule: Schedule = "geometric"
    state: HOAGState = field(default_factory=HOAGState)
    solver: Solver = field(default_factory=Solver)
    previous: Tensor | None = None

    def iterate(self, problem: BilevelProblem, theta: Tensor, x: Tensor) -> Iteration:
        """One iteration: a gradient, then a step whose size follows what the last one did; a step that made it worse is taken back."""
        state = self.state
        epsilon = scheduled_accuracy(state.epsilon, state.iteration, self.schedule)
        found: Hypergradient = hypergradient(problem, theta, x, epsilon, epsilon, self.solver)
        state.lower_iterations += found.lower_iterations
        state.cg_iterations += found.cg_iterations
        size = float(torch.linalg.vector_norm(found.z))
        state.rate = state.rate or size / found.z.numel() ** 0.5 or 1.0
        success = True
        if state.value is not None and self.previous is not None:
            slack = 0.25 * epsilon + state.before * 1.25 * state.moved - state.rate * state.moved**2
            if found.value <= state.value + slack:
                state.rate *= 0.95
            elif found.value >= 1.2 * state.value:
                success = False
        if success:
            step, state.value = 1 / state.rate, found.value
            self.previous, state.moved = theta, step * size
            theta = (theta - step * found.z).clamp(-1000, 1000)
        else:
            step, theta, self.previous = 0.0, self.previous, None  # type: ignore[assignment]
            state.rate, state.epsilon, state.failures = 2 * state.rate, 0.5 * state.epsilon, state.failures + 1
        state.before, state.iteration = epsilon, state.iteration + 1
        search = Search(success, step, theta, found.x, found.value, 0, 1)
        return Iteration(theta, found.x, found, [search])
