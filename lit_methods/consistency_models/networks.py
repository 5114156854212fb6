"""Small networks of a noisy sample and its noise condition, for the built-in data and for trials."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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

    Args:
        features: D of the points (B, D).
        width: Of the hidden layers.
        depth: Hidden layers.
        frequencies: Of the noise condition, see :func:`fourier_features`.
        dropout: Behind each hidden layer.
    """

    def __init__(self, features: int = 2, width: int = 128, depth: int = 3, frequencies: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
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
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h) * (1 + scale) + shift)))
        answer: Tensor = self.shortcut(x) + h
        return answer


class SmallUNet(nn.Module):
    """A U-Net for small images: a stage per entry of ``multipliers``, each halving the size of the one before; no attention.

    Args:
        in_channels: Of the images.
        channels: Of the first stage.
        multipliers: Of ``channels``, a stage each.
        blocks: Residual blocks per stage, down and up.
        dropout: Inside each block.
        num_classes: Classes whose labels it is given; None: none.
    """

    def __init__(
        self,
        in_channels: int = 1,
        channels: int = 32,
        multipliers: Sequence[int] = (1, 2),
        blocks: int = 1,
        dropout: float = 0.0,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        width = 4 * channels
        self.channels = channels
        self.embed = nn.Sequential(nn.Linear(channels, width), nn.SiLU(), nn.Linear(width, width))
        self.classes = nn.Embedding(num_classes, width) if num_classes is not None else None
        self.inp = nn.Conv2d(in_channels, channels, 3, padding=1)
        sizes = [channels * factor for factor in multipliers]
        now, skips = channels, [channels]
        self.down = nn.ModuleList()
        for stage, size in enumerate(sizes):
            for _ in range(blocks):
                self.down.append(_Block(now, size, width, dropout))
                now = size
                skips.append(now)
            if stage < len(sizes) - 1:
                self.down.append(nn.Conv2d(now, now, 3, stride=2, padding=1))
                skips.append(now)
        self.middle = _Block(now, now, width, dropout)
        self.up = nn.ModuleList()
        for stage, size in reversed(list(enumerate(sizes))):
            for _ in range(blocks + 1):
                self.up.append(_Block(now + skips.pop(), size, width, dropout))
                now = size
            if stage:
                self.up.append(nn.Upsample(scale_factor=2, mode="nearest"))
        self.out = nn.Sequential(nn.GroupNorm(min(8, now), now), nn.SiLU(), nn.Conv2d(now, in_channels, 3, padding=1))
        nn.init.zeros_(self.out[-1].weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """(B, C, H, W), (B,) and (B,) -> (B, C, H, W); H and W divide by 2 for each stage but the first."""
        embedding = self.embed(sinusoidal_embedding(noise, self.channels).to(x.dtype))
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
