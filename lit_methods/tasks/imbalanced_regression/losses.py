"""Losses of regression with skewed labels. Pure functions."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

RegressionLoss = Literal["l1", "mse", "huber", "focal_l1", "focal_mse", "balanced_mse"]


def regression_loss(
    predictions: Tensor, targets: Tensor, weights: Tensor | None = None, loss: RegressionLoss = "l1", noise_sigma: float = 1.0
) -> Tensor:
    """Weighted mean of an elementwise loss, or balanced MSE.

    Args:
        predictions: Floating point, of any shape.
        targets: The same shape.
        weights: The same shape, >= 0; None: 1. The mean is over the elements, not over the weights.
        loss: ``l1``, ``mse``, ``huber`` (delta 1); ``focal_l1`` and ``focal_mse``: times 2 sigmoid(0.2 |e|) - 1, Focal-R of
            arXiv:2102.09554; ``balanced_mse``: cross-entropy of each prediction against all targets of the batch under Gaussian noise,
            times 2 sigma^2, the batch-based form of arXiv:2203.16427 (mem); it takes no weights.
        noise_sigma: Standard deviation of the noise that ``balanced_mse`` assumes, in the unit of the targets.

    Returns:
        Scalar in float32 or wider.

    Raises:
        ValueError: The shapes differ, ``loss`` is unknown, or ``balanced_mse`` gets weights.
    """
    if predictions.shape != targets.shape or (weights is not None and weights.shape != targets.shape):
        shapes = f"{tuple(predictions.shape)}, {tuple(targets.shape)}" + (f", {tuple(weights.shape)}" if weights is not None else "")
        raise ValueError(f"predictions, targets and weights must have one shape, got {shapes}")
    if loss == "balanced_mse" and weights is not None:
        raise ValueError("loss='balanced_mse' balances the labels itself and takes no weights: set reweight of the data to none")
    with torch.autocast(predictions.device.type, enabled=False):
        dtype = torch.promote_types(predictions.dtype, torch.float32)
        predictions, targets = predictions.to(dtype), targets.to(dtype)
        if loss == "balanced_mse":
            apart = (predictions.reshape(-1, 1) - targets.reshape(1, -1)).square() / (2 * noise_sigma**2)
            return 2 * noise_sigma**2 * F.cross_entropy(-apart, torch.arange(len(apart), device=apart.device))
        error = (predictions - targets).abs()
        if loss == "huber":
            each = F.huber_loss(predictions, targets, reduction="none")
        elif loss in ("l1", "focal_l1", "mse", "focal_mse"):
            each = error if loss.endswith("l1") else error.square()
        else:
            raise ValueError(f"loss={loss!r}: give l1, mse, huber, focal_l1, focal_mse or balanced_mse")
        if loss.startswith("focal"):
            each = each * (2 * (0.2 * error).sigmoid() - 1)
        return (each if weights is None else each * weights).mean()


__all__ = ["RegressionLoss", "regression_loss"]
