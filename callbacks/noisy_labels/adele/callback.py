"""ADELE as a Callback: labels are corrected class by class once learning them slows down (arXiv:2110.03740).

The maths and its golden vectors: :mod:`lit_methods.callbacks.noisy_labels.adele.core`. The consistency over scales, which goes with it:
:mod:`lit_methods.callbacks.noisy_labels.adele.consistency`.
"""

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_methods.callbacks.batch import find_in_batch, logits_from, rescaled, resized
from lit_methods.callbacks.features import FeatureCallback, require_network
from lit_methods.callbacks.noisy_labels.adele.core import FittedCurve, corrected_labels, fit_iou_curve, merged_labels
from lit_methods.callbacks.noisy_labels.label_correction import LabelCorrection
from lit_methods.callbacks.wrapping import refuse_iterators
from lit_methods.catalog import Technique
from lit_methods.checks import at_least, one_of, positive, share, within
from lit_methods.datamodules.label_store import LabelStore
from lit_methods.distributed import rank, sum_over_ranks
from lit_methods.panels import Curve, ImageMedia, ImagePanel, Media, Panel, TableMedia, TablePanel
from lit_methods.steps import log_global
from lit_methods.tasks.segmentation.core import class_counts, iou_of_counts

TECHNIQUE = Technique(
    slug="adele",
    short="ADELE",
    title="Adaptive Early-Learning Correction for Segmentation from Noisy Annotations",
    arxiv="2110.03740",
    family="noisy_labels",
    form="callback",
    classes=(
        "lit_methods.callbacks.ADELE",
        "lit_methods.callbacks.MultiScaleConsistency",
        "lit_methods.datamodules.NoisyMasksDataModule",
    ),
    configs=("adele.yaml",),
    golden=("consistency_loss", "curve_fit", "label_update", "label_merge", "iou"),
    claim="On shapes with shifted training outlines, ADELE's corrected labels are nearer to the true masks than the given ones.",
    summary="Corrects noisy masks class by class once the network has stopped learning fast, with consistency over scales.",
)

Rule = Literal["images", "slices"]


