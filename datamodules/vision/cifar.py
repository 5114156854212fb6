"""CIFAR-10 and CIFAR-100 in their official Python format."""

import functools
import io
import operator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from lit_methods.checks import one_of
from lit_methods.datamodules.errors import BrokenRecordError, WrongRootError
from lit_methods.datamodules.folders import data_path
from lit_methods.datamodules.pickles import ArraysOnly
from lit_methods.datamodules.pictures import Prepare
from lit_methods.datamodules.reading import once, read_bytes
from lit_methods.datamodules.vision.base import ClassificationDataModule, LabelledImages, fixed_split
from lit_methods.datamodules.vision.shapes import KINDS, draw_shapes

Name = Literal["cifar10", "cifar100"]
Arrays = tuple[NDArray[np.uint8], NDArray[np.int64]]

_FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
_TRAIN = {"cifar10": tuple(f"data_batch_{k}" for k in range(1, 6)), "cifar100": ("train",)}
_TEST = {"cifar10": "test_batch", "cifar100": "test"}
_META = {"cifar10": ("batches.meta", "label_names"), "cifar100": ("meta", "fine_label_names")}
_LABELS = {"cifar10": "labels", "cifar100": "fine_labels"}
_STATISTICS = {  # of the official training images, in [0, 1]
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
_BUILT_IN = (2000, 500)  # training and test images


# ---- reading ---------------------------------------------------------------------------------------------------------------------------


class _CIFARFile(ArraysOnly):
    owner = "CIFAR file"


def read_pickle(path: Path) -> dict[str, Any]:
    """A CIFAR file of Python 2 or 3, of any protocol of pickle, without running code from it.

    Raises:
        MissingFileError: There is no such file.
        BrokenRecordError: The file is truncated, or something else than CIFAR's dictionaries of arrays.
    """
    content = read_bytes(path, "file", "the release is incomplete here, unpack its archive again")
    try:
        found = _CIFARFile(io.BytesIO(content), encoding="latin1").load()
    except Exception as problem:  # a broken pickle raises nearly anything
        reason = str(problem) or type(problem).__name__
        raise BrokenRecordError(path, "pickle", f"{len(content)} bytes can't be read ({reason}): truncated or no CIFAR file") from problem
    if not isinstance(found, dict):
        raise BrokenRecordError(path, "pickle", f"holds a {type(found).__name__}, expected a dictionary: no CIFAR file")
    return {_text(key): value for key, value in found.items()}


def _text(name: Any) -> str:
    """Python 2 and some tools write names as bytes."""
    return name.decode("latin1") if isinstance(name, bytes) else str(name)


def images_and_labels(batch: dict[str, Any], source: Path | str, label_field: str, num_classes: int) -> Arrays:
    """Check a batch of the release.

    Args:
        batch: ``data`` (n, 3072) uint8, red, green, blue planes of 32 x 32; and n labels. Any n >= 1, so that subsets can be read.
        source: File, for messages.
        label_field: ``labels`` or ``fine_labels``.
        num_classes: Labels are 0..num_classes-1.

    Returns:
        (n, 3, 32, 32) uint8 and (n,) int64.

    Raises:
        BrokenRecordError: A field is missing, has another shape, or a label is out of range.
    """
    for field in ("data", label_field):
        if field not in batch:
            raise BrokenRecordError(
                source, field, f"the field is missing, the file has {', '.join(batch) or 'none'}: no file of this data set"
            )
    data, stored = batch["data"], batch[label_field]
    if not isinstance(data, np.ndarray) or not isinstance(stored, list | tuple | np.ndarray):
        kinds = f"{type(data).__name__} and {type(stored).__name__}"
        raise BrokenRecordError(source, "data", f"expected an array and a list of labels, got {kinds}: copy the file again")
    if not isinstance(stored, np.ndarray) and not all(isinstance(one, int | np.integer) for one in stored):
        raise BrokenRecordError(source, label_field, f"expected {len(data)} integers, one an image: copy the file again")
    try:
        labels = np.asarray(stored)
    except OverflowError:  # beyond 64 bits
        labels = np.empty(0)
    if data.ndim != 2 or data.shape[1:] != (3072,) or data.dtype != np.uint8 or not len(data):
        raise BrokenRecordError(source, "data", f"expected (n, 3072) uint8 with n >= 1, got {data.shape} {data.dtype}: copy the file again")
    if labels.shape != data.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise BrokenRecordError(source, label_field, f"expected {len(data)} integers, one an image, got {labels.shape} {labels.dtype}")
    if not 0 <= labels.min() <= labels.max() < num_classes:
        row = int(np.argmax((labels < 0) | (labels >= num_classes)))
        raise BrokenRecordError(source, label_field, f"label {labels[row]} of image {row} is not in 0..{num_classes - 1}")
    return data.reshape(-1, 3, 32, 32), labels.astype(np.int64)


def release_folder(root: Path, name: Name) -> Path:
    """The folder of a release.

    Raises:
        WrongRootError: ``root`` doesn't hold it.
    """
    folder = root / _FOLDERS[name]
    if not folder.is_dir():
        raise WrongRootError(
            f"root={str(root)!r} has no folder {folder.name}: unpack the Python version of {name} from "
            "https://www.cs.toronto.edu/~kriz/cifar.html there, or set root=null for the built-in images"
        )
    return folder


def read_release(root: Path, name: Name) -> tuple[Arrays, Arrays, tuple[str, ...]]:
    """Training and test images and class names of a release.

    Raises:
        WrongRootError: ``root`` doesn't hold the release's folder.
        BrokenRecordError: A file is missing, truncated or wrong.
    """
    folder = release_folder(root, name)
    meta_file, meta_field = _META[name]
    meta = read_pickle(folder / meta_file)
    classes = 10 if name == "cifar10" else 100
    names = meta.get(meta_field, [])
    names = names.reshape(-1).tolist() if isinstance(names, np.ndarray) else list(names) if isinstance(names, tuple) else names
    if not isinstance(names, list) or not all(isinstance(name, str | bytes) for name in names) or len(names) != classes:
        held = len(names) if isinstance(names, list) else type(names).__name__
        raise BrokenRecordError(folder / meta_file, meta_field, f"expected {classes} names, got {held}")
    once(names, folder / meta_file, meta_field)

    def read(file: str) -> Arrays:
        return images_and_labels(read_pickle(folder / file), folder / file, _LABELS[name], classes)

    parts = [read(file) for file in _TRAIN[name]]
    images, labels = (np.concatenate(column) for column in zip(*parts, strict=True))
    return (images, labels), read(_TEST[name]), tuple(map(_text, names))


@functools.cache
def built_in_release(name: Name) -> tuple[Arrays, Arrays, tuple[str, ...]]:
    """2,000 training and 500 test images of shapes and textures, brought into the release's format and checked like it."""
    classes = 10 if name == "cifar10" else 100

    def make(number: int, seed: int) -> Arrays:
        pictures, labels = draw_shapes(number, classes, 32, seed)
        batch = {"data": pictures.transpose(0, 3, 1, 2).reshape(number, 3072), _LABELS[name]: labels.tolist()}
        return images_and_labels(batch, f"built-in {name}", _LABELS[name], classes)

    names = KINDS if name == "cifar10" else tuple(f"{kind} {hue}" for kind in KINDS for hue in range(10))
    return make(_BUILT_IN[0], 0), make(_BUILT_IN[1], 1), names


# ---- images ----------------------------------------------------------------------------------------------------------------------------


class CIFARDataModule(ClassificationDataModule):
    """CIFAR-10 or CIFAR-100: colour images of 32 x 32 pixels in 10 or 100 classes.

    Batch: {"image": (B, 3, 32, 32) float32 normalised, "label": (B,) int64}

    Args:
        root: Folder that holds ``cifar-10-batches-py`` or ``cifar-100-python``, whole or with fewer images per file. None: built-in images
            of shapes and textures, 2,000 for training and 500 for testing, in the same format.
        name: ``cifar10`` or ``cifar100`` (fine labels).
        augment: Random crops after padding by 4 pixels, and mirror images, in training.
        val_size: Training images that are held out for validation, the same for every seed; 0: validation sees the test images.
        batch_size: Images per process and step.
        num_workers: Processes that read data.
        seed: Seed of the order and the augmentation.
        mean: Mean of the three channels in [0, 1], subtracted; None: that of the official training images.
        std: Standard deviation of the three channels, divided by; None: that of the official training images.

    Raises:
        ValueError: A value lies outside its range.
        WrongRootError: ``root`` doesn't hold the release.
        BrokenRecordError: A file is missing, truncated or wrong; the message names it and the field.
    """

    def __init__(
        self,
        root: Path | None = None,
        name: Name = "cifar10",
        augment: bool = True,
        val_size: int = 0,
        batch_size: int = 128,
        num_workers: int = 0,
        seed: int = 0,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        one_of(Name, name=name)
        self.release: Name = name  # Lightning has a use of its own for `name`
        self.root, self.augment, self.val_size = data_path(root), augment, val_size
        self.mean, self.std = mean or _STATISTICS[name][0], std or _STATISTICS[name][1]
        self.save_hyperparameters()

    def check_root(self, stage: str = "fit") -> None:
        """Look for the release's folder."""
        if self.root is not None:
            release_folder(self.root, self.release)

    def setup(self, stage: str) -> None:
        """Read everything into memory and split."""
        if self.train_set is not None:
            return
        found = built_in_release(self.release) if self.root is None else read_release(self.root, self.release)
        (images, labels), test, self.class_names = found
        if not 0 <= self.val_size < len(labels):
            raise ValueError(f"val_size={self.val_size}: give 0 to {len(labels) - 1} of the {len(labels)} training images")
        held_out, train = (np.sort(part) for part in fixed_split(len(labels), self.val_size))  # in the release's order
        self.train_set = self._images(images[train], labels[train], self.augment)
        self.test_set = self._images(*test, False)
        self.val_set = self._images(images[held_out], labels[held_out], False) if self.val_size else self.test_set

    def _images(self, images: NDArray[np.uint8], labels: NDArray[np.int64], augment: bool) -> LabelledImages:
        prepare = Prepare(augment, self.mean, self.std)
        return LabelledImages(partial(operator.getitem, torch.tensor(images)), labels, prepare, self.seed)
