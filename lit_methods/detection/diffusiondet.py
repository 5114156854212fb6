"""DiffusionDet (arXiv:2211.09788): boxes from noise by a diffusion of 1,000 steps, the baseline of few-step detectors.

Recipe and sampler are the paper's (mem); no code was compared with.
"""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from lit_methods import checks
from lit_methods.detection.criterion import SetLosses, set_losses
from lit_methods.detection.detector import Answer, Batch, BoxDiffusion, Schedule, Truths, check_recipe
from lit_methods.detection.networks import CascadedHead
from lit_methods.detection.noise import clamp_to_image, clean_boxes, kept_first, to_pixels, to_signal
from lit_methods.diffusion.ddim import ddim_step


def cosine_shares(steps: int, offset: float = 0.008) -> Tensor:
    """alpha-bar of the cosine schedule (arXiv:2102.09672, Eq. 17), with betas of at most 0.999: (steps,) float64, falling."""
    time = torch.arange(steps + 1, dtype=torch.float64) / steps
    shares = torch.cos((time + offset) / (1 + offset) * math.pi / 2) ** 2
    betas = (1 - shares[1:] / shares[:-1]).clamp(0, 0.999)
    return (1 - betas).cumprod(0)


class DiffusionDet(BoxDiffusion):
    """Trains a cascaded head to find boxes in boxes with noise of one random step of a diffusion, and samples with DDIM.

    x_t = sqrt(a_t) scale x_0 + sqrt(1 - a_t) noise, clamped to [-scale, scale], where x_0 are ground truths and random boxes; the loss is
    the set loss of every head's answer.

    Runs: batches as of :class:`ConsistencyDet`.

    Saves: backbone and head.

    Refuses: what :class:`ConsistencyDet` refuses.

    Args:
        backbone: Images -> list of feature maps; with ``out_channels`` and ``strides``.
        head: Refines boxes on these maps.
        proposals: P, boxes of an image that are refined together.
        timesteps: T, steps of the diffusion.
        signal_scale: Factor of the signal, which makes the noise matter less.
        eval_steps: Numbers of steps whose average precision is measured; the largest one is what ``lit predict`` takes.
        renewal_threshold: Between two steps a proposal is kept if its best score is above; the others are drawn anew.
        eta: 1: DDIM adds as much noise as DDPM; 0: none.
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
        seed: Seed of steps, noise and random boxes.

    Raises:
        ValueError: An argument outside its range.
    """

    draws_per_step: ClassVar[int] = 2  # of DDIM, and of the proposals that are drawn anew

    def __init__(
        self,
        backbone: nn.Module,
        head: CascadedHead,
        proposals: int = 500,
        timesteps: int = 1000,
        signal_scale: float = 2.0,
        eval_steps: Sequence[int] = (1, 4),
        renewal_threshold: float = 0.5,
        eta: float = 1.0,
        ensemble: bool = True,
        nms_single: float = 0.5,
        nms_ensemble: float = 0.5,
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
        checks.at_least(1, "steps", timesteps=timesteps)
        checks.positive(signal_scale=signal_scale)
        checks.share(eta=eta)
        check_recipe(learning_rate, weight_decay, warmup_steps, milestones, schedule, seed)
        if self.eval_steps[-1] > timesteps:
            raise ValueError(f"eval_steps has {self.eval_steps[-1]} and the diffusion {timesteps} steps: give no more than that")
        self.save_hyperparameters(ignore=["backbone", "head"])
        self.shares = cosine_shares(timesteps)  # no buffer: bfloat16 would round it

    def answer(self, features: Sequence[Tensor], x: Tensor, time: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (H, B, P, K) and corners in pixels (H, B, P, 4), inside the image, of noisy boxes (B, P, 4) at steps (B,)."""
        scale = self.hparams["signal_scale"]
        boxes = to_pixels((x.clamp(-scale, scale) / scale).float(), size)
        logits, found = self.head(features, boxes, time, self.strides)
        return logits, clamp_to_image(found, size)

    def losses(self, batch: Batch, truths: Truths, generator: torch.Generator) -> tuple[Tensor, SetLosses]:
        """The set losses at one step of the diffusion for each image."""
        hp, device, images = self.hparams, self.device, len(truths.shares)
        time = torch.randint(hp["timesteps"], (images,), generator=generator, device=device)
        padding, noise = (torch.randn(images, self.proposals, 4, generator=generator, device=device) for _ in range(2))
        keys = torch.rand(truths.targets.valid.shape, generator=generator, device=device)
        x0 = clean_boxes(truths.shares, truths.targets.valid, padding, keys)
        share = self.shares.to(device)[time].float()[:, None, None]
        x = share.sqrt() * hp["signal_scale"] * x0 + (1 - share).sqrt() * noise
        logits, boxes = self.answer(self.features(batch["image"]), x, time, truths.targets.size)
        found = set_losses(logits, boxes, truths.targets, self.costs, self.class_weights(truths.targets, generator))
        return found.weighted(self.weights).sum(), found

    def sample(self, features: Sequence[Tensor], size: Tensor, noise: Tensor) -> list[Answer]:
        """DDIM over equally spaced steps from T - 1 down; sure proposals go on and the others are drawn anew."""
        hp, steps = self.hparams, len(noise) // self.draws_per_step
        times = torch.linspace(-1, hp["timesteps"] - 1, steps + 1).long().flip(0)
        shares = self.shares.to(self.device)
        x, answers = noise[0], []
        for step in range(steps):
            time = times[step].to(self.device).expand(len(size))
            logits, boxes = (part[-1] for part in self.answer(features, x, time, size))
            kept = torch.ones(len(size), device=self.device)
            if step + 1 < steps:
                share, following = shares[times[step]], shares[times[step + 1]]
                wide = x.double()
                x0 = hp["signal_scale"] * to_signal(boxes, size).double()
                eps = (wide - share.sqrt() * x0) / (1 - share).sqrt()
                added, fresh = noise[2 * step + 1], noise[2 * step + 2]
                moved = ddim_step(wide, eps, share, following, hp["eta"], added.double()).to(x.dtype)
                sure = logits.sigmoid().amax(-1) > self.renewal_threshold
                x, kept = kept_first(moved, sure, fresh), sure.float().mean(1)
            answers.append(Answer(logits, boxes, kept))
        return answers

    def clean(self, images: Tensor, size: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """What a consistency model's noisy boxes x_0 + sigma noise were, in signal units: the teacher of a distillation.

        Times ``signal_scale`` they are boxes of the diffusion's step whose noise is as large beside the signal; the last head answers.

        Args:
            images: (B, 3, H, W) in [0, 1].
            size: (B, 2) width and height.
            x: (B, P, 4).
            sigma: (B,).

        Returns:
            (B, P, 4) in [-1, 1].
        """
        scale = self.hparams["signal_scale"]
        wanted = 1 / (1 + (scale * sigma.double()) ** 2)  # the share of the signal's power
        shares = self.shares.to(x.device)
        time = (shares.log() - wanted.log()[:, None]).abs().argmin(1)
        scaled = wanted.sqrt()[:, None, None] * scale * x
        return to_signal(self.answer(self.features(images), scaled.to(x.dtype), time, size)[1][-1], size)


__all__ = ["DiffusionDet", "cosine_shares"]