class ADELE(LabelCorrection, FeatureCallback):
    """Corrects the labels of a class with confident predictions as soon as the growth of its training IoU has slowed down.

    In training the IoU of the predictions with the labels is tracked for each class. After each epoch a saturating curve is fitted to it,
    a (1 - exp(-x^b / c)); a class whose slope has fallen by the share ``threshold`` is corrected from then on. The training images are
    then predicted at several scales, and the labels changed by the rule ``images`` (weakly supervised pictures) or ``slices`` (slices of
    volumes).

    Runs: after each training batch, and at the end of an epoch; see
    :class:`~lit_methods.callbacks.noisy_labels.label_correction.LabelCorrection` for the store and the loader that it needs. Works with any
    number of ranks: counts are added up, images shared out.
    Saves: the histories, the counts of the unfinished window, the triggered classes, the labels of changed images.
    Refuses: modules without the submodule, steps that don't call it with the batch's images first, and batches without the labels that
    ``tracked`` names: ``label_original``, the annotations with the same augmentation as the labels.

    Args:
        num_classes: Number of classes, the background (0) included.
        network: Name of the submodule that maps images to logits (B, classes, ...).
        tracked: Key or position of the labels that are compared with predictions; the authors: the original ones for ``images``, the
            current ones for ``slices``.
        eval_interval: Batches between two entries of the history; None: one entry an epoch.
        threshold: r in 0 to 1, the share by which the slope has to fall.
        window: Epochs that the curve is searched through; a class that doesn't slow down within it isn't corrected within it.
        skip_flat_start: Leave out the flat beginning of a history (the authors' variant for ``slices``).
        common_epoch: Correct all classes after this number of epochs, whatever the histories say (ablation); None: each by its curve.
        every_n_epochs: Correct only after every n-th epoch.
        correct: False: track and measure, but change nothing (baseline).
        rule: ``images``: :func:`~lit_methods.callbacks.noisy_labels.adele.core.corrected_labels`; ``slices``:
            :func:`~lit_methods.callbacks.noisy_labels.adele.core.merged_labels`.
        confidence: A label is changed where the predicted probability exceeds it.
        background_confidence: The same for the background, by the rule ``slices``.
        scales: Factors of the images' sides; the logits of all sizes are averaged.
        flip_from_epoch: Average over mirrored images, too, after this number of epochs; None: never.
        temperature: Divides the averaged logits.
        restart: Every correction starts from the original labels.
        ignore_index: Label of pixels that don't count.
        class_names: Names of the classes, for the logs; None: their numbers.
        store: Store of the labels; None: the datamodule's ``label_store``.
        loader: Batches of the training images; None: the datamodule's ``correction_dataloader()``. Each of several ranks needs its own
            share, as from ``make_loader``.

    Raises:
        ValueError: A value lies outside its range.
    """

    panels: ClassVar[tuple[Panel, ...]] = (
        Curve(
            "Training IoU by class",
            ("adele/iou/*",),
            note="With the noisy labels. It rises fast, then slowly: that is where correction begins.",
        ),
        Curve(
            "Update epoch by class", ("adele/update_epoch/*",), note="The class is corrected from then on; one above the window: not yet."
        ),
        Curve(
            "Corrected pixels", ("adele/corrected",), note="Share of all training pixels. It should level off and not rise to all of them."
        ),
        Curve(
            "IoU of the labels",
            ("adele/label_iou", "adele/label_iou_original"),
            note="Against clean labels, where they are known.",
            goal="max",
        ),
        ImagePanel(
            "Corrected labels", "adele/corrections", note="Image, original label, current label, and the clean one where it is known."
        ),
        Curve("Corrected classes and images", ("adele/triggered", "adele/corrected_images")),
        TablePanel("Classes", "adele/classes"),
    )

    def __init__(
        self,
        num_classes: int,
        network: str = "network",
        tracked: str | int = "label_original",
        eval_interval: int | None = 100,
        threshold: float = 0.9,
        window: int = 15,
        skip_flat_start: bool = False,
        common_epoch: int | None = None,
        every_n_epochs: int = 1,
        correct: bool = True,
        rule: Rule = "images",
        confidence: float = 0.8,
        background_confidence: float = 0.95,
        scales: Sequence[float] = (0.75, 1.0, 1.5),
        flip_from_epoch: int | None = 9,
        temperature: float = 3.0,
        restart: bool = True,
        ignore_index: int = 255,
        class_names: Sequence[str] | None = None,
        store: LabelStore | None = None,
        loader: Iterable[Any] | None = None,
    ) -> None:
        super().__init__(store, loader, restart)
        self.targets = [network]
        at_least(2, "classes", num_classes=num_classes)
        at_least(1, window=window, every_n_epochs=every_n_epochs, eval_interval=eval_interval)
        within("(0, 1]", "a share", threshold=threshold)
        positive(temperature=temperature, **{f"scales[{k}]": scale for k, scale in enumerate(scales)})
        share(confidence=confidence, background_confidence=background_confidence)
        one_of(Rule, rule=rule)
        if not scales:
            raise ValueError("scales is empty: give at least one, such as [1.0]")
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(f"class_names has {len(class_names)} names, but num_classes={num_classes}")
        self.num_classes, self.network, self.tracked, self.eval_interval = num_classes, network, tracked, eval_interval
        self.threshold, self.window, self.skip_flat_start, self.common_epoch = threshold, window, skip_flat_start, common_epoch
        self.every_n_epochs, self.does_correct, self.rule = every_n_epochs, correct, rule
        self.confidence, self.background_confidence = confidence, background_confidence
        self.scales, self.flip_from_epoch, self.temperature = tuple(scales), flip_from_epoch, temperature
        self.ignore_index = ignore_index
        self.class_names = tuple(class_names or (str(c) for c in range(num_classes)))
        self.quality_classes = num_classes
        self._fresh()

    def _fresh(self) -> None:
        self.history: list[list[float]] = []  # entries of all classes
        self.counts = torch.zeros(3, self.num_classes, dtype=torch.int64)
        self.batches = 0
        self.triggered = [-1] * self.num_classes  # epochs after which a class was first corrected; -1: not yet
        self.update_epochs = [self.window + 1] * self.num_classes
        self._epoch_counts = torch.zeros(3, self.num_classes, dtype=torch.int64)
        self._iou_original: NDArray[np.float64] | None = None
        self._epoch = 0  # epochs done at the last correction

    # ---- tracking --------------------------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Hook into the module.

        Raises:
            ValueError: The submodule, the store or the loader isn't there, or ``training_step`` takes ``dataloader_iter``.
        """
        if stage == "fit":
            refuse_iterators(pl_module, "ADELE")
            if trainer.global_step == 0:
                self._fresh()
        super().setup(trainer, pl_module, stage)

    def hook_in(self, pl_module: pl.LightningModule) -> None:
        """Hook into the module, if it has the network."""
        require_network(pl_module, self.network, "ADELE")
        super().hook_in(pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count where the labels are."""
        self.counts, self._epoch_counts = self.counts.to(pl_module.device), self._epoch_counts.to(pl_module.device)

    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Compare the predictions of this step with the tracked labels.

        Raises:
            ValueError: The step didn't call the network, or the batch has no such labels.
        """
        calls = self._capture.calls[self.network]
        if not calls:
            raise ValueError(f"ADELE: training_step didn't call network={self.network!r}: name a submodule that it calls")
        needed = "ADELE compares predictions with the original annotations, which the data set returns with the same augmentation"
        labels = find_in_batch(batch, self.tracked, ("", 0), "tracked", needed)
        logits = logits_from(calls[0], f"network={self.network!r}")[: len(labels)].detach()
        prediction = resized(logits.float(), labels.shape[1:]).argmax(dim=1)
        counts = class_counts(prediction, labels, self.num_classes, self.ignore_index)
        self.counts += counts
        self._epoch_counts += counts
        self.batches += 1
        if self.eval_interval is not None and self.batches >= self.eval_interval:
            self._append()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def _append(self) -> None:
        self.history.append(iou_of_counts(sum_over_ranks(self.counts)).tolist())
        self.counts.zero_()
        self.batches = 0

    # ---- when ------------------------------------------------------------------------------------------------------------------------

    def fitted(self, trainer: pl.Trainer, index: int) -> FittedCurve | None:
        """The curve of a class."""
        iterations = float(trainer.num_training_batches)
        interval = iterations if self.eval_interval is None else float(self.eval_interval)
        history = [entry[index] for entry in self.history]
        return fit_iou_curve(history, interval, iterations, self.threshold, self.window, self.skip_flat_start)

    def wants(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        """Whether a class is due; the histories are the same on all ranks, and so are the fits of one machine."""
        passed = trainer.current_epoch + 1
        for c in range(1, self.num_classes):
            if self.triggered[c] >= 0:
                continue
            if self.common_epoch is not None:
                self.update_epochs[c] = self.common_epoch
            else:
                curve = self.fitted(trainer, c)
                self.update_epochs[c] = self.window + 1 if curve is None else curve.update_epoch
            # a class that hasn't slowed down within the window is not corrected because the window is over
            never = self.common_epoch is None and self.update_epochs[c] > self.window
            if passed >= self.update_epochs[c] and not never:
                self.triggered[c] = passed
        return self.does_correct and max(self.triggered) >= 0 and passed % self.every_n_epochs == 0

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fit, trigger, correct, log."""
        if self.eval_interval is None:
            self._append()
        due = self.wants(trainer, pl_module)
        if trainer.world_size > 1:  # least squares may end a rounding error apart on unlike machines
            due, self.triggered, self.update_epochs = trainer.strategy.broadcast((due, self.triggered, self.update_epochs))
        assert self.store is not None
        if self._iou_original is None:
            self._iou_original = self.quality(self.store.original)
        logs: dict[str, float] = {"triggered": float(sum(epoch >= 0 for epoch in self.triggered))}
        if due:
            self._epoch = trainer.current_epoch + 1
            done = self.correct(trainer, pl_module)
            logs |= {"corrected": done.changed, "corrected_images": float(done.images)}
        iou = done.iou if due else self.quality(self.store.current)
        if iou is not None and self._iou_original is not None:
            logs |= {"label_iou": float(iou.mean()), "label_iou_original": float(self._iou_original.mean())}
        total = iou_of_counts(sum_over_ranks(self._epoch_counts)).tolist()
        self._epoch_counts.zero_()
        for c in range(1, self.num_classes):
            logs |= {f"iou/{self.class_names[c]}": total[c], f"update_epoch/{self.class_names[c]}": float(self.update_epochs[c])}
        log_global(pl_module, {f"adele/{name}": value for name, value in logs.items()})

    # ---- how -------------------------------------------------------------------------------------------------------------------------

    def predict(self, trainer: pl.Trainer, pl_module: pl.LightningModule, images: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, C, H, W) probabilities from the mean of the logits of all scales."""
        network = pl_module.get_submodule(self.network)
        flips = (False, True) if self.flip_from_epoch is not None and self._epoch >= self.flip_from_epoch else (False,)
        parts = []
        for scaled in (rescaled(images, scale) for scale in self.scales):
            for flip in flips:
                logits = logits_from(network(scaled.flip(-1) if flip else scaled), f"network={self.network!r}").float()
                parts.append(resized(logits.flip(-1) if flip else logits, size))
        return (torch.stack(parts).mean(0) / self.temperature).softmax(dim=1)

    def corrected(self, labels: Tensor, predicted: Tensor) -> Tensor:
        """New labels by the rule."""
        classes = [c for c in range(1, self.num_classes) if self.triggered[c] >= 0]
        if self.rule == "slices":
            due = torch.zeros(predicted.shape[1], dtype=torch.int64, device=predicted.device)
            due[classes] = 1
            return merged_labels(labels, predicted, due, self.confidence, self.background_confidence)
        best = predicted.max(dim=1)
        return corrected_labels(labels, best.indices, best.values, [0, *classes], self.confidence, self.ignore_index)

    # ---- pictures --------------------------------------------------------------------------------------------------------------------

    def dashboard_media(self) -> dict[str, Media]:
        """Examples of corrected labels, or of labels as they are before the first correction, and the classes' epochs."""
        from lit_methods.tasks.segmentation.module import colour_labels, grey_image

        if self.store is None:
            return {}
        clean = getattr(self.datamodule, "clean_labels", None)
        shown = (self.store.changed() or list(range(len(self.store))))[:8]
        rows = tuple(
            (self.class_names[c], self.update_epochs[c], self.triggered[c] if self.triggered[c] >= 0 else None)
            for c in range(1, self.num_classes)
        )
        media: dict[str, Media] = {"adele/classes": TableMedia(("class", "update epoch", "corrected after epoch"), rows)}
        shown = [i for i in shown if self.store.shape(i) == self.store.shape(shown[0])]
        columns: list[NDArray[np.uint8]] = []
        for i in shown:
            parts = [colour_labels(self.store.original(i)), colour_labels(self.store.current(i))]
            if clean is not None:
                parts.append(colour_labels(np.asarray(clean(i))))
            image = getattr(self.datamodule, "training_image", None)
            if image is not None:
                parts.insert(0, grey_image(resized(image(i)[None], self.store.shape(i))[0]))
            columns.append(np.concatenate(parts, axis=0))
        if columns:
            zoom = max(1, 96 // columns[0].shape[1])
            picture = np.concatenate(columns, axis=1).repeat(zoom, axis=0).repeat(zoom, axis=1)
            alt = "Training images with corrected labels; from top: image, original label, corrected label, and the clean one where known"
            media["adele/corrections"] = ImageMedia(picture, alt)
        return media

    # ---- state -----------------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Histories, counts, epochs and corrected labels."""
        return super().state_dict() | {
            "history": [list(entry) for entry in self.history],
            "counts": sum_over_ranks(self.counts).cpu(),  # each rank has its own, and only rank 0's checkpoint is written
            "epoch_counts": sum_over_ranks(self._epoch_counts).cpu(),
            "batches": self.batches,
            "triggered": list(self.triggered),
            "update_epochs": list(self.update_epochs),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with them; the counts of all ranks are rank 0's from now on."""
        super().load_state_dict(state_dict)
        self.history = [list(entry) for entry in state_dict["history"]]
        share = int(rank() == 0)
        self.counts, self._epoch_counts = state_dict["counts"] * share, state_dict["epoch_counts"] * share
        self.batches = state_dict["batches"]
        self.triggered, self.update_epochs = list(state_dict["triggered"]), list(state_dict["update_epochs"])


__all__ = ["ADELE"]
