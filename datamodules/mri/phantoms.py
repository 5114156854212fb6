"""Made scans: random ellipses, or images of one's own, seen by coils that are made, too."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lit_methods import checks
from lit_methods.datamodules.errors import BrokenRecordError
from lit_methods.datamodules.folders import data_path
from lit_methods.datamodules.mri.base import Complex, MaskedSamples, Masks, ScansDataModule, fft2c, scan_sample
from lit_methods.datamodules.reading import finite, read_npz
from lit_methods.inverse_problems.masks import Kind


def make_phantoms(number: int, size: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Magnitudes (number, size, size) of 4 to 8 random ellipses each, which add up where they overlap; the largest is 1."""
    grid = np.linspace(-1, 1, size)
    count = 8
    centre, axes = rng.uniform(-0.5, 0.5, (number, count, 2)), rng.uniform(0.1, 0.5, (number, count, 2))
    angle, value = rng.uniform(0, np.pi, (number, count)), rng.uniform(0.2, 1.0, (number, count))
    value *= np.arange(count) < rng.integers(4, count + 1, (number, 1))
    x, y = (grid[None, None, :, None] - centre[..., 0, None, None], grid[None, None, None, :] - centre[..., 1, None, None])
    cosine, sine = np.cos(angle)[..., None, None], np.sin(angle)[..., None, None]
    u, v = (x * cosine + y * sine) / axes[..., 0, None, None], (y * cosine - x * sine) / axes[..., 1, None, None]
    images = ((u**2 + v**2 <= 1) * value[..., None, None]).sum(1)
    found: NDArray[np.float64] = images / images.max((1, 2), keepdims=True).clip(min=1e-12)
    return found


def with_phase(images: NDArray[np.float64], rng: np.random.Generator) -> Complex:
    """Magnitudes (N, H, W) with a phase that is linear over the image: up to half a turn from the middle to the border, and a constant."""
    rows, columns = (np.linspace(-1, 1, side) for side in images.shape[1:])
    slope, constant = rng.uniform(-np.pi / 2, np.pi / 2, (len(images), 2)), rng.uniform(-np.pi, np.pi, len(images))
    phase = slope[:, :1, None] * rows[:, None] + slope[:, 1:, None] * columns + constant[:, None, None]
    return (images * np.exp(1j * phase)).astype(np.complex64)


def coil_maps(coils: int, shape: tuple[int, int], rng: np.random.Generator) -> Complex:
    """Maps (coils, H, W) of Gaussian profiles around the object, each with a phase, with a sum of squares of 1."""
    rows, columns = (np.linspace(-1, 1, side) for side in shape)
    angle = 2 * np.pi * (np.arange(coils) + rng.uniform()) / coils
    away = (rows[:, None] - np.sin(angle)[:, None, None]) ** 2 + (columns - np.cos(angle)[:, None, None]) ** 2
    maps = np.exp(-away / 2) * np.exp(1j * rng.uniform(-np.pi, np.pi, (coils, 1, 1)))
    return (maps / np.sqrt((np.abs(maps) ** 2).sum(0))).astype(np.complex64)


class _Phantoms(MaskedSamples):
    """Scans in memory: images (N, H, W), maps (N, C, H, W), noise (N, C, H, W) in k-space."""

    def __init__(self, images: Complex, maps: Complex, noise: Complex, words: Masks, seed: int | None) -> None:
        super().__init__(words, seed)
        self.images, self.maps = images, maps
        self.kspace = fft2c(maps * images[:, None]) + noise

    def __len__(self) -> int:
        return len(self.images)

    def at(self, epoch: int, index: int) -> dict[str, Tensor]:
        """A scan with its mask."""
        image = self.images[index]
        mask = self.drawn_mask(image.shape, epoch, index)
        return scan_sample(self.kspace[index], self.maps[index], mask, index, image, float(np.abs(image).max()))


