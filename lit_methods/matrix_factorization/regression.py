"""What models of this family share: a logistic regression on a few features of each column, its threshold, codes of new columns.

Samples are the columns of all matrices in this file. The regression is scikit-learn's.
"""

import functools
import math
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor

Result = TypeVar("Result")


def exact(function: Callable[..., Result]) -> Callable[..., Result]:
    """Without a graph, and without autocast, which would multiply float32 matrices in bfloat16."""

    @functools.wraps(function)
    def inner(x: Tensor, *args: object, **kwargs: object) -> Result:
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            return function(x, *args, **kwargs)

    return inner


def with_intercept(covariates: Tensor) -> Tensor:
    """Z = [1; covariates]: (q, n) -> (1 + q, n)."""
    return torch.cat([covariates.new_ones(1, covariates.shape[1]), covariates])


@exact
def linear_scores(features: Tensor, covariates: Tensor, coefficients: Tensor) -> Tensor:
    """Scores: intercept + beta^T features + gamma^T covariates.

    Args:
        features: (r, n): W^T X (filter) or H (feature).
        covariates: (q, n), q >= 0.
        coefficients: (1, 1 + r + q).

    Returns:
        (1, n) scores a; sigmoid(a) is the probability of label 1.
    """
    return coefficients @ torch.cat([with_intercept(features), covariates])


def fit_regression(features: Tensor, covariates: Tensor, labels: Tensor) -> Tensor:
    """Logistic regression of the labels on [features; covariates], by scikit-learn with its defaults: L2 with C = 1, lbfgs, an intercept.

    Runs on the CPU: what moves there is (r + q, n).

    Args:
        features: (r, n).
        covariates: (q, n), q >= 0.
        labels: (1, n) of 0 and 1.

    Returns:
        (1, 1 + r + q) coefficients on the device and in the dtype of ``features``: intercept, features, covariates.

    Raises:
        ValueError: The labels are all the same.
    """
    classes = labels.unique()
    if len(classes) != 2:
        raise ValueError(f"all {labels.numel()} labels are {classes.tolist()}: a regression needs columns of both classes, 0 and 1")
    rows = torch.cat([features, covariates]).T.cpu().numpy()
    found = LogisticRegression().fit(rows, labels[0].cpu().numpy())
    return torch.from_numpy(np.hstack([found.intercept_[:, None], found.coef_])).to(features)


@exact
def code_columns(x: Tensor, dictionary: Tensor, *, nonnegative: bool, l1: float = 0.0, sweeps: int = 500) -> Tensor:
    """argmin_H ||X - W H||_F^2 / 2 + l1 ||H||_1, with H >= 0 where ``nonnegative``: codes of columns whose label isn't known.

    Exact coordinate descent, all columns together, whose error falls with each sweep; without both terms a pseudo-inverse.

    Args:
        x: (p, m) data.
        dictionary: W (p, r). Atoms of zeros get codes of zeros.
        nonnegative: H >= 0, as after BCD; LPGD has codes of both signs.
        l1: Weight of the L1 term, >= 0.
        sweeps: Passes over the rows.

    Returns:
        H (r, m).
    """
    if not nonnegative and l1 == 0:
        return torch.linalg.pinv(dictionary) @ x
    gram, target = dictionary.T @ dictionary, dictionary.T @ x
    codes = torch.zeros_like(target)
    scale = torch.where(gram.diagonal() > 0, gram.diagonal(), 1.0)
    for _ in range(sweeps):
        for k in range(len(codes)):
            row = codes[k] * gram[k, k] + target[k] - gram[k] @ codes
            codes[k] = ((row - l1).clamp(min=0) if nonnegative else F.softshrink(row, l1)) / scale[k]
    return codes


def best_threshold(labels: Tensor, probability: Tensor) -> Tensor:
    """The threshold on the training columns' probabilities with the largest TPR - FPR; the highest one where several are equal.

    Args:
        labels: (n,) of 0 and 1, both of which there must be.
        probability: (n,) of label 1.

    Returns:
        Scalar in the dtype of ``probability``; a column counts as 1 from it on. Infinity where no threshold is better than to call all 0.
    """
    falling, order = probability.sort(descending=True, stable=True)
    is_one = labels[order].to(torch.float64)
    true, false = is_one.cumsum(0) / is_one.sum(), (1 - is_one).cumsum(0) / (1 - is_one).sum()
    last_of_equal = torch.cat([falling[1:] != falling[:-1], torch.ones_like(falling[:1], dtype=torch.bool)])
    gain = torch.where(last_of_equal, true - false, -math.inf)
    best = gain.argmax()
    return torch.where(gain[best] > 0, falling[best], math.inf)


__all__ = ["best_threshold", "code_columns", "exact", "fit_regression", "linear_scores", "with_intercept"]
