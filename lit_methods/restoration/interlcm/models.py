"""Latent consistency models that InterLCM restores with: of diffusers, of a network that was trained here, and one in closed form.

A model is any object with

- ``abar``: (T,) alpha-bar of the times 0..T - 1,
- ``encode`` and ``decode``: images (B, C, H, W) in [-1, 1] -> latents (B, c, h, w), times the model's factor, and back, differentiable,
- ``eps_model(z, t, prompt, residuals)``: noise in latents at times (B,) int64. ``prompt`` is (B, L, D), ``residuals`` a list of tensors
  that are added to features of the network, the last one in its middle; both may be None.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_methods import checks
from lit_methods.consistency_models.networks import SmallUNet
from lit_methods.consistency_models.pairs import consistency_function
from lit_methods.frozen import Frozen
from lit_methods.hub import fetch
from lit_methods.restoration.interlcm.core import guidance_embedding
from lit_methods.tasks.diffusion.noise_prediction import signal_shares

Residuals = Sequence[Tensor]
EXTRA = 'pip install "lit-methods[diffusers]"'
PARTS = ("eps_model", "encode", "decode")


def check_lcm(lcm: Any) -> None:
    """Raise TypeError unless an object is a model in the sense of this file; the message says what it lacks."""
    missing = [name for name in PARTS if not callable(getattr(lcm, name, None))]
    if not isinstance(getattr(lcm, "abar", None), Tensor):
        missing.append("abar")
    if missing:
        raise TypeError(
            f"lcm is a {type(lcm).__name__} without {', '.join(missing)}: give an object with eps_model(z, t, prompt, residuals), encode, "
            "decode and abar (T,), such as DiffusersLCM or SmallLCM"
        )


def check_channels(x: Tensor, expected: int, who: str, what: str = "images") -> None:
    """Raise ValueError unless ``x`` (B, C, ...) has the channels that a network takes; the message says whose and which."""
    if x.shape[1] != expected:
        raise ValueError(f"{who} takes {what} of {expected} channels, got {x.shape[1]} in {tuple(x.shape)}: give both the same number")


class LatentConsistencyModel(nn.Module):
    """Base of the models here: Stable Diffusion's alpha-bar, latents that are the images.

    Args:
        train_steps: T.
    """

    abar: Tensor

    def __init__(self, train_steps: int = 1000) -> None:
        super().__init__()
        self.register_buffer("abar", signal_shares(train_steps, 0.00085, 0.012), persistent=False)

    def eps_model(self, z: Tensor, t: Tensor, prompt: Tensor | None = None, residuals: Residuals | None = None) -> Tensor:
        """Noise in (B, c, h, w) at times (B,), like ``z``."""
        raise NotImplementedError

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) -> latents."""
        return images

    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> images."""
        return latents

    def _level(self, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Alpha-bar (B, 1, 1, 1), sigma = sqrt((1 - a) / a) (B,), and z / sqrt(a), whose noise has the deviation sigma."""
        share = self.abar[t].to(torch.promote_types(z.dtype, torch.float32))
        wide = share.view(-1, *(1,) * (z.ndim - 1))
        return wide, ((1 - share) / share).sqrt(), z / wide.sqrt()


def _noise_of(z: Tensor, start: Tensor, share: Tensor) -> Tensor:
    return (z - share.sqrt() * start) / (1 - share).sqrt()


class DigitLCM(LatentConsistencyModel):
    """The exact consistency model of a Gaussian like scikit-learn's digits, for runs without a download; it is computed, not trained.

    With the digits' mean m and largest principal components U of variances l, f(x, sigma) = m + U (sqrt(l / (l + sigma^2)) U^T (x - m)
    + mean of the prompt's tokens + U^T residual): answers are m plus a sum of components. Prompts have an entry for each component; the
    one residual looks like the image.

    Args:
        image_size: Pixels a side.
        components: Principal components, which is the width of a prompt.
    """

    centre: Tensor
    basis: Tensor
    power: Tensor

    def __init__(self, image_size: int = 16, components: int = 48) -> None:
        super().__init__()
        from lit_methods.datamodules.generative.images import GenerativeDigitsDataModule

        checks.within(f"[1, {min(image_size**2, 1497)}]", "components", components=components)
        data = GenerativeDigitsDataModule(image_size, num_train=1497)
        data.setup("fit")
        assert data.train_set is not None
        pixels = data.train_set.images.double().flatten(1)
        centre = pixels.mean(0)
        found = torch.linalg.eigh((pixels - centre).T @ (pixels - centre) / len(pixels))
        axes = found.eigenvectors[:, -components:]
        axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()  # the sign is free: the same on every machine
        self.register_buffer("centre", centre.float())
        self.register_buffer("basis", axes.float())
        self.register_buffer("power", found.eigenvalues[-components:].clamp(min=0).float())

    def eps_model(self, z: Tensor, t: Tensor, prompt: Tensor | None = None, residuals: Residuals | None = None) -> Tensor:
        """(B, 1, S, S) and (B,), prompt (B, L, components), one residual (B, 1, S, S) -> (B, 1, S, S)."""
        with torch.autocast(z.device.type, enabled=False):
            share, sigma, x = self._level(z, t)
            kept = (self.power / (self.power + sigma[:, None].square())).sqrt()
            parts = kept * ((x.flatten(1) - self.centre) @ self.basis)
            if prompt is not None:
                parts = parts + prompt.to(parts.dtype).mean(1)
            if residuals is not None:
                parts = parts + residuals[-1].to(parts.dtype).flatten(1) @ self.basis
            start = (self.centre + parts @ self.basis.T).view_as(x)
            return _noise_of(z.to(start.dtype), start, share)


