"""FDS: feature distribution smoothing for regression with skewed labels (arXiv:2102.09554), attached to any module with features.

Golden vectors come from YyzHarry/imbalanced-regression@a6fdc45, agedb-dir/fds.py and utils.py (``calibrate_mean_var``).
"""

import dataclasses
import functools
import itertools
import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.hooks import RemovableHandle

from lit_methods.callbacks.batch import Key, find_in_batch
from lit_methods.callbacks.ordering import OrderedCallback
from lit_methods.callbacks.targets import select_modules
from lit_methods.distributed import gather_rows
from lit_methods.tasks.imbalanced_regression.weights import Kernel, smoothing_kernel

# ---- the maths -------------------------------------------------------------------------------------------------------------------------


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
        """Of both sets together: Chan, Golub and LeVeque's rule."""
        count = self.count + other.count
        share = torch.where(count > 0, other.count / count.clamp(min=1), 0)[:, None]
        apart = other.mean - self.mean
        return Moments(count, self.mean + apart * share, self.square + other.square + apart.square() * share * self.count[:, None])


def moments(features: Tensor, places: Tensor, number: int) -> Moments:
    """Moments of features by place.

    Args:
        features: (N, D) floating point.
        places: (N,) int64 in 0 to ``number - 1``.
        number: Of places.
    """
    wide = features.detach().double()
    count = torch.zeros(number, dtype=torch.float64, device=wide.device).index_add_(0, places, torch.ones_like(wide[:, 0]))
    mean = wide.new_zeros(number, wide.shape[1]).index_add_(0, places, wide) / count.clamp(min=1)[:, None]
    square = torch.zeros_like(mean).index_add_(0, places, (wide - mean[places]).square())
    return Moments(count, mean, square)


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
        smoothed_variance: Likewise.
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
        state: So far.
        epoch: Of the training, from 0; anything but the one after ``state.epoch`` changes nothing.
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
        state: So far, :func:`begin_epoch` of this epoch included.
        found: Moments of all training samples, with the places of :class:`Buckets`.
        epoch: Before ``state.epoch`` nothing changes.
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
        epoch: Before ``start_smooth`` nothing changes.
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


# ---- the wiring ------------------------------------------------------------------------------------------------------------------------


