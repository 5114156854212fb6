"""Small networks of a noisy sample and its noise condition, for the built-in data and for trials."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_methods import checks


def fourier_features(noise: Tensor, count: int) -> Tensor:
    """sin(k noise) and cos(k noise), k = 1..count: (B,) -> (B, 2 count)."""
    angles = noise[:, None] * torch.arange(1, count + 1, device=noise.device, dtype=noise.dtype)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sinusoidal_embedding(noise: Tensor, width: int, scale: float = 1000.0) -> Tensor:
    """The positional embedding of ``scale * noise``: (B,) -> (B, width), width even."""
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(width // 2, device=noise.device, dtype=torch.float32) / (width // 2))
    angles = scale * noise.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class NoiseMLP(nn.Module):
    """Linear layers with SiLU on points, for 2-D toys.

    Cost: 36 thousand parameters with the defaults.

    Args:
        features: D of the points (B, D).
        width: Width of the hidden layers.
        depth: Hidden layers.
        frequencies: Frequencies of the noise condition, see :func:`fourier_features`.
        dropout: Behind each hidden layer.
    """

    def __init__(self, features: int = 2, width: int = 128, depth: int = 3, frequencies: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        checks.at_least(1, features=features, width=width, depth=depth, frequencies=frequencies)
        self.frequencies = frequencies
        widths = [features + 2 * frequencies + 1, *[width] * depth]
        layers = [[nn.Linear(a, b), nn.SiLU(), nn.Dropout(dropout)] for a, b in pairwise(widths)]
        self.layers = nn.Sequential(*(layer for block in layers for layer in block), nn.Linear(width, features))

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        """(B, D) and (B,) -> (B, D)."""
        known = torch.cat([fourier_features(noise, self.frequencies), noise[:, None]], dim=1)
        answer: Tensor = self.layers(torch.cat([x, known.to(x.dtype)], dim=1))
        return answer


class _Block(nn.Module):
    """Two 3 x 3 convolutions with group norm; the noise embedding scales and shifts between them."""

    def __init__(self, channels_in: int, channels: int, embedding: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(min(8, channels_in), channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * channels)
        self.norm2 = nn.GroupNorm(min(8, channels), channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.shortcut = nn.Conv2d(channels_in, channels, 1) if channels_in != channels else nn.Identity()
        self.attention: nn.Module = nn.Identity()
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h) * (1 + scale) + shift)))
        answer: Tensor = self.attention(self.shortcut(x) + h)
        return answer


class _Attention(nn.Module):
    """Self-attention over the pixels, added to its input; begins as the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(min(8, channels), channels)
        self.heads = max(1, channels // 64)
        self.inp = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        parts = self.inp(self.norm(x)).view(batch, 3, self.heads, channels // self.heads, height * width)
        query, key, value = parts.transpose(-1, -2).unbind(1)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(-1, -2)
        answer: Tensor = x + self.out(mixed.reshape(batch, channels, height, width))
        return answer


class SmallUNet(nn.Module):
    """A U-Net for images: a stage per entry of ``multipliers``, each halving the size of the one before.

    With more channels and blocks, attention and a Fourier embedding it has the layout of NCSN++ or ADM, not their every detail.

    Cost: 0.56 million parameters with the defaults.

    Args:
        in_channels: Channels of the images.
        channels: Channels of the first stage.
        multipliers: How many times ``channels`` each stage has.
        blocks: Residual blocks per stage, down and up.
        dropout: Inside each block.
        num_classes: Classes whose labels it is given; None: none.
        attention: Numbers of the stages, from 0, whose blocks attend over all pixels; the middle then does, too.
        fourier_scale: Scale of the noise embedding's random frequencies, 0.02 in iCT on CIFAR-10; None: the sinusoidal embedding.
    """

    frequencies: Tensor | None

    def __init__(
        self,
        in_channels: int = 1,
        channels: int = 32,
        multipliers: Sequence[int] = (1, 2),
        blocks: int = 1,
        dropout: float = 0.0,
        num_classes: int | None = None,
        attention: Sequence[int] = (),
        fourier_scale: float | None = None,
    ) -> None:
        super().__init__()
        checks.at_least(1, in_channels=in_channels, channels=channels, blocks=blocks, num_classes=num_classes)
        checks.positive(fourier_scale=fourier_scale)
        if not set(attention) <= set(range(len(multipliers))):
            raise ValueError(f"attention is {list(attention)}: give numbers of the {len(multipliers)} stages, from 0")
        width = 4 * channels
        drawn = None if fourier_scale is None else torch.randn(channels // 2) * fourier_scale * 2 * math.pi
        self.register_buffer("frequencies", drawn)
        self.channels = channels
        self.embed = nn.Sequential(nn.Linear(channels, width), nn.SiLU(), nn.Linear(width, width))
        self.classes = nn.Embedding(num_classes, width) if num_classes is not None else None
        self.inp = nn.Conv2d(in_channels, channels, 3, padding=1)
        sizes = [channels * factor for factor in multipliers]
        now, skips = channels, [channels]
        self.down = nn.ModuleList()
        for stage, size in enumerate(sizes):
            for _ in range(blocks):
                self.down.append(self._block(now, size, width, dropout, stage in attention))
                now = size
                skips.append(now)
            if stage < len(sizes) - 1:
                self.down.append(nn.Conv2d(now, now, 3, stride=2, padding=1))
                skips.append(now)
        self.middle = self._block(now, now, width, dropout, bool(attention))
        self.up = nn.ModuleList()
        for stage, size in reversed(list(enumerate(sizes))):
            for _ in range(blocks + 1):
                self.up.append(self._block(now + skips.pop(), size, width, dropout, stage in attention))
                now = size
            if stage:
                self.up.append(nn.Upsample(scale_factor=2, mode="nearest"))
        self.out = nn.Sequential(nn.GroupNorm(min(8, now), now), nn.SiLU(), nn.Conv2d(now, in_channels, 3, padding=1))
        nn.init.zeros_(self.out[-1].weight)  # type: ignore[arg-type]

    @staticmethod
    def _block(channels_in: int, channels: int, embedding: int, dropout: float, attends: bool) -> _Block:
        block = _Block(channels_in, channels, embedding, dropout)
        if attends:
            block.attention = _Attention(channels)
        return block

    def _embed_noise(self, noise: Tensor) -> Tensor:
        if self.frequencies is None:
            return sinusoidal_embedding(noise, self.channels)
        angles = 4 * noise.float()[:, None] * self.frequencies  # of ln(sigma)
        return torch.cat([angles.cos(), angles.sin()], dim=1)

    def forward(self, x: Tensor, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """(B, C, H, W), (B,) and (B,) -> (B, C, H, W); H and W divide by 2 for each stage but the first."""
        embedding = self.embed(self._embed_noise(noise).to(x.dtype))
        if self.classes is not None:
            embedding = embedding + self.classes(labels)
        embedding = F.silu(embedding)
        h = self.inp(x)
        skips = [h]
        for layer in self.down:
            h = layer(h, embedding) if isinstance(layer, _Block) else layer(h)
            skips.append(h)
        h = self.middle(h, embedding)
        for layer in self.up:
            h = layer(torch.cat([h, skips.pop()], dim=1), embedding) if isinstance(layer, _Block) else layer(h)
        answer: Tensor = self.out(h)
        return answer
