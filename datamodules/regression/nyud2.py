"""NYUD2-DIR: the depth of each pixel of an indoor photograph, with skewed depths (arXiv:2102.09554)."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_methods.checks import at_least
from lit_methods.datamodules.base import Samples
from lit_methods.datamodules.errors import BrokenRecordError
from lit_methods.datamodules.folders import data_path
from lit_methods.datamodules.pictures import GREY_16_MODES, IMAGENET_MEAN, IMAGENET_STD, open_indices, open_picture
from lit_methods.datamodules.reading import once, read_npy
from lit_methods.datamodules.regression.base import RegressionDataModule, Reweighting
from lit_methods.datamodules.tables import find_columns, rows_of
from lit_methods.tasks.imbalanced_regression.weights import Kernel, Reweight, smoothing_kernel

HEIGHT, WIDTH = 228, 304  # pixels of an image after the crop; a training target has half of each
_SHORT = 240  # pixels of the short side before the crop
_BINS = 100  # of 0.1 m
_TURN, _EDGE = 5.0, 16  # degrees, at most; pixels that a corner can move by beyond the crop
_JITTER = 0.4
_STORED = ((("L",), 10 / 255), (GREY_16_MODES, 1 / 1000))  # depths of training and test: 8 and 16 bits, metres of one step


def depth_bins(depth: NDArray[np.float32]) -> NDArray[np.int64]:
    """Bin of each depth in metres: 0.1 m each, all beyond 9.9 m in the last one."""
    return np.minimum(np.floor(depth.astype(np.float64) * 10 + 1e-4).astype(np.int64), _BINS - 1)


def bin_weights(
    counts: NDArray[np.int64], reweight: Reweight, lds: bool, kernel: Kernel, kernel_size: int, sigma: float
) -> NDArray[np.float32]:
    """Weight of a pixel in each bin: one over the frequency, of mean 1 over all pixels.

    Bins that no pixel was found in count like the rarest of the others. LDS mirrors the frequencies at the ends, unlike that for ages.

    Args:
        counts: (K,) pixels in each bin.
        reweight: ``inverse`` or ``sqrt_inv``.
        lds: Smooth the frequencies over neighbouring bins.
        kernel: A kernel of :func:`~lit_methods.tasks.imbalanced_regression.weights.smoothing_kernel`.
        kernel_size: Width of the kernel in bins, odd.
        sigma: Standard deviation of the kernel in bins.

    Returns:
        (K,) float32 > 0.
    """
    frequency = np.maximum(counts, counts[counts > 0].min()).astype(np.float64)
    if reweight == "sqrt_inv":
        frequency = np.sqrt(frequency)
    if lds:
        from scipy.ndimage import convolve1d

        window = smoothing_kernel(kernel, kernel_size, sigma)
        frequency = convolve1d(frequency, weights=window / window.max(), mode="reflect")
    weights = 1 / frequency
    return (weights * (counts.sum() / (counts * weights).sum())).astype(np.float32)


def read_list(file: Path) -> list[tuple[Path, Path]]:
    """Images and depths of a list of the benchmark: two paths a line, whose first folder, ``data``, stands for the file's own.

    The official files have no header. Where the first line holds no path, it is one: ``image`` and ``depth`` go by its names.

    Raises:
        MissingFileError: There is no such file.
        BrokenRecordError: A line doesn't have two paths, or there is none.
    """
    found, places = [], [0, 1]
    for number, (line, row) in enumerate(rows_of(file, "the benchmark is incomplete here, copy it again")):
        if not number and all(len(Path(word).parts) == 1 and not Path(word).suffix for word in row):  # a header: no cell is a path
            where = find_columns(file, row, {"image": ("image", "rgb", "images"), "depth": ("depth", "depths")})
            places = [where["image"], where["depth"]]
            continue
        parts = [Path(row[place]).parts[1:] if place < len(row) else () for place in places]
        if not all(parts) or (places == [0, 1] and len(row) != 2):
            raise BrokenRecordError(file, f"line {line}", f"expected two paths, data/image,data/depth, got {','.join(row)!r}")
        found.append((file.parent.joinpath(*parts[0]), file.parent.joinpath(*parts[1])))
    if not found:
        raise BrokenRecordError(file, "lines", "there are none: copy the file again")
    once([image for image, _ in found], file, "lines", "image")
    return found


def _read(pairs: list[tuple[Path, Path]], stored: tuple[tuple[str, ...], float], index: int) -> tuple[Any, Any]:
    """An RGB image, and its depth in metres as a picture of float32, out of a picture of certain modes and metres a step."""
    from PIL import Image

    file, depth = pairs[index]
    (modes, unit), missing = stored, "the benchmark is incomplete here, copy it again"
    image, values = open_picture(file), open_indices(depth, "depth", missing, modes)
    if values.shape != (image.height, image.width):
        raise BrokenRecordError(depth, "depth", f"expected one number a pixel of {image.size}, got {values.shape}")
    return image, Image.fromarray(values.astype(np.float32) * np.float32(unit))


def _scaled(image: Any, depth: Any) -> tuple[Any, Any]:
    """The short side becomes 240."""
    scale = _SHORT / min(image.size)
    size = int(image.width * scale), int(image.height * scale)
    small, near = (part if part.size == size else part.resize(size, how) for part, how in ((image, 2), (depth, 0)))  # bilinear, nearest
    return small, near


def _cropped(image: Any, depth: Any) -> tuple[Any, Any]:
    """The middle 304 x 228 pixels."""
    left, top = round((image.width - WIDTH) / 2), round((image.height - HEIGHT) / 2)
    box = (left, top, left + WIDTH, top + HEIGHT)
    return image.crop(box), depth.crop(box)


def _augmented(image: Any, depth: Any, rng: np.random.Generator) -> tuple[Any, Any]:
    """Mirrored in half of the cases, turned by up to 5 degrees, with other brightness, contrast and saturation; wider all round.

    What turns into the picture is its own mirror image: a depth of 0 there would be a target, and a rare one.
    """
    from PIL import Image, ImageEnhance

    if rng.integers(2):
        image, depth = (part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for part in (image, depth))
    angle = rng.uniform(-_TURN, _TURN)
    edge = [(_EDGE, _EDGE)] * 2
    image = Image.fromarray(np.pad(np.asarray(image), [*edge, (0, 0)], mode="reflect")).rotate(angle, Image.Resampling.BILINEAR)
    depth = Image.fromarray(np.pad(np.asarray(depth), edge, mode="reflect")).rotate(angle, Image.Resampling.NEAREST)
    kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for kind in rng.permutation(3):
        image = kinds[kind](image).enhance(1 + rng.uniform(-_JITTER, _JITTER))
    return image, depth


class DepthImages(Samples):
    """Images with a depth for each pixel.

    Args:
        read: Index -> image and depth in metres, two pictures of one size.
        length: Number of images.
        counts: (100,) training pixels in each bin.
        weights: (100,) weight of a pixel in each bin; None: samples have no ``weight``.
        augment: Draw other images in every epoch, and give targets of half the size.
        seed: Seed of the augmentation.
        mask: (N, 228, 304) bool, pixels that are evaluated; the target of others is NaN.
    """

    def __init__(
        self,
        read: Callable[[int], tuple[Any, Any]],
        length: int,
        counts: NDArray[np.int64],
        weights: NDArray[np.float32] | None,
        augment: bool,
        seed: int = 0,
        mask: NDArray[np.bool_] | None = None,
    ) -> None:
        self.read, self.length, self.counts, self.weights = read, length, counts, weights
        self.augment, self.seed, self.mask = augment, seed, mask

    def __len__(self) -> int:
        return self.length

    def at(self, epoch: int, index: int) -> dict[str, Tensor]:
        """One image."""
        from torchvision.transforms.functional import normalize, pil_to_tensor

        image, depth = _scaled(*self.read(index))
        if self.augment:
            image, depth = _augmented(image, depth, np.random.default_rng([self.seed, epoch, index]))
        image, depth = _cropped(image, depth)
        if self.augment:
            depth = depth.resize((WIDTH // 2, HEIGHT // 2), 0)
        target = np.array(depth, np.float32)
        bins = depth_bins(target)
        known = {"count": torch.from_numpy(self.counts[bins])}
        if self.weights is not None:
            known["weight"] = torch.from_numpy(self.weights[bins])
        if self.mask is not None:
            target[~self.mask[index]] = np.nan
        known["target"] = torch.from_numpy(target)
        pixels = normalize(pil_to_tensor(image).float().div_(255), list(IMAGENET_MEAN), list(IMAGENET_STD))
        return {"image": pixels} | {name: values[None] for name, values in known.items()}


def made_up_rooms(count: int, seed: int) -> list[tuple[Any, Any]]:
    """Boxes before a slanted wall, darker and bluer with their distance, few of them far: images of 320 x 240, and depths in metres."""
    from PIL import Image

    rng, rooms = np.random.default_rng([seed, 7]), []
    for _ in range(count):
        wall = 1.5 + min(rng.exponential(2.0), 7.0)
        depth = np.full((_SHORT, 320), wall, np.float32) + np.linspace(-0.5, 0.5, 320, dtype=np.float32) * rng.uniform(-1, 1)
        for near in sorted(rng.uniform(0.8, wall, 4), reverse=True):
            left, top, wide, high = rng.integers((0, 0, 40, 40), (280, 200, 120, 120))
            depth[top : top + high, left : left + wide] = near
        light = np.exp(-depth / 4)[..., None] * (1, 0.8, 0.6) + np.array((0, 0.05, 0.15)) * depth[..., None] / 10
        noisy = np.clip(255 * light + rng.normal(0, 6, light.shape), 0, 255).astype(np.uint8)
        rooms.append((Image.fromarray(noisy), Image.fromarray(depth)))
    return rooms


class NYUD2DataModule(RegressionDataModule):
    """NYUD2-DIR: indoor images with the depth of each pixel. Small depths are frequent; the test pixels are balanced by a mask.

    Batch: {"image": (B, 3, 228, 304) float32 normalised, "target": (B, 1, 114, 152) float32 metres, "count": (B, 1, 114, 152) int64}

    In evaluation ``target`` is (B, 1, 228, 304) with NaN where the mask leaves a pixel out; ``count`` has the target's shape: the training
    pixels in the bin of 0.1 m; in training with ``reweight`` also ``weight`` float32. Validation and test are the same images, as in the
    benchmark: choose nothing by the one to report it by the other.

    Args:
        root: Folder with ``nyu2_train.csv``, ``nyu2_test.csv``, ``test_balanced_mask.npy`` and the images of the benchmark. None: built-in
            rooms of boxes, 48 for training.
        count_images: Training images that the frequency of depths is taken from, evenly spaced; counts are scaled to all images.
        reweight: Weight of a training pixel by its bin: ``none``, ``inverse`` or ``sqrt_inv`` frequency.
        lds: Smooth the frequencies over neighbouring bins.
        lds_kernel: ``gaussian``, ``triang`` or ``laplace``.
        lds_kernel_size: Width of the kernel in bins, odd.
        lds_sigma: Standard deviation of the kernel in bins.
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
        count_images: int = 1000,
        reweight: Reweight = "none",
        lds: bool = False,
        lds_kernel: Kernel = "gaussian",
        lds_kernel_size: int = 5,
        lds_sigma: float = 2.0,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        rare = Reweighting(reweight, lds, lds_kernel, lds_kernel_size, lds_sigma)
        super().__init__(rare, 0.1, _BINS, batch_size=batch_size, num_workers=num_workers, seed=seed)
        at_least(1, count_images=count_images)
        self.save_hyperparameters()
        self.root = data_path(root)

    def check_root(self, stage: str = "fit") -> None:
        """Look for the training list."""
        self.expect("nyu2_train.csv", "unpack the data of NYUD2-DIR (YyzHarry/imbalanced-regression) there", "rooms")

    def setup(self, stage: str) -> None:
        """Read the lists and count depths; images are read when they are asked for."""
        if self.train_set is not None:
            return
        mask: NDArray[np.bool_] | None = None
        if self.root is None:
            rooms = made_up_rooms(48, seed=0), made_up_rooms(12, seed=1)
            reads: list[Callable[[int], tuple[Any, Any]]] = [part.__getitem__ for part in rooms]
            sizes = [len(part) for part in rooms]
        else:
            self.check_root(stage)
            lists = [read_list(self.root / f"nyu2_{split}.csv") for split in ("train", "test")]
            reads = [partial(_read, pairs, stored) for pairs, stored in zip(lists, _STORED, strict=True)]
            sizes = [len(pairs) for pairs in lists]
            mask = read_mask(self.root / "test_balanced_mask.npy", sizes[1])
        counts = count_depths(reads[0], sizes[0], self.hparams["count_images"])
        weights = bin_weights(counts, *self.reweighting) if self.reweighting.reweight != "none" else None
        self.train_set = DepthImages(reads[0], sizes[0], counts, weights, augment=True, seed=self.seed)
        self.val_set = self.test_set = DepthImages(reads[1], sizes[1], counts, None, augment=False, mask=mask)


