"""Degraded and clean images for blind restoration: faces that are degraded on the way, pairs of files, folders without a truth."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lit_methods import checks
from lit_methods.datamodules.base import LoaderDataModule, Samples
from lit_methods.datamodules.errors import BrokenRecordError, MissingFileError, WrongRootError
from lit_methods.datamodules.folders import data_path, listed
from lit_methods.datamodules.generative.images import GenerativeDigitsDataModule, adm_crop
from lit_methods.datamodules.pictures import open_picture
from lit_methods.datamodules.restoration.blind import BlindDegradation, FaceDegradation
from lit_methods.datamodules.restoration.images import ENDINGS

Source = Literal["digits", "faces"]
BUILT_IN = {"digits": (1497, 100), "faces": (70, 15)}  # training and validation images of the 1,797 and 100


def read_square(path: Path, size: int, grey: bool, field: str = "image") -> Tensor:
    """An image file as (C, S, S) float32 in [0, 1]: its shorter side becomes ``size``, and the middle square counts.

    Args:
        path: The file.
        size: S.
        grey: One channel.
        field: What it is, for messages.

    Raises:
        MissingFileError: There is no such file.
        BrokenRecordError: It is truncated or no image.
    """
    image = open_picture(path, field, "copy the images again").convert("L" if grey else "RGB")
    pixels = np.atleast_3d(np.asarray(adm_crop(image, size), dtype=np.float32))
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))) / 255


def lfw_faces(size: int) -> Tensor:
    """The 100 grey faces of LFW, 25 x 25 pixels, that scikit-image ships, in another size: (100, 1, S, S) float32 in [0, 1]."""
    import skimage.data

    faces = torch.from_numpy(np.asarray(skimage.data.lfw_subset()[:100], dtype=np.float32))[:, None]
    low, high = faces.amin(), faces.amax()
    faces = (faces - low) / (high - low)
    if size == faces.shape[-1]:
        return faces
    return torch.nn.functional.interpolate(faces, (size, size), mode="bicubic", antialias=True).clamp(0, 1)


class DegradedImages(Samples):
    """Clean images and what a degradation makes of them, which follows from (seed, epoch, index).

    Args:
        images: (N, C, S, S) in [0, 1], or files.
        names: Of the images.
        size: S.
        grey: One channel, of files.
        degradation: What is done to them.
        flip: Mirror half of them.
        seed: Seed of the draws.
        first: Number of the first image.
    """

    def __init__(
        self,
        images: Tensor | list[Path],
        names: list[str],
        size: int,
        grey: bool,
        degradation: BlindDegradation,
        flip: bool,
        seed: int,
        first: int = 0,
    ) -> None:
        self.images, self.names, self.size, self.grey = images, names, size, grey
        self.degradation, self.flip, self.seed, self.first = degradation, flip, seed, first

    def __len__(self) -> int:
        return len(self.names)

    def at(self, epoch: int, index: int) -> dict[str, Any]:
        """One pair."""
        found = self.images[index]
        clean = found if isinstance(found, Tensor) else read_square(found, self.size, self.grey)
        draw = np.random.default_rng([self.seed, epoch, self.first + index])
        if self.flip and draw.integers(2):
            clean = clean.flip(-1)
        degraded = self.degradation(clean[None], draw)[0]
        return {"image": clean * 2 - 1, "lq": degraded * 2 - 1, "index": self.first + index, "name": self.names[index]}


class ImagePairs(Samples):
    """Degraded files, with the clean files of the same names, if there are any.

    Args:
        degraded: Files.
        clean: As many, or none.
        size: S.
        grey: One channel.
    """

    def __init__(self, degraded: list[Path], clean: list[Path], size: int, grey: bool) -> None:
        self.degraded, self.clean, self.size, self.grey = degraded, clean, size, grey

    def __len__(self) -> int:
        return len(self.degraded)

    def at(self, epoch: int, index: int) -> dict[str, Any]:
        """One pair, or one degraded image."""
        path = self.degraded[index]
        sample: dict[str, Any] = {
            "lq": read_square(path, self.size, self.grey, "degraded image") * 2 - 1,
            "index": index,
            "name": path.stem,
        }
        if self.clean:
            sample["image"] = read_square(self.clean[index], self.size, self.grey, "clean image") * 2 - 1
        return sample


class FaceRestorationDataModule(LoaderDataModule):
    """Degraded and clean faces for blind restoration: FFHQ degraded on the way, CelebA-Test's pairs, folders such as LFW-Test's.

    Batch: {"image": (B, C, S, S) float32 in [-1, 1], "lq": (B, C, S, S) float32 in [-1, 1], "index": (B,) int64, "name": list of B strings}

    ``root`` holds clean images, itself or in ``train``; they are degraded anew in each epoch. Evaluations see pairs, from ``lq`` and
    ``gt`` in ``pairs`` or in ``root``; without them the last ``num_val`` images of ``root``, degraded once and for all. ``lit predict``
    restores the images of ``faces`` (without ``image`` in the batch), which may lie in a folder ``lq`` there; without it those of the
    test.

    ``root: null``: ``source: digits``: scikit-learn's 1,797 digits, smoothly enlarged: 1,497 for training, 100 for validation, 200 to test.
    ``source: faces``: 100 grey faces of 25 x 25 pixels that scikit-image ships: 70, 15 and 15. Both have one channel.

    Args:
        root: Folder of PNG, JPEG, WebP, BMP or TIFF files; None: built-in images.
        pairs: Folder with ``lq`` and ``gt``, whose files have the same names; None: those of ``root``, if it has them.
        faces: Folder of degraded images without a truth.
        source: Built-in images.
        degradation: What is done to clean images; None: ``FaceDegradation`` with its defaults, for images of 512 pixels.
        image_size: S: the shorter side becomes S, and the middle square counts.
        grey: One channel.
        flip: Mirror half of the training images.
        num_val: Images of ``root`` kept for evaluations, where there are no pairs.
        batch_size: Images per process and training step.
        eval_batch_size: Images per process and evaluation step.
        num_workers: Processes that read data.
        seed: Seed of order and degradations.

    Raises:
        WrongRootError: A folder isn't there, or holds no images.
        MissingFileError: An image of a pair has no partner.
        BrokenRecordError: A file is no image, or a name stands twice; the message names it.
    """

    def __init__(
        self,
        root: Path | None = None,
        pairs: Path | None = None,
        faces: Path | None = None,
        source: Source = "digits",
        degradation: BlindDegradation | None = None,
        image_size: int = 16,
        grey: bool = False,
        flip: bool = True,
        num_val: int = 100,
        batch_size: int = 64,
        eval_batch_size: int = 50,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed, eval_batch_size=eval_batch_size)
        checks.literals(FaceRestorationDataModule, locals())
        checks.at_least(8, "pixels", image_size=image_size)
        checks.at_least(1, "images", num_val=num_val)
        self.root, self.pairs, self.faces = data_path(root), data_path(pairs), data_path(faces)
        self.source, self.image_size, self.grey, self.flip, self.num_val = source, image_size, grey, flip, num_val
        self.degradation = FaceDegradation() if degradation is None else degradation

    # ---- folders -------------------------------------------------------------------------------------------------------------------------

    def _clean_files(self) -> list[Path]:
        assert self.root is not None
        folder = self.root / "train" if (self.root / "train").is_dir() else self.root
        return listed(folder, endings=ENDINGS) if folder.is_dir() else []

    def _pairs_folder(self) -> Path | None:
        if self.pairs is not None:
            return self.pairs
        found = self.root is not None and all((self.root / part).is_dir() for part in ("lq", "gt"))
        return self.root if found else None

    def check_root(self, stage: str = "fit") -> None:
        """Look for image files."""
        if self.faces is not None and not self._face_files():
            raise WrongRootError(f"faces={str(self.faces)!r} holds no image files: give a folder of PNG or JPEG files")
        if stage == "predict" and self.faces is not None:
            return
        pairs = self._pairs_folder()
        if pairs is not None:
            for part in ("lq", "gt"):
                if not (pairs / part).is_dir() or not listed(pairs / part, endings=ENDINGS):
                    raise WrongRootError(
                        f"pairs={str(pairs)!r} has no images in {part}: give a folder with lq and gt, as CelebA-Test has it"
                    )
        if self.root is None:
            return
        needed = 1 if pairs is not None else self.num_val + 1
        if (stage == "fit" or pairs is None) and len(files := self._clean_files()) < needed:
            raise WrongRootError(
                f"root={str(self.root)!r} holds {len(files)} image files, itself or in train, and {needed} are needed: give a folder of "
                "PNG or JPEG files, lower num_val, or set root=null for the built-in images"
            )

    def _face_files(self) -> list[Path]:
        assert self.faces is not None
        folder = self.faces / "lq" if (self.faces / "lq").is_dir() else self.faces
        return listed(folder, endings=ENDINGS) if folder.is_dir() else []

    def setup(self, stage: str) -> None:
        """List the files, or make the built-in images."""
        if self.val_set is not None or self.test_set is not None:
            return
        self.check_root(stage)
        if self.faces is not None:
            files = self._face_files()
            _named_once(files)
            self.predict_set = ImagePairs(files, [], self.image_size, self.grey)
            if stage == "predict":
                return
        if self.root is None:
            self._built_in()
        else:
            files = self._clean_files()
            _named_once(files)
            kept = len(files) if self._pairs_folder() is not None else len(files) - self.num_val
            if files:
                self.train_set = self._degraded(files[:kept], self.flip)
            if kept < len(files):
                self.val_set = self.test_set = self._degraded(files[kept:], False, kept)
        if (folder := self._pairs_folder()) is not None:
            self.val_set = self.test_set = self._read_pairs(folder)

    def _degraded(self, files: list[Path], flip: bool, first: int = 0) -> DegradedImages:
        names = [path.stem for path in files]
        return DegradedImages(files, names, self.image_size, self.grey, self.degradation, flip, self.seed, first)

    def _read_pairs(self, folder: Path) -> ImagePairs:
        degraded, clean = (listed(folder / part, endings=ENDINGS) for part in ("lq", "gt"))
        _named_once(degraded)
        _named_once(clean)
        truth, seen = ({path.stem: path for path in files} for files in (clean, degraded))
        for name in truth.keys() ^ seen.keys():
            path, part = (seen[name], "gt") if name in seen else (truth[name], "lq")
            raise MissingFileError(folder / part / path.name, "image", f"{path} has no partner of its name: copy the pairs again")
        return ImagePairs(degraded, [truth[path.stem] for path in degraded], self.image_size, self.grey)

    def _built_in(self) -> None:
        if self.source == "digits":
            digits = GenerativeDigitsDataModule(self.image_size, num_train=1796)
            digits.setup("fit")
            assert digits.train_set is not None
            assert digits.val_set is not None
            images = torch.cat([digits.train_set.images, digits.val_set.images]) / 2 + 0.5
        else:
            images = lfw_faces(self.image_size)
        train, val = BUILT_IN[self.source]
        parts = {"train": (0, train), "val": (train, train + val), "test": (train + val, len(images))}
        for part, (first, end) in parts.items():
            names = [f"{self.source[:-1]}_{number:05d}" for number in range(first, end)]
            flip = self.flip and part == "train" and self.source == "faces"
            chosen = images[first:end]
            setattr(self, f"{part}_set", DegradedImages(chosen, names, self.image_size, True, self.degradation, flip, self.seed, first))


def _named_once(files: list[Path]) -> None:
    seen: dict[str, Path] = {}
    for path in files:
        if path.stem in seen:
            raise BrokenRecordError(path, "name", f"{seen[path.stem].name} has the same name but for its ending: take one of them away")
        seen[path.stem] = path


__all__ = ["DegradedImages", "FaceRestorationDataModule", "ImagePairs", "lfw_faces", "read_square"]
