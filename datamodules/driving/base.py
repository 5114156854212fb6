"""What the driving datamodules share: the segmentation and semi-supervised data sets, loaders, and writing predictions."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from torch import Tensor
from torch.utils.data import DataLoader

from lit_methods.datamodules.driving.common import (
    LABEL_FRACTIONS,
    Collate,
    Frames,
    OnBroken,
    SampleDataset,
    SegmentationDataset,
    SemiSupervisedDataset,
    collate_segmentation,
    collate_semi_supervised,
    fraction_of,
)
from lit_methods.datamodules.errors import WrongRootError
from lit_methods.datamodules.loaders import make_loader

LabelFraction = Literal[1, 5, 10, 25, 100]


class DrivingDataModule(pl.LightningDataModule):
    """Base of the driving datamodules.

    Attributes:
        class_names: Names of the training classes 0, 1, ...
        num_classes: Their number.
        ignore_index: Label of points that count for nothing: ``num_classes``.
        train_set: Data sets after ``setup``; likewise ``val_set``, ``test_set``, ``predict_set``.
    """

    class_names: tuple[str, ...]
    collate_train: Collate = staticmethod(collate_segmentation)  # type: ignore[assignment]
    collate_eval: Collate = staticmethod(collate_segmentation)  # type: ignore[assignment]

    def __init__(
        self,
        *,
        label_fraction: LabelFraction,
        neighbours: int,
        batch_size: int,
        num_workers: int,
        seed: int,
        on_broken: OnBroken,
    ) -> None:
        super().__init__()
        if label_fraction not in LABEL_FRACTIONS:
            raise ValueError(f"label_fraction={label_fraction} is not one of {LABEL_FRACTIONS} (percent of the training frames)")
        if neighbours < 0:
            raise ValueError(f"neighbours={neighbours}: give 0 (none) or the number of scans before and after, each")
        if on_broken not in ("error", "skip"):
            raise ValueError(f"on_broken={on_broken!r} is neither 'error' nor 'skip'")
        self.label_fraction, self.neighbours, self.on_broken = label_fraction, neighbours, on_broken
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.train_set: SampleDataset | None = None
        self.val_set: SampleDataset | None = None
        self.test_set: SampleDataset | None = None
        self.predict_set: SampleDataset | None = None

    @property
    def num_classes(self) -> int:
        """Number of training classes, the ignored one not counted."""
        return len(self.class_names)

    @property
    def ignore_index(self) -> int:
        """Label of ignored points."""
        return len(self.class_names)

    def segmentation_set(
        self, frames: Frames, indices: Sequence[int], *, augment: bool, labelled: bool = True, neighbours: int | None = None
    ) -> SegmentationDataset:
        """A data set of scans with this datamodule's options."""
        return SegmentationDataset(
            frames,
            indices,
            seed=self.seed,
            augment=augment,
            labelled=labelled,
            neighbours=self.neighbours if neighbours is None else neighbours,
            on_broken=self.on_broken,
            num_workers=self.num_workers,
        )

    def segmentation_train_set(self, frames: Frames, train: Sequence[int], semi_supervised: bool) -> SampleDataset:
        """The labelled subset, paired with the remaining frames when ``semi_supervised``.

        Raises:
            WrongRootError: There is no training frame.
            ValueError: Every frame is labelled, so none is left to be used without labels.
        """
        if not len(train):
            raise WrongRootError("the root holds no frame of the training split: check root, version and splits.json")
        labelled = fraction_of(train, self.label_fraction)
        if not semi_supervised:
            return self.segmentation_set(frames, labelled, augment=True)
        chosen = set(labelled)
        rest = [frame for frame in train if frame not in chosen]
        if not rest:
            raise ValueError(
                f"label_fraction={self.label_fraction} labels all {len(train)} training frames: semi_supervised needs some without labels"
            )
        labelled_set = self.segmentation_set(frames, labelled, augment=True, neighbours=0)
        return SemiSupervisedDataset(labelled_set, self.segmentation_set(frames, rest, augment=True, labelled=False))

    def _loader(self, dataset: SampleDataset | None, what: str, *, training: bool = False) -> DataLoader | list[Any]:
        if dataset is None:
            raise RuntimeError(f"the {what} data is not there yet: call setup() first (the Trainer does)")
        if len(dataset) == 0:
            warnings.warn(f"no frame of the {what} split in this root: {what} is left out", stacklevel=2)
            return []
        world_size = self.trainer.world_size if self.trainer is not None else 1
        return make_loader(
            dataset,
            self.batch_size,
            shuffle=training,
            seed=self.seed,
            num_workers=self.num_workers,
            collate_fn=self.collate_train if training else self.collate_eval,
            trainer=self.trainer,
            drop_last=training and len(dataset) >= self.batch_size * world_size,  # a few labelled scans may be less than one batch
            training=training,
        )

    def train_dataloader(self) -> Any:
        """Shuffled, resumable; a last incomplete batch is dropped unless it is the only one."""
        return self._loader(self.train_set, "train", training=True)

    def val_dataloader(self) -> Any:
        """In order, every frame once."""
        return self._loader(self.val_set, "val")

    def test_dataloader(self) -> Any:
        """In order, every frame once."""
        return self._loader(self.test_set, "test")

    def predict_dataloader(self) -> Any:
        """In order, every frame once."""
        return self._loader(self.predict_set, "predict")

    def write_labels(self, token: str, labels: Tensor, folder: Path) -> Path:
        """Write the predicted labels of one scan in the benchmark's submission layout.

        Args:
            token: The scan's name, as in the batch's ``token``.
            labels: (n,) integer training ids in 0..num_classes-1, one per point of the scan.
            folder: Folder of the submission.

        Returns:
            The file.
        """
        raise NotImplementedError

    def check_predictions(self, token: str, labels: Tensor) -> None:
        """Refuse what no benchmark accepts: floats, another shape, ids outside the classes.

        Raises:
            ValueError: As named.
        """
        if labels.ndim != 1 or labels.is_floating_point():
            raise ValueError(
                f"predictions of {token} must be (n,) integer training ids, got {tuple(labels.shape)} {labels.dtype}: take the argmax first"
            )
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            raise ValueError(
                f"predictions of {token} hold ids {int(labels.min())}..{int(labels.max())}, expected 0..{self.num_classes - 1}: "
                "leave the ignore class out of the argmax"
            )


__all__ = ["DrivingDataModule", "LabelFraction", "collate_segmentation", "collate_semi_supervised"]
