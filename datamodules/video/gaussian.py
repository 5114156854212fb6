"""Gaussian videos, whose exact denoiser is known."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lit_methods.checks import at_least, positive
from lit_methods.datamodules.base import Ints
from lit_methods.datamodules.video.base import PromptedVideos, VideoDataModule


@dataclass(frozen=True)
class Drawn:
    """Videos that are drawn once.

    Attributes:
        videos: (N, F, 1, H, W).
    """

    videos: Tensor

    def __call__(self, epochs: Ints, index: Ints) -> Tensor:
        """Those of the indices."""
        return self.videos[torch.from_numpy(index)]


class GaussianVideosDataModule(VideoDataModule):
    """Videos whose pixels are Gaussian over the frames: content that all frames share, and smooth motion. Their mean is the prompt.

    Batch: {"video": (B, F, 1, H, W) float32, "prompt": (B, P) float32, "index": (B,) int64}

    The covariance of frames i and j is 1 + 0.5 exp(-((i - j) / length)^2), plus 1e-4 on the diagonal: that of ``GaussianVideos``.

    Args:
        prompts: Means of a long video's pieces, the video's own first; the same for all videos.
        frames: F, frames of a video.
        size: H and W.
        length: Frames over which the motion is smooth.
        num_train: Videos for training.
        num_val: Videos for validation, test and predict.
        batch_size: Videos per process and step.
        val_batch_size: Videos per process and evaluation step.
        num_workers: Processes that read data; 0 is fastest.
        seed: Seed of the videos and their order.

    Raises:
        ValueError: A number lies outside its range.
    """

    def __init__(
        self,
        prompts: Sequence[float] = (0.0, 1.0, 1.0),
        frames: int = 16,
        size: Sequence[int] = (4, 6),
        length: float = 4.0,
        num_train: int = 1024,
        num_val: int = 8,
        batch_size: int = 32,
        val_batch_size: int = 8,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, val_batch_size=val_batch_size, num_workers=num_workers, seed=seed)
        at_least(1, "prompts", prompts=len(prompts))
        at_least(1, frames=frames, num_train=num_train, num_val=num_val)
        positive(length=length)
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"size is {list(size)}: give height and width, such as [4, 6]")
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        """Draw both sets."""
        if self.train_set is None:
            self.train_set = self._videos(self.hparams["num_train"], 1, 0)
            self.val_set = self.test_set = self._videos(self.hparams["num_val"], 2, self.hparams["num_train"])

    def _videos(self, count: int, part: int, first: int) -> PromptedVideos:
        hp = self.hparams
        place = np.arange(hp["frames"])
        covariance = 1 + 0.5 * np.exp(-(((place[:, None] - place) / hp["length"]) ** 2)) + 1e-4 * np.eye(len(place))
        drawn = np.random.default_rng([self.seed, part]).standard_normal((count, len(place), 1, *hp["size"]))
        values = np.einsum("fg,ngchw->nfchw", np.linalg.cholesky(covariance), drawn) + hp["prompts"][0]
        videos = torch.from_numpy(values.astype(np.float32))

        return PromptedVideos(torch.tensor(hp["prompts"], dtype=torch.float32).expand(count, -1), Drawn(videos), first)


__all__ = ["GaussianVideosDataModule"]
