"""The maths of supervised dictionary learning (arXiv:2206.06774): its symbols and solvers, and how labels are predicted.

Find W (p, r), H (r, n), beta (r) and Gamma (1 + q) that make

    F = sum_i l(y_i, a_i) + xi ||X - W H||_F^2,    l(y, a) = log(1 + e^a) - y a,

small, where the score of column i is a_i = beta^T W^T x_i + Gamma z_i in the ``filter`` model and beta^T h_i + Gamma z_i in the ``feature``
model, z_i = [1; covariates of column i]. Samples are the columns of all matrices in this file.

- **LPGD**, lifted low-rank projected gradient descent: gradient steps on A = W beta (filter) or beta^T H (feature), B = W H and Gamma, each
  followed by the best approximation of rank r of [A, B] or [A; B].
- **BCD**, block coordinate descent: W, H and the regression in turn, with W, H >= 0 and a search radius if wanted.

Golden vectors come from ljw9510/SDL@c6ae40f (src/SDL_SVP.py, src/SDL_BCD.py). Labels are 0 or 1; more classes, convex constraints on the
lifted variables and the update of xi by the noise are left out. The objective stands in ``objective.py``, LPGD in ``lifted.py``, BCD in
``blocks.py``, and all of their names can be had from here.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_methods.matrix_factorization.regression import code_columns, exact, linear_scores
from lit_methods.matrix_factorization.supervised_dictionary_learning.blocks import (
    bcd_step,
    search_radius,
    update_codes,
    update_codes_supervised,
    update_dictionary,
)
from lit_methods.matrix_factorization.supervised_dictionary_learning.lifted import (
    Lifted,
    LowRank,
    best_low_rank,
    combined,
    decayed_step_size,
    lift_factors,
    lifted_scores,
    lpgd_curvature,
    lpgd_objective,
    lpgd_step,
    recover_factors,
    svd_factors,
)
from lit_methods.matrix_factorization.supervised_dictionary_learning.objective import (
    Factors,
    Model,
    Objective,
    factor_objective,
    logistic_loss,
    random_factors,
)

Prediction = Literal["naive", "alternating", "exhaustive"]


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
    "Factors",
    "Lifted",
    "LowRank",
    "Model",
    "Objective",
    "Prediction",
    "alternating_codes",
    "bcd_step",
    "best_low_rank",
    "combined",
    "decayed_step_size",
    "exhaustive_codes",
    "factor_objective",
    "lift_factors",
    "lifted_scores",
    "logistic_loss",
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
