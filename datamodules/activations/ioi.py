"""Indirect object identification: prompts out of word lists, and a language model's activations on them.

"Then, Mary and John went to the market. John gave a ring to" goes on with Mary: the indirect object (io), not the subject (s) that is
repeated. Whether io or s comes first is the third attribute, pos. The lists are our own; the task is that of arXiv:2211.00593, as
arXiv:2405.08366 uses it.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lit_methods.checks import at_least, literals
from lit_methods.datamodules.activations.harvest import TinyLanguageModel
from lit_methods.datamodules.activations.hooked import Site, activations, call, first_tensor, named_module
from lit_methods.datamodules.activations.splicing import spliced
from lit_methods.datamodules.activations.stream import weights_mark
from lit_methods.datamodules.activations.synthetic import TensorBatches
from lit_methods.datamodules.base import LoaderDataModule
from lit_methods.datamodules.cache import cache_folder, making_folder
from lit_methods.datamodules.folders import data_path, user_path
from lit_methods.datamodules.text.text import HuggingFaceTokens

Position = Literal["end", "io", "s1", "s2"]


def _words(text: str) -> list[str]:
    return text.split()


NAMES = _words(
    "Mary John Anna Peter Alice David Laura Simon Emma Paul Sarah Mark Julia Martin Helen Thomas Rose Daniel Kate Michael Lucy Robert Jane "
    "James Grace Andrew Emily George Susan Henry Diana Frank Clara Adam Eva Jack Maria Steven Linda Kevin Nancy Brian Karen Scott"
)
OBJECTS = _words("ring book cup bag letter key coat map lamp drum kite spoon ball box pen cake")
PLACES = _words("market river museum garden station harbor castle library office school park forest beach hotel theater church")
PREFIXES = ("Then", "Later", "Today", "Afterwards", "Meanwhile", "Yesterday")
TEMPLATES = (
    "{prefix}, {first} and {second} went to the {place}. {s} gave a {object} to",
    "{prefix}, {first} and {second} had a meal at the {place}. {s} passed a {object} to",
    "{prefix}, when {first} and {second} came from the {place}, {s} offered a {object} to",
)


class Prompt(NamedTuple):
    """A sentence to be completed with the indirect object.

    Attributes:
        text: Ends before the name that is asked for.
        io: Place of the indirect object in the list of names.
        s: Place of the subject in it.
        pos: 0 where the indirect object is named first, 1 where the subject is.
        template: Place of the template among :data:`TEMPLATES`.
    """

    text: str
    io: int
    s: int
    pos: int
    template: int


def ioi_prompts(count: int, names: Sequence[str] = tuple(NAMES), seed: int = 0) -> list[Prompt]:
    """Prompts with names, order, template and words drawn independently, all as likely; io and s differ.

    Args:
        count: How many.
        names: Two or more.
        seed: Decides everything.
    """
    rng = np.random.default_rng([seed, 20240508])
    found = []
    for _ in range(count):
        io, s = (int(one) for one in rng.choice(len(names), 2, replace=False))
        pos, template = int(rng.integers(2)), int(rng.integers(len(TEMPLATES)))
        first, second = (names[s], names[io]) if pos else (names[io], names[s])
        words = {"prefix": PREFIXES, "place": PLACES, "object": OBJECTS}
        drawn = {name: some[int(rng.integers(len(some)))] for name, some in words.items()}
        found.append(Prompt(TEMPLATES[template].format(first=first, second=second, s=names[s], **drawn), io, s, pos, template))
    return found


class WordTokens:
    """One token a word of the word lists, for runs without a tokenizer of one's own; token 0 is what fills up."""

    def __init__(self) -> None:
        marked = [text for template in TEMPLATES for text in template.split()]
        words = [*NAMES, *OBJECTS, *PLACES, *PREFIXES, *(word for word in marked if "{" not in word)]
        self.words = {word: number + 1 for number, word in enumerate(sorted({word.strip(",.") for word in words}))}
        self.vocab_size = len(self.words) + 1

    def encode(self, text: str) -> Any:
        """(T,) int64."""
        return np.array([self.words[word.strip(",.")] for word in text.split()], dtype=np.int64)


