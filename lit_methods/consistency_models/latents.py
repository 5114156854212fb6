"""Latents of a frozen autoencoder: standardised for training, decoded for pictures; autoencoders and networks to do it with.

An autoencoder is any module with ``encode`` (B, C, H, W) images in [-1, 1] -> (B, c, h, w) latents, and ``decode`` back.
"""

from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_methods.frozen import Frozen
from lit_methods.hub import fetch

EXTRA = 'pip install "lit-methods[diffusers]"'


# ---- the maths -------------------------------------------------------------------------------------------------------------------------


def standardise(latents: Tensor, mean: Tensor, std: Tensor, sigma_data: float = 0.5) -> Tensor:
    """(z - mean) / std * sigma_data: latents (B, c, h, w) as consistency training wants them (sLCT, arXiv:2502.01441).

    Args:
        latents: (B, c, h, w), without any factor such as 0.18215.
        mean: (c, 1, 1), or (c, h, w) as the authors' statistics have it.
        std: Standard deviation of each channel, > 0.
        sigma_data: Standard deviation of the result.
    """
    return (latents - mean.to(latents)) / std.to(latents) * sigma_data


def unstandardise(x: Tensor, mean: Tensor, std: Tensor, sigma_data: float = 0.5) -> Tensor:
    """(x / sigma_data) std + mean: the inverse of :func:`standardise`."""
    return x * (std.to(x) / sigma_data) + mean.to(x)


class _Statistics:
    """Mean and standard deviation of latents, (c, 1, 1) or (c, h, w) float32; empty until they are known. A copy is the same object."""

    def __init__(self) -> None:
        self.mean, self.std = torch.empty(0), torch.empty(0)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Statistics":
        # averaged weights copy the module before it has seen its data, and are what a checkpoint holds
        return self


class LatentSpace(nn.Module):
    """A frozen autoencoder, and the statistics that its latents were standardised with.

    The autoencoder isn't saved (:class:`~lit_methods.frozen.Frozen`); the statistics are: they belong to the weights that were trained. A
    copy of the module shares them.

    Args:
        autoencoder: With ``encode`` and ``decode``.
        sigma_data: Standard deviation of standardised latents.

    Raises:
        TypeError: ``autoencoder`` can't decode.
    """

    place: Tensor

    def __init__(self, autoencoder: nn.Module, sigma_data: float = 0.5) -> None:
        super().__init__()
        if not callable(getattr(autoencoder, "decode", None)):
            name = type(autoencoder).__name__
            raise TypeError(f"autoencoder is a {name} without decode(latents) -> images: give DiffusersAutoencoder or the like")
        self.frozen = Frozen(autoencoder)
        self.sigma_data = sigma_data
        self.statistics = _Statistics()
        self.register_buffer("place", torch.empty(0), persistent=False)  # knows the device

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Take over the statistics of the training latents, (c, 1, 1) or (c, h, w) each."""
        mean, std = torch.broadcast_tensors(mean.detach().cpu().float(), std.detach().cpu().float())
        self.statistics.mean, self.statistics.std = mean.clone(), std.clone()

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Standardised latents (B, c, h, w) -> images (B, C, H, W), clamped to [-1, 1].

        Raises:
            RuntimeError: The statistics aren't known.
        """
        mean, std = self.statistics.mean, self.statistics.std
        if not mean.numel():
            raise RuntimeError("the statistics of the latents aren't known: train with LatentDataModule, or load a checkpoint that was")
        latents = unstandardise(x.to(self.place.device, torch.float32), mean, std, self.sigma_data)
        images: Tensor = self.frozen.module.decode(latents)  # type: ignore[operator]
        return images.float().clamp(-1, 1)

    def get_extra_state(self) -> Tensor:
        """(2, ...) mean and standard deviation; of no fixed shape, so no buffer."""
        return torch.stack([self.statistics.mean, self.statistics.std])

    def set_extra_state(self, state: Tensor) -> None:
        """Take over what was saved, if it was known."""
        if state.numel():
            self.set_statistics(state[0], state[1])


# ---- diffusers -------------------------------------------------------------------------------------------------------------------------


def _diffusers(what: str) -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise ImportError(f"{what} needs diffusers: {EXTRA}") from error
    return diffusers


