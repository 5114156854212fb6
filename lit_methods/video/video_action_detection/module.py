"""Semi-supervised video action detection as a LightningModule, and the baselines that it is compared with.

Maths, paper and origin: :mod:`~lit_methods.video.video_action_detection.core`.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from lit_methods import checks
from lit_methods.arguments import handed_on
from lit_methods.catalog import Technique
from lit_methods.distributed import gather_rows
from lit_methods.evaluated import Evaluated, Part
from lit_methods.panels import Curve, ImageMedia, ImagePanel, Panel
from lit_methods.seeds import own_seed
from lit_methods.steps import log_global
from lit_methods.video.ramp import ramp_epochs
from lit_methods.video.video_action_detection.core import (
    Mode,
    confident_pixels,
    exp_rampup,
    feature_consistency,
    mask_consistency,
    mask_loss,
    sharpened,
    spread_loss,
)
from lit_methods.video.video_action_detection.metrics import frame_overlaps, video_scores
from lit_methods.video.video_action_detection.networks import Detection
from lit_methods.video.video_action_detection.pictures import outlined, strip

TECHNIQUE = Technique(
    slug="video_action_detection",
    short="Video action detection, semi-supervised",
    title="End-to-End Semi-Supervised Learning for Video Action Detection",
    arxiv="2203.04251",
    family="video",
    form="module",
    classes=(
        "lit_methods.SemiSupervisedVideoDetector",
        "lit_methods.PseudoLabelVideoDetector",
        "lit_methods.MixMatchVideoDetector",
        "lit_methods.CompactVideoDetector",
        "lit_methods.VideoCapsuleNet",
        "lit_methods.callbacks.ClipConsistency",
        "lit_methods.datamodules.MovingShapesDataModule",
        "lit_methods.datamodules.UCF101ActionsDataModule",
        "lit_methods.datamodules.JHMDBActionsDataModule",
        "lit_methods.datamodules.YouTubeVOSDataModule",
    ),
    configs=("video_action_detection.yaml",),
    golden=("variance_mask", "gradient_mask", "cons_loss", "sup_loss", "rampup"),
    claim="With 16 labelled and 112 unlabelled clips of moving shapes, the temporally weighted consistency of two views finds the shapes "
    "with a higher IoU than the labelled clips alone do.",
    summary="Few labelled videos: masks of a clip and of its mirror image agree, most of all where the prediction moves.",
)

Batch = Mapping[str, Any]
Consistency = Literal["none", "l2", "bv", "gv", "bv+gv"]


class SemiSupervisedVideoDetector(Evaluated):
    """Finds actions in clips, frame by frame, with masks and classes for a few clips alone.

    The loss is mask_weight (BCE + Dice) + class_weight spread + consistency_weight consistency + feature_weight mean (f - f')^2. The first
    two see the labelled clips, the others all clips and their mirror images, which pass through the network in one batch:

    - ``none``: no consistency, the labelled clips alone; with labels for all clips the upper bound
    - ``l2``: mean (P - O)^2 of the logits O and of the mirrored view's, mirrored back, P
    - ``bv``: that weighted by how the predictions vary over neighbouring frames, rising with the epochs from ``l2``
    - ``gv``: weighted by the second derivative of the prediction along the frames
    - ``bv+gv``: both

    Runs: training batches have ``labelled``: ``clip`` (B, 3, T, H, W) in [0, 1], ``mask`` (B, 1, T, H, W) and ``label`` (B,), and
    ``unlabelled`` with ``clip``, unless there are none. Evaluation batches have ``clip``, ``mask``, ``label`` and ``video`` (B,), the
    number of the video that a clip is of; without it each clip counts as a video. Figures are over all ranks. Losses are computed in
    float32 in any precision. A network that takes labels in training (``uses_labels``, as :class:`VideoCapsuleNet`) gets them: -1 for
    unlabelled clips, which show all classes before epoch ``pseudo_epoch`` and the predicted one from there on.

    Saves: the network.

    Refuses: batches without labelled clips; a network that gives something else; a ramp in a training without an end.

    Args:
        network: (B, 3, T, H, W) clips -> logits (B, 1, T, H, W), scores (B, C) in [0, 1], features (B, ...), in a tuple.
        num_classes: C.
        consistency: Which of the five above.
        n_frames: Neighbouring frames of ``bv``, odd; 5 in the README of the code, 3 by its default.
        use_sigmoid: ``bv`` of probabilities in place of logits.
        lower: ``gv``: probabilities below it count as 0; null: none.
        upper: ``gv``: probabilities above it count as 1; null: none.
        gv_cross_batch: ``gv`` as in the released code, which weights each clip by the batch's mean mask.
        bv_weight: Factor of ``bv`` in ``bv+gv``.
        gv_weight: Factor of ``gv`` in ``bv+gv``.
        ramp_epochs: E, epochs in which ``bv`` rises; null: all of the training.
        mask_weight: Factor of BCE + Dice.
        class_weight: Factor of the spread loss.
        consistency_weight: Factor of the consistency.
        feature_weight: Factor of the classification consistency; 0 in the released code, 0.1 tries the paper's idea.
        margin: Of the spread loss.
        pseudo_epoch: First epoch, from 1, in which a network with capsules shows an unlabelled clip's predicted class alone.
        learning_rate: Adam's.
        adam_eps: Adam's epsilon.
        weight_decay: Adam's.
        plateau_patience: Epochs without a lower loss before the learning rate falls to a tenth, 1e-7 at least; null: it stays.
        shown: Clips in the dashboard's picture; 0: no picture.

    Raises:
        ValueError: An argument outside its range.
    """

    panels: ClassVar[tuple[Panel, ...]] = (
        ImagePanel(
            "Clips",
            "video_detector/clips",
            note="Frames with the outline of the true mask in green and of the predicted one in red; probability; attention.",
        ),
        Curve("Loss", ("video_detector/loss", "video_detector/mask_loss", "video_detector/class_loss"), goal="min"),
        Curve("Consistency of the views", ("video_detector/consistency", "video_detector/l2"), note="l2 is without attention: on logits."),
        Curve("Mask IoU", ("video_detector/val_iou", "video_detector/train_iou"), note="Of frames with something to find.", goal="max"),
        Curve(
            "f-mAP and v-mAP",
            ("video_detector/val_f_map_50", "video_detector/val_v_map_20", "video_detector/val_v_map_50"),
            note="Frames and videos found at IoU 0.5 and 0.2 with the right class, mean over classes.",
            goal="max",
        ),
        Curve("Accuracy", ("video_detector/val_accuracy", "video_detector/train_accuracy"), goal="max"),
        Curve(
            "Attention",
            ("video_detector/attention", "video_detector/attention_on_foreground"),
            note="Mean, and the share of it that lies on the true foreground of labelled clips.",
        ),
        Curve("Ramp", ("video_detector/ramp",), note="w(e), which moves from the plain to the weighted difference."),
    )

    ramps = False  # whether a loss rises with the epochs, beside bv

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        consistency: Consistency = "bv",
        n_frames: int = 5,
        use_sigmoid: bool = False,
        lower: float | None = None,
        upper: float | None = None,
        gv_cross_batch: bool = False,
        bv_weight: float = 0.5,
        gv_weight: float = 0.5,
        ramp_epochs: int | None = None,
        mask_weight: float = 1.0,
        class_weight: float = 1.0,
        consistency_weight: float = 0.1,
        feature_weight: float = 0.0,
        margin: float = 0.2,
        pseudo_epoch: int = 11,
        learning_rate: float = 1e-4,
        adam_eps: float = 1e-6,
        weight_decay: float = 0.0,
        plateau_patience: int | None = 5,
        shown: int = 2,
    ) -> None:
        super().__init__()
        checks.literals(SemiSupervisedVideoDetector, locals())
        checks.at_least(1, num_classes=num_classes, n_frames=n_frames, ramp_epochs=ramp_epochs, pseudo_epoch=pseudo_epoch)
        if n_frames % 2 == 0:
            raise ValueError(f"n_frames is {n_frames}: give an odd number, a frame and as many before as behind it")
        checks.share(lower=lower, upper=upper)
        checks.at_least(0, bv_weight=bv_weight, gv_weight=gv_weight, mask_weight=mask_weight, class_weight=class_weight)
        checks.at_least(0, consistency_weight=consistency_weight, feature_weight=feature_weight, margin=margin, weight_decay=weight_decay)
        checks.at_least(0, plateau_patience=plateau_patience, shown=shown)
        checks.positive(learning_rate=learning_rate, adam_eps=adam_eps)
        self.save_hyperparameters(ignore=["network"])
        self.network = network
        self._ramp_epochs = 1
        self._rows: list[Tensor] = []
        self._sizes: list[int] = []
        self._picture: Tensor | None = None

    # ---- network -----------------------------------------------------------------------------------------------------------------------

    def detect(self, clip: Tensor, labels: Tensor | None = None) -> Detection:
        """Masks and classes of clips (B, 3, T, H, W).

        Args:
            clip: In [0, 1].
            labels: (B,) int64, -1 where unknown, for networks that take them in training; None: none are known.

        Raises:
            ValueError: The network gives something else.
        """
        if labels is not None and getattr(self.network, "uses_labels", False):
            found = self.network(clip, labels, pseudo=self.current_epoch + 1 >= self.hparams["pseudo_epoch"])
        else:
            found = self.network(clip)
        wanted = (len(clip), 1, *clip.shape[2:])
        shapes = (
            [tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__ for part in found] if isinstance(found, tuple) else []
        )
        if len(shapes) != 3 or shapes[0] != wanted or shapes[1] != (len(clip), self.hparams["num_classes"]):
            raise ValueError(
                f"{type(self.network).__name__} gives {shapes or type(found).__name__} for clips {tuple(clip.shape)}: expected a tuple of "
                f"logits {wanted}, scores {(len(clip), self.hparams['num_classes'])} and features"
            )
        return Detection(*found)

    def forward(self, clip: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, T, H, W) clips -> logits (B, 1, T, H, W) and class scores (B, C)."""
        found = self.detect(clip)
        return found.logits, found.scores

    # ---- training ----------------------------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """How long the ramp is, where there is one.

        Raises:
            ValueError: The training has no end, and no ``ramp_epochs`` says it.
        """
        if self.ramps or "bv" in self.hparams["consistency"]:
            self._ramp_epochs = ramp_epochs(self, self.hparams["ramp_epochs"])

    @property
    def ramp(self) -> float:
        """w(e) of the current epoch."""
        return exp_rampup(self.current_epoch + 1, self._ramp_epochs)

    def supervised(self, found: Detection, labelled: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of labelled clips, with its factors, and its parts."""
        mask, spread = mask_loss(found.logits, labelled["mask"]), spread_loss(found.scores, labelled["label"], self.hparams["margin"])
        located = mask.bce + mask.dice
        loss = self.hparams["mask_weight"] * located + self.hparams["class_weight"] * spread
        with torch.no_grad():
            both, either, _ = frame_overlaps(found.logits, labelled["mask"])
            right = (found.scores.argmax(dim=1) == labelled["label"]).float().mean()
            parts = {
                "mask_loss": located,
                "class_loss": spread,
                "train_accuracy": right,
                "train_iou": (both.sum() / either.sum().clamp(min=1)).float(),
            }
        return loss, parts

    def losses(self, labelled: Batch, unlabelled: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a step, and its parts.

        Args:
            labelled: ``clip``, ``mask``, ``label``.
            unlabelled: Clips; None: there are none.
        """
        hp = self.hparams
        if hp["consistency"] == "none" and not hp["feature_weight"]:
            return self.supervised(self.detect(labelled["clip"], labelled["label"]), labelled)
        known = len(labelled["clip"])
        clips = labelled["clip"] if unlabelled is None else torch.cat([labelled["clip"], unlabelled])
        labels = F.pad(labelled["label"], (0, len(clips) - known), value=-1)
        both = self.detect(torch.cat([clips, clips.flip(4)]), labels.repeat(2))  # one pass, as DDP wants it
        first, second = (Detection(*views) for views in zip(*(part.chunk(2) for part in both), strict=True))
        loss, parts = self.supervised(Detection(*(part[:known] for part in first)), labelled)
        if hp["consistency"] != "none":
            mode: Mode = hp["consistency"]
            options = {name: hp[name] for name in ("n_frames", "bv_weight", "gv_weight", "gv_cross_batch", "use_sigmoid", "lower", "upper")}
            found = mask_consistency(first.logits, second.logits, mode, ramp=self.ramp, **options)
            loss = loss + hp["consistency_weight"] * found.loss
            parts |= {"consistency": found.loss, "l2": found.l2}
            if found.attention is not None:
                attention, truth = found.attention[:known], (labelled["mask"] > 0).to(found.attention.dtype)
                on_foreground = (attention * truth).sum() / attention.sum().clamp(min=1e-12)
                parts |= {"attention": found.attention.mean(), "attention_on_foreground": on_foreground}
            if "bv" in mode:
                parts["ramp"] = loss.new_tensor(self.ramp)
        if hp["feature_weight"]:
            agreement = feature_consistency(first.features, second.features)
            loss = loss + hp["feature_weight"] * agreement
            parts["feature_consistency"] = agreement
        return loss, parts

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The total loss."""
        labelled, unlabelled = _take_apart(batch)
        loss, parts = self.losses(labelled, unlabelled)
        size = len(labelled["clip"])
        self.log("video_detector/loss", loss.detach(), prog_bar=True, batch_size=size)
        self.log_dict({f"video_detector/{name}": value.detach() for name, value in parts.items()}, batch_size=size)
        if self.hparams["plateau_patience"] is not None:
            self.log("video_detector/epoch_loss", loss.detach(), on_step=False, on_epoch=True, sync_dist=True, batch_size=size)
        return loss

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig | torch.optim.Optimizer:
        """Adam, whose learning rate falls when the epoch's loss doesn't."""
        hp = self.hparams
        optimizer = torch.optim.Adam(self.parameters(), hp["learning_rate"], eps=hp["adam_eps"], weight_decay=hp["weight_decay"])
        if hp["plateau_patience"] is None:
            return optimizer
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=hp["plateau_patience"], min_lr=1e-7)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "interval": "epoch", "monitor": "video_detector/epoch_loss"}}

    # ---- evaluation --------------------------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Forget what an interrupted validation left."""
        self._rows, self._picture = [], None

    def on_test_epoch_start(self) -> None:
        """Forget what an interrupted test left."""
        self._rows, self._picture = [], None

    def _attention(self, clip: Tensor, logits: Tensor) -> Tensor | None:
        """Attention masks of clips, as training would use them; None: the consistency has none."""
        mode = self.hparams["consistency"]
        if mode not in ("bv", "gv", "bv+gv"):
            return None
        options = {name: self.hparams[name] for name in ("n_frames", "use_sigmoid", "lower", "upper")}
        return mask_consistency(logits, self.detect(clip.flip(4)).logits, mode, **options).attention

    def _evaluate(self, batch: Batch, batch_idx: int) -> None:
        clip, mask, label = (batch[name] for name in ("clip", "mask", "label"))
        found = self.detect(clip)
        overlaps = frame_overlaps(found.logits, mask)
        masks = mask_loss(found.logits, mask)
        loss = (masks.bce + masks.dice).double().expand(len(clip))
        if "video" in batch:
            video = batch["video"]
        else:
            video = torch.arange(len(clip), device=label.device) + (batch_idx * self.trainer.world_size + self.global_rank) * len(clip)
        rows = (torch.stack([video, label], dim=1).double(), loss[:, None], found.scores.double(), *overlaps)
        self._rows.append(torch.cat([part.cpu() for part in rows], dim=1))
        self._sizes = [part.shape[1] for part in rows]
        count = self.hparams["shown"]
        if self._picture is None and count and clip.shape[1] in (1, 3):
            attention = self._attention(clip[:count], found.logits[:count])
            probability = found.logits[:count].float().sigmoid()
            first = outlined(clip[:count], found.logits[:count] >= 0, mask[:count] > 0)
            self._picture = strip([first, probability, *([] if attention is None else [attention])])

    def _log_evaluation(self, part: Part) -> None:
        if not self._rows:
            raise ValueError(f"rank {self.global_rank} has no clip to evaluate: take fewer ranks or a smaller batch size")
        rows = gather_rows(torch.cat(self._rows), with_grad=False)
        self._rows = []
        numbers, loss, scores, both, either, truth = rows.split(self._sizes, dim=1)
        video, label = numbers.long().unbind(dim=1)
        found = video_scores(video, label, scores, both, either, truth)
        figures = {"loss": float(loss.mean()), "accuracy": found.accuracy, "iou": found.iou}
        figures |= {f"f_map_{threshold * 100:.0f}": value for threshold, value in found.f_map.items()}
        figures |= {f"v_map_{threshold * 100:.0f}": value for threshold, value in found.v_map.items()}
        figures |= {"f_localisation_50": found.f_localisation[0.5], "v_localisation_50": found.v_localisation[0.5]}
        log_global(self, {f"video_detector/{part}_{name}": value for name, value in figures.items() if not math.isnan(value)})
        if self._picture is not None:
            words = f"{self.hparams['shown']} clips, frame by frame, with true and predicted outlines, and below the predicted probability"
            self._media = {"video_detector/clips": ImageMedia(self._picture.numpy(), alt=words)}

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Masks and classes of clips, and what they look like.

        Returns:
            ``probability`` (B, 1, T, H, W) of foreground, ``scores`` (B, C); ``video`` (B, T, 3, H, W) in [-1, 1], the clip with the
            predicted outline, for clips of one or three channels; ``index`` (B,) where the batch has it.
        """
        clip = batch["clip"]
        found = self.detect(clip)
        given = {"probability": found.logits.float().sigmoid(), "scores": found.scores.float()}
        if clip.shape[1] in (1, 3):
            given["video"] = outlined(clip, found.logits >= 0).transpose(1, 2) * 2 - 1
        return given | ({"index": batch["index"]} if "index" in batch else {})


class PseudoLabelVideoDetector(SemiSupervisedVideoDetector):
    """Baseline: unlabelled clips are learned from where the network is sure of foreground or background.

    The consistency's place is taken by the cross-entropy with the network's own rounded prediction, over pixels whose likelier side has
    ``threshold`` or more, times the ramp. Classes are learned from labelled clips alone.

    Runs: as :class:`SemiSupervisedVideoDetector`. Saves: the network. Refuses: batches without unlabelled clips.

    Args:
        network: (B, 3, T, H, W) clips -> logits (B, 1, T, H, W), scores (B, C) in [0, 1], features (B, ...), in a tuple.
        num_classes: C.
        threshold: Least probability of a pixel that counts, 0.5 to 1.
        ramp_epochs: Epochs in which the term rises; null: all of the training.
        mask_weight: Factor of BCE + Dice.
        class_weight: Factor of the spread loss.
        consistency_weight: Factor of the term.
        margin: Of the spread loss.
        pseudo_epoch: First epoch, from 1, in which a network with capsules shows an unlabelled clip's predicted class alone.
        learning_rate: Adam's.
        adam_eps: Adam's epsilon.
        weight_decay: Adam's.
        plateau_patience: Epochs without a lower loss before the learning rate falls to a tenth; null: it stays.
        shown: Clips in the dashboard's picture; 0: no picture.
    """

    ramps = True
    panels: ClassVar[tuple[Panel, ...]] = tuple(panel for panel in SemiSupervisedVideoDetector.panels if panel.title not in ("Attention",))

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        threshold: float = 0.9,
        ramp_epochs: int | None = None,
        mask_weight: float = 1.0,
        class_weight: float = 1.0,
        consistency_weight: float = 0.1,
        margin: float = 0.2,
        pseudo_epoch: int = 11,
        learning_rate: float = 1e-4,
        adam_eps: float = 1e-6,
        weight_decay: float = 0.0,
        plateau_patience: int | None = 5,
        shown: int = 2,
    ) -> None:
        checks.within("[0.5, 1]", "a probability", threshold=threshold)
        super().__init__(**handed_on(SemiSupervisedVideoDetector, locals(), consistency="none"))
        self.save_hyperparameters(ignore=["network"])

    def losses(self, labelled: Batch, unlabelled: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Supervised loss, and that of the sure pixels."""
        clips, labels, known = _with_unlabelled(self, labelled, unlabelled)
        found = self.detect(clips, labels)
        loss, parts = self.supervised(Detection(*(part[:known] for part in found)), labelled)
        target, sure = confident_pixels(found.logits[known:], self.hparams["threshold"])
        with torch.autocast(found.logits.device.type, enabled=False):
            wrong = F.binary_cross_entropy_with_logits(found.logits[known:].to(target.dtype), target, reduction="none")
            term = (wrong * sure).mean()
        logs = {"consistency": term, "certain": sure.mean(), "ramp": loss.new_tensor(self.ramp)}
        return loss + self.hparams["consistency_weight"] * self.ramp * term, parts | logs


