"""Slices of volumes with several organs: Synapse, ACDC, and generated ones; tiles of street scenes. Many have no organ at all."""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lit_methods.checks import at_least, one_of, share, within
from lit_methods.datamodules.base import LoaderDataModule
from lit_methods.datamodules.errors import BrokenRecordError, MissingFileError, WrongRootError
from lit_methods.datamodules.folders import data_path, listed
from lit_methods.datamodules.reading import finite, once, read_hdf5, read_npz, whole_numbers
from lit_methods.datamodules.segmentation.base import Arrays, SegmentationSamples, Volumes, flip_or_rotate, resize
from lit_methods.datamodules.segmentation.camvid import ROAD_USERS, check_camvid, read_camvid
from lit_methods.datamodules.tables import text_of

Name = Literal["generated", "synapse", "acdc", "camvid"]
SYNAPSE = ("background", "aorta", "gallbladder", "left kidney", "right kidney", "liver", "pancreas", "spleen", "stomach")
ACDC = ("background", "right ventricle", "myocardium", "left ventricle")
_Volumes = tuple[NDArray[np.float32], NDArray[np.uint8]]  # (N, slices, H, W) each
GENERATED = ("background", "bright", "middle", "dark")
SIDE, DEPTH = 24, 16  # pixels of a generated slice, slices of a volume
_WHERE = "registration and preparation: see the TransUNet repository, which the benchmark's layout comes from"


def make_volumes(number: int, seed: int, noise: float = 0.25) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Volumes of 16 slices of 24 x 24 pixels with up to three organs, ellipsoids of 1.0, 0.7 and 0.45, in the middle half of the slices.

    Args:
        number: Number of volumes.
        seed: What is drawn follows from it.
        noise: Standard deviation of what is added; a smooth field of up to 0.3 is added, too.

    Returns:
        Images (number, 16, 24, 24) and labels of the same shape, 0 to 3. About half of the slices have no organ.
    """
    rng = np.random.default_rng([17, seed])
    z, y, x = np.ogrid[:DEPTH, :SIDE, :SIDE]
    images = np.zeros((number, DEPTH, SIDE, SIDE), dtype=np.float32)
    labels = np.zeros(images.shape, dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        tilt = rng.uniform(-0.3, 0.3, 2)
        image += (tilt[0] * (y / SIDE - 0.5) + tilt[1] * (x / SIDE - 0.5)).astype(np.float32)
        for organ, level in enumerate((1.0, 0.7, 0.45), start=1):
            if rng.random() < 0.15:
                continue
            middle, centre = rng.uniform(6, 10), rng.uniform(6, SIDE - 6, 2)
            radii = np.array([rng.uniform(2, 3.5), *rng.uniform(2.5, 5.0, 2)])
            inside = ((z - middle) / radii[0]) ** 2 + ((y - centre[0]) / radii[1]) ** 2 + ((x - centre[1]) / radii[2]) ** 2 <= 1
            image[inside], label[inside] = level, organ
    images += rng.normal(0, noise, images.shape).astype(np.float32)
    return images, labels


def add_spurious(labels: NDArray[np.uint8], share: float, seed: int) -> NDArray[np.uint8]:
    """Labels (N, H, W) with a square of 4 x 4 pixels of some organ in a share of those slices that have none."""
    rng = np.random.default_rng([19, seed])
    labels = labels.copy()
    empty = np.flatnonzero(~labels.reshape(len(labels), -1).any(1))
    for index in rng.permutation(empty)[: round(share * len(empty))]:
        row, column = rng.integers(0, labels.shape[1] - 4), rng.integers(0, labels.shape[2] - 4)
        labels[index, row : row + 4, column : column + 4] = rng.integers(1, len(GENERATED))
    return labels


def read_record(path: Path) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Image and label of a ``.npz`` or ``.h5`` file, of one shape, (H, W) or (S, H, W).

    Raises:
        MissingFileError: There is no such file.
        BrokenRecordError: It can't be read, lacks a field, or the fields don't fit.
        ImportError: h5py isn't installed.
    """
    missing = "it is in the list and not there: unpack the data again, or correct the list"
    read = read_npz if path.suffix == ".npz" else read_hdf5
    try:
        fields = read(path, ("image", "label"), "file", missing)
    except BrokenRecordError as error:
        if error.field != "file" or not error.problem.startswith("can't be read as"):
            raise
        raise BrokenRecordError(path, "file", f"not a readable {path.suffix} file, it {error.problem}") from error
    for name in ("image", "label"):
        if name not in fields:
            raise BrokenRecordError(path, name, f"the file has {sorted(fields) or 'neither image nor label'}: expected image and label")
    image, label = fields["image"], fields["label"]
    if image.shape != label.shape or image.ndim not in (2, 3):
        raise BrokenRecordError(path, "label", f"image is {image.shape} and label {label.shape}: expected one shape, (H, W) or (S, H, W)")
    if image.dtype.kind == "f" and not np.isfinite(image).all():
        raise BrokenRecordError(path, "image", "it has values that aren't finite: prepare the file again")
    if label.dtype.kind == "f" and (np.floor(label) != label).any():
        raise BrokenRecordError(path, "label", "it has values that are no whole number of 0 to 255: prepare the file again")
    with np.errstate(over="ignore"):
        image = finite(image.astype(np.float32), path, "image")
    whole = whole_numbers(label, path, "label")
    if whole.size and not 0 <= whole.min() <= whole.max() <= 255:
        raise BrokenRecordError(path, "label", "it has values that are no whole number of 0 to 255: prepare the file again")
    return image, whole.astype(np.uint8)


