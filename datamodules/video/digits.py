"""Moving digits: real handwritten digits that fly and bounce, in the manner of Moving MNIST."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_methods.checks import at_least, literals, positive, within
from lit_methods.datamodules.base import Ints
from lit_methods.datamodules.video.base import PromptedVideos, VideoDataModule
from lit_methods.datamodules.vision.digits import DigitsDataModule


def bounce(start: Tensor, speed: Tensor, frames: int, room: float) -> Tensor:
    """Places of a ball between two walls: it moves evenly and is reflected.

    Args:
        start: (...) place at frame 0, in 0..``room``.
        speed: Like ``start``, pixels per frame.
        frames: F.
        room: Distance of the walls.

    Returns:
        (..., F) in 0..``room``.
    """
    way = start[..., None] + speed[..., None] * torch.arange(frames, dtype=start.dtype)
    return room - (way.remainder(2 * room) - room).abs() if room else torch.zeros_like(way)


def draw_moving(images: Tensor, places: Tensor, size: int) -> Tensor:
    """Images at places between pixels, on black.

    Args:
        images: (B, 1, h, w) in [0, 1].
        places: (B, F, 2), x and y of the upper left corner in pixels.
        size: Height and width S of a frame.

    Returns:
        (B, F, 1, S, S) in [0, 1].
    """
    height, width = images.shape[-2:]
    frames = places.shape[1]
    # the pixel (x, y) of a frame shows what the image has at (x - place): in units of half the image, as grid_sample counts
    pixel = torch.arange(size, dtype=places.dtype) + 0.5
    x = (pixel - places[..., :1]) * (2 / width) - 1  # (B, F, S)
    y = (pixel - places[..., 1:]) * (2 / height) - 1
    grid = torch.stack(torch.broadcast_tensors(x[:, :, None, :], y[:, :, :, None]), dim=-1).flatten(0, 1)
    drawn = F.grid_sample(images.repeat_interleave(frames, 0), grid.to(images.dtype), align_corners=False)
    return drawn.unflatten(0, (-1, frames))


@dataclass(frozen=True)
class Moving:
    """Draws videos of moving digits.

    Attributes:
        images: (N, 1, 8, 8) in [0, 1].
        size: S, pixels of a frame.
        speed: Largest speed in each direction, pixels per frame.
        frames: F.
        seed: Numbers that, with the epoch's, decide the motions.
    """

    images: Tensor
    size: int
    speed: float
    frames: int
    seed: tuple[int, ...]

    def __call__(self, epochs: Ints, index: Ints) -> Tensor:
        """(B,) epochs and indices -> (B, F, 1, S, S) in [-1, 1]."""
        drawn = np.empty((len(index), 2, 2), dtype=np.float64)
        for epoch in np.unique(epochs).tolist():
            now = epochs == epoch
            drawn[now] = np.random.default_rng([*self.seed, epoch]).random((len(self.images), 2, 2))[index[now]]
        room = float(self.size - 8)
        start, speed = torch.from_numpy(drawn).unbind(-1)  # each (B, 2)
        places = bounce(start * room, (2 * speed - 1) * self.speed, self.frames, room).transpose(1, 2)
        return draw_moving(self.images[torch.from_numpy(index)], places, self.size) * 2 - 1


class MovingDigitsDataModule(VideoDataModule):
    """Real digits of scikit-learn that move evenly and bounce off the edges; the prompt is the digit.

    Batch: {"video": (B, F, 1, S, S) float32 in [-1, 1], "prompt": (B, P) int64 in 0..9, "index": (B,) int64}

    ``prompt`` holds the digits of a long video's pieces, the video's own first. The split is that of ``DigitsDataModule``. Training draws
    other motions in every epoch.

    Args:
        frames: F, frames of a video.
        image_size: S, pixels of a frame, 8 or more; a digit has 8 x 8.
        speed: Largest speed in each direction, pixels per frame.
        pieces: P.
        prompts: What the pieces behind the first show: the ``same`` digit, or the ``next`` one, from the second on.
        num_train: Digits for training, 1 to 1796.
        num_val: Videos for validation, test and predict, of the digits that aren't for training.
        batch_size: Videos per process and step.
        val_batch_size: Videos per process and evaluation step.
        num_workers: Processes that read data; the digits lie in memory, so 0 is fastest.
        seed: Seed of motion and order.

    Raises:
        ValueError: A number lies outside its range.
    """

    def __init__(
        self,
        frames: int = 16,
        image_size: int = 16,
        speed: float = 1.0,
        pieces: int = 3,
        prompts: Literal["same", "next"] = "same",
        num_train: int = 1500,
        num_val: int = 8,
        batch_size: int = 16,
        val_batch_size: int = 8,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        literals(MovingDigitsDataModule, locals())
        super().__init__(batch_size=batch_size, val_batch_size=val_batch_size, num_workers=num_workers, seed=seed)
        at_least(1, frames=frames, pieces=pieces)
        at_least(8, "pixels, as a digit has 8 x 8", image_size=image_size)
        positive(speed=speed)
        within("[1, 1796]", "digits for training, the rest of the 1797 is held out,", num_train=num_train)
        within(f"[1, {1797 - num_train}]", "videos, at most the digits that aren't for training,", num_val=num_val)
        self.save_hyperparameters()
        self.class_names = tuple("0123456789")

    def setup(self, stage: str) -> None:
        """Read and split the digits."""
        if self.train_set is not None:
            return
        hp = self.hparams
        digits = DigitsDataModule(num_train=hp["num_train"])
        digits.setup("fit")
        self.train_set = self._videos(digits.train_set, hp["num_train"], self.seed)
        self.val_set = self.test_set = self._videos(digits.val_set, hp["num_val"], 0, first=hp["num_train"])

    def _videos(self, part: object, count: int, seed: int, first: int = 0) -> PromptedVideos:
        samples = [part[index] for index in range(count)]  # type: ignore[index]
        images: Tensor = torch.stack([sample["image"] for sample in samples])
        labels = torch.tensor([sample["label"] for sample in samples])
        later = labels if self.hparams["prompts"] == "same" else (labels + 1) % 10
        prompts = torch.stack([labels, *[later] * (self.hparams["pieces"] - 1)], dim=1)

        hp = self.hparams
        return PromptedVideos(prompts, Moving(images, hp["image_size"], hp["speed"], hp["frames"], (seed, 3, first)), first)


__all__ = ["MovingDigitsDataModule", "bounce", "draw_moving"]
