"""The transformer of Wan 2.1 (arXiv:2503.20314) for video latents, whose layers pass on a value and its tangent side by side.

Continuous-time consistency needs the derivative of the network along a direction. ``torch.func.jvp`` around a whole network needs plain
attention, and can't go through a network whose weights are sharded (FSDP2), which gathers them layer by layer. Here every layer takes and
returns a :class:`Dual`: it calls ``torch.func.jvp`` for itself, and attention gives output and tangent in one pass
(:mod:`~lit_methods.consistency_models.rcm.attention_jvp`). So each block can be sharded and checkpointed as usual. That form is rCM's
(arXiv:2510.08431); parameter names and layout are those of the published weights of Wan 2.1's text-to-video models, from memory, and
compared with diffusers' implementation. Left out: image conditioning, masks of padded prompts (as there), context parallelism.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lit_methods import checks
from lit_methods.consistency_models.rcm.attention_jvp import attention_with_tangent


class Dual(NamedTuple):
    """A value and its derivative along a direction, of the same shape; None: nobody asked for the derivative."""

    value: Tensor
    tangent: Tensor | None = None


def along(function: Callable[..., Tensor], *given: Dual) -> Dual:
    """``function`` of the values, and its derivative along the tangents, if any of them has one; a missing one is 0."""
    values = tuple(one.value for one in given)
    if all(one.tangent is None for one in given):
        return Dual(function(*values))
    tangents = tuple(torch.zeros_like(one.value) if one.tangent is None else one.tangent for one in given)
    return Dual(*torch.func.jvp(function, values, tangents))


def attend(q: Dual, k: Dual, v: Dual) -> Dual:
    """Softmax attention of (B, H, S, D): flash attention without tangents, else the pass that gives both."""
    given = (q, k, v)
    if all(one.tangent is None for one in given):
        return Dual(F.scaled_dot_product_attention(q.value, k.value, v.value))
    tq, tk, tv = (torch.zeros_like(one.value) if one.tangent is None else one.tangent for one in given)
    attended = attention_with_tangent(q.value, k.value, v.value, tq, tk, tv)
    return Dual(attended.output, attended.tangent)


def rotary_angles(sizes: tuple[int, int, int], width: int, device: torch.device) -> Tensor:
    """Angles of the rotary embedding of a grid of tokens: (frames x rows x columns, width / 2) float64.

    Args:
        sizes: Frames, rows, columns.
        width: Width of a head, even; a third of its pairs turns with rows, a third with columns, the rest with frames.
        device: Device of the result.
    """
    pairs = width // 2
    shares = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
    axes = torch.meshgrid(*(torch.arange(size, dtype=torch.float64, device=device) for size in sizes), indexing="ij")
    rates = [10000.0 ** -(torch.arange(share, dtype=torch.float64, device=device) / share) for share in shares]
    return torch.cat([axis.reshape(-1, 1) * rate for axis, rate in zip(axes, rates, strict=True)], dim=1)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn neighbouring pairs of features of (B, H, S, D) by (S, D / 2) angles."""
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


