"""Small grey pictures that scikit-image ships: patches of ten pictures, and faces beside what is none."""

import operator
from functools import partial
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_methods.checks import at_least, one_of, share, within
from lit_methods.datamodules.vision.base import ClassificationDataModule, LabelledImages, fixed_split, redraw_labels

Name = Literal["patches", "faces"]
PICTURES = ("astronaut", "brick", "chelsea", "coffee", "coins", "grass", "gravel", "hubble_deep_field", "immunohistochemistry", "page")
_TRAIN_WIDTH = 0.6  # of each picture, from the left


def read_picture(name: str) -> NDArray[np.float32]:
    """A picture of scikit-image in grey, (H, W) in [0, 1], each pixel the mean of 2 x 2."""
    import skimage.data

    picture = np.asarray(getattr(skimage.data, name)(), dtype=np.float32) / 255
    grey = picture if picture.ndim == 2 else picture.mean(axis=2)
    height, width = (side // 2 for side in grey.shape)
    return grey[: 2 * height, : 2 * width].reshape(height, 2, width, 2).mean(axis=(1, 3))


def cut_patches(number: int, size: int, train: bool) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Patches at random places, the same in every run: (number, 1, size, size) and the places of their pictures in ``PICTURES``.

    Args:
        number: Number of patches; all pictures have as many, to within one.
        size: Side in pixels.
        train: From the left 60 % of each picture; False: from the rest.
    """
    rng = np.random.default_rng([31, int(not train)])
    parts = []
    for name in PICTURES:
        picture = read_picture(name)
        border = int(_TRAIN_WIDTH * picture.shape[1])
        parts.append(picture[:, :border] if train else picture[:, border:])
    labels = rng.permutation(np.arange(number) % len(PICTURES))
    patches = np.empty((number, 1, size, size), dtype=np.float32)
    for patch, label in zip(patches, labels, strict=True):
        top, left = (int(rng.integers(side - size + 1)) for side in parts[label].shape)
        patch[0] = parts[label][top : top + size, left : left + size]
    return patches, labels


def _as_it_is(image: Tensor, draw: tuple[int, int, int]) -> Tensor:
    return image


class SkimageDataModule(ClassificationDataModule):
    """Small grey pictures out of scikit-image, real ones; nothing is downloaded, and there is no ``root``.

    Batch: {"image": (B, 1, S, S) float32 in [0, 1], "label": (B,) int64 in 0..C-1}

    ``patches``: patches of ten pictures at half their size; the class is the picture. Training patches lie in the left 60 % of each
    picture, held-out ones in the rest. ``faces``: 100 faces and 100 other patches of 25 x 25 pixels (the subset of LFW), split by one
    permutation. Pictures and split are the same for every seed. Validation and test are the same pictures: choose nothing by the one to
    report it by the other.

    Args:
        name: ``patches`` or ``faces``.
        size: S of ``patches``; faces have 25 pixels whatever it is.
        num_train: Pictures for training; of ``faces`` up to 199, the rest of the 200 is held out.
        num_val: Held-out patches.
        label_noise: Share of the training labels that is drawn anew from all classes, 0 to 1; held-out labels stay clean.
        batch_size: Pictures per process and step.
        num_workers: Processes that read data.
        seed: Seed of the order and of the label noise.
        quarter_turns: All pictures are turned so often by 90 degrees, to the left: another domain.

    Raises:
        ValueError: A value lies outside its range.
    """

    def __init__(
        self,
        name: Name = "patches",
        size: int = 8,
        num_train: int = 1200,
        num_val: int = 600,
        label_noise: float = 0.0,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        quarter_turns: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        one_of(Name, name=name)
        within("[1, 64]", "pixels, which all parts have,", size=size)
        if name == "faces":
            within("[1, 199]", "pictures for training, the rest of the 200 is held out,", num_train=num_train)
        at_least(1, num_train=num_train, num_val=num_val)
        share(label_noise=label_noise)
        # not read from hparams: below another datamodule Lightning puts that one's there
        self.source, self.size, self.num_train, self.num_val, self.label_noise = name, size, num_train, num_val, label_noise
        self.quarter_turns = quarter_turns
        self.save_hyperparameters()
        self.class_names = PICTURES if name == "patches" else ("face", "other")

    def setup(self, stage: str) -> None:
        """Read, cut or split, redraw labels."""
        if self.train_set is not None:
            return
        if self.source == "patches":
            parts = [cut_patches(number, self.size, train) for number, train in ((self.num_train, True), (self.num_val, False))]
        else:
            from skimage.data import lfw_subset

            faces, kinds = np.asarray(lfw_subset(), dtype=np.float32)[:, None], np.repeat([0, 1], 100)
            parts = [(faces[chosen], kinds[chosen]) for chosen in fixed_split(len(faces), self.num_train)]
        (images, labels), (held_out, held_out_labels) = parts
        images, held_out = (np.rot90(pixels, self.quarter_turns, (2, 3)).copy() for pixels in (images, held_out))
        noisy = redraw_labels(labels, self.label_noise, self.num_classes, self.seed)
        self.train_set = LabelledImages(partial(operator.getitem, torch.from_numpy(images)), noisy, _as_it_is, self.seed)
        self.val_set = LabelledImages(partial(operator.getitem, torch.from_numpy(held_out)), held_out_labels, _as_it_is, self.seed)
        self.test_set = self.val_set


__all__ = ["PICTURES", "SkimageDataModule", "cut_patches", "read_picture"]
