"""Pairs of low and high resolution: DIV2K and Flickr2K for training, Set5 and the like for evaluation, built-in photographs."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lit_methods.checks import at_least, one_of
from lit_methods.datamodules.base import LoaderDataModule, Samples
from lit_methods.datamodules.errors import BrokenRecordError, MissingFileError, WrongRootError
from lit_methods.datamodules.folders import data_path, listed
from lit_methods.datamodules.pictures import open_picture

Pixels = NDArray[np.uint8]
Read = Callable[[int], tuple[Pixels, Pixels, str]]
PHOTOGRAPHS = ("astronaut", "camera", "chelsea", "coffee", "rocket")  # of scikit-image's wheel
SHIPPED = (
    "astronaut", "brick", "camera", "chelsea", "coffee", "coins", "grass", "gravel", "hubble_deep_field", "immunohistochemistry", "moon",
    "page", "retina", "rocket",
)  # fmt: skip
TRAIN_SHARE = 0.7  # of each photograph's width, from the left
BUILT_IN = "photographs"


# ---- images ----------------------------------------------------------------------------------------------------------------------------


def downsample(image: Pixels, scale: int) -> Pixels:
    """Bicubic reduction with antialiasing, the kernel widened by ``scale``, parameter -0.5: what MATLAB's ``imresize`` does inside.

    By torch's ``interpolate(mode="bicubic", antialias=True)``. At the edges MATLAB mirrors the image, torch leaves out what is missing.

    Args:
        image: (H, W, C) uint8, H and W multiples of ``scale``.
        scale: 1 or more.

    Returns:
        (H / scale, W / scale, C) uint8, rounded.
    """
    if scale == 1:
        return image
    planes = torch.tensor(image).permute(2, 0, 1)[None].float()
    size = (image.shape[0] // scale, image.shape[1] // scale)
    smaller = F.interpolate(planes, size=size, mode="bicubic", antialias=True)
    return smaller.clamp(0, 255).round().to(torch.uint8)[0].permute(1, 2, 0).numpy()


def to_luma(image: Pixels) -> Pixels:
    """(H, W, 3) RGB -> (H, W, 1) luminance of BT.601, 16 to 235, rounded; one channel stays as it is."""
    if image.shape[2] == 1:
        return image
    weights = np.array([65.481, 128.553, 24.966]) / 255
    return np.rint(16 + image @ weights).astype(np.uint8)[..., None]


def cut(image: Pixels, scale: int) -> Pixels:
    """The largest upper left part whose sides are multiples of ``scale``."""
    return image[: image.shape[0] // scale * scale, : image.shape[1] // scale * scale]


def read_rgb(path: Path, field: str) -> Pixels:
    """An image file as (H, W, 3) uint8.

    Raises:
        MissingFileError: There is no such file.
        BrokenRecordError: It is truncated or no image.
    """
    return np.asarray(open_picture(path, field, "unpack the release again"))


def low_resolution_file(high: Path, scale: int) -> Path | None:
    """Where the reduced version of an image lies; None: nowhere.

    Beside the folder ``HR`` (or ``<set>_HR``): ``LR_bicubic/X4/<name>x4.png`` (or ``<set>_LR_bicubic/X4/...``), the same without ``x4`` in
    the name, or ``LRx4/<name>.png``.
    """
    folder, stem = high.parent, high.stem
    below = folder.parent / folder.name.replace("HR", "LR_bicubic") / f"X{scale}"
    tried = (below / f"{stem}x{scale}", below / stem, folder.parent / f"LRx{scale}" / stem)
    return next((file for start in tried for file in [start.with_name(start.name + high.suffix)] if file.is_file()), None)


def read_pair(files: Sequence[tuple[Path, Path | None]], scale: int, luma: bool, index: int) -> tuple[Pixels, Pixels, str]:
    """Low resolution, high resolution and name of an image; without a low-resolution file it is computed by :func:`downsample`.

    Raises:
        BrokenRecordError: A file that is no image, or sizes that don't fit.
    """
    high_file, low_file = files[index]
    high = read_rgb(high_file, "high resolution")
    if min(high.shape[:2]) < scale:
        raise BrokenRecordError(high_file, "size", f"{high.shape[1]} x {high.shape[0]} pixels are too few to reduce by {scale}")
    convert = to_luma if luma else _same
    if low_file is None:
        high = convert(cut(high, scale))
        return downsample(high, scale), high, high_file.stem
    low = read_rgb(low_file, "low resolution")
    expected = (high.shape[0] // scale, high.shape[1] // scale)
    if low.shape[:2] != expected:
        raise BrokenRecordError(
            low_file,
            "size",
            f"{low.shape[1]} x {low.shape[0]} pixels, expected {expected[1]} x {expected[0]}, the size of {high_file} divided by {scale}",
        )
    return convert(low), convert(cut(high, scale)), high_file.stem


def _same(image: Pixels) -> Pixels:
    return image


def _listed(pairs: Sequence[tuple[Pixels, Pixels, str]], index: int) -> tuple[Pixels, Pixels, str]:
    return pairs[index]


def photographs(scale: int, luma: bool, train: bool, names: Sequence[str] = PHOTOGRAPHS) -> list[tuple[Pixels, Pixels, str]]:
    """Pairs of scikit-image's pictures: the left 70 % of each for training, the rest for evaluation."""
    import skimage.data

    pairs = []
    for name in names:
        image = np.atleast_3d(getattr(skimage.data, name)())
        border = int(TRAIN_SHARE * image.shape[1])
        part = np.ascontiguousarray(image[:, :border] if train else image[:, border:])
        high = cut(part if part.shape[2] == 3 else np.repeat(part, 3, axis=2), scale)
        high = to_luma(high) if luma else high
        pairs.append((downsample(high, scale), high, name))
    return pairs


