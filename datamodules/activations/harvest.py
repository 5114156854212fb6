"""Activations of a real model: text goes in, a submodule's outputs are shuffled and kept on disk, and training reads them from there."""

import difflib
import hashlib
import inspect
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lit_methods.callbacks.targets import plain_module, plain_modules
from lit_methods.checks import at_least, one_of
from lit_methods.datamodules.activations.shards import (
    ActivationShards,
    Part,
    Shard,
    ShardSampler,
    read_header,
    read_headers,
    shard_file,
    shard_files,
    write_shard,
)
from lit_methods.datamodules.base import LoaderDataModule
from lit_methods.datamodules.cache import cache_folder
from lit_methods.datamodules.errors import BrokenRecordError, WrongRootError
from lit_methods.datamodules.folders import data_path
from lit_methods.datamodules.reading import read_json
from lit_methods.datamodules.text.text import TextDataModule
from lit_methods.files import write_json
from lit_methods.seeds import own_seed

Site = Literal["output", "input"]
Dtype = Literal["float32", "bfloat16", "float16"]
RECIPE = "activations.json"  # beside the shards: what they were harvested from
VERSION = 1  # of the recipe
_FORGOTTEN = 3600.0  # seconds after which half a file is one that nobody writes
_SAMPLED = 4096  # numbers of each weight that its mark is made of


# ---- one activation --------------------------------------------------------------------------------------------------------------------


class _Caught(Exception):
    """Ends a forward pass behind the submodule that is looked at: the layers above needn't be computed."""


def named_module(model: nn.Module, name: str) -> nn.Module:
    """A submodule by its name.

    Raises:
        ValueError: There is none; the message has the nearest names.
    """
    named = {found: part for found, part in plain_modules(plain_module(model)).items() if found}
    if name not in named:
        near = difflib.get_close_matches(name, named, n=5, cutoff=0.0)
        shown = ", ".join(f"{other} ({type(named[other]).__name__})" for other in near)
        owner = type(plain_module(model)).__name__
        raise ValueError(f"hook={name!r} is no submodule of {owner}; nearest of {len(named)} names: {shown or 'it has none'}")
    return named[name]


def first_tensor(value: Any) -> Tensor | None:
    """The first tensor in what a submodule gives or gets: itself, or in a tuple, a list, a dict or an output of transformers."""
    if isinstance(value, Tensor):
        return value
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    return next((found for found in map(first_tensor, inner) if found is not None), None)


def call(model: nn.Module, batch: Any) -> Any:
    """Run a model on a batch of text.

    Of a dict it gets what its ``forward`` names, without labels; where it names nothing of it, the first tensor.
    """
    parameters = inspect.signature(plain_module(model).forward).parameters
    options = {"use_cache": False} if "use_cache" in parameters else {}
    if isinstance(batch, Mapping):
        named = {name: value for name, value in batch.items() if name in parameters and name != "labels"}
        if named:
            return model(**named, **options)
    return model(first_tensor(batch), **options)


