"""What the regression data sets share: views by (epoch, index), weights of rare labels, counts for the evaluation, loaders."""

from collections.abc import Callable, Sequence, Sized
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from lit_methods.datamodules.loaders import ResumableLoader, make_loader
from lit_methods.tasks.imbalanced_regression.weights import Kernel, Reweight, label_weights, smoothing_kernel


class Labels:
    """What is known of each sample beside its input.

    Args:
        targets: (N,) float.
        weights: (N,) float; None: batches have no ``weight``.
        counts: (N,) training samples with the same label.
    """

    def __init__(self, targets: NDArray[Any], weights: NDArray[Any] | None, counts: NDArray[Any]) -> None:
        self.tensors = {"target": torch.from_numpy(targets.astype(np.float32)), "count": torch.from_numpy(counts.astype(np.int64))}
        if weights is not None:
            self.tensors["weight"] = torch.from_numpy(weights.astype(np.float32))

    def __len__(self) -> int:
        return len(self.tensors["target"])

    def rows(self, index: Any) -> dict[str, Tensor]:
        """Of some samples, or of one."""
        return {name: values[index] for name, values in self.tensors.items()}


class RegressionSamples(Dataset[dict[str, Any]]):
    """Samples that are read one by one.

    Args:
        read: Index -> input as stored.
        labels: Of all samples.
        transform: (input, (seed, epoch, index, view)) -> tensor. View 0 goes by ``name``.
        views: Number of further views, ``view_1``, ``view_2``, ...
        seed: Of the augmentation.
        name: Key of the input.
    """

    def __init__(
        self,
        read: Callable[[int], Any],
        labels: Labels,
        transform: Callable[[Any, tuple[int, ...]], Tensor],
        views: int = 0,
        seed: int = 0,
        name: str = "image",
    ) -> None:
        self.read, self.labels, self.transform, self.views, self.seed, self.name = read, labels, transform, views, seed, name

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, draw: tuple[int, int]) -> dict[str, Any]:
        epoch, index = draw
        raw = self.read(index)
        names = [self.name, *(f"view_{view}" for view in range(1, self.views + 1))]
        made = {name: self.transform(raw, (self.seed, epoch, index, view)) for view, name in enumerate(names)}
        return made | self.labels.rows(index)


class RegressionDataModule(pl.LightningDataModule):
    """Base of the regression datamodules: ``setup`` of a subclass fills ``train_set``, ``val_set`` and ``test_set``.

    Args:
        reweight: Weight of a training sample by its label: ``none``, ``inverse`` or ``sqrt_inv`` frequency.
        lds: Smooth the frequencies over neighbouring labels (LDS).
        lds_kernel: ``gaussian``, ``triang`` or ``laplace``.
        lds_kernel_size: In bins, odd.
        lds_sigma: In bins.
        bin_width: Labels per bin, in their unit.
        num_bins: Bins from 0; larger labels count in the last one.
        batch_size: Samples per process and step.
        num_workers: Processes that read data.
        seed: Of order and augmentation.

    Raises:
        ValueError: A value lies outside its range.
    """

    train_set: Dataset | None
    val_set: Dataset | None
    test_set: Dataset | None

    def __init__(
        self,
        *,
        reweight: Reweight,
        lds: bool,
        lds_kernel: Kernel,
        lds_kernel_size: int,
        lds_sigma: float,
        bin_width: float,
        num_bins: int,
        batch_size: int,
        num_workers: int,
        seed: int,
    ) -> None:
        super().__init__()
        if batch_size < 1 or bin_width <= 0 or num_bins < 1:
            raise ValueError(f"batch_size={batch_size} and num_bins={num_bins} must be 1 or more, and bin_width={bin_width} above 0")
        if lds and reweight == "none":
            raise ValueError("lds=True smooths the frequencies that reweight='none' doesn't use: set reweight to inverse or sqrt_inv")
        smoothing_kernel(lds_kernel, lds_kernel_size, lds_sigma)  # the error comes before data are read
        self.reweight: Reweight = reweight
        self.lds, self.lds_kernel, self.lds_kernel_size, self.lds_sigma = lds, lds_kernel, lds_kernel_size, lds_sigma
        self.bin_width, self.num_bins = bin_width, num_bins
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.train_set = self.val_set = self.test_set = None

    def bins(self, targets: NDArray[Any]) -> NDArray[np.int64]:
        """Bin of each label; labels that differ by rounding from a bin's edge belong to the upper bin."""
        return np.minimum(np.floor(targets.astype(np.float64) / self.bin_width + 1e-4).astype(np.int64), self.num_bins - 1)

    def known(self, train: NDArray[Any], parts: Sequence[NDArray[Any]]) -> tuple[Labels, ...]:
        """Labels of the training part, with weights, and of the others, all with the counts of the training part."""
        bins = self.bins(train)
        counts = np.bincount(bins, minlength=self.num_bins)
        weights = None
        if self.reweight != "none":
            arguments = (self.lds_kernel, self.lds_kernel_size, self.lds_sigma, self.num_bins)
            weights = label_weights(bins, self.reweight, self.lds, *arguments)
        return Labels(train, weights, counts[bins]), *(Labels(part, None, counts[self.bins(part)]) for part in parts)

    def _loader(self, dataset: Dataset | None, *, training: bool = False, collate_fn: Any = None) -> ResumableLoader:
        if dataset is None:
            raise RuntimeError(f"{type(self).__name__} has no data yet: call setup() first (the Trainer does)")
        assert isinstance(dataset, Sized)
        world_size = self.trainer.world_size if self.trainer is not None else 1
        return make_loader(
            dataset,
            self.batch_size,
            shuffle=training,
            seed=self.seed,
            num_workers=self.num_workers,
            collate_fn=collate_fn,
            trainer=self.trainer,
            drop_last=training and len(dataset) >= self.batch_size * world_size,
            training=training,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
        )

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled, resumable; a last incomplete batch is dropped unless it is the only one."""
        return self._loader(self.train_set, training=True)

    def val_dataloader(self) -> ResumableLoader:
        """In order, every sample once, never augmented."""
        return self._loader(self.val_set)

    def test_dataloader(self) -> ResumableLoader:
        """In order, every sample once, never augmented."""
        return self._loader(self.test_set)

    def predict_dataloader(self) -> ResumableLoader:
        """The test samples."""
        return self._loader(self.test_set)


__all__ = ["Labels", "RegressionDataModule", "RegressionSamples"]
