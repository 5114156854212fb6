"""ImageNet-1k and anything in its folders: one folder of JPEGs for each class."""

import json
import operator
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lit_methods.checks import one_of
from lit_methods.datamodules.errors import BrokenRecordError, WrongRootError
from lit_methods.datamodules.folders import counts, data_path
from lit_methods.datamodules.pictures import IMAGENET_MEAN, IMAGENET_STD, open_picture
from lit_methods.datamodules.tables import text_of
from lit_methods.datamodules.vision.base import ClassificationDataModule, LabelledImages
from lit_methods.datamodules.vision.shapes import KINDS, draw_shapes

_ENDINGS = (".jpeg", ".jpg", ".png")
_BUILT_IN = (600, 200, 72)  # training images, validation images, side in pixels


# ---- reading ---------------------------------------------------------------------------------------------------------------------------


def read_class_list(path: Path) -> tuple[str, ...]:
    """Names of the class folders, in the order of the labels.

    Args:
        path: A JSON list of names, or a text file with one name a line; what follows the first blank of a line is ignored.

    Raises:
        MissingFileError: There is no such file.
        BrokenRecordError: It holds no names, or one twice.
    """
    text = text_of(path, "give a list of folder names, or null to take the folders of train/", "class_list")
    try:
        names = json.loads(text) if text.lstrip().startswith("[") else [line.split()[0] for line in text.splitlines() if line.strip()]
    except (ValueError, RecursionError) as problem:
        raise BrokenRecordError(path, "class_list", f"begins like a JSON list and isn't one ({problem})") from problem
    if not names or len(set(map(str, names))) < len(names):
        raise BrokenRecordError(
            path, "class_list", f"expected distinct folder names, got {len(names)} with {len(set(map(str, names)))} distinct"
        )
    return tuple(str(name) for name in names)


def class_folders(folder: Path) -> tuple[str, ...]:
    """Names of the folders in ``folder``, sorted, without hidden ones."""
    with os.scandir(folder) as entries:
        return tuple(sorted(entry.name for entry in entries if counts(entry.name) and entry.is_dir()))


