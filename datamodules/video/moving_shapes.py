"""Clips of shapes, or of real digits, that move over a still, textured background: what moves, and where, is known to the pixel."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from lit_methods.checks import at_least, literals, positive, within
from lit_methods.datamodules.video.clips import ActionClipsDataModule, ActionVideo, Part
from lit_methods.datamodules.video.digits import bounce
from lit_methods.datamodules.vision.digits import DigitsDataModule
from lit_methods.datamodules.vision.skimage_pictures import PICTURES, read_picture

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Objects = Literal["shapes", "digits"]
SHAPES = ("square", "disc", "triangle", "cross")
_HELD_OUT = 397  # digits that test videos show, behind the 1,400 that training ones do


@dataclass(frozen=True, eq=False)
class StoredVideo:
    """A video in memory.

    Attributes:
        name: Its name.
        label: Class.
        pixels: (L, H, W, 3) uint8.
        truth: (L, H, W) bool.
    """

    name: str
    label: int
    pixels: NDArray[np.uint8]
    truth: NDArray[np.bool_]

    def length(self) -> int:
        """Frames."""
        return len(self.pixels)

    def annotated(self) -> Ints:
        """All frames."""
        return np.arange(len(self.pixels))

    def covered(self) -> Ints:
        """All of them."""
        return self.annotated()

    def frames(self, numbers: Ints) -> NDArray[np.uint8]:
        """(N,) -> (N, H, W, 3)."""
        return self.pixels[numbers]

    def masks(self, numbers: Ints, height: int, width: int) -> NDArray[np.bool_]:
        """(N,) -> (N, H, W)."""
        return self.truth[numbers]


def shape_masks(labels: Ints, x: Floats, y: Floats, radius: Floats) -> NDArray[np.bool_]:
    """Shapes as masks.

    Args:
        labels: (N,) places in ``SHAPES``.
        x: (N, L, S, S) distance from the centre to the right, in pixels.
        y: Of the same shape, downward.
        radius: (N,) pixels.

    Returns:
        (N, L, S, S).
    """
    across, down, size = np.abs(x), np.abs(y), radius[:, None, None, None]
    square = np.maximum(across, down) <= 0.85 * size
    disc = x**2 + y**2 <= size**2
    triangle = (y <= 0.8 * size) & (across <= (y + size) / 1.8)
    cross = (np.minimum(across, down) <= 0.35 * size) & (np.maximum(across, down) <= size)
    found: NDArray[np.bool_] = np.choose(labels[:, None, None, None], [square, disc, triangle, cross])
    return found


def _texture(rng: np.random.Generator, count: int, size: int) -> Floats:
    """(N, 3, S, S) in about 0.2..0.8: large patches of colour and fine grain."""
    coarse = torch.from_numpy(rng.random((count, 3, 5, 5)))
    smooth = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic", align_corners=True).numpy()
    return 0.2 + 0.45 * smooth + 0.15 * rng.random((count, 1, size, size))


def _photographs(rng: np.random.Generator, count: int, size: int) -> Floats:
    """(N, 3, S, S) cut at random out of the pictures of scikit-image, in grey."""
    pictures = [read_picture(name) for name in PICTURES]
    cut = np.empty((count, 1, size, size))
    for own in cut:
        picture = pictures[int(rng.integers(len(pictures)))]
        top, left = (int(rng.integers(side - size + 1)) for side in picture.shape)
        own[0] = picture[top : top + size, left : left + size]
    return np.broadcast_to(cut, (count, 3, size, size))


class MovingShapesDataModule(ActionClipsDataModule):
    """Shapes of four kinds, or real digits, that move evenly and bounce off the edges; few clips of the training have labels.

    Batch: {"labelled": {"clip": (B, 3, T, S, S) float32 in [0, 1], "mask": (B, 1, T, S, S) float32, "label": (B,) int64, ...}, "unlabelled": {"clip": (B, 3, T, S, S), "index": (B,) int64}}

    ``mask`` is 1 on the object, ``label`` its kind; ``video`` (B,) int64 is the number of the video, ``index`` that of the clip. Evaluation
    batches are like ``labelled``. Object and background are drawn from the same kinds of colours, so that a still frame hides much of the
    object. Without unlabelled videos, training batches have ``labelled`` alone.

    Args:
        objects: ``shapes``: square, disc, triangle, cross over made textures; ``digits``: scikit-learn's real digits over photographs.
        video_frames: Frames of a video.
        frames: T, frames of a clip.
        stride: Step between the frames of a clip.
        image_size: S, pixels of a frame, 16 or more.
        speed: Largest speed in each direction, pixels per frame.
        noise: Standard deviation of what each frame's pixels are changed by, 0 to 1.
        num_labelled: Videos with labels, all classes in turn.
        num_unlabelled: Videos without.
        num_val: Videos of validation and test.
        batch_size: Labelled clips per process and step.
        unlabelled_batch_size: Unlabelled clips per process and step; None: ``batch_size``.
        eval_batch_size: Clips per process and evaluation step; None: ``batch_size``.
        num_workers: Processes that read data; videos lie in memory, so 0 is fastest.
        seed: Seed of videos and order; those of validation are always the same.

    Raises:
        ValueError: A number outside its range.
    """  # noqa: E501

    def __init__(
        self,
        objects: Objects = "shapes",
        video_frames: int = 8,
        frames: int = 8,
        stride: int = 1,
        image_size: int = 32,
        speed: float = 2.0,
        noise: float = 0.05,
        num_labelled: int = 16,
        num_unlabelled: int = 112,
        num_val: int = 64,
        batch_size: int = 4,
        unlabelled_batch_size: int | None = None,
        eval_batch_size: int | None = 16,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        literals(MovingShapesDataModule, locals())
        super().__init__(
            frames=frames, stride=stride, image_size=None, resize=None, batch_size=batch_size, eval_batch_size=eval_batch_size,
            unlabelled_batch_size=unlabelled_batch_size, on_broken="error", num_workers=num_workers, seed=seed,
        )  # fmt: skip
        at_least(1, video_frames=video_frames, num_labelled=num_labelled, num_val=num_val)
        at_least(0, num_unlabelled=num_unlabelled)
        at_least(16, "pixels", image_size=image_size)
        positive(speed=speed)
        within("[0, 1]", noise=noise)
        self.save_hyperparameters()
        self.class_names = SHAPES if objects == "shapes" else tuple("0123456789")

    def read(self, part: Part) -> Sequence[ActionVideo]:
        """Draw the videos of one part."""
        hp = self.hparams
        counts = {"labelled": hp["num_labelled"], "unlabelled": hp["num_unlabelled"], "val": hp["num_val"], "test": hp["num_val"]}
        number = {"labelled": 1, "unlabelled": 2, "val": 3, "test": 3}[part]
        if part == "test" and self.val_set is not None:
            return self.val_set.videos  # type: ignore[no-any-return]
        rng = np.random.default_rng([self.seed if number < 3 else 0, 17, number])
        return self._draw(rng, counts[part], part, held_out=number == 3)

    def _draw(self, rng: np.random.Generator, count: int, part: str, held_out: bool) -> list[StoredVideo]:
        hp = self.hparams
        size, frames = hp["image_size"], hp["video_frames"]
        labels = rng.permutation(np.arange(count) % len(self.class_names))
        radius = rng.uniform(0.14, 0.24, count) * size
        start, speed = torch.from_numpy(rng.random((2, count, 2)))
        room = torch.from_numpy(size - 2 * radius)[:, None]
        way = start * room
        steps = (2 * speed - 1) * hp["speed"]
        places = (
            torch.stack([bounce(way[n], steps[n], frames, float(room[n])) for n in range(count)]) if count else torch.zeros(0, 2, frames)
        )
        centre = places.numpy() + radius[:, None, None]  # (N, 2, L)
        pixel = np.arange(size) + 0.5
        x = pixel[None, None, None, :] - centre[:, 0, :, None, None]
        y = pixel[None, None, :, None] - centre[:, 1, :, None, None]
        x, y = np.broadcast_arrays(x, y)
        if hp["objects"] == "shapes":
            masks = shape_masks(labels, x, y, radius)
            background, inside = _texture(rng, count, size), _texture(rng, count, size) + rng.choice([-0.18, 0.18], (count, 1, 1, 1))
        else:
            masks = self._digits(rng, labels, x, y, radius, held_out)
            background = _photographs(rng, count, size)
            inside = np.broadcast_to(rng.random((count, 1, 1, 1)), (count, 3, size, size))
        pictures = np.where(masks[:, :, None], inside[:, None], background[:, None])  # (N, L, 3, S, S)
        pictures = pictures + hp["noise"] * rng.standard_normal(pictures.shape)
        stored = (pictures.clip(0, 1) * 255).round().astype(np.uint8).transpose(0, 1, 3, 4, 2)
        return [StoredVideo(f"{part} {n}", int(labels[n]), stored[n], masks[n]) for n in range(count)]

    @staticmethod
    def _digits(rng: np.random.Generator, labels: Ints, x: Floats, y: Floats, radius: Floats, held_out: bool) -> NDArray[np.bool_]:
        """Masks of real digits, enlarged to the shapes' sizes."""
        digits = DigitsDataModule(num_train=1797 - _HELD_OUT)
        digits.setup("fit")
        part = digits.val_set if held_out else digits.train_set
        count = _HELD_OUT if held_out else 1797 - _HELD_OUT
        samples = [part[index] for index in range(count)]
        known = np.array([sample["label"] for sample in samples])
        images = np.stack([sample["image"][0].numpy() for sample in samples]) > 0.4  # (., 8, 8)
        chosen = np.array([rng.choice(np.flatnonzero(known == label)) for label in labels], dtype=np.int64)
        unit = radius[:, None, None, None] / 4  # pixels of a frame that a digit's pixel takes
        column, row = (np.floor(way / unit + 4).astype(np.int64) for way in (x, y))
        inside = (column >= 0) & (column < 8) & (row >= 0) & (row < 8)
        found: NDArray[np.bool_] = images[chosen[:, None, None, None], row.clip(0, 7), column.clip(0, 7)] & inside
        return found


__all__ = ["SHAPES", "MovingShapesDataModule", "StoredVideo", "shape_masks"]
