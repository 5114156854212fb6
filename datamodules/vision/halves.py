"""Two halves of a training set, a sample of each in every step: one trains weights, the other judges what was chosen."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_methods.checks import within
from lit_methods.datamodules.base import LoaderDataModule, Samples
from lit_methods.datamodules.vision.base import ClassificationDataModule
from lit_methods.datamodules.vision.digits import DigitsDataModule


class Halves(Samples):
    """Samples of the first part, each beside one of the second, drawn anew in each epoch.

    Samples: the keys of the data set for the first part, and the same with ``search_`` before them for the second one.

    Args:
        samples: The whole data set.
        first: Indices of the first part.
        second: Indices of the second part, at least one.
        seed: Decides which two come together.
    """

    def __init__(self, samples: Samples, first: NDArray[np.int64], second: NDArray[np.int64], seed: int) -> None:
        self.samples, self.first, self.second, self.seed = samples, first, second, seed
        self._drawn: tuple[int, NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        return len(self.first)

    def partners(self, epoch: int) -> NDArray[np.int64]:
        """Sample of the second part beside each one of the first; none comes a second time before all have come."""
        if self._drawn is None or self._drawn[0] != epoch:
            random = np.random.default_rng([self.seed, 2, epoch])
            rounds = [random.permutation(self.second) for _ in range(-(-len(self.first) // len(self.second)))]
            self._drawn = epoch, np.concatenate(rounds)[: len(self.first)]
        return self._drawn[1]

    def at(self, epoch: int, index: int) -> dict[str, Any]:
        """A sample of each part."""
        own = self.samples.at(epoch, int(self.first[index]))
        other = self.samples.at(epoch, int(self.partners(epoch)[index]))
        return own | {f"search_{name}": value for name, value in other.items()}


class SearchHalvesDataModule(LoaderDataModule):
    """Another datamodule's training images in two parts, for a search that trains weights on one and chooses by the other.

    Batch: {"image": (B, C, H, W) float32, "label": (B,) int64, "search_image": (B, C, H, W) float32, "search_label": (B,) int64}

    One permutation, the same for every seed, splits the training images. An epoch is a pass over the first part. Validation and test are
    the other datamodule's, as they are there.

    Args:
        data: Datamodule of images with labels, such as ``CIFARDataModule``; its batch size is of no effect. None: ``DigitsDataModule()``.
        search_share: Share of the training images in the second part, in (0, 1).
        batch_size: Images of each part, per process and step.
        num_workers: Processes that read data.
        seed: Seed of the order.

    Raises:
        ValueError: A number lies outside its range.
    """

    def __init__(
        self,
        data: ClassificationDataModule | None = None,
        search_share: float = 0.5,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        within("(0, 1)", "a share", search_share=search_share)
        self.save_hyperparameters(ignore=["data"])
        self.data, self.search_share = DigitsDataModule() if data is None else data, search_share

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.data.class_names

    def check_root(self, stage: str = "fit") -> None:
        """What the other datamodule says of its root."""
        self.data.check_root(stage)

    def prepare_data(self) -> None:
        """The other datamodule's."""
        self.data.prepare_data()

    def setup(self, stage: str) -> None:
        """Read and split.

        Raises:
            ValueError: Fewer than two training images.
        """
        self.data.trainer = self.trainer
        self.data.setup(stage)
        self.val_set, self.test_set, self.predict_set = self.data.val_set, self.data.test_set, self.data.predict_set
        whole = self.data.train_set
        if whole is None or self.train_set is not None:
            return
        size = len(whole)
        if size < 2:
            raise ValueError(f"{type(self.data).__name__} has {size} training images, which can't be split: give it more")
        second = min(max(1, round(self.search_share * size)), size - 1)
        order = np.random.default_rng(0).permutation(size)
        self.train_set = Halves(whole, order[second:], order[:second], self.seed)


__all__ = ["Halves", "SearchHalvesDataModule"]
