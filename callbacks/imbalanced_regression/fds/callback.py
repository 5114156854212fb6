"""FDS as a Callback: feature distribution smoothing for regression with skewed labels, attached to any module with features.

The maths and its golden vectors: :mod:`lit_methods.callbacks.imbalanced_regression.fds.core`.
"""

import copy
import dataclasses
import functools
import itertools
import operator
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, RandomSampler, SequentialSampler
from torch.utils.hooks import RemovableHandle

from lit_methods.callbacks.batch import Key, find_in_batch
from lit_methods.callbacks.features import one_submodule
from lit_methods.callbacks.imbalanced_regression.fds.core import (
    Buckets,
    FDSState,
    Moments,
    MomentSums,
    begin_epoch,
    bucket_kernel,
    calibrate,
    initial_state,
    update,
)
from lit_methods.callbacks.ordering import OrderedCallback
from lit_methods.callbacks.twin import evaluating, observed
from lit_methods.callbacks.wrapping import refuse_iterators
from lit_methods.checks import at_least, naming, positive, share
from lit_methods.datamodules.loaders import RankSampler
from lit_methods.distributed import gather_rows
from lit_methods.tasks.imbalanced_regression.weights import Kernel


class FDS(OrderedCallback):
    """Gives the features of every label the statistics of its neighbours, in the training of any regression module.

    The features z of a label become (z - mu) sqrt(v_s / v) + mu_s: mu and v are the running mean and variance of its bucket of labels, mu_s
    and v_s the same smoothed over neighbouring buckets.

    Runs: at the end of each training epoch from ``start_update`` on, a pass over the training samples collects features from a copy of the
    module, in eval mode, without gradient and without a draw from the global generators, and the statistics are updated. The samples are
    those that the training loader's sampler or batch sampler draws (a copy of it is asked), so that what it leaves out for validation stays
    out. From epoch ``start_smooth`` on a forward hook calibrates what ``features`` puts out in training; callbacks that see it afterwards,
    such as ``ConR``, see it calibrated. Validation and test are left alone. With several ranks each collects a share, and all have the same
    statistics. The pass reads with as many workers as the training loader and sees the augmentation of the first epoch;
    ``limit_train_batches`` limits it, too. A warning says so where more than a tenth of the labels lie outside the buckets.
    Saves: the statistics.
    Refuses: modules without a ``forward`` that takes the input of a batch; steps that take ``dataloader_iter``; features other than (B, D),
    or (B, C, h, w) with a label for each image or for each of the h x w places; at the start of training, several loaders at once, and
    those of a data set or sampler without an end.

    Args:
        features: Name or ``fnmatch`` pattern of the submodule before the regressor; it must match one.
        inputs: Key or position of the module's input in the batch; None: ``image`` of a dictionary, 0 of a sequence.
        labels: Key or position of the labels; None: ``target`` of a dictionary, 1 of a sequence.
        first_bucket: Bucket of the smallest labels; AgeDB: 3.
        last_bucket: Bucket of the largest labels; the authors: 99.
        bucket_width: Labels per bucket, in their unit: 1 year, 0.1 metres.
        start_update: First epoch whose features count.
        start_smooth: First epoch that is calibrated, after ``start_update``.
        kernel: Shape of the smoothing over buckets: ``gaussian``, ``triang`` or ``laplace``.
        kernel_size: Width of the kernel in buckets, odd.
        sigma: Spread of the kernel in buckets.
        momentum: Share of the old statistics in the new ones.
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
        positive(bucket_width=bucket_width)
        at_least(1, collect_every=collect_every)
        share(momentum=momentum)
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
        self._warned = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Hook into the module.

        Raises:
            TypeError: It has no ``forward``.
            ValueError: ``features`` matches no submodule, or several, or ``training_step`` takes ``dataloader_iter``.
        """
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        if not is_overridden("forward", pl_module, pl.LightningModule):
            raise TypeError(f"FDS collects features through forward, and {type(pl_module).__name__} has none: define forward(inputs)")
        refuse_iterators(pl_module, "FDS")
        self.leave(trainer, pl_module)  # a run that was cut off without notice
        if trainer.global_step == 0:
            self.statistics = None  # an earlier run's belong to it
        self._warned = False
        self.when_built(pl_module, lambda: self._hook_in(pl_module))

    def _hook_in(self, pl_module: pl.LightningModule) -> None:
        with naming("FDS"):
            _, module = one_submodule(pl_module, self.features, "features")
        self._handle = module.register_forward_hook(self._hook, prepend=True)  # before those that only look

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse data that can't be read once more.

        Raises:
            ValueError: There are several loaders, or the data set or the sampler has no end.
        """
        with isolate_rng(pl_module.device.type == "cuda"):
            self._draws(trainer)

    def _rows(self, output: Any, batch: Any) -> tuple[Tensor, Tensor]:
        """(M, D) features, channels last, and (M,) labels in buckets."""
        with naming("FDS"):
            return self._read(output, batch)

    def _read(self, output: Any, batch: Any) -> tuple[Tensor, Tensor]:
        if not isinstance(output, Tensor) or output.ndim not in (2, 4) or not output.is_floating_point():
            got = f"{tuple(output.shape)} {output.dtype}" if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"features={self.features!r} puts out {got}: expected (B, D) or (B, C, h, w) in floating point")
        rows = output.movedim(1, -1).flatten(0, -2)
        labels = find_in_batch(batch, self.labels, ("target", 1), "labels")
        samples, places = len(labels) if labels.ndim else 0, output.shape[2:].numel()
        each = labels.numel() // samples if samples else 0
        if output.ndim == 4:
            fits = samples > 0 and len(output) % samples == 0 and each in (1, places)
        else:
            fits = each > 0 and len(rows) % labels.numel() == 0
        if not fits:
            raise ValueError(
                f"features={self.features!r} puts out {tuple(output.shape)} for labels {tuple(labels.shape)}: one a row, an image or a "
                "place is needed"
            )
        flat = labels.flatten().float() / self.bucket_width + 1e-4  # what rounding puts below an edge belongs above it
        if each < places:
            flat = flat.repeat_interleave(places)  # a label of an image counts at each of its places
        return rows, flat.repeat(len(rows) // flat.numel())

    def _hook(self, module: nn.Module, _: Any, output: Any) -> Any:
        if self._batch is None or not module.training:
            return None
        rows, labels = self._rows(output, self._batch)  # in the first epoch, too: what doesn't fit is refused at its first step
        if self.statistics is None or self._epoch < self.start_smooth:
            return None
        if self.statistics.mean.device != rows.device:
            self.statistics = _moved(self.statistics, rows.device)
        calibrated = calibrate(rows, labels, self.statistics, self.buckets, self._epoch, self.start_smooth, self.clip)
        return calibrated.reshape(output.movedim(1, -1).shape).movedim(-1, 1)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember the batch, whose labels the hook needs.

        Raises:
            ValueError: It has no input that ``forward`` takes at the end of the epoch.
        """
        self._input(batch)
        self._batch, self._epoch = batch, trainer.current_epoch

    def _input(self, batch: Any) -> Tensor:
        with naming("FDS"):
            return find_in_batch(batch, self.inputs, ("image", 0), "inputs")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Leave validation alone."""
        self._batch = None

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Collect features and update the statistics."""
        epoch = trainer.current_epoch
        if epoch < self.start_update:
            return
        collected = self._collect(trainer, pl_module)
        device = collected.mean.device
        if self.statistics is None:
            state = _moved(initial_state(self.buckets, collected.mean.shape[1], self.start_update), device)
            # training that began without FDS, or whose first passes were skipped, counts as begun now
            self.statistics = update(replace(state, epoch=epoch), collected, epoch, epoch, self.momentum)
        else:
            state = begin_epoch(_moved(self.statistics, device), epoch, self.window.to(device))
            self.statistics = update(state, collected, epoch, self.start_update, self.momentum)

    def _collect(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Moments:
        """Moments of the whole training set, the same on all ranks."""
        sums = MomentSums(len(self.buckets) + 2)
        batch: Any = None

        def collect(module: nn.Module, _: Any, output: Any) -> None:
            rows, labels = self._rows(output, batch)
            sums.add(rows, self.buckets.places(labels))

        on_cuda = pl_module.device.type == "cuda"
        with evaluating(pl_module), isolate_rng(on_cuda), trainer.precision_plugin.forward_context():
            twin = observed(trainer, pl_module, "FDS")
            handle = one_submodule(twin, self.features, "features")[1].register_forward_hook(collect, prepend=True)
            try:
                for read in self._pass(trainer):
                    batch = trainer.strategy.batch_to_device(read, dataloader_idx=0)
                    twin(self._input(batch))
            finally:
                handle.remove()
        mine = sums.moments()
        if mine is None:
            raise ValueError(f"FDS: features={self.features!r} put out nothing in forward: name a submodule that takes part in it")
        parts = [gather_rows(part[None], with_grad=False) for part in (mine.count, mine.mean, mine.square)]
        everything = functools.reduce(operator.add, (Moments(*ranks) for ranks in zip(*parts, strict=True)))
        self._warn_of_outside(everything.count)
        return everything

    def _warn_of_outside(self, count: Tensor) -> None:
        """Say once that many labels have no bucket."""
        outside = float((count[0] + count[-1]) / count.sum().clamp(min=1))
        if outside > 0.1 and not self._warned:
            low, high = self.buckets.first * self.bucket_width, (self.buckets.last + 1) * self.bucket_width
            rank_zero_warn(
                f"FDS: {outside:.0%} of the labels lie outside the buckets, which reach from {low:g} to {high:g}; they are left as they "
                "are, or join the bucket at that end: set first_bucket, last_bucket and bucket_width to the range of the labels"
            )
            self._warned = True

    def _draws(self, trainer: pl.Trainer) -> tuple[Any, list[Any] | None]:
        """The training loader, and what its sampler draws in an epoch: indices, or lists of them from a batch sampler; None: everything."""
        loader: Any = trainer.train_dataloader
        dataset = getattr(loader, "dataset", None)
        if dataset is None or isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise ValueError(
                f"FDS reads the training samples once more after each epoch, which takes one training loader with a data set of known "
                f"length, not {type(loader).__name__} of {type(dataset).__name__}"
            )
        ours = getattr(loader, "rank_sampler", None)
        by_batch = loader.batch_sampler is not None and loader.batch_size is None
        source = ours or (loader.batch_sampler if by_batch else loader.sampler)
        kind, drawn_from = type(source), getattr(source, "data_source", getattr(source, "dataset", ()))
        shuffled = kind is RandomSampler and not source.replacement and source.num_samples == len(dataset)
        if (shuffled or kind in (SequentialSampler, DistributedSampler, RankSampler)) and len(drawn_from) == len(dataset):
            return loader, None
        number = trainer.num_training_batches
        try:
            length: float = len(source)
        except TypeError:
            length = number if by_batch else number * (loader.batch_size or 1)
        if length == float("inf"):
            raise ValueError(f"FDS reads what {kind.__name__} draws in an epoch, and it has no end: set limit_train_batches")
        try:  # a sampler may go on from epoch to epoch: what it draws now isn't taken from training
            own = copy.deepcopy(source, {id(dataset): dataset})
        except TypeError as error:
            raise ValueError(f"FDS asks a copy of {kind.__name__} for its samples, and it can't be copied: {error}") from error
        if ours is not None:
            own.begin_pass()
        return loader, list(itertools.islice(own, int(length)))

    def _pass(self, trainer: pl.Trainer) -> Iterator[Any]:
        """Batches of this rank's share of the training samples, in order; the training loader isn't touched."""
        loader, draws = self._draws(trainer)
        sampler = getattr(loader, "rank_sampler", None)
        options: dict[str, Any] = {"batch_size": loader.batch_size or (sampler.batch_size if sampler is not None else None)}
        if draws is None:
            own = range(0, len(loader.dataset), self.collect_every)[trainer.global_rank :: trainer.world_size]
            options["sampler"] = [(0, index) for index in own] if sampler is not None and sampler.with_epoch else list(own)
        elif draws and isinstance(draws[0], list | tuple) and loader.batch_size is None:
            counter = itertools.count()
            thinned = [[index for index in batch if next(counter) % self.collect_every == 0] for batch in draws]
            options = {"batch_sampler": [batch for batch in thinned if batch]}
        else:
            options["sampler"] = sorted(draws)[:: self.collect_every]
        again = DataLoader(
            loader.dataset,
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            worker_init_fn=loader.worker_init_fn,
            generator=torch.Generator(),
            **options,
        )
        limit = trainer.limit_train_batches  # type: ignore[attr-defined]
        return itertools.islice(again, None if limit == 1.0 else int(trainer.num_training_batches))

    def leave(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the hook off the module."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        self._batch = None

    def state_dict(self) -> dict[str, Any]:
        """The statistics; empty before the first."""
        return {} if self.statistics is None else dataclasses.asdict(self.statistics)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with them."""
        self.statistics = FDSState(**state_dict) if state_dict else None


def _moved(state: FDSState, device: torch.device) -> FDSState:
    tensors: dict[str, Any] = {name: value.to(device) for name, value in vars(state).items() if isinstance(value, Tensor)}
    return replace(state, **tensors)


__all__ = ["FDS"]
