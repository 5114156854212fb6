"""FDS: feature distribution smoothing for regression with skewed labels (arXiv:2102.09554).

Golden vectors come from YyzHarry/imbalanced-regression@a6fdc45, agedb-dir/fds.py and utils.py (``calibrate_mean_var``). The Callback is
:class:`lit_methods.callbacks.FDS`.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_methods.tasks.imbalanced_regression.weights import Kernel, smoothing_kernel


@dataclass(frozen=True)
class Buckets:
    """Where labels fall: one bucket for each whole number from ``first`` to ``last``.

    Labels beyond an end belong to the end's bucket only if the end label itself occurs among the labels of the same call, as in the
    authors' code.
    """

    first: int
    last: int

    def __post_init__(self) -> None:
        if not 0 <= self.first <= self.last:
            raise ValueError(f"buckets run from {self.first} to {self.last}: give 0 <= first <= last")

    def __len__(self) -> int:
        return self.last - self.first + 1

    def places(self, labels: Tensor) -> Tensor:
        """(N,) numbers -> (N,) int64: 0 below the first bucket, 1 to ``len`` inside, ``len + 1`` above. Whole parts count."""
        return (labels.floor().long() - self.first + 1).clamp(0, len(self) + 1)


@dataclass(frozen=True)
class Moments:
    """Number, mean and sum of squared deviations of the features at each of ``len(buckets) + 2`` places, float64."""

    count: Tensor
    mean: Tensor
    square: Tensor

    def __add__(self, other: "Moments") -> "Moments":
        """Moments of both sets together: Chan, Golub and LeVeque's rule."""
        count = self.count + other.count
        share = torch.where(count > 0, other.count / count.clamp(min=1), 0)[:, None]
        apart = other.mean - self.mean
        return Moments(count, self.mean + apart * share, self.square + other.square + apart.square() * share * self.count[:, None])


class MomentSums:
    """Moments of features that come bit by bit, in memory that doesn't grow: sums about the first row of each place.

    The first row is near the others, so that little is lost when the square of the sum is taken off; columns that are constant at a place
    have exactly no deviation.

    Args:
        number: Number of places.
    """

    ROWS = 256  # at a time in float64: they stay in the cache

    def __init__(self, number: int) -> None:
        self.number = number
        self._count: Tensor | None = None

    @torch.no_grad()
    def add(self, features: Tensor, places: Tensor) -> None:
        """Take in (N, D) features at (N,) int64 places."""
        if self._count is None:
            self._count = torch.zeros(self.number, dtype=torch.float64, device=features.device)
            self._origin, self._sum, self._square = (self._count.new_zeros(self.number, features.shape[1]) for _ in range(3))
        for part, at in zip(features.detach().split(self.ROWS), places.split(self.ROWS), strict=True):
            wide = part.to(torch.float64, copy=True)
            number = at.bincount(minlength=self.number)
            if bool(((number > 0) & (self._count == 0)).any()):
                fresh = (self._count[at] == 0).nonzero()[:, 0]
                self._origin[at[fresh]] = wide[fresh]
            wide -= self._origin.index_select(0, at)
            self._sum.index_add_(0, at, wide)
            self._square.index_add_(0, at, wide.square_())
            self._count += number

    def moments(self) -> Moments | None:
        """Of everything so far; None before the first."""
        if self._count is None:
            return None
        shift = self._sum / self._count.clamp(min=1)[:, None]
        return Moments(self._count, self._origin + shift, (self._square - self._sum * shift).clamp_(min=0))


def moments(features: Tensor, places: Tensor, number: int) -> Moments:
    """Moments of features by place.

    Args:
        features: (N, D) floating point.
        places: (N,) int64 in 0 to ``number - 1``.
        number: Number of places.
    """
    sums = MomentSums(number)
    sums.add(features, places)
    result = sums.moments()
    assert result is not None
    return result