def augment(low: Pixels, high: Pixels, patch: int, scale: int, rng: np.random.Generator) -> tuple[Pixels, Pixels]:
    """A random patch of a pair, mirrored and turned: one of the eight symmetries of a square, each as likely.

    Args:
        low: (h, w, C).
        high: (scale * h, scale * w, C).
        patch: Side in ``low``, at most h and w.
        scale: Enlargement.
        rng: Draws four numbers.

    Returns:
        (patch, patch, C) and (scale * patch, scale * patch, C).
    """
    top, left = (int(rng.integers(size - patch + 1)) for size in low.shape[:2])
    mirrored, turns = bool(rng.integers(2)), int(rng.integers(4))
    parts = []
    for image, factor in ((low, 1), (high, scale)):
        part = image[top * factor : (top + patch) * factor, left * factor : (left + patch) * factor]
        parts.append(np.rot90(part[:, ::-1] if mirrored else part, turns))
    return parts[0], parts[1]


def _tensor(image: Pixels) -> Tensor:
    return torch.tensor(np.ascontiguousarray(image)).permute(2, 0, 1).float() / 255


class Patches(Samples):
    """Training samples, asked for by ``(epoch, index)``: a patch of image ``index % images`` that follows from seed, epoch and index alone.

    Args:
        read: Index -> low resolution, high resolution, name.
        images: Number of images.
        per_image: Samples of each image in an epoch.
        patch: Side at low resolution.
        scale: Enlargement.
        seed: Seed of the draws.
    """

    def __init__(self, read: Read, images: int, per_image: int, patch: int, scale: int, seed: int) -> None:
        self.read, self.images, self.per_image, self.patch, self.scale, self.seed = read, images, per_image, patch, scale, seed

    def __len__(self) -> int:
        return self.images * self.per_image

    def at(self, epoch: int, index: int) -> dict[str, Any]:
        """One patch."""
        low, high, name = self.read(index % self.images)
        if min(low.shape[:2]) < self.patch:
            raise ValueError(
                f"{name} has {low.shape[1]} x {low.shape[0]} pixels at low resolution, fewer than a patch of {self.patch}: lower patch_size"
            )
        low, high = augment(low, high, self.patch, self.scale, np.random.default_rng([self.seed, epoch, index]))
        return {"lr": _tensor(low), "hr": _tensor(high), "name": name}


class WholeImages(Samples):
    """Evaluation samples, asked for by ``(epoch, index)``: whole images.

    Args:
        read: Index -> low resolution, high resolution, name.
        images: Number of images.
    """

    batch_size = 1  # images differ in size

    def __init__(self, read: Read, images: int) -> None:
        self.read, self.images = read, images

    def __len__(self) -> int:
        return self.images

    def at(self, epoch: int, index: int) -> dict[str, Any]:
        """One image."""
        low, high, name = self.read(index)
        return {"lr": _tensor(low), "hr": _tensor(high), "name": name}


# ---- the datamodule --------------------------------------------------------------------------------------------------------------------


