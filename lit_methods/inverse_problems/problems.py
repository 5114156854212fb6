"""Bilevel problems: hyperparameters of a lower level, judged by an upper one. theta enters through exp, so that any real number is allowed.

Each is made from a batch, a dictionary of float64 tensors, and knows where to begin. Constants mu and L are bounds that hold for every x.
"""

import math
from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_methods.inverse_problems.bilevel import BilevelProblem

Batch = Mapping[str, Tensor]
Name = Literal["quadratic", "weight_decay", "tv", "experts"]
_KERNEL = 5  # side of a filter


def _needs(batch: Batch, name: str, *keys: str) -> list[Tensor]:
    if missing := [key for key in keys if key not in batch]:
        raise ValueError(
            f"problem={name!r} needs a batch with {', '.join(keys)}, but {', '.join(missing)} isn't in it: it has {list(batch)}"
        )
    found = [batch[key] for key in keys]
    if not all(bool(value.isfinite().all()) for value in found if value.is_floating_point()):
        raise ValueError(f"problem={name!r}: {', '.join(keys)} hold a NaN or an infinity")
    return [value.double() if value.is_floating_point() else value for value in found]


class Quadratic:
    """h = |A2 x + A3 theta - b2|^2 / 2 and g = |A1 x - b1|^2 / 2.

    Args:
        batch: ``A1``, ``A2`` (k, n), ``A3`` (k, m), ``b1``, ``b2`` (k,), with or without a first dimension of 1.
    """

    def __init__(self, batch: Batch) -> None:
        found = _needs(batch, "quadratic", "A1", "A2", "A3", "b1", "b2")
        self.a1, self.a2, self.a3, self.b1, self.b2 = (
            value[0] if value.ndim > wanted else value for value, wanted in zip(found, (2, 2, 2, 1, 1), strict=True)
        )
        eigenvalues = torch.linalg.eigvalsh(self.a2.T @ self.a2)
        self.mu, self.smoothness = float(eigenvalues[0]), float(eigenvalues[-1])
        if self.mu <= 1e-12 * self.smoothness:
            raise ValueError("A2^T A2 is singular, so that the lower level has no single solution: give more rows than columns")
        self.upper_smoothness = float(torch.linalg.eigvalsh(self.a1.T @ self.a1)[-1])

    def lower(self, x: Tensor, theta: Tensor) -> Tensor:
        """The lower loss h."""
        return (self.a2 @ x + self.a3 @ theta - self.b2).square().sum() / 2

    def upper(self, x: Tensor) -> Tensor:
        """The upper loss g."""
        return (self.a1 @ x - self.b1).square().sum() / 2

    def constants(self, theta: Tensor) -> tuple[float, float]:
        """The smallest and the largest eigenvalue of A2^T A2."""
        return self.mu, self.smoothness

    def start(self) -> tuple[Tensor, Tensor]:
        """Where to begin: theta = 1, x = 0."""
        return self.b2.new_ones(self.a3.shape[1]), self.b2.new_zeros(self.a2.shape[1])

    def gap(self, theta: Tensor) -> Tensor:
        """f(theta) - min f, in closed form."""
        inverse = torch.linalg.pinv(self.a2)
        linear, constant = -self.a1 @ inverse @ self.a3, self.a1 @ inverse @ self.b2 - self.b1
        best = torch.linalg.lstsq(linear, -constant[:, None]).solution[:, 0]
        values = [(linear @ one + constant).square().sum() / 2 for one in (theta, best)]
        return values[0] - values[1]


class WeightDecay:
    """Multinomial logistic regression with a weight decay of its own for each weight, chosen by validation rows.

    h = CE(X W, y) + sum_i e^theta_i W_i^2 / 2, g = CE(X_val W, y_val), CE the mean cross-entropy.

    Args:
        batch: ``features`` (n, p), ``label`` (n,), ``val_features``, ``val_label``, with or without a first dimension of 1.
    """

    def __init__(self, batch: Batch) -> None:
        found = _needs(batch, "weight_decay", "features", "label", "val_features", "val_label")
        self.x, self.y, self.val_x, self.val_y = (
            value[0] if value.ndim > wanted else value for value, wanted in zip(found, (2, 1, 2, 1), strict=True)
        )
        self.classes = int(torch.cat([self.y, self.val_y]).max()) + 1
        self.curvature, self.upper_smoothness = (float(torch.linalg.matrix_norm(x, 2)) ** 2 / (2 * len(x)) for x in (self.x, self.val_x))

    def lower(self, x: Tensor, theta: Tensor) -> Tensor:
        """The lower loss h."""
        return F.cross_entropy(self.x @ x, self.y) + (theta.exp() * x.square()).sum() / 2

    def upper(self, x: Tensor) -> Tensor:
        """The upper loss g."""
        return F.cross_entropy(self.val_x @ x, self.val_y)

    def constants(self, theta: Tensor) -> tuple[float, float]:
        """The smallest decay; the largest, and the curvature of the cross-entropy, at most |X|^2 / (2 n)."""
        decay = theta.exp()
        return float(decay.min()), float(decay.max()) + self.curvature

    def start(self) -> tuple[Tensor, Tensor]:
        """Where to begin: theta = -3, x = 0."""
        shape = self.x.shape[1], self.classes
        return self.x.new_full(shape, -3.0), self.x.new_zeros(shape)

    def gap(self, theta: Tensor) -> None:
        """Not known."""


