"""What the data sets of metric learning share: disjoint classes for training and evaluation, batches with several samples of a class."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_methods.checks import at_least
from lit_methods.datamodules.base import LoaderDataModule
from lit_methods.datamodules.loaders import RankSampler, ResumableLoader


class ClassBalancedSampler(RankSampler):
    """Batches of ``classes`` different classes with ``samples`` samples each; otherwise as :class:`RankSampler`.

    Every batch of a rank draws its classes without repetition, and of each class samples without repetition, or with, where the class has
    too few. Global batch k is W such batches: one process that accumulates over W batches sees those of W ranks.

    Args:
        dataset: Anything with a length.
        labels: (N,) class of each sample.
        classes: Different classes in a batch, P.
        samples: Samples of each, K. The batch size is P K.
        batches: Batches of a rank in an epoch; None: as many as the samples fill.
        rank: Index of this process.
        world_size: Number of processes.
        seed: Seed of the draws.

    Raises:
        ValueError: There are fewer than ``classes`` classes, or a number is below 1.
    """

    def __init__(
        self,
        dataset: Any,
        labels: NDArray[np.int64],
        classes: int,
        samples: int,
        *,
        batches: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
    ) -> None:
        found, counts = np.unique(labels, return_counts=True)
        if min(classes, samples) < 1 or len(found) < classes:
            raise ValueError(
                f"classes_per_batch={classes} and samples_per_class={samples} must be 1 or more, "
                f"and the training part has {len(found)} classes"
            )
        super().__init__(dataset, classes * samples, rank=rank, world_size=world_size, seed=seed, drop_last=True)
        self.classes, self.samples = classes, samples
        self.whole = max(1, len(labels) // (world_size * self.batch_size)) if batches is None else batches
        if self.whole < 1:
            raise ValueError(f"steps_per_epoch={batches}: give 1 or more, or null for as many as the samples fill")
        self._members = np.argsort(labels, kind="stable")  # samples of class c: counts[c] places from starts[c] on
        self._counts, self._starts = counts, np.concatenate([[0], counts.cumsum()[:-1]])

    def __len__(self) -> int:
        """Draws of this rank in a whole pass."""
        return self.whole * self.batch_size

    def _batch(self, rng: np.random.Generator) -> NDArray[np.int64]:
        chosen = rng.permutation(len(self._counts))[: self.classes]
        parts = [
            self._starts[one] + rng.choice(self._counts[one], self.samples, replace=bool(self._counts[one] < self.samples))
            for one in chosen
        ]
        return self._members[np.concatenate(parts)]

    def __iter__(self) -> Iterator[Any]:
        """The draws of this pass that are left."""
        for number in range(self.batches, self.whole):
            rng = np.random.default_rng([self.seed, self.pass_number, number * self.num_replicas + self.rank])
            yield from ((self.pass_number, int(index)) for index in self._batch(rng))

    def _identity(self) -> dict[str, int]:
        return super()._identity() | {"classes_per_batch": self.classes, "steps_per_epoch": self.whole}


class RetrievalDataModule(LoaderDataModule):
    """Base of the metric learning datamodules: ``setup`` of a subclass fills the sets.

    Args:
        classes_per_batch: Different classes in a training batch.
        samples_per_class: Samples of each.
        steps_per_epoch: Batches of a process in an epoch; None: as many as the samples fill.
        eval_batch_size: Samples per process and evaluation step.
        num_workers: Processes that read data.
        seed: Seed of the draws.

    Raises:
        ValueError: A number is below 1.
    """

    train_labels: NDArray[np.int64]

    def __init__(
        self,
        *,
        classes_per_batch: int,
        samples_per_class: int,
        steps_per_epoch: int | None,
        eval_batch_size: int,
        num_workers: int,
        seed: int,
    ) -> None:
        at_least(1, classes_per_batch=classes_per_batch, samples_per_class=samples_per_class, steps_per_epoch=steps_per_epoch)
        size = classes_per_batch * samples_per_class
        super().__init__(batch_size=size, eval_batch_size=eval_batch_size, num_workers=num_workers, seed=seed)
        self.classes_per_batch, self.samples_per_class, self.steps_per_epoch = classes_per_batch, samples_per_class, steps_per_epoch

    def train_dataloader(self) -> ResumableLoader:
        """Class-balanced, resumable."""
        dataset, trainer = self.data_of("train"), self.trainer
        sampler = ClassBalancedSampler(
            dataset,
            self.train_labels,
            self.classes_per_batch,
            self.samples_per_class,
            batches=self.steps_per_epoch,
            rank=trainer.global_rank if trainer is not None else 0,
            world_size=trainer.world_size if trainer is not None else 1,
            seed=self.seed,
        )
        return self.loader(dataset, training=True, sampler=sampler)  # type: ignore[no-any-return]

    def test_dataloader(self) -> Any:
        """The samples of validation: choose nothing by the one to report it by the other."""
        return self.val_dataloader()

    def predict_dataloader(self) -> Any:
        """The samples of validation."""
        return self.val_dataloader()


__all__ = ["ClassBalancedSampler", "RetrievalDataModule"]
