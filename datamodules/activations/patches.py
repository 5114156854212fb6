"""Patches of two photographs, the classical data of sparse coding: real, and there is nothing to download."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_methods.checks import at_least, within
from lit_methods.datamodules.activations.synthetic import TensorBatches
from lit_methods.datamodules.base import LoaderDataModule


def photographs() -> list[NDArray[np.float32]]:
    """scikit-learn's two photographs in grey, (427, 640) in [0, 1] each."""
    from sklearn.datasets import load_sample_images

    return [np.asarray(image, dtype=np.float32).mean(axis=2) / 255 for image in load_sample_images().images]


def draw_patches(images: list[NDArray[np.float32]], count: int, size: int, rng: np.random.Generator) -> Tensor:
    """Square patches at random places, as many of each image, less their own mean: (count, size^2) float32."""
    patches = []
    for place, image in enumerate(images):
        windows = np.lib.stride_tricks.sliding_window_view(image, (size, size))
        rows, columns = (rng.integers(0, length, len(range(place, count, len(images)))) for length in windows.shape[:2])
        patches.append(windows[rows, columns].reshape(-1, size * size))
    found = np.concatenate(patches)
    return torch.from_numpy(found - found.mean(axis=1, keepdims=True))


class ImagePatchesDataModule(LoaderDataModule):
    """Grey patches of scikit-learn's two photographs, as activations; the right fifth of each photograph is for validation and test.

    Batch: {"activation": (B, 64) float32}

    Each patch has mean 0; all are divided by one number, so that the standard deviation of a training pixel is 1.

    Args:
        size: Pixels of a side; an activation has size^2 numbers.
        num_train: Training patches, drawn once.
        num_val: Validation patches, drawn once, the same for every seed.
        batch_size: Patches per process and step.
        num_workers: Processes that read data; the patches lie in memory, so 0 is fastest.
        seed: Seed of the training patches and their order.

    Raises:
        ValueError: A number lies outside its range.
    """

    def __init__(
        self, size: int = 8, num_train: int = 51200, num_val: int = 4096, batch_size: int = 256, num_workers: int = 0, seed: int = 0
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        within("[2, 64]", "pixels", size=size)
        at_least(1, num_train=num_train, num_val=num_val)
        self.size, self.num_train, self.num_val = size, num_train, num_val
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        """Draw all patches."""
        if self.train_set is not None:
            return
        halves = [(image[:, : image.shape[1] * 4 // 5], image[:, image.shape[1] * 4 // 5 :]) for image in photographs()]
        train = draw_patches([left for left, _ in halves], self.num_train, self.size, np.random.default_rng([self.seed, 0]))
        val = draw_patches([right for _, right in halves], self.num_val, self.size, np.random.default_rng(2**40))
        scale = train.std()
        self.train_set = TensorBatches({"activation": train / scale})
        self.val_set = self.test_set = TensorBatches({"activation": val / scale})
