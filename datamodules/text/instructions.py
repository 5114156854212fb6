"""Instructions and answers for fine-tuning: the loss counts the answer alone."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_methods.checks import at_least
from lit_methods.datamodules.base import LoaderDataModule, Samples
from lit_methods.datamodules.errors import BrokenRecordError, WrongRootError
from lit_methods.datamodules.folders import data_path, listed, user_path
from lit_methods.datamodules.reading import read_json
from lit_methods.datamodules.text.text import Bytes, HuggingFaceTokens, Ints, Tokenizer

IGNORED = -100  # label of what doesn't count
PROMPT = "Instruction: {instruction}\n{input}\nAnswer: "


class Answers(Samples):
    """One instruction a sample: tokens of prompt and answer, and as labels those that follow, where they belong to the answer.

    Args:
        prompts: Tokens of each prompt.
        answers: Tokens of each answer.
        length: Longest sample; what is behind it is cut off.
    """

    def __init__(self, prompts: list[Ints], answers: list[Ints], length: int) -> None:
        self.prompts, self.answers, self.length = prompts, answers, length

    def __len__(self) -> int:
        return len(self.prompts)

    def at(self, epoch: int, index: int) -> dict[str, Tensor]:
        """One sample, (T,) each."""
        prompt, answer = (torch.from_numpy(part[index]) for part in (self.prompts, self.answers))
        tokens = torch.cat([prompt, answer])[: self.length + 1]
        labels = tokens[1:].clone()
        labels[: len(prompt) - 1] = IGNORED
        return {"input_ids": tokens[:-1], "labels": labels}

    @staticmethod
    def collate(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Shorter samples are filled up at their end, where a causal model doesn't look, with token 0 and labels that don't count."""
        fill = {"input_ids": 0, "labels": IGNORED}
        return {
            key: torch.nn.utils.rnn.pad_sequence([sample[key] for sample in samples], batch_first=True, padding_value=value)
            for key, value in fill.items()
        }


def made_instructions(number: int) -> list[dict[str, Any]]:
    """``number`` sums of two digits as instructions, the same at every call."""
    pairs = np.random.default_rng(0).integers(10, size=(number, 2)).tolist()
    return [{"instruction": "Add the numbers.", "input": f"{a} {b}", "output": f"{a + b:02}"} for a, b in pairs]


class InstructionDataModule(LoaderDataModule):
    """Instructions with answers, for fine-tuning causal language models.

    Batch: {"input_ids": (B, L) int64, "labels": (B, L) int64}

    Each label is the token that follows; -100 in the prompt and behind the end. L is the longest sample of the batch.

    ``root`` is a JSON file, or a folder with one, as LLM-Adapters has them (``commonsense_170k.json``, ``math_10k.json``): a list of
    ``{"instruction": ..., "input": ..., "output": ...}``; ``input`` may be missing. The last ``num_val`` of them
    are for validation and test.

    Args:
        root: File or folder; None: 200 sums of two digits and ``num_val`` more.
        tokenizer: Folder of a tokenizer of transformers; None: bytes.
        prompt: What stands before the answer; ``{instruction}`` and ``{input}`` are put in.
        max_length: Longest sample, in tokens; what is behind it is cut off.
        num_val: Samples held out.
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
        tokenizer: Path | None = None,
        prompt: str = PROMPT,
        max_length: int = 2048,
        num_val: int = 120,
        batch_size: int = 16,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        at_least(2, "tokens", max_length=max_length)
        at_least(1, "samples", num_val=num_val)
        if "{instruction}" not in prompt:
            raise ValueError(f"prompt is {prompt!r}: it must hold {{instruction}}, and may hold {{input}}")
        self.save_hyperparameters()
        self.root, self.tokenizer = data_path(root), user_path(tokenizer)
        self.prompt, self.max_length, self.num_val, self.vocab_size = prompt, max_length, num_val, 0

    def check_root(self, stage: str = "fit") -> None:
        """Look for the file."""
        if self.root is not None:
            self._file(self.root)

    def _file(self, root: Path) -> Path:
        files = [root] if root.is_file() else listed(root, "*.json")
        if len(files) != 1:
            way = "give a JSON list of instructions, such as LLM-Adapters' commonsense_170k.json, or a folder with one"
            raise WrongRootError(f"root={str(root)!r} has {len(files)} files: {way}")
        return files[0]

    def setup(self, stage: str) -> None:
        """Read and encode.

        Raises:
            WrongRootError: There is no such file.
            BrokenRecordError: A record that can't be used.
        """
        if self.vocab_size:
            return
        coder: Tokenizer = Bytes() if self.tokenizer is None else HuggingFaceTokens(self.tokenizer)
        file = None if self.root is None else self._file(self.root)
        records = made_instructions(200 + self.num_val) if file is None else _read(file)
        if file is not None and len(records) <= self.num_val:
            raise BrokenRecordError(file, "length", f"{len(records)} records, of which num_val={self.num_val} are held out: lower it")
        prompts = [coder.encode(self.prompt.format(instruction=one["instruction"], input=one.get("input") or "")) for one in records]
        answers = [coder.encode(one["output"]) for one in records]
        self.vocab_size = coder.vocab_size
        self.train_set = Answers(prompts[: -self.num_val], answers[: -self.num_val], self.max_length)
        self.val_set = Answers(prompts[-self.num_val :], answers[-self.num_val :], self.max_length)
        self.test_set = self.val_set


def _read(file: Path) -> list[dict[str, Any]]:
    records = read_json(file, "JSON")
    if not isinstance(records, list):
        raise BrokenRecordError(file, "JSON", f"is a {type(records).__name__}, expected a list of records")
    for number, record in enumerate(records):
        for key in ("instruction", "output"):
            if not isinstance(record, dict) or not isinstance(record.get(key), str) or not record[key]:
                raise BrokenRecordError(file, f"record {number}, {key}", "is missing or empty, expected text")
    return records


__all__ = ["Answers", "InstructionDataModule"]
