"""Base of the techniques that change training labels: predict the training images, write the store, go on."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from numpy.typing import NDArray
from torch import Tensor

from lit_methods.callbacks.ordering import OrderedCallback
from lit_methods.callbacks.twin import evaluating, observed
from lit_methods.datamodules.label_store import LabelStore
from lit_methods.distributed import rank, sum_over_ranks
from lit_methods.tasks.segmentation.core import class_counts, iou_of_counts


class Correction(NamedTuple):
    """What a pass over the training images did, over all ranks.

    Attributes:
        changed: Share of all pixels whose label isn't the original one.
        images: Number of images with such a pixel.
        iou: (C,) of the labels now, against clean ones; None without clean ones.
    """

    changed: float
    images: int
    iou: NDArray[np.float64] | None


class LabelCorrection(OrderedCallback):
    """Corrects labels at the end of training epochs. Subclass it: :meth:`wants` says when, :meth:`predict` and :meth:`corrected` how.

    It needs a :class:`~lit_methods.LabelStore`, from which the data set reads its labels (``store.current(index)``), and a loader of the
    training images as they are, without augmentation, in batches ``{"image": (B, C, H, W), "index": (B,)}``. Both are taken from the
    datamodule, ``label_store`` and ``correction_dataloader()``, or given here. Where the datamodule has ``clean_labels(index) -> (H, W)``,
    the quality of the labels is measured, too.

    Runs: at the end of a training epoch, before checkpoints are saved. The images are shared out over ranks, and each writes its own.
    Saves: the current labels of all changed images, compressed. A fresh run starts from the original labels, a resumed one from those of
    the checkpoint, whatever the store holds, and with any number of workers or ranks.
    Refuses: runs without a store or a loader, and batches whose images have labels of several sizes.

    Args:
        store: Store of the labels; None: ``trainer.datamodule.label_store``.
        loader: Batches of the training images; None: ``trainer.datamodule.correction_dataloader()``, asked for anew at each pass.
        restart: Every correction starts from the original labels; False: from the current ones, so that errors can add up.

    Attributes:
        quality_classes: Classes whose quality is measured.
        ignore_index: Label that quality leaves out.
    """

    quality_classes = 256
    ignore_index = 255

    def __init__(self, store: LabelStore | None = None, loader: Iterable[Any] | None = None, restart: bool = True) -> None:
        super().__init__()
        self.given_store, self.given_loader, self.restart = store, loader, restart
        self.store: LabelStore | None = None
        self.datamodule: Any = None
        self._saved: dict[str, Any] | None = None

    # ---- what a subclass says --------------------------------------------------------------------------------------------------------

    def wants(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        """Whether labels are corrected after this epoch; called on all ranks, which must agree."""
        raise NotImplementedError(f"{type(self).__name__} must define wants(self, trainer, pl_module)")

    def predict(self, trainer: pl.Trainer, pl_module: pl.LightningModule, images: Tensor, size: tuple[int, int]) -> Any:
        """What is predicted for images (B, C, h, w) whose labels have ``size``; in evaluation mode, without gradients.

        ``pl_module`` is a copy that shares the module's weights, so that nothing else in the module changes.
        """
        raise NotImplementedError(f"{type(self).__name__} must define predict(self, trainer, pl_module, images, size)")

    def corrected(self, labels: Tensor, predicted: Any) -> Tensor:
        """New labels (B, H, W) from the labels and what :meth:`predict` returned."""
        raise NotImplementedError(f"{type(self).__name__} must define corrected(self, labels, predicted)")

    # ---- the pass --------------------------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find store and loader.

        Raises:
            ValueError: One of them isn't there.
        """
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self.datamodule = getattr(trainer, "datamodule", None)
        self.store = self.given_store or getattr(self.datamodule, "label_store", None)
        who = type(self).__name__
        if self.store is None:
            raise ValueError(
                f"{who} changes labels, and there is no label store: make one with lit_methods.LabelStore.create(folder, labels), let the "
                f"data set return store.current(index) as its labels, and give {who}(store=...) or datamodule.label_store"
            )
        if self.given_loader is None and not hasattr(self.datamodule, "correction_dataloader"):
            raise ValueError(
                f"{who} predicts the training images as they are: give {who}(loader=...), batches with 'image' and 'index' and without "
                "augmentation, or a datamodule with correction_dataloader()"
            )
        if trainer.global_step == 0:
            self._saved = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the store where the run is: at the original labels, or at the checkpoint's."""
        assert self.store is not None
        if trainer.is_global_zero:
            if self._saved is not None:
                self.store.load_state_dict(self._saved)
            elif trainer.global_step == 0:
                self.store.reset()
        self._saved = None
        trainer.strategy.barrier("label store")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Correct, if it is time."""
        if self.wants(trainer, pl_module):
            self.correct(trainer, pl_module)

    def correct(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Correction:
        """One pass over the training images; called on all ranks."""
        store = self.store
        assert store is not None
        if trainer.is_global_zero:
            store.clear_next()
        trainer.strategy.barrier("label correction begins")
        changed = torch.zeros(3, dtype=torch.int64)  # changed pixels, images with one, pixels of this rank's images
        loader = self.datamodule.correction_dataloader() if self.given_loader is None else self.given_loader
        on_cuda = pl_module.device.type == "cuda"
        with evaluating(pl_module), isolate_rng(on_cuda), store.writer(rank()) as writer:
            twin = observed(trainer, pl_module, type(self).__name__)
            for batch in loader:
                for i, new in self.relabelled(trainer, twin, batch):
                    different = int((new != store.original(i)).sum())
                    changed += torch.tensor([different, int(different > 0), new.size])
                    if different or not self.restart:
                        writer.write(i, new)
        trainer.strategy.barrier("label correction ends")
        if trainer.is_global_zero:
            store.publish(() if self.restart else store.changed())
        trainer.strategy.barrier("labels are corrected")
        pixels, images, seen = sum_over_ranks(changed).tolist()
        return Correction(pixels / max(seen, 1), images, self.quality(store.current))

    def relabelled(self, trainer: pl.Trainer, twin: pl.LightningModule, batch: Any) -> Iterable[tuple[int, NDArray[Any]]]:
        """Indices and new labels of a batch of the loader; ``twin`` is what :meth:`predict` gets."""
        store = self.store
        assert store is not None
        if not isinstance(batch, dict) or not {"image", "index"} <= set(batch):
            raise ValueError(f"{type(self).__name__} needs batches with 'image' and 'index' from its loader, got {_described(batch)}")
        index = [int(i) for i in batch["index"]]
        sizes = {store.shape(i) for i in index}
        if len(sizes) > 1:
            raise ValueError(f"the labels of images {index} have the sizes {sorted(sizes)}: let the loader put images of one size together")
        (size,) = sizes
        source = [store.original(i) if self.restart else store.current(i) for i in index]
        labels = torch.from_numpy(np.stack(source).astype(np.int64)).to(twin.device)
        with trainer.precision_plugin.forward_context():
            predicted = self.predict(trainer, twin, batch["image"].to(twin.device), size)
        return zip(index, self.corrected(labels, predicted).cpu().numpy(), strict=True)

    def quality(self, labels: Callable[[int], Any]) -> NDArray[np.float64] | None:
        """(C,) IoU of all images' labels against clean ones, on every rank alike; None where the datamodule has no clean ones.

        Args:
            labels: Index of an image -> its labels (H, W): ``store.current`` or ``store.original``.
        """
        clean = getattr(self.datamodule, "clean_labels", None)
        if clean is None:
            return None
        assert self.store is not None
        counts = torch.zeros(3, self.quality_classes, dtype=torch.int64)
        for i in range(len(self.store)):
            ours, truth = (torch.from_numpy(np.asarray(part).astype(np.int64)) for part in (labels(i), clean(i)))
            counts += class_counts(ours, truth, self.quality_classes, self.ignore_index)
        return iou_of_counts(counts).numpy()

    def state_dict(self) -> dict[str, Any]:
        """The corrected labels."""
        return {"labels": self.store.state_dict()} if self.store is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep them until training starts."""
        self._saved = state_dict.get("labels")


def _described(batch: Any) -> str:
    return f"the keys {list(batch)}" if isinstance(batch, dict) else type(batch).__name__


__all__ = ["Correction", "LabelCorrection"]
