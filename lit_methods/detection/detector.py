"""What all detectors share that find boxes by taking noise from them: features, losses, evaluation, predictions, optimiser."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from PIL import Image
from torch import Tensor, nn

from lit_methods import checks
from lit_methods.datamodules.pictures import IMAGENET_MEAN, IMAGENET_STD
from lit_methods.detection.boxes import image_scale, xyxy_to_cxcywh
from lit_methods.detection.criterion import LossWeights, SetLosses, federated_classes
from lit_methods.detection.matcher import MatchCosts, Targets
from lit_methods.detection.networks import CascadedHead
from lit_methods.detection.nms import Detections, detections_of
from lit_methods.detection.scores import DetectionScores, average_precision_metric, draw_boxes
from lit_methods.distributed import gather_rows
from lit_methods.evaluated import Evaluated, Part
from lit_methods.files import write_atomically
from lit_methods.optim import scheduled, warmup_cosine
from lit_methods.panels import Curve, ImageMedia, ImagePanel, Panel
from lit_methods.runs.folder import run_dir
from lit_methods.seeds import own_seed, seeded_noise
from lit_methods.steps import log_global, training_length

Batch = Mapping[str, Any]
Schedule = Literal["constant", "cosine", "multistep"]


class Answer(NamedTuple):
    """What the last head says of the proposals at one step of a sampling.

    Attributes:
        logits: (B, P, K), before the sigmoid.
        boxes: (B, P, 4) corners in pixels, inside the image.
        kept: (B,) share of the proposals that go on to the next step; behind the last step, and without renewal, 1.
    """

    logits: Tensor
    boxes: Tensor
    kept: Tensor


class Truths(NamedTuple):
    """Ground truth of a batch.

    Attributes:
        targets: What the losses are computed with.
        shares: (B, G, 4) centre, width and height in shares of the image.
    """

    targets: Targets
    shares: Tensor


class BoxDiffusion(Evaluated):
    """Base of detectors that map noisy boxes to boxes of objects, given features of the image.

    Subclasses give :meth:`losses` and :meth:`sample`, and save their arguments as hyperparameters, among them those of
    :meth:`configure_optimizers`.

    Args:
        backbone: Images -> list of feature maps; with ``out_channels`` and ``strides``.
        head: Refines boxes on these maps.
        proposals: P, boxes of an image that are refined together.
        eval_steps: Numbers of steps whose average precision is measured; the largest one is what ``lit predict`` takes.
        renewal_threshold: Between two steps a proposal is kept if its best score is above; the others are drawn anew.
        ensemble: The detections of all steps count; False: those of the last step.
        nms_single: Largest IoU of two detections of a class in one step, or without ensemble.
        nms_ensemble: The same for an ensemble.
        label_weight: Factor of the class loss, in the loss and in the matching.
        l1_weight: Factor of the L1 distance of corners, in both.
        giou_weight: Factor of the generalised IoU, in both.
        federated: Classes whose loss counts in a batch (LVIS: 50), with plain binary cross entropy; 0: all, with focal loss.
        drawings: Images in the dashboard's picture; 0: no picture.

    Attributes:
        draws_per_step: Draws of noise that a step of a sampling takes.
    """

    panels: ClassVar[tuple[Panel, ...]] = (
        ImagePanel("Boxes", "detection/boxes", note="Validation images: truth in green, detections above a score of 0.4 in red."),
        Curve("Loss", ("detection/loss",), goal="min"),
        Curve("Average precision by number of steps", ("detection/val_ap_*",), note="COCO's, mean over IoU 0.5 to 0.95.", goal="max"),
        Curve("Average precision at IoU 0.5 by number of steps", ("detection/val_ap50_*",), goal="max"),
        Curve(
            "Parts of the loss",
            ("detection/loss_label", "detection/loss_l1", "detection/loss_giou"),
            note="Last head, without their factors, mean over the noise levels of a step.",
        ),
        Curve("Proposals matched to a truth", ("detection/positives",), note="Last head, of one truth, in the mean."),
        Curve("Proposals that are kept between steps", ("detection/val_kept",), note="Share, of the longest sampling."),
    )

    draws_per_step: ClassVar[int] = 1

    def __init__(
        self,
        backbone: nn.Module,
        head: CascadedHead,
        proposals: int,
        eval_steps: Sequence[int],
        renewal_threshold: float,
        ensemble: bool,
        nms_single: float,
        nms_ensemble: float,
        label_weight: float,
        l1_weight: float,
        giou_weight: float,
        federated: int,
        drawings: int,
    ) -> None:
        super().__init__()
        checks.at_least(1, "boxes", proposals=proposals)
        checks.share(renewal_threshold=renewal_threshold, nms_single=nms_single, nms_ensemble=nms_ensemble)
        checks.at_least(0, label_weight=label_weight, l1_weight=l1_weight, giou_weight=giou_weight, federated=federated, drawings=drawings)
        if not eval_steps or min(eval_steps) < 1:
            raise ValueError(f"eval_steps is {list(eval_steps)}: give numbers of steps, such as [1, 4]")
        for name in ("out_channels", "strides"):
            if not hasattr(backbone, name):
                raise ValueError(f"{type(backbone).__name__} has no {name}: a backbone tells its channels and the strides of its maps")
        channels: Any = backbone.out_channels
        if channels != head.channels:
            raise ValueError(f"the backbone has out_channels={channels} and the head channels={head.channels}: give both the same number")
        self.backbone, self.head = backbone, head
        self.strides: list[int] = list(backbone.strides)  # type: ignore[arg-type]
        self.proposals, self.eval_steps = proposals, sorted(set(eval_steps))
        self.renewal_threshold, self.ensemble, self.nms = renewal_threshold, ensemble, (nms_single, nms_ensemble)
        self.weights = LossWeights(label_weight, l1_weight, giou_weight)
        self.costs = MatchCosts(label_weight, l1_weight, giou_weight)
        self.federated, self.drawings = federated, drawings
        self.register_buffer("pixel_mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)
        self._class_weights: Tensor | None = None
        self._lines: list[dict[str, Any]] = []
        self._forget()

    def setup(self, stage: str) -> None:
        """Look whether head and data fit, and whether AP can be computed, before anything is trained."""
        if self.trainer.precision in ("bf16-true", "16-true"):
            raise ValueError(
                f"precision={self.trainer.precision} rounds the boxes of a batch to whole pixels and worse: use bf16-mixed instead"
            )
        data: Any = getattr(self.trainer, "datamodule", None)
        names = getattr(data, "class_names", None)
        if names is not None and len(names) != self.head.num_classes:
            raise ValueError(f"the head has num_classes={self.head.num_classes} and the data have {len(names)}: give it {len(names)}")
        if self.federated and stage == "fit":
            images = getattr(data, "class_images", None)
            if images is None:
                raise ValueError(
                    f"federated={self.federated} needs class_images, how many images each class is in, and "
                    f"{type(data).__name__ if data is not None else 'the data'} has none: use DetectionDataModule, or federated=0"
                )
            self._class_weights = torch.as_tensor(images).float().sqrt()
        if stage in ("fit", "validate", "test"):
            average_precision_metric()

    # ---- boxes and features --------------------------------------------------------------------------------------------------------------

    def features(self, images: Tensor) -> list[Tensor]:
        """Maps of images (B, 3, H, W) in [0, 1], which are padded to a multiple of the coarsest stride."""
        coarsest = self.strides[-1]
        normalised = (images - self.pixel_mean) / self.pixel_std  # type: ignore[operator]
        height, width = images.shape[-2:]
        maps: list[Tensor] = self.backbone(F.pad(normalised, (0, -width % coarsest, 0, -height % coarsest)))
        return maps

    def truths(self, batch: Batch) -> Truths:
        """Ground truth of a batch: boxes that are there and count."""
        valid = (batch["label"] >= 0) & ~batch["ignore"]
        boxes, size = batch["boxes"].float(), batch["size"].float()
        return Truths(Targets(batch["label"], boxes, valid, size), xyxy_to_cxcywh(boxes / image_scale(size)))

    def class_weights(self, targets: Targets, generator: torch.Generator) -> Tensor | None:
        """(K,) factors of the federated loss of a batch; None: focal loss."""
        if self._class_weights is None:
            return None
        weights = self._class_weights = self._class_weights.to(targets.boxes.device)
        uniform = torch.rand(len(weights), generator=generator, device=weights.device).clamp(min=1e-12)
        return federated_classes(targets.labels, targets.valid, weights, uniform, self.federated)

    def draws(self, batch_idx: int) -> torch.Generator:
        """What a training batch's random numbers come from: epoch, batch, rank and seed alone."""
        place = f"BoxDiffusion {self.trainer.current_epoch} {batch_idx * self.trainer.world_size + self.global_rank}"
        return torch.Generator(self.device).manual_seed(own_seed(place, self.hparams["seed"]))

    # ---- training ------------------------------------------------------------------------------------------------------------------------

    def losses(self, batch: Batch, truths: Truths, generator: torch.Generator) -> tuple[Tensor, SetLosses]:
        """The loss of a batch, and its parts of every head, (H,) each, as the mean over the noise levels of the step."""
        raise NotImplementedError

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of all heads."""
        truths = self.truths(batch)
        loss, parts = self.losses(batch, truths, self.draws(batch_idx))
        size = len(truths.shares)
        self.log("detection/loss", loss.detach(), prog_bar=True, batch_size=size)
        last = {"label": parts.label[-1], "l1": parts.l1[-1], "giou": parts.giou[-1]}
        figures = {f"detection/loss_{name}": value.detach() for name, value in last.items()}
        figures["detection/positives"] = parts.matched[-1] / truths.targets.valid.sum().clamp(min=1)
        self.log_dict(figures, batch_size=size)
        return loss

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW with a linear warm-up; then constant, half a cosine to 0, or times 0.1 at each milestone."""
        hp = self.hparams
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=hp["learning_rate"], weight_decay=hp["weight_decay"])
        warmup, milestones = hp["warmup_steps"], list(hp["milestones"])
        if hp["schedule"] == "cosine":
            total = training_length(self, what="schedule='cosine'", instead=None)
            return scheduled(optimizer, lambda step: warmup_cosine(step, total, warmup))
        if hp["schedule"] == "constant":
            milestones = []
        return scheduled(optimizer, lambda step: min(1.0, (step + 1) / max(1, warmup)) * 0.1 ** sum(step >= place for place in milestones))

    # ---- detections ----------------------------------------------------------------------------------------------------------------------

    def sample(self, features: Sequence[Tensor], size: Tensor, noise: Tensor) -> list[Answer]:
        """The answers of S steps, from noise (S times :attr:`draws_per_step`, B, P, 4) to boxes; ``size`` (B, 2) is width, height."""
        raise NotImplementedError

    def noise(self, index: Tensor, steps: int) -> Tensor:
        """Noise of a sampling for the images of some numbers (B,): (steps times :attr:`draws_per_step`, B, P, 4), standard normal.

        It is drawn on the CPU for each image, so that any number of processes finds the same boxes.
        """
        like = torch.empty(steps * self.draws_per_step, self.proposals, 4)
        places = [f"BoxDiffusion image {number}" for number in index.tolist()]
        return torch.stack([seeded_noise(place, self.hparams["seed"], like) for place in places], dim=1).to(self.device)

    def combine(self, answers: Sequence[Answer]) -> list[Detections]:
        """Detections of each image, out of the answers of all steps, or of the last one."""
        chosen = list(answers) if self.ensemble else list(answers[-1:])
        return detections_of([one.logits for one in chosen], [one.boxes for one in chosen], self.nms[len(chosen) > 1])

    @torch.no_grad()
    def forward(self, images: Tensor, size: Tensor | None = None, steps: int | None = None) -> list[Detections]:
        """Detections of images.

        Args:
            images: (B, 3, H, W) in [0, 1], padded at the right and at the bottom.
            size: (B, 2) width and height before the padding; None: nothing is padded.
            steps: Steps of the sampling; None: the most of ``eval_steps``.
        """
        if size is None:
            size = images.new_tensor([images.shape[-1], images.shape[-2]]).expand(len(images), 2)
        noise = self.noise(torch.arange(len(images)), steps or self.eval_steps[-1])
        return self.combine(self.sample(self.features(images), size.float(), noise))

    # ---- evaluation ----------------------------------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        self._scores = DetectionScores()
        self._rows: list[Tensor] = []
        self._picture: Any = None

    def figures(self, features: Sequence[Tensor], truths: Truths, index: Tensor) -> dict[str, Tensor]:
        """Further figures of each image of an evaluation, (B,) each: what a subclass adds."""
        return {}

    def _evaluate(self, batch: Batch, batch_idx: int) -> None:
        truths, features = self.truths(batch), self.features(batch["image"])
        index, size = batch["index"].cpu(), truths.targets.size
        noise = self.noise(index, self.eval_steps[-1])
        self._scores.add_truths(index, batch["boxes"].cpu(), batch["label"].cpu(), batch["ignore"].cpu())
        answers: list[Answer] = []
        found: list[Detections] = []
        for steps in self.eval_steps:
            answers = self.sample(features, size, noise[: steps * self.draws_per_step])
            found = self.combine(answers)
            self._scores.add_found(steps, index, [Detections(*(part.cpu() for part in one)) for one in found])
        between = [answer.kept for answer in answers[:-1]] or [answers[-1].kept]
        figures = {"kept": torch.stack(between).mean(0)} | self.figures(features, truths, index)
        self._names = list(figures)
        self._rows.append(torch.stack([value.float().cpu() for value in figures.values()], dim=1))
        if self._picture is None and self.drawings:
            few = slice(self.drawings)
            boxes = [row[valid] for row, valid in zip(truths.targets.boxes[few], truths.targets.valid[few], strict=True)]
            self._picture = draw_boxes(batch["image"][few].float(), boxes, found[few], self.class_names)

    @property
    def class_names(self) -> list[str]:
        """Names of the classes as the data tell them, or their numbers."""
        names = getattr(getattr(self._trainer, "datamodule", None), "class_names", None)
        return [str(number) for number in range(self.head.num_classes)] if names is None else list(names)

    def on_validation_epoch_start(self) -> None:
        """Forget what an interrupted validation left."""
        self._forget()

    def on_test_epoch_start(self) -> None:
        """Forget what an interrupted test left."""
        self._forget()

    def _log_evaluation(self, part: Part) -> None:
        if not self._rows:
            raise ValueError(f"rank {self.global_rank} has no image to look at: take fewer ranks, or more images")
        means = gather_rows(torch.cat(self._rows), with_grad=False).mean(0)
        logs: dict[str, Tensor | float] = {f"detection/{part}_{name}": value for name, value in zip(self._names, means, strict=True)}
        for steps, figures in self._scores.compute().items():
            word = f"{steps}_step{'s' if steps > 1 else ''}"
            logs |= {f"detection/{part}_{name}_{word}": value for name, value in figures.items()}
        log_global(self, logs)
        if self._picture is not None:
            words = f"{self.drawings} images with what was found in {self.eval_steps[-1]} steps in red and the truth in green"
            self._media = {"detection/boxes": ImageMedia(self._picture, alt=words)}
        self._forget()

    # ---- predictions ---------------------------------------------------------------------------------------------------------------------

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Detections of each image in pixels of its file: lists ``boxes`` (D, 4), ``scores`` (D,), ``labels`` (D,), and ``name``."""
        size = batch["size"].float()
        noise = self.noise(batch["index"].cpu(), self.eval_steps[-1])
        found = self.combine(self.sample(self.features(batch["image"]), size, noise))
        scale = image_scale(batch["original_size"].float() / size).squeeze(-2)
        names = [str(name) for name in batch["name"]]
        boxes = [one.boxes * factor for one, factor in zip(found, scale, strict=True)]
        folder, classes = run_dir(self.trainer) / "pictures", self.class_names
        folder.mkdir(parents=True, exist_ok=True)
        nothing = batch["boxes"].new_zeros(0, 4)
        for row, (name, one, corners) in enumerate(zip(names, found, boxes, strict=True)):
            width, height = size[row].long().tolist()
            picture = draw_boxes(batch["image"][row : row + 1, :, :height, :width].float(), [nothing], [one], classes)
            Image.fromarray(picture).save(folder / f"{name}.png")
            rounded = [[round(value, 2) for value in box] for box in corners.tolist()]
            labels = [classes[label] for label in one.labels.tolist()]
            self._lines.append({"image": name, "boxes": rounded, "scores": [round(s, 4) for s in one.scores.tolist()], "labels": labels})
        return {"boxes": boxes, "scores": [one.scores for one in found], "labels": [one.labels for one in found], "name": names}

    def on_predict_epoch_start(self) -> None:
        """Forget an earlier prediction."""
        self._lines = []

    def on_predict_epoch_end(self) -> None:
        """Write ``detections.jsonl`` into the run's folder: one line an image, corners in pixels of its file."""
        name = "detections.jsonl" if self.trainer.world_size == 1 else f"detections_process{self.global_rank}.jsonl"
        folder = run_dir(self.trainer)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / name, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in self._lines))
        self._lines = []


def check_recipe(learning_rate: float, weight_decay: float, warmup_steps: int, milestones: Sequence[int], schedule: str, seed: int) -> None:
    """Raise ValueError unless the optimiser's arguments are in range."""
    checks.positive(learning_rate=learning_rate)
    checks.at_least(0, weight_decay=weight_decay, warmup_steps=warmup_steps, seed=seed)
    checks.one_of(Schedule, schedule=schedule)
    if list(milestones) != sorted(set(milestones)) or any(place < 1 for place in milestones):
        raise ValueError(f"milestones is {list(milestones)}: give rising numbers of steps")
    if schedule == "multistep" and not milestones:
        raise ValueError("schedule='multistep' without milestones is constant: give milestones, or schedule='constant'")


__all__ = ["Answer", "Batch", "BoxDiffusion", "Schedule", "Truths", "check_recipe"]
