"""The method of adaptive inexact descent, MAID (arXiv:2308.10098): hyperparameters by gradients whose error is known and adapted.

Golden vectors come from MohammadSadeghSalehi/MAID@6986372 (MAID.py, Quadratic.py), see tests/golden/data/maid/README.md; that code has no
licence, so this one follows the equations. Solvers and products with derivatives stand in :mod:`lit_methods.inverse_problems.bilevel`.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lit_methods.inverse_problems.bilevel import (
    BilevelProblem,
    conjugate_gradient,
    hessian_product,
    lower_gradient,
    mixed_image,
    mixed_product,
    solve_lower,
    upper_gradient,
)


class Hypergradient(NamedTuple):
    """An inexact gradient of the upper level, and what is known of its error.

    Attributes:
        z: It, of theta's shape.
        x: Solution of the lower level to accuracy epsilon.
        q: Solution of A q = grad g(x) to residual delta.
        value: g(x).
        slope: ||grad g(x)||.
        upper: grad g(x).
        b_norm: Estimate of ||B||.
        bound: omega >= ||z - grad f(theta)||, as far as the estimates are right.
        lower_iterations: Gradients of the lower solve.
        cg_iterations: Products with the Hessian.
    """

    z: Tensor
    x: Tensor
    q: Tensor
    value: float
    slope: float
    upper: Tensor
    b_norm: float
    bound: float
    lower_iterations: int
    cg_iterations: int


@dataclass(frozen=True)
class Solver:
    """How the lower level is solved.

    Attributes:
        momentum: FISTA; False: gradient descent, as the released code does in effect.
        stop_factor: Divides the gradient's norm beside mu in the stopping test; the released code's quadratic example has 2.
        max_iterations: Of the lower solve, and of conjugate gradients.
    """

    momentum: bool = True
    stop_factor: float = 1.0
    max_iterations: int = 2000

    def __call__(self, problem: BilevelProblem, theta: Tensor, x: Tensor, epsilon: float) -> tuple[Tensor, int]:
        """x*(theta) to accuracy epsilon from ``x``, and the gradients that it took."""
        mu, smoothness = problem.constants(theta)
        found = solve_lower(
            lambda point: lower_gradient(problem, point, theta),
            x,
            mu,
            smoothness,
            epsilon,
            self.momentum,
            self.stop_factor,
            self.max_iterations,
        )
        return found.x, found.iterations


def error_bound(
    b_norm: float, slope: float, mu: float, epsilon: float, delta: float, l_b: float = 0.0, l_inverse: float = 0.0, l_g: float = 1.0
) -> float:
    """The bound c epsilon + ||B|| / mu delta + L_B / mu epsilon^2, c = L_g ||B|| / mu + L_inv ||grad g|| ||B|| + L_B / mu ||grad g||.

    Args:
        b_norm: ||B||.
        slope: ||grad g(x)||.
        mu: Strong convexity of the lower level.
        epsilon: Error of x.
        delta: Residual of q.
        l_b: Lipschitz constant of B in x; 0 for a quadratic lower level.
        l_inverse: That of A^-1.
        l_g: L_g; the released code has 1 for all problems.
    """
    c = l_g * b_norm / mu + l_inverse * slope * b_norm + l_b / mu * slope
    return c * epsilon + b_norm / mu * delta + l_b / mu * epsilon**2


def hypergradient(
    problem: BilevelProblem,
    theta: Tensor,
    x: Tensor,
    epsilon: float,
    delta: float,
    solver: Solver,
    l_b: float = 0.0,
    l_inverse: float = 0.0,
) -> Hypergradient:
    """Solve both levels to their accuracy, and say how wrong the gradient may be.

    ||B|| is estimated by one power step, max |B z|.

    Args:
        problem: Both levels.
        theta: Hyperparameters, any shape.
        x: Where the lower solve begins.
        epsilon: Accuracy of x, > 0.
        delta: Residual of the linear system, > 0.
        solver: For the lower level.
        l_b: As in :func:`error_bound`, with ``l_inverse``.
        l_inverse: Likewise estimated.
    """
    x, iterations = solver(problem, theta, x, epsilon)
    value, upper = upper_gradient(problem, x)
    q, products = conjugate_gradient(hessian_product(problem, x, theta), upper, delta, solver.max_iterations)
    z = mixed_product(problem, x, theta, q)
    b_norm = float(mixed_image(problem, x, theta, z).abs().max())
    slope, mu = float(torch.linalg.vector_norm(upper)), problem.constants(theta)[0]
    bound = error_bound(b_norm, slope, mu, epsilon, delta, l_b, l_inverse)
    return Hypergradient(z, x, q, float(value), slope, upper, b_norm, bound, iterations, products)


def probe_constants(
    problem: BilevelProblem, theta: Tensor, found: Hypergradient, noise: Tensor, delta: float, max_iterations: int = 2000
) -> tuple[float, float, int]:
    """Estimates of the Lipschitz constants of B and of A^-1 at a random place, and the products that they took.

    Args:
        problem: Both levels.
        theta: Hyperparameters.
        found: The hypergradient at the solution.
        noise: Normal noise of x's shape, in place of the solution.
        delta: Residual of the linear system.
        max_iterations: Of conjugate gradients.
    """
    size_q, size_g = float(torch.linalg.vector_norm(found.q)), found.slope
    other, products = conjugate_gradient(hessian_product(problem, noise, theta), found.upper, delta, max_iterations)
    l_b = float(torch.linalg.vector_norm(mixed_product(problem, noise, theta, found.q) - found.z)) / size_q if size_q else 0.0
    l_inverse = float(torch.linalg.vector_norm(other - found.q)) / size_g if size_g else 0.0
    return l_b, l_inverse, products


class Search(NamedTuple):
    """What a line search ended with: whether a step was accepted, which (0: none), and theta, x and g(x) behind it."""

    success: bool
    step: float
    theta: Tensor
    x: Tensor
    value: float
    lower_iterations: int
    tries: int


def backtrack(
    problem: BilevelProblem,
    theta: Tensor,
    x: Tensor,
    z: Tensor,
    value: float,
    slope: float,
    epsilon: float,
    beta: float,
    rho: float,
    tries: int,
    decrease: float,
    solver: Solver,
    test: Literal["code", "paper"] = "code",
    next_epsilon: float | None = None,
    convex: bool = True,
) -> Search:
    """Shorten a step until the upper level surely falls, whatever the errors.

    Accepted is the first step beta * rho^i whose largest possible new value lies below the least possible old one by
    decrease * step * ||z||^2.

    Args:
        problem: Both levels.
        theta: Hyperparameters now.
        x: Solution of the lower level there.
        z: Inexact gradient.
        value: g at the last accepted point.
        slope: ||grad g(x)||.
        epsilon: Accuracy of x.
        beta: First step.
        rho: Factor of each further one, in (0, 1).
        tries: J >= 1.
        decrease: lambda.
        solver: For the lower level, warm from ``x``.
        test: ``code``: as released, for a convex g. ``paper``: Lemma 3.5, with ``next_epsilon`` as the error of the new value.
        next_epsilon: Accuracy of the next iterate, for ``paper``.
        convex: Whether g is convex, for ``paper``: its lower bound is closer then.
    """
    size, used = float((z.double() ** 2).sum()), 0
    new_error = epsilon if test == "code" or next_epsilon is None else next_epsilon
    for index in range(tries):
        step = beta * rho**index
        moved = theta - step * z
        solution, iterations = solver(problem, moved, x, epsilon)
        used += iterations
        new_value, gradient = upper_gradient(problem, solution)
        smooth = problem.upper_smoothness / 2
        highest = float(new_value) + float(torch.linalg.vector_norm(gradient)) * new_error + smooth * new_error**2
        lowest = value - slope * epsilon - (smooth * epsilon**2 if test == "paper" and not convex else 0.0)
        if highest - lowest <= -decrease * step * size:
            return Search(True, step, moved, solution, float(new_value), used, index + 1)
    return Search(False, 0.0, theta, x, value, used, tries)


@dataclass(frozen=True)
class MAIDSettings:
    """What stays the same during a run.

    Attributes:
        rho: Factor of the steps of a line search.
        tau: Factor of epsilon and delta where they are too large.
        nu: Factor of both after an accepted step, > 1: they may grow again.
        growth: Factor of the accepted step, which the next search begins with.
        eta: A gradient counts as one if its error is at most 1 - eta of it.
        decrease: lambda of the line search; None: eta^2.
        tries: Steps of the first line search of an iteration; each further search has one more.
        searches: Line searches of an iteration at most.
        fixed_accuracy: Epsilon and delta stay, and no gradient is refused: the baseline.
        test: Of the line search, ``code`` or ``paper``.
        probe: Estimate the Lipschitz constants of B and of A^-1 at random places; False: the lower level is quadratic, they are 0.
        limit: Refinements of a gradient at most, before it is taken as it is.
    """

    rho: float = 0.5
    tau: float = 0.5
    nu: float = 1.05
    growth: float = 10 / 9
    eta: float = 1e-4
    decrease: float | None = None
    tries: int = 10
    searches: int = 3
    fixed_accuracy: bool = False
    test: Literal["code", "paper"] = "code"
    probe: bool = True
    limit: int = 60


@dataclass
class Numbers:
    """Numbers that change during a run, fit for a checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        """All of them."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        for name in asdict(self):
            setattr(self, name, state[name])


@dataclass
class MAIDState(Numbers):
    """What changes during a run of MAID.

    Attributes:
        epsilon: Accuracy of the lower solves.
        delta: Residual of the linear systems.
        beta: First step of the next line search.
        value: g at the last accepted point; None: before the first step.
        l_b: Largest estimate of the Lipschitz constant of B so far, with ``l_inverse`` of A^-1.
        l_inverse: Likewise the largest.
        lower_iterations: Iterations of all lower solves.
        cg_iterations: Those of all linear systems.
        failures: Line searches without a step.
    """

    epsilon: float = 0.1
    delta: float = 0.1
    beta: float = 0.1
    value: float | None = None
    l_b: float = 0.0
    l_inverse: float = 0.0
    lower_iterations: int = 0
    cg_iterations: int = 0
    failures: int = 0


class Iteration(NamedTuple):
    """One iteration of the upper level: theta and x behind it, its last gradient (None of a search without one), all its line searches."""

    theta: Tensor
    x: Tensor
    gradient: Hypergradient | None
    searches: list[Search]

    def figures(self) -> dict[str, float]:
        """What is worth logging."""
        figures = {"step": self.searches[-1].step, "tries": float(sum(search.tries for search in self.searches))}
        if self.gradient is not None:
            size = float(torch.linalg.vector_norm(self.gradient.z))
            figures |= {"gradient_norm": size, "error_ratio": self.gradient.bound / size if size else 0.0}
        return figures


@dataclass
class MAIDController:
    """The solver: adapts the accuracy of both levels to what each decision needs.

    Attributes:
        settings: What stays.
        state: What changes.
        solver: For the lower level.
        generator: CPU generator of the probes.

    Example:
        >>> controller = MAIDController()
        >>> theta, x, *_ = controller.iterate(problem, theta, x)
    """

    settings: MAIDSettings = field(default_factory=MAIDSettings)
    state: MAIDState = field(default_factory=MAIDState)
    solver: Solver = field(default_factory=Solver)
    generator: torch.Generator = field(default_factory=torch.Generator)

    def gradient(self, problem: BilevelProblem, theta: Tensor, x: Tensor) -> Hypergradient:
        """A gradient that surely points down; epsilon and delta fall until it does."""
        settings, state = self.settings, self.state
        for _ in range(settings.limit):  # each begins where the first one began, as in the released code
            found = hypergradient(problem, theta, x, state.epsilon, state.delta, self.solver, state.l_b, state.l_inverse)
            state.lower_iterations += found.lower_iterations
            state.cg_iterations += found.cg_iterations
            if settings.fixed_accuracy:
                break
            if settings.probe:
                noise = torch.randn(x.shape, generator=self.generator, dtype=torch.float64).to(x)
                l_b, l_inverse, products = probe_constants(problem, theta, found, noise, state.delta, self.solver.max_iterations)
                state.l_b, state.l_inverse = max(state.l_b, l_b), max(state.l_inverse, l_inverse)
                state.cg_iterations += products
                mu = problem.constants(theta)[0]
                bound = error_bound(found.b_norm, found.slope, mu, state.epsilon, state.delta, state.l_b, state.l_inverse)
                found = found._replace(bound=bound)
            if found.bound <= (1 - settings.eta) * float(torch.linalg.vector_norm(found.z)):
                break
            self._tighten()
        return found

    def iterate(self, problem: BilevelProblem, theta: Tensor, x: Tensor) -> Iteration:
        """One iteration of the upper level: line searches until one finds a step, each from a better gradient.

        Args:
            problem: Both levels.
            theta: Hyperparameters.
            x: Solution of the lower level at the last theta, or a start.
        """
        settings, state = self.settings, self.state
        decrease = settings.eta**2 if settings.decrease is None else settings.decrease
        if state.value is None:
            state.value = float(upper_gradient(problem, x)[0])
        searches: list[Search] = []
        for index in range(settings.searches):
            found = self.gradient(problem, theta, x)
            x = found.x
            tries = (5 if settings.fixed_accuracy else settings.tries) + index
            search = backtrack(
                problem,
                theta,
                x,
                found.z,
                state.value,
                found.slope,
                state.epsilon,
                state.beta,
                settings.rho,
                tries,
                decrease,
                self.solver,
                settings.test,
                state.epsilon * settings.nu,
            )
            searches.append(search)
            state.lower_iterations += search.lower_iterations
            if search.success:
                theta, x, state.value = search.theta, search.x, search.value
                state.beta = settings.growth * search.step
                if not settings.fixed_accuracy:
                    state.epsilon, state.delta = settings.nu * state.epsilon, settings.nu * state.delta
                break
            state.failures += 1
            if not settings.fixed_accuracy:
                self._tighten()
        return Iteration(theta, x, found, searches)

    def _tighten(self) -> None:
        self.state.epsilon, self.state.delta = self.settings.tau * self.state.epsilon, self.settings.tau * self.state.delta
