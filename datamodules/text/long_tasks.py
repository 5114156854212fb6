"""Nine kinds of questions about long texts, made to a given length: those of The Sparse Frontier (arXiv:2504.17768).

Texts, names and words are ours; the forms are the paper's. The three kinds that ask about real documents read them from files.
"""

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lit_methods.checks import at_least, one_of
from lit_methods.datamodules.base import LoaderDataModule, Samples
from lit_methods.datamodules.errors import BrokenRecordError, WrongRootError
from lit_methods.datamodules.folders import data_path, user_path
from lit_methods.datamodules.reading import read_text
from lit_methods.datamodules.text.instructions import Answers
from lit_methods.datamodules.text.text import Bytes, HuggingFaceTokens, Tokenizer

LongTask = Literal[
    "ruler_niah", "ruler_vt", "ruler_cwe", "story_retrieval", "story_multihop", "story_filtering", "squad_f1", "quality", "toefl"
]
DOCUMENT_TASKS = ("squad_f1", "quality", "toefl")
Made = tuple[str, str, str, str]  # context, question, form of the answer, answer

PROMPT = (
    "Below is a long text, and a question about it.\n\nQuestion: {question}\n\n<context>\n{context}\n</context>\n\nQuestion: {question}\n\n"
    "First explain in a few words how you found the answer, between <explanation> and </explanation>. Then give the answer between "
    "<answer> and </answer>, in this form:\n{form}\n"
)

# ---- RULER -----------------------------------------------------------------------------------------------------------------------------

