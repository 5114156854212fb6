"""Images whose training masks are wrong in places: PASCAL VOC with pseudo-labels; others with shifted outlines."""

import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from lit_methods.checks import one_of
from lit_methods.datamodules.base import LoaderDataModule
from lit_methods.datamodules.errors import BrokenRecordError, MissingFileError, WrongRootError
from lit_methods.datamodules.folders import data_path, user_path
from lit_methods.datamodules.label_store import LabelStore
from lit_methods.datamodules.loaders import ResumableLoader
from lit_methods.datamodules.pictures import IMAGENET_MEAN, IMAGENET_STD, open_indices, open_picture, picture_size
from lit_methods.datamodules.reading import once
from lit_methods.datamodules.segmentation.base import Arrays, SegmentationSamples, resize
from lit_methods.datamodules.segmentation.camvid import ROAD_USERS, check_camvid, read_camvid
from lit_methods.datamodules.segmentation.coins import COINS, coin_tiles
from lit_methods.datamodules.tables import text_of
from lit_methods.runs.folder import run_dir

VOC = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "dining table", "dog", "horse",
    "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv monitor",
)  # fmt: skip
SHAPES = ("background", "disc", "square", "cross")
Name = Literal["voc", "camvid", "coins"]
SIDE = 32  # pixels of a generated image


