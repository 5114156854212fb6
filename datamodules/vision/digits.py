"""Handwritten digits that scikit-learn ships: small enough to train on in seconds."""

import operator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from lit_methods.checks import share, within
from lit_methods.datamodules.vision.base import ClassificationDataModule, LabelledImages, fixed_split, redraw_labels


def _as_it_is(image: Tensor, draw: tuple[int, int, int]) -> Tensor:
    return image


class DigitsDataModule(ClassificationDataModule):
    """1,797 grey images of 8 x 8 pixels, 10 classes (UCI Optical Recognition of Handwritten Digits, the test part).

    Batch: {"image": (B, 1, 8, 8) float32 in [0, 1], "label": (B,) int64 in 0..9}

    One permutation, the same for every seed, splits the images into ``num_train`` for training and the rest. Validation and test are both
    that rest: choose nothing by the one to report it by the other. There is nothing to download and no ``root``.

    Args:
        num_train: Images of the training part, 1 to 1796; 1200 leaves 597 held-out images.
        train_size: Train on the first so many of them; None: all.
        label_noise: Share of the training labels that is drawn anew from all classes, 0 to 1; held-out labels stay clean.
        batch_size: Images per process and step.
        num_workers: Processes that read data.
        seed: Seed of the order and of the label noise.
        quarter_turns: All images are turned so often by 90 degrees, to the left: another domain.

    Raises:
        ValueError: A number lies outside its range.
    """

    def __init__(
        self,
        num_train: int = 1200,
        train_size: int | None = None,
        label_noise: float = 0.0,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        quarter_turns: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        within("[1, 1796]", "images for training, the rest of the 1797 is held out,", num_train=num_train)
        within(f"[1, {num_train}]", "images, at most num_train, or null for all of them,", train_size=train_size)
        share(label_noise=label_noise)
        # not read from hparams: below another datamodule Lightning puts that one's there
        self.num_train, self.train_size, self.label_noise, self.quarter_turns = num_train, train_size, label_noise, quarter_turns
        self.save_hyperparameters()
        self.class_names = tuple("0123456789")

    def setup(self, stage: str) -> None:
        """Read, split, redraw labels."""
        if self.train_set is not None:
            return
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.from_numpy((digits.images / 16).astype(np.float32))[:, None].rot90(self.quarter_turns, (2, 3))
        labels = digits.target.astype(np.int64)
        train, held_out = fixed_split(len(labels), self.num_train)
        train = train[: self.train_size]
        noisy = redraw_labels(labels[train], self.label_noise, 10, self.seed)
        self.train_set = LabelledImages(partial(operator.getitem, images[torch.from_numpy(train)]), noisy, _as_it_is, self.seed)
        self.val_set = LabelledImages(partial(operator.getitem, images[torch.from_numpy(held_out)]), labels[held_out], _as_it_is, self.seed)
        self.test_set = self.val_set
