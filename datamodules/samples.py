"""Data sets of samples that are read one by one from files, some of which may be broken."""

import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import get_worker_info

from lit_methods import distributed
from lit_methods.datamodules.base import Samples
from lit_methods.datamodules.errors import BrokenRecordError

Sample = dict[str, Any]
OnBroken = Literal["error", "skip"]


class SampleDataset(Samples):
    """Map-style data set whose samples follow from (seed, epoch, index), with a choice of what to do about broken records.

    Subclasses write ``sample(index, rng)``. ``dataset[index]`` means epoch 0; the samplers of this package ask for ``(epoch, index)``.

    Args:
        length: Number of samples.
        seed: Seed of the augmentation.
        augment: Draw new random numbers in every epoch; False: those of epoch 0 always.
        on_broken: ``error`` raises; ``skip`` takes the next good sample instead, warns, and counts it in :attr:`num_skipped`; in evaluation
            the datamodule calls :meth:`leave_out_broken` instead.
        num_workers: Worker processes that may read this data set, for the count.
    """

    def __init__(self, length: int, seed: int, augment: bool, on_broken: OnBroken = "error", num_workers: int = 0) -> None:
        self.length, self.seed, self.augment, self.on_broken = length, seed, augment, on_broken
        # One slot per process in shared memory: workers count without a lock, the main process reads the sum.
        self._skipped = torch.zeros(num_workers + 1, dtype=torch.int64).share_memory_()
        self.kept: NDArray[np.int64] | None = None  # the good samples, once the broken ones are left out

    def __len__(self) -> int:
        return self.length if self.kept is None else len(self.kept)

    @property
    def num_skipped(self) -> int:
        """Broken samples met so far by this process and its workers, one met in two epochs twice; in evaluation: samples left out."""
        return int(self._skipped.sum())

    def leave_out_broken(self, part: str) -> None:
        """Read every sample once and leave out the broken ones, so that each good one is evaluated once and none twice.

        The ranks share the reading and agree on the result; every rank must call it.

        Args:
            part: Name of the split, for the warning.

        Raises:
            BrokenRecordError: All samples are broken.
        """
        mine = range(distributed.rank(), self.length, distributed.world_size())
        with ThreadPoolExecutor(len(self._skipped)) as readers:
            problems = {index: found for index, found in zip(mine, readers.map(self._problem, mine), strict=True) if found is not None}
        broken = distributed.gather_rows(torch.tensor(sorted(problems), dtype=torch.int64), with_grad=False).numpy()
        if not len(broken):
            return
        first = f": {next(iter(problems.values()))}" if problems else ""
        if len(broken) == self.length:
            raise BrokenRecordError("data set", "samples", f"all {self.length} samples of {part} are broken{first}")
        self.kept = np.setdiff1d(np.arange(self.length), broken)
        self._skipped[0] = len(broken)
        if problems:
            warnings.warn(f"{len(broken)} of {self.length} samples of {part} are broken and left out{first}", stacklevel=2)

    def _problem(self, index: int) -> BrokenRecordError | None:
        try:
            self.sample(index, np.random.default_rng([self.seed, 0, index]))
        except BrokenRecordError as problem:
            return problem
        return None

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """Read one sample."""
        raise NotImplementedError

    def at(self, epoch: int, index: int) -> Sample:
        """One sample, or the next good one."""
        if self.kept is not None:
            index = int(self.kept[index])
            return self.sample(index, np.random.default_rng([self.seed, epoch if self.augment else 0, index]))
        for step in range(self.length):
            candidate = (index + step) % self.length
            try:
                return self.sample(candidate, np.random.default_rng([self.seed, epoch if self.augment else 0, candidate]))
            except BrokenRecordError as problem:
                if self.on_broken == "error":
                    raise
                worker = get_worker_info()
                self._skipped[0 if worker is None else 1 + worker.id % (len(self._skipped) - 1)] += 1
                warnings.warn(f"sample {candidate} skipped, the next one takes its place: {problem}", stacklevel=2)
        raise BrokenRecordError("data set", "samples", f"all {self.length} samples are broken: see the warnings above")


__all__ = ["OnBroken", "Sample", "SampleDataset"]
