"""Drawn images whose shape, colour and position are known: for telling what features know of each."""

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_methods.checks import at_least, one_of
from lit_methods.datamodules.base import Samples
from lit_methods.datamodules.vision.base import ClassificationDataModule
from lit_methods.datamodules.vision.shapes import FACTORS, draw_factors

Label = Literal["shape", "colour", "position", "shape_and_colour"]


class FactorImages(Samples):
    """Images with a class for each factor.

    Args:
        images: (N, 3, S, S) float32.
        factors: Name -> (N,) classes; ``label`` among them.
    """

    def __init__(self, images: Tensor, factors: dict[str, NDArray[np.int64]]) -> None:
        self.images, self.factors = images, factors

    def __len__(self) -> int:
        return len(self.images)

    def at(self, epoch: int, index: int) -> dict[str, Any]:
        """One image, the same in every epoch."""
        return {"image": self.images[index]} | {name: int(values[index]) for name, values in self.factors.items()}


class ShapeFactorsDataModule(ClassificationDataModule):
    """Small colour images of one shape each, whose shape, colour and position are drawn independently.

    Batch: {"image": (B, 3, 16, 16) float32, "label": (B,) int64, "shape": (B,) int64, "colour": (B,) int64, "position": (B,) int64}

    Five shapes, six colours and four quarters of the image; sizes, shades, places within the quarter and the background vary, and there is
    noise. Pixels lie in [-1, 1]. There is nothing to download and no ``root``. Validation and test are the same images, which no seed of
    the training part shares.

    Args:
        num_train: Images of the training part.
        num_val: Images of the held-out part.
        size: Side of an image in pixels.
        label: What ``label`` in the batches is: one factor, or ``shape_and_colour`` together.
        batch_size: Images per process and step.
        num_workers: Processes that read data.
        seed: Seed of the training images and of their order.

    Raises:
        ValueError: A number lies outside its range.
    """

    def __init__(
        self,
        num_train: int = 2000,
        num_val: int = 1000,
        size: int = 16,
        label: Label = "shape_and_colour",
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        at_least(1, num_train=num_train, num_val=num_val)
        at_least(8, "pixels", size=size)
        one_of(Label, label=label)
        self.num_train, self.num_val, self.size, self.label = num_train, num_val, size, label
        self.save_hyperparameters()
        both = tuple(f"{colour} {shape}" for shape in FACTORS["shape"] for colour in FACTORS["colour"])
        self.class_names = both if label == "shape_and_colour" else FACTORS[label]

    def setup(self, stage: str) -> None:
        """Draw the images."""
        if self.train_set is None:
            self.train_set = self._draw(self.num_train, 2 * self.seed + 1)
            self.val_set = self.test_set = self._draw(self.num_val, 0)

    def _draw(self, number: int, seed: int) -> FactorImages:
        pixels, factors = draw_factors(number, self.size, seed)
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()
        both = factors["shape"] * len(FACTORS["colour"]) + factors["colour"]
        return FactorImages(images, {"label": both if self.label == "shape_and_colour" else factors[self.label]} | factors)
