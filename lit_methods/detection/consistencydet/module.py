"""ConsistencyDet: a detector whose boxes are denoised in few steps, trained on two adjacent noise levels (arXiv:2404.07773).

The recipe comes from Tankowa/ConsistencyDet@0f6e44a, the maths stand in :mod:`~lit_methods.detection.consistencydet.core`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lit_methods import checks
from lit_methods.catalog import Technique
from lit_methods.detection.boxes import image_scale
from lit_methods.detection.consistencydet.core import (
    detection_levels,
    detection_scalings,
    euler_step,
    noisy_pair,
    skip_mix,
    two_level_loss,
)
from lit_methods.detection.consistencydet.sampler import consistency_sample
from lit_methods.detection.criterion import SetLosses, set_losses
from lit_methods.detection.detector import Answer, Batch, BoxDiffusion, Schedule, Truths, check_recipe
from lit_methods.detection.diffusiondet import DiffusionDet
from lit_methods.detection.networks import CascadedHead
from lit_methods.detection.noise import clamp_to_image, clean_boxes, to_pixels
from lit_methods.frozen import Frozen
from lit_methods.panels import Curve, Panel
from lit_methods.runs.checkpoints import load_into
from lit_methods.seeds import own_seed
from lit_methods.steps import logs_now

TECHNIQUE = Technique(
    slug="consistencydet",
    title="ConsistencyDet: A Few-step Denoising Framework for Object Detection Using the Consistency Model",
    arxiv="2404.07773",
    family="detection",
    form="module",
    classes=(
        "lit_methods.ConsistencyDet",
        "lit_methods.DiffusionDet",
        "lit_methods.CascadedHead",
        "lit_methods.SmallDetectionBackbone",
        "lit_methods.TimmPyramid",
        "lit_methods.datamodules.DetectionShapesDataModule",
        "lit_methods.datamodules.DetectionDataModule",
    ),
    configs=("consistencydet.yaml", "consistencydet_diffusiondet.yaml"),
    golden=("schedule", "noising", "matcher", "loss", "renewal"),
    claim=(
        "Trained on two adjacent noise levels of the same boxes, a detector's boxes at one level and at the next differ less than when it "
        "is trained on single levels with as many head evaluations."
    ),
    summary="Object detection as denoising of boxes that one step can do: the set losses at two adjacent noise levels of the same boxes.",
)

Levels = Literal["pair", "single"]


class ConsistencyDet(BoxDiffusion):
    """Trains a cascaded head to find the same boxes at two adjacent noise levels, and samples in as many steps as wanted.

    x_j = x_0 + sigma_j noise for ground truths and random boxes x_0, and x_{j+1} one Euler step below; both go through the same head, with
    gradient, and the loss is the sum of the set losses at both levels and of all heads. j is drawn for each image.

    Runs: batches have ``image`` (B, 3, H, W) in [0, 1], padded at the right and at the bottom, ``size`` (B, 2) width and height before the
    padding, ``boxes`` (B, G, 4) corners in pixels, ``label`` (B, G) int64, -1 where there is no box, ``ignore`` (B, G) bool, boxes that are
    no targets, and ``index`` (B,) int64; ``lit predict`` needs ``name`` and ``original_size``, too. Boxes, matching and losses are in
    float32, also under autocast. The number of matched proposals is each process's own, and each micro-batch's. Set ``gradient_clip_val``
    of the Trainer to 1, as the paper does. ``lit predict`` writes ``detections.jsonl`` and ``pictures`` into the run's folder. Beside the
    panels the loss of each head at both levels is logged, ``consistencydet/high_head_*`` and ``low_head_*``.

    Saves: backbone and head.

    Refuses: a backbone and a head of different widths, classes that the data don't have, evaluations without a library that computes AP,
    ``bf16-true`` and ``16-true``, which would round the boxes of a batch.

    Args:
        backbone: Images -> list of feature maps; with ``out_channels`` and ``strides``.
        head: Refines boxes on these maps.
        proposals: P, boxes of an image that are refined together.
        levels: ``pair``: two adjacent levels of the same boxes and noise. ``single``: one, what the pair is compared with.
        num_levels: n, noise levels of the training, >= 2.
        sigma_min: Smallest level.
        sigma_max: Largest level.
        sigma_data: Standard deviation of the boxes, for the scaling of the head's input.
        rho: Spacing of the levels.
        skip: Mix the noisy boxes into the answer, c_skip x + c_out F, as the paper writes; the authors' code doesn't.
        teacher: A trained detector whose prediction, instead of the ground truth, leads from a level to the next; None: none.
        teacher_checkpoint: File of its weights: a checkpoint of its run, or what ``lit export`` wrote.
        eval_steps: Numbers of steps whose average precision is measured; the largest one is what ``lit predict`` takes.
        renewal_threshold: Between two steps a proposal is kept if its best score is above; the others are drawn anew. The paper's is 0.5.
        ensemble: The detections of all steps count; False: those of the last step.
        nms_single: Largest IoU of two detections of a class in one step, or without ensemble.
        nms_ensemble: The same for an ensemble.
        label_weight: Factor of the class loss, in the loss and in the matching.
        l1_weight: Factor of the L1 distance of corners, in both.
        giou_weight: Factor of the generalised IoU, in both.
        federated: Classes whose loss counts in a batch (LVIS: 50), with plain binary cross entropy; 0: all, with focal loss.
        learning_rate: AdamW's learning rate after the warm-up.
        weight_decay: AdamW's weight decay.
        warmup_steps: Steps in which the learning rate rises.
        schedule: ``constant``, ``cosine`` to 0, or ``multistep``: times 0.1 at each milestone.
        milestones: Steps of ``multistep``.
        drawings: Images in the dashboard's picture; 0: no picture.
        seed: Seed of levels, noise and random boxes.

    Raises:
        ValueError: An argument outside its range.
    """

    panels: ClassVar[tuple[Panel, ...]] = (
        *BoxDiffusion.panels,
        Curve(
            "Parts of the loss at both levels",
            ("consistencydet/high_*", "consistencydet/low_*"),
            note="Last head; high is the noisier level. The heads' losses have their factors.",
        ),
        Curve(
            "Self-consistency gap",
            ("consistencydet/gap", "detection/val_gap"),
            note="Mean distance of corners found at a level and at the next one, in shares of the image; of held-out images: val.",
            goal="min",
        ),
    )

    def __init__(
        self,
        backbone: nn.Module,
        head: CascadedHead,
        proposals: int = 500,
        levels: Levels = "pair",
        num_levels: int = 40,
        sigma_min: float = 0.002,
        sigma_max: float = 40.0,
        sigma_data: float = 0.5,
        rho: float = 7.0,
        skip: bool = False,
        teacher: DiffusionDet | None = None,
        teacher_checkpoint: Path | None = None,
        eval_steps: Sequence[int] = (1, 4),
        renewal_threshold: float = 0.9,
        ensemble: bool = True,
        nms_single: float = 0.5,
        nms_ensemble: float = 0.6,
        label_weight: float = 2.0,
        l1_weight: float = 5.0,
        giou_weight: float = 2.0,
        federated: int = 0,
        learning_rate: float = 2.5e-5,
        weight_decay: float = 1e-4,
        warmup_steps: int = 0,
        schedule: Schedule = "constant",
        milestones: Sequence[int] = (),
        drawings: int = 4,
        seed: int = 0,
    ) -> None:
        super().__init__(
            backbone,
            head,
            proposals,
            eval_steps,
            renewal_threshold,
            ensemble,
            nms_single,
            nms_ensemble,
            label_weight,
            l1_weight,
            giou_weight,
            federated,
            drawings,
        )
        checks.one_of(Levels, levels=levels)
        checks.at_least(2, "noise levels", num_levels=num_levels)
        checks.positive(sigma_min=sigma_min, sigma_max=sigma_max, sigma_data=sigma_data, rho=rho)
        check_recipe(learning_rate, weight_decay, warmup_steps, milestones, schedule, seed)
        if self.eval_steps[-1] > num_levels:
            raise ValueError(f"eval_steps has {self.eval_steps[-1]} and num_levels is {num_levels}: give no more steps than levels")
        if teacher is not None and levels == "single":
            raise ValueError("a teacher leads from a level to the next, and levels='single' has one: give levels='pair'")
        if teacher_checkpoint is not None and teacher is None:
            raise ValueError("teacher_checkpoint is given without a teacher: give teacher, a DiffusionDet of the same layout")
        self.save_hyperparameters(ignore=["backbone", "head", "teacher"])
        self._settings = (sigma_min, sigma_max, rho)
        self.levels = detection_levels(num_levels, *self._settings)  # no buffer: bfloat16 would round it
        if teacher is not None and teacher_checkpoint is not None:
            load_into(teacher, Path(teacher_checkpoint))
        self.teacher = None if teacher is None else Frozen(teacher)

    def answer(self, features: Sequence[Tensor], x: Tensor, sigma: Tensor, index: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        """The consistency function: logits (H, N, P, K) and corners in pixels (H, N, P, 4), inside the image.

        Args:
            features: Maps of B images.
            x: (N, P, 4) noisy boxes in signal units, N a multiple of B.
            sigma: (N,) their levels.
            index: (N,) numbers of the levels, the head's time condition.
            size: (N, 2) width and height.
        """
        scalings = detection_scalings(sigma, self.hparams["sigma_min"], self.hparams["sigma_data"])
        logits, boxes = self.head(features, to_pixels(scalings.inp[:, None, None] * x, size), index, self.strides)
        if self.hparams["skip"]:
            boxes = skip_mix(boxes, x, scalings, size)
        return logits, clamp_to_image(boxes, size)

    # ---- training ------------------------------------------------------------------------------------------------------------------------

    def _lower(self, batch: Batch, x: Tensor, sigmas: tuple[Tensor, Tensor], size: Tensor) -> Tensor:
        """The lower noisy boxes by the teacher's prediction."""
        assert self.teacher is not None
        teacher: DiffusionDet = self.teacher.module  # type: ignore[assignment]
        with torch.no_grad():
            x0 = teacher.clean(batch["image"], size, x, sigmas[0])
        return euler_step(x, x0, sigmas[0][:, None, None], sigmas[1][:, None, None])

    def losses(self, batch: Batch, truths: Truths, generator: torch.Generator) -> tuple[Tensor, SetLosses]:
        """The set losses at both levels, or at one."""
        device, images, targets = self.device, len(truths.shares), truths.targets
        pair = self.hparams["levels"] == "pair"
        levels = self.levels.to(device, torch.float32)
        index = torch.randint(len(levels) - 1 - pair, (images,), generator=generator, device=device)
        padding, noise = (torch.randn(images, self.proposals, 4, generator=generator, device=device) for _ in range(2))
        keys = torch.rand(targets.valid.shape, generator=generator, device=device)
        x0 = clean_boxes(truths.shares, targets.valid, padding, keys)
        sigmas = levels[index], levels[index + 1]
        high, low = noisy_pair(x0, noise, *sigmas)
        features = self.features(batch["image"])
        if not pair:
            logits, boxes = self.answer(features, high, sigmas[0], index, targets.size)
            found = set_losses(logits, boxes, targets, self.costs, self.class_weights(targets, generator))
            return found.weighted(self.weights).sum(), found

        if self.teacher is not None:
            low = self._lower(batch, high, sigmas, targets.size)
        both = torch.cat([high, low]), torch.cat(sigmas), torch.cat([index, index + 1]), targets.size.repeat(2, 1)
        logits, boxes = self.answer(features, *both)
        (logits_high, logits_low), (boxes_high, boxes_low) = (part.split(images, dim=1) for part in (logits, boxes))
        class_weights = self.class_weights(targets, generator)
        loss = two_level_loss(logits_high, boxes_high, logits_low, boxes_low, targets, self.weights, self.costs, class_weights)
        if logs_now(self):
            self._log_levels(loss.high, loss.low, boxes_high[-1], boxes_low[-1], targets.size)
        return loss.total, SetLosses(*((a + b) / 2 for a, b in zip(loss.high, loss.low, strict=True)))

    @torch.no_grad()
    def _log_levels(self, high: SetLosses, low: SetLosses, boxes_high: Tensor, boxes_low: Tensor, size: Tensor) -> None:
        logs = {"consistencydet/gap": _gap(boxes_high, boxes_low, size).mean()}
        for level, parts in (("high", high), ("low", low)):
            last = {"label": parts.label[-1], "l1": parts.l1[-1], "giou": parts.giou[-1]}
            logs |= {f"consistencydet/{level}_{name}": value for name, value in last.items()}
            heads = enumerate(parts.weighted(self.weights), start=1)
            logs |= {f"consistencydet/{level}_head_{number}": value for number, value in heads}
        self.log_dict(logs, on_step=True, on_epoch=False, batch_size=len(size))

    # ---- detections ----------------------------------------------------------------------------------------------------------------------

    def sample(self, features: Sequence[Tensor], size: Tensor, noise: Tensor) -> list[Answer]:
        """Karras levels from the largest down to the smallest, as many as steps; the head is told the nearest training level."""

        def predict(x: Tensor, sigma: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
            logits, boxes = self.answer(features, x, sigma, index, size)
            return logits[-1], boxes[-1]

        levels = detection_levels(len(noise), *self._settings).to(noise)
        return consistency_sample(predict, noise, size, levels, self.levels[:-1].to(noise), self.renewal_threshold)

    def figures(self, features: Sequence[Tensor], truths: Truths, index: Tensor) -> dict[str, Tensor]:
        """``gap`` (B,): how far apart the boxes of a level and of the next are, on a trajectory that belongs to the image."""
        noise = self.noise(index, 3)
        x0 = clean_boxes(truths.shares, truths.targets.valid, noise[0])
        numbers = [own_seed(f"ConsistencyDet gap {number}", self.hparams["seed"]) for number in index.tolist()]
        place = torch.tensor([number % (len(self.levels) - 2) for number in numbers], device=self.device)
        levels, size = self.levels.to(noise), truths.targets.size
        pair = noisy_pair(x0, noise[1], levels[place], levels[place + 1])
        high, low = (self.answer(features, x, levels[place + k], place + k, size)[1][-1] for k, x in enumerate(pair))
        return {"gap": _gap(high, low, size)}


def _gap(high: Tensor, low: Tensor, size: Tensor) -> Tensor:
    """Mean absolute distance of corners (B, P, 4) in shares of the image: (B,)."""
    return ((high - low) / image_scale(size)).abs().flatten(1).mean(1)


__all__ = ["ConsistencyDet"]