class ControlledUNet(SmallUNet):
    """A :class:`~lit_methods.SmallUNet` that takes prompts and residuals, with the same weights under the same names.

    The mean of a prompt's tokens is added to the embedding of the noise; a residual is added to each skip connection and to the middle.
    """

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        noise: Tensor,
        labels: Tensor | None = None,
        prompt: Tensor | None = None,
        residuals: Residuals | None = None,
    ) -> Tensor:
        """(B, C, H, W), (B,), labels (B,), prompt (B, L, 4 channels), a residual a skip connection and one more -> (B, C, H, W)."""
        embedding = self.embedded(noise.to(x.dtype), labels, prompt)
        skips, h = self.features(self.inp(x), embedding)
        if residuals is not None:
            if len(residuals) != len(skips) + 1:
                raise ValueError(f"got {len(residuals)} residuals for {len(skips)} skip connections and the middle: give one each")
            skips = [skip + residual for skip, residual in zip(skips, residuals[:-1], strict=True)]
            h = h + residuals[-1]
        for layer in self.up:
            h = layer(torch.cat([h, skips.pop()], dim=1), embedding) if _is_block(layer) else layer(h)
        answer: Tensor = self.out(h)
        return answer

    def embedded(self, noise: Tensor, labels: Tensor | None = None, prompt: Tensor | None = None) -> Tensor:
        """What all blocks know: noise condition (B,), labels (B,) and prompt (B, L, 4 channels) -> (B, 4 channels)."""
        embedding: Tensor = self.embed(self._embed_noise(noise).to(noise.dtype))
        if self.classes is not None and labels is not None:
            embedding = embedding + self.classes(labels)
        if prompt is not None:
            embedding = embedding + prompt.to(embedding.dtype).mean(1)
        return F.silu(embedding)

    def features(self, h: Tensor, embedding: Tensor) -> tuple[list[Tensor], Tensor]:
        """Skip connections of the first features, and the middle."""
        skips = [h]
        for layer in self.down:
            h = layer(h, embedding) if _is_block(layer) else layer(h)
            skips.append(h)
        return skips, self.middle(h, embedding)


def _is_block(layer: nn.Module) -> bool:
    return hasattr(layer, "modulation")


