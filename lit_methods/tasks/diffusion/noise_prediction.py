"""Diffusion models that predict the noise in noisy latents, such as Stable Diffusion's U-Net."""

from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lit_methods import checks
from lit_methods.evaluated import Evaluated, Part
from lit_methods.hub import fetch
from lit_methods.optim import scheduled, warmup_cosine
from lit_methods.panels import Curve, Panel
from lit_methods.seeds import seeded_noise
from lit_methods.steps import log_global, training_length

# ---- the maths -------------------------------------------------------------------------------------------------------------------------


def signal_shares(steps: int, first: float, last: float) -> Tensor:
    """alpha-bar of the schedule whose betas are squares of equally spaced roots, Stable Diffusion's.

    Args:
        steps: T.
        first: beta of the first step.
        last: beta of the last step.

    Returns:
        (T,) float32, falling: the share of the signal's power that is left.
    """
    betas = torch.linspace(first**0.5, last**0.5, steps, dtype=torch.float64).square()
    return (1 - betas).cumprod(0).float()


def noisy(x: Tensor, noise: Tensor, share: Tensor) -> Tensor:
    """sqrt(a) x + sqrt(1 - a) noise.

    Args:
        x: (B, ...) latents.
        noise: Like ``x``, standard normal.
        share: a, (B,).
    """
    share = share.reshape(-1, *(1,) * (x.ndim - 1)).to(x.dtype)
    return share.sqrt() * x + (1 - share).sqrt() * noise


# ---- network and module ----------------------------------------------------------------------------------------------------------------


class DiffusersUNet(nn.Module):
    """A ``UNet2DConditionModel`` of diffusers from a local folder, such as ``unet`` of Stable Diffusion 1.5.

    Args:
        path: Folder with ``config.json`` and weights. Nothing is downloaded.

    Raises:
        ImportError: diffusers is not installed; the message names the extra.
        FileNotFoundError: ``path`` holds no ``config.json``.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        try:
            import diffusers
        except ImportError as error:
            raise ImportError('DiffusersUNet needs diffusers: pip install "lit-methods[diffusers]"') from error
        path = Path(path).expanduser()
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"path={str(path)!r} has no config.json: give the folder of a UNet2DConditionModel")
        kind: Any = diffusers.UNet2DConditionModel
        self.model: nn.Module = fetch(
            lambda: kind.from_pretrained(str(path), local_files_only=True),
            path,
            given=f"path={str(path)!r}",
            instead="give a complete copy of a UNet2DConditionModel: config.json and weights",
            blank=lambda: kind.from_config(kind.load_config(str(path), local_files_only=True)),
        )

    def forward(self, x: Tensor, time: Tensor, prompt: Tensor) -> Tensor:
        """(B, C, H, W), (B,) int64 and prompts (B, L, D) -> noise (B, C, H, W)."""
        return self.model(x, time, encoder_hidden_states=prompt).sample  # type: ignore[no-any-return]


class NoisePrediction(Evaluated):
    """Trains a network to predict the noise in noisy latents or images, at a step t that is drawn uniformly.

    Runs: batches have ``image`` (B, C, H, W) float32, of standard deviation about 1, and ``prompt`` (B, L, D) where the network takes it;
    frames (B, C, T, H, W) are images, too. Validation and test draw the same steps and noise each time.

    Saves: the network.

    Refuses: a schedule in a training without an end.

    Args:
        network: (x, t) or (x, t, prompt) -> noise.
        timesteps: T, steps of the diffusion.
        beta_first: Variance of the noise that the first step adds.
        beta_last: Variance of the noise that the last step adds.
        learning_rate: AdamW's learning rate after the warm-up.
        weight_decay: AdamW's weight decay.
        warmup_steps: Steps in which the learning rate rises.
        schedule: ``cosine`` to 0, or ``constant``.

    Raises:
        ValueError: A value outside its range.
    """

    panels: ClassVar[tuple[Panel, ...]] = (
        Curve("Error of the predicted noise", ("diffusion/loss", "diffusion/val_loss", "diffusion/test_loss"), goal="min"),
    )

    def __init__(
        self,
        network: nn.Module,
        timesteps: int = 1000,
        beta_first: float = 0.00085,
        beta_last: float = 0.012,
        learning_rate: float = 1e-4,
        weight_decay: float = 0.01,
        warmup_steps: int = 0,
        schedule: Literal["cosine", "constant"] = "cosine",
    ) -> None:
        super().__init__()
        checks.literals(NoisePrediction, locals())
        checks.at_least(1, "steps", timesteps=timesteps)
        checks.within("(0, 1)", "a variance", beta_first=beta_first, beta_last=beta_last)
        checks.positive(learning_rate=learning_rate)
        checks.at_least(0, weight_decay=weight_decay, warmup_steps=warmup_steps)
        self.save_hyperparameters(ignore=["network"])
        self.network = network
        self.shares: Tensor
        self.register_buffer("shares", signal_shares(timesteps, beta_first, beta_last), persistent=False)
        self.eval_loss = MeanMetric()

    def forward(self, x: Tensor, time: Tensor, prompt: Tensor | None = None) -> Tensor:
        """Noise in ``x`` at steps (B,) int64."""
        return self.network(x, time) if prompt is None else self.network(x, time, prompt)  # type: ignore[no-any-return]

    def _error(self, x: Tensor, prompt: Tensor | None, noise: Tensor, time: Tensor) -> Tensor:
        predicted = self(noisy(x, noise, self.shares[time]), time, prompt)
        return (predicted.float() - noise).square().mean()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Mean squared error."""
        x, prompt = _parts(batch)
        time = torch.randint(len(self.shares), (len(x),), device=x.device)
        loss = self._error(x, prompt, torch.randn_like(x), time)
        self.log("diffusion/loss", loss.detach(), prog_bar=True, batch_size=len(x))
        return loss

    def _evaluate(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        x, prompt = _parts(batch)
        steps = torch.linspace(0, len(self.shares) - 1, len(x), device=x.device).long()
        noise = seeded_noise(f"NoisePrediction {batch_idx}", 0, x)
        self.eval_loss.update(self._error(x, prompt, noise, steps), weight=len(x))

    def _log_evaluation(self, part: Part) -> None:
        log_global(self, {f"diffusion/{part}_loss": self.eval_loss.compute()}, prog_bar=True)
        self.eval_loss.reset()

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Noise that the network sees in the latents as they are, at step 0."""
        x, prompt = _parts(batch)
        return {"noise": self(x, torch.zeros(len(x), dtype=torch.int64, device=x.device), prompt)}

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW, with warm-up and cosine per step.

        Raises:
            ValueError: The training has no end, and the cosine needs one.
        """
        hp = self.hparams
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=hp["learning_rate"], weight_decay=hp["weight_decay"])
        if hp["schedule"] == "constant":
            return scheduled(optimizer, lambda step: min(1.0, (step + 1) / max(1, hp["warmup_steps"])))
        total = training_length(self, what="schedule='cosine'", instead=None)
        return scheduled(optimizer, lambda step: warmup_cosine(step, total, hp["warmup_steps"]))


def _parts(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Images (B, C, H, W) of a batch, and their prompts; each frame (B, C, T, H, W) is an image."""
    image, prompt = batch["image"], batch.get("prompt")
    if image.ndim != 5:
        return image, prompt
    frames = image.transpose(1, 2).flatten(0, 1)
    return frames, None if prompt is None else prompt.repeat_interleave(image.shape[2], dim=0)


__all__ = ["DiffusersUNet", "NoisePrediction", "noisy", "signal_shares"]
