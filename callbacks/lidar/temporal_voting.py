"""Temporal voting: neighbouring LiDAR scans refine each other's predictions (SuperFlow++, arXiv:2503.19912)."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torchmetrics import Metric, SumMetric
from torchmetrics.classification import MulticlassConfusionMatrix

from lit_methods.callbacks.averaging.ema import EMATeacher
from lit_methods.callbacks.evaluation.callback import EvaluationCallback, Split
from lit_methods.callbacks.wrapping import attach, detach, refuse_iterators
from lit_methods.checks import one_of, positive, share
from lit_methods.lidar.point_metrics import PointIoU, mean_iou
from lit_methods.lidar.superflow.core import Vote, temporal_vote
from lit_methods.panels import Curve, Panel
from lit_methods.steps import log_global

Mode = Literal["soft", "hard"]
Predictor = Callable[[dict[str, Any]], Tensor]


def vote_on_batch(predict: Predictor, batch: dict[str, Any], **options: Any) -> tuple[Tensor, Vote]:
    """Predict the scans of a batch and of their neighbours, and let them vote.

    Args:
        predict: Cloud -> (N, C) logits.
        batch: A cloud with ``neighbours`` (see :class:`lit_methods.datamodules.NuScenesDataModule` with ``neighbours
            >= 1``).
        options: Further arguments of :func:`lit_methods.lidar.superflow.core.temporal_vote`.

    Returns:
        The scan's own probabilities (N, C) and the vote, both in the order of ``batch["points"]``.

    Raises:
        KeyError: The batch has no neighbours.
    """
    if not batch.get("neighbours"):
        raise ValueError("temporal voting needs batch['neighbours']: set neighbours: 1 (or more) in the datamodule")
    half = len(batch["neighbours"]) // 2
    clouds = [*batch["neighbours"][:half], batch, *batch["neighbours"][half:]]
    device, samples = batch["points"].device, batch["points_per_sample"].shape[0]
    order = torch.arange(samples, device=device)
    points, frames, scans, probs = [], [], [], []
    own = torch.empty(0)
    for index, cloud in enumerate(clouds):
        number = cloud["points"].shape[0]
        if number == 0:  # every sample of the batch stands at a scene border
            continue
        points.append(cloud["points"][:, :3])
        frames.append(torch.full((number,), index, device=device))
        scans.append(torch.repeat_interleave(order, cloud["points_per_sample"], output_size=number))
        probs.append(predict(cloud).float().softmax(dim=1))
        own = probs[-1] if index == half else own
    still = torch.eye(4, dtype=torch.float64, device=device).expand(samples, 4, 4)
    motion = torch.stack([cloud.get("to_current", still) for cloud in clouds], dim=1)
    vote = temporal_vote(
        torch.cat(points), torch.cat(frames), motion, torch.cat(probs), current_frame=half, sample=torch.cat(scans), **options
    )
    return own, vote


class TemporalVoting(EvaluationCallback):
    """Lets neighbouring scans refine a point segmentor's predictions, and offers the result as pseudo-labels.

    For any LightningModule with a method ``(cloud) -> (N, C) logits`` that its evaluation steps call. The points of neighbouring scans that
    fall into one cell add their class probabilities up, and the cell's points take the result. Static parts of the scene gain; moving
    objects break the assumption: watch their agreement and list them in ``exclude_classes``. The rule is our reconstruction: the authors'
    is not public.

    Runs: at validation, test and predict the method's result is replaced by the logarithm of the voted distribution. With
    ``pseudo_labels``, before each training step ``batch["unlabelled"]["labels"]`` is set from the teacher of the ``EMATeacher`` callback,
    in evaluation mode.
    Saves: nothing.
    Refuses: modules without the method, batches without neighbours, and ``pseudo_labels`` without a teacher or for a ``training_step``
    that takes ``dataloader_iter``.

    Args:
        predictor: Name of the method, called with a batch or a neighbour cloud.
        voxel_size: Edge of the voting cells, metres.
        min_frames: Cells seen in fewer frames don't vote.
        mode: ``soft`` sums probabilities, ``hard`` one-hot votes.
        exclude_classes: Classes that neither give nor take votes.
        num_outputs: Width C of the logits.
        ignore_index: Label that is left out, and that unsure pseudo-labels get.
        class_names: Names of the classes without the ignored one, for the logs; None numbers them.
        refine: Vote at validation, test and predict.
        pseudo_labels: Vote on unlabelled training batches.
        confidence_threshold: Pseudo-labels below it get ``ignore_index``; in [0, 1]. Predictions are never dropped at test time.
    """

    runs_after: ClassVar[tuple[str, ...]] = ("EMATeacher",)

    panels: ClassVar[tuple[Panel, ...]] = (
        Curve("mIoU before and after voting", ("voting/miou_own", "voting/miou"), goal="max"),
        Curve(
            "Flipped points",
            ("voting/flip_rate", "voting/flip_precision"),
            note="Precision: share of the flipped, labelled points that the vote got right.",
        ),
        Curve("Agreement of own and voted label per class", ("voting/agreement/*",), note="Low for classes that move."),
        Curve("Pseudo-labels kept", ("voting/pseudo_kept", "voting/pseudo_agreement")),
    )

    def __init__(
        self,
        predictor: str = "point_logits",
        voxel_size: float = 0.25,
        min_frames: int = 2,
        mode: Mode = "soft",
        exclude_classes: Sequence[int] = (),
        num_outputs: int = 17,
        ignore_index: int = 16,
        class_names: Sequence[str] | None = None,
        refine: bool = True,
        pseudo_labels: bool = False,
        confidence_threshold: float = 0.9,
    ) -> None:
        super().__init__()
        positive(voxel_size=voxel_size)
        share(confidence_threshold=confidence_threshold)
        one_of(Mode, mode=mode)
        self.predictor, self.refine, self.pseudo_labels = predictor, refine, pseudo_labels
        self.confidence_threshold = confidence_threshold
        self.options: dict[str, Any] = {
            "voxel_size": voxel_size,
            "min_frames": min_frames,
            "mode": mode,
            "exclude_classes": tuple(exclude_classes),
            "ignore_index": ignore_index,
        }
        self.own_iou, self.voted_iou = PointIoU(num_outputs, ignore_index), PointIoU(num_outputs, ignore_index)
        self.class_names = tuple(class_names or (str(c) for c in self.own_iou.counted))
        self.agreement = MulticlassConfusionMatrix(num_outputs)  # own label x voted label, over all points
        self.flipped, self.righted = SumMetric(), SumMetric()
        self._metrics: tuple[Metric, ...] = (self.own_iou, self.voted_iou, self.agreement, self.flipped, self.righted)
        self._attached = False

    # ------------------------------------------------------------------------------------------------------------------ at evaluation

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the module and the trainer have what is needed."""
        super().setup(trainer, pl_module, stage)
        if not callable(getattr(pl_module, self.predictor, None)):
            raise TypeError(
                f"TemporalVoting needs a method {self.predictor!r} (cloud) -> (N, C) logits on {type(pl_module).__name__}: "
                "name yours with predictor="
            )
        if self.pseudo_labels and stage == "fit":
            refuse_iterators(pl_module, "TemporalVoting with pseudo_labels")
            self._teacher(trainer)

    def _attach(self, pl_module: LightningModule) -> None:
        """Let the predictor of this instance vote: during an evaluation only, so that no copy of the module inherits it."""
        if not self.refine:
            return
        for metric in self._metrics:
            metric.reset()
        attach(pl_module, self._vote, self.predictor, around=True)
        self._attached = True

    def _vote(self, predict: Predictor, batch: dict[str, Any]) -> Tensor:
        own, vote = vote_on_batch(predict, batch, **self.options)
        self._count(own, vote, batch.get("labels"))
        return vote.probs.clamp(min=torch.finfo(vote.probs.dtype).tiny).log()

    def begin_evaluation(self, trainer: Trainer, pl_module: LightningModule, split: Split) -> None:
        """Vote from here on."""
        self._attach(pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Vote from here on."""
        self._attach(pl_module)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave nothing behind."""
        self.leave(trainer, pl_module)

    def leave(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the module its own method back."""
        if self._attached:
            detach(pl_module, self._vote, self.predictor)
            self._attached = False

    def _count(self, own: Tensor, vote: Vote, labels: Tensor | None) -> None:
        for metric in self._metrics:
            metric.to(own.device)
        own_label, voted = own.argmax(dim=1), vote.probs.argmax(dim=1)
        self.agreement.update(voted, own_label)
        if labels is not None:
            self.own_iou.update(own_label, labels)
            self.voted_iou.update(voted, labels)
            flipped = (voted != own_label) & (labels != self.options["ignore_index"])
            self.flipped.update(flipped)
            self.righted.update(flipped & (voted == labels))

    def end_evaluation(self, trainer: Trainer, pl_module: LightningModule, split: Split) -> None:
        """Stop voting, and log agreement and mIoU."""
        self.leave(trainer, pl_module)
        if not self.refine or trainer.sanity_checking:
            return
        table = self.agreement.compute().float()
        agree, total = table.diagonal(), table.sum(1)
        logs = {"flip_rate": 1 - agree.sum() / total.sum().clamp(min=1)}
        names = dict(zip(self.own_iou.counted, self.class_names, strict=True))
        logs |= {f"agreement/{name}": agree[c] / total[c] for c, name in names.items() if total[c] > 0}
        if self.own_iou.update_called:
            logs |= {"miou_own": mean_iou(self.own_iou.iou()), "miou": mean_iou(self.voted_iou.iou())}
            logs["flip_precision"] = self.righted.compute() / self.flipped.compute().clamp(min=1)
        log_global(pl_module, {f"voting/{name}": value for name, value in logs.items()})

    # -------------------------------------------------------------------------------------------------------------------- in training

    def _teacher(self, trainer: Trainer) -> EMATeacher:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, EMATeacher):
                return callback
        raise TypeError("TemporalVoting with pseudo_labels needs a teacher: add the EMATeacher callback (decay 0.99 in SuperFlow++)")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Put voted labels into ``batch["unlabelled"]``."""
        if not self.pseudo_labels:
            return
        if "unlabelled" not in batch:
            raise ValueError("TemporalVoting with pseudo_labels needs batch['unlabelled']: use mode: semi_supervised in the datamodule")
        predict = getattr(self._teacher(trainer).teacher.module, self.predictor)
        with torch.no_grad():
            own, vote = vote_on_batch(predict, batch["unlabelled"], confidence_threshold=self.confidence_threshold, **self.options)
        batch["unlabelled"]["labels"] = vote.labels
        kept = (vote.labels != self.options["ignore_index"]).float().mean()
        agreement = (vote.probs.argmax(dim=1) == own.argmax(dim=1)).float().mean()
        pl_module.log_dict({"voting/pseudo_kept": kept, "voting/pseudo_agreement": agreement}, batch_size=len(batch["unlabelled"]["token"]))