class SuperResolutionDataModule(LoaderDataModule):
    """Patches of training images, whole images for validation and test.

    Batch: {"lr": (B, C, h, w) float32 in [0, 1], "hr": (B, C, scale * h, scale * w) float32 in [0, 1], "name": list of B strings}

    C is 3 (RGB) or 1 (luminance). Evaluation batches hold one image. Patches are mirrored and turned by draws that follow from (seed,
    epoch, index).

    ``root: null``: five photographs that scikit-image ships, the left 70 % of each for training and the rest for validation and test;
    reduced by :func:`downsample`. Else::

        root/DIV2K/HR/0001.png                 (or DIV2K_train_HR)
        root/DIV2K/LR_bicubic/X2/0001x2.png    (or DIV2K_train_LR_bicubic)
        root/Flickr2K/HR/000001.png            (or Flickr2K_HR, Flickr2K_LR_bicubic)
        root/benchmark/Set5/HR/baby.png
        root/benchmark/Set5/LR_bicubic/X2/babyx2.png

    Images in smaller pieces, in the same folders, are read faster.

    Args:
        root: Folder of the above; None: the built-in photographs.
        pictures: Names of the pictures of scikit-image that are built in: those of ``PHOTOGRAPHS`` or others of its wheel.
        train: Folders below ``root`` with the training images.
        val: Folder below ``root/benchmark`` that validation sees.
        test: Folders below ``root/benchmark``, a test loader for each.
        scale: Enlargement.
        patch_size: Side of a training patch at high resolution, a multiple of ``scale``.
        color: ``rgb``, or ``luma``: one channel, BT.601.
        make_lr: Compute low resolution where there is no file of it; False: that is an error.
        patches_per_image: Samples of each image in an epoch.
        batch_size: Patches per process and step.
        num_workers: Processes that read data.
        seed: Seed of the order and patches.

    Attributes:
        test_names: Names of the test loaders.

    Raises:
        ValueError: A number lies outside its range.
        WrongRootError: ``root`` is laid out in another way; raised by ``setup``.
    """

    def __init__(
        self,
        root: Path | None = None,
        train: Sequence[str] = ("DIV2K", "Flickr2K"),
        val: str = "Set5",
        test: Sequence[str] = ("Set5", "Set14", "B100", "Urban100", "Manga109"),
        scale: int = 2,
        patch_size: int = 128,
        color: Literal["rgb", "luma"] = "rgb",
        make_lr: bool = False,
        patches_per_image: int = 1,
        batch_size: int = 16,
        num_workers: int = 0,
        seed: int = 0,
        pictures: Sequence[str] = PHOTOGRAPHS,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        at_least(1, scale=scale, patches_per_image=patches_per_image)
        one_of(("rgb", "luma"), color=color)
        if patch_size < scale or patch_size % scale:
            raise ValueError(f"patch_size={patch_size} must be a multiple of scale={scale}")
        for name in [pictures] if isinstance(pictures, str) else pictures:
            one_of(SHIPPED, pictures=name)
        if isinstance(train, str) or isinstance(test, str):
            raise ValueError(f"train and test are lists of folders, got train={train!r}, test={test!r}: write ['DIV2K']")
        self.save_hyperparameters()
        self.root = data_path(root)
        self.scale = scale
        self.test_names: tuple[str, ...] = (BUILT_IN,) if root is None else tuple(test)

    def check_root(self, stage: str = "fit") -> None:
        """Look for the files that the stage needs."""
        if self.root is None:
            return
        benchmarks = [self.hparams["val"]] if stage in ("fit", "validate") else self.test_names
        train = [self.root / name for name in self.hparams["train"]] if stage == "fit" else []
        for folder in (*train, *(self.root / "benchmark" / name for name in benchmarks)):
            self._files(folder, folder.name)

    def setup(self, stage: str) -> None:
        """List the files that the stage needs."""
        hp, luma = self.hparams, self.hparams["color"] == "luma"
        if stage == "fit" and self.train_set is None:
            if self.root is None:
                pairs = photographs(self.scale, luma, True, hp["pictures"])
                read: Read = partial(_listed, pairs)
                number = len(pairs)
            else:
                files = [pair for name in hp["train"] for pair in self._files(self.root / name, name)]
                read, number = partial(read_pair, files, self.scale, luma), len(files)
            patch = hp["patch_size"] // self.scale
            self.train_set = Patches(read, number, hp["patches_per_image"], patch, self.scale, self.seed)
        if stage in ("fit", "validate") and self.val_set is None:
            self.val_set = self._whole(hp["val"], luma)
        if stage in ("test", "predict") and self.test_set is None:
            self.test_set = [self._whole(name, luma) for name in self.test_names]

    def _whole(self, name: str, luma: bool) -> WholeImages:
        if self.root is None:
            pairs = photographs(self.scale, luma, False, self.hparams["pictures"])
            return WholeImages(partial(_listed, pairs), len(pairs))
        files = self._files(self.root / "benchmark" / name, name)
        return WholeImages(partial(read_pair, files, self.scale, luma), len(files))

    def _files(self, folder: Path, name: str) -> list[tuple[Path, Path | None]]:
        """High-resolution files of a set, sorted, each with its low-resolution file."""
        high = next((folder / part for part in ("HR", f"{name}_train_HR", f"{name}_HR") if (folder / part).is_dir()), None)
        if high is None:
            raise WrongRootError(
                f"{folder} has no folder HR (or {name}_train_HR, {name}_HR) of high-resolution images: unpack {name} there, take it out of "
                "the list, or set root=null for the built-in photographs"
            )
        images = listed(high, endings=(".png", ".jpg", ".jpeg", ".bmp"))
        if not images:
            raise WrongRootError(f"{high} holds no image: expected *.png")
        files = [(path, low_resolution_file(path, self.scale)) for path in images]
        missing = [path for path, low in files if low is None]
        if missing and not self.hparams["make_lr"]:
            wanted = high.parent / high.name.replace("HR", "LR_bicubic") / f"X{self.scale}" / f"{missing[0].stem}x{self.scale}.png"
            raise MissingFileError(
                wanted,
                "low resolution",
                f"no such file for {missing[0].name} (and {len(missing) - 1} more): unpack the bicubic x{self.scale} images there, or set "
                "make_lr=true to compute them",
            )
        return files


__all__ = [
    "Patches",
    "SuperResolutionDataModule",
    "WholeImages",
    "augment",
    "cut",
    "downsample",
    "low_resolution_file",
    "photographs",
    "read_pair",
    "to_luma",
]
