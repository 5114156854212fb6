"""CUB-200-2011, Cars-196, Stanford Online Products and iNaturalist 2018 for retrieval: training and test classes are disjoint."""

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lit_methods.checks import at_least, one_of
from lit_methods.datamodules.errors import BrokenRecordError
from lit_methods.datamodules.folders import data_path
from lit_methods.datamodules.metric_learning.base import RetrievalDataModule
from lit_methods.datamodules.pictures import IMAGENET_MEAN, IMAGENET_STD, Prepare, open_listed
from lit_methods.datamodules.reading import once, read_json, read_matlab, whole_numbers
from lit_methods.datamodules.tables import find_columns, plain, text_of
from lit_methods.datamodules.vision.base import LabelledImages

Name = Literal["cub", "cars", "sop", "inat"]
_FIRST = {  # the file that shows that a folder is the release, and where it comes from
    "cub": ("images.txt", "CUB_200_2011 of https://www.vision.caltech.edu/datasets/cub_200_2011"),
    "cars": ("cars_annos.mat", "cars_annos.mat and car_ims of Stanford Cars"),
    "sop": ("Ebay_train.txt", "Stanford_Online_Products"),
    "inat": ("Inat_dataset_splits/Inaturalist_train_set1.txt", "train_val2018 and the lists of the retrieval split, Inat_dataset_splits,"),
}


@dataclass(frozen=True)
class ImageList:
    """Images of one split: paths and their classes, (N,) int64."""

    paths: list[Path]
    labels: NDArray[np.int64]


def _lines(file: Path, fields: int) -> list[list[str]]:
    """Words of each line.

    Raises:
        MissingFileError: There is no such file.
        BrokenRecordError: It is no text, a line has another number of words, or there is none.
    """
    text = text_of(file, "the release is incomplete here, unpack its archive again")
    rows = [line.split() for line in text.splitlines() if line.strip()]
    for number, row in enumerate(rows, start=1):
        if len(row) != fields:
            raise BrokenRecordError(file, f"line {number}", f"expected {fields} words, got {len(row)}: {' '.join(row)!r}")
    if not rows:
        raise BrokenRecordError(file, "lines", "there is no image: unpack the release again")
    return rows


def _number(word: str, file: Path, place: str) -> int:
    if not word.isascii() or not word.isdigit() or len(word) > 18:
        raise BrokenRecordError(file, place, f"expected an integer, got {word[:40]!r}")
    return int(word)


def _halves(paths: list[Path], labels: NDArray[np.int64], last_train: int) -> tuple[ImageList, ImageList]:
    """The classes up to ``last_train`` train, the others test."""
    first = labels <= last_train
    parts = (ImageList([path for path, chosen in zip(paths, keep, strict=True) if chosen], labels[keep]) for keep in (first, ~first))
    train, test = parts
    return train, test


def read_cub(root: Path) -> tuple[ImageList, ImageList]:
    """``images.txt`` and ``image_class_labels.txt``; classes 1 to 100 train."""
    names, classes = root / "images.txt", root / "image_class_labels.txt"
    rows, marks = _lines(names, 2), _lines(classes, 2)
    once([row[0] for row in rows], names, "lines", "image id")
    once([row[1] for row in rows], names, "lines", "image")
    once([row[0] for row in marks], classes, "lines", "image id")
    paths = {row[0]: root / "images" / row[1] for row in rows}
    labels = {row[0]: _number(row[1], classes, f"line {number}") for number, row in enumerate(marks, start=1)}
    if wrong := [key for key, label in labels.items() if not 1 <= label <= 200]:
        raise BrokenRecordError(classes, f"image {wrong[0]}", f"class {labels[wrong[0]]} isn't in 1..200: unpack the release again")
    if odd := sorted(paths.keys() ^ labels.keys()):
        raise BrokenRecordError(classes, f"image {odd[0]}", f"it stands in one of {names.name} and {classes.name} alone")
    return _halves(list(paths.values()), np.array([labels[key] for key in paths]), 100)