def list_images(folder: Path, classes: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Image files of a split and their labels, sorted by class and name.

    Raises:
        WrongRootError: A folder that is no class, or no image at all.
    """
    number = {name: label for label, name in enumerate(classes)}
    found = class_folders(folder)
    if unknown := [name for name in found if name not in number]:
        raise WrongRootError(
            f"{folder} has {len(unknown)} folders that are no class ({', '.join(unknown[:3])}): "
            f"the {len(classes)} classes are those of class_list or of train/, such as {', '.join(classes[:2])}"
        )
    files, labels = [], []
    for name in found:
        with os.scandir(folder / name) as entries:
            mine = sorted(entry.name for entry in entries if counts(entry.name) and entry.name.lower().endswith(_ENDINGS))
        files += [f"{name}/{file}" for file in mine]
        labels += [number[name]] * len(mine)
    if not files:
        raise WrongRootError(f"{folder} holds no image: expected {folder.name}/<class>/*.JPEG")
    return files, np.array(labels, dtype=np.int64)


def read_image(folder: Path, files: Sequence[str], index: int) -> Image.Image:
    """An image file as RGB.

    Raises:
        MissingFileError: The file has gone.
        BrokenRecordError: It is truncated or no image.
    """
    return open_picture(folder / files[index], missing="it was there when training began")


# ---- images ----------------------------------------------------------------------------------------------------------------------------


@contextmanager
def seeded(draw: tuple[int, int, int]) -> Iterator[None]:
    """The global generators of Python, NumPy and torch's CPU follow from ``draw`` inside, and are as before outside.

    For transforms of libraries, which draw from all three.
    """
    words = np.random.SeedSequence(draw).generate_state(3, np.uint32).tolist()
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=[]):
            random.seed(words[0])
            np.random.seed(words[1])  # noqa: NPY002
            torch.default_generator.manual_seed(words[2])  # torch.manual_seed would touch the GPU's, too
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


class _TrainTransform:
    """timm's: random resized crop, mirror image, optional RandAugment and erasing, normalisation."""

    def __init__(
        self, size: int, auto_augment: str | None, random_erasing: float, interpolation: str, crop_scale: tuple[float, float]
    ) -> None:
        from timm.data import create_transform

        self.transform: Any = create_transform(
            input_size=size,
            is_training=True,
            scale=crop_scale,
            color_jitter=None,  # type: ignore[arg-type]  # timm's annotation leaves None out
            auto_augment=auto_augment,
            re_prob=random_erasing,
            re_mode="pixel",
            interpolation=interpolation,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
        )

    def __call__(self, image: Image.Image, draw: tuple[int, int, int]) -> Tensor:
        with seeded(draw):
            return self.transform(image)


class _EvalTransform:
    """The shorter side resized to 256/224 of ``size``, the square in the middle, normalisation."""

    def __init__(self, size: int, interpolation: str) -> None:
        from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

        resize = Resize(round(size * 256 / 224), InterpolationMode(interpolation))
        self.transform = Compose([resize, CenterCrop(size), ToTensor(), Normalize(IMAGENET_MEAN, IMAGENET_STD)])

    def __call__(self, image: Image.Image, draw: tuple[int, int, int]) -> Tensor:
        return self.transform(image)


class ImageNetDataModule(ClassificationDataModule):
    """ImageNet-1k: photos in 1,000 classes, from ``train/<class>/*.JPEG`` and ``val/<class>/*.JPEG``.

    Batch: {"image": (B, 3, S, S) float32 normalised by ImageNet's mean and deviation, "label": (B,) int64}

    Validation and test both read ``val/``, as the labels of ImageNet's test images aren't public. A root without ``train/`` serves for
    validation and testing.

    Args:
        root: Folder with ``train`` and ``val``. None: built-in images of shapes and textures in ten classes, 600 for training and 200 for
            validation, 72 pixels wide; set a smaller ``image_size`` with them.
        class_list: File with the names of the class folders in the order of the labels, as a JSON list or one a line. None: the sorted
            names of the folders in ``train``, or in ``val`` where there is no ``train``.
        image_size: Side S of the square that the network sees. Validation images are resized to S * 256 / 224 first.
        auto_augment: A policy of timm, such as ``rand-m9-n2-mstd0.5``; None: random resized crops and mirror images alone.
        random_erasing: Probability that a rectangle of a training image is replaced by noise.
        crop_scale: Smallest and largest share of the area that a random crop keeps.
        interpolation: ``bilinear`` or ``bicubic``.
        batch_size: Images per process and step.
        num_workers: Processes that read data.
        seed: Seed of the order and the augmentation.

    Raises:
        WrongRootError: The folders aren't there, or don't fit the classes.
        BrokenRecordError: An image can't be read; the message names the file.
    """

    def __init__(
        self,
        root: Path | None = None,
        class_list: Path | None = None,
        image_size: int = 224,
        auto_augment: str | None = None,
        random_erasing: float = 0.0,
        crop_scale: tuple[float, float] = (0.08, 1.0),
        interpolation: str = "bilinear",
        batch_size: int = 256,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        one_of(("bilinear", "bicubic"), interpolation=interpolation)
        self.save_hyperparameters()
        self.root, self.class_list = data_path(root), data_path(class_list)
        # not read from hparams: below another datamodule Lightning puts that one's there
        self._training = (image_size, auto_augment, random_erasing, interpolation, (crop_scale[0], crop_scale[1]))
        self._held_out = (image_size, interpolation)

    def check_root(self, stage: str = "fit") -> None:
        """Look for the folder of validation images."""
        layout = "expected train/<class>/*.JPEG and val/<class>/*.JPEG"
        self.expect("val", f"{layout}, the images of ILSVRC2012 validation sorted into the folders of their classes")

    def setup(self, stage: str) -> None:
        """List the files."""
        if self.val_set is not None:
            return
        train, held_out = _TrainTransform(*self._training), _EvalTransform(*self._held_out)
        if self.root is None:
            self.class_names = KINDS
            self.train_set, self.val_set = (
                self._drawn(number, seed, transform) for number, seed, transform in ((_BUILT_IN[0], 0, train), (_BUILT_IN[1], 1, held_out))
            )
        else:
            self.check_root(stage)
            folders = {split: self.root / split for split in ("train", "val")}
            there = folders["train"].is_dir()
            self.class_names = read_class_list(self.class_list) if self.class_list else class_folders(folders["train" if there else "val"])
            self.train_set = self._listed(folders["train"], train) if there else None
            self.val_set = self._listed(folders["val"], held_out)
        self.test_set = self.val_set

    def _listed(self, folder: Path, transform: Any) -> LabelledImages:
        files, labels = list_images(folder, self.class_names)
        return LabelledImages(partial(read_image, folder, files), labels, transform, self.seed, files)

    def _drawn(self, number: int, seed: int, transform: Any) -> LabelledImages:
        pictures, labels = draw_shapes(number, 10, _BUILT_IN[2], seed)
        return LabelledImages(partial(operator.getitem, [Image.fromarray(picture) for picture in pictures]), labels, transform, self.seed)