class TotalVariation:
    """Denoising by smoothed total variation, its weight and smoothing learned.

    h = [|x - y|^2 / 2 + e^theta_0 / 2 sum sqrt((D x)^2 + e^(2 theta_1))] / N with forward differences D in both directions, and
    g = |x - clean|^2 / (2 N), N images.

    Args:
        batch: ``noisy`` and ``clean`` (N, 1, H, W).
    """

    def __init__(self, batch: Batch) -> None:
        self.noisy, self.clean = _needs(batch, "tv", "noisy", "clean")
        self.upper_smoothness = 1 / len(self.noisy)

    def lower(self, x: Tensor, theta: Tensor) -> Tensor:
        """The lower loss h."""
        slopes = (x.diff(dim=-1), x.diff(dim=-2))
        variation = torch.stack([(slope.square() + (2 * theta[1]).exp()).sqrt().sum() for slope in slopes]).sum()
        return ((x - self.noisy).square().sum() / 2 + theta[0].exp() / 2 * variation) / len(x)

    def upper(self, x: Tensor) -> Tensor:
        """The upper loss g."""
        return (x - self.clean).square().sum() / (2 * len(x))

    def constants(self, theta: Tensor) -> tuple[float, float]:
        """1 / N and (1 + 4 e^(theta_0 - theta_1)) / N, as |D^T D| <= 8."""
        weight, smoothing = theta.tolist()
        return 1 / len(self.noisy), (1 + 4 * math.exp(weight - smoothing)) / len(self.noisy)

    def start(self) -> tuple[Tensor, Tensor]:
        """Where to begin: theta = (-5, -5), x = noisy."""
        return self.noisy.new_full((2,), -5.0), self.noisy.clone()

    def gap(self, theta: Tensor) -> None:
        """Not known."""


class FieldOfExperts:
    """Denoising by learned filters.

    h = [|x - y|^2 / 2 + e^theta_0 / 2 sum_i e^theta_i sum sqrt((k_i * x)^2 + e^(2 theta_(i + K)))] / N, kernels k_i of 5 x 5 over mirrored
    edges learned, too; g as in :class:`TotalVariation`.

    Args:
        batch: ``noisy`` and ``clean`` (N, 1, H, W).
        filters: K.
        seed: Of the first kernels: Xavier uniform, less their mean.
    """

    def __init__(self, batch: Batch, filters: int = 10, seed: int = 0) -> None:
        self.noisy, self.clean = _needs(batch, "experts", "noisy", "clean")
        self.upper_smoothness, self.filters, self.seed = 1 / len(self.noisy), filters, seed

    def _parts(self, theta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        scale, weights, smoothing, kernels = theta.split([1, self.filters, self.filters, self.filters * _KERNEL**2])
        return scale, weights, smoothing, kernels.view(self.filters, 1, _KERNEL, _KERNEL)

    def lower(self, x: Tensor, theta: Tensor) -> Tensor:
        """The lower loss h."""
        scale, weights, smoothing, kernels = self._parts(theta)
        answers = F.conv2d(F.pad(x, [_KERNEL // 2] * 4, mode="reflect"), kernels)
        experts = (answers.square() + (2 * smoothing).exp()[:, None, None]).sqrt().sum((0, 2, 3))
        return ((x - self.noisy).square().sum() / 2 + scale.exp()[0] / 2 * (weights.exp() * experts).sum()) / len(x)

    def upper(self, x: Tensor) -> Tensor:
        """The upper loss g."""
        return (x - self.clean).square().sum() / (2 * len(x))

    def constants(self, theta: Tensor) -> tuple[float, float]:
        """1 / N and (1 + 2 e^theta_0 sum_i e^(theta_i - theta_(i+K)) |k_i|_1^2) / N, as |k * x| <= 2 |k|_1 |x| with mirrored edges."""
        scale, weights, smoothing, kernels = self._parts(theta)
        sizes = kernels.abs().sum((1, 2, 3)).square()
        curvature = 2 * float(scale.exp()) * float(((weights - smoothing).exp() * sizes).sum())
        return 1 / len(self.noisy), (1 + curvature) / len(self.noisy)

    def start(self) -> tuple[Tensor, Tensor]:
        """Scale 0, weights -3, smoothing -3.5; x = noisy."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            kernels = nn.init.xavier_uniform_(torch.empty(self.filters, 1, _KERNEL, _KERNEL, dtype=torch.float64))
        kernels -= kernels.mean((1, 2, 3), keepdim=True)
        ends = torch.zeros(1), torch.full((self.filters,), -3.0), torch.full((self.filters,), -3.5)
        return torch.cat([*(end.double() for end in ends), kernels.flatten()]).to(self.noisy.device), self.noisy.clone()

    def gap(self, theta: Tensor) -> None:
        """Not known."""


Problem = Quadratic | WeightDecay | TotalVariation | FieldOfExperts


def make_problem(name: Name, batch: Batch, filters: int = 10, seed: int = 0) -> Problem:
    """The problem of a batch."""
    if name == "experts":
        return FieldOfExperts(batch, filters, seed)
    made: dict[str, type[Quadratic] | type[WeightDecay] | type[TotalVariation]] = {
        "quadratic": Quadratic,
        "weight_decay": WeightDecay,
        "tv": TotalVariation,
    }
    return made[name](batch)


__all__ = ["BilevelProblem", "FieldOfExperts", "Problem", "Quadratic", "TotalVariation", "WeightDecay", "make_problem"]