class PhantomScansDataModule(ScansDataModule):
    """Made multi-coil scans of random ellipses, or of images of one's own; nothing is downloaded.

    Batch: {"kspace": (B, C, H, W, 2) float32, "maps": (B, C, H, W, 2) float32, "mask": (B, 1, H, W, 1) bool, "volume": (B,) int64, "maximum": (B,) float32, "target": (B, H, W, 2) float32}

    Each image gets a linear phase, coils of Gaussian profiles whose squares add up to 1, and complex noise in k-space; training masks are
    drawn anew in each epoch. Each image is a volume. Validation and test are the same for every seed; images of one's own are dealt in
    order.

    Args:
        images: An ``.npz`` file with ``image`` (N, H, W), real magnitudes, which are reduced to ``size``; null: random ellipses.
        size: Pixels of a side, >= 8.
        coils: Coils, >= 1.
        noise: Standard deviation of real and imaginary part of the noise; the largest magnitude of an image is 1.
        mask: ``gaussian_2d``, ``poisson``, ``gaussian_1d``, ``equispaced`` or ``random``.
        acceleration: One number or several, of which each training sample draws one.
        centre: Fully measured middle: half-axes of an ellipse as a share of the side, or a share of the columns; one for each acceleration.
        num_train: Ellipse images to train with.
        num_val: For validation, and as many for the test.
        shares: Of images of one's own: the share to train with and the share for validation; the rest is for the test.
        batch_size: Slices per process and step.
        num_workers: Processes that read data.
        seed: Seed of training images, coils, noise, masks and order.

    Raises:
        ValueError: A value lies outside its range.
    """  # noqa: E501

    def __init__(
        self,
        images: Path | None = None,
        size: int = 32,
        coils: int = 4,
        noise: float = 0.005,
        mask: Kind = "gaussian_2d",
        acceleration: float | list[float] = 4.0,
        centre: float | list[float] = 0.02,
        num_train: int = 256,
        num_val: int = 32,
        shares: tuple[float, float] = (0.6, 0.2),
        batch_size: int = 4,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(mask, acceleration, centre, batch_size, num_workers, seed)
        checks.at_least(8, size=size)
        checks.at_least(1, coils=coils, num_train=num_train, num_val=num_val)
        checks.within("[0, inf)", noise=noise)
        checks.within("(0, 1)", "a share", train=shares[0], val=shares[1])
        if sum(shares) >= 1:
            raise ValueError(f"shares are {tuple(shares)}: leave something for the test")
        self.images, self.size, self.coils, self.noise = data_path(images), size, coils, noise
        self.num_train, self.num_val, self.shares = num_train, num_val, tuple(shares)
        self.save_hyperparameters(ignore=["images"])  # a path would block a strict resume

    def setup(self, stage: str) -> None:
        """Make the scans.

        Raises:
            BrokenRecordError: The file of images has none.
        """
        if self.train_set is not None:
            return
        if self.images is None:
            held_out = make_phantoms(2 * self.num_val, self.size, np.random.default_rng(0))
            parts = {"train": make_phantoms(self.num_train, self.size, np.random.default_rng([1, self.seed]))}
            parts |= {"val": held_out[: self.num_val], "test": held_out[self.num_val :]}
        else:
            found = read_images(self.images, self.size)
            ends = [round(share * len(found)) for share in (0, self.shares[0], sum(self.shares), 1)]
            if len(set(ends)) < 4:
                raise BrokenRecordError(self.images, "image", f"has {len(found)} images, too few for shares={self.shares}: give more")
            parts = {name: found[ends[k] : ends[k + 1]] for k, name in enumerate(("train", "val", "test"))}
        for number, (name, images) in enumerate(parts.items()):
            rng = np.random.default_rng([2, number, self.seed if name == "train" else 0])
            maps = np.stack([coil_maps(self.coils, images.shape[1:], rng) for _ in images])
            draws = rng.standard_normal((2, *maps.shape))
            noise = (self.noise * (draws[0] + 1j * draws[1])).astype(np.complex64)
            scans = _Phantoms(with_phase(images, rng), maps, noise, self.masks, self.seed if name == "train" else None)
            setattr(self, f"{name}_set", scans)


def read_images(path: Path, size: int) -> NDArray[np.float64]:
    """Magnitudes (N, size, size) of a file with ``image`` (N, H, W): cropped to a square in the middle, and reduced; the largest is 1.

    Raises:
        MissingFileError: There is no such file.
        BrokenRecordError: It has no ``image`` of three dimensions, or images smaller than ``size``, or without anything in them.
    """
    fields = read_npz(path, ("image",), missing="give a .npz file with image (N, H, W), or images=null for ellipses")
    if "image" not in fields or fields["image"].ndim != 3:
        shape = fields["image"].shape if "image" in fields else "not in the file"
        raise BrokenRecordError(path, "image", f"is {shape}, expected (N, H, W): real magnitudes of N slices")
    images = finite(fields["image"].astype(np.float32), path, "image")
    side = min(images.shape[1:])
    if side < size:
        raise BrokenRecordError(path, "image", f"is {images.shape}, smaller than size={size}: give a smaller size")
    top, left = ((length - side) // 2 for length in images.shape[1:])
    squares = images[:, top : top + side, left : left + side]
    small = np.stack([np.asarray(Image.fromarray(one).resize((size, size), Image.Resampling.BOX), np.float64) for one in squares])
    largest = small.max((1, 2), keepdims=True)
    if (small < 0).any() or not (largest > 0).all():
        raise BrokenRecordError(path, "image", "has an image without positive values, or with negative ones: expected magnitudes")
    return small / largest


__all__ = ["PhantomScansDataModule", "coil_maps", "make_phantoms", "read_images", "with_phase"]