class SmallLCM(LatentConsistencyModel):
    """A consistency model f(x, sigma) that ``ConsistencyTraining`` trained here, in the place of a latent consistency model.

    Noisy latents z = sqrt(a) x + sqrt(1 - a) eps are z / sqrt(a) to it, at sigma = sqrt((1 - a) / a).

    Args:
        network: F, such as ``ControlledUNet``; it is called with (x, noise condition, prompt=, residuals=).
        weights: Checkpoint of a ``ConsistencyTraining`` with a ``SmallUNet`` of the same arguments; None: the network as it is.
        prefix: What the names of the network's weights begin with in the file.
        sigma_min: Of the training.
        sigma_data: Of the training.
        autoencoder: With ``encode`` and ``decode``, whose latents the model is of; None: it is of images.
        scale: Factor of latents.

    Raises:
        ValueError: The file holds other weights.
    """

    def __init__(
        self,
        network: nn.Module,
        weights: Path | None = None,
        prefix: str = "network.",
        sigma_min: float = 0.002,
        sigma_data: float = 0.5,
        autoencoder: nn.Module | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        checks.positive(sigma_min=sigma_min, sigma_data=sigma_data, scale=scale)
        if weights is not None:
            from lit_methods.runs.checkpoints import load_into

            load_into(network, weights, prefix)
        self.network, self.sigma_min, self.sigma_data, self.scale = network, sigma_min, sigma_data, scale
        self.autoencoder = None if autoencoder is None else Frozen(autoencoder)

    def eps_model(self, z: Tensor, t: Tensor, prompt: Tensor | None = None, residuals: Residuals | None = None) -> Tensor:
        """(B, c, h, w), (B,), and what the network takes -> (B, c, h, w) float32 or wider."""
        if isinstance(self.network, SmallUNet):
            check_channels(z, self.network.inp.in_channels, "SmallLCM's network", "latents")
        share, sigma, x = self._level(z, t)

        def controlled(x: Tensor, noise: Tensor) -> Tensor:
            answer: Tensor = self.network(x, noise, prompt=prompt, residuals=residuals)
            return answer

        start = consistency_function(controlled, self.sigma_min, self.sigma_data)(x, sigma)
        return _noise_of(z.to(start.dtype), start, share)

    def encode(self, images: Tensor) -> Tensor:
        """Images -> latents."""
        if self.autoencoder is None:
            return images
        return self.autoencoder.module.encode(images) * self.scale  # type: ignore[operator, no-any-return]

    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> images."""
        if self.autoencoder is None:
            return latents
        return self.autoencoder.module.decode(latents / self.scale)  # type: ignore[operator, no-any-return]


class DiffusersLCM(LatentConsistencyModel):
    """A latent consistency model of diffusers, such as SimianLuo/LCM_Dreamshaper_v7: U-Net, autoencoder and schedule of its pipeline.

    A U-Net that knows the strength of its guidance is told ``guidance``. The text encoder isn't loaded: prompts come from a visual encoder.

    Args:
        path: Folder of the pipeline with ``unet``, ``vae`` and ``scheduler``, or its name on the hub.
        guidance: Strength of classifier-free guidance that the U-Net imitates.

    Raises:
        ImportError: diffusers is not installed; the message names the extra.
        ValueError: A part is missing, or the U-Net predicts something else than the noise.
    """

    guidance: Tensor | None

    def __init__(self, path: str, guidance: float = 8.0) -> None:
        library = diffusers_library("DiffusersLCM")
        super().__init__()
        self.unet: Any = diffusers_part(library.UNet2DConditionModel, path, "unet")
        self.vae: Any = diffusers_part(library.AutoencoderKL, path, "vae")
        scheduler: Any = diffusers_part(library.LCMScheduler, path, "scheduler")
        if (kind := scheduler.config.prediction_type) != "epsilon":
            raise ValueError(f"path={path!r}: the U-Net predicts {kind!r}: give a pipeline that predicts the noise, 'epsilon'")
        self.register_buffer("abar", scheduler.alphas_cumprod.float(), persistent=False)
        width = self.unet.config.time_cond_proj_dim
        told = None if width is None else guidance_embedding(guidance, width)
        self.register_buffer("guidance", told, persistent=False)
        self.scale: float = self.vae.config.scaling_factor

    def eps_model(self, z: Tensor, t: Tensor, prompt: Tensor | None = None, residuals: Residuals | None = None) -> Tensor:
        """(B, 4, h, w), (B,), prompt (B, L, width of the U-Net's cross-attention), residuals of a ControlNet -> (B, 4, h, w)."""
        if prompt is None:
            prompt = z.new_zeros(len(z), 77, self.unet.config.cross_attention_dim)
        dtype = self.unet.dtype
        told = None if self.guidance is None else self.guidance.to(dtype).expand(len(z), -1)
        extra: dict[str, Any] = {}
        if residuals is not None:
            wide = [residual.to(dtype) for residual in residuals]
            extra = {"down_block_additional_residuals": tuple(wide[:-1]), "mid_block_additional_residual": wide[-1]}
        answer: Tensor = self.unet(z.to(dtype), t, encoder_hidden_states=prompt.to(dtype), timestep_cond=told, **extra).sample
        return answer

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> mean of the posterior, times the factor: (B, 4, H / 8, W / 8)."""
        check_channels(images, self.vae.config.in_channels, "DiffusersLCM")
        latents: Tensor = self.vae.encode(images.to(self.vae.dtype)).latent_dist.mean
        return latents * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """(B, 4, h, w) -> (B, 3, 8 h, 8 w), not clamped."""
        images: Tensor = self.vae.decode(latents.to(self.vae.dtype) / self.scale).sample
        return images


def diffusers_library(who: str) -> Any:
    """The library.

    Args:
        who: What needs it, for the message.

    Raises:
        ImportError: It is not installed.
    """
    try:
        import diffusers
    except ImportError as error:
        raise ImportError(f"{who} needs diffusers: {EXTRA}") from error
    return diffusers


def diffusers_part(kind: Any, path: str, name: str | None) -> Any:
    """A part of a pipeline of diffusers.

    Args:
        kind: Class of diffusers.
        path: Folder of the pipeline, or its name on the hub.
        name: Folder of the part in it; None: ``path`` is the part.

    Raises:
        ValueError: It isn't there.
    """
    place = str(Path(path).expanduser()) if path.startswith("~") else path
    words = {} if name is None else {"subfolder": name}
    return fetch(
        lambda: kind.from_pretrained(place, **words),
        place,
        given=f"path={path!r}" + ("" if name is None else f", {name}"),
        instead="give the folder of a pipeline of diffusers with unet, vae and scheduler, or its name on the hub",
        blank=lambda: kind.from_config(kind.load_config(place, **words)),
    )


__all__ = ["ControlledUNet", "DiffusersLCM", "DigitLCM", "LatentConsistencyModel", "SmallLCM", "check_channels", "check_lcm"]