class PatchedModel(nn.Module):
    """A language model that goes on from other activations at its site: (B, d) activations -> logits of the next token.

    Args:
        model: The language model.
        hook: Name of the submodule, as ``model.named_modules()`` has it.
        site: Its ``output`` or ``input``.
        columns: Part of the width that the activations are, such as one attention head's; None: all of it.
        tail: Names of the submodules that are all that follows behind the site, each applied to the one before; None: the whole model runs.
        answers: (V',) tokens whose logits are wanted; None: all.
    """

    def __init__(
        self,
        model: nn.Module,
        hook: str,
        site: Site = "output",
        columns: tuple[int, int] | None = None,
        tail: Sequence[str] | None = None,
        answers: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.model, self.hook, self.site, self.columns = model, hook, site, columns
        self.tail = None if tail is None else [named_module(model, name) for name in tail]
        self.register_buffer("answers", answers, persistent=False)

    def forward(self, activation: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """(B, V) logits.

        Args:
            activation: (B, d) in the place of the site's own at each prompt's ``place``.
            batch: ``input_ids`` (B, L), ``place`` (B,) and ``end`` (B,): place of the activation, and of the last token.
        """
        if self.tail is not None:
            logits = activation
            for part in self.tail:
                logits = part(logits)
        else:
            logits = self._spliced(activation, batch)
        answers: Tensor | None = self.answers  # type: ignore[assignment]
        return logits if answers is None else logits[:, answers]

    def _spliced(self, activation: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        rows = torch.arange(len(activation), device=activation.device)
        start, stop = self.columns or (0, activation.shape[1])

        def replace(x: Tensor) -> Tensor:
            x = x.clone()
            x[rows, batch["place"], start:stop] = activation.to(x.dtype)
            return x

        with spliced(self.model, self.hook, replace, self.site):
            output = call(self.model, {"input_ids": batch["input_ids"]})
        logits = output if isinstance(output, Tensor) else getattr(output, "logits", first_tensor(output))
        return logits[rows, batch["end"]]  # type: ignore[index, no-any-return]


class IOIActivations(LoaderDataModule):
    """A language model's activations at one place of prompts that ask for the indirect object, with the prompts' attributes.

    Batch: {"activation": (B, 32) float32, "io": (B,) int64, "s": (B,) int64, "pos": (B,) int64, "template": (B,) int64, "answer": (B,) int64, "foil": (B,) int64, "place": (B,) int64, "end": (B,) int64, "input_ids": (B, L) int64}

    The model runs once over all prompts, up to the chosen submodule; what was found is kept in the cache folder, for the same model,
    prompts and site. Names that aren't a single token are left out. ``answer`` and ``foil`` are places of io and s in the list of names,
    whose logits ``subject`` gives: it goes on from any activation in the place of the model's own.

    Args:
        language_model: A causal language model, such as ``CausalLM`` with a pretrained model of transformers; it isn't trained. None: a
            tiny causal transformer with random weights, which can't do the task.
        tokenizer: Folder of a tokenizer of transformers, a ``.gguf`` file, or ``package:<name>``; None: one token a word of the word lists.
        hook: Name of the submodule, such as ``model.model.layers.9``.
        site: Its ``output``, or its first ``input``.
        columns: First and last plus one of the part of the width that is taken, such as one head's of an attention's output; null: all.
        position: Token whose activation is taken: the ``end``, ``io``, or the first or second ``s``.
        tail: Names of the submodules that are all that follows the site at the last token, such as the final norm and the unembedding: the
            subject model then runs these alone. Null: it runs the whole model.
        names: How many names there are; the first that are single tokens.
        num_train: Training prompts.
        num_val: Validation prompts.
        batch_size: Activations per process and step.
        num_workers: Processes that read data; the activations lie in memory, so 0 is fastest.
        data_seed: Seed of the prompts.
        seed: Seed of the order.

    Attributes:
        subject: A :class:`PatchedModel`, after ``setup``.
        name_list: The names, after ``setup``.
        width: d, after ``setup``.

    Raises:
        ValueError: A value outside its range, too few names that are single tokens, no submodule of that name.
    """  # noqa: E501 - a batch is told in one line

    subject: PatchedModel
    name_list: list[str]
    width = 0

    def __init__(
        self,
        language_model: nn.Module | None = None,
        tokenizer: Path | None = None,
        hook: str = "blocks.1",
        site: Site = "output",
        columns: tuple[int, int] | None = None,
        position: Position = "end",
        tail: Sequence[str] | None = None,
        names: int = 8,
        num_train: int = 2000,
        num_val: int = 1000,
        batch_size: int = 256,
        num_workers: int = 0,
        data_seed: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        literals(IOIActivations, locals())
        at_least(3, "names", names=names)
        at_least(1, "prompts", num_train=num_train, num_val=num_val)
        at_least(0, data_seed=data_seed)
        if tail is not None and (position != "end" or columns is not None or site != "output"):
            raise ValueError("tail is what follows the whole output at the last token: leave position, columns and site as they are")
        self.save_hyperparameters(ignore=["language_model"])
        self.hparams["tokenizer"] = None if tokenizer is None else str(tokenizer)
        self.language_model, self.hook, self.site = language_model, hook, site
        place = data_path(tokenizer)
        self.tokenizer = place if place is not None and place.exists() else user_path(tokenizer)  # else a name on the hub or of a package
        self.columns = None if columns is None else (columns[0], columns[1])
        self.position, self.tail = position, tail

    def _prompts(self, encode: Callable[[str], Any]) -> dict[str, Tensor]:
        """All prompts as tokens, with their attributes and places."""
        hp: Any = self.hparams
        token = {name: encode(f" {name}") for name in NAMES}
        self.name_list = [name for name, ids in token.items() if len(ids) == 1][: hp["names"]]
        if len(self.name_list) < hp["names"]:
            raise ValueError(
                f"names={hp['names']}, but this tokenizer has only {len(self.name_list)} of our names as one token: set it to that"
            )
        prompts = ioi_prompts(hp["num_train"] + hp["num_val"], self.name_list, hp["data_seed"])
        ids = [torch.from_numpy(np.asarray(encode(one.text))) for one in prompts]
        rows = {name: torch.tensor([getattr(one, name) for one in prompts]) for name in ("io", "s", "pos", "template")}
        tokens = torch.tensor([int(token[name][0]) for name in self.name_list])
        padded = nn.utils.rnn.pad_sequence(ids, batch_first=True)
        end = torch.tensor([len(one) - 1 for one in ids])
        is_s = padded == tokens[rows["s"]][:, None]
        places = {"end": end, "io": (padded == tokens[rows["io"]][:, None]).int().argmax(1), "s1": is_s.int().argmax(1)}
        places["s2"] = padded.shape[1] - 1 - is_s.flip(1).int().argmax(1)
        more = {"answer": rows["io"], "foil": rows["s"], "place": places[self.position], "end": end, "input_ids": padded}
        self._tokens = tokens
        return {**rows, **more}

    def _activations(self, model: nn.Module, rows: Mapping[str, Tensor]) -> Tensor:
        """(N, d), by the model or out of the cache."""
        start, stop = self.columns or (0, None)
        recipe = [weights_mark(model), self.hook, self.site, start, stop, rows["input_ids"].tolist(), rows["place"].tolist()]
        folder = cache_folder() / f"ioi-{hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]}"
        if not (folder / "activations.safetensors").is_file():
            rank_zero_info(f"running the language model on {len(rows['end'])} prompts; activations are kept in {folder}")
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            before = next((parameter.device for parameter in model.parameters()), device)
            model.to(device)
            found = []
            for ids, place in zip(rows["input_ids"].split(64), rows["place"].split(64), strict=True):
                x = activations(model, self.hook, {"input_ids": ids.to(device)}, self.site)
                if x.ndim != 3:
                    raise ValueError(f"hook={self.hook!r} gives {tuple(x.shape)}: hook a submodule that gives (B, L, d)")
                found.append(x[torch.arange(len(place)), place.to(device), start:stop].float().cpu())
            model.to(before)
            with making_folder(folder) as work:
                save_file({"activation": torch.cat(found).contiguous()}, work / "activations.safetensors")
        return load_file(folder / "activations.safetensors")["activation"]

    def setup(self, stage: str) -> None:
        """Make the prompts, and run the model if its activations aren't in the cache."""
        if self.train_set is not None:
            return
        tokenizer: Any = WordTokens() if self.tokenizer is None else HuggingFaceTokens(self.tokenizer)
        rows = self._prompts(tokenizer.encode)
        model = TinyLanguageModel(tokenizer.vocab_size) if self.language_model is None else self.language_model
        model.eval().requires_grad_(False)
        tensors = {"activation": self._activations(model, rows), **rows}
        self.width = tensors["activation"].shape[1]
        self.subject = PatchedModel(model, self.hook, self.site, self.columns, self.tail, self._tokens)
        split = self.hparams["num_train"]
        self.train_set = TensorBatches({name: value[:split] for name, value in tensors.items()})
        self.val_set = self.test_set = TensorBatches({name: value[split:] for name, value in tensors.items()})


__all__ = ["IOIActivations", "PatchedModel", "Prompt", "WordTokens", "ioi_prompts"]
