"""Street View House Numbers, the cropped digits, in their official MATLAB format."""

import functools
import operator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from lit_methods.datamodules.errors import BrokenRecordError
from lit_methods.datamodules.folders import data_path
from lit_methods.datamodules.pictures import Prepare
from lit_methods.datamodules.reading import read_matlab, whole_numbers
from lit_methods.datamodules.vision.base import ClassificationDataModule, LabelledImages
from lit_methods.datamodules.vision.shapes import KINDS, draw_shapes

_MEAN, _STD = (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)  # of the training images, in [0, 1] (mem)
_BUILT_IN = (1000, 500, 500)  # training, test and extra images

Arrays = tuple[NDArray[np.uint8], NDArray[np.int64]]


def read_digits(path: Path) -> Arrays:
    """(N, 3, 32, 32) uint8 and (N,) in 0..9; the file has ``X`` (32, 32, 3, N) and ``y`` (N, 1) in 1..10, ten for the digit 0.

    Raises:
        MissingFileError: There is no such file.
        BrokenRecordError: The file is truncated, or its arrays are others.
    """
    found = read_matlab(path, ("X", "y"), "file", "download the cropped digits (format 2) of SVHN again")
    if not {"X", "y"} <= set(found):
        raise BrokenRecordError(path, "arrays", "it has no X and y: download the cropped digits (format 2), not the full numbers")
    images, labels = np.asarray(found["X"]), whole_numbers(found["y"], path, "y").reshape(-1)
    if images.ndim != 4 or images.shape[:3] != (32, 32, 3) or images.dtype != np.uint8:
        raise BrokenRecordError(path, "X", f"expected (32, 32, 3, N) uint8, got {images.shape} {images.dtype}")
    if len(labels) != images.shape[3] or not len(labels):
        raise BrokenRecordError(path, "y", f"{len(labels)} labels for {images.shape[3]} images")
    if not 1 <= labels.min() <= labels.max() <= 10:
        raise BrokenRecordError(path, "y", f"labels go from {labels.min()} to {labels.max()}, not from 1 to 10")
    return np.ascontiguousarray(images.transpose(3, 2, 0, 1)), labels % 10


@functools.cache
def built_in_digits(number: int, seed: int) -> Arrays:
    """Shapes and textures of the same size."""
    pictures, labels = draw_shapes(number, 10, 32, seed)
    return pictures.transpose(0, 3, 1, 2), np.asarray(labels, np.int64)


class SVHNDataModule(ClassificationDataModule):
    """SVHN: house numbers, one digit an image of 32 x 32 pixels; 73,257 for training, 26,032 for testing, 531,131 easier ones.

    Batch: {"image": (B, 3, 32, 32) float32 normalised, "label": (B,) int64}

    Args:
        root: Folder that holds ``train_32x32.mat`` and ``test_32x32.mat``, whole or with fewer images. None: built-in shapes and textures.
        extra: Have the images of ``extra_32x32.mat`` as ``unlabelled_set``.
        augment: Random crops after padding by 4 pixels in training; no mirror images, which would be other digits.
        batch_size: Images per process and step.
        num_workers: Processes that read data.
        seed: Seed of the order and the augmentation.

    Raises:
        WrongRootError: ``root`` doesn't hold the release.
        BrokenRecordError: A file is missing, truncated or wrong; the message names it.
    """

    def __init__(
        self, root: Path | None = None, extra: bool = False, augment: bool = True, batch_size: int = 64, num_workers: int = 0, seed: int = 0
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        self.root, self.extra, self.augment = data_path(root), extra, augment
        self.mean, self.std = _MEAN, _STD
        self.save_hyperparameters()

    def check_root(self, stage: str = "fit") -> None:
        """Look for the training images."""
        self.expect("train_32x32.mat", "put the cropped digits from http://ufldl.stanford.edu/housenumbers/ there")

    def setup(self, stage: str) -> None:
        """Read everything into memory."""
        if self.train_set is not None:
            return
        further = None
        if self.root is None:
            self.class_names = KINDS
            train, test, further = (built_in_digits(number, seed) for seed, number in enumerate(_BUILT_IN))
        else:
            self.check_root(stage)
            self.class_names = tuple("0123456789")
            train, test = (read_digits(self.root / f"{part}_32x32.mat") for part in ("train", "test"))
            further = read_digits(self.root / "extra_32x32.mat") if self.extra else None
        self.train_set, self.test_set = self._images(*train, self.augment), self._images(*test, False)
        self.val_set = self.test_set
        if self.extra and further is not None:
            self.unlabelled_set = self._images(*further, False)

    def _images(self, images: NDArray[np.uint8], labels: NDArray[np.int64], augment: bool) -> LabelledImages:
        prepare = Prepare(augment, self.mean, self.std, mirror=False)
        return LabelledImages(partial(operator.getitem, torch.tensor(images)), labels, prepare, self.seed)
