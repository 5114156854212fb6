"""AgeDB-DIR and IMDB-WIKI-DIR: the age of a face, with skewed training ages (arXiv:2102.09554)."""

from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lit_methods.checks import at_least, one_of
from lit_methods.datamodules.errors import BrokenRecordError
from lit_methods.datamodules.folders import data_path
from lit_methods.datamodules.pictures import crop_and_flip, open_picture
from lit_methods.datamodules.reading import once
from lit_methods.datamodules.regression.base import RegressionDataModule, RegressionSamples, Reweighting
from lit_methods.datamodules.tables import named_rows
from lit_methods.tasks.imbalanced_regression.weights import Kernel, Reweight

_FILES = {"agedb": "agedb.csv", "imdb_wiki": "imdb_wiki.csv"}
_SPLITS = ("train", "val", "test")
_PAD = 16  # pixels around a training image of 224


def read_ages(file: Path) -> dict[str, tuple[list[str], NDArray[np.float32]]]:
    """Paths and ages of each split.

    Args:
        file: The benchmark's csv, with the columns ``age``, ``path`` and ``split`` (train, val or test).

    Returns:
        Split -> paths relative to the file's folder, and (N,) ages in years.

    Raises:
        BrokenRecordError: A column, or all rows of a split are missing, or a row is wrong; the message names the line.
    """
    found: dict[str, tuple[list[str], list[float]]] = {split: ([], []) for split in _SPLITS}
    for line, (stored, path, split) in named_rows(file, ("age", "path", "split"), "copy the benchmark's table to root"):
        place = f"line {line}"
        try:
            age = float(stored)
        except ValueError:
            raise BrokenRecordError(file, place, f"age is {stored!r}, expected a number of years") from None
        if not 0 <= age <= 200 or split not in found or not path:
            raise BrokenRecordError(
                file,
                place,
                f"expected an age of 0 to 200, a path and a split, one of {_SPLITS}; got age {stored!r}, path {path!r}, split {split!r}",
            )
        found[split][0].append(path)
        found[split][1].append(age)
    for split, (paths, _) in found.items():
        once(paths, file, "path", "image")
        if not paths:
            raise BrokenRecordError(file, "split", f"there is no row of the split {split}: copy the file again")
    return {split: (paths, np.array(ages, np.float32)) for split, (paths, ages) in found.items()}


def _open(root: Path, paths: list[str], index: int) -> Any:
    return open_picture(root / paths[index], missing="unpack the images of the benchmark below root")


class FaceView:
    """A PIL image -> (3, S, S) float32 in [-1, 1]; in training a random crop after padding, and a mirror image in half of the cases."""

    def __init__(self, size: int, augment: bool) -> None:
        self.size, self.augment = size, augment

    def __call__(self, picture: Any, draw: tuple[int, ...]) -> Tensor:
        from torchvision.transforms.functional import pil_to_tensor

        image = pil_to_tensor(picture.resize((self.size, self.size), resample=2))  # 2: bilinear
        if self.augment:
            image = crop_and_flip(image, draw, border=round(_PAD * self.size / 224))
        return image.float().div_(127.5).sub_(1)


def _built_in(split: str, count: int) -> tuple[list[Any], NDArray[np.float32]]:
    """Bars of all angles as pictures, frequent small labels in training."""
    from PIL import Image

    from lit_methods.datamodules.regression.bars import LABELS, draw_bars

    rng = np.random.default_rng([_SPLITS.index(split), 5])
    share = np.exp(-np.arange(LABELS) / 9) if split == "train" else np.ones(LABELS)
    labels = rng.choice(LABELS, count, p=share / share.sum())
    grey = (255 * np.clip(draw_bars(labels, 0.2, rng)[:, 0], 0, 1)).astype(np.uint8)
    return [Image.fromarray(one).convert("RGB") for one in grey], labels.astype(np.float32)


class AgeDataModule(RegressionDataModule):
    """AgeDB-DIR or IMDB-WIKI-DIR: faces with the age in years. Training ages are skewed, validation and test balanced.

    Batch: {"image": (B, 3, S, S) float32 in [-1, 1], "target": (B,) float32 years, "count": (B,) int64}

    ``count``: the training images of the same age. In training there is with ``reweight``
    also ``weight`` (B,) float32, and with ``views`` also ``view_1``, ... like ``image`` with other random crops and mirror images.

    Args:
        root: Folder with ``agedb.csv`` (or ``imdb_wiki.csv``) of the benchmark and the images that it names. None: built-in pictures of
            bars whose angle stands for the age, 400 for training.
        name: ``agedb`` or ``imdb_wiki``.
        image_size: Side S in pixels.
        views: Further views of a training image; ConR needs 2.
        reweight: Weight of a training sample by its age: ``none``, ``inverse`` or ``sqrt_inv`` frequency.
        lds: Smooth the frequencies over neighbouring ages.
        lds_kernel: ``gaussian``, ``triang`` or ``laplace``.
        lds_kernel_size: Width of the kernel in years, odd; the benchmark: 5, ConR on AgeDB: 9.
        lds_sigma: Standard deviation of the kernel in years; the benchmark: 2, ConR on AgeDB: 1.
        batch_size: Images per process and step.
        num_workers: Processes that read images.
        seed: Seed of the order and augmentation.

    Raises:
        ValueError: A value lies outside its range.
        WrongRootError: ``root`` doesn't hold the benchmark.
        BrokenRecordError: A file is missing or wrong; the message names it and the line.
    """

    def __init__(
        self,
        root: Path | None = None,
        name: Literal["agedb", "imdb_wiki"] = "agedb",
        image_size: int = 224,
        views: int = 0,
        reweight: Reweight = "none",
        lds: bool = False,
        lds_kernel: Kernel = "gaussian",
        lds_kernel_size: int = 5,
        lds_sigma: float = 2.0,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        rare = Reweighting(reweight, lds, lds_kernel, lds_kernel_size, lds_sigma)
        super().__init__(rare, 1.0, 121, batch_size=batch_size, num_workers=num_workers, seed=seed)
        one_of(_FILES, name=name)
        at_least(1, image_size=image_size)
        at_least(0, views=views)
        self.save_hyperparameters()
        self.root, self.release = data_path(root), name  # Lightning has a use of its own for `name`

    def check_root(self, stage: str = "fit") -> None:
        """Look for the table."""
        self.expect(_FILES[self.release], "put the table of YyzHarry/imbalanced-regression and the images there", "pictures")

    def setup(self, stage: str) -> None:
        """Read the table; images are read when they are asked for."""
        if self.train_set is not None:
            return
        if self.root is None:
            made = {split: _built_in(split, count) for split, count in zip(_SPLITS, (400, 122, 122), strict=True)}
            reads: dict[str, Any] = {split: pictures.__getitem__ for split, (pictures, _) in made.items()}
            ages = {split: labels for split, (_, labels) in made.items()}
        else:
            self.check_root(stage)
            table = read_ages(self.root / _FILES[self.release])
            reads = {split: partial(_open, self.root, paths) for split, (paths, _) in table.items()}
            ages = {split: labels for split, (_, labels) in table.items()}
        labels = dict(zip(_SPLITS, self.known(ages["train"], [ages["val"], ages["test"]]), strict=True))
        size, views = self.hparams["image_size"], self.hparams["views"]
        self.train_set = RegressionSamples(reads["train"], labels["train"], FaceView(size, True), views, self.seed)
        self.val_set, self.test_set = (RegressionSamples(reads[s], labels[s], FaceView(size, False)) for s in ("val", "test"))


__all__ = ["AgeDataModule", "read_ages"]