_LETTERS = np.array(list("abcdefghijklmnopqrstuvwxyz0123456789"))
_CAPITALS = np.array(list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"))
_SYLLABLES = ("ba", "co", "de", "fi", "gu", "ha", "jo", "ki", "lu", "me", "no", "pa", "ri", "so", "tu", "ve", "wo", "xi", "yu", "za")
_NOISE = "The wind turned, and the road went on. A bell was heard from far away."


def _code(rng: np.random.Generator) -> str:
    """Four groups of eight letters and digits."""
    return "-".join("".join(_LETTERS[rng.integers(36, size=8)]) for _ in range(4))


def needles(rng: np.random.Generator, size: int) -> Made:
    """Pairs of a key and a value, of which 4 are asked for; ``size`` pairs."""
    pairs = [(_code(rng), _code(rng)) for _ in range(max(size, 4))]
    asked = [pairs[place] for place in rng.permutation(len(pairs))[:4]]
    question = f"What are the values for the keys {', '.join(key for key, _ in asked)}?"
    form = "\n".join(f"{number}. The answer for <key> is <value>." for number in range(1, 5))
    return (
        " ".join(f"The value for key {key} is: {value}." for key, value in pairs),
        question,
        form,
        ";".join("|".join(pair) for pair in asked),
    )


def variables(rng: np.random.Generator, size: int) -> Made:
    """Eight chains of five names, and ``size`` sentences of noise."""
    names: list[str] = []
    while len(names) < 40:
        name = "".join(_CAPITALS[rng.integers(26, size=5)])
        if name not in names:
            names.append(name)
    numbers = rng.permutation(np.arange(10_000, 100_000))[:8].tolist()
    chains = [
        [f"VAR {own[0]} = {number}", *(f"VAR {new} = VAR {old}" for old, new in pairwise(own))]
        for own, number in zip((names[start : start + 5] for start in range(0, 40, 5)), numbers, strict=True)
    ]
    total = 40 + size
    places = np.sort(rng.permutation(total)[:40])
    order = rng.permutation(np.repeat(np.arange(8), 5))  # which chain goes on; each in its own order
    lines, following = [_NOISE] * total, [iter(chain) for chain in chains]
    for place, chain in zip(places, order, strict=True):
        lines[place] = next(following[chain]) + "."
    question = f"Which variables have the value {numbers[0]}, given directly or by other variables?"
    return "\n".join(lines), question, "<name> <name> <name> <name> <name>", " ".join(names[:5])


def common_words(rng: np.random.Generator, size: int) -> Made:
    """Ten words thirty times each, and ``size`` others three times each, as a numbered list."""
    words: list[str] = []
    while len(words) < 10 + size:
        word = "".join(_SYLLABLES[place] for place in rng.integers(len(_SYLLABLES), size=3))
        if word not in words:
            words.append(word)
    listed = rng.permutation(np.array(words[:10] * 30 + words[10:] * 3))
    context = "\n".join(f"{number}. {word}" for number, word in enumerate(listed, 1))
    return (
        context,
        "Which ten words stand most often in the list?",
        "\n".join(f"{number}. <word>" for number in range(1, 11)),
        ",".join(words[:10]),
    )


# ---- a story ---------------------------------------------------------------------------------------------------------------------------

_PLACES = (
    "Alderny",
    "Brackwater",
    "Corrin",
    "Dunmere",
    "Eastvale",
    "Fenwick",
    "Greyhaven",
    "Holm",
    "Ivarsund",
    "Juniper Hill",
    "Kestrel Bay",
    "Lorne",
)
_PEOPLE = ("Ansel", "Bettina", "Corvin", "Dagny", "Edmund", "Freya", "Gideon", "Hester", "Ilse", "Jorun", "Klaus", "Linnea")
_EVENTS = ("a fair was held", "the river rose", "two carts collided", "a choir sang", "the lamps went out", "a wedding passed by")
_TALK = ("the price of grain", "the last winter", "an old song", "the new bridge", "a lost dog", "the harvest")
_KINDS = ("small", "heavy", "ornate", "cracked", "polished", "ancient", "plain", "curved")
_STUFFS = ("silver", "oak", "glass", "copper", "bone", "marble", "jade", "iron")
_THINGS = ("ring", "comb", "bowl", "flute", "lamp", "mirror", "key", "box")


def story(rng: np.random.Generator, chapters: int, without: Sequence[int] = ()) -> tuple[str, list[tuple[str, str, str]]]:
    """Chapters of one journey; ``without``: those in which nothing is bought.

    Returns:
        The text, and place, person and thing bought ("": nothing) of each chapter. Pairs of place and person, and things, come once.
    """
    meetings = rng.permutation(len(_PLACES) * len(_PEOPLE))[:chapters]
    wares = rng.permutation(len(_KINDS) * len(_STUFFS) * len(_THINGS))[:chapters]
    lines, facts, owned = [], [], list[str]()
    for number, (meeting, ware) in enumerate(zip(meetings.tolist(), wares.tolist(), strict=True), 1):
        place, person = _PLACES[meeting // len(_PEOPLE)], _PEOPLE[meeting % len(_PEOPLE)]
        kind, rest = divmod(ware, len(_STUFFS) * len(_THINGS))
        thing = f"{_KINDS[kind]} {_STUFFS[rest // len(_THINGS)]} {_THINGS[rest % len(_THINGS)]}"
        event, talk = _EVENTS[rng.integers(len(_EVENTS))], _TALK[rng.integers(len(_TALK))]
        lines.append(f"Chapter {number}\nArion came to {place} and met {person}. That day {event}. They spoke about {talk}.")
        if number in without:
            thing = ""
            lines.append("Arion looked at the wares of the market and bought nothing.")
        else:
            lines.append(f"At the market Arion bought the {thing}.")
        if owned and rng.random() < 0.5:
            lines.append(f"Arion sold the {owned.pop(rng.integers(len(owned)))}.")
        if thing:
            owned.append(thing)
        lines.append(f"Then Arion took leave of {person}, and walked on.\n")
        facts.append((place, person, thing))
    return "\n".join(lines), facts


def _chapters(size: int, least: int) -> int:
    return min(max(size, least), len(_PLACES) * len(_PEOPLE))


def story_retrieval(rng: np.random.Generator, size: int) -> Made:
    """16 facts out of a story of ``size`` chapters."""
    text, facts = story(rng, _chapters(size, 6))
    kinds = ("Which place did Arion come to", "Whom did Arion meet", "What did Arion buy")
    picks = rng.permutation(3 * len(facts))[:16].tolist()
    question = "\n".join(f"{number}. {kinds[pick % 3]} in chapter {pick // 3 + 1}?" for number, pick in enumerate(picks, 1))
    gold = "\n".join(f"{number}. {facts[pick // 3][pick % 3]}" for number, pick in enumerate(picks, 1))
    return text, question, "\n".join(f"{number}. <answer>" for number in range(1, 17)), gold


def story_multihop(rng: np.random.Generator, size: int) -> Made:
    """What was bought just before something else, in a story of ``size`` chapters."""
    text, facts = story(rng, _chapters(size, 2))
    later = int(rng.integers(1, len(facts)))
    return text, f"What did Arion buy just before buying the {facts[later][2]}?", "<thing>", facts[later - 1][2]


def story_filtering(rng: np.random.Generator, size: int) -> Made:
    """In which three of ``size`` chapters nothing was bought."""
    chapters = _chapters(size, 4)
    without = np.sort(rng.permutation(chapters)[:3] + 1).tolist()
    text, _ = story(rng, chapters, without)
    return text, "In which three chapters did Arion buy nothing?", "<number>, <number>, <number>", ", ".join(map(str, without))


# ---- documents -------------------------------------------------------------------------------------------------------------------------


def read_documents(path: Path) -> list[dict[str, Any]]:
    """Questions about documents, one JSON object a line: ``document``, ``question``, ``answer``, and ``choices`` where there are some.

    Raises:
        BrokenRecordError: A line without one of them, or no line at all.
    """
    records = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BrokenRecordError(path, f"line {number}", f"no JSON: {error}") from error
        for key in ("document", "question", "answer"):
            if not isinstance(record, dict) or not isinstance(record.get(key), str):
                raise BrokenRecordError(path, f"line {number}", f"it needs a text under {key!r}")
        records.append(record)
    if not records:
        raise BrokenRecordError(path, "lines", "the file has no question: copy it again")
    return records


def documents(records: Sequence[dict[str, Any]], rng: np.random.Generator, index: int, size: int) -> Made:
    """The question of record ``index``; its document stands among ``size`` others, numbered."""
    record = records[index % len(records)]
    others = list(dict.fromkeys(own["document"] for own in records if own["document"] != record["document"]))
    texts = [record["document"], *(others[place] for place in rng.permutation(len(others))[:size])]
    context = "\n\n".join(f"Document {number}\n{texts[place]}" for number, place in enumerate(rng.permutation(len(texts)), 1))
    choices = record.get("choices")
    question = record["question"] + (
        "" if not choices else "\n" + "\n".join(f"{chr(65 + place)}. {own}" for place, own in enumerate(choices))
    )
    return context, question, "<letter>" if choices else "<a few words>", record["answer"]


MAKERS: dict[str, Callable[[np.random.Generator, int], Made]] = {
    "ruler_niah": needles,
    "ruler_vt": variables,
    "ruler_cwe": common_words,
    "story_retrieval": story_retrieval,
    "story_multihop": story_multihop,
    "story_filtering": story_filtering,
}


# ---- samples ---------------------------------------------------------------------------------------------------------------------------


class LongTexts(Samples):
    """Questions of 95 to 100 % of ``length`` tokens, or as long as they can be where documents or chapters run out.

    Args:
        task: Kind of question.
        samples: How many.
        length: Most tokens.
        coder: Text to tokens.
        seed: Sample i is drawn from seed + i.
        records: For questions about documents.
        answered: Whether the answer stands behind the prompt, to be learned.

    Raises:
        ValueError: Not even the shortest text fits; when a sample is made.
    """

    def __init__(
        self,
        task: str,
        samples: int,
        length: int,
        coder: Tokenizer,
        seed: int,
        records: Sequence[dict[str, Any]] = (),
        answered: bool = False,
    ) -> None:
        self.task, self.samples, self.length, self.coder, self.seed = task, samples, length, coder, seed
        self.records, self.answered = records, answered
        if answered:
            self.collate = Answers.collate  # type: ignore[method-assign]

    def __len__(self) -> int:
        return self.samples

    def _made(self, index: int, size: int) -> tuple[Any, str]:
        rng = np.random.default_rng(self.seed + index)
        made = documents(self.records, rng, index, size) if self.task in DOCUMENT_TASKS else MAKERS[self.task](rng, size)
        context, question, form, answer = made
        return self.coder.encode(PROMPT.format(context=context, question=question, form=form)), answer

    def at(self, epoch: int, index: int) -> dict[str, Any]:
        """One question; the same in every epoch."""
        low, best = 0, self._made(index, 0)
        if len(best[0]) > self.length:
            raise ValueError(f"the shortest text of {self.task} has {len(best[0])} tokens and length is {self.length}: raise it")
        high = 1
        while high <= 2 * self.length and len((found := self._made(index, high))[0]) <= self.length:
            grown = len(found[0]) > len(best[0])
            low, best = high, found
            if not grown and high > 256:  # nothing is left to add
                break
            high *= 2
        while high - low > 1 and len(best[0]) < 0.95 * self.length:
            middle = (low + high) // 2
            found = self._made(index, middle)
            low, high, best = (middle, high, found) if len(found[0]) <= self.length else (low, middle, best)
        if self.answered:
            answer = self.coder.encode(f"<answer>{best[1]}</answer>")
            return Answers([best[0]], [answer], len(best[0]) + len(answer)).at(0, 0)
        return {"prompt_ids": torch.from_numpy(best[0]), "task": self.task, "answer": best[1]}

    @staticmethod
    def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Shorter texts are filled up at their front, with token 0."""
        longest = max(len(sample["prompt_ids"]) for sample in samples)
        fills = [longest - len(sample["prompt_ids"]) for sample in samples]
        padded: list[Tensor] = [torch.nn.functional.pad(own["prompt_ids"], (fill, 0)) for own, fill in zip(samples, fills, strict=True)]
        return {
            "prompt_ids": torch.stack(padded),
            "prompt_mask": torch.stack([(torch.arange(longest) >= fill).long() for fill in fills]),
            "task": [sample["task"] for sample in samples],
            "answer": [sample["answer"] for sample in samples],
        }


class LongTasksDataModule(LoaderDataModule):
    """Questions about long texts, of The Sparse Frontier's nine kinds, made to a length.

    Batch: {"input_ids": (B, L) int64, "labels": (B, L) int64}

    In training the answer stands behind the prompt; labels are the tokens that follow, -100 in the prompt. In validation, test and predict
    a batch is ``prompt_ids`` and ``prompt_mask`` (B, L) int64, filled up at their front, where the mask is 0, and lists of B texts,
    ``task`` and ``answer``.

    Six kinds are made: ``ruler_niah``, ``ruler_vt``, ``ruler_cwe``, ``story_retrieval``, ``story_multihop``, ``story_filtering``.
    ``squad_f1``, ``quality`` and ``toefl`` read ``root``: a file ``<task>.jsonl`` with ``{"document": ..., "question": ..., "answer": ...,
    "choices": [...]}`` a line, ``choices`` where the answer is a letter.

    Args:
        task: Kind of question.
        length: Most tokens of a prompt; prompts have 95 to 100 % of it.
        tokenizer: Folder of a tokenizer of transformers, or ``package:<name>``; None: bytes.
        samples: Questions of an evaluation.
        num_train: Questions of an epoch of training.
        root: Folder with documents; for the three kinds that read them.
        batch_size: Questions per process and step.
        num_workers: Processes that make texts.
        seed: Question i is drawn from seed + i; in training from seed + 1,000,000 + i.

    Attributes:
        vocab_size: Number of different tokens, after ``setup``.

    Raises:
        ValueError: A value outside its range, or a kind that reads documents without ``root``.
    """

    def __init__(
        self,
        task: LongTask = "ruler_niah",
        length: int = 4096,
        tokenizer: Path | None = None,
        samples: int = 100,
        num_train: int = 1000,
        root: Path | None = None,
        batch_size: int = 1,
        num_workers: int = 0,
        seed: int = 43,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        one_of(LongTask, task=task)
        at_least(1, length=length, samples=samples, num_train=num_train)
        if task in DOCUMENT_TASKS and root is None:
            raise ValueError(
                f"task={task!r} asks about documents: give root, a folder with {task}.jsonl, or take a made kind, such as ruler_niah"
            )
        self.save_hyperparameters()
        self.task, self.length, self.samples, self.num_train = task, length, samples, num_train
        self.tokenizer, self.root, self.vocab_size = user_path(tokenizer), data_path(root), 0
        self.coder: Tokenizer | None = None

    def check_root(self, stage: str = "fit") -> None:
        """Look for the file.

        Raises:
            WrongRootError: It isn't there.
        """
        if self.task in DOCUMENT_TASKS and self.root is not None and not (self.root / f"{self.task}.jsonl").is_file():
            raise WrongRootError(f"root={str(self.root)!r} has no {self.task}.jsonl: write the documents there, one JSON object a line")

    def setup(self, stage: str) -> None:
        """Read what is read; texts are made when they are asked for."""
        self.check_root(stage)
        self.coder = Bytes() if self.tokenizer is None else HuggingFaceTokens(self.tokenizer)
        self.vocab_size = self.coder.vocab_size
        documents = [] if self.task not in DOCUMENT_TASKS or self.root is None else read_documents(self.root / f"{self.task}.jsonl")
        train_seed = self.seed + 1_000_000
        self.train_set = LongTexts(self.task, self.num_train, self.length, self.coder, train_seed, documents, answered=True)
        self.test_set = self.val_set = LongTexts(self.task, self.samples, self.length, self.coder, self.seed, documents)

    def decode(self, tokens: Tensor) -> list[str]:
        """(B, R) tokens -> B texts; special tokens are left out."""
        if isinstance(self.coder, HuggingFaceTokens):
            return list(self.coder._inner.batch_decode(tokens, skip_special_tokens=True))
        return [bytes(row.clamp(0, 255).tolist()).decode("utf-8", "replace") for row in tokens]


__all__ = ["DOCUMENT_TASKS", "LongTask", "LongTasksDataModule", "LongTexts", "read_documents", "story"]
