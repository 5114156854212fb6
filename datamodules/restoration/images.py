"""Clean images in [-1, 1] with numbers and names: what restoration methods degrade, restore and compare with."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lit_methods import checks
from lit_methods.datamodules.base import LoaderDataModule, Samples
from lit_methods.datamodules.errors import BrokenRecordError, WrongRootError
from lit_methods.datamodules.folders import data_path, listed
from lit_methods.datamodules.generative.images import GenerativeDigitsDataModule, adm_crop
from lit_methods.datamodules.pictures import open_picture
from lit_methods.datamodules.restoration.mixture import Indexed

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
FOLDERS = {"train": ("train", "DIV2K_train_HR"), "val": ("val", "DIV2K_valid_HR"), "test": ("test", "val", "DIV2K_valid_HR")}
Fit = Literal["resize", "crop", "whole"]


def fitted(image: Image.Image, size: int, fit: Fit, path: Path) -> Image.Image:
    """An image as it is restored.

    Args:
        image: Any size.
        size: Side in pixels; with ``whole`` what both sides are cut down to a multiple of.
        fit: ``resize``: the shorter side becomes ``size``, and the middle square counts. ``crop``: the middle square of ``size`` pixels.
            ``whole``: all of it.
        path: Its file, for the message.

    Raises:
        BrokenRecordError: It is smaller than ``size``.
    """
    if fit == "resize":
        return adm_crop(image, size)
    if min(image.size) < size:
        raise BrokenRecordError(
            path, "size", f"{image.width} x {image.height} pixels are fewer than image_size={size}: lower it, or use resize"
        )
    if fit == "whole":
        return image.crop((0, 0, image.width // size * size, image.height // size * size))
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


class ImageFiles(Samples):
    """Image files; training samples are random crops, mirrored in half of the cases, which follow from (seed, epoch, index).

    Args:
        files: Sorted files.
        size: See :func:`fitted`.
        fit: See :func:`fitted`.
        grey: One channel.
        crops: Random crops of each image in an epoch; 0: the whole set is fixed, for evaluation.
        seed: Seed of the crops.
    """

    def __init__(self, files: list[Path], size: int, fit: Fit, grey: bool, crops: int = 0, seed: int = 0) -> None:
        self.files, self.size, self.fit, self.grey, self.crops, self.seed = files, size, fit, grey, crops, seed
        if not crops and fit == "whole":
            self.batch_size = 1  # images differ in size

    def __len__(self) -> int:
        return len(self.files) * max(1, self.crops)

    def at(self, epoch: int, index: int) -> dict[str, Any]:
        """One image."""
        path = self.files[index % len(self.files)]
        image = open_picture(path, "image", "copy the images again").convert("L" if self.grey else "RGB")
        if not self.crops:
            pixels = np.asarray(fitted(image, self.size, self.fit, path))
        else:
            if min(image.size) < self.size:
                raise BrokenRecordError(path, "size", f"{image.width} x {image.height} pixels are fewer than image_size={self.size}")
            draw = np.random.default_rng([self.seed, epoch, index])
            left, top = (int(draw.integers(side - self.size + 1)) for side in image.size)
            pixels = np.asarray(image.crop((left, top, left + self.size, top + self.size)))
            pixels = pixels[:, ::-1] if draw.integers(2) else pixels
        planes = np.ascontiguousarray(np.atleast_3d(pixels).transpose(2, 0, 1), dtype=np.float32)
        return {"image": torch.from_numpy(planes) / 127.5 - 1, "index": index, "name": path.stem}


class RestorationDataModule(LoaderDataModule):
    """Clean images that a restoration method degrades itself: digits that scikit-learn ships, or folders of files.

    Batch: {"image": (B, C, S, S) float32 in [-1, 1], "index": (B,) int64, "name": list of B strings}

    ``root: null``: 1,797 digits, smoothly enlarged: all but the last 300 for training, 100 for validation, which calibrates, 200 to test.
    Else ``root`` has images itself, which every evaluation sees, such as FFHQ's ``00000``; or folders of them: ``train``, ``val`` and
    ``test``, or ``DIV2K_train_HR`` and ``DIV2K_valid_HR``.

    Args:
        root: Folder of PNG, JPEG, WebP, BMP or TIFF files; None: digits.
        image_size: S.
        fit: ``resize``: the shorter side becomes S, and the middle square counts. ``crop``: the middle S x S pixels. ``whole``: the whole
            image, cut to multiples of S; one a batch.
        grey: One channel. Digits have one.
        crops: Random crops of each training file in an epoch.
        batch_size: Images per process and training step.
        eval_batch_size: Images per process and evaluation step.
        num_workers: Processes that read data.
        seed: Seed of order and crops.

    Raises:
        WrongRootError: The folder holds no images.
        BrokenRecordError: A file is no image, or too small; the message names it.
    """

    def __init__(
        self,
        root: Path | None = None,
        image_size: int = 16,
        fit: Fit = "resize",
        grey: bool = False,
        crops: int = 16,
        batch_size: int = 128,
        eval_batch_size: int = 16,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed, eval_batch_size=eval_batch_size)
        checks.literals(RestorationDataModule, locals())
        checks.at_least(8, "pixels", image_size=image_size)
        checks.at_least(1, crops=crops)
        self.root, self.image_size, self.fit, self.grey, self.crops = data_path(root), image_size, fit, grey, crops

    def check_root(self, stage: str = "fit") -> None:
        """Look for image files."""
        if self.root is not None and not any(self._files(part) for part in ("train", "val", "test")):
            raise WrongRootError(
                f"root={str(self.root)!r} holds no image files, nor do train, val, test in it: give a folder of PNG or JPEG files"
            )

    def _files(self, part: str) -> list[Path]:
        assert self.root is not None
        folders = [self.root / name for name in FOLDERS[part]] + ([] if part == "train" else [self.root])
        return next((files for folder in folders if folder.is_dir() and (files := listed(folder, endings=ENDINGS))), [])

    def setup(self, stage: str) -> None:
        """List the files, or make the digits."""
        if self.val_set is not None or self.test_set is not None:
            return
        if self.root is None:
            self._digits()
            return
        self.check_root(stage)
        size, fit, grey = self.image_size, self.fit, self.grey
        for part in ("train", "val", "test"):
            if files := self._files(part):
                setattr(self, f"{part}_set", ImageFiles(files, size, fit, grey, self.crops if part == "train" else 0, self.seed))

    def _digits(self) -> None:
        digits = GenerativeDigitsDataModule(self.image_size, num_train=1497)
        digits.setup("fit")
        assert digits.train_set is not None
        assert digits.val_set is not None
        held: Tensor = digits.val_set.images
        self.train_set = Indexed(digits.train_set.images, 0, "digit")
        self.val_set, self.test_set = Indexed(held[:100], 1497, "digit"), Indexed(held[100:], 1597, "digit")


__all__ = ["ImageFiles", "RestorationDataModule", "fitted"]
