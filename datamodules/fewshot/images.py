"""A few images a class to tune on, and test images of these classes and of others."""

import operator
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_methods.checks import at_least, literals
from lit_methods.datamodules.base import LoaderDataModule
from lit_methods.datamodules.fewshot import coloured_shapes as shapes
from lit_methods.datamodules.fewshot.releases import LAYOUTS, Name, check_layout, choose_shots, read_descriptions, read_release
from lit_methods.datamodules.folders import data_path
from lit_methods.datamodules.pictures import open_listed
from lit_methods.datamodules.vision.base import LabelledImages

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
Classes = Literal["base_to_new", "all"]
_SECOND = 4517  # the second view of an image comes from another seed
_TEST_PER_CLASS = 40  # built-in images


class TwoViewImages(LabelledImages):
    """Samples ``{"image", "image_second", "label"}``: two independent draws of the transform."""

    def at(self, epoch: int, index: int) -> dict[str, Any]:
        """One image, twice."""
        stored = self.read(index)
        first, second = (self.transform(stored, (seed, epoch, index)) for seed in (self.seed, self.seed + _SECOND))
        return {"image": first, "image_second": second, "label": int(self.labels[index])}


class ShapeView:
    """(3, S, S) float32 in [0, 1], moved by up to two pixels, lighter or darker, with noise; -> about -1 to 1.

    Args:
        augment: False: only scaled.
    """

    def __init__(self, augment: bool) -> None:
        self.augment = augment

    def __call__(self, image: Tensor, draw: tuple[int, int, int]) -> Tensor:
        if not self.augment:
            return 2 * image - 1
        rng = np.random.default_rng(draw)
        down, right = rng.integers(-2, 3, size=2).tolist()
        light = float(rng.uniform(0.8, 1.2))
        noise = torch.from_numpy(rng.standard_normal(image.shape, dtype=np.float32))
        return 2 * (light * image.roll((down, right), dims=(1, 2)) + 0.05 * noise) - 1


class PhotoView:
    """An RGB image of Pillow -> (3, S, S) float32, normalised as CLIP wants it.

    Training: resized to S x S by bicubic interpolation, then RandAugment of torchvision, as CoPrompt does it. Else: the short side becomes
    S, and the middle is taken.

    Args:
        size: S in pixels.
        augment: Training.
    """

    def __init__(self, size: int, augment: bool) -> None:
        from torchvision import transforms as T

        bicubic = T.InterpolationMode.BICUBIC
        first: list[Any] = [T.Resize((size, size), bicubic), T.RandAugment()] if augment else [T.Resize(size, bicubic), T.CenterCrop(size)]
        self.transform = T.Compose([*first, T.ToTensor(), T.Normalize(CLIP_MEAN, CLIP_STD)])

    def __call__(self, image: Any, draw: tuple[int, int, int]) -> Tensor:
        from lit_methods.datamodules.vision.imagenet import seeded

        with seeded(draw):
            found: Tensor = self.transform(image)
        return found


