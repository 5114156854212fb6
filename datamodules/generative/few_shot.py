"""Many images of one domain and a few of another, for the adaptation of generators."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lit_methods import checks
from lit_methods.datamodules.base import Batches, Ints, LoaderDataModule, Samples
from lit_methods.datamodules.errors import WrongRootError
from lit_methods.datamodules.folders import data_path, listed, user_path
from lit_methods.datamodules.generative.images import GenerativeDigitsDataModule, adm_crop
from lit_methods.datamodules.loaders import make_loader
from lit_methods.datamodules.pictures import open_picture
from lit_methods.datamodules.vision.cifar import built_in_release

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
BUILT_IN = 150  # source images where no folder is given
DigitStyle = Literal["plain", "bold", "negative"]


def restyle(images: Tensor, style: DigitStyle) -> Tensor:
    """Digits in another style: a fixed change of strokes and greys.

    Args:
        images: (B, 1, S, S) in [-1, 1], bright on dark.
        style: ``plain``: as they are. ``bold``: strokes a pixel wider on each side, on grey. ``negative``: ``bold``, dark on bright.

    Returns:
        Like ``images``, in [-1, 1].
    """
    if style == "plain":
        return images
    bold = F.max_pool2d(images, 3, stride=1, padding=1) * 0.6 + 0.4
    return bold if style == "bold" else -bold


def _drawn_targets(seed: int, epoch: int, samples: int, targets: int) -> Ints:
    """Which target images stand beside each sample of an epoch: (samples, 2) int64."""
    return np.random.default_rng([seed, 3, epoch]).integers(targets, size=(samples, 2))


class Named(Batches):
    """Tensors that lie in memory, by their names in a batch.

    Args:
        parts: Name -> (N, ...).
    """

    def __init__(self, **parts: Tensor) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return len(next(iter(self.parts.values())))

    def batch(self, epochs: Ints, index: Ints) -> dict[str, Tensor]:
        """Rows of all parts."""
        chosen = torch.from_numpy(index)
        return {name: values[chosen] for name, values in self.parts.items()}


class BesideTargets(Batches):
    """Source images that lie in memory, each with two target images that are drawn anew in every epoch.

    Args:
        sources: (N, C, S, S).
        targets: (K, C, S, S).
        seed: Seed of the draws.
    """

    def __init__(self, sources: Tensor, targets: Tensor, seed: int) -> None:
        self.sources, self.targets, self.seed = sources, targets, seed

    def __len__(self) -> int:
        return len(self.sources)

    def batch(self, epochs: Ints, index: Ints) -> dict[str, Tensor]:
        """Source, target and a second target."""
        drawn = np.zeros((len(index), 2), dtype=np.int64)
        for epoch in np.unique(epochs).tolist():
            now = epochs == epoch
            drawn[now] = _drawn_targets(self.seed, epoch, len(self), len(self.targets))[index[now]]
        pairs = torch.from_numpy(drawn)
        return {
            "source": self.sources[torch.from_numpy(index)],
            "target": self.targets[pairs[:, 0]],
            "detail": self.targets[pairs[:, 1]],
        }


class TwoDomainsDataModule(LoaderDataModule):
    """Base of the datamodules with two domains: ``setup`` of a subclass fills the sets and ``bank_sets``, all images of each domain.

    Attributes:
        bank_sets: ``source`` and ``target`` -> data set whose batches have ``image``; None: ``setup`` hasn't been called.
    """

    bank_sets: dict[str, Any] | None = None

    def banks(self) -> dict[str, Any]:
        """Loaders of all images that are trained on, ``source`` and ``target``, in order. Ranks share the source; each sees all targets.

        Raises:
            RuntimeError: ``setup`` hasn't read them.
        """
        if self.bank_sets is None:
            raise RuntimeError(f"{type(self).__name__} has no images yet: call setup() first (the Trainer does)")
        targets = self.bank_sets["target"]
        # not self.loader, which deals to the ranks of the trainer: the few may be fewer than the ranks
        every = make_loader(
            targets,
            self.eval_batch_size,
            shuffle=False,
            seed=self.seed,
            collate_fn=getattr(targets, "collate", None),
            rank=0,
            world_size=1,
        )
        return {"source": self.loader(self.bank_sets["source"]), "target": every}


class FewShotDigitsDataModule(TwoDomainsDataModule):
    """Digits that scikit-learn ships as the source, and a few of them in another style as the target.

    Batch: {"source": (B, 1, S, S) float32 in [-1, 1], "target": (B, 1, S, S) float32 in [-1, 1], "detail": (B, 1, S, S) float32 in [-1, 1]}

    ``target`` and ``detail`` are drawn from the few. Validation, test and predict have ``source``, its class ``label`` (B,) int64, and
    ``styled``, the same digit in the target's style, which no training sees.

    Args:
        image_size: S, 8 or more; the digits have 8 x 8 pixels of their own.
        style: What the target looks like: ``bold`` or ``negative``.
        shots: Target images.
        num_train: Source images for training, 1 to 1796; the few are drawn from the same digits.
        num_val: Digits for validation and test, behind those for training.
        batch_size: Source images per process and step, beside as many target images.
        val_batch_size: Source images per process and evaluation step.
        num_workers: Processes that read data; the images lie in memory, so 0 is fastest.
        seed: Seed of the few and of the order.

    Raises:
        ValueError: A number lies outside its range.
    """

    def __init__(
        self,
        image_size: int = 16,
        style: DigitStyle = "bold",
        shots: int = 10,
        num_train: int = 1500,
        num_val: int = 64,
        batch_size: int = 32,
        val_batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, eval_batch_size=val_batch_size, num_workers=num_workers, seed=seed)
        checks.literals(FewShotDigitsDataModule, locals())
        checks.at_least(8, "pixels, as the digits have 8 x 8", image_size=image_size)
        checks.within("[1, 1796]", "images for training, the rest of the 1797 is for validation,", num_train=num_train)
        checks.within(f"[1, {num_train}]", "some of the digits for training", shots=shots)
        checks.within(f"[1, {1797 - num_train}]", "some of the digits that aren't for training", num_val=num_val)
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        """Read, split, enlarge, restyle."""
        if self.train_set is not None:
            return
        hp = self.hparams
        digits = GenerativeDigitsDataModule(image_size=hp["image_size"], num_train=hp["num_train"])
        digits.setup("fit")
        assert digits.train_set is not None
        assert digits.val_set is not None
        assert digits.val_set.labels is not None
        sources, held, labels = digits.train_set.images, digits.val_set.images[: hp["num_val"]], digits.val_set.labels[: hp["num_val"]]
        few = np.random.default_rng([self.seed, 2]).permutation(len(sources))[: hp["shots"]]
        targets = restyle(sources[torch.from_numpy(few)], hp["style"])
        self.train_set = BesideTargets(sources, targets, self.seed)
        self.val_set = self.test_set = Named(source=held, label=labels, styled=restyle(held, hp["style"]))
        self.bank_sets = {"source": Named(image=sources), "target": Named(image=targets)}


Picture = Path | NDArray[np.uint8]  # a file, or pixels (H, W, 3)


class _Pictures(Samples):
    """Pictures, squares in the middle, in [-1, 1]: ``name`` (C, S, S); with targets, two of them beside each."""

    def __init__(
        self,
        files: Sequence[Picture],
        size: int,
        channels: int,
        name: str,
        flip: bool = False,
        seed: int = 0,
        targets: Sequence[Picture] | None = None,
    ) -> None:
        self.files, self.size, self.channels, self.name = files, size, channels, name
        self.flip, self.seed, self.targets = flip, seed, targets

    def __len__(self) -> int:
        return len(self.files)

    def _read(self, place: Picture, mirrored: bool) -> Tensor:
        picture = open_picture(place, "image", "copy the images again") if isinstance(place, Path) else Image.fromarray(place)
        picture = picture.convert("RGB" if self.channels == 3 else "L")
        pixels = np.atleast_3d(np.asarray(adm_crop(picture, self.size), dtype=np.float32)).transpose(2, 0, 1) / 127.5 - 1
        return torch.from_numpy(np.ascontiguousarray(pixels[..., ::-1] if mirrored else pixels))

    def at(self, epoch: int, index: int) -> dict[str, Tensor]:
        """One image, or three."""
        draw = np.random.default_rng([self.seed, 3, epoch, index])
        mirrored = draw.random(3) < 0.5 if self.flip else np.zeros(3, dtype=bool)
        found = {self.name: self._read(self.files[index], bool(mirrored[0]))}
        if self.targets is not None:
            for name, other, mirror in zip(("target", "detail"), draw.integers(len(self.targets), size=2), mirrored[1:], strict=True):
                found[name] = self._read(self.targets[int(other)], bool(mirror))
        return found


class FewShotFoldersDataModule(TwoDomainsDataModule):
    """A folder of source images, such as FFHQ, and a folder of a few target images.

    Batch: {"source": (B, C, S, S) float32 in [-1, 1], "target": (B, C, S, S) float32 in [-1, 1], "detail": (B, C, S, S) float32 in [-1, 1]}

    ``target`` and ``detail`` are drawn from the few. Validation, test and predict have ``source`` alone: the last ``num_val`` source images
    by name, which no training sees. Images are reduced until the shorter side is S, and the middle square counts.

    Args:
        root: Folder that holds both; None: 150 built-in images of shapes and textures, and the negatives of some others.
        source: Folder in it of PNG, JPEG, WebP, BMP or TIFF files, folders below it included; or a path of its own.
        target: Folder of the few; or a path of its own.
        image_size: S.
        channels: 3, or 1 for grey.
        shots: Take the first so many target images by name; None: all.
        num_val: Source images for validation.
        flip: Mirror half of the training images.
        batch_size: Source images per process and step, beside as many target images.
        val_batch_size: Source images per process and evaluation step.
        num_workers: Processes that read data.
        seed: Seed of order and draws.

    Raises:
        WrongRootError: A folder isn't there or holds too few images.
        BrokenRecordError: A file is no image; the message names it.
    """

    def __init__(
        self,
        root: Path | None = None,
        source: str = "source",
        target: str = "target",
        image_size: int = 64,
        channels: int = 3,
        shots: int | None = None,
        num_val: int = 16,
        flip: bool = True,
        batch_size: int = 4,
        val_batch_size: int = 8,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, eval_batch_size=val_batch_size, num_workers=num_workers, seed=seed)
        checks.at_least(8, "pixels", image_size=image_size)
        checks.at_least(1, "images", shots=shots, num_val=num_val)
        if channels not in (1, 3):
            raise ValueError(f"channels is {channels}: give 3 for colours, or 1 for grey")
        self.root = data_path(root)
        given = {"source": user_path(source), "target": user_path(target)}
        self.folders = {name: folder if self.root is None else self.root / folder for name, folder in given.items()}
        self.save_hyperparameters()

    def _files(self, name: str, least: int, why: str) -> list[Path]:
        folder = self.folders[name]
        if not folder.is_dir():
            raise WrongRootError(f"{name}={str(folder)!r} is no folder: give one of PNG or JPEG files")
        found = [path for path in listed(folder, "**/*", endings=ENDINGS) if path.is_file()]
        if len(found) < least:
            raise WrongRootError(
                f"{name}={str(folder)!r} holds {len(found)} images ({', '.join(ENDINGS)}): expected at least {least}, {why}"
            )
        return found

    def _found(self) -> tuple[Sequence[Picture], Sequence[Picture]]:
        num_val, shots = self.hparams["num_val"], self.hparams["shots"]
        if self.root is None:
            checks.within(f"[1, {BUILT_IN - 1}]", f"some of the {BUILT_IN} built-in images", num_val=num_val)
            (images, _), _, _ = built_in_release("cifar10")
            pixels = np.ascontiguousarray(np.asarray(images)[: BUILT_IN + (shots or 10)].transpose(0, 2, 3, 1))
            return list(pixels[:BUILT_IN]), list(255 - pixels[BUILT_IN:])
        sources = self._files("source", num_val + 1, f"num_val={num_val} of them for validation")
        targets = self._files("target", shots or 1, "images of the domain that is adapted to")
        return sources, targets[:shots]

    def check_root(self, stage: str = "fit") -> None:
        """Look for image files in both folders."""
        self._found()

    def setup(self, stage: str) -> None:
        """List the files."""
        if self.train_set is not None:
            return
        hp = self.hparams
        sources, targets = self._found()
        size = (hp["image_size"], hp["channels"])
        known, held = sources[: -hp["num_val"]], sources[-hp["num_val"] :]
        self.train_set = _Pictures(known, *size, "source", hp["flip"], self.seed, targets)
        self.val_set = self.test_set = _Pictures(held, *size, "source")
        self.bank_sets = {"source": _Pictures(known, *size, "image"), "target": _Pictures(targets, *size, "image")}


def turned_points(count: int, degrees: float = 60.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Points in the plane, the same turned around 0, and where they belong: moved as far as the turn moves their mean, and not turned.

    Args:
        count: Number of points.
        degrees: Angle.
        seed: Seed of the points.

    Returns:
        Source, turned and target, each (count, 2) float32.
    """
    points = torch.randn(count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + torch.tensor([3.0, 0.0])
    angle = math.radians(degrees)
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64)
    turned = points @ turn.T
    return points.float(), turned.float(), (points + turned.mean(0) - points.mean(0)).float()


