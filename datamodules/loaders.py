"""Loaders that go on in mid-epoch after a resume and deal the same global batches to any number of ranks.

A plain ``DataLoader`` starts again at sample 0 when Lightning resumes in mid-epoch. The loader here counts the
batches that the training loop took and skips exactly these, without touching the data set. What it yields follows
from ``(seed, epoch, position)`` alone: worker processes hold no state, and no draw is taken from the global random
number generators.
"""

from collections.abc import Callable, Iterator, Sized
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lit_methods import distributed
from lit_methods.checks import at_least

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

# A loader that is shorter than its partner starts again within one epoch. Each such pass gets an epoch number of its own, far from the
# real
# ones.
_PASS_STRIDE = 1_000_000


class RankSampler(DistributedSampler):
    """The draws of one rank out of a global order that doesn't depend on the number of ranks.

    The order of an epoch is a permutation made from ``(seed, epoch)`` (or 0, 1, 2, ... without ``shuffle``). Global
    batch k is the positions ``k * W * b`` to ``(k + 1) * W * b - 1`` of it, W ranks and b samples per rank; rank r
    takes the r-th block of b. One process that accumulates over W micro-batches of b therefore sees the very batches
    of W ranks. The ragged tail is dropped, or dealt out without padding and without duplicates in contiguous shares
    that differ by at most one sample (a rank may get none).

    Being a ``DistributedSampler``, it is left alone by Lightning's ``use_distributed_sampler``, whatever that is set
    to.

    Args:
        dataset: Anything with a length.
        batch_size: Samples per batch and rank, b >= 1.
        rank: Index of this process, 0 <= rank < world_size.
        world_size: Number of processes W >= 1.
        shuffle: A new permutation for every pass; False: the order of the data set.
        seed: Any integer >= 0.
        drop_last: Drop the samples behind the last full global batch.
        counts_epochs: Yield the number of the pass; False: always 0, so that an evaluation sees the same draws in
            every epoch.
        with_epoch: Yield ``(epoch, index)``; False: ``index`` alone, for data sets that know nothing else.

    Raises:
        ValueError: A value lies outside the range named above.
    """

    def __init__(
        self,
        dataset: Sized,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        counts_epochs: bool = True,
        with_epoch: bool = True,
    ) -> None:
        at_least(1, batch_size=batch_size)
        at_least(0, seed=seed)
        super().__init__(dataset, num_replicas=world_size, rank=rank, shuffle=shuffle, seed=seed, drop_last=drop_last)  # type: ignore[arg-type]
        self.batch_size = batch_size
        self.counts_epochs = counts_epochs
        self.with_epoch = with_epoch
        self.repeat = 0  # how often this epoch was begun anew
        self.batches = 0  # batches of this pass that were taken
        self._begun_epoch = -1  # the epoch of the pass that was begun last
        self._resumed: dict[str, int] | None = None

    def __len__(self) -> int:
        """Draws of this rank in a whole pass."""
        global_batch = self.num_replicas * self.batch_size
        full, tail = divmod(len(self.dataset), global_batch)  # type: ignore[arg-type]
        share = 0 if self.drop_last else tail // self.num_replicas + (self.rank < tail % self.num_replicas)
        return full * self.batch_size + share

    @property
    def pass_number(self) -> int:
        """The epoch that is part of every draw: Lightning's, or a number of its own for a second pass within an epoch."""
        return self.epoch + self.repeat * _PASS_STRIDE if self.counts_epochs else 0

    def begin_pass(self) -> None:
        """Settle where the next pass starts: behind what a checkpoint says was taken, else at the first batch."""
        resumed, self._resumed = self._resumed, None
        here = self._identity()
        changed = {name: (resumed[name], value) for name, value in here.items() if resumed[name] != value} if resumed else {}
        said = ", ".join(f"{name} was {old} and is {new}" for name, (old, new) in changed.items())
        if changed and resumed is not None and resumed["epoch"] != self.epoch:
            rank_zero_warn(f"the run goes on with another order of the data than its checkpoint was saved with: {said}")
        if resumed is not None and resumed["epoch"] == self.epoch:
            if changed:
                raise ValueError(
                    f"the checkpoint was saved in mid-epoch with another order of the data ({said}): resume with the old values, "
                    "or from a checkpoint of an epoch's end"
                )
            self.repeat, self.batches = resumed["repeat"], resumed["batches"]
        else:
            self.repeat, self.batches = (self.repeat + 1 if self._begun_epoch == self.epoch else 0), 0
        self._begun_epoch = self.epoch

    def order(self) -> NDArray[np.int64]:
        """All indices in the order of this pass, the same on every rank."""
        size = len(self.dataset)  # type: ignore[arg-type]
        return np.random.default_rng([self.seed, self.pass_number]).permutation(size) if self.shuffle else np.arange(size)

    def __iter__(self) -> Iterator[Any]:
        """The draws of this pass that are left."""
        size, order = len(self.dataset), self.order()  # type: ignore[arg-type]
        tail_start = size - size % (self.num_replicas * self.batch_size)
        mine = order[:tail_start].reshape(-1, self.num_replicas, self.batch_size)[:, self.rank].reshape(-1)
        if not self.drop_last:
            mine = np.concatenate([mine, np.array_split(order[tail_start:], self.num_replicas)[self.rank]])
        left = mine[self.batches * self.batch_size :].tolist()
        return iter([(self.pass_number, index) for index in left] if self.with_epoch else left)

    def _identity(self) -> dict[str, int]:
        """What must not change between save and resume for a position to mean the same."""
        return {"samples": len(self.dataset), "seed": self.seed, "batch_size": self.batch_size, "world_size": self.num_replicas}  # type: ignore[arg-type]

    def state_dict(self) -> dict[str, int]:
        """Epoch, pass and batches taken, with what the order depends on: integers only."""
        if self._resumed is not None:  # nothing was drawn since the resume
            return dict(self._resumed)
        begun = self._begun_epoch == self.epoch  # else a new epoch was announced and nothing of it was drawn
        return {"epoch": self.epoch, "repeat": self.repeat if begun else 0, "batches": self.batches if begun else 0, **self._identity()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on behind ``state`` when the next pass begins, unless ``set_epoch`` names another epoch before that."""
        missing = {"epoch", "repeat", "batches", *self._identity()} - set(state)
        if missing:
            raise ValueError(f"the state of the training loader lacks {sorted(missing)}: it wasn't saved by this kind of loader")
        self._resumed = {name: int(value) for name, value in state.items()}
        self.epoch = self._resumed["epoch"]


class ResumableLoader(DataLoader):
    """A ``DataLoader`` whose ``state_dict`` is the place in the epoch; Lightning saves and loads it with the fit loop.

    A pass begins with its first batch and not with ``iter()``, because Lightning calls ``iter()`` before it has told
    the sampler the epoch. Workers start at that moment. Batches count as taken when they are handed out, however many
    the workers have prepared. Make one with :func:`make_loader`.
    """

    @property
    def rank_sampler(self) -> RankSampler | None:
        """Our sampler; None where Lightning put in its own (``overfit_batches``), whose passes then start at the first sample."""
        sampler = getattr(self.batch_sampler, "sampler", self.sampler)  # Lightning's predict loop hides it in a batch sampler
        return sampler if isinstance(sampler, RankSampler) else None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Batches that are left of the pass."""
        sampler = self.rank_sampler
        if sampler is not None:
            sampler.begin_pass()
            # a generator of our own: torch draws the workers' seeds from the global one otherwise, at moments that a resume changes
            assert self.generator is not None
            words = np.random.SeedSequence([sampler.seed, sampler.pass_number, sampler.rank]).generate_state(2, np.uint32)
            self.generator.manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)
        for batch in super().__iter__():
            if sampler is not None:
                sampler.batches += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The sampler's state; empty where Lightning put in its own sampler."""
        return {} if self.rank_sampler is None else self.rank_sampler.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where ``state`` was saved."""
        if self.rank_sampler is not None and state:
            self.rank_sampler.load_state_dict(state)


def make_loader(
    dataset: Dataset,
    batch_size: int,
    *,
    shuffle: bool,
    seed: int,
    num_workers: int = 0,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    drop_last: bool = False,
    sampler: RankSampler | None = None,
    trainer: "Trainer | None" = None,
    rank: int | None = None,
    world_size: int | None = None,
    training: bool | None = None,
    with_epoch: bool = True,
    pin_memory: bool = False,
    persistent_workers: bool = False,
) -> ResumableLoader:
    """A resumable, rank-aware loader.

    For training on several ranks give ``drop_last=True``: all ranks then see the same number of batches of the same
    size, and W ranks equal one process that accumulates over W batches. For evaluation leave it False: every sample
    is seen once; ranks may differ by one batch, so log with ``on_epoch=True`` only.

    Args:
        dataset: Map-style; its ``__getitem__`` takes ``(epoch, index)`` (``index`` alone when ``with_epoch`` is
            False).
        batch_size: Samples per batch and rank, >= 1.
        shuffle: A new order for every epoch.
        seed: Seed of the order, >= 0, the same on all ranks.
        num_workers: Processes that read the data; 0 reads in this one. The batches are the same for any number.
        collate_fn: List of samples -> batch; None: torch's default.
        drop_last: Drop the samples behind the last full global batch.
        sampler: Draws in another way, with a batch size of its own; None: a :class:`RankSampler` of the arguments above.
        trainer: Its ``global_rank`` and ``world_size`` are used.
        rank: Instead of ``trainer``: the index of this process. None: asked of ``torch.distributed``.
        world_size: As ``rank``.
        training: Draws carry the epoch, so that augmentation varies; False: epoch 0 always. None: as ``shuffle``.
        with_epoch: False for data sets that take a plain index.
        pin_memory: Copy batches into page-locked memory (faster transfer to a GPU).
        persistent_workers: Keep the workers between epochs; needs ``num_workers`` >= 1.

    Returns:
        The loader. ``len()`` is the number of batches of a whole epoch on this rank, also after a resume.

    Raises:
        ValueError: No batch at all would come out, a training tail can't be dealt to all ranks, or an evaluation has fewer samples than
            there are processes.
    """
    if trainer is not None:
        rank, world_size = trainer.global_rank, trainer.world_size
    rank = distributed.rank() if rank is None else rank
    world_size = distributed.world_size() if world_size is None else world_size
    training = shuffle if training is None else training
    if sampler is None:
        sampler = RankSampler(
            dataset,  # type: ignore[arg-type]
            batch_size,
            rank=rank,
            world_size=world_size,
            shuffle=shuffle,
            seed=seed,
            drop_last=drop_last,
            counts_epochs=training,
            with_epoch=with_epoch,
        )
        samples, global_batch = len(dataset), world_size * batch_size  # type: ignore[arg-type]
        if samples == 0 or (drop_last and samples < global_batch):
            reason = f"a batch takes {batch_size} on each of {world_size} process(es)"
            way = (
                f"lower batch_size until a batch takes {samples // world_size} or fewer"
                if samples >= world_size
                else "use fewer processes (trainer.devices)"
            )
            raise ValueError(
                f"no batch comes out of {samples} samples, {reason}: {way if samples else 'look at why the data set is empty'}"
                f"{', or look at why the data set is so small' if samples else ''}"
            )
        if not drop_last and not training and 0 < samples < world_size:  # on all ranks alike, so that none waits for the others
            raise ValueError(
                f"{samples} samples of an evaluation can't be dealt to {world_size} processes, and one without any would keep the others "
                f"waiting: use {samples} processes or fewer (trainer.devices), or more samples"
            )
        if training and not drop_last and 0 < samples % global_batch < world_size:
            whole = samples >= global_batch
            raise ValueError(
                f"the last {samples % global_batch} of {samples} samples can't be dealt to all {world_size} ranks, and training would wait "
                f"forever: {'give make_loader drop_last=True, or ' if whole else ''}use fewer processes (trainer.devices), or more samples"
            )
    return ResumableLoader(
        dataset,
        batch_size=sampler.batch_size,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=collate_fn,
        drop_last=False,  # the sampler has dropped what is to be dropped
        pin_memory=pin_memory,
        persistent_workers=persistent_workers,
        generator=torch.Generator(),
    )
