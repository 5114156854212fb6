"""What DLoRAL restores with: a U-Net with both adapters and an autoencoder, small ones that train here or Stable Diffusion's."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_methods import checks
from lit_methods.consistency_models.networks import SmallUNet
from lit_methods.diffusion.denoisers import denoise_of
from lit_methods.diffusion.lora import LoRALayer, adapters_off, add_adapters, check_ranks
from lit_methods.frozen import Frozen
from lit_methods.hub import fetch
from lit_methods.tasks.diffusion.noise_prediction import signal_shares

CONSISTENCY_ADAPTER, DETAIL_ADAPTER = "consistency", "quality"
EXTRA = 'pip install "lit-methods[diffusers]" transformers'


# ---- backbones -------------------------------------------------------------------------------------------------------------------------


class Backbone(nn.Module):
    """Base of what is restored with.

    Attributes:
        network: U-Net of (latents (B, C, h, w), steps (B,), conditions) -> noise.
        conv_in: Name of its first convolution.
        channels: C.
        shares: alpha-bar of its diffusion, (T,).
        multiple: Frames are padded to multiples of so many pixels.
    """

    network: nn.Module
    conv_in: str
    channels: int
    shares: Tensor
    multiple: int

    def encode(self, frames: Tensor, noise: Tensor | None = None) -> Tensor:
        """Frames (B, 3, H, W) in [-1, 1] -> latents (B, C, h, w); with standard normal noise like them a sample, else the mean."""
        raise NotImplementedError

    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> frames, with a gradient."""
        raise NotImplementedError

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """C, h and w of frames of a size."""
        raise NotImplementedError

    def conditions(self, count: int, texts: Sequence[str] | None = None) -> tuple[Any, Any]:
        """Conditions of ``count`` frames, (count, ...) each: what is wanted, and what isn't.

        Args:
            count: Frames.
            texts: What each of them shows; None: nothing is said.
        """
        raise NotImplementedError


