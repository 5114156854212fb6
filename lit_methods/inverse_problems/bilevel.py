"""What bilevel methods share: the two levels of a problem, solving the lower one, and the gradient of the upper one through it.

A problem is min over theta of g(x*(theta)) with x*(theta) = argmin over x of h(x, theta); h is mu-strongly convex and L-smooth in x.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

Gradient = Callable[[Tensor], Tensor]


class BilevelProblem(Protocol):
    """Two levels, of everything, the same on each process.

    Attributes:
        upper_smoothness: L_g, of the gradient of the upper loss.
    """

    upper_smoothness: float

    def lower(self, x: Tensor, theta: Tensor) -> Tensor:
        """h, a scalar."""
        ...

    def upper(self, x: Tensor) -> Tensor:
        """g, a scalar."""
        ...

    def constants(self, theta: Tensor) -> tuple[float, float]:
        """Strong convexity mu and smoothness L of h in x, or bounds of them."""
        ...


class Solution(NamedTuple):
    """What was found, and after how many iterations: of a lower solve those before the last one, as the released code of MAID counts."""

    x: Tensor
    iterations: int


def lower_gradient(problem: BilevelProblem, x: Tensor, theta: Tensor) -> Tensor:
    """grad_x h(x, theta), without a graph."""
    with torch.enable_grad():
        free = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(problem.lower(free, theta.detach()), free)
    return gradient


def upper_gradient(problem: BilevelProblem, x: Tensor) -> tuple[Tensor, Tensor]:
    """g(x) and its gradient, without a graph."""
    with torch.enable_grad():
        free = x.detach().requires_grad_()
        value = problem.upper(free)
        (gradient,) = torch.autograd.grad(value, free)
    return value.detach(), gradient


@torch.no_grad()
def solve_lower(
    gradient: Gradient,
    x: Tensor,
    mu: float,
    smoothness: float,
    epsilon: float,
    momentum: bool = True,
    stop_factor: float = 1.0,
    max_iterations: int = 2000,
) -> Solution:
    """Minimise a strongly convex function to an accuracy, by FISTA or by gradient descent.

    The step is 1 / L. It ends with the first step whose gradient has ||p|| / (stop_factor * mu) < epsilon; then, for a ``stop_factor`` of
    1, ||x - x*|| <= epsilon.

    Args:
        gradient: x -> gradient of the function.
        x: Where to begin, any shape.
        mu: Strong convexity, > 0.
        smoothness: L >= mu.
        epsilon: Accuracy, > 0.
        momentum: FISTA for strongly convex functions; False: plain descent.
        stop_factor: Divides the norm of the gradient, too.
        max_iterations: At most so many.
    """
    step, q = 1 / smoothness, min(mu / smoothness, 1.0)
    before, t, iterations, accurate = x, 0.0, -1, False
    while not accurate and iterations + 1 < max_iterations:
        point = x
        if momentum and q < 1:  # with q = 1 one step is exact
            root = 1 - q * t * t
            following = (root + (root * root + 4 * t * t) ** 0.5) / 2
            point = x + (t - 1) * (1 - following * q) / (following * (1 - q)) * (x - before)
            t = following
        p = gradient(point)
        accurate = float(torch.linalg.vector_norm(p)) / (stop_factor * mu) < epsilon
        before, x, iterations = x, point - step * p, iterations + 1
    return Solution(x, iterations)


@torch.no_grad()
def conjugate_gradient(product: Gradient, right: Tensor, delta: float, max_iterations: int = 2000) -> Solution:
    """Solve A q = right to ||A q - right|| <= delta, from 0; scalar products in float64.

    Args:
        product: v -> A v, A symmetric and positive definite.
        right: Right side, any shape.
        delta: Largest norm of the residual.
        max_iterations: At most so many.
    """

    def dot(a: Tensor, b: Tensor) -> float:
        return float((a.double() * b.double()).sum())

    q, residual = torch.zeros_like(right), right.clone()
    direction, square, iterations = residual, dot(right, right), 0
    while square**0.5 > delta and iterations < max_iterations:
        image = product(direction)
        step = square / dot(direction, image)
        q, residual = q + step * direction, residual - step * image
        square, before = dot(residual, residual), square
        direction = residual + square / before * direction
        iterations += 1
    return Solution(q, iterations)


def hessian_product(problem: BilevelProblem, x: Tensor, theta: Tensor) -> Gradient:
    """The map v -> (d^2 h / dx^2) v at (x, theta)."""
    with torch.enable_grad():
        free = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(problem.lower(free, theta.detach()), free, create_graph=True)

    def product(v: Tensor) -> Tensor:
        (image,) = torch.autograd.grad(gradient, free, v, retain_graph=True)
        return image

    return product


def mixed_product(problem: BilevelProblem, x: Tensor, theta: Tensor, q: Tensor) -> Tensor:
    """-B^T q = -d/dtheta <grad_x h(x, theta), q>: the hypergradient, if q solves A q = grad g."""
    with torch.enable_grad():
        free, parameter = x.detach().requires_grad_(), theta.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(problem.lower(free, parameter), free, create_graph=True)
        (found,) = torch.autograd.grad((gradient * q.detach()).sum(), parameter)
    return -found


def mixed_image(problem: BilevelProblem, x: Tensor, theta: Tensor, z: Tensor) -> Tensor:
    """B z = d/dx <grad_theta h(x, theta), z>."""
    with torch.enable_grad():
        free, parameter = x.detach().requires_grad_(), theta.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(problem.lower(free, parameter), parameter, create_graph=True)
        (found,) = torch.autograd.grad((gradient * z.detach()).sum(), free)
    return found


def largest_curvature(product: Gradient, start: Tensor, iterations: int = 20) -> float:
    """An estimate of the largest |eigenvalue| of a symmetric matrix from below, by power iterations.

    Args:
        product: v -> A v.
        start: Where to begin, of x's shape, not 0.
        iterations: At least 1.
    """
    vector, size = start, torch.linalg.vector_norm(start)
    for _ in range(iterations):
        vector = product(vector / size.clamp(min=1e-30))
        size = torch.linalg.vector_norm(vector)
    return float(size)


def upper_hessian_product(problem: BilevelProblem, x: Tensor) -> Gradient:
    """The map v -> (d^2 g / dx^2) v at x."""
    with torch.enable_grad():
        free = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(problem.upper(free), free, create_graph=True)

    def product(v: Tensor) -> Tensor:
        if not gradient.requires_grad:  # g is linear
            return torch.zeros_like(v)
        (image,) = torch.autograd.grad(gradient, free, v, retain_graph=True)
        return image

    return product