class MixMatchVideoDetector(SemiSupervisedVideoDetector):
    """Baseline in the manner of MixMatch (arXiv:1905.02249): sharpened means of both views as targets, and mixed clips.

    The target of an unlabelled clip is the mean probability of its two views, sharpened. Labelled and unlabelled clips are mixed with
    others of both kinds, and so are their masks, each clip's own with the larger share; labelled ones get the supervised loss, unlabelled
    ones the squared difference of probabilities, times the ramp.

    Runs: as :class:`SemiSupervisedVideoDetector`. Saves: the network. Refuses: batches without unlabelled clips.

    Args:
        network: (B, 3, T, H, W) clips -> logits (B, 1, T, H, W), scores (B, C) in [0, 1], features (B, ...), in a tuple.
        num_classes: C.
        temperature: Of the sharpening.
        alpha: Of the Beta distribution that shares are drawn from.
        ramp_epochs: Epochs in which the term rises; null: all of the training.
        mask_weight: Factor of BCE + Dice.
        class_weight: Factor of the spread loss.
        consistency_weight: Factor of the term.
        margin: Of the spread loss.
        pseudo_epoch: First epoch, from 1, in which a network with capsules shows an unlabelled clip's predicted class alone.
        learning_rate: Adam's.
        adam_eps: Adam's epsilon.
        weight_decay: Adam's.
        plateau_patience: Epochs without a lower loss before the learning rate falls to a tenth; null: it stays.
        shown: Clips in the dashboard's picture; 0: no picture.
        seed: Of shares and partners.
    """

    ramps = True
    panels: ClassVar[tuple[Panel, ...]] = PseudoLabelVideoDetector.panels

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        temperature: float = 0.5,
        alpha: float = 0.75,
        ramp_epochs: int | None = None,
        mask_weight: float = 1.0,
        class_weight: float = 1.0,
        consistency_weight: float = 0.1,
        margin: float = 0.2,
        pseudo_epoch: int = 11,
        learning_rate: float = 1e-4,
        adam_eps: float = 1e-6,
        weight_decay: float = 0.0,
        plateau_patience: int | None = 5,
        shown: int = 2,
        seed: int = 0,
    ) -> None:
        checks.positive(temperature=temperature, alpha=alpha)
        checks.at_least(0, seed=seed)
        super().__init__(**handed_on(SemiSupervisedVideoDetector, locals(), consistency="none"))
        self.save_hyperparameters(ignore=["network"])

    def losses(self, labelled: Batch, unlabelled: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses of mixed clips."""
        clips, labels, known = _with_unlabelled(self, labelled, unlabelled)
        with torch.no_grad():
            views = self.detect(torch.cat([clips[known:], clips[known:].flip(4)]), labels[known:].repeat(2)).logits.float().sigmoid()
            first, second = views.chunk(2)
            target = sharpened((first + second.flip(4)) / 2, self.hparams["temperature"])
        targets = torch.cat([labelled["mask"].to(target.dtype), target])
        share, partner = self._draw(len(clips))
        mixed = self.detect(share.to(clips.dtype) * clips + (1 - share).to(clips.dtype) * clips[partner], labels)
        targets = share.to(target.dtype) * targets + (1 - share).to(target.dtype) * targets[partner]
        loss, parts = self.supervised(Detection(*(part[:known] for part in mixed)), {"mask": targets[:known], "label": labelled["label"]})
        term = (mixed.logits[known:].float().sigmoid() - targets[known:]).square().mean()
        loss = loss + self.hparams["consistency_weight"] * self.ramp * term
        return loss, parts | {"consistency": term, "ramp": loss.new_tensor(self.ramp)}

    def _draw(self, count: int) -> tuple[Tensor, Tensor]:
        """A clip's own share, (count, 1, 1, 1, 1) of at least a half, and whom it is mixed with, (count,)."""
        place = f"MixMatchVideoDetector {self.global_rank} {self.trainer.global_step} {self.trainer.fit_loop.batch_idx}"
        rng = np.random.default_rng(own_seed(place, self.hparams["seed"]))
        alpha = self.hparams["alpha"]
        partner, drawn = torch.from_numpy(rng.permutation(count)), torch.from_numpy(rng.beta(alpha, alpha, count))
        own = torch.maximum(drawn, 1 - drawn).view(-1, 1, 1, 1, 1)
        return own.to(self.device, torch.float32), partner.to(self.device)


def _take_apart(batch: Batch) -> tuple[Batch, Tensor | None]:
    """Labelled part and unlabelled clips of a training batch.

    Raises:
        ValueError: Something is missing; the message says what was found.
    """
    labelled = batch.get("labelled") if isinstance(batch, Mapping) else None
    missing = [name for name in ("clip", "mask", "label") if name not in labelled] if isinstance(labelled, Mapping) else ["labelled"]
    if missing or labelled is None:
        have = sorted(labelled) if isinstance(labelled, Mapping) else sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(
            f"the training batch has no {' and '.join(missing)}, it has {have}: expected labelled clip, mask, label and unlabelled clip, "
            "as MovingShapesDataModule has them"
        )
    unlabelled = batch.get("unlabelled")
    return labelled, None if unlabelled is None else unlabelled["clip"]


def _with_unlabelled(module: nn.Module, labelled: Batch, unlabelled: Tensor | None) -> tuple[Tensor, Tensor, int]:
    """All clips, their labels or -1, and how many are labelled.

    Raises:
        ValueError: There is no unlabelled clip.
    """
    if unlabelled is None:
        raise ValueError(f"{type(module).__name__} learns from unlabelled clips, and the batch has none: label fewer clips")
    clips = torch.cat([labelled["clip"], unlabelled])
    return clips, F.pad(labelled["label"], (0, len(unlabelled)), value=-1), len(labelled["clip"])


__all__ = ["MixMatchVideoDetector", "PseudoLabelVideoDetector", "SemiSupervisedVideoDetector"]
