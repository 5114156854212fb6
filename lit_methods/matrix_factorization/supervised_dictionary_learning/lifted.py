"""LPGD, lifted low-rank projected gradient descent: the objective in the products A, B = W H and Gamma, in which it is convex.

The symbols are those of :mod:`~lit_methods.matrix_factorization.supervised_dictionary_learning.core`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_methods.matrix_factorization.regression import exact, with_intercept
from lit_methods.matrix_factorization.supervised_dictionary_learning.objective import Factors, Model, Objective, logistic_loss


class Lifted(NamedTuple):
    """The variables in which the objective is convex.

    Attributes:
        score: A: W beta, (p, 1), in the filter model; beta^T H, (1, n), in the feature model.
        product: B = W H, (p, n).
        gamma: Gamma (1, 1 + q): intercept and covariates.
    """

    score: Tensor
    product: Tensor
    gamma: Tensor


@exact
def svd_factors(x: Tensor, covariates: int, rank: int) -> Factors:
    """Where a fit may start instead: at the best reconstruction of rank r, ||W||_F = 1, with coefficients of 0.

    Args:
        x: (p, n) data.
        covariates: q.
        rank: r. More than min(p, n): atoms of zeros.
    """
    found = recover_factors(x, x.new_zeros(len(x), 1), x.new_zeros(1, 1 + covariates), model="filter", rank=rank)
    return found._replace(coefficients=torch.zeros_like(found.coefficients))


def lift_factors(factors: Factors, model: Model) -> Lifted:
    """The products of factors: A = W beta (filter) or beta^T H (feature), B = W H."""
    return _lift(*factors, model)


@exact
def _lift(dictionary: Tensor, codes: Tensor, coefficients: Tensor, model: Model) -> Lifted:
    rank = len(codes)
    beta = coefficients[:, 1 : 1 + rank]
    gamma = torch.cat([coefficients[:, :1], coefficients[:, 1 + rank :]], dim=1)
    return Lifted(dictionary @ beta.T if model == "filter" else beta @ codes, dictionary @ codes, gamma)


class LowRank(NamedTuple):
    """U (p, k), singular values (k,) in falling order, V (k, n): the best approximation of rank k is U diag(s) V."""

    left: Tensor
    values: Tensor
    right: Tensor

    def matrix(self) -> Tensor:
        """The product, (p, n)."""
        return (self.left * self.values) @ self.right


@exact
def best_low_rank(matrix: Tensor, rank: int, sketch: Tensor | None = None, power_iterations: int = 4) -> LowRank:
    """Truncated SVD.

    Args:
        matrix: (p, n).
        rank: r >= 1; more than min(p, n) keeps the matrix as it is.
        sketch: None: exact. (n, k) standard normal draws, k >= r (r + 10 is usual): the randomised SVD (arXiv:0909.4061).
        power_iterations: Of the randomised SVD; more are nearer to the exact one.

    Returns:
        k = min(r, p, n) triples.
    """
    if sketch is None:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        basis = torch.linalg.qr(matrix @ sketch).Q
        for _ in range(power_iterations):
            basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
        small, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
        left = basis @ small
    return LowRank(left[:, :rank], values[:rank], right[:rank])


def combined(lifted: Lifted, model: Model) -> Tensor:
    """C: [A, B], (p, 1 + n), in the filter model; [A; B], (1 + p, n), in the feature model."""
    return torch.cat([lifted.score, lifted.product], dim=1 if model == "filter" else 0)


@exact
def lifted_scores(x: Tensor, covariates: Tensor, lifted: Lifted, model: Model) -> Tensor:
    """(1, n) scores A^T X + Gamma Z (filter) or A + Gamma Z (feature)."""
    return (lifted.score.T @ x if model == "filter" else lifted.score) + lifted.gamma @ with_intercept(covariates)


@exact
def lpgd_objective(x: Tensor, labels: Tensor, covariates: Tensor, lifted: Lifted, *, model: Model, xi: float, nu: float) -> Objective:
    """Logistic loss + xi ||X - B||_F^2 + nu / 2 (||A||^2 + ||Gamma||^2); the last term is in ``total`` alone.

    Args:
        x: (p, n) data.
        labels: (1, n) of 0 and 1.
        covariates: (q, n), q >= 0.
        lifted: A, B and Gamma.
        model: ``filter`` or ``feature``.
        xi: Weight of the reconstruction, >= 0.
        nu: Weight of the L2 term, >= 0.
    """
    classification = logistic_loss(lifted_scores(x, covariates, lifted, model), labels)
    reconstruction = (x - lifted.product).square().sum()
    penalty = nu / 2 * (lifted.score.square().sum() + lifted.gamma.square().sum())
    return Objective(classification + xi * reconstruction + penalty, classification, reconstruction)


@exact
def lpgd_step(
    x: Tensor,
    labels: Tensor,
    covariates: Tensor,
    lifted: Lifted,
    *,
    model: Model,
    rank: int,
    step_size: float,
    xi: float,
    nu: float = 0.0,
    sketch: Tensor | None = None,
) -> Lifted:
    """One gradient step on A, B and Gamma at once, then the best approximation of rank r of A and B side by side.

    The gradients are X (P - Y)^T + nu A (filter) or P - Y + nu A (feature), 2 xi (B - X), and (P - Y) Z^T + nu Gamma, P = sigmoid(scores).
    B alone goes by the factor 1 - 2 xi tau to X, so tau >= 1 / xi diverges whatever the data.

    Args:
        x: (p, n) data.
        labels: (1, n) of 0 and 1.
        covariates: (q, n), q >= 0.
        lifted: A, B and Gamma.
        model: ``filter`` or ``feature``.
        rank: r >= 1.
        step_size: tau > 0.
        xi: Weight of the reconstruction, >= 0.
        nu: Weight of the L2 term, >= 0.
        sketch: Draws of a randomised SVD, see :func:`best_low_rank`; their rows are as many as the columns of [A, B] or [A; B].

    Returns:
        The new variables.
    """
    residual = torch.sigmoid(lifted_scores(x, covariates, lifted, model)) - labels
    data_part = x @ residual.T if model == "filter" else residual
    stepped = Lifted(
        lifted.score - step_size * (data_part + nu * lifted.score),
        lifted.product - step_size * 2 * xi * (lifted.product - x),
        lifted.gamma - step_size * (residual @ with_intercept(covariates).T + nu * lifted.gamma),
    )
    low = best_low_rank(combined(stepped, model), rank, sketch).matrix()
    score, product = (low[:, :1], low[:, 1:]) if model == "filter" else (low[:1], low[1:])
    return Lifted(score, product, stepped.gamma)


@exact
def lpgd_curvature(x: Tensor, covariates: Tensor, *, model: Model, xi: float, nu: float = 0.0) -> Tensor:
    """L, the largest curvature of the lifted objective: a step size below 2 / L can't diverge; 1 / L is safe.

    L = max(2 xi, s^2 / 4 + nu) with s the largest singular value of [X; Z] (filter) or [I; Z] (feature), since l'' <= 1/4.

    Args:
        x: (p, n) data.
        covariates: (q, n), q >= 0.
        model: ``filter`` or ``feature``.
        xi: Weight of the reconstruction.
        nu: Weight of the L2 term.
    """
    z = with_intercept(covariates)
    gram = torch.linalg.matrix_norm(torch.cat([x, z]), 2).square() if model == "filter" else 1 + torch.linalg.matrix_norm(z, 2).square()
    return torch.clamp(gram / 4 + nu, min=2 * xi)


def decayed_step_size(iteration: int, constant: float, decay: float = 0.0) -> float:
    """tau_t = c (t + 10)^(-beta), t = 0, 1, ...; beta = 0 is a constant step."""
    return constant * (iteration + 10) ** -decay


@exact
def recover_factors(product: Tensor, score: Tensor, gamma: Tensor, *, model: Model, rank: int) -> Factors:
    """Factors of the lifted variables, from the SVD C = U S V, with ||W||_F = 1.

    Filter: W = U sqrt(S) / omega and [beta, H] = omega sqrt(S) V, with omega = ||U sqrt(S)||_F. Feature: [beta^T; W] = U sqrt(S) / omega
    and H = omega sqrt(S) V, with omega the norm of the rows of W alone.

    Args:
        product: B (p, n).
        score: A, (p, 1) in the filter model, (1, n) in the feature model.
        gamma: Gamma (1, 1 + q).
        model: ``filter`` or ``feature``.
        rank: r. Where C has a smaller one, atoms of zeros fill the rest; so does a C of zeros.
    """
    low = best_low_rank(combined(Lifted(score, product, gamma), model), rank)
    missing = rank - len(low.values)
    root = low.values.sqrt()
    left, right = F.pad(low.left * root, (0, missing)), F.pad(root[:, None] * low.right, (0, 0, 0, missing))
    omega = left.norm() if model == "filter" else left[1:].norm()
    omega = torch.where(omega > 0, omega, 1.0)
    left, right = left / omega, right * omega
    dictionary, codes, beta = (left, right[:, 1:], right[:, :1].T) if model == "filter" else (left[1:], right, left[:1])
    return Factors(dictionary, codes, torch.cat([gamma[:, :1], beta, gamma[:, 1:]], dim=1))


__all__ = [
    "Lifted",
    "LowRank",
    "best_low_rank",
    "combined",
    "decayed_step_size",
    "lift_factors",
    "lifted_scores",
    "lpgd_curvature",
    "lpgd_objective",
    "lpgd_step",
    "recover_factors",
    "svd_factors",
]
