"""A scaling law for sparse models, ours: the functional form of CAST's (arXiv:2509.25996) could not be read.

The forms are common ones: a power law in tokens per model size, and the sum of two power laws of Hoffmann et al. (arXiv:2203.15556, eq. 2).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import least_squares

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ScalingLaw:
    """L(N, D) = floor + size_factor / N^size_exponent + token_factor / D^token_exponent.

    Attributes:
        floor: L_inf, or E: loss with endless size and tokens.
        token_factor: B.
        token_exponent: beta, or b.
        size_factor: A; 0 for the law of one model size.
        size_exponent: a; 0 for the law of one model size.
        residual: Root mean square of log(predicted / measured) over the fitted points.
    """

    floor: float
    token_factor: float
    token_exponent: float
    size_factor: float = 0.0
    size_exponent: float = 0.0
    residual: float = 0.0

    def predict(self, tokens: ArrayLike, sizes: ArrayLike | None = None) -> Floats:
        """Loss at numbers of tokens and, for the joint law, of parameters; they broadcast."""
        loss = self.floor + self.token_factor * np.asarray(tokens, float) ** -self.token_exponent
        if self.size_factor == 0:
            return loss
        if sizes is None:
            raise ValueError("this law depends on the size of the model: give sizes")
        return loss + self.size_factor * np.asarray(sizes, float) ** -self.size_exponent


def fit_scaling_law(tokens: ArrayLike, losses: ArrayLike, sizes: ArrayLike | None = None) -> ScalingLaw:
    """Least squares on log residuals, from several starting points.

    Args:
        tokens: (K,) tokens trained on, > 0.
        losses: (K,) losses in nats, > 0.
        sizes: (K,) parameters; None: all points are of one model size.

    Returns:
        The best fit; all factors and exponents are >= 0.

    Raises:
        ValueError: Values that aren't positive or don't fit together, or fewer points than the law has numbers (3, jointly 5).
    """
    d, loss = np.asarray(tokens, float), np.asarray(losses, float)
    n = None if sizes is None else np.asarray(sizes, float)
    columns = [d, loss] if n is None else [d, loss, n]
    if any(column.shape != loss.shape or column.ndim != 1 or not (column > 0).all() for column in columns):
        raise ValueError("tokens, losses and sizes must be lists of equal length of numbers above 0")
    needed = 3 if n is None else 5
    if len(loss) < needed:
        raise ValueError(f"{len(loss)} points can't settle a law of {needed} numbers: give at least {needed}")
    d_unit, n_unit = np.exp(np.log(d).mean()), 1.0 if n is None else np.exp(np.log(n).mean())

    def predicted(x: Floats) -> Floats:
        """At (log floor, log factor at the mean, exponent, ...): units in which the numbers are of order 1."""
        loss = np.exp(x[0]) + np.exp(x[1]) * (d / d_unit) ** -x[2]
        return loss if n is None else loss + np.exp(x[3]) * (n / n_unit) ** -x[4]

    lowest = np.log(loss.min())
    best = None
    for share in (0.5, 0.9, 0.99):
        for exponent in (0.1, 0.3, 0.6):
            rest = lowest + np.log1p(-share)
            start = [lowest + np.log(share), rest, exponent] + ([] if n is None else [rest, exponent])
            bounds = ([-40.0, -40.0, 0.0, -40.0, 0.0][:needed], [5.0, 5.0, 3.0, 5.0, 3.0][:needed])
            fit = least_squares(lambda x: np.log(predicted(x) / loss), np.clip(start, *bounds), bounds=bounds, xtol=1e-14, ftol=1e-14)
            best = fit if best is None or fit.cost < best.cost else best
    assert best is not None
    x = best.x
    joint = {} if n is None else {"size_factor": float(np.exp(x[3]) * n_unit ** x[4]), "size_exponent": float(x[4])}
    residual = float(np.sqrt(np.mean(best.fun**2)))
    return ScalingLaw(float(np.exp(x[0])), float(np.exp(x[1]) * d_unit ** x[2]), float(x[2]), residual=residual, **joint)


def held_out_error(tokens: Sequence[float], losses: Sequence[float], sizes: Sequence[float] | None = None) -> float:
    """Fit without the points of the largest token budget, and predict them: root mean square of log(predicted / measured).

    Raises:
        ValueError: Too few points are left to fit.
    """
    d, loss = np.asarray(tokens, float), np.asarray(losses, float)
    n = None if sizes is None else np.asarray(sizes, float)
    test = d == d.max()
    law = fit_scaling_law(d[~test], loss[~test], None if n is None else n[~test])
    guess = law.predict(d[test], None if n is None else n[test])
    return float(np.sqrt(np.mean(np.log(guess / loss[test]) ** 2)))


__all__ = ["ScalingLaw", "fit_scaling_law", "held_out_error"]
