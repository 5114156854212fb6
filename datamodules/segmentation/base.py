"""What the segmentation data sets share: views by (seed, epoch, index), and geometry that moves image and labels together."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from lit_methods.datamodules.base import Samples

Arrays = dict[str, NDArray[Any]]  # "image" (C, H, W) or (H, W), and label maps (H, W) under keys that begin with "label"
Transform = Callable[[Arrays, np.random.Generator], Arrays]


def flip_or_rotate(sample: Arrays, rng: np.random.Generator, degrees: int = 20) -> Arrays:
    """With equal chances a quarter turn (0 to 3 of them) and a flip, or a rotation by whole degrees in [-degrees, degrees), nearest pixel.

    Args:
        sample: Arrays whose last two axes are height and width; all are moved alike.
        rng: What is drawn from.
        degrees: Largest angle of a rotation, in whole degrees.
    """
    if rng.random() < 0.5:
        turns, axis = int(rng.integers(4)), int(rng.integers(2)) - 2
        return {name: np.flip(np.rot90(array, turns, axes=(-2, -1)), axis) for name, array in sample.items()}
    angle = int(rng.integers(-degrees, degrees))
    return {name: ndimage.rotate(array, angle, axes=(-1, -2), order=0, reshape=False) for name, array in sample.items()}


def resize(sample: Arrays, size: tuple[int, int]) -> Arrays:
    """Image by a cubic spline, labels by the nearest pixel."""
    found: Arrays = {}
    for name, array in sample.items():
        if array.shape[-2:] == size:
            found[name] = array
            continue
        factors = [1.0] * (array.ndim - 2) + [target / old for target, old in zip(size, array.shape[-2:], strict=True)]
        found[name] = ndimage.zoom(array, factors, order=0 if name.startswith("label") else 3)
    return found


def as_tensors(sample: Arrays) -> dict[str, torch.Tensor]:
    """``image`` (C, H, W) float32, labels (H, W) int64."""
    found = {}
    for name, array in sample.items():
        if name.startswith("label"):
            found[name] = torch.from_numpy(np.ascontiguousarray(array).astype(np.int64))
        else:
            image = np.ascontiguousarray(array, dtype=np.float32)
            found[name] = torch.from_numpy(image if image.ndim == 3 else image[None])
    return found


class SegmentationSamples(Samples):
    """Images with label maps, each with its index.

    Args:
        size: Number of samples.
        read: Index -> arrays.
        transform: (arrays, generator) -> arrays; None: as they are. View v is drawn from (seed, epoch, index, v).
        views: 1: ``image``, ``label``, ...; 2: also ``image_2``, ``label_2``, ..., transformed anew.
        extra: Keys of further values -> (size, ...) arrays, one row a sample.
        seed: Seed of the views.
    """

    def __init__(
        self,
        size: int,
        read: Callable[[int], Arrays],
        transform: Transform | None = None,
        views: int = 1,
        extra: dict[str, NDArray[Any]] | None = None,
        seed: int = 0,
    ) -> None:
        self.size, self.read, self.transform, self.views, self.extra, self.seed = size, read, transform, views, extra or {}, seed

    def __len__(self) -> int:
        return self.size

    def at(self, epoch: int, index: int) -> dict[str, Any]:
        """One image in all its views."""
        raw = self.read(index)
        sample: dict[str, Any] = {"index": index}
        for view in range(1, self.views + 1):
            found = raw if self.transform is None else self.transform(raw, np.random.default_rng([self.seed, epoch, index, view]))
            sample |= {name if view == 1 else f"{name}_{view}": value for name, value in as_tensors(found).items()}
        return sample | {name: torch.as_tensor(values[index]) for name, values in self.extra.items()}


def the_only(samples: list[Any]) -> Any:
    """A volume is a batch by itself."""
    return samples[0]


class Volumes(Samples):
    """Whole volumes: ``image`` (S, 1, h, w) float32, ``label`` (S, H, W) int64, ``volume``, its name. A loader has one in a batch."""

    collate = staticmethod(the_only)
    batch_size = 1

    def __init__(self, names: Sequence[str], read: Callable[[int], tuple[NDArray[Any], NDArray[Any]]]) -> None:
        self.names, self.read = list(names), read

    def __len__(self) -> int:
        return len(self.names)

    def at(self, epoch: int, index: int) -> dict[str, Any]:
        """One volume."""
        image, label = self.read(index)
        pixels = torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32))[:, None]
        return {"image": pixels, "label": torch.from_numpy(label.astype(np.int64)), "volume": self.names[index]}


__all__ = ["SegmentationSamples", "Volumes", "as_tensors", "flip_or_rotate", "resize", "the_only"]
