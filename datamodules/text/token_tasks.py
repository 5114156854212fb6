"""Questions about a text of made-up tokens, which a small model learns in a minute: what stands where, and how often."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lit_methods.checks import at_least, one_of
from lit_methods.datamodules.base import LoaderDataModule, Samples

Task = Literal["retrieval", "majority", "counting"]
TASKS: tuple[Task, ...] = ("retrieval", "majority", "counting")
IGNORED = -100  # label of what doesn't count
REPEATS = 3  # times that a key stands in a text of "majority"


class TokenTasks(Samples):
    """Texts of ``length`` tokens with ``questions`` at their end.

    Args:
        tasks: Each sample is of one of them.
        samples: How many.
        lengths: Each sample has one of these lengths, the questions included.
        questions: Tokens that ask.
        keys: Different keys K; as questions tokens 2 to K + 1.
        values: Different values V; as answers the V tokens behind the keys. Facts are the K V tokens behind these.
        seed: Decides everything, with epoch and index.
        fresh: Whether an epoch has other samples than the one before.
    """

    def __init__(
        self,
        tasks: tuple[Task, ...],
        samples: int,
        lengths: tuple[int, ...],
        questions: int,
        keys: int,
        values: int,
        seed: int,
        fresh: bool,
    ) -> None:
        self.tasks, self.samples, self.lengths, self.questions = tasks, samples, lengths, questions
        self.keys, self.values, self.seed, self.fresh = keys, values, seed, fresh

    def __len__(self) -> int:
        return self.samples

    def at(self, epoch: int, index: int) -> dict[str, Tensor]:
        """One sample."""
        rng = np.random.default_rng([self.seed, epoch if self.fresh else 0, index])
        task = self.tasks[rng.integers(len(self.tasks))]
        pairs = self.lengths[rng.integers(len(self.lengths))] - self.questions
        repeats = 1 if task == "retrieval" else REPEATS
        known, others = np.split(rng.permutation(self.keys)[: pairs // repeats + pairs % repeats], [pairs // repeats])
        answer = rng.integers(self.values, size=len(known))
        if task == "counting":  # one value stands in a quarter of the facts, the others are even
            key = rng.integers(self.keys, size=pairs)
            often = rng.integers(self.values)
            value = np.where(rng.random(pairs) < 0.25, often, rng.integers(self.values, size=pairs))
            ask, wanted = np.full(self.questions, 1), np.full(self.questions, self.keys + 2 + _most_common(value, self.values))
        else:
            key, value = np.repeat(known, repeats), np.repeat(answer, repeats)
            if repeats > 1:  # one of three values of a key is another one
                value[::repeats] = rng.integers(self.values, size=len(known))
            key, value = np.concatenate([key, others]), np.concatenate([value, rng.integers(self.values, size=len(others))])  # never asked
            order = rng.permutation(len(key))
            key, value = key[order], value[order]
            pick = rng.integers(len(known), size=self.questions)
            ask, wanted = known[pick] + 2, answer[pick] + self.keys + 2
        text = 2 + self.keys + self.values + key * self.values + value
        tokens = np.concatenate([text, ask])
        labels = np.concatenate([np.full(len(text), IGNORED), wanted])
        return {"input_ids": torch.from_numpy(tokens), "labels": torch.from_numpy(labels)}

    @staticmethod
    def collate(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Shorter texts are filled up at their front, with token 0: questions stand at the end."""
        longest = max(len(sample["input_ids"]) for sample in samples)
        found: dict[str, list[Tensor]] = {"input_ids": [], "labels": [], "attention_mask": []}
        for sample in samples:
            fill = longest - len(sample["input_ids"])
            found["input_ids"].append(torch.nn.functional.pad(sample["input_ids"], (fill, 0)))
            found["labels"].append(torch.nn.functional.pad(sample["labels"], (fill, 0), value=IGNORED))
            found["attention_mask"].append((torch.arange(longest) >= fill).long())
        return {name: torch.stack(own) for name, own in found.items()}


def _most_common(values: Any, number: int) -> int:
    return int(np.bincount(values, minlength=number).argmax())


class TokenTasksDataModule(LoaderDataModule):
    """Questions about texts of made-up tokens, which a small model learns to answer.

    Batch: {"input_ids": (B, L) int64, "labels": (B, L) int64, "attention_mask": (B, L) int64}

    A text is facts, each a token that stands for a key and a value; questions are the tokens at its end, and the label there is the answer.
    All other labels are -100. Shorter texts are filled up at their front with token 0, where the mask is 0.

    - ``retrieval``: each key stands there once; a question is a key, the answer its value. As The Sparse Frontier's needles.
    - ``majority``: each key stands in three facts, two of them with the same value, which is the answer.
    - ``counting``: a question is token 1, the answer the most common value. As its common words.

    Args:
        tasks: Each training text is of one of these.
        eval_task: Task of validation and test; None: as in training.
        length: Tokens of a text, its questions included.
        train_lengths: Each training text has one of these lengths; None: ``length``.
        questions: Questions of a training text.
        eval_questions: Questions of a text in validation and test.
        keys: Different keys.
        values: Different values.
        num_train: Texts of an epoch, new ones in each.
        num_val: Texts for validation, and others for test.
        batch_size: Texts per process and step.
        num_workers: Processes that make texts.
        seed: Of all texts and their order.

    Attributes:
        vocab_size: Number of different tokens.

    Raises:
        ValueError: A value outside its range, or more keys in a text than there are.
    """

    def __init__(
        self,
        tasks: Sequence[Task] = TASKS,
        eval_task: Task | None = None,
        length: int = 68,
        train_lengths: Sequence[int] | None = None,
        questions: int = 16,
        eval_questions: int = 4,
        keys: int = 64,
        values: int = 8,
        num_train: int = 3200,
        num_val: int = 200,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        lengths = (length,) if train_lengths is None else tuple(train_lengths)
        for task in (*tasks, eval_task):
            one_of(TASKS, tasks=task)
        at_least(1, tasks=len(tasks), train_lengths=len(lengths), num_train=num_train, num_val=num_val)
        at_least(1, "questions", questions=questions, eval_questions=eval_questions)
        at_least(2, "tokens", keys=keys, values=values)
        for asked, places in ((questions, lengths), (eval_questions, (length,))):
            for own in places:
                if not REPEATS <= own - asked <= keys:
                    raise ValueError(
                        f"a text of {own} tokens with {asked} questions leaves {own - asked} for facts: it must be {REPEATS} to {keys}, "
                        "the number of keys"
                    )
        self.save_hyperparameters()
        self.tasks, self.eval_tasks = tuple(tasks), tuple(tasks) if eval_task is None else (eval_task,)
        self.vocab_size = 2 + keys + values + keys * values
        self.length, self.lengths, self.questions, self.eval_questions = length, lengths, questions, eval_questions
        self.keys, self.values, self.num_train, self.num_val = keys, values, num_train, num_val

    def setup(self, stage: str) -> None:
        """Nothing is drawn before it is asked for."""
        sizes = (self.keys, self.values)
        self.train_set = TokenTasks(self.tasks, self.num_train, self.lengths, self.questions, *sizes, self.seed, fresh=True)
        evaluated = (self.eval_tasks, self.num_val, (self.length,), self.eval_questions, *sizes)
        self.val_set = TokenTasks(*evaluated, self.seed + 1_000_003, fresh=False)
        self.test_set = TokenTasks(*evaluated, self.seed + 2_000_003, fresh=False)


__all__ = ["TASKS", "Task", "TokenTasks", "TokenTasksDataModule"]
