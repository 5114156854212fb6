"""A few labelled images beside many without a label, in weak and strong views."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import CombinedLoader
from numpy.typing import NDArray

from lit_methods.checks import at_least
from lit_methods.datamodules.base import LoaderDataModule, Samples
from lit_methods.datamodules.errors import BrokenRecordError
from lit_methods.datamodules.folders import data_path
from lit_methods.datamodules.tables import text_of
from lit_methods.datamodules.vision.base import ClassificationDataModule, LabelledImages
from lit_methods.datamodules.vision.views import Policy, View, make_views

_SEPARATE = 7919  # several strong views of one image differ by this in their seed
_AGAIN = 104_729  # and so does a labelled image that stands in a pass several times


def labelled_subset(labels: NDArray[np.integer[Any]], per_class: int, seed: int) -> NDArray[np.int64]:
    """``per_class`` images of every class, by a seeded shuffle of each class.

    Args:
        labels: (N,) in 0..C-1.
        per_class: >= 1.
        seed: Decides which.

    Returns:
        (per_class * C,) indices, sorted.

    Raises:
        ValueError: A class has fewer images.
    """
    at_least(1, labels_per_class=per_class)
    chosen = []
    for name in np.unique(labels):
        mine = np.flatnonzero(labels == name)
        if len(mine) < per_class:
            raise ValueError(f"labels_per_class={per_class}, but class {name} has only {len(mine)} images")
        chosen.append(np.random.default_rng([seed, int(name)]).permutation(mine)[:per_class])
    return np.sort(np.concatenate(chosen))


class Views(Samples):
    """Views of chosen images, asked for by ``(epoch, position)``.

    Samples: ``weak`` (C, H, W); ``strong``, a list of S such; ``index``, the position among the chosen; ``label``, where all are known.

    Args:
        images: All images, as stored.
        chosen: Indices of the images to use.
        weak: The weak view.
        strong: The strong views; empty: ``image`` in place of ``weak`` and ``strong``, for labelled images.
        repeats: Each image so many times in a pass, in views of its own.
    """

    def __init__(self, images: LabelledImages, chosen: NDArray[np.int64], weak: View, strong: list[View], repeats: int = 1) -> None:
        self.images, self.chosen, self.weak, self.strong, self.repeats = images, chosen, weak, strong, repeats
        self.known = bool((images.labels[chosen] >= 0).all())

    def __len__(self) -> int:
        return len(self.chosen) * self.repeats

    def at(self, epoch: int, index: int) -> dict[str, Any]:
        """The views of one chosen image."""
        repeat, position = divmod(index, len(self.chosen))
        image, seed = int(self.chosen[position]), self.images.seed + _AGAIN * repeat
        stored = self.images.read(image)
        weak = self.weak(stored, (seed, epoch, image))
        labels = {"index": position} | ({"label": int(self.images.labels[image])} if self.known else {})
        if not self.strong:
            return {"image": weak, **labels}
        strong = [view(stored, (seed + _SEPARATE * number, epoch, image)) for number, view in enumerate(self.strong)]
        return {"weak": weak, "strong": strong, **labels}


def _read(first: LabelledImages, second: LabelledImages, index: int) -> Any:
    return first.read(index) if index < len(first) else second.read(index - len(first))


def joined(first: LabelledImages, second: LabelledImages) -> LabelledImages:
    """Both, one behind the other, with the seed and transform of the first."""
    return LabelledImages(partial(_read, first, second), np.concatenate([first.labels, second.labels]), first.transform, first.seed)


class SemiSupervisedDataModule(LoaderDataModule):
    """Labels for a few images of a classification data set, and views of all of them without.

    Batch: {"labelled": {"image": (B, C, H, W) float32, ...}, "unlabelled": {"weak": (mu B, C, H, W), "strong": list of S such, ...}}

    Both parts have ``index`` and, where all are known, ``label``, int64 of the length of the batch. ``index`` counts the labelled images
    and the unlabelled ones each from 0. The unlabelled images are those of training, and behind them the ``unlabelled_set`` of ``data``
    (STL-10, SVHN's extra images); their labels are there for diagnostics alone, and only if all are known. An epoch is one pass over the
    unlabelled images; the labelled ones start again as often as needed. Validation and test batches are those of ``data``.

    Args:
        data: The data set; its batch size is that of validation. Its own augmentation of training images isn't used.
        labels_per_class: Labelled images in each class.
        label_list: Text file in place of ``labels_per_class``: labelled training images, one a line, by position
            or by file name (SimCLR's lists for ImageNet).
        label_seed: Decides which images are labelled; nothing else depends on it.
        batch_size: Labelled images per process and step.
        ratio: mu, unlabelled images for each labelled one.
        include_labelled: The unlabelled images include the labelled ones (FixMatch); False: they don't (SimMatchV2's ImageNet).
        strong_views: S.
        policy: Policy of the views: ``small_grey`` (digits), ``small_colour`` (CIFAR) or ``imagenet``.
        num_workers: Processes that read data, for each of the two loaders.

    Attributes:
        labelled_classes: (N_l,) classes of the labelled images, by ``index``; after ``setup``.

    Raises:
        ValueError: A number outside its range.
    """

    labelled_classes: torch.Tensor

    def __init__(
        self,
        data: ClassificationDataModule,
        labels_per_class: int = 4,
        label_list: Path | None = None,
        label_seed: int = 0,
        batch_size: int = 64,
        ratio: int = 7,
        include_labelled: bool = True,
        strong_views: int = 1,
        policy: Policy = "small_colour",
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=data.seed)
        at_least(1, ratio=ratio)
        make_views(policy, strong_views)
        self.save_hyperparameters(ignore=["data"])
        self.data, self.label_list = data, data_path(label_list)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.data.class_names

    def check_root(self, stage: str = "fit") -> None:
        """That of ``data``."""
        self.data.check_root(stage)

    def setup(self, stage: str) -> None:
        """Read the data set and choose the labelled images."""
        self.data.trainer = self.trainer
        self.data.setup(stage)
        if stage != "fit":
            return
        hp, images = self.hparams, self.data.train_set
        if not isinstance(images, LabelledImages):
            raise ValueError(f"{type(self.data).__name__} has no training images here: give a root that holds them")
        self.labelled = (
            labelled_subset(images.labels, hp["labels_per_class"], hp["label_seed"])
            if self.label_list is None
            else read_label_list(self.label_list, len(images), images.names)
        )
        self.labelled_classes = torch.from_numpy(images.labels[self.labelled].astype(np.int64))
        everything = np.arange(len(images))
        own = everything if hp["include_labelled"] else np.setdiff1d(everything, self.labelled)
        pool, further = images, self.data.unlabelled_set
        if further is not None:
            pool = joined(images, further)
            own = np.concatenate([own, np.arange(len(images), len(pool))])
        self.unlabelled = own
        normalised = {name: getattr(self.data, name) for name in ("mean", "std") if hasattr(self.data, name)}
        weak, strong = make_views(hp["policy"], hp["strong_views"], **normalised)
        wanted = self.batch_size * (self.trainer.world_size if self.trainer is not None else 1)
        self.labelled_set = Views(images, self.labelled, weak, [], repeats=-(-wanted // len(self.labelled)))
        self.unlabelled_set = Views(pool, self.unlabelled, weak, strong)

    def train_dataloader(self) -> CombinedLoader:
        """Labelled and unlabelled batches side by side, resumable."""
        return CombinedLoader(
            {
                "labelled": self.loader(self.labelled_set, training=True, drop_last=True),
                "unlabelled": self.loader(self.unlabelled_set, self.batch_size * self.hparams["ratio"], training=True, drop_last=True),
            },
            mode="max_size_cycle",
        )

    def val_dataloader(self) -> Any:
        """Validation loader of ``data``."""
        return self.data.val_dataloader()

    def test_dataloader(self) -> Any:
        """Test loader of ``data``."""
        return self.data.test_dataloader()

    def predict_dataloader(self) -> Any:
        """Prediction loader of ``data``."""
        return self.data.predict_dataloader()


def read_label_list(path: Path, size: int, names: Sequence[str] = ()) -> NDArray[np.int64]:
    """Which training images have a label, one a line: positions, or names of files as in SimCLR's lists for ImageNet.

    Args:
        path: Text file.
        size: Number of training images.
        names: Their file names, where they have any; folders in front don't count.

    Returns:
        Positions, sorted.

    Raises:
        BrokenRecordError: A line is neither, an image stands twice, or the file can't be read.
    """
    lines = text_of(path, "give a list of positions or file names, one a line", "images").split()
    position = {name.rpartition("/")[2]: number for number, name in enumerate(names)}
    found = [int(line) if line.isdecimal() else position.get(line.rpartition("/")[2], size) for line in lines]
    for number, (line, image) in enumerate(zip(lines, found, strict=True), start=1):
        if image >= size:
            raise BrokenRecordError(path, f"line {number}", f"{line!r} is no position in 0..{size - 1}, nor the name of a training image")
    if not found or len(set(found)) < len(found):
        raise BrokenRecordError(path, "images", "it is empty or names an image twice")
    return np.sort(np.array(found, dtype=np.int64))
