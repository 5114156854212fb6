"""What the video datamodules share: batches that come with the prompts of a long video and its number."""

from collections.abc import Callable

import torch
from torch import Tensor

from lit_methods.checks import at_least
from lit_methods.datamodules.base import Batches, Ints, LoaderDataModule

Render = Callable[[Ints, Ints], Tensor]


class PromptedVideos(Batches):
    """Videos with the prompts of the long video that each is the start of.

    Args:
        prompts: (N, P, ...), the video's own first.
        render: (epochs, indices), each (B,), -> videos (B, F, C, H, W).
        first: Number of the first one.
    """

    def __init__(self, prompts: Tensor, render: Render, first: int = 0) -> None:
        self.prompts, self.render, self.first = prompts, render, first

    def __len__(self) -> int:
        return len(self.prompts)

    def batch(self, epochs: Ints, index: Ints) -> dict[str, Tensor]:
        """Videos, prompts and numbers."""
        chosen = torch.from_numpy(index)
        return {"video": self.render(epochs, index), "prompt": self.prompts[chosen], "index": chosen + self.first}


class VideoDataModule(LoaderDataModule):
    """Base of the datamodules of short videos; validation, test and predict see the same videos.

    Args:
        batch_size: Videos per process and training step.
        val_batch_size: Videos per process and evaluation step.
        num_workers: Processes that read data.
        seed: Seed of the order and the motion.
    """

    def __init__(self, *, batch_size: int, val_batch_size: int, num_workers: int, seed: int) -> None:
        at_least(1, val_batch_size=val_batch_size)
        super().__init__(batch_size=batch_size, eval_batch_size=val_batch_size, num_workers=num_workers, seed=seed)


__all__ = ["PromptedVideos", "VideoDataModule"]
