"""What the classification data sets share: samples by (epoch, index), subsets of labels, loaders.

A batch is ``{"image": (B, C, H, W) float32, "label": (B,) int64}``. Augmentation follows from (seed, epoch, index) alone, never from the
worker or rank that reads the sample.
"""

from collections.abc import Callable, Sequence, Sized
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from lit_methods.datamodules.loaders import ResumableLoader, make_loader


class LabelledImages(Dataset[dict[str, Any]]):
    """Samples ``{"image": Tensor, "label": int}``, asked for by ``(epoch, index)``.

    Args:
        read: Index -> image as stored.
        labels: (N,) integers.
        transform: (image, (seed, epoch, index)) -> (C, H, W) float32.
        seed: Of the augmentation.
        names: File names by index, where the images are files.
    """

    def __init__(
        self,
        read: Callable[[int], Any],
        labels: NDArray[np.integer[Any]],
        transform: Callable[[Any, tuple[int, int, int]], Tensor],
        seed: int,
        names: Sequence[str] = (),
    ) -> None:
        self.read, self.labels, self.transform, self.seed, self.names = read, labels, transform, seed, names

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, draw: tuple[int, int]) -> dict[str, Any]:
        epoch, index = draw
        return {"image": self.transform(self.read(index), (self.seed, epoch, index)), "label": int(self.labels[index])}


def fixed_split(size: int, first: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The first ``first`` positions of one permutation of ``size``, and the rest; the same in every run, whatever the seed."""
    order = np.random.default_rng(0).permutation(size)
    return order[:first], order[first:]


def redraw_labels(labels: NDArray[np.int64], share: float, num_classes: int, seed: int) -> NDArray[np.int64]:
    """Symmetric label noise: ``round(share * N)`` labels, chosen without repetition, drawn anew from all classes.

    A label may be drawn as it was, so about ``share * (1 - 1 / num_classes)`` of the labels end up wrong.

    Args:
        labels: (N,) in 0..num_classes-1; not changed.
        share: In [0, 1].
        num_classes: Number of classes.
        seed: Decides which and what.

    Returns:
        (N,) int64.

    Raises:
        ValueError: ``share`` lies outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"label_noise={share} is a share of the training labels: give 0 to 1")
    rng = np.random.default_rng([seed, 1])
    chosen = rng.permutation(len(labels))[: round(share * len(labels))]
    noisy = labels.copy()
    noisy[chosen] = rng.integers(num_classes, size=len(chosen))
    return noisy


class ClassificationDataModule(pl.LightningDataModule):
    """Base of the classification datamodules.

    Attributes:
        class_names: Names of the classes 0, 1, ...; known after ``setup`` at the latest.
        train_set: Data sets after ``setup``; likewise ``val_set`` and ``test_set``. None: this root has no such split.
        unlabelled_set: Further training images, whose labels are -1 where they aren't known; None: there are none.
    """

    class_names: tuple[str, ...]
    train_set: Dataset | None
    val_set: Dataset | None
    test_set: Dataset | None
    unlabelled_set: LabelledImages | None

    def __init__(self, *, batch_size: int, num_workers: int, seed: int) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: give 1 or more")
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.class_names = ()
        self.train_set = self.val_set = self.test_set = self.unlabelled_set = None

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def _loader(self, dataset: Dataset | None, split: str, *, training: bool = False) -> ResumableLoader:
        if dataset is None:
            reason = "this root has none" if self.class_names else "call setup() first (the Trainer does)"
            raise RuntimeError(f"{type(self).__name__} has no {split} images: {reason}")
        assert isinstance(dataset, Sized)
        world_size = self.trainer.world_size if self.trainer is not None else 1
        return make_loader(
            dataset,
            self.batch_size,
            shuffle=training,
            seed=self.seed,
            num_workers=self.num_workers,
            trainer=self.trainer,
            drop_last=training and len(dataset) >= self.batch_size * world_size,
            training=training,
            pin_memory=torch.cuda.is_available(),
        )

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled, resumable; a last incomplete batch is dropped unless it is the only one."""
        return self._loader(self.train_set, "training", training=True)

    def val_dataloader(self) -> ResumableLoader:
        """In order, every image once, never augmented."""
        return self._loader(self.val_set, "validation")

    def test_dataloader(self) -> ResumableLoader:
        """In order, every image once, never augmented."""
        return self._loader(self.test_set, "test")

    def predict_dataloader(self) -> ResumableLoader:
        """The test images."""
        return self._loader(self.test_set, "test")