class FewShotDataModule(LoaderDataModule):
    """K labelled images of each base class, and test images of the base classes and of new ones.

    Batch: {"image": (B, 3, S, S) float32, "image_second": (B, 3, S, S) float32, "label": (B,) int64}

    The two images are two views of the same picture. There are two validation loaders, and the same two test and prediction loaders: images
    of the base classes, then of the new ones, with ``image`` and ``label`` alone, labels from 0 in each. Validation images are the test
    images: choose nothing by the one to report it by the other.

    Args:
        root: Folder of one of the eleven sets in the layout of CoOp's DATASETS.md, such as ``eurosat/`` with ``2750/`` and
            ``split_zhou_EuroSAT.json``. None: built-in pictures, 20 classes with names, 24 x 24 pixels, no download.
        name: Name of the set that ``root`` holds.
        shots: K; a class that has fewer images gives all. None: all images.
        shot_seed: Decides which images; nothing else depends on it.
        classes: ``base_to_new``: the first half of the classes (rounded up) is tuned on, the rest is new; ``all``: all are base classes,
            and there is no second loader.
        template: Text with ``{}`` for a class name; None: that of the set.
        descriptions: JSON file of sentences, {class name: [sentence, ...]}; None: none (built-in pictures bring their own).
        image_size: Side S in pixels; the built-in images have 24 whatever it is.
        batch_size: Training images per process and step.
        eval_batch_size: Images per process and evaluation step.
        num_workers: Processes that read images.
        seed: Seed of the order and of the augmentation.
        pictures: What is built in: ``shapes``, or ``digits``: scikit-learn's real digits, in colours; test images are in other hands.

    Attributes:
        base_classes: Names of the base classes, after ``setup``.
        new_classes: Names of the new classes, after ``setup``.
        descriptions: Class name -> sentences, after ``setup``.
        template: Text with ``{}`` for a class name.

    Raises:
        ValueError: A value outside its range.
        WrongRootError: ``root`` doesn't hold the set.
        BrokenRecordError: A file is missing or wrong; the message names it and the place.
    """

    def __init__(
        self,
        root: Path | None = None,
        name: Name = "eurosat",
        shots: int | None = 16,
        shot_seed: int = 1,
        classes: Classes = "base_to_new",
        template: str | None = None,
        descriptions: Path | None = None,
        image_size: int = 224,
        batch_size: int = 4,
        eval_batch_size: int = 100,
        num_workers: int = 0,
        seed: int = 0,
        pictures: shapes.Pictures = "shapes",
    ) -> None:
        super().__init__(batch_size=batch_size, eval_batch_size=eval_batch_size, num_workers=num_workers, seed=seed)
        literals(FewShotDataModule, locals())
        at_least(1, shots=shots, image_size=image_size)
        if template is not None and "{}" not in template:
            raise ValueError(f"template={template!r} has no {{}} for the name of the class")
        self.save_hyperparameters()
        self.root, self.release = data_path(root), name
        self.shots, self.shot_seed, self.part, self.description_file = shots, shot_seed, classes, data_path(descriptions)
        self.image_size = image_size
        self.template: str = template or (LAYOUTS[name].template if root is not None else "a photo of a {}.")
        self.base_classes: tuple[str, ...] = ()
        self.new_classes: tuple[str, ...] = ()
        self.descriptions: dict[str, list[str]] = {}

    @property
    def class_names(self) -> tuple[str, ...]:
        """The base classes."""
        return self.base_classes

    def check_root(self, stage: str = "fit") -> None:
        """Look for the list of the splits and the folder of images."""
        if self.root is not None:
            check_layout(self.root, self.release)

    def setup(self, stage: str) -> None:
        """Read the lists and choose the images; images of a release are read when they are asked for."""
        if self.train_set is not None:
            return
        names, train, test, view = self._built_in() if self.root is None else self._read(self.root)
        if self.description_file is not None:
            self.descriptions = read_descriptions(self.description_file)
        base = len(names) if self.part == "all" else (len(names) + 1) // 2
        self.base_classes, self.new_classes = names[:base], names[base:]
        (read, labels), (test_read, test_labels) = train, test
        own = np.flatnonzero(labels < base)
        chosen = own if self.shots is None else own[choose_shots(labels[own], self.shots, self.shot_seed)]
        self.train_set = TwoViewImages(partial(_at, read, chosen), labels[chosen], view(True), self.seed)
        self.val_set = self.test_set = []  # base classes, then new ones
        for low, high in ((0, base), (base, len(names))):
            mine = np.flatnonzero((test_labels >= low) & (test_labels < high))
            if len(mine):
                self.test_set.append(LabelledImages(partial(_at, test_read, mine), test_labels[mine] - low, view(False), self.seed))

    def _built_in(self) -> Any:
        classes = shapes.task_classes(self.hparams["pictures"])
        parts = []
        for per_class, seed in ((self.shots or 16, 10 * self.shot_seed + 1), (_TEST_PER_CLASS, 2)):
            drawn, labels = shapes.draw_images(per_class, seed, classes)
            images = torch.from_numpy(shapes.in_another_light(drawn, seed)).movedim(-1, 1).float() / 255
            parts.append((partial(operator.getitem, images), labels))
        self.descriptions = {shapes.class_name(*own): shapes.sentences(*own) for own in classes}
        return tuple(shapes.class_name(*own) for own in classes), *parts, ShapeView

    def _read(self, root: Path) -> Any:
        found = read_release(root, self.release)
        parts = [(partial(open_listed, split.paths), split.labels) for split in (found.train, found.test)]
        return found.classes, *parts, partial(PhotoView, self.image_size)


def _at(read: Callable[[int], Any], chosen: NDArray[np.int64], index: int) -> Any:
    return read(int(chosen[index]))


__all__ = ["CLIP_MEAN", "CLIP_STD", "FewShotDataModule", "PhotoView", "ShapeView", "TwoViewImages"]
