"""Base of the datamodules whose training batch is a whole matrix."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_methods.checks import at_least, positive, within
from lit_methods.datamodules.base import Batches, Ints, LoaderDataModule, Whole

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Table:
    """Rows with a label.

    Attributes:
        features: (n, p).
        label: (n,) of 0 and 1.
        covariates: (n, q), q >= 0.
    """

    features: Floats
    label: Ints
    covariates: Floats

    def select(self, rows: Ints | slice) -> "Table":
        """Some of the rows."""
        return Table(self.features[rows], self.label[rows], self.covariates[rows])


def no_covariates(rows: int) -> Floats:
    """(n, 0)."""
    return np.zeros((rows, 0))


def as_batch(table: Table) -> dict[str, Tensor]:
    """The rows as one batch."""
    arrays = {"features": table.features, "label": table.label, "covariates": table.covariates}
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


class Rows(Batches):
    """Rows for evaluation, any number at a time; a loader of ours takes all at once."""

    def __init__(self, table: Table) -> None:
        self._batch = as_batch(table)
        self.batch_size = len(table.label)

    def __len__(self) -> int:
        return len(self._batch["label"])

    def batch(self, epochs: Ints, index: Ints) -> dict[str, Tensor]:
        """The rows of these indices."""
        rows = torch.from_numpy(index)
        return {name: values[rows] for name, values in self._batch.items()}


class MatrixDataModule(LoaderDataModule):
    """Base: subclasses write :meth:`tables`; the loaders of training yield the whole matrix ``steps_per_epoch`` times.

    Every rank gets the whole training matrix; rows of an evaluation are dealt out. Validation and test are the same held-out rows: choose
    nothing by the one to report it by the other.

    Args:
        test_share: Share of the rows that is held out, in (0, 1); both parts get one row or more.
        scale: Features are divided by it, > 0.
        steps_per_epoch: Iterations between two validations.
        num_workers: Processes that read data; the matrix lies in memory, so 0 is fastest.
        seed: Seed of the draws and of the split.

    Attributes:
        matrix_shape: (n, p, q) of the training matrix after ``setup``.
        feature_names: Names of the p features; empty: they have none.
        image_shape: (height, width), if the features of a row are an image; else None.

    Raises:
        ValueError: A number lies outside its range.
    """

    matrix_shape: tuple[int, int, int] | None = None
    feature_names: tuple[str, ...] = ()
    image_shape: tuple[int, int] | None = None

    def __init__(self, *, test_share: float, scale: float, steps_per_epoch: int, num_workers: int, seed: int) -> None:
        super().__init__(batch_size=1, num_workers=num_workers, seed=seed)
        within("(0, 1)", "a share", test_share=test_share)
        positive(scale=scale)
        at_least(1, steps_per_epoch=steps_per_epoch)
        self.test_share, self.scale, self.steps_per_epoch = test_share, scale, steps_per_epoch

    def tables(self) -> tuple[Table, Table]:
        """Training and held-out rows, before ``scale``."""
        raise NotImplementedError

    def split(self, rows: int) -> tuple[Ints, Ints]:
        """Indices of the training rows and of those held out, drawn by the seed."""
        order = np.random.default_rng([self.seed, 1]).permutation(rows)
        held = min(max(1, round(rows * self.test_share)), rows - 1)
        return np.sort(order[held:]), np.sort(order[:held])

    def halves(self, table: Table) -> tuple[Table, Table]:
        """Both parts of a table.

        Raises:
            ValueError: The training part has one class alone.
        """
        train, held = (table.select(rows) for rows in self.split(len(table.label)))
        if len(np.unique(train.label)) != 2:
            raise ValueError(f"all {len(train.label)} training rows have the label {train.label[0]}: give more rows, or another seed")
        return train, held

    def setup(self, stage: str) -> None:
        """Read or draw, split, scale."""
        if self.train_set is not None:
            return
        train, held = (Table(table.features / self.scale, table.label, table.covariates) for table in self.tables())
        self.matrix_shape = (*train.features.shape, train.covariates.shape[1])  # type: ignore[assignment]
        self.train_set = Whole(as_batch(train), self.steps_per_epoch)
        self.val_set = self.test_set = Rows(held)

    def train_dataloader(self) -> Any:
        """The whole matrix on every rank, ``steps_per_epoch`` times."""
        return self.whole_loader()


__all__ = ["MatrixDataModule", "Rows", "Table", "no_covariates"]