def _checked(path: Path, dims: int, classes: int) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    image, label = read_record(path)
    if image.ndim != dims:
        raise BrokenRecordError(path, "image", f"it is {image.shape}: expected {'(H, W)' if dims == 2 else '(S, H, W)'}")
    if label.max(initial=0) >= classes:
        raise BrokenRecordError(path, "label", f"it goes up to {label.max()}, and there are {classes} classes: is this the right data set?")
    return image, label


class OrganSlicesDataModule(LoaderDataModule):
    """Slices of volumes with several organs, each with its index, in one view or two.

    Batch: {"image": (B, 1, H, W) float32, "label": (B, H, W) int64, "index": (B,) int64, "dense": (B,) bool}

    With two views there are also ``image_2`` and ``label_2``, transformed anew. ``dense``, in training data of ``generated`` and
    ``camvid``: whether the slice truly has an organ. A view is turned by quarters and flipped, or rotated by less than 20 degrees, and then
    resized. Test batches are whole volumes with ``volume``; so are validation batches of ``synapse`` and ``acdc``.

    ``generated``: slices of 24 x 24 pixels; half of them have no organ, and a share of these a square that is wrongly labelled. Validation
    and test are clean. Nothing is downloaded.
    ``synapse``: ``root/train_npz/case*_slice*.npz`` and ``root/test_vol_h5/case*.npy.h5``, 9 classes. There is no validation part:
    validation and test are the same volumes.
    ``acdc``: ``root/ACDC_training_slices/patient*_frame*_slice_*.h5`` and ``root/ACDC_training_volumes/patient*_frame*.h5``, 4 classes.
    Without lists the patients are taken in order: 70 % for training, 10 % validation, 20 % test.
    ``camvid``: ``root/{train,val,test}/*.png`` and ``root/{train,val,test}annot/*.png`` of the SegNet tutorial, street scenes. A volume is
    a frame, reduced five times and in grey; its slices are tiles of 24 x 24 pixels; the organs are cars, pedestrians and bicyclists. Many
    tiles have none, and a share of these gets a wrong label in training.
    HDF5 needs ``pip install 'lit-methods[segmentation]'``.

    Args:
        root: Folder of ``synapse``, ``acdc`` or ``camvid``; None: generated slices.
        name: Data set: ``generated``, ``synapse``, ``acdc`` or ``camvid``.
        image_size: Pixels of a side that the network sees; None: as stored.
        views: 1 or 2 of a training slice.
        augment: Turn and rotate training slices.
        train_list: File with the names of the training slices, one a line, without ending; the official subsets are such lists.
        val_list: File with the names of the validation volumes.
        test_list: File with the names of the test volumes.
        num_train: Generated training volumes of 16 slices.
        num_val: Generated validation volumes, and as many for the test.
        spurious: Share of the training slices of ``generated`` and ``camvid`` without an organ that get a wrong label.
        noise: Standard deviation of the generated images' noise.
        batch_size: Slices per process and step.
        num_workers: Processes that read data.
        seed: Seed of generated training volumes, order and views. The generated validation volumes are the same for every seed.

    Raises:
        ValueError: A value lies outside its range, or ``root`` and ``name`` don't go together.
    """

    def __init__(
        self,
        root: Path | None = None,
        name: Name = "generated",
        image_size: int | None = None,
        views: int = 2,
        augment: bool = True,
        train_list: Path | None = None,
        val_list: Path | None = None,
        test_list: Path | None = None,
        num_train: int = 10,
        num_val: int = 6,
        spurious: float = 0.1,
        noise: float = 0.25,
        batch_size: int = 16,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        one_of(Name, name=name)
        if (root is None) != (name == "generated"):
            raise ValueError(f"root={root} and name={name!r}: give root for synapse, acdc and camvid, and none for generated")
        within("[1, 2]", views=views)
        share(spurious=spurious)
        at_least(1, num_train=num_train, num_val=num_val)
        within("[0, inf)", noise=noise)
        self.root, self.name = data_path(root), name
        self.image_size, self.views, self.augment = image_size, views, augment
        self.lists = {"train": data_path(train_list), "val": data_path(val_list), "test": data_path(test_list)}
        self.num_train, self.num_val, self.spurious, self.noise = num_train, num_val, spurious, noise
        self.class_names = {"generated": GENERATED, "synapse": SYNAPSE, "acdc": ACDC, "camvid": ROAD_USERS}[name]
        self.save_hyperparameters(ignore=["root", "train_list", "val_list", "test_list"])  # a path would block a strict resume

    def check_root(self, stage: str = "fit") -> None:
        """Look for the folders of slices and volumes."""
        if self.root is None:
            return
        if self.name == "camvid":
            check_camvid(self.root)
        else:
            self._folders(self.root)

    def _folders(self, root: Path) -> tuple[Path, Path]:
        """Those of slices and of volumes."""
        names = ("train_npz", "test_vol_h5") if self.name == "synapse" else ("ACDC_training_slices", "ACDC_training_volumes")
        for name in names:
            if not (root / name).is_dir():
                raise WrongRootError(f"root={str(root)!r} has no folder {name}: give the folder of the prepared {self.name} data; {_WHERE}")
        return root / names[0], root / names[1]

    def setup(self, stage: str) -> None:
        """Generate, or look for the files.

        Raises:
            WrongRootError: The layout isn't there.
            MissingFileError: A listed file isn't there.
        """
        if self.train_set is not None:
            return
        if self.root is None:
            held_out = make_volumes(2 * self.num_val, 0, self.noise)  # the same for every seed
            val, test = zip(*((part[: self.num_val], part[self.num_val :]) for part in held_out), strict=True)
            self._in_memory(make_volumes(self.num_train, self.seed + 1000, self.noise), val, test)
            return
        if self.name == "camvid":
            check_camvid(self.root)
            self._in_memory(*(read_camvid(self.root, part, 5, SIDE) for part in ("train", "val", "test")))
            return
        slices, volumes = self._folders(self.root)
        endings = (".npz", ".npy.h5") if self.name == "synapse" else (".h5", ".h5")
        files = [
            self._files(part, folder, endings[part != "train"]) for part, folder in (("train", slices), ("val", volumes), ("test", volumes))
        ]
        classes, transform = len(self.class_names), partial(_transform, self.augment, self.image_size)
        self.train_set = SegmentationSamples(
            len(files[0]), _Slices(files[0], classes, self.image_size is not None), transform, self.views, seed=self.seed
        )
        self.val_set, self.test_set = (
            Volumes([path.name.split(".")[0] for path in part], partial(_volume, part, classes, self.image_size)) for part in files[1:]
        )

    def _files(self, part: str, folder: Path, ending: str) -> list[Path]:
        names_file = self.lists[part]
        if names_file is not None:
            content = text_of(names_file, "give the list of names, one a line", f"{part}_list")
            names = [line.strip() for line in content.splitlines() if line.strip()]
            if not names:
                raise BrokenRecordError(names_file, f"{part}_list", "the list is empty: give names, one a line")
            once(names, names_file, f"{part}_list")
            paths = [folder / (name if name.endswith(ending) else f"{name}{ending}") for name in names]
            if missing := [path for path in paths if not path.is_file()]:
                raise MissingFileError(missing[0], "file", f"one of {len(missing)} that {names_file} names and that aren't there")
        else:
            paths = listed(folder, f"*{ending}")
            if self.name == "acdc":
                paths = self._patients(paths, part)
        if not paths:
            raise WrongRootError(
                f"{folder} has no file *{ending} for the {part} part: give the folder of the prepared {self.name} data; {_WHERE}"
            )
        return paths

    def _patients(self, paths: Sequence[Path], part: str) -> list[Path]:
        patient = {path: re.match(r"patient(\d+)", path.name) for path in paths}
        numbers = sorted({int(found[1]) for found in patient.values() if found})
        ends = {"train": (0.0, 0.7), "val": (0.7, 0.8), "test": (0.8, 1.0)}[part]
        chosen = set(numbers[round(ends[0] * len(numbers)) : round(ends[1] * len(numbers))])
        return [path for path, found in patient.items() if found and int(found[1]) in chosen]

    def _in_memory(self, train: _Volumes, val: _Volumes, test: _Volumes) -> None:
        """Volumes, each with its labels, as single slices; those of the test whole."""
        images, truth = train[0].reshape(-1, SIDE, SIDE), train[1].reshape(-1, SIDE, SIDE)
        held_out, held_out_labels = val[0].reshape(-1, SIDE, SIDE), val[1].reshape(-1, SIDE, SIDE)
        labels = add_spurious(truth, self.spurious, self.seed)
        dense = truth.reshape(len(truth), -1).max(1) > 0
        self.train_set = SegmentationSamples(
            len(images),
            partial(_row, images, labels),
            partial(_transform, self.augment, self.image_size),
            self.views,
            extra={"dense": dense},
            seed=self.seed,
        )
        self.val_set = SegmentationSamples(len(held_out), partial(_row, held_out, held_out_labels), partial(_fit_size, self.image_size))
        volumes, volume_labels = test
        volumes = _fit_size(self.image_size, {"image": volumes})["image"]
        names = [f"{self.name} {number}" for number in range(len(volumes))]
        self.test_set = Volumes(names, partial(_pair, volumes, volume_labels))


# No methods of the datamodule: a spawned loader worker gets the data set pickled, and with a method would come the
# datamodule, its trainer, and a module that callbacks stand around.


class _Slices:
    """Reads slices: index -> arrays. Where they aren't resized, a batch needs one size, that of the first one that is read."""

    def __init__(self, files: Sequence[Path], classes: int, resized: bool) -> None:
        self.files, self.classes, self.resized = files, classes, resized
        self.shape: tuple[int, ...] | None = None

    def __call__(self, index: int) -> Arrays:
        image, label = _checked(self.files[index], 2, self.classes)
        if not self.resized:
            self.shape = image.shape if self.shape is None else self.shape
            if image.shape != self.shape:
                raise BrokenRecordError(
                    self.files[index], "size", f"is {image.shape}, others are {self.shape}: set image_size, or leave it out"
                )
        return {"image": image, "label": label}


def _volume(files: Sequence[Path], classes: int, image_size: int | None, index: int) -> tuple[NDArray[Any], NDArray[Any]]:
    image, label = _checked(files[index], 3, classes)
    return _fit_size(image_size, {"image": image})["image"], label


def _transform(augment: bool, image_size: int | None, sample: Arrays, rng: np.random.Generator) -> Arrays:
    return _fit_size(image_size, flip_or_rotate(sample, rng) if augment else sample)


def _fit_size(image_size: int | None, sample: Arrays, rng: np.random.Generator | None = None) -> Arrays:
    return sample if image_size is None else resize(sample, (image_size, image_size))


def _row(images: NDArray[Any], labels: NDArray[Any], index: int) -> Arrays:
    return {"image": images[index], "label": labels[index]}


def _pair(images: NDArray[Any], labels: NDArray[Any], index: int) -> tuple[NDArray[Any], NDArray[Any]]:
    return images[index], labels[index]


__all__ = ["OrganSlicesDataModule", "add_spurious", "make_volumes", "read_record"]
