"""The maths of supervised dictionary learning (arXiv:2206.06774): two solvers, their objectives, and how labels are predicted.

Find W (p, r), H (r, n), beta (r) and Gamma (1 + q) that make

    F = sum_i l(y_i, a_i) + xi ||X - W H||_F^2,    l(y, a) = log(1 + e^a) - y a,

small, where the score of column i is a_i = beta^T W^T x_i + Gamma z_i in the ``filter`` model and beta^T h_i + Gamma z_i in the ``feature``
model, z_i = [1; covariates of column i]. Samples are the columns of all matrices in this file.

- **LPGD**, lifted low-rank projected gradient descent: gradient steps on A = W beta (filter) or beta^T H (feature), B = W H and Gamma, each
  followed by the best approximation of rank r of [A, B] or [A; B].
- **BCD**, block coordinate descent: W, H and the regression in turn, with W, H >= 0 and a search radius if wanted.

Golden vectors come from ljw9510/SDL@c6ae40f (src/SDL_SVP.py, src/SDL_BCD.py). Labels are 0 or 1; more classes, convex constraints on the
lifted variables and the update of xi by the noise are left out.
"""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_methods.matrix_factorization.regression import code_columns, exact, fit_regression, linear_scores, with_intercept

Model = Literal["filter", "feature"]
Prediction = Literal["naive", "alternating", "exhaustive"]

# ---- the objective ---------------------------------------------------------------------------------------------------------------------


