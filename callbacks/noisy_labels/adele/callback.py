"""ADELE as Callbacks: labels corrected class by class once learning them slows down, and consistency over scales (arXiv:2110.03740).

The maths and its golden vectors: :mod:`lit_methods.callbacks.noisy_labels.adele.core`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lit_methods.callbacks.batch import find_in_batch, logits_from, resized, rows_of_calls
from lit_methods.callbacks.features import FeatureCapture
from lit_methods.callbacks.loss_term import LossTerm
from lit_methods.callbacks.noisy_labels.adele.core import (
    FittedCurve,
    corrected_labels,
    fit_iou_curve,
    merged_labels,
    multiscale_consistency,
)
from lit_methods.callbacks.noisy_labels.label_correction import LabelCorrection
from lit_methods.catalog import Technique
from lit_methods.datamodules.label_store import LabelStore
from lit_methods.distributed import gather_rows, rank
from lit_methods.panels import Curve, ImageMedia, ImagePanel, Media, Panel, TableMedia, TablePanel
from lit_methods.tasks.segmentation.core import class_counts, iou_of_counts

TECHNIQUE = Technique(
    slug="adele",
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


def _require_network(pl_module: pl.LightningModule, network: str, who: str) -> None:
    names = dict(pl_module.named_modules())
    if network not in names:
        known = ", ".join(name for name in names if name and name.count(".") < 2)
        raise ValueError(
            f"{who}: network={network!r} is no submodule of {type(pl_module).__name__}: name the one that maps images to logits; "
            f"there are {known}"
        )


class _Predicted(NamedTuple):
    """(B, C, H, W) probabilities."""

    probabilities: Tensor


class ADELE(LabelCorrection):
    """Corrects the labels of a class with confident predictions as soon as the growth of its training IoU has slowed down.

    In training the IoU of the predictions with the labels is tracked for each class. After each epoch a saturating curve is fitted to it; a
    class whose slope has fallen by the share ``threshold`` is corrected from then on. The training images are then predicted at several
    scales, and the labels changed by the rule ``images`` (weakly supervised pictures) or ``slices`` (slices of volumes).

    Needs: a submodule ``network`` that maps images to (B, classes, ...) logits and that ``training_step`` calls with the batch's images
    first; in the batch ``label_original``, the annotations with the same augmentation as the labels, or ``tracked: label``; a label store
    and a loader of the training images, see :class:`~lit_methods.callbacks.noisy_labels.label_correction.LabelCorrection`.
    Logs after an epoch: ``adele/iou/<class>`` and ``adele/update_epoch/<class>`` of the foreground; ``adele/triggered``, their number;
    after a correction ``adele/corrected``, the share of all pixels with another label than the original; where clean labels are known,
    ``adele/label_iou``, mean over classes, and ``adele/label_iou_original``.
    Saves: the histories, the counts of the unfinished window, the triggered classes, the labels of changed images. Works with any number of
    ranks: counts are added up, images shared out.

    Args:
        num_classes: The background, 0, counted.
        network: Name of the submodule whose output is the logits.
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
        background_confidence: Of ``slices``, for the background.
        scales: Of the images, whose logits are averaged.
        flip_from_epoch: Average over mirrored images, too, after this number of epochs; None: never.
        temperature: Divides the averaged logits.
        restart: Every correction starts from the original labels.
        ignore_index: Label of pixels that don't count.
        class_names: None: numbers.
        store: None: the datamodule's ``label_store``.
        loader: None: the datamodule's ``correction_dataloader()``. Of several ranks each needs its own share, as from ``make_loader``.

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
        if num_classes < 2 or not 0 < threshold <= 1 or window < 1 or every_n_epochs < 1 or temperature <= 0:
            raise ValueError(
                f"num_classes={num_classes} must be 2 or more, threshold={threshold} in 0 to 1, window={window} and "
                f"every_n_epochs={every_n_epochs} 1 or more, temperature={temperature} above 0"
            )
        if rule not in ("images", "slices"):
            raise ValueError(f"rule={rule!r}: give images or slices")
        if not scales or min(scales) <= 0 or not 0 <= confidence <= 1 or not 0 <= background_confidence <= 1:
            raise ValueError(
                f"scales={list(scales)} must be above 0, and confidence={confidence} and "
                f"background_confidence={background_confidence} in 0 to 1"
            )
        if eval_interval is not None and eval_interval < 1:
            raise ValueError(f"eval_interval={eval_interval}: give 1 or more batches, or null for one entry an epoch")
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
        self._features: FeatureCapture | None = None
        self._datamodule: Any = None
        self._fresh()

    def _fresh(self) -> None:
        self.history: list[list[float]] = []  # entries of all classes
        self.counts = torch.zeros(3, self.num_classes, dtype=torch.int64)
        self.batches = 0
        self.triggered = [-1] * self.num_classes  # epochs after which a class was first corrected; -1: not yet
        self.update_epochs = [self.window + 1] * self.num_classes
        self._epoch_counts = torch.zeros(3, self.num_classes, dtype=torch.int64)
        self._iou_original: float | None = None
        self._epoch = 0  # epochs done at the last correction

    # ---- tracking --------------------------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Hook into the module.

        Raises:
            ValueError: The submodule, the store or the loader isn't there.
        """
        if stage == "fit":
            _require_network(pl_module, self.network, "ADELE")
            if trainer.global_step == 0:
                self._fresh()
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._undo()
            self._datamodule = getattr(trainer, "datamodule", None)
            self._features = FeatureCapture(pl_module, [self.network], active=False)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count where the labels are."""
        self.counts, self._epoch_counts = self.counts.to(pl_module.device), self._epoch_counts.to(pl_module.device)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin to keep the logits."""
        assert self._features is not None
        self._features.clear()
        self._features.resume()

    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Compare the predictions of this step with the tracked labels.

        Raises:
            ValueError: The step didn't call the network, or the batch has no such labels.
        """
        assert self._features is not None
        calls = self._features.calls[self.network]
        self._features.pause()
        if not calls:
            raise ValueError(f"ADELE: training_step didn't call network={self.network!r}: name a submodule that it calls")
        there = self.tracked in batch if isinstance(batch, Mapping) else isinstance(self.tracked, int) and self.tracked < len(batch)
        if not there:
            held = f"the keys {list(batch)}" if isinstance(batch, Mapping) else f"{len(batch)} parts"
            raise ValueError(
                f"ADELE compares predictions with tracked={self.tracked!r}, and the batch has {held}: let the data set return the original "
                "annotations with the same augmentation, or set tracked to the labels that are there"
            )
        labels = find_in_batch(batch, self.tracked, ("", 0), "tracked")
        logits = logits_from(calls[0], f"network={self.network!r}")[: len(labels)].detach()
        self._features.clear()
        prediction = resized(logits.float(), labels.shape[1:]).argmax(dim=1)
        found = class_counts(prediction, labels, self.num_classes, self.ignore_index)
        self.counts += found
        self._epoch_counts += found
        self.batches += 1
        if self.eval_interval is not None and self.batches >= self.eval_interval:
            self._append()

    def _append(self) -> None:
        total = gather_rows(self.counts[None], with_grad=False).sum(0)
        self.history.append([float(value) for value in iou_of_counts(total).cpu()])
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
        clean = getattr(getattr(trainer, "datamodule", None), "clean_labels", None)
        if clean is not None and self._iou_original is None:
            self._iou_original = self._original_quality(clean)
        logs: dict[str, float] = {"triggered": float(sum(epoch >= 0 for epoch in self.triggered))}
        iou = None
        if due:
            self._epoch = trainer.current_epoch + 1
            done = self.correct(trainer, pl_module)
            logs |= {"corrected": done.changed, "corrected_images": float(done.images)}
            iou = None if done.iou is None else float(done.iou.mean())
        elif clean is not None:
            iou = float(self.quality(clean).mean())
        if iou is not None and self._iou_original is not None:
            logs |= {"label_iou": iou, "label_iou_original": self._iou_original}
        total = iou_of_counts(gather_rows(self._epoch_counts[None], with_grad=False).sum(0)).tolist()
        self._epoch_counts.zero_()
        for c in range(1, self.num_classes):
            logs |= {f"iou/{self.class_names[c]}": total[c], f"update_epoch/{self.class_names[c]}": float(self.update_epochs[c])}
        pl_module.log_dict({f"adele/{name}": value for name, value in logs.items()})

    def _original_quality(self, clean: Any) -> float:
        assert self.store is not None
        counts = torch.zeros(3, self.num_classes, dtype=torch.int64)
        for i in range(len(self.store)):
            first, truth = (torch.from_numpy(np.asarray(part).astype(np.int64)) for part in (self.store.original(i), clean(i)))
            counts += class_counts(first, truth, self.num_classes, self.ignore_index)
        return float(iou_of_counts(counts).mean())

    # ---- how -------------------------------------------------------------------------------------------------------------------------

    def predict(self, trainer: pl.Trainer, pl_module: pl.LightningModule, images: Tensor, size: tuple[int, int]) -> _Predicted:
        """Probabilities from the mean of the logits of all scales."""
        network = pl_module.get_submodule(self.network)
        flips = (False, True) if self.flip_from_epoch is not None and self._epoch >= self.flip_from_epoch else (False,)
        parts = []
        for scale in self.scales:
            pixels = [max(1, round(scale * side)) for side in images.shape[2:]]
            scaled = images if scale == 1 else F.interpolate(images, size=pixels, mode="bilinear", align_corners=False)
            for flip in flips:
                logits = logits_from(network(scaled.flip(-1) if flip else scaled), f"network={self.network!r}").float()
                parts.append(resized(logits.flip(-1) if flip else logits, size))
        return _Predicted((torch.stack(parts).mean(0) / self.temperature).softmax(dim=1))

    def corrected(self, labels: Tensor, predicted: _Predicted) -> Tensor:
        """New labels by the rule."""
        classes = [c for c in range(1, self.num_classes) if self.triggered[c] >= 0]
        p = predicted.probabilities
        if self.rule == "slices":
            due = torch.zeros(p.shape[1], dtype=torch.int64, device=p.device)
            due[classes] = 1
            return merged_labels(labels, p, due, self.confidence, self.background_confidence)
        best = p.max(dim=1)
        return corrected_labels(labels, best.indices, best.values, [0, *classes], self.confidence, self.ignore_index)

    # ---- pictures --------------------------------------------------------------------------------------------------------------------

    def dashboard_media(self) -> dict[str, Media]:
        """Examples of corrected labels, or of labels as they are before the first correction, and the classes' epochs."""
        from lit_methods.tasks.segmentation.module import colour_labels, grey_image

        if self.store is None:
            return {}
        clean = getattr(self._datamodule, "clean_labels", None)
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
            image = getattr(self._datamodule, "training_image", None)
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
        # each rank would save its own counts, and only rank 0's checkpoint is written
        together = [gather_rows(part[None], with_grad=False).sum(0).cpu() for part in (self.counts, self._epoch_counts)]
        return super().state_dict() | {
            "history": [list(entry) for entry in self.history],
            "counts": together[0],
            "epoch_counts": together[1],
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

    def _undo(self) -> None:
        if self._features is not None:
            self._features.close()
            self._features = None

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the module as it was."""
        self._undo()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the module as it was: Lightning doesn't call ``teardown`` here."""
        self._undo()


class MultiScaleConsistency(LossTerm):
    """Replaces the loss by cross-entropy at several scales and the divergence of their predictions from the mixture.

    What the module puts out in ``training_step`` is used for the first scale; the resized images are sent through ``network`` here.

    Needs: a submodule ``network`` that maps images of any size to (B, classes, ...) logits; images and labels in the batch.
    Logs: ``multi_scale_consistency/loss``, ``ce``, ``consistency``, ``confident`` (share of images whose consistency counts), and
    ``weight_<k>``, the scales' weights.
    Saves: the scales' weights and the state of their optimiser. The weights belong to the callback and not to the module, so that the
    module's checkpoints stay its own; they take plain SGD steps with the learning rate of the module's first group and ``momentum``, and
    clipping of gradients doesn't reach them.

    Args:
        network: Name of the submodule whose output is the logits.
        images: Key or position; None: ``image``, or 0 of a sequence.
        labels: Key or position; None: ``label``, or 1 of a sequence.
        scales: Of the images, beside 1; the authors: 0.7 and 1.5.
        consistency_weight: lambda >= 0.
        threshold: rho: an image's consistency counts if a pixel of the mixture is that certain.
        learn_scale_weights: Train the scales' weights; False: equal ones.
        momentum: Of their steps.
        mean_over_scales: Divide the loss by the number of scales (the authors' code for volumes).
        mask_ignored: Leave ignored pixels out of the consistency.
        ignore_index: Label of pixels that don't count.
        replace: Throw away the module's own loss; False: add to it.
        weight: Factor of the whole loss.

    Raises:
        ValueError: A value lies outside its range.
    """

    set_up_before = ("LossTerm",)
    panels: ClassVar[tuple[Panel, ...]] = (
        Curve(
            "Consistency over scales",
            ("multi_scale_consistency/loss", "multi_scale_consistency/ce", "multi_scale_consistency/consistency"),
            goal="min",
        ),
        Curve("Confident images", ("multi_scale_consistency/confident",), note="Share whose consistency counts. 0: the term does nothing."),
        Curve("Weights of the scales", ("multi_scale_consistency/weight_*",)),
    )

    def __init__(
        self,
        network: str = "network",
        images: str | int | None = None,
        labels: str | int | None = None,
        scales: Sequence[float] = (0.7, 1.5),
        consistency_weight: float = 1.0,
        threshold: float = 0.8,
        learn_scale_weights: bool = True,
        momentum: float = 0.9,
        mean_over_scales: bool = False,
        mask_ignored: bool = False,
        ignore_index: int = 255,
        replace: bool = True,
        weight: float = 1.0,
    ) -> None:
        if any(scale <= 0 for scale in scales) or consistency_weight < 0 or not 0 <= threshold <= 1 or not 0 <= momentum < 1:
            raise ValueError(
                f"scales={list(scales)} must be above 0, consistency_weight={consistency_weight} not negative, threshold={threshold} and "
                f"momentum={momentum} in 0 to 1"
            )
        super().__init__([network], weight)
        self.replaces = replace
        self.images, self.labels, self.scales = images, labels, tuple(scales)
        self.consistency_weight, self.threshold, self.learns = consistency_weight, threshold, learn_scale_weights
        self.momentum, self.mean_over_scales, self.mask_ignored, self.ignore_index = momentum, mean_over_scales, mask_ignored, ignore_index
        self._fresh()

    def _fresh(self) -> None:
        self.scale_weights = torch.ones(1 + len(self.scales), requires_grad=self.learns)
        self._velocity = torch.zeros(1 + len(self.scales))

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Hook into the module.

        Raises:
            ValueError: The module optimises manually, or the submodule isn't there.
        """
        if stage == "fit":
            _require_network(pl_module, self.targets[0], "MultiScaleConsistency")
            if trainer.global_step == 0:
                self._fresh()
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the weights where the module is."""
        self.scale_weights = self.scale_weights.detach().to(pl_module.device).requires_grad_(self.learns)
        self._velocity = self._velocity.to(pl_module.device)

    def term(self, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the batch at all scales.

        Raises:
            ValueError: The batch or the network's output lacks something.
        """
        batch, network = inputs["batch"], self.targets[0]
        images = find_in_batch(batch, self.images, ("image", 0), "images")
        labels = find_in_batch(batch, self.labels, ("label", 1), "labels").long()
        who = f"network={network!r}"
        first = rows_of_calls(inputs["feature_calls"][network][:1], who)
        if len(first) < len(labels):
            raise ValueError(f"{who} put out {len(first)} rows for {len(labels)} images: it must see the batch's images first")
        size = labels.shape[1:]
        logits = [resized(first[: len(labels)], size, align_corners=True)]
        for scale in self.scales:
            pixels = [max(1, round(scale * side)) for side in images.shape[2:]]
            scaled = F.interpolate(images, size=pixels, mode="bilinear", align_corners=True)
            logits.append(resized(logits_from(inputs["module"].get_submodule(network)(scaled), who), size, align_corners=True))
        found = multiscale_consistency(logits, labels, self.scale_weights, self.threshold, self.ignore_index, self.mask_ignored)
        loss = found.ce + self.consistency_weight * found.consistency
        if self.mean_over_scales:
            loss = loss / len(logits)
        logs = {"ce": found.ce, "consistency": found.consistency, "confident": found.confident.float().mean()}
        return loss, logs | {f"weight_{k}": value for k, value in enumerate(self.scale_weights.detach().softmax(dim=0))}

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        """Step the weights of the scales: mean gradient over ranks, loss scale taken out, a step that isn't finite left out."""
        if not self.learns or self.scale_weights.grad is None:
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        grad = self.scale_weights.grad / (1.0 if scaler is None else scaler.get_scale())
        grad = gather_rows(grad[None], with_grad=False).mean(0)
        grad = torch.where(grad.isfinite().all(), grad, 0.0)
        self._velocity.mul_(self.momentum).add_(grad)
        self.scale_weights -= optimizer.param_groups[0]["lr"] * self._velocity
        self.scale_weights.grad = None

    def state_dict(self) -> dict[str, Any]:
        """The weights and the velocity."""
        return {"scale_weights": self.scale_weights.detach().clone(), "velocity": self._velocity.clone()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with them."""
        self.scale_weights = state_dict["scale_weights"].clone().requires_grad_(self.learns)
        self._velocity = state_dict["velocity"].clone()


__all__ = ["ADELE", "MultiScaleConsistency"]