def read_cars(root: Path) -> tuple[ImageList, ImageList]:
    """``cars_annos.mat``; classes 1 to 98 train."""
    file = root / "cars_annos.mat"
    found = read_matlab(file, ("annotations",), "annotations")
    try:
        rows = found["annotations"].reshape(-1)
        names, stored = ([one[field].item() for one in rows] for field in ("relative_im_path", "class"))
        paths, labels = [root / str(name) for name in names], whole_numbers(np.array(stored), file, "class")
    except BrokenRecordError:
        raise
    except Exception as problem:  # a broken .mat raises nearly anything
        raise BrokenRecordError(
            file, "annotations", f"can't be read ({type(problem).__name__}: {problem}): copy the file again"
        ) from problem
    if not labels.ndim or not len(labels) or not 1 <= labels.min() <= labels.max() <= 196:
        raise BrokenRecordError(file, "class", f"expected one class of 1..196 an image, got {labels}: copy the file again")
    once(paths, file, "relative_im_path", "image")
    return _halves(paths, labels, 98)


def read_sop(root: Path) -> tuple[ImageList, ImageList]:
    """``Ebay_train.txt`` and ``Ebay_test.txt``: class_id and path by the names in the first line."""

    def read(file: Path) -> ImageList:
        header, *rows = _lines(file, 4)
        place = find_columns(file, header, {name: (plain(name),) for name in ("class_id", "path")})
        if not rows:
            raise BrokenRecordError(file, "lines", "there is no image: unpack the release again")
        labels = [_number(row[place["class_id"]], file, f"line {number}") for number, row in enumerate(rows, start=2)]
        once([row[place["path"]] for row in rows], file, "path", "image")
        return ImageList([root / row[place["path"]] for row in rows], np.array(labels, np.int64))

    return read(root / "Ebay_train.txt"), read(root / "Ebay_test.txt")


def read_inat(root: Path) -> tuple[ImageList, ImageList]:
    """Lists of images, one path a line, in ``Inat_dataset_splits``; the class: the folder, or the category in ``train2018.json``."""
    table = root / "train2018.json"
    category: dict[str, int] = {}
    if os.path.lexists(table):
        content = read_json(table, "annotations")
        try:
            own = {one["image_id"]: one["category_id"] for one in content["annotations"]}
            category = {one["file_name"]: own[one["id"]] for one in content["images"]}
        except (KeyError, TypeError, ValueError) as problem:
            raise BrokenRecordError(table, "annotations", f"can't be read ({type(problem).__name__}: {problem})") from problem

    def read(file: Path) -> ImageList:
        names = [row[0] for row in _lines(file, 1)]
        once(names, file, "lines", "image")
        kinds = [str(category.get(name, Path(name).parent)) for name in names]
        return ImageList([root / name for name in names], np.unique(kinds, return_inverse=True)[1].astype(np.int64))

    lists = root / "Inat_dataset_splits"
    train, test = read(lists / "Inaturalist_train_set1.txt"), read(lists / "Inaturalist_test_set1.txt")
    return train, ImageList(test.paths, test.labels + len(np.unique(train.labels)))


_READERS = {"cub": read_cub, "cars": read_cars, "sop": read_sop, "inat": read_inat}


class RetrievalView:
    """A PIL image -> (3, S, S) float32, normalised; training: a random crop of 16 to 100 % of the area, mirrored in half of the cases."""

    def __init__(self, size: int, augment: bool) -> None:
        self.size, self.augment = size, augment
        self.normalise = Prepare(False, IMAGENET_MEAN, IMAGENET_STD)

    def __call__(self, picture: Any, draw: tuple[int, int, int]) -> Tensor:
        from torchvision.transforms.functional import pil_to_tensor

        width, height = picture.size
        if self.augment:
            rng = np.random.default_rng(draw)
            area, ratio = width * height * rng.uniform(0.16, 1.0), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
            wide, high = min(width, round((area * ratio) ** 0.5)), min(height, round((area / ratio) ** 0.5))
            left, top = int(rng.integers(width - wide + 1)), int(rng.integers(height - high + 1))
            picture = picture.resize((self.size, self.size), 2, box=(left, top, left + max(wide, 1), top + max(high, 1)))
            image = pil_to_tensor(picture)
            image = image.flip(2) if rng.integers(2) else image
        else:  # the short side becomes 8/7 of the crop, which is central
            scale = self.size * 8 / 7 / min(width, height)
            picture = picture.resize((max(self.size, round(width * scale)), max(self.size, round(height * scale))), 2)
            left, top = (picture.width - self.size) // 2, (picture.height - self.size) // 2
            image = pil_to_tensor(picture.crop((left, top, left + self.size, top + self.size)))
        return self.normalise(image, draw)