class RMSNorm(nn.Module):
    """x / root mean square, in float32 or wider, times a weight; made of plain operations, which have derivatives of all kinds."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight).to(x.dtype)


class Attention(nn.Module):
    """Self-attention of tokens, or cross-attention to a context without tangent."""

    def __init__(self, width: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(width, eps), RMSNorm(width, eps)

    def forward(self, x: Dual, context: Tensor | None = None, angles: Tensor | None = None) -> Dual:
        """(B, S, width), a context (B, L, width) or None: the tokens themselves, rotary angles (S, D / 2) or None -> (B, S, width)."""
        source = x if context is None else Dual(context)

        def split(y: Tensor) -> Tensor:
            return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        def turned(y: Tensor) -> Tensor:
            return split(y) if angles is None else rotate(split(y), angles)

        q = along(lambda y: turned(self.norm_q(self.q(y))), x)
        k = along(lambda y: turned(self.norm_k(self.k(y))), source)
        return along(lambda y: self.o(y.transpose(1, 2).flatten(2)), attend(q, k, along(lambda y: split(self.v(y)), source)))


class WanBlock(nn.Module):
    """Self-attention, cross-attention to the prompt, and two linear layers; the first and the last modulated by the time."""

    def __init__(self, width: int, hidden: int, heads: int, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps, elementwise_affine=False)
        self.self_attn = Attention(width, heads, eps)
        self.norm3 = nn.LayerNorm(width, eps)
        self.cross_attn = Attention(width, heads, eps)
        self.norm2 = nn.LayerNorm(width, eps, elementwise_affine=False)
        self.ffn = nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))
        self.modulation = nn.Parameter(torch.randn(1, 6, width) / width**0.5)

    def forward(self, x: Dual, time: Dual, context: Tensor, angles: Tensor) -> Dual:
        """Tokens (B, S, width), time (B, 6, width), prompt (B, L, width), angles (S, D / 2) -> tokens, under autocast in float32."""

        def part(time: Tensor, index: int) -> Tensor:
            return (self.modulation + time)[:, index, None]

        def modulated(norm: nn.Module, x: Tensor, time: Tensor, index: int) -> Tensor:
            return norm(x) * (1 + part(time, index + 1)) + part(time, index)

        h = self.self_attn(along(lambda x, time: modulated(self.norm1, x, time, 0), x, time), angles=angles)
        x = along(lambda x, h, time: x + h * part(time, 2), x, h, time)
        h = self.cross_attn(along(self.norm3, x), context)
        x = along(torch.add, x, h)
        return along(lambda x, time: x + self.ffn(modulated(self.norm2, x, time, 3)) * part(time, 5), x, time)


class WanHead(nn.Module):
    """From tokens to patches."""

    def __init__(self, width: int, out: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps, elementwise_affine=False)
        self.head = nn.Linear(width, out)
        self.modulation = nn.Parameter(torch.randn(1, 2, width) / width**0.5)

    def forward(self, x: Dual, time: Dual) -> Dual:
        """Tokens (B, S, width), time (B, width) -> (B, S, out)."""

        def patches(x: Tensor, time: Tensor) -> Tensor:
            shift, scale = (self.modulation + time[:, None]).chunk(2, dim=1)
            return self.head(self.norm(x) * (1 + scale) + shift)

        return along(patches, x, time)


class WanTransformer(nn.Module):
    """Velocity of video latents under a prompt; the defaults are Wan 2.1's of 1.3B parameters, whose published weights fit.

    14B: ``width: 5120, hidden: 13824, heads: 40, depth: 40``. Use ``wrapper: rectified_flow`` in :class:`~lit_methods.RCM`.

    Args:
        channels: Channels of the latents.
        width: Width of the tokens.
        hidden: Width between the two linear layers.
        heads: Heads of attention.
        depth: Blocks.
        text_width: Width of the prompt's embeddings.
        time_width: Width of the embedding of the time, even.
        checkpoint_blocks: Compute each block again in the backward pass, for memory.

    Raises:
        ValueError: Sizes that don't fit.
    """

    takes_tangents = True
    patch = (1, 2, 2)

    def __init__(
        self,
        channels: int = 16,
        width: int = 1536,
        hidden: int = 8960,
        heads: int = 12,
        depth: int = 30,
        text_width: int = 4096,
        time_width: int = 256,
        checkpoint_blocks: bool = False,
    ) -> None:
        super().__init__()
        checks.at_least(1, channels=channels, hidden=hidden, depth=depth, text_width=text_width)
        if width % (2 * heads) or time_width % 2:
            raise ValueError(f"width={width} with heads={heads}, time_width={time_width}: give heads of even width and an even time_width")
        eps = 1e-6
        self.heads, self.time_width, self.checkpoint_blocks = heads, time_width, checkpoint_blocks
        self.patch_embedding = nn.Conv3d(channels, width, kernel_size=self.patch, stride=self.patch)
        self.text_embedding = nn.Sequential(nn.Linear(text_width, width), nn.GELU(approximate="tanh"), nn.Linear(width, width))
        self.time_embedding = nn.Sequential(nn.Linear(time_width, width), nn.SiLU(), nn.Linear(width, width))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.blocks = nn.ModuleList(WanBlock(width, hidden, heads, eps) for _ in range(depth))
        self.head = WanHead(width, channels * math.prod(self.patch), eps)

    def forward(
        self, x: Tensor, time: Tensor, context: Tensor, tangents: tuple[Tensor, Tensor] | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The velocity, and its derivative where ``tangents`` are given.

        Args:
            x: (B, C, T, H, W) latents, H and W even.
            time: (B,) 1000 times rectified-flow time; float32 or wider.
            context: (B, L, text_width) embeddings of the prompt.
            tangents: Tangents of ``x`` and ``time``. The derivative is taken without gradient.

        Returns:
            (B, C, T, H, W), or that and its derivative.

        Raises:
            ValueError: Latents of other dimensions, or embeddings of another width.
        """
        if x.ndim != 5 or x.shape[3] % 2 or x.shape[4] % 2:
            raise ValueError(f"latents are {tuple(x.shape)}: give (B, C, T, H, W) with even H and W")
        wide = self.text_embedding[0].in_features
        if context.shape[-1] != wide:
            raise ValueError(f"the prompt's embeddings are {context.shape[-1]} wide, and text_width={wide}: set it to the data's")
        latents, moment = (Dual(x), Dual(time)) if tangents is None else (Dual(x, tangents[0]), Dual(time, tangents[1]))
        sizes = (x.shape[2], x.shape[3] // 2, x.shape[4] // 2)
        angles = rotary_angles(sizes, self.patch_embedding.out_channels // self.heads, x.device)
        tokens = along(lambda x: self.patch_embedding(x).flatten(2).transpose(1, 2), latents)
        embedded = along(lambda time: self.time_embedding(self._waves(time).to(x.dtype)), moment)
        projected = along(lambda time: self.time_projection(time).unflatten(1, (6, -1)), embedded)
        prompt = self.text_embedding(context.to(x.dtype))
        again = self.checkpoint_blocks and tangents is None and torch.is_grad_enabled()
        for block in self.blocks:
            given = (tokens, projected, prompt, angles)
            tokens = checkpoint(block, *given, use_reentrant=False) if again else block(*given)
        answer = along(lambda tokens: self._latents(tokens, sizes), self.head(tokens, embedded))
        return answer.value if answer.tangent is None else (answer.value, answer.tangent)

    def _waves(self, time: Tensor) -> Tensor:
        """Cosine and sine of the time at ``time_width / 2`` frequencies, float64: in half precision neighbouring times would be one."""
        half = self.time_width // 2
        angles = time.double()[:, None] * 10000.0 ** -(torch.arange(half, dtype=torch.float64, device=time.device) / half)
        return torch.cat([angles.cos(), angles.sin()], dim=1)

    def _latents(self, patches: Tensor, sizes: tuple[int, int, int]) -> Tensor:
        """Patches (B, S, 1 x 2 x 2 x C) in their places: (B, C, T, H, W)."""
        grid = patches.unflatten(2, (*self.patch, -1)).unflatten(1, sizes)  # (B, T, H/2, W/2, 1, 2, 2, C)
        return grid.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
