"""A small network of noisy videos, and the exact one of Gaussian videos."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_methods import checks
from lit_methods.consistency_models.networks import sinusoidal_embedding
from lit_methods.diffusion.windows import window_attention
from lit_methods.tasks.diffusion.noise_prediction import signal_shares


class TemporalAttention(nn.Module):
    """Self-attention of each pixel over its frames: over all of them, or inside FreeNoise's sliding windows.

    Args:
        channels: Width of a frame's pixel.
        heads: Number of heads.
        inner: Width of all heads together; None: ``channels``.
    """

    def __init__(self, channels: int, heads: int = 1, inner: int | None = None) -> None:
        super().__init__()
        inner = channels if inner is None else inner
        if inner % heads:
            raise ValueError(f"inner is {inner} and heads {heads}: give a multiple of the heads")
        self.heads = heads
        self.window: tuple[int, int] | None = None  # frames of a window, and from one to the next; None: all frames at once
        self.to_q = nn.Linear(channels, inner, bias=False)
        self.to_k = nn.Linear(channels, inner, bias=False)
        self.to_v = nn.Linear(channels, inner, bias=False)
        self.to_out = nn.Linear(inner, channels)

    def forward(self, x: Tensor, place: Tensor | None = None) -> Tensor:
        """(B, F, C) -> (B, F, C); ``place`` (F, C) is added to what queries and keys are made of."""
        placed = x if place is None else x + place
        parts = (layer(given) for layer, given in ((self.to_q, placed), (self.to_k, placed), (self.to_v, x)))
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        if self.window is None:
            mixed = F.scaled_dot_product_attention(query, key, value)
        else:
            mixed = window_attention(query, key, value, *self.window)
        answer: Tensor = self.to_out(mixed.transpose(1, 2).flatten(2))
        return answer


class _FrameBlock(nn.Module):
    """Convolutions in each frame and between neighbours, scaled and shifted by step and prompt; then attention over the frames."""

    def __init__(self, channels_in: int, channels: int, embedding: int, attend: bool) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(min(8, channels_in), channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.neighbours = nn.Conv2d(3 * channels, channels, 1)
        self.modulation = nn.Linear(embedding, 2 * channels)
        self.norm2 = nn.GroupNorm(min(8, channels), channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.shortcut = nn.Conv2d(channels_in, channels, 1) if channels_in != channels else nn.Identity()
        self.temporal = TemporalAttention(channels, heads=max(1, channels // 16)) if attend else None
        self.norm3 = nn.LayerNorm(channels) if attend else nn.Identity()
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(B, F, C, H, W) and (B, F, E)."""
        batch, frames, _, height, width = x.shape
        flat = x.flatten(0, 1)
        scale, shift = self.modulation(embedding).flatten(0, 1)[:, :, None, None].chunk(2, dim=1)
        h: Tensor = self.conv1(F.silu(self.norm1(flat))).unflatten(0, (batch, frames))
        beside = F.pad(h, (0, 0) * 3 + (1, 1))  # no frame: 0
        h = self.neighbours(torch.cat([beside[:, :-2], h, beside[:, 2:]], dim=2).flatten(0, 1))
        h = self.shortcut(flat) + self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))
        h = h.unflatten(0, (batch, frames))
        if self.temporal is None:
            return h
        pixels = h.permute(0, 3, 4, 1, 2).flatten(0, 2)  # (B H W, F, C)
        place = sinusoidal_embedding(torch.arange(frames, device=x.device), pixels.shape[-1], scale=1.0)
        pixels = pixels + self.temporal(self.norm3(pixels), place.to(pixels.dtype))
        answer: Tensor = pixels.unflatten(0, (batch, height, width)).permute(0, 3, 4, 1, 2)
        return answer


