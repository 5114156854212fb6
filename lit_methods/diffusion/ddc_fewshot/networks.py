"""The U-Net of DDC: features of a content image are fused in behind its middle."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_methods import checks
from lit_methods.consistency_models.networks import sinusoidal_embedding
from lit_methods.diffusion.ddc_fewshot.core import cosine_shares


class _Block(nn.Module):
    """Two convolutions, the first one's answer scaled and shifted by the step."""

    def __init__(self, channels_in: int, channels: int, embedding: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(min(8, channels_in), channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * channels)
        self.norm2 = nn.GroupNorm(min(8, channels), channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.shortcut = nn.Conv2d(channels_in, channels, 1) if channels_in != channels else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm1(x)))
        answer: Tensor = self.shortcut(x) + self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))
        return answer


class _Attention(nn.Module):
    """Self-attention of the pixels, added to them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = max(1, channels // 32)
        self.norm = nn.GroupNorm(min(8, channels), channels)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.to_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.to_qkv(self.norm(x)).flatten(2).unflatten(1, (3, self.heads, -1)).mT.unbind(1)
        mixed = F.scaled_dot_product_attention(query, key, value).mT.flatten(1, 2).view_as(x)
        answer: Tensor = x + self.to_out(mixed)
        return answer


class ContentFusionUNet(nn.Module):
    """A U-Net that predicts the noise in images, and takes up features of a content image behind its middle.

    h = middle(encoder(x_t)); with content c': h <- fuse([h, c']), three convolutions with ReLU between; then the decoder. c' comes from
    :meth:`encode`, the same encoder without its middle. Without content, ``fuse`` isn't called.

    With ``preconditioned`` the noise is sqrt(1 - a) x_t + sqrt(a) v of the network's answer v, alpha-bar a of the step
    (arXiv:2202.00512): where there is much noise it is nearly x_t itself, so a small network learns in few steps.

    Cost: 33.3 million parameters with 64 channels and factors 1, 2, 4, 8; 0.57 million with 16 channels and 1, 2, 4.

    Args:
        in_channels: Channels of an image.
        channels: Channels at full size.
        multipliers: Factor of the channels at each size; each size is half of the one before.
        preconditioned: See above; the authors' network predicts the noise itself.
        timesteps: T, steps of the diffusion, for ``preconditioned``.

    Raises:
        ValueError: A number below its range, or channels that eight groups don't divide.
    """

    def __init__(
        self,
        in_channels: int = 3,
        channels: int = 64,
        multipliers: Sequence[int] = (1, 2, 4, 8),
        preconditioned: bool = False,
        timesteps: int = 1000,
    ) -> None:
        super().__init__()
        checks.at_least(1, in_channels=in_channels, channels=channels, sizes=len(multipliers), timesteps=timesteps)
        checks.at_least(1, "a factor", **{f"multipliers[{number}]": factor for number, factor in enumerate(multipliers)})
        if channels % 8:
            raise ValueError(f"channels is {channels}: give a multiple of 8, into whose groups norms cut them")
        self.channels, self.in_channels, self.preconditioned = channels, in_channels, preconditioned
        self.divisor = 2 ** (len(multipliers) - 1)
        self.shares = cosine_shares(timesteps)  # no buffer, which a run in bfloat16 would round
        width = 4 * channels
        self.embed = nn.Sequential(nn.Linear(channels, width), nn.SiLU(), nn.Linear(width, width))
        self.inp = nn.Conv2d(in_channels, channels, 7, padding=3)
        sizes = [channels, *(channels * factor for factor in multipliers)]
        last = len(multipliers) - 1
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for number, (inner, outer) in enumerate(pairwise(sizes)):
            stride = 1 if number == last else 2
            self.down.append(
                nn.ModuleList(
                    [_Block(inner, inner, width), _Block(inner, inner, width), nn.Conv2d(inner, outer, 3, stride=stride, padding=1)]
                )
            )
            enlarge: nn.Module = nn.Identity() if number == last else nn.Upsample(scale_factor=2)
            self.up.insert(
                0,
                nn.ModuleList(
                    [
                        nn.Sequential(enlarge, nn.Conv2d(outer, inner, 3, padding=1)),
                        _Block(2 * inner, inner, width),
                        _Block(2 * inner, inner, width),
                    ]
                ),
            )
        deepest = sizes[-1]
        self.middle = nn.ModuleList([_Block(deepest, deepest, width), _Attention(deepest), _Block(deepest, deepest, width)])
        self.fuse = nn.Sequential(
            nn.Conv2d(2 * deepest, deepest, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(deepest, deepest, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(deepest, deepest, 3, padding=1),
        )
        self.norm = nn.GroupNorm(8, channels)
        self.out = nn.Conv2d(channels, in_channels, 3, padding=1)
        nn.init.zeros_(self.out.weight)

    def _encode(self, x: Tensor, t: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        if x.shape[1] != self.in_channels:
            raise ValueError(
                f"images have {x.shape[1]} channels and ContentFusionUNet in_channels={self.in_channels}: give the same number"
            )
        if x.shape[-2] % self.divisor or x.shape[-1] % self.divisor:
            raise ValueError(f"images are {x.shape[-2]} x {x.shape[-1]}: ContentFusionUNet needs multiples of {self.divisor}")
        embedding = F.silu(self.embed(sinusoidal_embedding(t, self.channels, scale=1.0).to(self.out.weight.dtype)))
        h, kept = self.inp(x), []
        down: Any = self.down
        for *blocks, reduce in down:
            for block in blocks:
                h = block(h, embedding)
                kept.append(h)
            h = reduce(h)
        return h, kept, embedding

    def encode(self, x: Tensor, t: Tensor) -> Tensor:
        """Features of content images (B, C, H, W), noised to steps (B,) int64: (B, D, h, w)."""
        return self._encode(x, t)[0]

    def forward(self, x_t: Tensor, t: Tensor, content: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W), steps (B,) int64 and, if there is content, its features like :meth:`encode`'s -> noise like the images."""
        h, kept, embedding = self._encode(x_t, t)
        first, attention, second = self.middle
        h = second(attention(first(h, embedding)), embedding)
        if content is not None:
            h = self.fuse(torch.cat([h, content.to(h.dtype)], dim=1))
        up: Any = self.up
        for enlarge, *blocks in up:
            h = enlarge(h)
            for block in blocks:
                h = block(torch.cat([h, kept.pop()], dim=1), embedding)
        answer: Tensor = self.out(F.silu(self.norm(h)))
        if not self.preconditioned:
            return answer
        if self.shares.device != t.device:
            self.shares = self.shares.to(t.device)
        share = self.shares[t].to(x_t.dtype).view(-1, 1, 1, 1)
        return (1 - share).sqrt() * x_t + share.sqrt() * answer

    def denoise(self, x_t: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        """Noise in ``x_t``; ``cond`` is content, or None."""
        return self(x_t, t, cond)  # type: ignore[no-any-return]


__all__ = ["ContentFusionUNet"]
