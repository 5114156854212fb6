"""Activations of a real model: text goes in, a submodule's outputs are shuffled and kept on disk, and training reads them from there."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lit_methods.callbacks.targets import plain_module
from lit_methods.checks import at_least, one_of
from lit_methods.datamodules.activations.hooked import Site, activations, call, first_tensor, kept_rows, named_module
from lit_methods.datamodules.activations.shards import (
    ActivationShards,
    Part,
    Shard,
    ShardSampler,
    read_header,
    read_headers,
    shard_file,
    shard_files,
)
from lit_methods.datamodules.activations.stream import ActivationStream, Texts, harvest, weights_mark
from lit_methods.datamodules.base import LoaderDataModule
from lit_methods.datamodules.cache import cache_folder
from lit_methods.datamodules.errors import BrokenRecordError, WrongRootError
from lit_methods.datamodules.folders import data_path
from lit_methods.datamodules.reading import read_json
from lit_methods.datamodules.text.text import TextDataModule
from lit_methods.files import write_json
from lit_methods.seeds import own_seed

Dtype = Literal["float32", "bfloat16", "float16"]
RECIPE = "activations.json"  # beside the shards: what they were harvested from
VERSION = 1  # of the recipe


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
