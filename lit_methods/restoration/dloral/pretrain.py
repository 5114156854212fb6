"""The small model that DLoRAL's small runs start from: one U-Net that knows noisy frames, and restores frames one by one."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from lit_methods import checks
from lit_methods.distributed import gather_rows
from lit_methods.evaluated import Evaluated, Part
from lit_methods.optim import scheduled, warmup_cosine
from lit_methods.panels import Curve, Panel
from lit_methods.restoration.dloral.networks import Backbone
from lit_methods.seeds import own_seed
from lit_methods.steps import log_global, training_length
from lit_methods.tasks.diffusion.noise_prediction import noisy

Batch = Mapping[str, Any]


class OneStepPretraining(Evaluated):
    """Trains a backbone's U-Net as a diffusion model of clean and of degraded frames, and to restore a frame in its first step.

    The loss is the mean squared error of the noise in clean frames (condition 0) and degraded ones (condition 1) at a step that is drawn,
    and, at step ``timestep``, that of degraded - clean latents: what is to be taken off. It stands in for Stable Diffusion, which full runs
    start from.

    Runs: batches have ``lq`` and ``gt`` (B, T, 3, H, W) float32 in [-1, 1]; each frame is by itself.

    Saves: the U-Net; ``SmallBackbone`` reads it by ``pretrained``.

    Refuses: frames whose sides the networks can't halve, by their own message; a training without an end.

    Args:
        backbone: Such as ``SmallBackbone``.
        timestep: Step of the diffusion in which a frame is restored.
        restoration_weight: Factor of the restoration's error, >= 0; 0: a diffusion model alone.
        learning_rate: AdamW's after the warm-up; it falls to 0 by half a cosine.
        weight_decay: AdamW's.
        warmup_steps: Steps in which the learning rate rises.
        seed: Seed of steps and noise.

    Raises:
        ValueError: A value outside its range.
    """

    panels: ClassVar[tuple[Panel, ...]] = (
        Curve("Loss", ("dloral_base/loss", "dloral_base/val_loss", "dloral_base/test_loss"), goal="min"),
        Curve("Error of the noise", ("dloral_base/noise", "dloral_base/val_noise"), goal="min"),
        Curve("PSNR of single frames", ("dloral_base/val_psnr", "dloral_base/test_psnr", "dloral_base/val_psnr_input"), goal="max"),
    )

    def __init__(
        self,
        backbone: Backbone,
        timestep: int = 1,
        restoration_weight: float = 1.0,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        warmup_steps: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        checks.positive(learning_rate=learning_rate)
        checks.at_least(0, restoration_weight=restoration_weight, weight_decay=weight_decay, warmup_steps=warmup_steps, seed=seed)
        checks.within(f"[0, {len(backbone.shares) - 1}]", "a step of the diffusion", timestep=timestep)
        self.save_hyperparameters(ignore=["backbone"])
        self.backbone = backbone
        self._rows: list[Tensor] = []

    def _errors(self, batch: Batch, place: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Error of the noise and of what is taken off, (B T,) each; degraded and restored frames."""
        if not isinstance(batch.get("lq"), Tensor) or batch["lq"].ndim != 5:
            raise ValueError(f"batches have {sorted(batch)}: OneStepPretraining takes lq and gt (B, T, 3, H, W)")
        degraded, clean = (self.backbone.encode(batch[name].flatten(0, 1)) for name in ("lq", "gt"))
        count = len(clean)
        generator = torch.Generator().manual_seed(own_seed(f"OneStepPretraining {place}", self.hparams["seed"]))
        steps = torch.randint(len(self.backbone.shares), (2 * count,), generator=generator).to(self.device)
        noise = torch.randn(2 * count, *clean.shape[1:], generator=generator).to(clean)
        wanted, unwanted = self.backbone.conditions(count)
        mixed = noisy(torch.cat([clean, degraded]), noise, self.backbone.shares.to(self.device)[steps])
        first = torch.full((count,), self.hparams["timestep"], device=self.device)
        answers = self.backbone.network(
            torch.cat([mixed, degraded]), torch.cat([steps, first]), torch.cat([wanted, unwanted, wanted])
        ).float()  # fmt: skip
        of_noise = (answers[: 2 * count] - noise).square().flatten(1).mean(1).view(2, count).mean(0)
        off = answers[2 * count :]
        return of_noise, (off - (degraded - clean)).square().flatten(1).mean(1), degraded, degraded - off

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Both errors."""
        of_noise, of_frame, *_ = self._errors(batch, f"rank {self.global_rank} step {self.global_step} batch {batch_idx}")
        loss = of_noise.mean() + self.hparams["restoration_weight"] * of_frame.mean()
        self.log_dict({"dloral_base/loss": loss.detach(), "dloral_base/noise": of_noise.mean().detach()}, batch_size=len(of_noise))
        return loss

    def on_validation_epoch_start(self) -> None:
        """Forget what an interrupted validation left."""
        self._rows = []

    def on_test_epoch_start(self) -> None:
        """Forget what an interrupted test left."""
        self._rows = []

    def _evaluate(self, batch: Batch, batch_idx: int) -> None:
        of_noise, of_frame, degraded, restored = self._errors(batch, f"evaluation on rank {self.global_rank}, batch {batch_idx}")
        clean = batch["gt"].flatten(0, 1).float()
        psnr = [
            -10 * ((self.backbone.decode(z).clamp(-1, 1).float() - clean).square().flatten(1).mean(1).clamp(min=1e-10) / 4).log10()
            for z in (restored, degraded)
        ]
        self._rows.append(torch.stack([of_noise + self.hparams["restoration_weight"] * of_frame, of_noise, *psnr], dim=1))

    def _log_evaluation(self, part: Part) -> None:
        if not self._rows:
            raise ValueError(f"rank {self.global_rank} has no clip to restore: take fewer ranks or a smaller eval_batch_size")
        means = gather_rows(torch.cat(self._rows), with_grad=False).mean(0)
        names = ("loss", "noise", "psnr", "psnr_input")
        log_global(self, {f"dloral_base/{part}_{name}": value for name, value in zip(names, means, strict=True)})
        self._rows = []

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """``video`` (B, T, 3, H, W): the frames of ``lq``, each restored by itself."""
        lq = batch["lq"]
        latents = self.backbone.encode(lq.flatten(0, 1))
        wanted, _ = self.backbone.conditions(len(latents))
        t = torch.full((len(latents),), self.hparams["timestep"], device=latents.device)
        restored = self.backbone.decode(latents - self.backbone.network(latents, t, wanted)).clamp(-1, 1)
        return {"video": restored.float().unflatten(0, lq.shape[:2])}

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW, with warm-up and cosine per step."""
        hp = self.hparams
        optimizer = torch.optim.AdamW(self.backbone.network.parameters(), lr=hp["learning_rate"], weight_decay=hp["weight_decay"])
        total = training_length(self, what="the cosine", instead=None)
        return scheduled(optimizer, lambda step: warmup_cosine(step, total, hp["warmup_steps"]))


__all__ = ["OneStepPretraining"]
