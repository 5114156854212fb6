"""What the driving datamodules share: the segmentation and semi-supervised data sets, loaders, and writing predictions."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from lit_methods.checks import at_least, one_of
from lit_methods.datamodules.base import LoaderDataModule
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

LabelFraction = Literal[1, 5, 10, 25, 100]


class DrivingDataModule(LoaderDataModule):
    """Base of the driving datamodules.

    Attributes:
        class_names: Names of the training classes 0, 1, ...
        num_classes: Their number.
        ignore_index: Label of points that count for nothing: ``num_classes``.
    """

    class_names: tuple[str, ...]
    collate_train: Collate = staticmethod(collate_segmentation)  # type: ignore[assignment]
    collate_eval: Collate = staticmethod(collate_segmentation)  # type: ignore[assignment]
    keep_workers = False  # each holds clouds and images

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
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        if label_fraction not in LABEL_FRACTIONS:
            raise ValueError(f"label_fraction={label_fraction} is not one of {LABEL_FRACTIONS} (percent of the training frames)")
        at_least(0, "scans before and after", neighbours=neighbours)
        one_of(OnBroken, on_broken=on_broken)
        self.label_fraction, self.neighbours, self.on_broken = label_fraction, neighbours, on_broken

    @property
    def num_classes(self) -> int:
        """Number of training classes, the ignored one not counted."""
        return len(self.class_names)

    @property
    def ignore_index(self) -> int:
        """Label of ignored points."""
        return len(self.class_names)

    def read(self, part: Literal["train", "val", "test", "predict"]) -> SampleDataset:
        """The data set of one part."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """Make the data sets of a stage: fit, validate, test, predict, or None for all.

        With ``on_broken: skip`` the files of the evaluation are read once, to leave out the broken samples.
        """
        parts = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}
        for part in ("train", "val", "test", "predict") if stage is None else parts[stage]:
            dataset = self.read(part)  # type: ignore[arg-type]
            if part != "train" and self.on_broken == "skip" and len(dataset):
                dataset.leave_out_broken(part)
            setattr(self, f"{part}_set", dataset)

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

    def loader(self, dataset: Any, batch_size: int | None = None, *, training: bool = False, **options: Any) -> Any:
        """A loader that joins clouds to batches."""
        joins = {"collate_fn": self.collate_train if training else self.collate_eval, "pin_memory": False}
        return super().loader(dataset, batch_size, training=training, **(joins | options))

    def _evaluation(self, name: str) -> Any:
        if len(self.data_of(name)):
            return super()._evaluation(name)
        warnings.warn(f"no frame of the {name} split in this root: {name} is left out", stacklevel=2)
        return []

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

    def close_predictions(self, folder: Path) -> None:
        """Write what the benchmark wants beside the predicted labels, once per submission; nothing by default.

        Args:
            folder: Folder of the submission.
        """

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
