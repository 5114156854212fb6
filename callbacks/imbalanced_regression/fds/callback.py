"""FDS as a Callback: feature distribution smoothing for regression with skewed labels, attached to any module with features.

The maths and its golden vectors: :mod:`lit_methods.callbacks.imbalanced_regression.fds.core`.
"""

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
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.hooks import RemovableHandle

from lit_methods.callbacks.batch import Key, find_in_batch
from lit_methods.callbacks.features import one_submodule
from lit_methods.callbacks.imbalanced_regression.fds.core import (
    Buckets,
    FDSState,
    Moments,
    begin_epoch,
    bucket_kernel,
    calibrate,
    initial_state,
    moments,
    update,
)
from lit_methods.callbacks.ordering import OrderedCallback
from lit_methods.callbacks.twin import evaluating
from lit_methods.checks import at_least, positive, share
from lit_methods.distributed import gather_rows
from lit_methods.tasks.imbalanced_regression.weights import Kernel


class FDS(OrderedCallback):
    """Gives the features of every label the statistics of its neighbours, in the training of any regression module.

    The features z of a label become (z - mu) sqrt(v_s / v) + mu_s: mu and v are the running mean and variance of its bucket of labels, mu_s
    and v_s the same smoothed over neighbouring buckets.

    Runs: at the end of each training epoch from ``start_update`` on, a pass over the training set collects features, in eval mode, without
    gradient and without a draw from the global generators, and the statistics are updated. From epoch ``start_smooth`` on a forward hook
    calibrates what ``features`` puts out in training; callbacks that see it afterwards, such as ``ConR``, see it calibrated. Validation and
    test are left alone. With several ranks each collects a share, and all have the same statistics. The pass reads with as many workers as
    the training loader and sees the augmentation of the first epoch; ``limit_train_batches`` limits it, too.
    Saves: the statistics.
    Refuses: modules without a ``forward`` that takes the input of a batch; features other than (B, D), or (B, C, h, w) with a label for
    each of the h x w places; a training set without a length.

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
        _, module = one_submodule(pl_module, self.features, "features")
        self.leave(trainer, pl_module)  # a run that was cut off without notice
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
            seen = moments(rows, self.buckets.places(labels), len(self.buckets) + 2)
            self._collected = seen if self._collected is None else self._collected + seen
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
        self._collecting, self._collected = True, None
        try:
            with evaluating(pl_module), isolate_rng(), trainer.precision_plugin.forward_context():
                for batch in self._pass(trainer):
                    self._batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
                    pl_module(find_in_batch(self._batch, self.inputs, ("image", 0), "inputs"))
        finally:
            self._collecting, self._batch = False, None
        mine, self._collected = self._collected, None
        if mine is None:
            raise ValueError(f"features={self.features!r} put out nothing in forward: name a submodule that takes part in it")
        parts = [gather_rows(part[None], with_grad=False) for part in (mine.count, mine.mean, mine.square)]
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
