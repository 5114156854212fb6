"""Windows of text whose beginning stands once more at the end."""

from pathlib import Path

import torch
from torch import Tensor

from lit_methods.checks import within
from lit_methods.datamodules.base import Samples
from lit_methods.datamodules.text.text import Level, TextDataModule, Windows


class Repeated(Samples):
    """Windows with their first tokens behind their last.

    Args:
        windows: What they are made of.
        repeated: How many tokens stand there twice; at most those of a window.
    """

    def __init__(self, windows: Windows, repeated: int) -> None:
        self.windows, self.repeated = windows, repeated

    def __len__(self) -> int:
        return len(self.windows)

    def at(self, epoch: int, index: int) -> dict[str, Tensor]:
        """One sample."""
        tokens = self.windows.at(epoch, index)["input_ids"]
        return {"input_ids": torch.cat([tokens, tokens[: self.repeated]])}


class RepeatedTextDataModule(TextDataModule):
    """Text whose beginning stands once more at the end: who writes the end must look back over all that is between.

    Batch: {"input_ids": (B, L) int64}

    Args:
        root: File or folder as ``TextDataModule`` reads it; None: a made-up language of 6,000 sentences, with no download.
        level: ``char``: the characters of the training text; ``byte``; ``tokenizer``. Token files have theirs already.
        tokenizer: Folder of a tokenizer of transformers, as ``TextDataModule`` takes it; with ``level: tokenizer`` alone.
        block_size: L, tokens of a sample, the repeated ones counted twice.
        repeated: Tokens at the beginning that come again at the end; at most half of ``block_size``.
        batch_size: Samples per process and step.
        num_workers: Processes that read data.
        seed: Seed of the order.

    Attributes:
        vocab_size: Number of different tokens, after ``setup``.

    Raises:
        ValueError: A value outside its range.
    """

    def __init__(
        self,
        root: Path | None = None,
        level: Level = "char",
        tokenizer: Path | None = None,
        block_size: int = 64,
        repeated: int = 16,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        within(f"[1, {block_size // 2}]", "at most half of block_size", repeated=repeated)
        super().__init__(root, level, tokenizer, block_size - repeated, batch_size, num_workers, seed)
        self.save_hyperparameters()
        self.repeated = repeated

    def setup(self, stage: str) -> None:
        """Read and encode.

        Raises:
            WrongRootError: ``root`` has none of the layouts.
            BrokenRecordError: A file that can't be used.
        """
        super().setup(stage)
        for name in ("train_set", "val_set", "test_set"):
            if isinstance(windows := getattr(self, name), Windows):
                setattr(self, name, Repeated(windows, self.repeated))


__all__ = ["Repeated", "RepeatedTextDataModule"]