class FDS(OrderedCallback):
    """Gives the features of every label the statistics of its neighbours, in the training of any regression module.

    Runs: at the end of each training epoch from ``start_update`` on, a pass over the training set collects features, in eval mode, without
    gradient and without a draw from the global generators, and the running mean and variance of each bucket of labels are updated. From
    epoch ``start_smooth`` on a forward hook calibrates what ``features`` puts out in training; callbacks that see it afterwards, such as
    ``ConR``, see it calibrated. Validation and test are left alone. Under DDP each rank collects a share, and all have the same statistics.
    Needs: a submodule that puts out (B, D), or (B, C, h, w) with a label for each of the h x w places; labels in the batch; a ``forward``
    that takes the input of a batch; a training set with a length.
    Logs: nothing.
    Saves: the statistics.
    With ``limit_train_batches`` the pass is limited to as many batches. It reads with as many workers as the training loader, and sees the
    augmentation of the first epoch.

    Args:
        features: Name or ``fnmatch`` pattern of the submodule before the regressor; it must match one.
        inputs: Key or position of the module's input in the batch; None: ``image`` of a dictionary, 0 of a sequence.
        labels: Key or position of the labels; None: ``target`` of a dictionary, 1 of a sequence.
        first_bucket: Bucket of the smallest labels; AgeDB: 3.
        last_bucket: Of the largest; the authors: 99.
        bucket_width: Labels per bucket, in their unit: 1 year, 0.1 metres.
        start_update: First epoch whose features count.
        start_smooth: First epoch that is calibrated, after ``start_update``.
        kernel: Of the smoothing over buckets: ``gaussian``, ``triang`` or ``laplace``.
        kernel_size: In buckets, odd.
        sigma: Of the kernel, in buckets.
        momentum: Share of the old statistics.
        collect_every: Every which training sample takes part in the pass; above 1 for large sets (the authors: 600 images for depth).
        clip: Range of the ratio of smoothed to running variance; the authors: 0.1 to 10 for ages, 0.2 to 5 for depth, 0.5 to 2 for
            sentences.

    Raises:
        ValueError: A value lies outside its range.
    """

    runs_before = ("lit_methods.callbacks.LossTerm", "lightning.pytorch.callbacks.Checkpoint")

    def __init__(
        self,
        features: str = "backbone",
        inputs: Key = None,
        labels: Key = None,
        first_bucket: int = 0,
        last_bucket: int = 99,
        bucket_width: float = 1.0,
        start_update: int = 0,
        start_smooth: int = 1,
        kernel: Kernel = "gaussian",
        kernel_size: int = 5,
        sigma: float = 2.0,
        momentum: float = 0.9,
        collect_every: int = 1,
        clip: tuple[float, float] = (0.1, 10.0),
    ) -> None:
        super().__init__()
        if not 0 <= start_update < start_smooth:
            raise ValueError(f"start_smooth={start_smooth} must come after start_update={start_update}, which is 0 or more")
        if bucket_width <= 0 or collect_every < 1 or not 0 <= momentum <= 1:
            raise ValueError(
                f"bucket_width={bucket_width} must be above 0, collect_every={collect_every} 1 or more, momentum={momentum} from 0 to 1"
            )
        if not 0 < clip[0] <= clip[1]:
            raise ValueError(f"clip={tuple(clip)} is a range of ratios: give two numbers above 0, the smaller one first")
        self.buckets = Buckets(first_bucket, last_bucket)
        if kernel_size // 2 >= len(self.buckets):
            raise ValueError(f"kernel_size={kernel_size} is too wide for {len(self.buckets)} buckets: its half must be shorter")
        self.window = bucket_kernel(kernel, kernel_size, sigma)
        self.features, self.inputs, self.labels, self.bucket_width = features, inputs, labels, bucket_width
        self.start_update, self.start_smooth, self.momentum, self.clip = start_update, start_smooth, momentum, (clip[0], clip[1])
        self.collect_every = collect_every
        self.statistics: FDSState | None = None
        self._handle: RemovableHandle | None = None
        self._batch: Any = None
        self._epoch = 0
        self._collecting = False
        self._collected: Moments | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Hook into the module.

        Raises:
            TypeError: It has no ``forward``.
            ValueError: ``features`` matches no submodule, or several.
        """
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        if not is_overridden("forward", pl_module, pl.LightningModule):
            raise TypeError(f"FDS collects features through forward, and {type(pl_module).__name__} has none: define forward(inputs)")
        chosen = select_modules(pl_module, [self.features])
        if len(chosen) != 1:
            raise ValueError(f"features={self.features!r} matches {len(chosen)} submodules, {', '.join(chosen)}: name one")
        self._undo()
        ((_, module),) = chosen.items()
        self._handle = module.register_forward_hook(self._hook, prepend=True)  # before those that only look

    def _rows(self, output: Any, batch: Any) -> tuple[Tensor, Tensor]:
        """(M, D) features, channels last, and (M,) labels in buckets."""
        if not isinstance(output, Tensor) or output.ndim < 2 or not output.is_floating_point():
            raise ValueError(f"features={self.features!r} puts out {type(output).__name__}: expected (B, D) or (B, C, h, w)")
        rows = output.movedim(1, -1).flatten(0, -2)
        labels = find_in_batch(batch, self.labels, ("target", 1), "labels").flatten()
        labels = labels.float() / self.bucket_width + 1e-4  # what rounding puts below an edge belongs above it
        if not labels.numel() or len(rows) % labels.numel():
            raise ValueError(f"features={self.features!r} puts out {tuple(output.shape)} for {labels.numel()} labels: one a row is needed")
        return rows, labels.repeat(len(rows) // labels.numel())

    def _hook(self, module: nn.Module, _: Any, output: Any) -> Any:
        if self._batch is None:
            return None
        if self._collecting:
            rows, labels = self._rows(output, self._batch)
            found = moments(rows, self.buckets.places(labels), len(self.buckets) + 2)
            self._collected = found if self._collected is None else self._collected + found
            return None
        if self.statistics is None or self._epoch < self.start_smooth or not module.training:
            return None
        rows, labels = self._rows(output, self._batch)
        if self.statistics.mean.device != rows.device:
            self.statistics = _moved(self.statistics, rows.device)
        calibrated = calibrate(rows, labels, self.statistics, self.buckets, self._epoch, self.start_smooth, self.clip)
        return calibrated.reshape(output.movedim(1, -1).shape).movedim(-1, 1)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember the batch, whose labels the hook needs."""
        self._batch, self._epoch = batch, trainer.current_epoch

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Leave validation alone."""
        self._batch = None

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Collect features and update the statistics."""
        epoch = trainer.current_epoch
        if epoch < self.start_update:
            return
        found = self._collect(trainer, pl_module)
        if self.statistics is None:
            state = initial_state(self.buckets, found.mean.shape[1], self.start_update)
            # training that began without FDS, or whose first passes were skipped, counts as begun now
            self.statistics = replace(_moved(state, found.mean.device), epoch=epoch)
            self.statistics = update(self.statistics, found, epoch, epoch, self.momentum)
            return
        self.statistics = begin_epoch(_moved(self.statistics, found.mean.device), epoch, self.window.to(found.mean.device))
        self.statistics = update(self.statistics, found, epoch, self.start_update, self.momentum)

    def _collect(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Moments:
        """Moments of the whole training set, the same on all ranks."""
        modes = {module: module.training for module in pl_module.modules()}
        pl_module.eval()
        self._collecting, self._collected = True, None
        try:
            with torch.no_grad(), isolate_rng(), trainer.precision_plugin.forward_context():
                for batch in self._pass(trainer):
                    self._batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
                    pl_module(find_in_batch(self._batch, self.inputs, ("image", 0), "inputs"))
        finally:
            self._collecting, self._batch = False, None
            for module, mode in modes.items():
                module.training = mode
        found, self._collected = self._collected, None
        if found is None:
            raise ValueError(f"features={self.features!r} put out nothing in forward: name a submodule that takes part in it")
        parts = [gather_rows(part[None], with_grad=False) for part in (found.count, found.mean, found.square)]
        return functools.reduce(operator.add, (Moments(*ranks) for ranks in zip(*parts, strict=True)))

    def _pass(self, trainer: pl.Trainer) -> Iterator[Any]:
        """Batches of this rank's share of the training set, in order; the training loader isn't touched."""
        loader: Any = trainer.train_dataloader
        dataset = getattr(loader, "dataset", None)
        if dataset is None or isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise ValueError(f"FDS needs one training loader with a data set of known length, not {type(loader).__name__}")
        sampler = getattr(loader, "rank_sampler", None)
        size = loader.batch_size or (sampler.batch_size if sampler is not None else 1)
        own = range(0, len(dataset), self.collect_every)[trainer.global_rank :: trainer.world_size]
        draws = [(0, index) for index in own] if sampler is not None and sampler.with_epoch else list(own)
        again = DataLoader(
            dataset,
            size,
            sampler=draws,  # type: ignore[arg-type]
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            generator=torch.Generator(),
        )
        limit = trainer.limit_train_batches  # type: ignore[attr-defined]
        return itertools.islice(again, None if limit == 1.0 else int(trainer.num_training_batches))

    def _undo(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        self._batch = None

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the module as it was."""
        self._undo()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the module as it was: Lightning doesn't call ``teardown`` here."""
        self._undo()

    def state_dict(self) -> dict[str, Any]:
        """The statistics; empty before the first."""
        return {} if self.statistics is None else dataclasses.asdict(self.statistics)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with them."""
        self.statistics = FDSState(**state_dict) if state_dict else None


def _moved(state: FDSState, device: torch.device) -> FDSState:
    means, variances = (state.mean, state.smoothed_mean), (state.variance, state.smoothed_variance)
    (mean, smoothed_mean), (variance, smoothed_variance) = ([part.to(device) for part in pair] for pair in (means, variances))
    return FDSState(mean, variance, smoothed_mean, smoothed_variance, state.epoch, state.begun)


__all__ = [
    "FDS",
    "Buckets",
    "FDSState",
    "Moments",
    "begin_epoch",
    "bucket_kernel",
    "calibrate",
    "initial_state",
    "moments",
    "pooled",
    "update",
]
