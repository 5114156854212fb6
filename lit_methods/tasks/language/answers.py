"""Scores of answers in words: nine kinds of questions about long texts, as The Sparse Frontier (arXiv:2504.17768) scores them.

A model is asked to end its reply with ``<answer>...</answer>``. Code of the authors: PiotrNawrot/sparse-frontier at commit 31d86c1.
"""

import re
import string
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray


def answer_in(reply: str) -> str:
    """What stands between the tags, without space around it; the whole reply, if there are none."""
    found = re.search(r"<answer>(.*?)</answer>", reply, re.DOTALL)
    return (found.group(1) if found else reply).strip()


def _overlap(ours: set[str], wanted: set[str]) -> float:
    """Intersection over union; 1 for two empty sets."""
    return len(ours & wanted) / len(ours | wanted) if ours | wanted else 1.0


def _numbered(text: str) -> dict[int, str]:
    """Lines such as ``1. word``; the first of a number counts."""
    found: dict[int, str] = {}
    for number, rest in re.findall(r"^\s*(\d+)\s*[.):\-]\s*(.*?)\s*$", text, re.MULTILINE):
        found.setdefault(int(number), rest)
    return found


def _plain(text: str) -> str:
    """In lower case, without a leading article and a full stop at the end."""
    return re.sub(r"^(the|an|a)\s+", "", text.strip().rstrip(".").strip().lower())


def _words(text: str) -> set[str]:
    """Words without case, punctuation and articles."""
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return set(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def common_words(reply: str, gold: str) -> float:
    """IoU of the words of a numbered list with those of ``gold``, which commas part."""
    return _overlap({word.lower() for word in _numbered(answer_in(reply)).values()}, {word.strip().lower() for word in gold.split(",")})


def needles(reply: str, gold: str) -> float:
    """Share of the answers "The answer for K is V." that are right and in their place; ``gold``: ``K|V`` parted by semicolons."""
    found = re.findall(r"answer for\s+(\S+)\s+is:?\s+([^\s.]+)", answer_in(reply), re.IGNORECASE)
    wanted = [tuple(pair.split("|")) for pair in gold.split(";")]
    return sum(ours == theirs for ours, theirs in zip(found, wanted, strict=False)) / len(wanted)


def variables(reply: str, gold: str) -> float:
    """IoU of names in capitals."""
    ours, wanted = (set(re.findall(r"[A-Z0-9_]+", text.upper())) - {"VAR"} for text in (answer_in(reply), gold))
    return _overlap(ours, wanted)


def numbered_answers(reply: str, gold: str) -> float:
    """Share of the lines ``1. ...`` that are right, without case and leading articles."""
    ours, wanted = _numbered(answer_in(reply)), _numbered(gold)
    return sum(_plain(ours.get(number, "")) == _plain(text) for number, text in wanted.items()) / len(wanted)


def short_answer(reply: str, gold: str) -> float:
    """1 if the answer is right, without case and leading articles; NaN for a reply without an answer in tags, which doesn't count."""
    found = re.search(r"<answer>(.*?)</answer>", reply, re.DOTALL)
    if found is None or not found.group(1).strip():
        return float("nan")
    return float(_plain(found.group(1)) == _plain(gold))


def chapters(reply: str, gold: str) -> float:
    """IoU of numbers."""
    return _overlap({str(int(own)) for own in re.findall(r"\d+", answer_in(reply))}, set(re.findall(r"\d+", gold)))


def word_overlap(reply: str, gold: str) -> float:
    """F1 of the sets of words, rounded to two digits."""
    ours, wanted = _words(answer_in(reply)), _words(gold)
    both = len(ours & wanted)
    return round(2 * both / (len(ours) + len(wanted)), 2) if both else 0.0


def choice(reply: str, gold: str) -> float:
    """1 if the first single letter of the answer is the right one."""
    found = re.search(r"\b([A-Za-z])\b", answer_in(reply))
    return float(found is not None and found.group(1).upper() == gold.strip().upper())


SCORES: dict[str, Callable[[str, str], float]] = {
    "ruler_niah": needles,
    "ruler_vt": variables,
    "ruler_cwe": common_words,
    "story_retrieval": numbered_answers,
    "story_multihop": short_answer,
    "story_filtering": chapters,
    "squad_f1": word_overlap,
    "quality": choice,
    "toefl": choice,
}


def answer_scores(task: str, replies: Sequence[str], golds: Sequence[str]) -> NDArray[np.float64]:
    """Score of each reply in [0, 1]; NaN: it doesn't count.

    Args:
        task: A key of ``SCORES``.
        replies: What a model said.
        golds: What it should have said, in the task's form.

    Raises:
        ValueError: No such task, or another number of replies.
    """
    if task not in SCORES:
        raise ValueError(f"task is {task!r}: it must be one of {', '.join(SCORES)}")
    if len(replies) != len(golds):
        raise ValueError(f"there are {len(replies)} replies and {len(golds)} answers: give one for each")
    return np.array([SCORES[task](reply, gold) for reply, gold in zip(replies, golds, strict=True)])


__all__ = ["SCORES", "answer_in", "answer_scores"]
