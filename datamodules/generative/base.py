"""What the generative data sets share: samples that lie in memory, fetched a batch at a time."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_methods.checks import at_least
from lit_methods.datamodules.base import Batches, Ints, LoaderDataModule

Batch = dict[str, Tensor]


class Tensors(Batches):
    """Samples that lie in memory as one tensor. A loader fetches a whole batch in one go.

    Args:
        images: (N, ...), uint8 in 0..255, which becomes float32 in [-1, 1]; or float32, which stays as it is.
        labels: (N,) int64; None: batches have no ``label``.
        flip: Mirror half of the images, other ones in every epoch; the last dimension is the width.
        seed: Seed of the mirroring.
    """

    def __init__(self, images: Tensor, labels: Tensor | None = None, flip: bool = False, seed: int = 0) -> None:
        self.images, self.labels, self.flip, self.seed = images, labels, flip, seed

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, epochs: Ints, index: Ints) -> Batch:
        """Images in their final range, with their labels."""
        chosen = torch.from_numpy(index)
        images = self.images[chosen]
        if images.dtype == torch.uint8:
            images = images.float().div_(127.5).sub_(1)
        if self.flip:
            mirrored = np.empty(len(index), dtype=bool)
            for epoch in np.unique(epochs).tolist():
                now = epochs == epoch
                mirrored[now] = np.random.default_rng([self.seed, 2, epoch]).random(len(self))[index[now]] < 0.5
            images = torch.where(torch.from_numpy(mirrored).view(-1, *[1] * (images.ndim - 1)), images.flip(-1), images)
        return {"image": images} if self.labels is None else {"image": images, "label": self.labels[chosen]}


class GenerativeDataModule(LoaderDataModule):
    """Base of the generative datamodules: ``setup`` of a subclass fills ``train_set`` and ``val_set``.

    Batches have ``image`` (B, ...) float32, with classes also ``label`` (B,) int64. Validation and test see
    ``val_set``. For ``lit predict`` there is a part of it, which says how many samples to draw, of what shape and of which classes.

    Args:
        batch_size: Samples per process and training step.
        val_batch_size: Samples per process and evaluation step.
        num_samples: Samples that ``lit predict`` draws.
        num_workers: Processes that read data.
        seed: Seed of the order and the augmentation.
    """

    def __init__(self, *, batch_size: int, val_batch_size: int, num_samples: int, num_workers: int, seed: int) -> None:
        at_least(1, val_batch_size=val_batch_size, num_samples=num_samples)
        super().__init__(batch_size=batch_size, eval_batch_size=val_batch_size, num_workers=num_workers, seed=seed)
        self.num_samples = num_samples

    def test_dataloader(self) -> Any:
        """The validation data."""
        return self.val_dataloader()

    def predict_dataloader(self) -> Any:
        """The first ``num_samples`` of the validation data."""
        if self.predict_set is not None:
            return super().predict_dataloader()
        whole = self.data_of("val")
        return self.loader(Tensors(whole.images[: self.num_samples], None if whole.labels is None else whole.labels[: self.num_samples]))


__all__ = ["Batch", "GenerativeDataModule", "Tensors"]
