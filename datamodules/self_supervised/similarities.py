"""Items with a similarity, some of whose training targets are random: drawn ones, and pairs of real digits."""

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_methods import checks
from lit_methods.datamodules.base import Batches, Ints, LoaderDataModule

Source = Literal["drawn", "digits"]
_WIDTH, _HIDDEN = 16, 8  # numbers of a drawn item, and of the function's inside


def drawn_items(number: int, seed: int, part: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(N, 16) normal numbers, and (N,) similarities in [-1, 1]: tanh of a sum of eight tanh, the same function for every part of a seed."""
    function, rng = np.random.default_rng([seed, 5]), np.random.default_rng([seed, 6, part])
    inside, outside = function.normal(size=(_WIDTH, _HIDDEN)), function.normal(size=_HIDDEN)
    items = rng.normal(size=(number, _WIDTH))
    return items.astype(np.float32), np.tanh(np.tanh(items @ inside / np.sqrt(_WIDTH)) @ outside).astype(np.float32)


def digit_pairs(number: int, seed: int, part: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(N, 64) differences of two digits' pixels without sign, and (N,) cosines of the two, less the mean digit; parts share no digit."""
    from sklearn.datasets import load_digits

    pixels = load_digits().data / 16.0
    mine = np.array_split(np.random.default_rng(0).permutation(len(pixels)), 2)[part]  # training's and the others', whatever the seed
    rng = np.random.default_rng([seed, 8, part])
    one, other = (pixels[mine[rng.integers(len(mine), size=number)]] for _ in range(2))
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (one - pixels.mean(0), other - pixels.mean(0))]
    return np.abs(one - other).astype(np.float32), (unit[0] * unit[1]).sum(1).astype(np.float32)


class _Items(Batches):
    def __init__(self, items: NDArray[np.float32], targets: NDArray[np.float32]) -> None:
        self.items, self.targets = torch.from_numpy(items), torch.from_numpy(targets)

    def __len__(self) -> int:
        return len(self.items)

    def batch(self, epochs: Ints, index: Ints) -> dict[str, Tensor]:
        """Items and targets."""
        chosen = torch.from_numpy(index)
        return {"input": self.items[chosen], "target": self.targets[chosen]}


class SimilaritiesDataModule(LoaderDataModule):
    """Items with a similarity in [-1, 1], a share of whose training targets are random.

    Batch: {"input": (B, 16) float32, "target": (B,) float32}

    Validation and test are the same items, with their true similarities; no training item is among them.

    Args:
        source: ``drawn``: 16 normal numbers and a smooth function of them. ``digits``: pairs of scikit-learn's real digits, given by the
            differences of their 64 pixels, and the cosine of the two; training and held-out pairs have different digits.
        num_train: Training items.
        num_val: Held-out items.
        noise_share: Share of the training targets that are replaced by uniform numbers in [-1, 1].
        batch_size: Items per process and step.
        num_workers: Processes that read data; the items lie in memory.
        seed: Seed of the items, the noise and the order.

    Raises:
        ValueError: A number lies outside its range.
    """

    def __init__(
        self,
        source: Source = "drawn",
        num_train: int = 250,
        num_val: int = 250,
        noise_share: float = 0.2,
        batch_size: int = 250,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        checks.one_of(Source, source=source)
        checks.at_least(1, num_train=num_train)
        checks.at_least(10, "items", num_val=num_val)
        checks.share(noise_share=noise_share)
        self.source, self.num_train, self.num_val, self.noise_share = source, num_train, num_val, noise_share
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        """Draw the items."""
        if self.train_set is not None:
            return
        draw = drawn_items if self.source == "drawn" else digit_pairs
        items, targets = draw(self.num_train, self.seed, 0)
        rng = np.random.default_rng([self.seed, 9])
        wrong = rng.permutation(self.num_train)[: round(self.noise_share * self.num_train)]
        targets[wrong] = rng.uniform(-1, 1, len(wrong))
        self.train_set = _Items(items, targets)
        self.val_set = self.test_set = _Items(*draw(self.num_val, self.seed, 1))


__all__ = ["SimilaritiesDataModule", "digit_pairs", "drawn_items"]
