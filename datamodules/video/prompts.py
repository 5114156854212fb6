"""Texts of long videos, for models that need no training."""

from pathlib import Path
from typing import Any

import torch

from lit_methods.datamodules.base import LoaderDataModule, Samples
from lit_methods.datamodules.errors import BrokenRecordError
from lit_methods.datamodules.folders import data_path
from lit_methods.datamodules.reading import read_text

BUILT_IN = (
    "a boat on a calm lake | a boat on a lake in the rain",
    "a white horse walks over a meadow | a white horse gallops over a meadow",
)


class _Texts(Samples):
    """Prompts of each video."""

    def __init__(self, prompts: list[list[str]]) -> None:
        self.prompts = prompts

    def __len__(self) -> int:
        return len(self.prompts)

    def at(self, epoch: int, index: int) -> dict[str, Any]:
        """Prompts and number."""
        return {"prompt": self.prompts[index], "index": index}

    @staticmethod
    def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Lists of texts stay lists."""
        return {"prompt": [one["prompt"] for one in samples], "index": torch.tensor([one["index"] for one in samples])}


class VideoPromptsDataModule(LoaderDataModule):
    """Prompts from a text file with a line for each long video: those of its pieces, with ``|`` between them. For test and predict alone.

    Batch: {"prompt": list of B lists of strings, "index": (B,) int64}

    Args:
        root: Folder that holds ``prompts.txt``, in UTF-8; all its lines have as many prompts. None: two built-in lines.
        batch_size: Videos per process and step.
        num_workers: Processes that read data.
        seed: Of an order, which isn't drawn: videos come as they stand in the file.

    Raises:
        WrongRootError: The folder has no such file.
        BrokenRecordError: It has no line, an empty prompt, or lines with different numbers of prompts.
    """

    def __init__(self, root: Path | None = None, batch_size: int = 1, num_workers: int = 0, seed: int = 0) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        self.root = data_path(root)
        self.save_hyperparameters()

    def check_root(self, stage: str = "fit") -> None:
        """Look for the file."""
        self.expect("prompts.txt", "put a text file with a line for each video there", "prompts")

    def setup(self, stage: str) -> None:
        """Read the lines."""
        self.check_root(stage)
        lines = BUILT_IN if self.root is None else tuple(line for line in read_text(self.root / "prompts.txt").splitlines() if line.strip())
        prompts = [[text.strip() for text in line.split("|")] for line in lines]
        where = "the built-in prompts" if self.root is None else self.root / "prompts.txt"
        if not prompts:
            raise BrokenRecordError(where, "file", "it has no line: write a line for each video")
        for number, texts in enumerate(prompts, start=1):
            if not all(texts) or len(texts) != len(prompts[0]):
                reason = f"{len(texts)} prompts in {texts}: give each line {len(prompts[0])}, as the first has, none of them empty"
                raise BrokenRecordError(where, f"line {number}", reason)
        self.val_set = self.test_set = _Texts(prompts)


__all__ = ["VideoPromptsDataModule"]