class StepUNet(SmallUNet):
    """``SmallUNet`` of the steps of a diffusion, 0 to 1000, under two conditions: 0 for clean frames, 1 for degraded ones.

    Args:
        in_channels: Channels of the latents.
        channels: Channels of the first stage.
        multipliers: How many times ``channels`` each stage has.
        blocks: Residual blocks per stage, down and up.
    """

    def __init__(self, in_channels: int = 3, channels: int = 32, multipliers: Sequence[int] = (1, 2), blocks: int = 1) -> None:
        super().__init__(in_channels, channels, multipliers, blocks, num_classes=2)

    def forward(self, x: Tensor, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """(B, C, H, W), steps (B,) and conditions (B,) int64 -> (B, C, H, W)."""
        return super().forward(x, noise.float() / 1000, labels)


class PixelBlocks(nn.Module):
    """An autoencoder that loses nothing: each block of pixels becomes one place of more channels; factor 1 is the identity.

    Args:
        factor: Side of a block.
    """

    def __init__(self, factor: int = 2) -> None:
        super().__init__()
        checks.at_least(1, "pixels", factor=factor)
        self.factor = factor

    def encode(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C factor^2, H / factor, W / factor)."""
        return F.pixel_unshuffle(images, self.factor)

    def decode(self, latents: Tensor) -> Tensor:
        """Back again."""
        return F.pixel_shuffle(latents, self.factor)


class SmallBackbone(Backbone):
    """A small U-Net in the place of Stable Diffusion's, in the latents of any autoencoder.

    ``OneStepPretraining`` trains it. Its first weights follow from ``seed`` alone, so that a checkpoint of adapters finds them again.

    Args:
        network: U-Net; None: :class:`StepUNet` for the channels of the latents.
        autoencoder: Frozen, with ``encode`` and ``decode``; None: :class:`PixelBlocks` of 2 x 2 pixels.
        scale: Factor of its latents.
        pretrained: Checkpoint of ``OneStepPretraining``; None: the network stays as it was made.
        conv_in: Name of the network's first convolution.
        multiple: Frames are padded to multiples of so many pixels.
        timesteps: T, steps of the diffusion.
        beta_first: Variance of the noise that the first step adds.
        beta_last: Variance of the noise that the last step adds.
        seed: Seed of the weights of a network that isn't given.

    Raises:
        ValueError: A number outside its range, or ``pretrained`` is of another network.
        TypeError: ``autoencoder`` lacks ``encode`` or ``decode``.
    """

    place: Tensor

    def __init__(
        self,
        network: nn.Module | None = None,
        autoencoder: nn.Module | None = None,
        scale: float = 1.0,
        pretrained: Path | None = None,
        conv_in: str = "inp",
        multiple: int = 4,
        timesteps: int = 1000,
        beta_first: float = 0.00085,
        beta_last: float = 0.012,
        seed: int = 0,
    ) -> None:
        super().__init__()
        checks.positive(scale=scale)
        checks.at_least(1, multiple=multiple, timesteps=timesteps)
        checks.within("(0, 1)", "a variance", beta_first=beta_first, beta_last=beta_last)
        autoencoder = PixelBlocks() if autoencoder is None else autoencoder
        if not all(callable(getattr(autoencoder, name, None)) for name in ("encode", "decode")):
            raise TypeError(f"autoencoder is a {type(autoencoder).__name__} without encode and decode: give PixelBlocks or TinyAutoencoder")
        self.autoencoder, self.scale, self.conv_in, self.multiple = Frozen(autoencoder), scale, conv_in, multiple
        self.channels = self.latent_shape(multiple, multiple)[0]
        if network is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                network = StepUNet(self.channels)
        self.network = network
        self.register_buffer("place", torch.empty(0), persistent=False)  # knows the device, also where the network is elsewhere
        self.shares = signal_shares(timesteps, beta_first, beta_last)  # no buffer, which a run in bfloat16 would round
        if pretrained is not None:
            from lit_methods.runs.checkpoints import load_into

            load_into(network, Path(pretrained).expanduser(), "backbone.network.")

    def encode(self, frames: Tensor, noise: Tensor | None = None) -> Tensor:
        """Frames -> latents; they have no spread, so ``noise`` isn't used."""
        latents: Tensor = self.autoencoder.module.encode(frames)  # type: ignore[operator]
        return latents * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> frames."""
        frames: Tensor = self.autoencoder.module.decode(latents / self.scale)  # type: ignore[operator]
        return frames

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """C, h and w."""
        place = next((p for p in self.autoencoder.module.parameters()), torch.empty(0))
        with torch.no_grad():
            return tuple(self.encode(place.new_zeros(1, 3, height, width)).shape[1:])  # type: ignore[return-value]

    def conditions(self, count: int, texts: Sequence[str] | None = None) -> tuple[Tensor, Tensor]:
        """Clean and degraded, (count,) int64 each; texts aren't read."""
        return tuple(torch.full((count,), value, device=self.place.device) for value in (0, 1))  # type: ignore[return-value]


class DiffusersBackbone(Backbone):
    """A ``StableDiffusionPipeline`` of diffusers, such as Stable Diffusion 2.1: U-Net, autoencoder and text encoder.

    Autoencoder and text encoder are frozen: neither trained nor saved.

    Args:
        path: Folder with ``unet``, ``vae``, ``text_encoder``, ``tokenizer`` and ``scheduler``, or the pipeline's name on the hub.
        prompt: What is wanted of every frame; behind what the frame shows.
        negative_prompt: What isn't.

    Raises:
        ImportError: diffusers or transformers is not installed; the message names the extra.
        ValueError: A part is missing, or the U-Net predicts something else than the noise.
    """

    conv_in = "conv_in"

    def __init__(
        self,
        path: str,
        prompt: str = "clean, high-resolution, 8k, sharp details, natural textures",
        negative_prompt: str = "blurry, low resolution, noisy, jpeg artifacts, oversmooth, painting",
    ) -> None:
        super().__init__()
        try:
            import diffusers
            import transformers
        except ImportError as error:
            raise ImportError(f"DiffusersBackbone needs two libraries: {EXTRA}") from error
        library: Any = diffusers

        def part(kind: Any, name: str) -> Any:
            return fetch(
                lambda: kind.from_pretrained(path, subfolder=name),
                path,
                given=f"path={path!r}, {name}",
                instead="give the folder of a StableDiffusionPipeline, or its name on the hub",
                blank=lambda: _blank(kind, path, name),
            )

        self.network = part(library.UNet2DConditionModel, "unet")
        self.autoencoder = Frozen(part(library.AutoencoderKL, "vae"))
        self.text_encoder = Frozen(part(transformers.CLIPTextModel, "text_encoder"))
        self.tokenizer: Any = part(transformers.CLIPTokenizer, "tokenizer")
        scheduler: Any = part(library.DDIMScheduler, "scheduler")
        if scheduler.config.prediction_type != "epsilon":
            raise ValueError(
                f"path={path!r}: the U-Net predicts {scheduler.config.prediction_type!r}: give a pipeline that predicts the noise, such as "
                "Stable Diffusion 2.1-base"
            )
        self.shares = scheduler.alphas_cumprod.float()
        vae: Any = self.autoencoder.module
        network: Any = self.network
        self.scale: float = vae.config.scaling_factor
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.channels, self.multiple = vae.config.latent_channels, self.factor * 2 ** (len(network.config.block_out_channels) - 1)
        self.prompt, self.negative_prompt = prompt, negative_prompt

    def encode(self, frames: Tensor, noise: Tensor | None = None) -> Tensor:
        """Frames -> latents times the autoencoder's factor (0.18215)."""
        vae: Any = self.autoencoder.module
        posterior = vae.encode(frames.to(vae.dtype)).latent_dist
        latents: Tensor = posterior.mean if noise is None else posterior.mean + posterior.std * noise.to(posterior.mean)
        return latents * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> frames."""
        vae: Any = self.autoencoder.module
        frames: Tensor = vae.decode(latents.to(vae.dtype) / self.scale).sample
        return frames

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """C, h and w."""
        return self.channels, height // self.factor, width // self.factor

    def embed(self, texts: Sequence[str]) -> Tensor:
        """N texts -> embeddings (N, L, D)."""
        encoder: Any = self.text_encoder.module
        length = min(self.tokenizer.model_max_length, encoder.config.max_position_embeddings)
        tokens = self.tokenizer(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        embeddings: Tensor = self.text_encoder(tokens.input_ids.to(encoder.device)).last_hidden_state
        return embeddings

    def conditions(self, count: int, texts: Sequence[str] | None = None) -> tuple[Tensor, Tensor]:
        """Embeddings (count, L, D) of the texts with ``prompt`` behind them, and of ``negative_prompt``."""
        negative = self.embed([self.negative_prompt]).expand(count, -1, -1)
        if texts is None:
            return self.embed([self.prompt]).expand(count, -1, -1), negative
        return self.embed([f"{text}, {self.prompt}" if text else self.prompt for text in texts]), negative


def _blank(kind: Any, path: str, name: str) -> Any:
    """The part without weights: what its config says."""
    if hasattr(kind, "load_config"):  # of diffusers
        return kind.from_config(kind.load_config(path, subfolder=name))
    if hasattr(kind, "config_class") and kind.config_class is not None:
        return kind(kind.config_class.from_pretrained(path, subfolder=name))
    return kind.from_pretrained(path, subfolder=name)


# ---- the U-Net with both adapters ------------------------------------------------------------------------------------------------------


class WidenedInput(nn.Module):
    """The first convolution for two latents beside each other, and the one of one latent for the frozen model.

    The wide one begins with the narrow one's weight twice and a bias of its own.

    Args:
        narrow: Convolution of C channels.
        generator: Draws the bias.
    """

    def __init__(self, narrow: nn.Conv2d, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.channels = narrow.in_channels
        self.widened = nn.Conv2d(
            2 * narrow.in_channels, narrow.out_channels, narrow.kernel_size, narrow.stride, narrow.padding  # type: ignore[arg-type]
        ).to(narrow.weight)  # fmt: skip
        with torch.no_grad():
            self.widened.weight.copy_(torch.cat([narrow.weight, narrow.weight], dim=1))
            bound = self.widened.weight[0].numel() ** -0.5
            drawn = torch.rand(narrow.out_channels, generator=generator) * 2 - 1
            self.widened.bias.copy_(drawn * bound)  # type: ignore[union-attr]
        self.narrow = narrow.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) or (B, 2 C, h, w) -> features.

        Raises:
            ValueError: Any other number of channels.
        """
        if x.shape[1] not in (self.channels, 2 * self.channels):
            raise ValueError(
                f"the U-Net got {x.shape[1]} channels: give latents of {self.channels} channels, or two of them beside each other"
            )
        answer: Tensor = (self.narrow if x.shape[1] == self.channels else self.widened)(x)
        return answer


class DualLoRAUNet(nn.Module):
    """A frozen U-Net with a C-LoRA and a D-LoRA on its linear layers and convolutions, and a first convolution for two latents.

    Its state is what is trained: adapters and the wide convolution.

    Args:
        backbone: Its network is changed in place.
        rank: Of each adapter.
        alpha: Their factor is alpha / rank.
        targets: ``fnmatch`` patterns on names of the layers that get adapters.
        timestep: Step of the diffusion that the restoration takes place at.
        generator: Draws the adapters and the bias.

    Raises:
        ValueError: The U-Net has no convolution ``conv_in``, or one for other latents than the autoencoder's.
    """

    def __init__(
        self,
        backbone: Backbone,
        rank: int = 4,
        alpha: float = 8.0,
        targets: Sequence[str] = ("*",),
        timestep: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not hasattr(backbone, "network"):
            raise ValueError(f"this {type(backbone).__name__} has given its U-Net to another module: make a new one")
        network = backbone.network.requires_grad_(False)
        modules = dict(network.named_modules())
        first = modules.get(backbone.conv_in)
        if not isinstance(first, nn.Conv2d):
            raise ValueError(f"conv_in={backbone.conv_in!r} is no convolution of {type(network).__name__}: name its first one")
        if first.in_channels != backbone.channels:
            raise ValueError(
                f"the U-Net takes {first.in_channels} channels, and the autoencoder's latents have {backbone.channels}: give two that fit, "
                "the U-Net before it is widened"
            )
        owner, _, attribute = backbone.conv_in.rpartition(".")
        setattr(network.get_submodule(owner), attribute, nn.Identity())  # it gets no adapters
        self.layers = add_adapters(network, targets, {CONSISTENCY_ADAPTER: rank, DETAIL_ADAPTER: rank}, alpha, generator)
        setattr(network.get_submodule(owner), attribute, WidenedInput(first, generator))
        self.network, self.timestep = network, timestep
        self.register_state_dict_post_hook(_keep_trained)
        self.register_load_state_dict_pre_hook(_with_frozen)

    def forward(self, latents: Tensor, cond: Any) -> Tensor:
        """Two latents (B, 2 C, h, w) beside each other -> what is taken off the second, (B, C, h, w)."""
        t = torch.full((len(latents),), self.timestep, device=latents.device)
        return denoise_of(_caller(self.network))(latents, t, cond)

    def teacher(self, x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
        """Noise that the frozen U-Net sees in latents (B, C, h, w): without adapters, with its own first convolution, without gradient."""
        with torch.no_grad(), adapters_off(self.network):
            return denoise_of(_caller(self.network))(x_t, t, cond)

    def trained_names(self) -> set[str]:
        """Names of what is trained, in the whole state."""
        return {name for name, _ in self.named_parameters() if _is_trained(name)}


def _caller(network: nn.Module) -> Any:
    """A U-Net of diffusers takes its condition by name and wraps its answer."""
    if hasattr(network, "config") and hasattr(network, "conv_out"):
        return lambda x, t, cond: network(x, t, encoder_hidden_states=cond.to(x.dtype)).sample
    return network


def _is_trained(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name or ".widened." in name


def _keep_trained(module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}network.") and not _is_trained(name)]:
        del state[name]


def _with_frozen(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Fill in what isn't saved, so that a strict load finds every name; adapters of another rank are told."""
    here = {f"{prefix}{name}": value for name, value in (*module.named_parameters(), *module.named_buffers())}
    check_ranks({name: tuple(value.shape) for name, value in here.items()}, state)
    for name, value in here.items():
        if not _is_trained(name):
            state.setdefault(name, value.detach())


def base_fingerprint(unet: nn.Module) -> Tensor:
    """Two sums over all frozen weights below adapters, (2,) float64: whether a checkpoint of adapters meets the model it was trained on."""
    values = [layer.base_layer.weight.detach() for layer in unet.modules() if isinstance(layer, LoRALayer)]  # type: ignore[union-attr, operator]
    if any(value.is_meta for value in values):
        return torch.zeros(2, dtype=torch.float64)
    sums = [torch.stack([value.double().sum(), value.double().abs().sum()]).cpu() for value in values]  # type: ignore[operator]
    return torch.stack(sums).sum(0)


__all__ = [
    "CONSISTENCY_ADAPTER",
    "DETAIL_ADAPTER",
    "Backbone",
    "DiffusersBackbone",
    "DualLoRAUNet",
    "PixelBlocks",
    "SmallBackbone",
    "StepUNet",
    "WidenedInput",
    "base_fingerprint",
]
