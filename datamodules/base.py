"""What all datamodules share: data sets whose samples follow from epoch and index, and the loaders around them.

A datamodule is its reading: its paths go through :func:`~lit_methods.datamodules.folders.data_path`, ``check_root`` looks whether the
data set is there, ``setup`` fills ``train_set``, ``val_set`` and ``test_set``, and :class:`LoaderDataModule` does the rest.
"""

from collections.abc import Sequence, Sized
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from lit_methods.checks import at_least
from lit_methods.datamodules.errors import WrongRootError
from lit_methods.datamodules.loaders import make_loader

Ints = NDArray[np.int64]
Draw = int | tuple[int, int]  # an index, which means epoch 0, or (epoch, index)


class Samples(Dataset[Any]):
    """Samples that follow from epoch and index alone; subclasses write :meth:`at` and ``__len__``.

    ``dataset[index]`` is the sample of epoch 0, so that a plain ``DataLoader`` works; the loaders of this package ask for
    ``dataset[epoch, index]``.

    Attributes:
        collate: List of samples -> batch; None: torch's default.
        batch_size: Samples in a batch, for data sets that allow one number alone; None: what the datamodule says.
    """

    collate: Any = None
    batch_size: int | None = None

    def at(self, epoch: int, index: int) -> Any:
        """The sample ``index``, 0 <= index < len(self), as ``epoch`` sees it."""
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, draw: Draw) -> Any:
        epoch, index = draw if isinstance(draw, tuple) else (0, draw)
        length = len(self)
        if not -length <= index < length:
            raise IndexError(f"index {index} of a data set of {length} samples")
        return self.at(epoch, index % length)


def whole_batch(found: Any) -> Any:
    """The batch that a :class:`Batches` data set has put together; samples of a sampler without epochs are stacked."""
    return default_collate(found) if isinstance(found, list) else found


class Batches(Samples):
    """Samples that are fetched a batch at a time; subclasses write :meth:`batch` and ``__len__``."""

    collate = staticmethod(whole_batch)

    def batch(self, epochs: Ints, index: Ints) -> dict[str, Tensor]:
        """The batch of some samples, epochs and indices (B,) int64. The epoch is one, but where a batch is put together by hand."""
        raise NotImplementedError

    def at(self, epoch: int, index: int) -> dict[str, Tensor]:
        """One sample, without the dimension of the batch."""
        return {name: values[0] for name, values in self.batch(np.array([epoch]), np.array([index])).items()}

    def __getitems__(self, draws: Sequence[Any]) -> Any:
        """The batch of some (epoch, index). A plain ``DataLoader`` has indices alone and wants the list of samples."""
        if not isinstance(draws[0], tuple):
            return [self[index] for index in draws]
        epochs, index = np.array(draws, dtype=np.int64).T
        return self.batch(epochs, index)


def _only(found: list[Any]) -> Any:
    return found[0]


class Whole(Samples):
    """One batch, again and again: each sample is all of it, in the same order.

    Args:
        batch: All data.
        times: Samples, which are the iterations of an epoch.
    """

    collate = staticmethod(_only)
    batch_size = 1

    def __init__(self, batch: dict[str, Tensor], times: int) -> None:
        self._batch, self._times = batch, times

    def __len__(self) -> int:
        return self._times

    def at(self, epoch: int, index: int) -> dict[str, Tensor]:
        """All of it."""
        return dict(self._batch)