def logistic_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Sum of log(1 + e^a) - y a over all scores and labels of the same shape: a scalar >= 0, also for scores of any size."""
    return F.binary_cross_entropy_with_logits(scores, labels, reduction="sum")


class Objective(NamedTuple):
    """Scalars: ``classification`` + xi ``reconstruction`` = ``total``; ``reconstruction`` is ||X - W H||_F^2."""

    total: Tensor
    classification: Tensor
    reconstruction: Tensor


class Factors(NamedTuple):
    """What both solvers end with.

    Attributes:
        dictionary: W (p, r), an atom in each column. Signs, and the scale between W and H, are free: compare W H and W beta.
        codes: H (r, n), of the training columns.
        coefficients: (1, 1 + r + q): intercept, beta, and those of the covariates.
    """

    dictionary: Tensor
    codes: Tensor
    coefficients: Tensor


@exact
def factor_objective(x: Tensor, labels: Tensor, covariates: Tensor, factors: Factors, *, model: Model, xi: float) -> Objective:
    """F of the factors, see the head of the file.

    Args:
        x: (p, n) data.
        labels: (1, n) of 0 and 1, in the dtype of ``x``.
        covariates: (q, n); q = 0 where there are none.
        factors: W, H and the regression.
        model: What the regression sees: ``filter`` W^T X, ``feature`` H.
        xi: Weight of the reconstruction, >= 0.
    """
    features = factors.dictionary.T @ x if model == "filter" else factors.codes
    classification = logistic_loss(linear_scores(features, covariates, factors.coefficients), labels)
    reconstruction = (x - factors.dictionary @ factors.codes).square().sum()
    return Objective(classification + xi * reconstruction, classification, reconstruction)


def random_factors(features: int, rows: int, covariates: int, rank: int, generator: torch.Generator) -> Factors:
    """Where a fit starts: W and H uniform in [0, 1), then ||W||_F = 1, beta uniform in [-1, 1), the rest 0.

    Args:
        features: p.
        rows: n.
        covariates: q.
        rank: r.
        generator: For r (p + n + 1) draws.

    Returns:
        float64 on the generator's device.
    """
    draws = torch.rand(rank, features + rows + 1, generator=generator, dtype=torch.float64, device=generator.device)
    dictionary, codes, beta = draws[:, :features].T, draws[:, features:-1], 2 * draws[:, -1:].T - 1
    zeros = beta.new_zeros(1, 1 + covariates)
    return Factors(dictionary / dictionary.norm(), codes.clone(), torch.cat([zeros[:, :1], beta, zeros[:, 1:]], dim=1))


# ---- LPGD ------------------------------------------------------------------------------------------------------------------------------


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


# ---- BCD -------------------------------------------------------------------------------------------------------------------------------


def search_radius(iteration: int, constant: float | None, decay: float = 1.0) -> float | None:
    """r_t = c (t + 1)^(-beta) / log(t + 2), t = 0, 1, ...; None where c is None: no limit."""
    return None if constant is None else constant * (iteration + 1) ** -decay / math.log(iteration + 2)


def _within_radius(change: Tensor, radius: float | None, norm: Tensor) -> Tensor:
    """The change, shortened to the radius where its norm is larger."""
    return change if radius is None else change * (radius / norm.clamp(min=radius))


def _penalty(values: Tensor, l1: float, l2: float) -> Tensor:
    return l1 * values.sign() + l2 * values


@exact
def update_codes(
    x: Tensor,
    dictionary: Tensor,
    codes: Tensor,
    *,
    sweeps: int = 2,
    radius: float | None = None,
    l1: float = 0.0,
    l2: float = 0.0,
    nonnegative: bool = True,
) -> Tensor:
    """Sweeps over the rows of H, each by the gradient g_k = (W^T W)_k H - (W^T X)_k + l1 sign(H_k) + l2 H_k of the reconstruction alone.

    The step is 1 / ((W^T W)_kk + 1). Rows follow each other, as each sees what became of those before; columns go together.

    Args:
        x: (p, n) data.
        dictionary: W (p, r).
        codes: H (r, n) to start from.
        sweeps: Passes over the rows.
        radius: Largest norm of a row's change; None: no limit.
        l1: Weight of the L1 term.
        l2: Weight of the L2 term.
        nonnegative: Clip at 0 behind each row.

    Returns:
        New H (r, n).
    """
    gram, target, codes = dictionary.T @ dictionary, dictionary.T @ x, codes.clone()
    for _ in range(sweeps):
        for k in range(len(codes)):
            gradient = gram[k] @ codes - target[k] + _penalty(codes[k], l1, l2)
            change = gradient / (gram[k, k] + 1)
            row = codes[k] - _within_radius(change, radius, change.norm())
            codes[k] = row.clamp(min=0) if nonnegative else row
    return codes


@exact
def update_dictionary(
    x: Tensor,
    labels: Tensor,
    covariates: Tensor,
    factors: Factors,
    *,
    xi: float,
    inner_steps: int = 5,
    radius: float | None = None,
    l1: float = 0.0,
    l2: float = 0.0,
    nonnegative: bool = True,
) -> Tensor:
    """Gradient steps on W in the filter model, where W stands in both terms of the objective.

    G = xi (W H - X) H^T + X (P - Y)^T beta^T + l1 sign(W) + l2 W, with P of the W of this step; the i-th step is
    1 / (sqrt(i + 10) (tr(H H^T) + 1)), i = 0, 1, ... The reconstruction has xi here and 2 xi in LPGD, as in the authors' code.

    Args:
        x: (p, n) data.
        labels: (1, n) of 0 and 1.
        covariates: (q, n), q >= 0.
        factors: W to start from, H and the regression.
        xi: Weight of the reconstruction.
        inner_steps: How many steps.
        radius: Largest spectral norm of a step; None: no limit.
        l1: Weight of the L1 term.
        l2: Weight of the L2 term.
        nonnegative: Clip at 0 behind each step.

    Returns:
        New W (p, r), not normalised.
    """
    dictionary, codes, coefficients = factors
    beta = coefficients[:, 1 : 1 + len(codes)]
    gram, cross = codes @ codes.T, x @ codes.T
    for i in range(inner_steps):
        residual = torch.sigmoid(linear_scores(dictionary.T @ x, covariates, coefficients)) - labels
        gradient = xi * (dictionary @ gram - cross) + (x @ residual.T) @ beta + _penalty(dictionary, l1, l2)
        change = gradient / (math.sqrt(i + 10) * (gram.trace() + 1))
        if radius is not None:
            change = _within_radius(change, radius, torch.linalg.matrix_norm(change, 2))
        dictionary = dictionary - change
        dictionary = dictionary.clamp(min=0) if nonnegative else dictionary
    return dictionary


@exact
def update_codes_supervised(
    x: Tensor,
    labels: Tensor,
    covariates: Tensor,
    factors: Factors,
    *,
    xi: float,
    sweeps: int = 2,
    radius: float | None = None,
    l1: float = 0.0,
    l2: float = 0.0,
    nonnegative: bool = True,
    columns: Tensor | None = None,
) -> Tensor:
    """Sweeps over the rows of H in the feature model, where H stands in both terms of the objective.

    g_k = xi ((W^T W)_k H - (W^T X)_k) + beta_k (P - Y) + l1 sign(H_k) + l2 H_k, with P of the H so far; the step of sweep i is
    1 / (sqrt(i + 10) ((W^T W)_kk + 1)).

    Args:
        x: (p, n) data.
        labels: (1, n) of 0 and 1, or guesses.
        covariates: (q, n), q >= 0.
        factors: W, H to start from and the regression.
        xi: Weight of the reconstruction.
        sweeps: Passes over the rows.
        radius: Largest norm of a row's change; None: no limit.
        l1: Weight of the L1 term.
        l2: Weight of the L2 term.
        nonnegative: Clip at 0 behind each row.
        columns: (r, m) int64: which columns each row changes, drawn by the caller; None: all.

    Returns:
        New H (r, n).
    """
    dictionary, codes, coefficients = factors
    gram, target, codes = dictionary.T @ dictionary, dictionary.T @ x, codes.clone()
    offset = linear_scores(codes.new_zeros(codes.shape), covariates, coefficients)[0]
    beta = coefficients[0, 1 : 1 + len(codes)]
    for i in range(sweeps):
        for k in range(len(codes)):
            residual = torch.sigmoid(offset + beta @ codes) - labels[0]
            gradient = xi * (gram[k] @ codes - target[k]) + beta[k] * residual + _penalty(codes[k], l1, l2)
            if columns is not None:
                gradient = torch.zeros_like(gradient).index_copy_(0, columns[k], gradient[columns[k]])
            change = gradient / (math.sqrt(i + 10) * (gram[k, k] + 1))
            row = codes[k] - _within_radius(change, radius, change.norm())
            codes[k] = row.clamp(min=0) if nonnegative else row
    return codes


@exact
def bcd_step(
    x: Tensor,
    labels: Tensor,
    covariates: Tensor,
    factors: Factors,
    *,
    model: Model,
    xi: float,
    radius: float | None = None,
    l1: float = 0.0,
    l2: float = 0.0,
    nonnegative: bool = True,
    columns: Tensor | None = None,
) -> Factors:
    """One outer iteration: W, H, regression (filter), or W, regression, H (feature). ||W||_F = 1 behind it; H isn't rescaled with W.

    Args:
        x: (p, n) data.
        labels: (1, n) of 0 and 1.
        covariates: (q, n), q >= 0.
        factors: W, H and the regression before.
        model: ``filter`` or ``feature``.
        xi: Weight of the reconstruction.
        radius: Largest change of a block's step, see :func:`search_radius`; None: no limit.
        l1: Weight of the L1 term of W and of H.
        l2: Weight of the L2 term of W and of H.
        nonnegative: W, H >= 0.
        columns: (r, m) int64, the columns that the feature model's codes change in; None: all. The filter model doesn't look at it.

    Returns:
        The factors behind it.
    """
    options = {"radius": radius, "l1": l1, "l2": l2, "nonnegative": nonnegative}
    if model == "filter":
        dictionary = _normalised(update_dictionary(x, labels, covariates, factors, xi=xi, **options))  # type: ignore[arg-type]
        codes = update_codes(x, dictionary, factors.codes, **options)  # type: ignore[arg-type]
        return Factors(dictionary, codes, fit_regression(dictionary.T @ x, covariates, labels))
    dictionary = _normalised(update_codes(x.T, factors.codes.T, factors.dictionary.T, **options).T)  # type: ignore[arg-type]
    fitted = Factors(dictionary, factors.codes, fit_regression(factors.codes, covariates, labels))
    codes = update_codes_supervised(x, labels, covariates, fitted, xi=xi, columns=columns, **options)  # type: ignore[arg-type]
    return fitted._replace(codes=codes)


def _normalised(dictionary: Tensor) -> Tensor:
    """W / ||W||_F; a W of zeros, as clipping may leave it, stays."""
    norm = dictionary.norm()
    return dictionary / torch.where(norm > 0, norm, 1.0)


# ---- prediction ------------------------------------------------------------------------------------------------------------------------


@exact
def alternating_codes(x: Tensor, covariates: Tensor, factors: Factors, *, xi: float, nonnegative: bool, rounds: int = 200) -> Tensor:
    """Codes of unlabelled columns by turns: guess the label from the code, then move the code as if the guess were right.

    Args:
        x: (p, m) data.
        covariates: (q, m), q >= 0.
        factors: W, H of the columns to start from, and the regression.
        xi: Weight of the reconstruction.
        nonnegative: H >= 0.
        rounds: Turns; the radius of turn t is 10 / (t + 1).

    Returns:
        H (r, m).
    """
    codes = factors.codes
    for t in range(rounds):
        guess = (linear_scores(codes, covariates, factors.coefficients) > 0).to(x)
        start = factors._replace(codes=codes)
        codes = update_codes_supervised(x, guess, covariates, start, xi=xi, sweeps=1, radius=10 / (t + 1), nonnegative=nonnegative)
    return codes


@exact
def exhaustive_codes(x: Tensor, covariates: Tensor, factors: Factors, *, xi: float, nonnegative: bool, sweeps: int = 200) -> Tensor:
    """Codes of unlabelled columns that fit best to either label: both are tried, the smaller l(y, a) + xi ||x - W h||^2 wins.

    Args:
        x: (p, m) data.
        covariates: (q, m), q >= 0.
        factors: W, H of the columns to start from, and the regression.
        xi: Weight of the reconstruction.
        nonnegative: H >= 0.
        sweeps: Passes over the rows for each label.

    Returns:
        H (r, m). A tie goes to label 0.
    """
    codes, losses = [], []
    for label in (0.0, 1.0):
        labels = x.new_full((1, x.shape[1]), label)
        code = update_codes_supervised(x, labels, covariates, factors, xi=xi, sweeps=sweeps, nonnegative=nonnegative)
        scores = linear_scores(code, covariates, factors.coefficients)
        own = F.binary_cross_entropy_with_logits(scores, labels, reduction="none")[0]
        codes.append(code)
        losses.append(own + xi * (x - factors.dictionary @ code).square().sum(0))
    return torch.where(losses[1] < losses[0], codes[1], codes[0])


@exact
def predict_probability(
    x: Tensor,
    covariates: Tensor,
    factors: Factors,
    *,
    model: Model,
    xi: float = 1.0,
    prediction: Prediction = "naive",
    nonnegative: bool = False,
) -> Tensor:
    """Probability of label 1 for new columns.

    Filter: sigmoid(beta^T W^T x + Gamma z). Feature: the regression on codes, which are found without the label (``naive``), by guesses of
    it in turns (``alternating``) or by trying both (``exhaustive``).

    Args:
        x: (p, m) data.
        covariates: (q, m), q >= 0.
        factors: W and the regression; H isn't looked at.
        model: ``filter`` or ``feature``.
        xi: Weight of the reconstruction, for the last two ways.
        prediction: How the feature model finds codes.
        nonnegative: Codes >= 0: after BCD, not after LPGD.

    Returns:
        (m,) in [0, 1].
    """
    if model == "filter":
        features = factors.dictionary.T @ x
    else:
        features = code_columns(x, factors.dictionary, nonnegative=nonnegative)
        if prediction == "alternating":
            features = alternating_codes(x, covariates, factors._replace(codes=features), xi=xi, nonnegative=nonnegative)
        elif prediction == "exhaustive":
            features = exhaustive_codes(x, covariates, factors._replace(codes=features), xi=xi, nonnegative=nonnegative)
    return torch.sigmoid(linear_scores(features, covariates, factors.coefficients))[0]


__all__ = [
    "alternating_codes",
    "bcd_step",
    "best_low_rank",
    "decayed_step_size",
    "exhaustive_codes",
    "factor_objective",
    "lift_factors",
    "lpgd_curvature",
    "lpgd_objective",
    "lpgd_step",
    "predict_probability",
    "random_factors",
    "recover_factors",
    "search_radius",
    "svd_factors",
    "update_codes",
    "update_codes_supervised",
    "update_dictionary",
]
