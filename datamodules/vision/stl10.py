"""STL-10 in its official binary format, with its 100,000 unlabelled images."""

import functools
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_methods.datamodules.errors import BrokenRecordError
from lit_methods.datamodules.folders import data_path
from lit_methods.datamodules.pictures import Prepare
from lit_methods.datamodules.reading import file_size, once, read_bytes
from lit_methods.datamodules.tables import text_of
from lit_methods.datamodules.vision.base import ClassificationDataModule, LabelledImages
from lit_methods.datamodules.vision.shapes import KINDS, draw_shapes

_SIDE = 96
_BYTES = 3 * _SIDE**2  # of an image
_MEAN, _STD = (0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713)  # of the labelled training images, in [0, 1] (mem)
_BUILT_IN = (500, 500, 500)  # training, test and unlabelled images

Pixels = NDArray[np.uint8]


def read_images(path: Path) -> Pixels:
    """(N, 3, 96, 96) uint8, mapped and not read: three planes, each stored column by column.

    Raises:
        MissingFileError: There is no such file.
        BrokenRecordError: The file isn't a whole number of images.
    """
    size = file_size(path, "file", "unpack stl10_binary.tar.gz again")
    if not size or size % _BYTES:
        raise BrokenRecordError(path, "images", f"{size} bytes are no whole number of images of {_BYTES}: truncated, copy the file again")
    mapped: Pixels = np.memmap(path, np.uint8, "r", shape=(size // _BYTES, 3, _SIDE, _SIDE))
    return mapped.transpose(0, 1, 3, 2)


def read_labels(path: Path, count: int) -> NDArray[np.int64]:
    """(N,) in 0..9; the file has 1..10, a byte each.

    Raises:
        MissingFileError: There is no such file.
        BrokenRecordError: Another number of labels than images, or a label out of range.
    """
    found = np.frombuffer(read_bytes(path, "file", "unpack stl10_binary.tar.gz again"), np.uint8).astype(np.int64) - 1
    if len(found) != count:
        raise BrokenRecordError(path, "labels", f"{len(found)} labels for {count} images: copy the file again")
    if not 0 <= found.min() <= found.max() < 10:
        raise BrokenRecordError(path, "labels", f"labels go from {found.min() + 1} to {found.max() + 1}, not from 1 to 10")
    return found


@functools.cache
def built_in_images(number: int, seed: int) -> tuple[Pixels, NDArray[np.int64]]:
    """Shapes and textures of the same size."""
    pictures, labels = draw_shapes(number, 10, _SIDE, seed)
    return pictures.transpose(0, 3, 1, 2), np.asarray(labels, np.int64)


def _image(images: Pixels, index: int) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images[index]))


class STL10DataModule(ClassificationDataModule):
    """STL-10: 10 classes of 96 x 96 pixels, 5,000 labelled training images, 8,000 test images, 100,000 without a label.

    Batch: {"image": (B, 3, 96, 96) float32 normalised, "label": (B,) int64}

    ``SemiSupervisedDataModule`` also takes those without.

    Args:
        root: Folder that holds ``stl10_binary``, whole or with fewer images per file. None: built-in shapes and textures.
        unlabelled: Have the unlabelled images as ``unlabelled_set``.
        augment: Random crops after padding by 12 pixels, and mirror images, in training.
        batch_size: Images per process and step.
        num_workers: Processes that read data.
        seed: Seed of the order and the augmentation.

    Raises:
        WrongRootError: ``root`` doesn't hold the release.
        BrokenRecordError: A file is missing, truncated or wrong; the message names it.
    """

    def __init__(
        self,
        root: Path | None = None,
        unlabelled: bool = True,
        augment: bool = True,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        self.root, self.unlabelled, self.augment = data_path(root), unlabelled, augment
        self.mean, self.std = _MEAN, _STD
        self.save_hyperparameters()

    def check_root(self, stage: str = "fit") -> None:
        """Look for the release's folder."""
        self.expect("stl10_binary", "unpack stl10_binary.tar.gz from https://cs.stanford.edu/~acoates/stl10/ there")

    def setup(self, stage: str) -> None:
        """Map the files."""
        if self.train_set is not None:
            return
        if self.root is None:
            self.class_names = KINDS
            train, test, further = (built_in_images(number, seed) for seed, number in enumerate(_BUILT_IN))
            without = further[0]
        else:
            self.check_root(stage)
            folder = self.root / "stl10_binary"
            names = folder / "class_names.txt"
            self.class_names = tuple(text_of(names, "unpack stl10_binary.tar.gz again").split())
            if len(self.class_names) != 10:
                raise BrokenRecordError(names, "names", f"expected 10 classes, got {len(self.class_names)}")
            once(self.class_names, names, "names")
            train, test = (
                (images := read_images(folder / f"{part}_X.bin"), read_labels(folder / f"{part}_y.bin", len(images)))
                for part in ("train", "test")
            )
            without = read_images(folder / "unlabeled_X.bin") if self.unlabelled else train[0][:0]
        self.train_set, self.test_set = self._images(*train, self.augment), self._images(*test, False)
        self.val_set = self.test_set
        if self.unlabelled:
            self.unlabelled_set = self._images(without, np.full(len(without), -1, np.int64), False)

    def _images(self, images: Pixels, labels: NDArray[np.int64], augment: bool) -> LabelledImages:
        return LabelledImages(partial(_image, images), labels, Prepare(augment, self.mean, self.std, border=12), self.seed)