class LoaderDataModule(pl.LightningDataModule):
    """Base of the datamodules: ``setup`` of a subclass reads the data, the loaders of all parts are made here.

    Loaders are resumable and deal the same global batches to any number of ranks. Training is shuffled, and a last incomplete batch is
    dropped unless it is the only one. Evaluation is in order, every sample once, never augmented.

    Args:
        batch_size: Samples per process and training step.
        eval_batch_size: Samples per process and evaluation step; None: ``batch_size``.
        num_workers: Processes that read data.
        seed: Seed of the order and the augmentation.

    Attributes:
        train_set: Training data after ``setup``. Here and below None: not read, or the root has no such part.
        val_set: Validation data, or a list of data sets that each get a loader.
        test_set: Test data, or a list.
        predict_set: Data that ``lit predict`` sees, or a list; None: ``test_set``.

    Raises:
        ValueError: A number lies outside its range.
    """

    train_set: Any = None
    val_set: Any = None
    test_set: Any = None
    predict_set: Any = None
    keep_workers = True  # between epochs

    def __init__(self, *, batch_size: int, num_workers: int, seed: int, eval_batch_size: int | None = None) -> None:
        super().__init__()
        at_least(1, batch_size=batch_size, eval_batch_size=eval_batch_size)
        at_least(0, num_workers=num_workers, seed=seed)
        # not read from hparams: below another datamodule Lightning puts that one's there
        self.batch_size, self.eval_batch_size = batch_size, batch_size if eval_batch_size is None else eval_batch_size
        self.num_workers, self.seed = num_workers, seed

    @property
    def hparams_initial(self) -> Any:
        """The arguments as loggers get them: without those that the module in the same trainer has under the same name with another value.

        Module and data may well have two seeds. Lightning ends a run where it finds that; what the loggers then say is the module's.
        """
        found = super().hparams_initial
        module = self.trainer.lightning_module if self.trainer is not None else None
        theirs = {} if module is None else module.hparams_initial
        for name in found.keys() & theirs.keys():
            if name != "_class_path" and (type(found[name]) is not type(theirs[name]) or found[name] != theirs[name]):
                del found[name]
        return found

    def loader(self, dataset: Any, batch_size: int | None = None, *, training: bool = False, **options: Any) -> Any:
        """A loader with this datamodule's settings.

        Args:
            dataset: Data set that takes ``(epoch, index)``.
            batch_size: Samples per process and step; None: that of training or evaluation.
            training: Shuffled, with another order and augmentation in every epoch; False: in order, as in epoch 0.
            **options: Arguments of :func:`~lit_methods.datamodules.loaders.make_loader` that differ from the usual.
        """
        assert isinstance(dataset, Sized)
        size = getattr(dataset, "batch_size", None) or batch_size or (self.batch_size if training else self.eval_batch_size)
        world_size = self.trainer.world_size if self.trainer is not None else 1
        usual: dict[str, Any] = {
            "collate_fn": getattr(dataset, "collate", None),
            "drop_last": training and len(dataset) >= size * world_size,
            "pin_memory": torch.cuda.is_available(),
            "persistent_workers": self.keep_workers and self.num_workers > 0,
        }
        return make_loader(
            dataset,  # type: ignore[arg-type]
            size,
            shuffle=training,
            training=training,
            seed=self.seed,
            num_workers=self.num_workers,
            trainer=self.trainer,
            **(usual | options),
        )

    def check_root(self, stage: str = "fit") -> None:
        """Say what :meth:`setup` would say of a root that isn't there or isn't the data set, without reading data.

        Called before a model is built. Without ``root``, and for built-in data, there is nothing to say.

        Args:
            stage: ``fit``, ``validate``, ``test`` or ``predict``.

        Raises:
            WrongRootError: As ``setup``.
        """

    def expect(self, name: str, way: str, built_in: str = "images") -> None:
        """Raise if a root is given and lacks a file or folder that the data set has.

        Args:
            name: Its path below the root.
            way: What to put there, and from where.
            built_in: What is read without a root.

        Raises:
            WrongRootError: It isn't there.
        """
        root: Path | None = getattr(self, "root", None)
        if root is not None and not (root / name).exists():
            raise WrongRootError(f"root={str(root)!r} has no {name}: {way}, or set root=null for the built-in {built_in}")

    def data_of(self, name: str) -> Any:
        """The data of ``train``, ``val``, ``test`` or ``predict``.

        Raises:
            RuntimeError: ``setup`` hasn't read it.
        """
        found = getattr(self, f"{name}_set")
        if found is None:
            read = any(getattr(self, f"{other}_set") is not None for other in ("train", "val", "test", "predict"))
            none = f"root={str(getattr(self, 'root', None))!r} has none, or setup() was called for another stage"
            reason = none if read else "call setup() first (the Trainer does)"
            raise RuntimeError(f"{type(self).__name__} has no {name} data: {reason}")
        return found

    def _evaluation(self, name: str) -> Any:
        found = self.data_of(name)
        return [self.loader(dataset) for dataset in found] if isinstance(found, list) else self.loader(found)

    def train_dataloader(self) -> Any:
        """Shuffled, resumable; a last incomplete batch is dropped unless it is the only one."""
        return self.loader(self.data_of("train"), training=True)

    def whole_loader(self, part: str = "train") -> Any:
        """A loader of a :class:`Whole` data set, the same on every rank."""
        return make_loader(
            self.data_of(part),
            1,
            shuffle=False,
            training=part == "train",
            seed=self.seed,
            num_workers=self.num_workers,
            collate_fn=_only,
            rank=0,
            world_size=1,
            pin_memory=torch.cuda.is_available(),
        )

    def val_dataloader(self) -> Any:
        """In order, every sample once, never augmented."""
        return self._evaluation("val")

    def test_dataloader(self) -> Any:
        """In order, every sample once, never augmented."""
        return self._evaluation("test")

    def predict_dataloader(self) -> Any:
        """The samples of ``predict_set``, else those of the test."""
        return self._evaluation("test" if self.predict_set is None else "predict")


__all__ = ["Batches", "Draw", "LoaderDataModule", "Samples", "whole_batch"]
