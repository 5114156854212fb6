"""Images in [-1, 1] for generative models, read by the classification datamodules."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lit_methods.checks import at_least, within
from lit_methods.datamodules.folders import data_path
from lit_methods.datamodules.generative.base import GenerativeDataModule, Tensors
from lit_methods.datamodules.vision.base import LabelledImages
from lit_methods.datamodules.vision.cifar import built_in_release, read_release, release_folder
from lit_methods.datamodules.vision.digits import DigitsDataModule
from lit_methods.datamodules.vision.imagenet import ImageNetDataModule


class GenerativeDigitsDataModule(GenerativeDataModule):
    """Handwritten digits that scikit-learn ships, smoothly enlarged.

    Batch: {"image": (B, 1, S, S) float32 in [-1, 1], "label": (B,) int64 in 0..9}

    The split is that of ``DigitsDataModule``.

    Args:
        image_size: S, 8 or more; the images have 8 x 8 pixels of their own.
        num_train: Images for training, 1 to 1796; the rest of the 1,797 is for validation.
        batch_size: Images per process and step.
        val_batch_size: Images per process and validation step.
        num_samples: Samples that ``lit predict`` draws, at most as many as there are validation images.
        num_workers: Processes that read data; the images lie in memory, so 0 is fastest.
        seed: Seed of the order.

    Raises:
        ValueError: A number lies outside its range.
    """

    def __init__(
        self,
        image_size: int = 16,
        num_train: int = 1500,
        batch_size: int = 128,
        val_batch_size: int = 128,
        num_samples: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, val_batch_size=val_batch_size, num_samples=num_samples, num_workers=num_workers, seed=seed)
        at_least(8, "pixels, as the images have 8 x 8", image_size=image_size)
        within("[1, 1796]", "images for training, the rest of the 1797 is for validation,", num_train=num_train)
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        """Read, split, enlarge."""
        if self.train_set is not None:
            return
        digits = DigitsDataModule(num_train=self.hparams["num_train"])
        digits.setup("fit")
        self.train_set, self.val_set = (self._enlarged(part) for part in (digits.train_set, digits.val_set))

    def _enlarged(self, part: object) -> Tensors:
        samples = [part[index] for index in range(len(part))]  # type: ignore[arg-type, index]
        images: Tensor = torch.stack([sample["image"] for sample in samples])
        size = self.hparams["image_size"]
        if size != 8:
            images = F.interpolate(images, (size, size), mode="bicubic", align_corners=False).clamp(0, 1)
        return Tensors(images * 2 - 1, torch.tensor([sample["label"] for sample in samples]))


class GenerativeCIFARDataModule(GenerativeDataModule):
    """CIFAR-10 for generative models.

    Batch: {"image": (B, 3, 32, 32) float32 in [-1, 1], "label": (B,) int64 in 0..9}

    Validation sees the test images.

    Args:
        root: Folder that holds ``cifar-10-batches-py``, whole or with fewer images per file. None: built-in images of shapes and
            textures, 2,000 for training and 500 for validation.
        flip: Mirror half of the training images, other ones in every epoch.
        batch_size: Images per process and step.
        val_batch_size: Images per process and validation step.
        num_samples: Samples that ``lit predict`` draws, at most as many as there are test images.
        num_workers: Processes that read data; the images lie in memory.
        seed: Seed of the order and mirroring.

    Raises:
        WrongRootError: ``root`` doesn't hold the release.
        BrokenRecordError: A file is missing, truncated or wrong; the message names it and the field.
    """

    def __init__(
        self,
        root: Path | None = None,
        flip: bool = True,
        batch_size: int = 128,
        val_batch_size: int = 500,
        num_samples: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, val_batch_size=val_batch_size, num_samples=num_samples, num_workers=num_workers, seed=seed)
        self.root, self.flip = data_path(root), flip
        self.save_hyperparameters()

    def check_root(self, stage: str = "fit") -> None:
        """Look for the release's folder."""
        if self.root is not None:
            release_folder(self.root, "cifar10")

    def setup(self, stage: str) -> None:
        """Read everything into memory."""
        if self.train_set is not None:
            return
        train, test, _ = built_in_release("cifar10") if self.root is None else read_release(self.root, "cifar10")
        self.train_set = Tensors(torch.tensor(train[0]), torch.tensor(train[1]), self.flip, self.seed)
        self.val_set = Tensors(torch.tensor(test[0]), torch.tensor(test[1]))


def adm_crop(image: Image.Image, size: int) -> Image.Image:
    """The square in the middle, as ADM prepares ImageNet (arXiv:2105.05233): halved by averaging while twice too large, then bicubic.

    Args:
        image: Any size.
        size: Side of the result in pixels.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


class _AdmTransform:
    """RGB -> (3, S, S) float32 in [-1, 1]; mirrored in half of the cases if asked for."""

    def __init__(self, size: int, flip: bool) -> None:
        self.size, self.flip = size, flip

    def __call__(self, image: Image.Image, draw: tuple[int, int, int]) -> Tensor:
        pixels = torch.from_numpy(np.asarray(adm_crop(image, self.size), dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1
        return pixels.flip(2) if self.flip and np.random.default_rng([*draw, 2]).random() < 0.5 else pixels.contiguous()


class GenerativeImageNetDataModule(ImageNetDataModule):
    """ImageNet for generative models, prepared as ADM does it.

    Batch: {"image": (B, 3, S, S) float32 in [-1, 1], "label": (B,) int64}

    Validation and test both read ``val/``.

    Args:
        root: Folder with ``train/<class>/*.JPEG`` and ``val/<class>/*.JPEG``. None: built-in images of shapes and textures in ten classes,
            600 for training and 200 for validation.
        class_list: File with the names of the class folders in the order of the labels. None: the sorted names of the folders in ``train``.
        image_size: S.
        flip: Mirror half of the training images, other ones in every epoch.
        batch_size: Images per process and step.
        num_workers: Processes that read data.
        seed: Seed of the order and mirroring.

    Raises:
        WrongRootError: The folders aren't there, or don't fit the classes.
        BrokenRecordError: An image can't be read; the message names the file.
    """

    def __init__(
        self,
        root: Path | None = None,
        class_list: Path | None = None,
        image_size: int = 64,
        flip: bool = True,
        batch_size: int = 256,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(root, class_list, image_size, batch_size=batch_size, num_workers=num_workers, seed=seed)
        self.image_size, self.flip = image_size, flip
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        """List the files."""
        if self.val_set is not None:
            return
        super().setup(stage)
        for part, flip in ((self.train_set, self.flip), (self.val_set, False)):
            if isinstance(part, LabelledImages):
                part.transform = _AdmTransform(self.image_size, flip)
