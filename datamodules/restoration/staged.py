"""A loader that takes each batch from the data set of the training's stage."""

from collections.abc import Iterator, Sequence
from typing import Any

from lit_methods.datamodules.loaders import ResumableLoader


class StagedLoader:
    """Batches of several loaders, each from that of the stage at the moment when it is asked for.

    A loader that comes to its end within an epoch begins anew, in another order. Place and order are those of
    :class:`~lit_methods.datamodules.loaders.ResumableLoader`, so a resumed run goes on with the very next batch of each. Lightning fetches
    a batch when the one before is done with, since the length is known: the stage is never that of an earlier step.

    Args:
        loaders: One for each stage, from 0.

    Attributes:
        stage: Number of a loader; ``len(loaders)`` takes them in turn.
    """

    def __init__(self, loaders: Sequence[ResumableLoader]) -> None:
        self.loaders, self.stage, self.taken = list(loaders), 0, 0
        self._resumed: int | None = None

    def __len__(self) -> int:
        """Batches of an epoch: those of the first loader."""
        return len(self.loaders[0])

    @property
    def batch_size(self) -> int | None:
        """Samples of a batch, which are as many in all loaders."""
        return self.loaders[0].batch_size

    @property
    def sampler(self) -> "StagedLoader":
        """Where Lightning announces the epoch."""
        return self

    @property
    def iterables(self) -> list[ResumableLoader]:
        """The loaders, under the name of Lightning's ``CombinedLoader``."""
        return self.loaders

    def set_epoch(self, epoch: int) -> None:
        """Hand the epoch on to all loaders."""
        for loader in self.loaders:
            if loader.rank_sampler is not None:
                loader.rank_sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        """Batches that are left of the epoch."""
        self.taken, self._resumed = self._resumed or 0, None
        running: dict[int, Iterator[Any]] = {}
        while self.taken < len(self):
            stage = self.stage if self.stage < len(self.loaders) else self.taken % len(self.loaders)
            if stage not in running:
                running[stage] = iter(self.loaders[stage])
            try:
                batch = next(running[stage])
            except StopIteration:
                running[stage] = iter(self.loaders[stage])
                batch = next(running[stage])
            self.taken += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Batches taken, and the place of each loader."""
        taken = self._resumed if self._resumed is not None else self.taken
        return {"taken": taken % len(self), "loaders": [loader.state_dict() for loader in self.loaders]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was saved.

        Raises:
            ValueError: It is of another number of loaders.
        """
        if len(state.get("loaders", ())) != len(self.loaders):
            raise ValueError("the state of the training loader is of other data: resume with the same data sets")
        self._resumed = int(state["taken"])
        for loader, place in zip(self.loaders, state["loaders"], strict=True):
            loader.load_state_dict(place)


__all__ = ["StagedLoader"]
