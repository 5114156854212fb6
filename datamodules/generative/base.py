"""What the generative data sets share: samples that lie in memory, fetched a batch at a time, and their loaders."""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lit_methods.datamodules.loaders import ResumableLoader, make_loader

Batch = dict[str, Tensor]


class Tensors(Dataset[Batch]):
    """Samples that lie in memory as one tensor. A loader fetches a whole batch in one go.

    Args:
        images: (N, ...), uint8 in 0..255, which becomes float32 in [-1, 1]; or float32, which stays as it is.
        labels: (N,) int64; None: batches have no ``label``.
        flip: Mirror half of the images, other ones in every epoch; the last dimension is the width.
        seed: Of the mirroring.
    """

    def __init__(self, images: Tensor, labels: Tensor | None = None, flip: bool = False, seed: int = 0) -> None:
        self.images, self.labels, self.flip, self.seed = images, labels, flip, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, draws: Sequence[tuple[int, int]]) -> Batch:
        """The batch of some (epoch, index)."""
        epochs, index = torch.tensor(draws).T
        images = self.images[index]
        if images.dtype == torch.uint8:
            images = images.float().div_(127.5).sub_(1)
        if self.flip:
            mirrored = torch.empty(len(index), dtype=torch.bool)
            for epoch in epochs.unique().tolist():  # one, but where a batch is put together by hand
                now = epochs == epoch
                mirrored[now] = torch.from_numpy(np.random.default_rng([self.seed, 2, epoch]).random(len(self)) < 0.5)[index[now]]
            images = torch.where(mirrored.view(-1, *[1] * (images.ndim - 1)), images.flip(-1), images)
        return {"image": images} if self.labels is None else {"image": images, "label": self.labels[index]}

    def __getitem__(self, draw: tuple[int, int]) -> Batch:
        return {name: values[0] for name, values in self.__getitems__([draw]).items()}


def as_it_is(batch: Any) -> Any:
    """The batch that :class:`Tensors` has put together."""
    return batch


class GenerativeDataModule(pl.LightningDataModule):
    """Base of the generative datamodules: ``setup`` of a subclass fills ``train_set`` and ``val_set``.

    Batches: ``image`` (B, ...) float32; with classes also ``label`` (B,) int64. Validation and test see ``val_set``. For ``lit predict``
    there is a part of it, which says how many samples to draw, of what shape and of which classes.

    Attributes:
        train_set: After ``setup``; likewise ``val_set``.
    """

    train_set: Tensors | None
    val_set: Tensors | None

    def __init__(self, *, batch_size: int, val_batch_size: int, num_samples: int, num_workers: int, seed: int) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("val_batch_size", val_batch_size), ("num_samples", num_samples)):
            if value < 1:
                raise ValueError(f"{name}={value}: give 1 or more")
        self.batch_size, self.val_batch_size, self.num_samples = batch_size, val_batch_size, num_samples
        self.num_workers, self.seed = num_workers, seed
        self.train_set = self.val_set = None

    def _loader(self, dataset: Tensors | None, batch_size: int, training: bool = False) -> ResumableLoader:
        if dataset is None:
            raise RuntimeError(f"{type(self).__name__} has no data yet: call setup() first (the Trainer does)")
        world_size = self.trainer.world_size if self.trainer is not None else 1
        return make_loader(
            dataset,
            batch_size,
            shuffle=training,
            seed=self.seed,
            num_workers=self.num_workers,
            collate_fn=as_it_is,
            trainer=self.trainer,
            drop_last=training and len(dataset) >= batch_size * world_size,
            training=training,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
        )

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled, resumable; a last incomplete batch is dropped unless it is the only one."""
        return self._loader(self.train_set, self.batch_size, training=True)

    def val_dataloader(self) -> ResumableLoader:
        """In order, everything once."""
        return self._loader(self.val_set, self.val_batch_size)

    def test_dataloader(self) -> ResumableLoader:
        """The validation data."""
        return self.val_dataloader()

    def predict_dataloader(self) -> ResumableLoader:
        """The first ``num_samples`` of the validation data."""
        whole = self.val_set
        if whole is None:
            raise RuntimeError(f"{type(self).__name__} has no data yet: call setup() first (the Trainer does)")
        labels = None if whole.labels is None else whole.labels[: self.num_samples]
        return self._loader(Tensors(whole.images[: self.num_samples], labels), self.val_batch_size)