class RetrievalImagesDataModule(RetrievalDataModule):
    """Images of classes for training, and of other classes for evaluation.

    Batch: {"image": (B, 3, S, S) float32 normalised by ImageNet's mean and deviation, "label": (B,) int64}

    Labels are 0 to C - 1 in training and C or more in evaluation.

    Args:
        root: The release's folder. ``cub``: ``images.txt``, ``image_class_labels.txt`` and ``images/``. ``cars``: ``cars_annos.mat`` and
            ``car_ims/``. ``sop``: ``Ebay_train.txt``, ``Ebay_test.txt`` and the folders of images. ``inat``: ``train_val2018/`` and
            ``Inat_dataset_splits/``. None: built-in shapes and textures, 20 kinds and colours to train on and 20 others.
        name: ``cub``, ``cars``, ``sop`` or ``inat``.
        image_size: Side S in pixels.
        classes_per_batch: Different classes in a training batch.
        samples_per_class: Samples of each.
        steps_per_epoch: Batches of a process in an epoch; None: as many as the images fill.
        eval_batch_size: Images per process and evaluation step.
        num_workers: Processes that read images.
        seed: Seed of the draws and the augmentation.

    Raises:
        ValueError: A value lies outside its range.
        WrongRootError: ``root`` doesn't hold the release.
        BrokenRecordError: A file is missing or wrong; the message names it and the line.
    """

    def __init__(
        self,
        root: Path | None = None,
        name: Name = "cub",
        image_size: int = 224,
        classes_per_batch: int = 16,
        samples_per_class: int = 4,
        steps_per_epoch: int | None = None,
        eval_batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            classes_per_batch=classes_per_batch,
            samples_per_class=samples_per_class,
            steps_per_epoch=steps_per_epoch,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        one_of(_READERS, name=name)
        at_least(1, image_size=image_size)
        self.save_hyperparameters()
        self.root, self.release = data_path(root), name

    def check_root(self, stage: str = "fit") -> None:
        """Look for the file that shows that it is the release."""
        first, source = _FIRST[self.release]
        self.expect(first, f"unpack {source} there")

    def setup(self, stage: str) -> None:
        """Read the lists; images are read when they are asked for."""
        if self.train_set is not None:
            return
        size = self.hparams["image_size"]
        if self.root is None:
            from PIL import Image

            from lit_methods.datamodules.vision.shapes import draw_shapes

            pictures, kinds = draw_shapes(800, 100, 32, seed=0)
            chosen = [np.flatnonzero((kinds >= low) & (kinds < low + 20)) for low in (0, 50)]
            labels = [kinds[part] - low + 20 * place for place, (part, low) in enumerate(zip(chosen, (0, 50), strict=True))]
            reads: list[Any] = [[Image.fromarray(one) for one in pictures[part]].__getitem__ for part in chosen]
        else:
            self.check_root(stage)
            first = _FIRST[self.release][0]
            train, test = _READERS[self.release](self.root)
            for part, split in ((train, "training"), (test, "test")):
                if not part.paths:
                    raise BrokenRecordError(self.root / first, split, "there is no image of this part: unpack the release again")
            if both := set(train.labels.tolist()) & set(test.labels.tolist()):
                raise BrokenRecordError(self.root / first, f"class {min(both)}", "it stands in training and test: they must be disjoint")
            seen, own = np.unique(train.labels, return_inverse=True)
            labels = [own.astype(np.int64), np.unique(test.labels, return_inverse=True)[1].astype(np.int64) + len(seen)]
            reads = [partial(open_listed, part.paths) for part in (train, test)]
        self.train_labels = labels[0]
        self.train_set = LabelledImages(reads[0], labels[0], RetrievalView(size, True), self.seed)
        self.val_set = LabelledImages(reads[1], labels[1], RetrievalView(size, False), self.seed)


__all__ = ["ImageList", "RetrievalImagesDataModule", "read_cars", "read_cub", "read_inat", "read_sop"]
