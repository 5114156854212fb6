"""BCD, block coordinate descent: W, H and the regression in turn.

The symbols are those of :mod:`~lit_methods.matrix_factorization.supervised_dictionary_learning.core`.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lit_methods.matrix_factorization.regression import exact, fit_regression, linear_scores
from lit_methods.matrix_factorization.supervised_dictionary_learning.objective import Factors, Model


def search_radius(iteration: int, constant: float | None, decay: float = 1.0) -> float | None:
    """r_t = c (t + 1)^(-beta) / log(t + 2), t = 0, 1, ...; None where c is None: no limit."""
    return None if constant is None else constant * (iteration + 1) ** -decay / math.log(iteration + 2)


def _moved(block: Tensor, change: Tensor, radius: float | None, nonnegative: bool) -> Tensor:
    """A row or a matrix minus its change, which is shortened to the radius where its (spectral) norm is larger."""
    if radius is not None:
        norm = change.norm() if change.ndim == 1 else torch.linalg.matrix_norm(change, 2)
        change = change * (radius / norm.clamp(min=radius))
    block = block - change
    return block.clamp(min=0) if nonnegative else block


def _swept(codes: Tensor, change: Callable[[Tensor, int, int], Tensor], sweeps: int, radius: float | None, nonnegative: bool) -> Tensor:
    """H after sweeps over its rows: row k of sweep i moves by ``change(H so far, i, k)``."""
    codes = codes.clone()
    for i in range(sweeps):
        for k in range(len(codes)):
            codes[k] = _moved(codes[k], change(codes, i, k), radius, nonnegative)
    return codes


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
    gram, target = dictionary.T @ dictionary, dictionary.T @ x

    def change(codes: Tensor, _: int, k: int) -> Tensor:
        return (gram[k] @ codes - target[k] + _penalty(codes[k], l1, l2)) / (gram[k, k] + 1)

    return _swept(codes, change, sweeps, radius, nonnegative)


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
        dictionary = _moved(dictionary, change, radius, nonnegative)
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
    gram, target = dictionary.T @ dictionary, dictionary.T @ x
    offset = linear_scores(codes.new_zeros(codes.shape), covariates, coefficients)[0]
    beta = coefficients[0, 1 : 1 + len(codes)]

    def change(codes: Tensor, i: int, k: int) -> Tensor:
        residual = torch.sigmoid(offset + beta @ codes) - labels[0]
        gradient = xi * (gram[k] @ codes - target[k]) + beta[k] * residual + _penalty(codes[k], l1, l2)
        if columns is not None:
            gradient = torch.zeros_like(gradient).index_copy_(0, columns[k], gradient[columns[k]])
        return gradient / (math.sqrt(i + 10) * (gram[k, k] + 1))

    return _swept(codes, change, sweeps, radius, nonnegative)


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


__all__ = ["bcd_step", "search_radius", "update_codes", "update_codes_supervised", "update_dictionary"]
