"""Images with boxes as samples: resized, cropped and mirrored together, and put into batches of one size."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lit_methods.datamodules.base import Samples
from lit_methods.datamodules.errors import BrokenRecordError

Floats = NDArray[np.float32]


@dataclass
class Record:
    """An image with its boxes.

    Attributes:
        name: Name of the image, without an ending.
        boxes: (G, 4) corners in pixels.
        labels: (G,) int64.
        ignore: (G,) bool, boxes that are no targets and don't count in an evaluation.
        file: The image's file; None: its pixels are in memory.
        size: Width and height as the table says; None: it doesn't.
    """

    name: str
    boxes: Floats
    labels: NDArray[np.int64]
    ignore: NDArray[np.bool_]
    file: Path | None = None
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class View:
    """How an image is looked at.

    Attributes:
        sides: Lengths of the shorter side, of which one is drawn; none: as it is.
        longest: Largest length of the longer side.
        crop: Least and largest side of a random crop, taken in half of the cases before resizing; None: no crops.
        flip: Mirrored in half of the cases.
    """

    sides: tuple[int, ...] = ()
    longest: int = 1333
    crop: tuple[int, int] | None = None
    flip: bool = False


def resized(image: Image.Image, boxes: Floats, side: int, longest: int) -> tuple[Image.Image, Floats]:
    """Image and boxes whose shorter side is ``side``, or less where the longer one would be more than ``longest``."""
    factor = min(side / min(image.size), longest / max(image.size))
    width, height = (max(1, round(length * factor)) for length in image.size)
    scale = np.array([width / image.width, height / image.height] * 2, dtype=np.float32)
    return image.resize((width, height), Image.Resampling.BILINEAR), boxes * scale


def viewed(image: Image.Image, record: Record, view: View, rng: np.random.Generator) -> tuple[Image.Image, Record]:
    """An image with its boxes as a view shows it; boxes of which less than a pixel is left are dropped."""
    boxes: Floats = record.boxes
    kept: NDArray[np.bool_] = np.ones(len(boxes), dtype=bool)
    if view.crop is not None and rng.random() < 0.5:
        low, high = view.crop
        width, height = (int(rng.integers(min(low, length), min(high, length) + 1)) for length in image.size)
        left, top = int(rng.integers(image.width - width + 1)), int(rng.integers(image.height - height + 1))
        image = image.crop((left, top, left + width, top + height))
        boxes = (boxes - np.array([left, top] * 2, dtype=np.float32)).clip(0, [width, height] * 2).astype(np.float32)
        kept = np.all((boxes[:, 2:] - boxes[:, :2]) >= 1, axis=1)
    if view.sides:
        image, boxes = resized(image, boxes, view.sides[int(rng.integers(len(view.sides)))], view.longest)
    if view.flip and rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        boxes = np.stack([image.width - boxes[:, 2], boxes[:, 1], image.width - boxes[:, 0], boxes[:, 3]], axis=1)
    return image, Record(record.name, boxes[kept], record.labels[kept], record.ignore[kept], record.file, record.size)


def padded(boxes: Tensor, labels: Tensor, ignore: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes (G, 4), labels and marks (G,) of an image, filled up to ``most`` with zeros, -1 and False."""
    room = most - len(labels)
    nothing = torch.full((room,), -1, dtype=torch.int64)
    return torch.cat([boxes, boxes.new_zeros(room, 4)]), torch.cat([labels, nothing]), torch.cat([ignore, ignore.new_zeros(room)])


def detection_batch(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Samples as a batch: images are filled with black at the right and at the bottom, boxes up to the most that one has."""
    height, width = (max(sample["image"].shape[side] for sample in samples) for side in (1, 2))
    images = torch.zeros(len(samples), 3, height, width)
    for place, sample in enumerate(samples):
        image = sample["image"]
        images[place, :, : image.shape[1], : image.shape[2]] = image
    most = max(1, *(int((sample["label"] >= 0).sum()) for sample in samples))
    batch: dict[str, Any] = {"image": images, "name": [sample["name"] for sample in samples]}
    for key in ("boxes", "label", "ignore"):
        batch[key] = torch.stack([sample[key][:most] for sample in samples])
    for key in ("size", "original_size"):
        batch[key] = torch.stack([sample[key] for sample in samples])
    batch["index"] = torch.tensor([sample["index"] for sample in samples])
    return batch


class DetectionSamples(Samples):
    """Images with boxes; each sample has room for as many boxes as the fullest image has.

    Args:
        records: The images.
        read: Record and its place -> picture.
        view: How training or evaluation looks at them.
        repeats: (N,) how often each image stands in an epoch; None: once.
        skip: Take the next image where one can't be read.
        seed: Seed of the views, drawn from (seed, epoch, index).
    """

    collate = staticmethod(detection_batch)

    def __init__(
        self,
        records: Sequence[Record],
        read: Callable[[Record, int], Image.Image],
        view: View,
        repeats: NDArray[np.int64] | None = None,
        skip: bool = False,
        seed: int = 0,
    ) -> None:
        self.records, self.read, self.view, self.skip, self.seed = list(records), read, view, skip, seed
        self.order = np.arange(len(self.records)) if repeats is None else np.repeat(np.arange(len(self.records)), repeats)
        self.most = max([1, *(len(record.labels) for record in self.records)])

    def __len__(self) -> int:
        return len(self.order)

    def _readable(self, index: int) -> tuple[int, Image.Image]:
        """The image of a place, or the next one that can be read."""
        for step in range(len(self.order)):
            place = int(self.order[(index + step) % len(self.order)])
            try:
                return place, self.read(self.records[place], place)
            except BrokenRecordError:
                if not self.skip or step + 1 == len(self.order):
                    raise
        raise AssertionError("a data set without images has no index")

    def at(self, epoch: int, index: int) -> dict[str, Any]:
        """One image with its boxes."""
        place, image = self._readable(index)
        original = torch.tensor([image.width, image.height], dtype=torch.float32)
        image, record = viewed(image, self.records[place], self.view, np.random.default_rng([self.seed, epoch, index]))
        pixels = torch.from_numpy(np.ascontiguousarray(np.asarray(image, dtype=np.float32).transpose(2, 0, 1))) / 255
        found = [torch.from_numpy(np.ascontiguousarray(part)) for part in (record.boxes, record.labels, record.ignore)]
        boxes, labels, ignore = padded(found[0], found[1], found[2], self.most)
        size = torch.tensor([image.width, image.height], dtype=torch.float32)
        sample: dict[str, Any] = {"image": pixels, "boxes": boxes, "label": labels, "ignore": ignore, "size": size}
        return sample | {"original_size": original, "index": index, "name": record.name}


__all__ = ["DetectionSamples", "Record", "View", "detection_batch", "padded", "resized", "viewed"]