class SmallVideoUNet(nn.Module):
    """A U-Net of two sizes for short videos: convolutions in and between frames; attention over the frames at half the size.

    The noise is sqrt(1 - a) x + sqrt(a) v of the network's answer v, with alpha-bar a of the step (arXiv:2202.00512): in a noisy video that
    is nearly the video itself, and small errors don't add up.

    Its prompts are classes: one for a video, or one for each frame. Another one, ``num_classes``, says nothing.

    Cost: 0.34 million parameters with the defaults.

    Args:
        in_channels: Channels of a frame.
        channels: Channels at full size, a multiple of 16; twice as many at half the size.
        num_classes: Classes that a prompt may be.
        timesteps: T, steps of the diffusion.
        beta_first: Variance of the noise that the first step adds.
        beta_last: Variance of the noise that the last step adds.
    """

    frame_prompts = True

    def __init__(
        self,
        in_channels: int = 1,
        channels: int = 32,
        num_classes: int = 10,
        timesteps: int = 1000,
        beta_first: float = 0.00085,
        beta_last: float = 0.012,
    ) -> None:
        super().__init__()
        checks.at_least(1, "steps", timesteps=timesteps)
        checks.within("(0, 1)", "a variance", beta_first=beta_first, beta_last=beta_last)
        self.shares = signal_shares(timesteps, beta_first, beta_last)  # no buffer, which a run in bfloat16 would round
        checks.at_least(1, in_channels=in_channels, channels=channels, num_classes=num_classes)
        if channels % 16:
            raise ValueError(f"channels is {channels}: give a multiple of 16")
        width = 4 * channels
        self.channels, self.num_classes = channels, num_classes
        self.embed = nn.Sequential(nn.Linear(channels, width), nn.SiLU(), nn.Linear(width, width))
        self.classes = nn.Embedding(num_classes + 1, width)
        self.inp = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.down = _FrameBlock(channels, channels, width, attend=False)
        self.halve = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.middle = nn.ModuleList(_FrameBlock(a, 2 * channels, width, attend=True) for a in (channels, 2 * channels))
        self.up = _FrameBlock(3 * channels, channels, width, attend=False)
        self.norm = nn.GroupNorm(8, channels)
        self.out = nn.Conv2d(channels, in_channels, 3, padding=1)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        """Videos (B, F, C, H, W), H and W even, steps (B,) and classes (B,) or (B, F) int64 -> noise like ``x``."""
        frames = x.shape[1]
        if x.shape[-2] % 2 or x.shape[-1] % 2:
            raise ValueError(f"frames are {x.shape[-2]} x {x.shape[-1]}: SmallVideoUNet halves them once, so give even sizes")
        step = self.embed(sinusoidal_embedding(t, self.channels, scale=1.0).to(self.out.weight.dtype))
        prompt = self.classes(cond if cond.ndim == 2 else cond[:, None].expand(-1, frames))
        embedding = F.silu(step[:, None] + prompt)
        start = self.down(_each(self.inp, x), embedding)
        h = _each(self.halve, start)
        for block in self.middle:
            h = block(h, embedding)
        h = F.interpolate(h.flatten(0, 1), scale_factor=2).unflatten(0, x.shape[:2])
        h = self.up(torch.cat([h, start], dim=2), embedding)
        share = self.shares.to(t.device)[t].view(-1, 1, 1, 1, 1)
        return (1 - share).sqrt() * x + share.sqrt() * _each(self.out, F.silu(_each(self.norm, h)))

    def denoise(self, x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        """Noise in ``x_t``."""
        return self(x_t, t, cond)  # type: ignore[no-any-return]

    def unconditional(self, cond: Tensor) -> Tensor:
        """The class that says nothing, like ``cond``."""
        return torch.full_like(cond, self.num_classes)

    @contextmanager
    def attention_windows(self, size: int, stride: int) -> Iterator[None]:
        """Inside, frames attend in sliding windows."""
        layers = [layer for layer in self.modules() if isinstance(layer, TemporalAttention)]
        try:
            for layer in layers:
                layer.window = (size, stride)
            yield
        finally:
            for layer in layers:
                layer.window = None


def _each(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer of images on each frame."""
    answer: Tensor = layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])
    return answer


class GaussianVideos(nn.Module):
    """The exact noise prediction of Gaussian videos, for trials without training: it has no parameters.

    The frames of each pixel are Gaussian by themselves, with the prompt as their mean and covariance 1 + 0.5 exp(-((i - j) / length)^2),
    plus 1e-4 on the diagonal: content that all frames share, and smooth motion. The mean of the clean frames given the noisy ones is
    p + sqrt(a) S (a S + (1 - a) I)^-1 (x_t - sqrt(a) p), in the dtype of the videos.

    A call solves a system of F x F.

    Args:
        length: Frames over which the motion is smooth, > 0.
        timesteps: T, steps of the diffusion.
        beta_first: Variance of the noise that the first step adds.
        beta_last: Variance of the noise that the last step adds.
    """

    frame_prompts = True

    def __init__(self, length: float = 4.0, timesteps: int = 1000, beta_first: float = 0.00085, beta_last: float = 0.012) -> None:
        super().__init__()
        checks.positive(length=length)
        checks.at_least(1, "steps", timesteps=timesteps)
        checks.within("(0, 1)", "a variance", beta_first=beta_first, beta_last=beta_last)
        self.length = length
        self.shares = signal_shares(timesteps, beta_first, beta_last)  # no buffer, which a run in bfloat16 would round

    def covariance(self, frames: int, like: Tensor) -> Tensor:
        """S of so many frames: (F, F), in the dtype and on the device of ``like``."""
        place = torch.arange(frames, dtype=like.dtype, device=like.device)
        smooth = torch.exp(-((place[:, None] - place) / self.length).square())
        return 1 + 0.5 * smooth + 1e-4 * torch.eye(frames, dtype=like.dtype, device=like.device)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        """Videos (B, F, C, H, W) in float32 or wider, steps (B,) and means (B,) or (B, F) -> noise like ``x``."""
        with torch.autocast(x.device.type, enabled=False):
            frames = x.shape[1]
            share = self.shares.to(t.device)[t].to(x.dtype)[:, None, None]  # (B, 1, 1)
            mean = (cond if cond.ndim == 2 else cond[:, None].expand(-1, frames)).to(x.dtype)[:, :, None]
            pixels = x.flatten(2)  # (B, F, D)
            covariance = self.covariance(frames, x)
            noisy = share * covariance + (1 - share) * torch.eye(frames, dtype=x.dtype, device=x.device)
            clean = mean + share.sqrt() * covariance @ torch.linalg.solve(noisy, pixels - share.sqrt() * mean)
            return ((pixels - share.sqrt() * clean) / (1 - share).sqrt()).view_as(x)

    def denoise(self, x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        """Noise in ``x_t``."""
        return self(x_t, t, cond)  # type: ignore[no-any-return]

    def unconditional(self, cond: Tensor) -> Tensor:
        """The mean 0."""
        return torch.zeros_like(cond)


__all__ = ["GaussianVideos", "SmallVideoUNet", "TemporalAttention"]
