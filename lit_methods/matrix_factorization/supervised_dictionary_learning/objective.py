"""What supervised dictionary learning makes small: the objective of factors, and where a fit of them starts.

The symbols are those of :mod:`~lit_methods.matrix_factorization.supervised_dictionary_learning.core`.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_methods.matrix_factorization.regression import exact, linear_scores

Model = Literal["filter", "feature"]


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


__all__ = ["Factors", "Model", "Objective", "factor_objective", "logistic_loss", "random_factors"]