def read_mask(file: Path, images: int) -> NDArray[np.bool_]:
    """Pixels of each test image that are evaluated, (images, 228, 304).

    Raises:
        MissingFileError: There is no such file.
        BrokenRecordError: It can't be read, or has another shape.
    """
    mask = read_npy(file, "mask", "copy it from nyud2-dir of the benchmark's data")
    if mask.shape != (images, HEIGHT, WIDTH):
        raise BrokenRecordError(file, "mask", f"expected {(images, HEIGHT, WIDTH)} for the images of nyu2_test.csv, got {mask.shape}")
    if not np.isin(mask, (0, 1)).all():
        raise BrokenRecordError(file, "mask", f"expected 0 and 1, got {mask.dtype} with other values: copy the file again")
    return mask.astype(bool)


def count_depths(read: Callable[[int], tuple[Any, Any]], images: int, some: int) -> NDArray[np.int64]:
    """(100,) pixels in each bin of 0.1 m, from ``some`` evenly spaced images, scaled to all of them."""
    chosen = np.unique(np.linspace(0, images - 1, min(some, images)).round().astype(int))
    counts = sum(np.bincount(depth_bins(np.asarray(_cropped(*_scaled(*read(int(one))))[1])).ravel(), minlength=_BINS) for one in chosen)
    return np.asarray(np.round(counts * (images / len(chosen))), np.int64)


__all__ = ["DepthImages", "NYUD2DataModule", "bin_weights", "count_depths", "depth_bins", "made_up_rooms", "read_list", "read_mask"]