def pooled(found: Moments) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and variance of each bucket; what lies beyond an end joins the end's bucket if that isn't empty.

    Returns:
        (K,), (K, D) and (K, D) float64; the variance is unbiased, of a single sample 0.
    """
    inside = Moments(found.count[1:-1], found.mean[1:-1], found.square[1:-1])
    for end, beyond in ((0, 0), (-1, -1))[: len(inside.count)]:  # with a single bucket only what lies below joins
        joins = inside.count[end] > 0
        outer = Moments(*(torch.zeros_like(part) for part in (inside.count, inside.mean, inside.square)))
        outer.count[end] = found.count[beyond] * joins
        outer.mean[end] = found.mean[beyond]
        outer.square[end] = found.square[beyond] * joins
        inside = inside + outer
    return inside.count, inside.mean, inside.square / (inside.count - 1).clamp(min=1)[:, None]


@dataclass(frozen=True)
class FDSState:
    """Statistics of K buckets, (K, D) each, and how far the epochs have gone.

    Attributes:
        mean: Running mean.
        variance: Running variance.
        smoothed_mean: Means of the last epoch, smoothed over buckets.
        smoothed_variance: Variances of the last epoch, smoothed in the same way.
        epoch: Epochs whose start was seen: it begins at ``start_update``.
        begun: Whether features are calibrated from the running statistics; until then from mean 0 and variance 1.
    """

    mean: Tensor
    variance: Tensor
    smoothed_mean: Tensor
    smoothed_variance: Tensor
    epoch: int
    begun: bool


def initial_state(buckets: Buckets, dim: int, start_update: int = 0, dtype: torch.dtype = torch.float32) -> FDSState:
    """Means 0 and variances 1."""
    zeros, ones = torch.zeros(len(buckets), dim, dtype=dtype), torch.ones(len(buckets), dim, dtype=dtype)
    return FDSState(zeros, ones, zeros.clone(), ones.clone(), start_update, False)


def bucket_kernel(kernel: Kernel, size: int, sigma: float) -> Tensor:
    """(size,) float32, of sum 1."""
    window = torch.from_numpy(smoothing_kernel(kernel, size, sigma))
    return (window / window.sum()).float()


def begin_epoch(state: FDSState, epoch: int, window: Tensor) -> FDSState:
    """At the first call of a new epoch: smooth the running statistics over buckets, mirrored at the ends.

    Args:
        state: Statistics so far.
        epoch: Epoch of the training, from 0; anything but the one after ``state.epoch`` changes nothing.
        window: (size,) kernel of sum 1; its half must be shorter than the number of buckets.
    """
    if epoch != state.epoch + 1:
        return state
    half = len(window) // 2

    def smooth(values: Tensor) -> Tensor:
        padded = F.pad(values.T[:, None], (half, half), mode="reflect")
        return F.conv1d(padded, window.to(values).view(1, 1, -1))[:, 0].T

    return replace(state, smoothed_mean=smooth(state.mean), smoothed_variance=smooth(state.variance), epoch=epoch, begun=True)


def update(state: FDSState, found: Moments, epoch: int, start_update: int = 0, momentum: float = 0.9) -> FDSState:
    """Running statistics after an epoch: ``momentum * old + (1 - momentum) * new`` for each bucket that has samples.

    Args:
        state: Statistics so far, :func:`begin_epoch` of this epoch included.
        found: Moments of all training samples, with the places of :class:`Buckets`.
        epoch: Epoch of the training; before ``state.epoch`` nothing changes.
        start_update: In this epoch the new values are taken alone.
        momentum: In [0, 1].
    """
    if epoch < state.epoch:
        return state
    count, mean, variance = pooled(found)
    kept = 0.0 if epoch == start_update else momentum
    seen = (count > 0)[:, None].to(state.mean.device)
    new = [kept * old + (1 - kept) * now.to(old) for old, now in ((state.mean, mean), (state.variance, variance))]
    return replace(state, mean=torch.where(seen, new[0], state.mean), variance=torch.where(seen, new[1], state.variance))


def calibrate(
    features: Tensor,
    labels: Tensor,
    state: FDSState,
    buckets: Buckets,
    epoch: int,
    start_smooth: int = 1,
    clip: tuple[float, float] = (0.1, 10.0),
) -> Tensor:
    """Features with the mean and variance of their bucket replaced by the smoothed ones: (z - mu) sqrt(clamp(v_s / v)) + mu_s.

    Columns of variance 0 stay as they are, and so do samples of a bucket whose variances sum to less than 1e-10, and labels without
    a bucket.

    Args:
        features: (N, D) floating point.
        labels: (N,) numbers; whole parts count.
        state: Statistics so far.
        buckets: Where labels fall.
        epoch: Epoch of the training; before ``start_smooth`` nothing changes.
        start_smooth: First epoch that is smoothed.
        clip: Range of v_s / v, before the root.

    Returns:
        (N, D), a new tensor of the dtype of ``features``.
    """
    if epoch < start_smooth:
        return features
    with torch.autocast(features.device.type, enabled=False):
        mean, variance = (state.mean, state.variance) if state.begun else (torch.zeros_like(state.mean), torch.ones_like(state.variance))
        ratio = (state.smoothed_variance / variance.where(variance != 0, 1)).clamp(*clip).sqrt()
        moved = (variance != 0) & (variance.sum(1, keepdim=True) >= 1e-10)
        places = buckets.places(labels)
        ends = torch.zeros(len(buckets) + 2, dtype=torch.bool, device=labels.device).index_fill_(0, places, True)
        belongs = torch.where(places == 0, ends[1], torch.where(places == len(buckets) + 1, ends[-2] & (len(buckets) > 1), True))
        row = (places - 1).clamp(0, len(buckets) - 1)
        wide = features.to(torch.promote_types(features.dtype, state.mean.dtype))
        shifted = (wide - mean[row]) * ratio[row] + state.smoothed_mean[row]
        return torch.where(moved[row] & belongs[:, None], shifted, wide).to(features.dtype)


__all__ = ["MomentSums", "begin_epoch", "bucket_kernel", "calibrate", "initial_state", "moments", "pooled", "update"]