class DiffusersAutoencoder(nn.Module):
    """An ``AutoencoderKL`` of diffusers from a local folder, such as Stable Diffusion's ``sd-vae-ft-ema`` in sLCT.

    The factor in its configuration (0.18215) isn't applied: latents are the encoder's own.

    Args:
        path: Folder with ``config.json`` and weights. Nothing is downloaded.
        sample: Draw latents from the encoder's posterior; False: take its mode.

    Raises:
        ImportError: diffusers is not installed; the message names the extra.
        FileNotFoundError: ``path`` holds no ``config.json``.
        ValueError: It holds no readable weights.
    """

    def __init__(self, path: Path, sample: bool = False) -> None:
        super().__init__()
        path = Path(path).expanduser()
        diffusers = _diffusers("DiffusersAutoencoder")
        if not (path / "config.json").is_file():
            raise FileNotFoundError(
                f"path={str(path)!r} has no config.json: give the folder of an AutoencoderKL, such as a copy of stabilityai/sd-vae-ft-ema"
            )
        self.model: nn.Module = fetch(
            lambda: diffusers.AutoencoderKL.from_pretrained(str(path), local_files_only=True),
            path,
            given=f"path={str(path)!r}",
            instead="give a complete copy of an AutoencoderKL: config.json and weights",
            blank=lambda: diffusers.AutoencoderKL.from_config(diffusers.AutoencoderKL.load_config(str(path), local_files_only=True)),
        )
        self.sample = sample

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 4, H / 8, W / 8)."""
        posterior = self.model.encode(images).latent_dist  # type: ignore[operator]
        latents: Tensor = posterior.sample() if self.sample else posterior.mode()
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        """(B, 4, h, w) -> (B, 3, 8 h, 8 w)."""
        images: Tensor = self.model.decode(latents).sample  # type: ignore[operator]
        return images


class DiffusersNetwork(nn.Module):
    """A ``UNet2DModel`` or ``DiTTransformer2DModel`` of diffusers as F of a consistency model; weights are random.

    Args:
        kind: Class of diffusers.
        config: Its arguments, such as ``{sample_size: 32, in_channels: 4, out_channels: 4, ...}``.
        time_scale: The noise condition ln(sigma) / 4 times this is what the class takes for a time step, which it expects in 0..1000.

    Raises:
        ImportError: diffusers is not installed; the message names the extra.
    """

    def __init__(
        self, config: dict[str, Any], kind: Literal["UNet2DModel", "DiTTransformer2DModel"] = "UNet2DModel", time_scale: float = 1000.0
    ) -> None:
        super().__init__()
        if kind not in ("UNet2DModel", "DiTTransformer2DModel"):
            raise ValueError(f"kind is {kind!r}: give 'UNet2DModel' or 'DiTTransformer2DModel'")
        self.model: nn.Module = getattr(_diffusers("DiffusersNetwork"), kind)(**config)
        self.transformer, self.time_scale = kind == "DiTTransformer2DModel", time_scale

    def forward(self, x: Tensor, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """(B, C, H, W), (B,) and labels (B,) -> (B, C, H, W). A transformer without labels gets class 0 for all."""
        if labels is None and self.transformer:
            labels = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        answer: Tensor = self.model(x, noise * self.time_scale, class_labels=labels).sample
        return answer


# ---- the built-in autoencoder ----------------------------------------------------------------------------------------------------------


class DigitAutoencoder(nn.Module):
    """A linear autoencoder of ``GenerativeDigitsDataModule`` at 16 x 16 pixels, for runs without a download: latents of 4 x 4 x 4.

    Each patch of 4 x 4 pixels becomes its four largest principal components, those of the first 1,500 digits; the decoder is the transpose.
    It is computed when it is made, in closed form: nothing is drawn.
    """

    SIZE, PATCH, LATENTS = 16, 4, 4
    centre: Tensor
    basis: Tensor

    def __init__(self) -> None:
        super().__init__()
        from lit_methods.datamodules.generative.images import GenerativeDigitsDataModule

        data = GenerativeDigitsDataModule(image_size=self.SIZE)
        data.setup("fit")
        assert data.train_set is not None
        patches = F.pixel_unshuffle(data.train_set.images.double(), self.PATCH).movedim(1, -1).flatten(0, 2)  # (patches, pixels)
        centre = patches.mean(0)
        axes = torch.linalg.eigh((patches - centre).T @ (patches - centre)).eigenvectors[:, -self.LATENTS :]
        axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()  # the sign is free: the same on every machine
        self.register_buffer("centre", centre.float()[:, None, None])
        self.register_buffer("basis", axes.T.float())

    def encode(self, images: Tensor) -> Tensor:
        """(B, 1, 16, 16) in [-1, 1] -> (B, 4, 4, 4)."""
        return torch.einsum("cp,bphw->bchw", self.basis, F.pixel_unshuffle(images, self.PATCH) - self.centre)

    def decode(self, latents: Tensor) -> Tensor:
        """(B, 4, 4, 4) -> (B, 1, 16, 16)."""
        return F.pixel_shuffle(torch.einsum("cp,bchw->bphw", self.basis, latents) + self.centre, self.PATCH)
