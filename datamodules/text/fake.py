"""Tiny corpora in the layouts that are read: text files, or tokens in binary files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lit_methods.datamodules.fake import Arguments, Writer, text
from lit_methods.datamodules.text.instructions import made_instructions
from lit_methods.datamodules.text.long_tasks import DOCUMENT_TASKS


def texts(root: Path, words: int = 400) -> None:
    """``train.txt``, ``valid.txt`` and ``test.txt`` of some words."""
    known = ("some", "words", "that", "are", "read", "one", "by", "one")
    rng = np.random.default_rng(0)
    for part in ("train", "valid", "test"):
        text(root / f"{part}.txt", " ".join(rng.choice(known, words)))


def tokens(root: Path, train: int = 40, val: int = 40, vocab_size: int = 50) -> None:
    """``train.bin`` and ``val.bin`` of 16-bit tokens that count up, and ``meta.json``."""
    text(root / "meta.json", json.dumps({"vocab_size": vocab_size, "dtype": "uint16"}))
    for part, number in (("train", train), ("val", val)):
        (root / f"{part}.bin").write_bytes((np.arange(number) % vocab_size).astype("<u2").tobytes())


def _text(arguments: Arguments, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Tokens; text files where a config names a ``level`` other than the default, or a tokenizer."""
    length = int(arguments["block_size"])
    if arguments["level"] != "char" or arguments.get("tokenizer") is not None:
        texts(arguments["root"], 4 * length + 400)
    else:
        tokens(arguments["root"], 8 * length + 400, 4 * length + 400, sizes.get("vocab_size", 50))
    return {"root": arguments["root"]}


def _instructions(arguments: Arguments, sizes: Mapping[str, int]) -> dict[str, Any]:
    """A JSON list of sums."""
    records = made_instructions(int(arguments["num_val"]) + sizes.get("train", 40))
    text(arguments["root"] / "instructions.json", json.dumps(records))
    return {"root": arguments["root"]}


def _long_tasks(arguments: Arguments, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Questions about short documents, with two choices where the kind has letters."""
    for task in DOCUMENT_TASKS:
        records = []
        for number in range(sizes.get("train", 8)):
            record = {"document": f"In house {number} lives a cat.", "question": f"Who lives in house {number}?", "answer": "a cat"}
            records.append(record if task == "squad_f1" else {**record, "choices": ["a dog", "a cat"], "answer": "B"})
        text(arguments["root"] / f"{task}.jsonl", "\n".join(json.dumps(record) for record in records))
    return {"root": arguments["root"]}


FAKES: dict[str, Writer] = {
    "InstructionDataModule": _instructions,
    "LongTasksDataModule": _long_tasks,
    "RepeatedTextDataModule": _text,
    "TextDataModule": _text,
}
__all__ = ["FAKES", "texts", "tokens"]