class TurnedPointsDataModule(TwoDomainsDataModule):
    """Points in the plane as the source; the target is the same points moved. For exact trials of losses that adapt a generator.

    Batch: {"source": (B, 2) float32, "index": (B,) int64, "target": (B, 2) float32}

    Args:
        count: Points, all of them in each batch of training and evaluation.
        degrees: Angle of the turn whose mean the target has, see ``FreePoints``.
        steps: Batches of an epoch.
        num_workers: Processes that read data; 0 is fastest.
        seed: Seed of the points.

    Raises:
        ValueError: A number lies outside its range.
    """

    def __init__(self, count: int = 8, degrees: float = 60.0, steps: int = 100, num_workers: int = 0, seed: int = 0) -> None:
        super().__init__(batch_size=count, num_workers=num_workers, seed=seed)
        checks.at_least(3, "points", count=count)
        checks.at_least(1, "batches", steps=steps)
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        """Make the points."""
        if self.train_set is not None:
            return
        hp = self.hparams
        source, _, target = turned_points(hp["count"], hp["degrees"], self.seed)
        every = torch.arange(len(source))
        repeated = every.repeat(hp["steps"])
        self.train_set = Named(source=source[repeated], index=repeated, target=target[repeated])
        self.val_set = self.test_set = Named(source=source, index=every, target=target)
        self.bank_sets = {"source": Named(image=source), "target": Named(image=target)}

    def train_dataloader(self) -> Any:
        """In order, all points in each batch."""
        return self.loader(self.data_of("train"), self.batch_size, drop_last=True)


__all__ = [
    "BesideTargets",
    "DigitStyle",
    "FewShotDigitsDataModule",
    "FewShotFoldersDataModule",
    "TurnedPointsDataModule",
    "TwoDomainsDataModule",
    "restyle",
    "turned_points",
]
