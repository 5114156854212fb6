"""Tiny shards of activations: sparse mixtures of random directions."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lit_methods.datamodules.activations.ioi import WordTokens
from lit_methods.datamodules.activations.shards import Part, shard_file, write_shard
from lit_methods.datamodules.fake import Arguments, Writer


def shards(root: Path, rows: int = 96, number: int = 2, width: int = 16) -> None:
    """Some shards for training, the last of them shorter, and one for validation."""
    root.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((2 * width, width)).astype(np.float32)

    def some(count: int) -> torch.Tensor:
        codes = rng.random((count, 2 * width)) * (rng.random((count, 2 * width)) < 0.3)
        return torch.from_numpy(codes.astype(np.float32) @ directions)

    parts: dict[Part, list[int]] = {"train": [rows] * (number - 1) + [rows - 10], "val": [rows]}
    for part, sizes in parts.items():
        for place, size in enumerate(sizes):
            write_shard(shard_file(root, part, place), some(size), next_batch=place + 1, next_row=0, ended=int(place == len(sizes) - 1))


def _harvested(arguments: Arguments, sizes: Mapping[str, int]) -> dict[str, Any]:
    shards(arguments["root"], max(96, arguments["batch_size"]), width=sizes.get("width", 16))
    return {"root": arguments["root"], "model": None}


def _ioi(arguments: Arguments, sizes: Mapping[str, int]) -> dict[str, Any]:
    """A tokenizer of transformers that has one token a word of the word lists."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(["[unknown]", *WordTokens().words])}
    tokens = Tokenizer(models.WordLevel(words, unk_token="[unknown]"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="[unknown]").save_pretrained(arguments["tokenizer"])
    return {"tokenizer": arguments["tokenizer"]}


FAKES: dict[str, Writer] = {"HarvestedActivations": _harvested, "IOIActivations": _ioi}
__all__ = ["FAKES", "shards"]
