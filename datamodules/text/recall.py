"""Made-up lists of keys with values, and questions for the values of some."""

import torch
from torch import Tensor

from lit_methods.checks import at_least, within
from lit_methods.datamodules.activations.synthetic import TensorBatches
from lit_methods.datamodules.base import LoaderDataModule


def recall_sequences(count: int, pairs: int, queries: int, keys: int, values: int, generator: torch.Generator, filler: int = 0) -> Tensor:
    """Sequences that can only be finished by looking keys up.

    Each is: pairs of a key and its value, in any order; ``filler`` pairs with a key token that no question has; the keys that are asked
    for; their values, in the order of the questions. Keys of a sequence are different, values needn't be.

    Args:
        count: Sequences N.
        pairs: Keys with a value in a sequence, <= ``keys``.
        queries: Questions, <= ``pairs``.
        keys: Different keys; their tokens are 0 to ``keys`` - 1.
        values: Different values; their tokens follow, and behind them comes the filler's key.
        generator: CPU generator.
        filler: Pairs that nobody asks for, at random places among the others.

    Returns:
        (N, 2 (pairs + filler) + 2 queries) int64.
    """
    order = torch.rand(count, keys, generator=generator).argsort(1)[:, :pairs]
    value = keys + torch.randint(values, (count, pairs + filler), generator=generator)
    key = torch.cat([order, torch.full((count, filler), keys + values)], dim=1)
    asked = torch.rand(count, pairs, generator=generator).argsort(1)[:, :queries]
    answers = value.gather(1, asked)
    shuffled = torch.rand(count, pairs + filler, generator=generator).argsort(1)
    listed = torch.stack([key.gather(1, shuffled), value.gather(1, shuffled)], dim=2).flatten(1)
    return torch.cat([listed, order.gather(1, asked), answers], dim=1)


class KeyValueRecallDataModule(LoaderDataModule):
    """Made-up sequences of keys with values, then questions, then the answers, which are the last tokens. There is nothing to download.

    Batch: {"input_ids": (B, 64) int64}

    Args:
        pairs: Keys with a value in a sequence.
        queries: Questions, and answers.
        keys: Different keys.
        values: Different values.
        filler: Pairs that nobody asks for, which make the sequences longer.
        num_train: Training sequences, drawn once.
        num_val: Validation and test sequences, drawn once.
        batch_size: Sequences per process and step.
        num_workers: Processes that read data; the sequences lie in memory, so 0 is fastest.
        seed: Seed of sequences and order.

    Attributes:
        vocab_size: Number of different tokens: keys, values, and the filler's key where there is a filler.

    Raises:
        ValueError: A number outside its range.
    """

    def __init__(
        self,
        pairs: int = 16,
        queries: int = 16,
        keys: int = 32,
        values: int = 16,
        filler: int = 0,
        num_train: int = 20000,
        num_val: int = 512,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        at_least(1, keys=keys, values=values, num_train=num_train, num_val=num_val)
        at_least(0, filler=filler)
        within(f"[1, {keys}]", "at most as many as there are keys", pairs=pairs)
        within(f"[1, {pairs}]", "at most as many as there are pairs", queries=queries)
        self.save_hyperparameters()
        self.sizes = (pairs, queries, keys, values)
        self.filler, self.num_train, self.num_val = filler, num_train, num_val
        self.vocab_size = keys + values + (filler > 0)

    def setup(self, stage: str) -> None:
        """Draw all sequences."""
        if self.train_set is not None:
            return
        generator = torch.Generator().manual_seed(self.seed)
        drawn = recall_sequences(self.num_train + self.num_val, *self.sizes, generator, self.filler)
        self.train_set = TensorBatches({"input_ids": drawn[: self.num_train]})
        self.val_set = self.test_set = TensorBatches({"input_ids": drawn[self.num_train :]})


__all__ = ["KeyValueRecallDataModule", "recall_sequences"]