def draw_shapes(number: int, seed: int, noise: float = 0.2) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Images of 32 x 32 pixels with two of three shapes, half-widths 4 to 7 pixels, and their true masks.

    Args:
        number: Number of images.
        seed: What is drawn follows from it.
        noise: Standard deviation; the shapes have 0.6, 0.8 and 1.0.

    Returns:
        (number, 1, 32, 32) and (number, 32, 32) of 0 to 3; a later shape covers an earlier one.
    """
    rng = np.random.default_rng([23, seed])
    rows, columns = np.ogrid[:SIDE, :SIDE]
    images = rng.normal(0, noise, (number, 1, SIDE, SIDE)).astype(np.float32)
    labels = np.zeros((number, SIDE, SIDE), dtype=np.uint8)
    for label in labels:
        for shape in rng.permutation([1, 2, 3])[:2]:
            half = rng.uniform(4, 7)
            y, x = rows - rng.uniform(7, SIDE - 7), columns - rng.uniform(7, SIDE - 7)
            if shape == 1:
                inside = y**2 + x**2 <= half**2
            elif shape == 2:
                inside = (np.abs(y) <= 0.85 * half) & (np.abs(x) <= 0.85 * half)
            else:
                inside = (np.minimum(np.abs(y), np.abs(x)) <= half / 2.2) & (np.maximum(np.abs(y), np.abs(x)) <= half)
            label[inside] = shape
    return images + np.array([0.0, 0.6, 0.8, 1.0], dtype=np.float32)[labels][:, None], labels


def shift_outlines(labels: NDArray[np.uint8], pixels: tuple[int, int], seed: int) -> NDArray[np.uint8]:
    """Each class of each image dilated or eroded, at random, by ``pixels[0]`` to ``pixels[1]`` steps of a 3 x 3 square.

    An erosion stops before nothing would be left; a dilation covers background alone.
    """
    rng = np.random.default_rng([29, seed])
    square = np.ones((3, 3), dtype=bool)
    noisy = labels.copy()
    for old, new in zip(labels, noisy, strict=True):
        for c in np.unique(old[old > 0]):
            mask, grows, steps = old == c, rng.random() < 0.5, int(rng.integers(pixels[0], pixels[1] + 1))
            for _ in range(steps):
                smaller = ndimage.binary_erosion(mask, square)
                mask = ndimage.binary_dilation(mask, square) if grows else (smaller if smaller.any() else mask)
            new[(old == c) & ~mask] = 0
            new[(new == 0) & mask & (old == 0)] = c
    return noisy


def read_mask(path: Path, classes: int) -> NDArray[np.uint8]:
    """(H, W) class indices of a PNG with a palette, or in grey, as stored; 255 where there is none.

    Raises:
        MissingFileError: No such file.
        BrokenRecordError: It can't be read, has several channels or fractions, or a value above the last class.
    """
    mask = open_indices(path, "mask", "give a folder with a PNG for every image of the list")
    wrong = mask[(mask >= classes) & (mask != 255)]
    if wrong.size:
        raise BrokenRecordError(path, "pixels", f"it has the class {wrong.max()}, and there are {classes}: is this the right folder?")
    return mask.astype(np.uint8)


def read_picture(path: Path) -> NDArray[np.float32]:
    """(3, H, W) in 0 to 1.

    Raises:
        MissingFileError: No such file.
        BrokenRecordError: It can't be read.
    """
    picture = open_picture(path, missing="the list names it; unpack VOC 2012 again")
    return np.asarray(picture, dtype=np.float32).transpose(2, 0, 1) / 255


def jitter_scale_crop(sample: Arrays, rng: np.random.Generator, crop: int, scales: tuple[float, float], jitter: float) -> Arrays:
    """Colours times and plus random numbers, a random scale, a crop of ``crop`` pixels, a flip; what is outside is 0, and 255 in labels."""
    height, width = sample["image"].shape[-2:]
    scale = rng.uniform(*scales)
    image = sample["image"]
    if jitter:
        image = np.clip(image * (1 + rng.uniform(-jitter, jitter, (3, 1, 1))) + rng.uniform(-jitter, jitter), 0, 1).astype(np.float32)
    moved = resize_linear({**sample, "image": image}, (max(1, round(scale * height)), max(1, round(scale * width))))
    height, width = moved["image"].shape[-2:]
    top, left = (int(rng.integers(min(0, side - crop), max(0, side - crop) + 1)) for side in (height, width))
    mirrored = rng.random() < 0.5
    found: Arrays = {}
    for name, array in moved.items():
        canvas = np.full((*array.shape[:-2], crop, crop), 255 if name.startswith("label") else 0, dtype=array.dtype)
        rows, columns = (slice(max(0, start), min(side, start + crop)) for start, side in ((top, height), (left, width)))
        canvas[..., rows.start - top : rows.stop - top, columns.start - left : columns.stop - left] = array[..., rows, columns]
        found[name] = canvas[..., ::-1] if mirrored else canvas
    return found


def resize_linear(sample: Arrays, size: tuple[int, int]) -> Arrays:
    """Image bilinear, labels by the nearest pixel: quicker than the splines of :func:`resize`."""
    image = torch.from_numpy(np.ascontiguousarray(sample["image"]))[None]
    scaled = torch.nn.functional.interpolate(image, size=size, mode="bilinear", align_corners=False)[0].numpy()
    return {"image": scaled} | resize({name: array for name, array in sample.items() if name != "image"}, size)


class NoisyMasksDataModule(LoaderDataModule):
    """Images with noisy training masks in a label store, so that a callback can correct them.

    Batch: {"image": (B, C, H, W) float32, "label": (B, H, W) int64, "label_original": (B, H, W) int64, "index": (B,) int64}

    ``label``: in training the current labels of the store; ``label_original``, in training alone: the annotations with the same
    augmentation. 255 is no class. For callbacks: ``label_store``; ``correction_dataloader()``, the training images as they are;
    ``training_image(index)``; and ``clean_labels(index)``, where true masks are known.

    Layout of ``root``. None: 32 x 32 pixels with two of three shapes, whose outlines are dilated or eroded for training; 4 classes.
    Else: ``JPEGImages/<name>.jpg``, ``SegmentationClass/<name>.png`` and ``ImageSets/Segmentation/{<train>,<val>}.txt`` of VOC
    2012 (``root`` or ``root/VOCdevkit/VOC2012``), and ``masks/<name>.png``, such as pseudo-labels of SEAM; 21 classes. Images are
    normalised by ImageNet's mean and deviation, and evaluated one by one at their own size. With ``name: camvid``
    ``{train,val,test}/*.png`` and ``{train,val,test}annot/*.png`` of the SegNet tutorial: tiles of 40 x 40 pixels of frames reduced three
    times and in grey, with cars, pedestrians and bicyclists, whose outlines are shifted for training; 4 classes. ``name: coins``, without a
    root: tiles of 32 x 32 pixels of scikit-image's photograph of coins, the left two thirds for training with shifted outlines; 2 classes.

    Args:
        root: None: generated shapes.
        masks: Folder of the noisy training masks of VOC.
        train: Name of the list of training images.
        val: Name of the list of validation images.
        clean: Folder of true training masks, such as ``root/SegmentationClassAug``, to measure the labels; None: they aren't measured.
        crop: Pixels of a side of a training crop of ``root``.
        scales: Random scale of a training image of ``root``.
        jitter: Largest relative change of its colours.
        num_train: Generated training images.
        num_val: Generated validation images, and as many for the test.
        pixels: Smallest and largest number of pixels that an outline is shifted by.
        noise: Standard deviation of the generated images' noise.
        labels_folder: Folder of the label store; None: ``labels`` in the run's folder. It is written anew at every fit.
        batch_size: Images per process and step.
        num_workers: Processes that read data.
        seed: Seed of generated training images, shifted outlines, order and augmentation. The generated validation images are the same for
            every seed.
        name: Layout of ``root``, ``voc`` or ``camvid``; or ``coins``, without one.

    Raises:
        ValueError: A value lies outside its range, or ``masks`` is missing.
    """

    label_store: LabelStore | None

    def __init__(
        self,
        root: Path | None = None,
        masks: Path | None = None,
        train: str = "trainaug",
        val: str = "val",
        clean: Path | None = None,
        crop: int = 448,
        scales: tuple[float, float] = (0.5, 1.5),
        jitter: float = 0.1,
        num_train: int = 60,
        num_val: int = 60,
        pixels: tuple[int, int] = (1, 2),
        noise: float = 0.2,
        labels_folder: Path | None = None,
        batch_size: int = 10,
        num_workers: int = 0,
        seed: int = 0,
        name: Name = "voc",
    ) -> None:
        # images of a root have sizes of their own
        whole = root is not None and name == "voc"
        super().__init__(batch_size=batch_size, eval_batch_size=1 if whole else batch_size, num_workers=num_workers, seed=seed)
        one_of(Name, name=name)
        if whole != (masks is not None) or (root is None and name == "camvid") or (root is not None and name == "coins"):
            raise ValueError(
                f"root={root}, name={name!r} and masks={masks}: give the images and the noisy masks of VOC, the root of camvid alone, or "
                "none for coins and for generated shapes"
            )
        if min(num_train, num_val, crop) < 1 or not 0 < scales[0] <= scales[1] or not 0 <= pixels[0] <= pixels[1] or min(noise, jitter) < 0:
            raise ValueError(
                f"num_train={num_train}, num_val={num_val} and crop={crop} must be 1 or more, scales={tuple(scales)} and "
                f"pixels={tuple(pixels)} rising, noise={noise} and jitter={jitter} not negative"
            )
        self.root, self.masks, self.clean = (data_path(path) for path in (root, masks, clean))
        self.lists = {"train": train, "val": val}
        self.crop, self.scales, self.jitter = crop, (float(scales[0]), float(scales[1])), jitter
        self.num_train, self.num_val, self.pixels, self.noise = num_train, num_val, (int(pixels[0]), int(pixels[1])), noise
        self.labels_folder = user_path(labels_folder)
        self.class_names = VOC if whole else {"voc": SHAPES, "camvid": ROAD_USERS, "coins": COINS}[name]
        self.whole_images, self.name = whole, name
        self.label_store = None
        self.clean_labels: Callable[[int], NDArray[np.uint8]] | None = None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self.save_hyperparameters(ignore=["root", "masks", "clean", "labels_folder"])  # a path would block a strict resume

    def check_root(self, stage: str = "fit") -> None:
        """Look for the folders of images and masks."""
        if self.whole_images:
            self._folders()
        elif self.root is not None:
            check_camvid(self.root)

    def _folders(self) -> tuple[Path, Path]:
        """VOC's folder and that of the noisy masks."""
        assert self.root is not None
        assert self.masks is not None
        root = next((folder for folder in (self.root, self.root / "VOCdevkit" / "VOC2012") if (folder / "JPEGImages").is_dir()), None)
        if root is None:
            raise WrongRootError(
                f"root={str(self.root)!r} has no JPEGImages: give the folder VOC2012 of the VOCdevkit, or the one above VOCdevkit"
            )
        if not self.masks.is_dir():
            raise WrongRootError(f"masks={str(self.masks)!r} is no folder: give the one with a PNG for every training image")
        return root, self.masks

    def setup(self, stage: str) -> None:
        """Generate, or look for the files; for a fit, write the label store.

        Raises:
            WrongRootError: The layout isn't there.
        """
        read, names, noisy = self._files() if self.whole_images else self._in_memory()
        self._read = read
        if stage == "fit" and self.label_store is None:
            self.label_store = self._store(noisy)
            shift = partial(jitter_scale_crop, crop=self.crop, scales=self.scales, jitter=self.jitter)
            transform, plain = (partial(_normalised, shift), partial(_normalised, None)) if self.whole_images else (None, None)
            self.train_set = SegmentationSamples(names, partial(_with_labels, read, self.label_store), transform, seed=self.seed)
            self._plain_set = SegmentationSamples(names, partial(_image_alone, read), plain)

    def _store(self, noisy: Iterable[NDArray[np.uint8]]) -> LabelStore:
        folder = self.labels_folder
        if folder is None and self.trainer is not None:
            folder = run_dir(self.trainer) / "labels"
        if folder is None:
            self._scratch = tempfile.TemporaryDirectory(prefix="labels-")
            folder = Path(self._scratch.name)
        if self.trainer is None or self.trainer.is_global_zero:
            LabelStore.create(folder, noisy)
        if self.trainer is not None:
            self.trainer.strategy.barrier("labels are written")
        return LabelStore(folder)

    def _in_memory(self) -> tuple[Callable[[int], NDArray[np.float32]], int, Iterable[NDArray[np.uint8]]]:
        if self.name == "coins":
            images, labels = coin_tiles(train=True)
            held_out = [coin_tiles(train=False)] * 2
        elif self.root is None:
            images, labels = draw_shapes(self.num_train, self.seed + 1000, self.noise)
            held_out = [draw_shapes(self.num_val, seed, self.noise) for seed in (1, 2)]  # the same for every seed
        else:
            check_camvid(self.root)
            (images, labels), *held_out = (_camvid_tiles(self.root, part) for part in ("train", "val", "test"))
        self.val_set, self.test_set = (SegmentationSamples(len(part[0]), partial(_pair, *part)) for part in held_out)
        self.clean_labels = labels.__getitem__
        return images.__getitem__, len(images), shift_outlines(labels, self.pixels, self.seed)

    def _files(self) -> tuple[Callable[[int], NDArray[np.float32]], int, Iterable[NDArray[np.uint8]]]:
        root, masks = self._folders()
        names = {}
        for part, name in self.lists.items():
            path = root / "ImageSets" / "Segmentation" / f"{name}.txt"
            if not path.is_file():
                raise MissingFileError(
                    path, part, "no such list; trainaug.txt comes with the augmented annotations (SBD), not with VOC 2012"
                )
            names[part] = [line.split()[0] for line in text_of(path, "", part).splitlines() if line.strip()]
            if not names[part]:
                raise BrokenRecordError(path, part, "the list is empty")
            once(names[part], path, part, "image")
        images = [[root / "JPEGImages" / f"{name}.jpg" for name in names[part]] for part in ("train", "val")]
        noisy = [masks / f"{name}.png" for name in names["train"]]
        truth = [root / "SegmentationClass" / f"{name}.png" for name in names["val"]]
        classes = len(VOC)
        if self.clean is not None:
            self.clean_labels = partial(
                _read_of, [self.clean / f"{name}.png" for name in names["train"]], partial(read_mask, classes=classes)
            )
        held_out = partial(_pair_of_files, list(zip(images[1], truth, strict=True)), classes)
        self.val_set = SegmentationSamples(len(truth), held_out, partial(_normalised, None))
        self.test_set = self.val_set
        pairs = zip(images[0], noisy, strict=True)
        return partial(_read_of, images[0], read_picture), len(noisy), (_fitting_mask(image, mask, classes) for image, mask in pairs)

    def training_image(self, index: int) -> Tensor:
        """(C, H, W) as stored."""
        return torch.from_numpy(self._read(index))

    def correction_dataloader(self) -> ResumableLoader:
        """``image`` and ``index`` of the training images, in order, each once over all ranks, not augmented."""
        return self.loader(self._plain_set)  # type: ignore[no-any-return]


def _camvid_tiles(root: Path, part: str) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """(N, 1, 40, 40) and (N, 40, 40)."""
    images, labels = read_camvid(root, part, 3, 40)
    return images.reshape(-1, 1, 40, 40), labels.reshape(-1, 40, 40)


def _read_of(paths: list[Path], read: Callable[[Path], Any], index: int) -> Any:
    return read(paths[index])


def _pair(images: NDArray[Any], labels: NDArray[Any], index: int) -> Arrays:
    return {"image": images[index], "label": labels[index]}


def _pair_of_files(files: list[tuple[Path, Path]], classes: int, index: int) -> Arrays:
    image, mask = files[index]
    return {"image": read_picture(image), "label": _fitting_mask(image, mask, classes)}


def _fitting_mask(image: Path, path: Path, classes: int) -> NDArray[np.uint8]:
    """A mask that has the size of its image.

    Raises:
        BrokenRecordError: Another size: stretched, its classes would lie on other pixels.
    """
    mask, size = read_mask(path, classes), picture_size(image, missing="the list names it; unpack VOC 2012 again")
    if mask.shape != size:
        raise BrokenRecordError(
            path,
            "size",
            f"is {mask.shape[1]} x {mask.shape[0]} pixels, its image {size[1]} x {size[0]}: they don't belong together, make the mask at "
            "the size of the image",
        )
    return mask


def _with_labels(image: Callable[[int], NDArray[Any]], store: LabelStore, index: int) -> Arrays:
    return {"image": image(index), "label": store.current(index), "label_original": store.original(index)}


def _image_alone(image: Callable[[int], NDArray[Any]], index: int) -> Arrays:
    return {"image": image(index)}


def _normalised(first: Callable[[Arrays, np.random.Generator], Arrays] | None, sample: Arrays, rng: np.random.Generator) -> Arrays:
    if first is not None:
        sample = first(sample, rng)
    mean, std = (np.array(values, dtype=np.float32)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return {**sample, "image": (sample["image"] - mean) / std}


__all__ = ["NoisyMasksDataModule", "draw_shapes", "jitter_scale_crop", "read_mask", "read_picture", "shift_outlines"]