@contextmanager
def _catching(part: nn.Module, site: Site) -> Iterator[list[Any]]:
    """Puts what the next call of a submodule gives, or gets, into the list, and ends that pass."""
    found: list[Any] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((*args, *kwargs.values()))
        raise _Caught

    def behind(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        found.append(output)
        raise _Caught

    handle = part.register_forward_pre_hook(before, with_kwargs=True) if site == "input" else part.register_forward_hook(behind)
    try:
        yield found
    finally:
        handle.remove()


@torch.no_grad()
def activations(model: nn.Module, hook: str, batch: Any, site: Site = "output") -> Tensor:
    """What a submodule gives (or gets) when the model runs on a batch; the layers behind it aren't computed.

    Args:
        model: Any; dropout and batch norm are as its modes say.
        hook: Name of the submodule, as ``model.named_modules()`` has it. If it runs several times, its first call counts.
        batch: A tensor, or a dict; see :func:`call`.
        site: ``output`` of the submodule, or its first ``input``.

    Returns:
        Shape and dtype as they are: the first tensor of a tuple or dict.

    Raises:
        ValueError: No such submodule, it isn't run, or it gives no tensor.
    """
    part = named_module(model, hook)
    with _catching(part, site) as found:
        with suppress(_Caught):
            call(model, batch)
    if not found:
        raise ValueError(f"hook={hook!r} isn't run when {type(plain_module(model)).__name__} is called: name one that is")
    tensor = first_tensor(found[0])
    if tensor is None or not tensor.is_floating_point():
        raise ValueError(f"hook={hook!r}: its {site} is {type(found[0]).__name__} without a floating-point tensor: name another submodule")
    return tensor


def kept_rows(activation: Tensor, batch: Any, skip_first: int = 0, drop_tokens: Sequence[int] = ()) -> Tensor:
    """Activations of the tokens that count, one a row.

    Args:
        activation: (B, L, d), or (B, d), of which all rows count.
        batch: With ``input_ids`` (B, L), and ``attention_mask`` (B, L) where there is padding.
        skip_first: Tokens at the beginning of each window that don't count.
        drop_tokens: Tokens that don't count wherever they stand.

    Returns:
        (N, d), in the order of the text.

    Raises:
        ValueError: Another shape.
    """
    if activation.ndim == 2:
        return activation
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else first_tensor(batch)
    if activation.ndim != 3 or (ids is not None and ids.shape != activation.shape[:2]):
        tokens = None if ids is None else tuple(ids.shape)
        raise ValueError(
            f"activations are {tuple(activation.shape)} for tokens {tokens}: hook a submodule that gives (B, L, d), one vector a token"
        )
    keep = torch.ones(activation.shape[:2], dtype=torch.bool, device=activation.device)
    keep[:, :skip_first] = False
    if isinstance(batch, Mapping) and (mask := batch.get("attention_mask")) is not None:
        keep &= mask.to(keep.device).bool()
    if drop_tokens and ids is not None:
        keep &= ~torch.isin(ids.to(keep.device), torch.tensor(list(drop_tokens), device=keep.device))
    return activation[keep]


# ---- many of them ----------------------------------------------------------------------------------------------------------------------


class Texts:
    """Batches of a text loader from any place on, in an order that follows from a seed.

    Args:
        loader: A ``DataLoader``. Where its data set has a length, its samples are taken in an order of our own; else, as they come.
        seed: Of the order; None: the order of the data set.

    Raises:
        ValueError: It is no ``DataLoader``.
    """

    def __init__(self, loader: Any, seed: int | None) -> None:
        if not isinstance(loader, DataLoader):
            raise ValueError(f"the text's loader is a {type(loader).__name__}: give a datamodule with a DataLoader")
        self.loader, self.batch_size = loader, loader.batch_size or 1
        self.order: np.ndarray[Any, Any] | None = None
        if not isinstance(loader.dataset, IterableDataset):
            size = len(loader.dataset)  # type: ignore[arg-type]
            self.order = np.arange(size) if seed is None else np.random.default_rng(own_seed("order of text", seed)).permutation(size)

    def batches(self, start: int) -> Iterator[Any]:
        """All batches from number ``start`` on."""
        if self.order is None:
            return islice(iter(self.loader), start, None)
        left = self.order[start * self.batch_size :].tolist()
        groups = [left[place : place + self.batch_size] for place in range(0, len(left), self.batch_size)]
        workers = self.loader.num_workers
        generator = torch.Generator()  # else the loader draws from the global one
        return iter(
            DataLoader(
                self.loader.dataset, batch_sampler=groups, collate_fn=self.loader.collate_fn, num_workers=workers, generator=generator
            )
        )

    def mark(self) -> str:
        """What tells these texts from others: their number, and the first, the middle and the last of them."""
        found = hashlib.sha256(f"{self.batch_size} {None if self.order is None else len(self.order)}".encode())
        if self.order is None:
            samples = list(islice(iter(self.loader), 1))
        else:
            samples = [self.loader.dataset[place] for place in sorted({0, len(self.order) // 2, len(self.order) - 1}) if place >= 0]
        for sample in samples:
            tensor = first_tensor(sample)
            found.update(repr(sample).encode() if tensor is None else tensor.cpu().numpy().tobytes())
        return found.hexdigest()[:16]


def weights_mark(model: nn.Module) -> str:
    """What tells a model from others: names and shapes of its weights, and some thousand numbers of each."""
    found = hashlib.sha256(type(plain_module(model)).__name__.encode())
    for name, tensor in plain_module(model).state_dict().items():
        if isinstance(tensor, Tensor):
            flat = tensor.detach().reshape(-1)
            sampled = flat[:: max(1, flat.numel() // _SAMPLED)].cpu()
            found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            found.update(sampled.float().numpy().tobytes() if sampled.is_floating_point() else sampled.numpy().tobytes())
    return found.hexdigest()[:16]


class ActivationStream:
    """The activations of a text, row by row, from any place on.

    Args:
        model: Runs in eval mode, on the device that it is on.
        texts: What it reads.
        hook: Name of the submodule.
        site: Its ``output`` or ``input``.
        skip_first: Tokens at the beginning of each window that are left out.
        drop_tokens: Tokens that are left out.

    Attributes:
        place: Number of the text batch, and of its row, that come next.
    """

    def __init__(
        self, model: nn.Module, texts: Texts, hook: str, site: Site = "output", skip_first: int = 0, drop_tokens: Sequence[int] = ()
    ) -> None:
        self.model, self.texts, self.hook, self.site = model, texts, hook, site
        self.skip_first, self.drop_tokens = skip_first, list(drop_tokens)
        self.place = (0, 0)
        self._batches: Iterator[Any] | None = None
        self._rows: Tensor | None = None  # of the batch at `place`

    def seek(self, place: tuple[int, int]) -> None:
        """Go on from another place; costs one batch."""
        if place != self.place:
            self.place, self._batches, self._rows = place, None, None

    def _next_rows(self) -> Tensor | None:
        """Rows of the batch at ``place``; None: the text has ended."""
        number = self.place[0]
        if self._batches is None:
            self._batches = self.texts.batches(number)
        batch = next(self._batches, None)
        if batch is None:
            return None
        device = next((tensor.device for tensor in self.model.parameters()), torch.device("cpu"))
        batch = pl.utilities.move_data_to_device(batch, device) if device.type != "cpu" else batch
        rows = kept_rows(activations(self.model, self.hook, batch, self.site), batch, self.skip_first, self.drop_tokens)
        if not rows.isfinite().all():
            row = int((~rows.isfinite().all(1)).nonzero()[0])
            raise ValueError(
                f"hook={self.hook!r}: the activation of row {row} of text batch {number} has a NaN or an infinity; the shards written so "
                "far are whole and stay: look at the model's weights and precision on this text, or hook an earlier submodule"
            )
        return rows

    def fill(self, room: Tensor) -> int:
        """Put the next rows into a buffer.

        Args:
            room: (N, d), written in place, in its dtype.

        Returns:
            How many there were; fewer than N where the text ends.

        Raises:
            ValueError: Another width, or a number that the buffer's dtype can't hold.
        """
        done = 0
        while done < len(room):
            if self._rows is None:
                self._rows = self._next_rows()
                if self._rows is None:
                    break
            number, skip = self.place
            taken = self._rows[skip : skip + len(room) - done]
            if taken.shape[1] != room.shape[1]:
                widths = f"width {taken.shape[1]}, and {room.shape[1]} before"
                raise ValueError(f"hook={self.hook!r} gives {widths}: hook a submodule of one width")
            room[done : done + len(taken)].copy_(taken)
            if room.dtype == torch.float16 and not room[done : done + len(taken)].isfinite().all():
                raise ValueError(f"hook={self.hook!r} has activations that float16 can't hold: set dtype to bfloat16 or float32")
            done += len(taken)
            if skip + len(taken) >= len(self._rows):
                self.place, self._rows = (number + 1, 0), None
            else:
                self.place = (number, skip + len(taken))
        return done

    def width(self) -> int:
        """d, from the batch at ``place``.

        Raises:
            ValueError: There is no text.
        """
        if self._rows is None:
            self._rows = self._next_rows()
        if self._rows is None:
            raise ValueError("there is no text to harvest activations of")
        return self._rows.shape[1]


def harvest(
    stream: ActivationStream, root: Path, part: Part, rows: int, buffer_size: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> int:
    """Write shards until they hold so many rows, or the text ends. What is there already is kept, and what is missing is put in between.

    A shard is a buffer of consecutive rows, shuffled. Its header says where the next one begins, so that a killed harvest goes on behind
    the last whole shard and ends with the same files.

    Args:
        stream: Where rows come from.
        root: Folder of the shards; it must exist.
        part: Name of the part.
        rows: How many rows to have.
        buffer_size: Rows that are shuffled together.
        dtype: Of the files.
        seed: Of the shuffling.

    Returns:
        Rows that are there now.

    Raises:
        BrokenRecordError: A shard that is there already is damaged.
        ValueError: Activations that can't be used; shards written before stay.
    """
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    room: Tensor | None = None
    for left in root.glob(f".{part}-*.tmp"):  # by a harvest that was killed; they are large
        with suppress(FileNotFoundError):  # another process may be writing one just now, and may have finished
            if time.time() - left.stat().st_mtime > _FORGOTTEN:
                left.unlink()
    with Progress(*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn(), transient=True) as progress:
        task = progress.add_task(f"activations ({part})", total=rows)
        done, number, place = 0, 0, (0, 0)
        while done < rows:
            file, wanted = shard_file(root, part, number), min(buffer_size, rows - done)
            if not file.is_file():
                stream.seek(place)
                if room is None:
                    room = torch.empty(min(buffer_size, rows), stream.width(), dtype=dtype)
                found = stream.fill(room[:wanted])
                if not found:
                    break
                order = torch.from_numpy(np.random.default_rng([own_seed("shuffled buffer", seed), number]).permutation(found))
                batch, row = stream.place
                write_shard(file, room[:found][order], next_batch=batch, next_row=row, ended=int(found < wanted))
            shard = read_header(file)
            place = (shard.number("next_batch"), shard.number("next_row"))
            done, number = done + shard.rows, number + 1
            progress.update(task, completed=done)
            if shard.number("ended"):
                break
    return done


# ---- a model without weights -----------------------------------------------------------------------------------------------------------


class TinyLanguageModel(nn.Module):
    """A causal transformer with random weights, for runs without a model of one's own. Blocks are called ``blocks.0``, ``blocks.1``.

    Args:
        vocab_size: Number of tokens.
        width: Width of the residual stream.
        depth: Blocks.
        seed: Of the weights.
    """

    def __init__(self, vocab_size: int, width: int = 32, depth: int = 2, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(own_seed("tiny language model", seed) % 2**63)
            self.embedding = nn.Embedding(vocab_size, width)
            self.blocks = nn.ModuleList(
                nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True) for _ in range(depth)
            )
            self.head = nn.Linear(width, vocab_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, L) int64 -> (B, L, V) logits."""
        x = self.embedding(input_ids)
        mask = nn.Transformer.generate_square_subsequent_mask(input_ids.shape[1], device=x.device)
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        return self.head(x)  # type: ignore[no-any-return]


# ---- the datamodule --------------------------------------------------------------------------------------------------------------------


class HarvestedActivations(LoaderDataModule):
    """Activations of a model on text, harvested once, kept on disk, and read from there.

    Batch: {"activation": (B, d) float32}

    ``prepare_data`` runs the model on the text up to the chosen submodule, shuffles the activations of ``buffer_size`` tokens at a time
    and writes each such buffer into a file of safetensors. A killed harvest goes on behind its last whole file and ends with the same
    files; a later run reads what is there. Windows of text are taken in an order that follows from ``seed``. Training goes through the
    files, and through the rows of each, in a new order in every epoch. Files are mapped into memory and may be larger than it.

    Without ``root`` the shards lie in the cache, where another model, text or setting gets another folder. With ``root`` and without
    ``model`` the shards that lie there are read: ``train-00000.safetensors``, ..., ``val-00000.safetensors``, each with one tensor
    ``activation`` (N, d).

    Args:
        root: Folder of the shards. None: one in the cache folder.
        model: Any module that runs on the text's batches, such as ``CausalLM`` with a pretrained model of transformers; it isn't trained.
            None, without ``root``: a tiny causal transformer with random weights.
        text: A datamodule of text, such as ``TextDataModule``; its batches are a tensor of tokens, or a dict with what the model's
            ``forward`` names, such as ``input_ids`` and ``attention_mask`` (B, L). None, without ``model``: made-up sentences.
        hook: Name of the submodule, as ``model.named_modules()`` has it, such as ``model.model.layers.9``.
        site: Its ``output``, or its first ``input``.
        tokens: Activations for training; fewer where the text ends before, which a warning says.
        val_tokens: Activations for validation and test, of the text's validation part; 0: none.
        buffer_size: Activations that are shuffled together, and that a file holds: ``buffer_size`` x d x 4 bytes, twice, in memory.
        skip_first: Tokens at the beginning of each window that are left out: a causal model heaps attention on them, and their activations
            are often far larger than all others.
        drop_tokens: Tokens that are left out, such as those that begin and end a text. Padding, where ``attention_mask`` is 0, always is.
        dtype: Of the files; batches are float32.
        batch_size: Activations per process and step.
        num_workers: Processes that read data.
        seed: Seed of all orders, and of the tiny transformer's weights.

    Attributes:
        width: d, after ``setup``.

    Raises:
        ValueError: A value outside its range, a model without a text, no submodule of that name, activations that aren't finite.
        WrongRootError: A root without shards and without a model to harvest them, or with shards of something else.
        BrokenRecordError: A shard that is truncated, of another width, or has a number that isn't finite.
    """

    def __init__(
        self,
        root: Path | None = None,
        model: nn.Module | None = None,
        text: pl.LightningDataModule | None = None,
        hook: str = "blocks.1",
        site: Site = "output",
        tokens: int = 32768,
        val_tokens: int = 4096,
        buffer_size: int = 8192,
        skip_first: int = 0,
        drop_tokens: Sequence[int] = (),
        dtype: Dtype = "float32",
        batch_size: int = 256,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        one_of(Site, site=site)
        one_of(Dtype, dtype=dtype)
        at_least(1, tokens=tokens, buffer_size=buffer_size)
        at_least(0, val_tokens=val_tokens, skip_first=skip_first)
        if model is not None and text is None:
            raise ValueError("model is given without text: give the datamodule that it reads, such as TextDataModule")
        self.save_hyperparameters(ignore=["model", "text"])
        self.hparams["root"] = None if root is None else str(root)  # a checkpoint with a Path couldn't be read with weights_only
        self.root, self.model, self.text = data_path(root), model, text
        self.hook, self.site, self.dtype = hook, site, dtype
        self.width = 0
        self._folder: Path | None = self.root if model is None else None

    # -- harvest --

    def _sources(self) -> tuple[nn.Module, dict[Part, Texts]]:
        """The model, and what it reads in each part."""
        text = TextDataModule(block_size=32, batch_size=32, seed=self.seed) if self.text is None else self.text
        text.prepare_data()
        text.setup("fit")
        size = getattr(text, "vocab_size", None)
        model = TinyLanguageModel(size or 256, seed=self.seed) if self.model is None else self.model
        configs: list[Any] = [part.config for part in model.modules() if hasattr(getattr(part, "config", None), "vocab_size")]
        if size is not None and configs and size > configs[0].vocab_size:
            raise ValueError(f"the text has {size} different tokens, the model {configs[0].vocab_size}: give the text its tokenizer")
        named_module(model, self.hook)
        found: dict[Part, Texts] = {"train": Texts(text.train_dataloader(), self.seed)}
        if self.hparams["val_tokens"]:
            loader = text.val_dataloader()
            found["val"] = Texts(loader[0] if isinstance(loader, list) else loader, None)
        return model, found

    def _recipe(self, model: nn.Module, texts: Mapping[Part, Texts]) -> dict[str, Any]:
        """What the shards follow from, as JSON has it."""
        hp = self.hparams
        return {
            "version": VERSION,
            "model": type(plain_module(model)).__name__,
            "weights": weights_mark(model),
            "hook": self.hook,
            "site": self.site,
            "text": {part: found.mark() for part, found in texts.items()},
            **{name: hp[name] for name in ("tokens", "val_tokens", "buffer_size", "skip_first", "dtype", "seed")},
            "drop_tokens": sorted(hp["drop_tokens"]),
        }

    def _place(self, recipe: dict[str, Any]) -> Path:
        """The folder of these shards, which may not be there yet.

        Raises:
            WrongRootError: It holds something else.
        """
        mark = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
        root = cache_folder() / f"activations-{mark}" if self.root is None else self.root
        file = root / RECIPE
        if os.path.lexists(file):
            before = read_json(file, "recipe")
            try:
                changed = [name for name, value in recipe.items() if before.get(name) != value]
            except AttributeError as error:
                raise BrokenRecordError(file, "recipe", f"can't be read ({error}): delete it together with the shards") from error
            if changed:
                said = ", ".join(f"{name} was {before.get(name)} and is {recipe[name]}" for name in changed)
                raise WrongRootError(f"root={str(root)!r} holds activations of something else ({said}): give another folder, or delete it")
        elif shard_files(root, "train") or shard_files(root, "val"):
            raise WrongRootError(f"root={str(root)!r} holds shards without {RECIPE}: set model=null to read them, or give another folder")
        return root

    def prepare_data(self) -> None:
        """Harvest what isn't there yet."""
        if self.model is None and self.root is not None:
            return
        model, texts = self._sources()
        recipe = self._recipe(model, texts)
        root = self._place(recipe)
        wanted: dict[Part, int] = {"train": self.hparams["tokens"], "val": self.hparams["val_tokens"]}
        if all(self._complete(root, part, wanted[part]) for part in texts):
            return
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        before, modes = next((p.device for p in model.parameters()), device), {part: part.training for part in model.modules()}
        root.mkdir(parents=True, exist_ok=True)
        write_json(root / RECIPE, recipe)
        model.to(device).eval()
        try:
            for part, read in texts.items():
                stream = ActivationStream(model, read, self.hook, self.site, self.hparams["skip_first"], self.hparams["drop_tokens"])
                settings = (self.hparams["buffer_size"], getattr(torch, self.dtype), self.seed)
                there = harvest(stream, root, part, wanted[part], *settings)
                if there < wanted[part]:
                    name = "tokens" if part == "train" else "val_tokens"
                    rank_zero_warn(f"the text has {there} activations for {part}, {name} asks for {wanted[part]}: all of them are taken")
        finally:
            model.to(before)
            for module, mode in modes.items():
                module.training = mode
        rank_zero_info(f"activations are kept in {root}")

    def _complete(self, root: Path, part: Part, rows: int) -> bool:
        found = [read_header(file) for file in shard_files(root, part)]
        whole = all(shard.file == shard_file(root, part, number) for number, shard in enumerate(found))
        return bool(found) and whole and (sum(shard.rows for shard in found) >= rows or bool(found[-1].number("ended")))

    # -- reading --

    def check_root(self, stage: str = "fit") -> None:
        """Look for shards, if there is no model to harvest them."""
        if self.root is not None and self.model is None and not shard_files(self.root, "train"):
            raise WrongRootError(
                f"root={str(self.root)!r} has no train-*.safetensors: give model and text to harvest activations into it, or set root=null "
                "for the built-in model"
            )

    def setup(self, stage: str) -> None:
        """Read the headers of the shards.

        Raises:
            WrongRootError: There are none.
            BrokenRecordError: One is damaged or of another width.
        """
        if self.train_set is not None:
            return
        self.check_root(stage)
        if self._folder is None:
            self._folder = self._place(self._recipe(*self._sources()))
        parts: dict[Part, list[Shard]] = {part: read_headers(shard_files(self._folder, part)) for part in ("train", "val")}
        if not parts["train"]:
            raise WrongRootError(f"{self._folder} has no shards yet: call prepare_data() first (the Trainer does)")
        if parts["val"] and parts["val"][0].width != parts["train"][0].width:
            raise BrokenRecordError(
                parts["val"][0].file, "activation", f"has width {parts['val'][0].width}, the training shards {parts['train'][0].width}"
            )
        self.width = parts["train"][0].width
        self.train_set = ActivationShards(parts["train"])
        if parts["val"]:
            self.val_set = self.test_set = ActivationShards(parts["val"])

    def train_dataloader(self) -> Any:
        """File after file in a new order, resumable within each."""
        dataset = self.data_of("train")
        world_size = 1 if self.trainer is None else self.trainer.world_size
        rank = 0 if self.trainer is None else self.trainer.global_rank
        whole = len(dataset) >= self.batch_size * world_size
        sampler = ShardSampler(dataset, self.batch_size, rank=rank, world_size=world_size, seed=self.seed, drop_last=whole)
        return self.loader(dataset, training=True, sampler=sampler)


__all__ = [
    "ActivationStream",
    "HarvestedActivations",
    "Texts",
    "TinyLanguageModel",
    "activations",
    "call",
    "first_tensor",
    "harvest",
    "kept_rows",
    "named_module",
    "weights_mark",
]
