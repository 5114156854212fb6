"""Encoders and decoders of EPG (arXiv:2510.12586): vision transformers on patches of pixels, and small linear ones for trials."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_methods import checks
from lit_methods.consistency_models.networks import fourier_features, sinusoidal_embedding


class Encoded(NamedTuple):
    """What an encoder makes of a noisy sample.

    Attributes:
        feature: (B, D) of the whole sample: what stage 1 trains.
        tokens: (B, T, D) at the end of the encoder.
        blocks: (B, T, D) behind each block, the first block first.
        time: (B, E) embedding of the noise level.
    """

    feature: Tensor
    tokens: Tensor
    blocks: tuple[Tensor, ...]
    time: Tensor


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        query, key, value = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        answer: Tensor = self.out(mixed.reshape(batch, tokens, width))
        return answer


def _feed_forward(width: int, ratio: float) -> nn.Sequential:
    hidden = round(width * ratio)
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class _EncoderBlock(nn.Module):
    def __init__(self, width: int, heads: int, ratio: float) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), _Attention(width, heads)
        self.norm2, self.feed_forward = nn.LayerNorm(width), _feed_forward(width, ratio)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        answer: Tensor = x + self.feed_forward(self.norm2(x))
        return answer


class _DecoderBlock(nn.Module):
    """Joins the tokens with those of an encoder block, and then attends, modulated by ``condition``; begins as the join alone."""

    def __init__(self, width: int, encoder_width: int, heads: int, ratio: float, dropout: float) -> None:
        super().__init__()
        self.join = nn.Sequential(nn.Linear(width + encoder_width, width), nn.LayerNorm(width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(encoder_width, 6 * width))
        self.norm1, self.attention = nn.LayerNorm(width, elementwise_affine=False), _Attention(width, heads)
        self.norm2, self.feed_forward = nn.LayerNorm(width, elementwise_affine=False), _feed_forward(width, ratio)
        self.dropout = nn.Dropout(dropout)
        for parameter in self.modulation[1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, skip: Tensor, condition: Tensor) -> Tensor:
        x = self.join(torch.cat([x, skip], dim=2))
        scale1, shift1, gate1, scale2, shift2, gate2 = self.modulation(condition)[:, None].chunk(6, dim=2)
        x = x + gate1 * self.dropout(self.attention(self.norm1(x) * (1 + scale1) + shift1))
        answer: Tensor = x + gate2 * self.dropout(self.feed_forward(self.norm2(x) * (1 + scale2) + shift2))
        return answer


class PixelViTEncoder(nn.Module):
    """A vision transformer of noisy images: a learnt token, one of the noise level, one for each patch.

    Args:
        image_size: Side in pixels; a multiple of ``patch_size``.
        patch_size: Side of a patch in pixels.
        in_channels: Channels of the images.
        width: D; even, a multiple of ``heads``.
        depth: Blocks.
        heads: Heads of the attention.
        mlp_ratio: Hidden width of the feed-forward layers over D.

    Raises:
        ValueError: Numbers that don't divide.
    """

    def __init__(
        self,
        image_size: int = 256,
        patch_size: int = 16,
        in_channels: int = 3,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        _check(image_size, patch_size, width, heads)
        checks.at_least(1, in_channels=in_channels, depth=depth)
        if width % 2:
            raise ValueError(f"width={width} is odd: the embedding of the noise level has as many sines as cosines")
        self.width = width
        self.patches = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)
        self.cls = nn.Parameter(torch.empty(1, 1, width).normal_(std=0.02))
        self.positions = nn.Parameter(torch.empty(1, 2 + (image_size // patch_size) ** 2, width).normal_(std=0.02))
        self.blocks = nn.ModuleList(_EncoderBlock(width, heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, noise: Tensor, condition: Tensor | None = None) -> Encoded:
        """(B, C, S, S), (B,) noise condition ln(sigma) / 4 and (B, D) embeddings of classes, which join the learnt token."""
        patches = self.patches(x).flatten(2).transpose(1, 2)
        time = sinusoidal_embedding(noise, self.width).to(patches.dtype)
        cls = self.cls.expand(len(x), -1, -1)
        if condition is not None:
            cls = cls + condition[:, None]
        h = torch.cat([cls, time[:, None], patches], dim=1) + self.positions
        blocks = []
        for block in self.blocks:
            h = block(h)
            blocks.append(h)
        h = self.norm(h)
        return Encoded(h[:, 0], h, tuple(blocks), time)


class PixelViTDecoder(nn.Module):
    """Draws an image out of the tokens of :class:`PixelViTEncoder`: one block for each of the encoder's, joined with it, the last first.

    Its output begins as 0.

    Args:
        image_size: Side in pixels.
        patch_size: That of the encoder.
        in_channels: Channels of the images.
        width: Width of the decoder's tokens; a multiple of ``heads``.
        encoder_width: D of the encoder.
        depth: Blocks, as many as the encoder's.
        heads: Heads of the attention.
        mlp_ratio: Hidden width of the feed-forward layers over ``width``.
        dropout: Dropout of what the attention and the feed-forward layers add.

    Raises:
        ValueError: Numbers that don't divide.
    """

    def __init__(
        self,
        image_size: int = 256,
        patch_size: int = 16,
        in_channels: int = 3,
        width: int = 768,
        encoder_width: int = 768,
        depth: int = 12,
        heads: int = 12,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        _check(image_size, patch_size, width, heads)
        checks.at_least(1, in_channels=in_channels, depth=depth)
        self.grid, self.patch_size = image_size // patch_size, patch_size
        self.inp = nn.Linear(encoder_width, width) if encoder_width != width else nn.Identity()
        self.blocks = nn.ModuleList(_DecoderBlock(width, encoder_width, heads, mlp_ratio, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, in_channels * patch_size**2)
        for parameter in self.out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, encoded: Encoded, condition: Tensor | None = None) -> Tensor:
        """Tokens of (B, C, S, S) and (B, D) embeddings of classes -> (B, C, S, S)."""
        if len(encoded.blocks) != len(self.blocks):
            raise ValueError(f"the decoder has {len(self.blocks)} blocks, the encoder {len(encoded.blocks)}: give both the same depth")
        known = encoded.time if condition is None else encoded.time + condition
        h = self.inp(encoded.tokens)
        for block, skip in zip(self.blocks, reversed(encoded.blocks), strict=True):
            h = block(h, skip, known)
        pixels = self.out(self.norm(h[:, 2:]))
        return F.fold(pixels.transpose(1, 2), self.grid * self.patch_size, self.patch_size, stride=self.patch_size)


def _check(image_size: int, patch_size: int, width: int, heads: int) -> None:
    if image_size % patch_size:
        raise ValueError(f"image_size={image_size} is no multiple of patch_size={patch_size}: give one")
    if width % heads:
        raise ValueError(f"width={width} is no multiple of heads={heads}: give one")


class PixelMLPEncoder(nn.Module):
    """Linear layers with layer norm on all pixels, for tiny images.

    Cost: 0.15 million parameters with the defaults.

    Args:
        shape: Shape of a sample.
        width: D.
        depth: Layers.
        frequencies: Frequencies of the noise condition.
    """

    def __init__(self, shape: Sequence[int] = (1, 8, 8), width: int = 256, depth: int = 3, frequencies: int = 8) -> None:
        super().__init__()
        checks.at_least(1, width=width, depth=depth, frequencies=frequencies)
        self.width, self.frequencies = width, frequencies
        sizes = [torch.Size(shape).numel() + 2 * frequencies, *[width] * (depth - 1)]
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(size, width), nn.LayerNorm(width), nn.SiLU()) for size in sizes)

    def forward(self, x: Tensor, noise: Tensor, condition: Tensor | None = None) -> Encoded:
        """(B, ...), (B,) noise condition ln(sigma) / 4 and (B, D) embeddings of classes, which join the feature."""
        time = fourier_features(noise.float(), self.frequencies).to(x.dtype)
        h = torch.cat([x.flatten(1), time], dim=1)
        blocks = []
        for layer in self.layers:
            h = layer(h)
            blocks.append(h[:, None])
        feature = h if condition is None else h + condition
        return Encoded(feature, feature[:, None], tuple(blocks), time)


class PixelMLPDecoder(nn.Module):
    """Linear layers that draw a sample out of the encoder's feature.

    Cost: 0.15 million parameters with the defaults.

    Args:
        shape: Shape of a sample.
        width: Width of the hidden layers.
        encoder_width: D of the encoder.
        depth: Layers.
        dropout: Behind each hidden layer.
    """

    def __init__(
        self, shape: Sequence[int] = (1, 8, 8), width: int = 256, encoder_width: int = 256, depth: int = 3, dropout: float = 0.0
    ) -> None:
        super().__init__()
        checks.at_least(1, width=width, encoder_width=encoder_width, depth=depth)
        self.shape = torch.Size(shape)
        sizes = [encoder_width, *[width] * (depth - 1)]
        hidden = [nn.Sequential(nn.Linear(size, width), nn.SiLU(), nn.Dropout(dropout)) for size in sizes[:-1]]
        self.layers = nn.Sequential(*hidden, nn.Linear(sizes[-1], self.shape.numel()))

    def forward(self, encoded: Encoded, condition: Tensor | None = None) -> Tensor:
        """Feature of (B, ...) -> (B, ...); classes have joined the feature already."""
        answer: Tensor = self.layers(encoded.feature).view(-1, *self.shape)
        return answer


def projection_head(features: int, width: int = 4096, out_features: int = 256, layers: int = 3) -> nn.Sequential:
    """Linear layers without biases, with batch norm and ReLU behind all but the last: (B, features) -> (B, out_features).

    The same as in MoCo v3 (arXiv:2104.02057), but that nothing is normalised at the end.

    Args:
        features: D of the encoder.
        width: Width of the hidden layers.
        out_features: Width of the output.
        layers: At least 1.
    """
    sizes = [features, *[width] * (layers - 1)]
    hidden = [part for size in sizes[:-1] for part in (nn.Linear(size, width, bias=False), nn.BatchNorm1d(width), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(sizes[-1], out_features, bias=False))


def projection_head_of(state: dict[str, Tensor]) -> nn.Sequential:
    """The :func:`projection_head` that has this state dict, with its weights.

    Raises:
        ValueError: It isn't one's.
    """
    weights = [value for value in state.values() if value.ndim == 2]
    if not weights:
        raise ValueError(f"no projection head has the weights {', '.join(sorted(state)[:4])}: give a checkpoint of EPGPretrain")
    head = projection_head(weights[0].shape[1], weights[0].shape[0], weights[-1].shape[0], len(weights))
    head.load_state_dict(state)
    return head
