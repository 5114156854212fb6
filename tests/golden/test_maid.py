"""MAID against the authors' code; see tests/golden/data/maid/README.md for the origin of each kind."""

from typing import Any

import torch
from torch import Tensor

from golden import GoldenCase, Kind, golden_test
from lit_methods.inverse_problems.bilevel import upper_gradient
from lit_methods.inverse_problems.maid.core import MAIDController, MAIDSettings, MAIDState, Solver, backtrack, hypergradient


class Quadratic:
    """h = |A2 x + A3 theta - b2|^2 / 2, g = |A1 x - b1|^2 / 2, as in the cases."""

    def __init__(self, case: GoldenCase) -> None:
        self.a1, self.a2, self.a3, self.b1, self.b2 = (case.tensor(f"in_{name}") for name in ("A1", "A2", "A3", "b1", "b2"))
        self.mu, self.smoothness, self.upper_smoothness = (case.hp(name) for name in ("mu", "L_lower", "L_upper"))

    def lower(self, x: Tensor, theta: Tensor) -> Tensor:
        return (self.a2 @ x + self.a3 @ theta - self.b2).square().sum() / 2

    def upper(self, x: Tensor) -> Tensor:
        return (self.a1 @ x - self.b1).square().sum() / 2

    def constants(self, theta: Tensor) -> tuple[float, float]:
        return self.mu, self.smoothness

    def exact(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """f(theta) and its gradient in closed form."""
        free = theta.clone().requires_grad_()
        value = self.upper(torch.linalg.lstsq(self.a2, (self.b2 - self.a3 @ free)[:, None]).solution[:, 0])
        return value.detach(), torch.autograd.grad(value, free)[0]


def solver(case: GoldenCase) -> Solver:
    known = case.arrays
    return Solver(
        momentum=False,
        stop_factor=case.hp("stop_factor") if "hp_stop_factor" in known else 2.0,
        max_iterations=case.hp("max_lower_iter") if "hp_max_lower_iter" in known else 2000,
    )


def hypergrad(case: GoldenCase) -> dict[str, Any]:
    problem, theta = Quadratic(case), case.tensor("in_theta")
    found = hypergradient(problem, theta, case.tensor("in_x0"), case.hp("epsilon"), case.hp("delta"), solver(case))
    return {
        "out_x_tilde": found.x,
        "out_lower_iterations": found.lower_iterations,
        "out_grad_upper": found.upper,
        "out_q": found.q,
        "out_cg_iterations": found.cg_iterations,
        "out_hypergrad": found.z,
        "out_B_estimate": found.b_norm,
        "out_bound": found.bound,
        "out_exact_hypergrad": problem.exact(theta)[1],
    }


def one_search(case: GoldenCase) -> dict[str, Any]:
    problem, x = Quadratic(case), case.tensor("in_x")
    found = backtrack(
        problem,
        case.tensor("in_theta"),
        x,
        case.tensor("in_hypergrad"),
        float(case.arrays["in_g_old"]),
        float(torch.linalg.vector_norm(upper_gradient(problem, x)[1])),
        case.hp("epsilon"),
        case.hp("beta"),
        case.hp("rho"),
        case.hp("max_backtrack"),
        case.hp("eta") ** 2,
        solver(case),
    )
    return {
        "out_success": int(found.success),
        "out_step": found.step,
        "out_theta": found.theta,
        "out_x": found.x,
        "out_g_new": found.value,
    }


def solve(case: GoldenCase) -> dict[str, Any]:
    problem, theta, x = Quadratic(case), case.tensor("in_theta0"), case.tensor("in_x0")
    settings = MAIDSettings(
        rho=case.hp("rho"),
        tau=case.hp("tau"),
        nu=case.hp("nu"),
        growth=case.hp("beta_growth"),
        eta=case.hp("eta"),
        searches=case.hp("max_backtrack_loops"),
        fixed_accuracy=bool(case.hp("fixed_accuracy")),
        probe=False,
    )
    controller = MAIDController(settings, MAIDState(case.hp("epsilon0"), case.hp("delta0"), case.hp("beta0")), solver(case))
    losses, searches = [float(upper_gradient(problem, x)[0])], []
    for _ in range(case.hp("iterations")):
        found = controller.iterate(problem, theta, x)
        theta, x = found.theta, found.x
        searches += found.searches
    taken = [search for search in searches if search.success]
    return {
        "out_theta": theta,
        "out_losses": torch.tensor(losses + [search.value for search in taken], dtype=torch.float64),
        "out_steps": torch.tensor([search.step for search in taken], dtype=torch.float64),
        "out_epsilon_final": controller.state.epsilon,
        "out_delta_final": controller.state.delta,
        "out_beta_final": controller.state.beta,
        "out_theta_after_each_linesearch": torch.stack([search.theta for search in searches]),
        "out_linesearch_success": torch.tensor([int(search.success) for search in searches]),
        "out_lower_iterations": controller.state.lower_iterations,
        "out_exact_upper": problem.exact(theta)[0],
    }


test_golden = golden_test(
    "maid",
    {
        "hypergrad": Kind(hypergrad, rtol=1e-6, atol=1e-9),
        "backtrack": Kind(one_search, rtol=1e-6, atol=1e-9),
        "solve": Kind(solve, rtol=1e-5, atol=1e-9),
    },
)
