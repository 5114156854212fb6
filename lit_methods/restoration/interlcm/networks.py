"""What InterLCM trains: visual encoders that make a prompt of a degraded image, spatial encoders that make residuals, a discriminator."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_methods import checks
from lit_methods.consistency_models.networks import SmallUNet
from lit_methods.frozen import Frozen
from lit_methods.hub import fetch
from lit_methods.restoration.interlcm.models import ControlledUNet, check_channels, diffusers_library, diffusers_part
from lit_methods.tasks.diffusion.noise_prediction import signal_shares

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

# ---- visual encoders: images (B, C, H, W) in [-1, 1] -> prompt (B, L, D) -----------------------------------------------------------------


class ClipTokens(nn.Module):
    """All tokens of CLIP's vision tower behind its last norm, without the projection.

    Args:
        path: Folder of a CLIP model of transformers, or its name on the hub.

    Raises:
        ImportError: transformers is not installed; the message names the extra.
        ValueError: There is no such model.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, path: str = "openai/clip-vit-base-patch16") -> None:
        super().__init__()
        try:
            import transformers
        except ImportError as error:
            raise ImportError('ClipTokens needs transformers: pip install "lit-methods[transformers]"') from error
        kind: Any = transformers.CLIPVisionModel
        self.model: Any = fetch(
            lambda: kind.from_pretrained(path),
            path,
            given=f"clip={path!r}",
            instead="give the folder of a CLIP model of transformers, or its name on the hub",
            blank=lambda: kind(transformers.CLIPVisionConfig.from_pretrained(path)),
        )
        config = self.model.config
        self.size: int = config.image_size
        self.tokens: int = (config.image_size // config.patch_size) ** 2 + 1
        self.width: int = config.hidden_size
        self.register_buffer("mean", torch.tensor(CLIP_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(CLIP_STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 1 or 3, H, W) in [-1, 1] -> (B, tokens, width)."""
        height, width = images.shape[-2:]
        scale = self.size / min(height, width)
        size = [max(self.size, round(side * scale)) for side in (height, width)]
        pixels = F.interpolate(images.expand(-1, 3, -1, -1) / 2 + 0.5, size, mode="bicubic", antialias=True)
        top, left = ((side - self.size) // 2 for side in size)
        pixels = pixels[..., top : top + self.size, left : left + self.size].clamp(0, 1)
        pixels = ((pixels - self.mean) / self.std).to(self.model.dtype)
        tower = getattr(self.model, "vision_model", self.model)  # older versions of transformers have one more level
        tokens: Tensor = tower.post_layernorm(self.model(pixel_values=pixels).last_hidden_state)
        return tokens


def _norm(channels: int) -> nn.GroupNorm:
    groups = next(groups for groups in range(min(32, channels), 0, -1) if channels % groups == 0)
    return nn.GroupNorm(groups, channels, eps=1e-6)


def _conv(channels_in: int, channels: int) -> nn.Conv1d:
    return nn.Conv1d(channels_in, channels, 3, padding=1)


class _Residual(nn.Module):
    """Norm, swish and convolution twice, added to the input."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(channels_in), _conv(channels_in, channels)
        self.norm2, self.conv2 = _norm(channels), _conv(channels, channels)
        self.shortcut = nn.Conv1d(channels_in, channels, 1) if channels_in != channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        answer: Tensor = self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))
        return answer


class _Attention(nn.Module):
    """Self-attention of one head over the length, added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.inp = nn.Conv1d(channels, 3 * channels, 1)
        self.out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.inp(self.norm(x)).transpose(1, 2).chunk(3, dim=2)
        answer: Tensor = x + self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2))
        return answer


class _Resized(nn.Module):
    """The length becomes ``length`` by nearest neighbours; a convolution follows."""

    def __init__(self, channels: int, length: int) -> None:
        super().__init__()
        self.length, self.conv = length, _conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.conv(F.interpolate(x, size=self.length, mode="nearest"))
        return answer


class TokenMapper(nn.Module):
    """Tokens of an image -> tokens of a prompt, by convolutions along the features: the TOKENS are their channels.

    Cost: 13.0 million parameters with the defaults.

    Args:
        tokens_in: Tokens of the image.
        tokens_out: Tokens of the prompt.
        lengths: Features of a token at the start, between the stages, and of the prompt's; the image's are made as long as the first.
        widths: Channels of each stage; attention follows each block of those as wide as the first.
    """

    def __init__(
        self, tokens_in: int = 197, tokens_out: int = 77, lengths: Sequence[int] = (256, 512, 768), widths: Sequence[int] = (512, 256, 128)
    ) -> None:
        super().__init__()
        checks.at_least(1, tokens_in=tokens_in, tokens_out=tokens_out)
        if len(lengths) != len(widths) or min([*lengths, *widths], default=0) < 1:
            raise ValueError(f"lengths are {list(lengths)} and widths {list(widths)}: give as many of both, 1 or more each")
        now = widths[0]
        layers: list[nn.Module] = [
            _conv(tokens_in, now),
            _Resized(now, lengths[0]),
            _Residual(now, now),
            _Attention(now),
            _Residual(now, now),
        ]
        for stage, width in enumerate(widths):
            for _ in range(2):
                layers.append(_Residual(now, width))
                now = width
                if width == widths[0]:
                    layers.append(_Attention(now))
            if stage < len(widths) - 1:
                layers.append(_Resized(now, lengths[stage + 1]))
        self.layers = nn.Sequential(*layers, _norm(now), _conv(now, tokens_out))

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, tokens_in, features) -> (B, tokens_out, last of ``lengths``)."""
        answer: Tensor = self.layers(tokens)
        return answer


class VisualEncoder(nn.Module):
    """The paper's: all tokens of a frozen CLIP, mapped to a prompt.

    Saves: the mapper; CLIP is :class:`~lit_methods.frozen.Frozen`.

    Args:
        clip: Folder of a CLIP model of transformers, or its name on the hub.
        tokens: Tokens of the prompt.
        width: Features of each: the width of the U-Net's cross-attention.
        widths: Channels of the mapper's stages.
    """

    def __init__(
        self, clip: str = "openai/clip-vit-base-patch16", tokens: int = 77, width: int = 768, widths: Sequence[int] = (512, 256, 128)
    ) -> None:
        super().__init__()
        checks.at_least(1, tokens=tokens, width=width)
        seen = ClipTokens(clip)
        self.clip = Frozen(seen)
        lengths = [max(1, width * (stage + 1) // len(widths)) for stage in range(len(widths))]
        self.mapper = TokenMapper(seen.tokens, tokens, lengths, widths)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [-1, 1] -> (B, tokens, width)."""
        tokens: Tensor = self.clip(images)
        answer: Tensor = self.mapper(tokens.to(next(self.mapper.parameters()).dtype))
        return answer


class SmallVisualEncoder(nn.Module):
    """A few convolutions that make a prompt of a small image; the prompt is 0 at first.

    Args:
        width: Features of a token: ``components`` of ``DigitLCM``, 4 ``channels`` of ``ControlledUNet``.
        tokens: Tokens.
        in_channels: Channels of the images.
        channels: Channels inside.
    """

    def __init__(self, width: int, tokens: int = 1, in_channels: int = 1, channels: int = 32) -> None:
        super().__init__()
        checks.at_least(1, width=width, tokens=tokens, in_channels=in_channels, channels=channels)
        self.shape, self.in_channels = (tokens, width), in_channels
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(32 * channels, tokens * width),
        )
        nn.init.zeros_(self.layers[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.layers[-1].bias)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, tokens, width)."""
        check_channels(images, self.in_channels, "SmallVisualEncoder")
        prompt: Tensor = self.layers(images)
        return prompt.unflatten(1, self.shape)


# ---- spatial encoders: latents (B, c, h, w), times (B,), prompt, images (B, C, H, W) -> residuals ----------------------------------------


class SpatialEncoder(nn.Module):
    """The paper's: a ControlNet of diffusers, conditioned on the degraded image.

    Args:
        path: Folder or name on the hub of a pipeline with a ``unet``, whose encoder is copied (Stable Diffusion 1.5 in the paper), or of a
            ControlNet.
        part: ``unet``, the folder in it; null: ``path`` is a ControlNet.

    Raises:
        ImportError: diffusers is not installed; the message names the extra.
    """

    def __init__(self, path: str, part: str | None = "unet") -> None:
        super().__init__()
        library = diffusers_library("SpatialEncoder")
        if part is None:
            self.network: Any = diffusers_part(library.ControlNetModel, path, None)
        else:
            unet = diffusers_part(library.UNet2DConditionModel, path, part)
            self.network = library.ControlNetModel.from_unet(unet)
        self.network.requires_grad_(True)

    def forward(self, z: Tensor, t: Tensor, prompt: Tensor | None, images: Tensor) -> list[Tensor]:
        """13 residuals of Stable Diffusion's U-Net: 12 on the way down, 1 in the middle."""
        if prompt is None:
            prompt = z.new_zeros(len(z), 77, self.network.config.cross_attention_dim)
        seen = images.expand(-1, 3, -1, -1)
        down, middle = self.network(z, t, encoder_hidden_states=prompt, controlnet_cond=seen, return_dict=False)
        return [*down, middle]


class SmallSpatialEncoder(nn.Module):
    """A copy of a small U-Net's encoder that also sees the degraded image; each residual passes a convolution that is 0 at first.

    Args:
        network: U-Net with the arguments of the one that the residuals go to; its weights are replaced by that one's, if it is a
            ``SmallLCM`` with a ``ControlledUNet``.
        image_channels: Channels of the degraded images.
    """

    abar: Tensor

    def __init__(self, network: ControlledUNet, image_channels: int = 1) -> None:
        super().__init__()
        checks.at_least(1, image_channels=image_channels)
        self.image_channels = image_channels
        width = network.inp.out_channels
        network.up, network.out = nn.ModuleList(), nn.Sequential()
        self.network = network
        self.register_buffer("abar", signal_shares(1000, 0.00085, 0.012), persistent=False)
        self.hint = nn.Sequential(nn.Conv2d(image_channels, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))
        with torch.no_grad():
            side = 2 ** (1 + sum(isinstance(layer, nn.Conv2d) for layer in network.down))
            probe = network.inp.weight.new_zeros(1, network.inp.in_channels, side, side)
            skips, middle = network.features(network.inp(probe), network.embedded(probe.new_zeros(1)))
        self.gates = nn.ModuleList(nn.Conv2d(part.shape[1], part.shape[1], 1) for part in [*skips, middle])
        for gate in self.gates:
            nn.init.zeros_(gate.weight)  # type: ignore[arg-type]
            nn.init.zeros_(gate.bias)  # type: ignore[arg-type]

    def begin(self, lcm: Any) -> None:
        """Copy the encoder's weights from the network that the residuals go to, if it is one of the same layout."""
        network = getattr(lcm, "network", None)
        if isinstance(network, ControlledUNet):
            known = network.state_dict()
            self.network.load_state_dict({name: known[name] for name in self.network.state_dict()})

    def forward(self, z: Tensor, t: Tensor, prompt: Tensor | None, images: Tensor) -> list[Tensor]:
        """One residual a skip connection, and one of the middle."""
        check_channels(z, self.network.inp.in_channels, "SmallSpatialEncoder", "latents")
        check_channels(images, self.image_channels, "SmallSpatialEncoder")
        share = self.abar[t]
        embedding = self.network.embedded((((1 - share) / share).log() / 8).to(z.dtype), prompt=prompt)  # ln(sigma) / 4, as SmallLCM's
        hint = self.hint(images)
        if hint.shape[-2:] != z.shape[-2:]:
            hint = F.interpolate(hint, z.shape[-2:], mode="area")
        skips, middle = self.network.features(self.network.inp(z) + hint, embedding)
        return [gate(part) for gate, part in zip(self.gates, [*skips, middle], strict=True)]


class ImageResidual(nn.Module):
    """One residual that looks like the latents, by a small U-Net of latents and degraded image, for ``DigitLCM``; it is 0 at first.

    Args:
        in_channels: Channels of latents and of images, each.
        channels: Channels of the U-Net's first stage.
        multipliers: How many times ``channels`` each stage has.
    """

    def __init__(self, in_channels: int = 1, channels: int = 16, multipliers: Sequence[int] = (1, 2)) -> None:
        super().__init__()
        checks.at_least(1, in_channels=in_channels, channels=channels)
        self.in_channels = in_channels
        self.network = SmallUNet(2 * in_channels, channels, multipliers)

    def forward(self, z: Tensor, t: Tensor, prompt: Tensor | None, images: Tensor) -> list[Tensor]:
        """[(B, c, h, w)]; the prompt isn't used."""
        check_channels(z, self.in_channels, "ImageResidual", "latents")
        check_channels(images, self.in_channels, "ImageResidual")
        noise = (t.float() / 1000).to(z.dtype)
        answer: Tensor = self.network(torch.cat([z, images.to(z.dtype)], dim=1), noise)
        return [answer[:, : self.in_channels]]


# ---- discriminator -----------------------------------------------------------------------------------------------------------------------


class PatchDiscriminator(nn.Module):
    """Scores of overlapping patches, as VQGAN's (arXiv:2012.09841): convolutions of 4 x 4 with stride 2, batch norm, leaky ReLU.

    Args:
        in_channels: Channels of the images.
        channels: Channels of the first layer; they double up to 8 times that.
        layers: Layers with stride 2.
    """

    def __init__(self, in_channels: int = 3, channels: int = 64, layers: int = 4) -> None:
        super().__init__()
        checks.at_least(1, in_channels=in_channels, channels=channels, layers=layers)
        parts: list[nn.Module] = [nn.Conv2d(in_channels, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        now = channels
        for layer in range(1, layers + 1):
            width = channels * min(2**layer, 8)
            stride = 2 if layer < layers else 1
            parts += [nn.Conv2d(now, width, 4, stride=stride, padding=1, bias=False), nn.BatchNorm2d(width), nn.LeakyReLU(0.2)]
            now = width
        self.layers = nn.Sequential(*parts, nn.Conv2d(now, 1, 4, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 1, h, w)."""
        check_channels(images, self.layers[0].in_channels, "PatchDiscriminator")  # type: ignore[arg-type]
        scores: Tensor = self.layers(images)
        return scores


__all__ = [
    "ClipTokens",
    "ImageResidual",
    "PatchDiscriminator",
    "SmallSpatialEncoder",
    "SmallVisualEncoder",
    "SpatialEncoder",
    "TokenMapper",
    "VisualEncoder",
]
