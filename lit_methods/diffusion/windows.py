"""Videos longer than a network was made for, window by window: FreeNoise (arXiv:2310.15169) and Gen-L-Video (arXiv:2305.18264).

FreeNoise's windows, weights and noise equal AILab-CVC/FreeNoise@404b68b (lvdm/modules/attention_freenoise.py, funcs.py,
scripts/evaluation/inference_freenoise.py) on the golden vectors. Gen-L-Video's fusion is its equation with equal weights.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def window_views(frames: int, size: int, stride: int) -> Tensor:
    """First and last + 1 frame of each sliding window that fits: (n, 2) int64; n = 0 if there are fewer frames than a window has.

    Frames behind the last window that fits are in none.

    Args:
        frames: F.
        size: Frames of a window, W >= 1.
        stride: Frames from one window to the next, S >= 1.
    """
    starts = torch.arange(0, max(frames - size + 1, 0), stride)
    return torch.stack([starts, starts + size], dim=1)


def covering_views(frames: int, size: int, stride: int) -> Tensor:
    """Sliding windows that hold every frame: as :func:`window_views`, with one more at the end where the stride doesn't meet it.

    Args:
        frames: F >= ``size``.
        size: Frames of a window.
        stride: Frames from one window to the next.

    Raises:
        ValueError: Fewer frames than a window has, or a stride that leaves frames out.
    """
    if frames < size or not 1 <= stride <= size:
        raise ValueError(f"windows of {size} frames every {stride} of {frames}: give frames >= size >= stride >= 1")
    views = window_views(frames, size, stride)
    last = torch.tensor([[frames - size, frames]])
    return views if bool((views[-1] == last[0]).all()) else torch.cat([views, last])


def window_weights(size: int) -> Tensor:
    """Triangle 1, 2, .., 2, 1 of a window's frames: (W,) int64; an even window has its largest weight twice."""
    rising = torch.arange(1, size + 1)
    return torch.minimum(rising, rising.flip(0))


def fuse_windows(predictions: Tensor, views: Tensor, frames: int, weights: Tensor | None = None) -> Tensor:
    """Weighted mean over the windows that hold a frame; 0 where none does.

    With equal weights this is Gen-L-Video's fusion, with :func:`window_weights` FreeNoise's.

    Args:
        predictions: (n, W, ...) one for each window.
        views: (n, 2) int64, first and last + 1 frame of each window.
        frames: F.
        weights: (W,), of the frames in a window; None: equal.

    Returns:
        (F, ...) like ``predictions``.
    """
    size = predictions.shape[1]
    places = (views[:, :1].to(predictions.device) + torch.arange(size, device=predictions.device)).flatten()
    weight = torch.ones(size) if weights is None else weights
    weight = weight.to(predictions).repeat(len(views))
    weighted = predictions.flatten(0, 1) * weight.view(-1, *(1,) * (predictions.ndim - 2))
    total = predictions.new_zeros(frames, *predictions.shape[2:]).index_add(0, places, weighted)
    count = predictions.new_zeros(frames).index_add(0, places, weight)
    # a frame in no window has 0 of 0: it becomes 0 of 1
    return total / torch.where(count > 0, count, torch.ones_like(count)).view(-1, *(1,) * (predictions.ndim - 2))


def window_attention(query: Tensor, key: Tensor, value: Tensor, size: int, stride: int) -> Tensor:
    """Attention inside sliding windows over the frames; a frame's answers are merged with triangular weights.

    Args:
        query: (..., F, D).
        key: Like ``query``.
        value: Like ``query``.
        size: Frames of a window.
        stride: Frames from one window to the next.

    Returns:
        (..., F, D); 0 for frames in no window.
    """
    frames = query.shape[-2]
    views = window_views(frames, size, stride)
    if not len(views):
        return torch.zeros_like(value)
    # unfold appends the window's frames as the last dimension: (..., n, D, W) -> (..., n, W, D)
    inside, keys, values = (part.unfold(-2, size, stride).transpose(-1, -2) for part in (query, key, value))
    answers = F.scaled_dot_product_attention(inside, keys, values)
    fused = fuse_windows(answers.movedim((-3, -2), (0, 1)), views, frames, window_weights(size))
    return fused.movedim(0, -2)


def draw_block_orders(frames: int, size: int, stride: int, generator: torch.Generator | None = None) -> Tensor:
    """Frames that each block of FreeNoise's noise is copied from, in a random order: (k, S) int64.

    Block k stands at frames W + k S and behind; it holds those that stand a window before.

    Args:
        frames: F.
        size: W, frames that have noise of their own.
        stride: S, frames of a block.
        generator: Draws the orders, on the CPU.
    """
    starts = torch.arange(size, frames, stride) - size
    orders = torch.rand(len(starts), stride, generator=generator).argsort(dim=1)
    return starts[:, None] + orders


def reschedule_noise(noise: Tensor, orders: Tensor, size: int, stride: int, dim: int = 0) -> Tensor:
    """FreeNoise's noise: frames beyond the first window hold noises of earlier frames, block by block.

    Args:
        noise: Noise of F frames along ``dim``; only the first ``size`` are used.
        orders: (k, S) int64, the frames that block k is copied from: see :func:`draw_block_orders`. A block may copy an earlier one.
        size: W, frames that keep their noise.
        stride: S, frames of a block; the last block may be cut off by the end.
        dim: Where the frames stand.

    Returns:
        Like ``noise``.
    """
    frames = noise.shape[dim]
    source = torch.arange(frames)
    for start, order in zip(range(size, frames, stride), orders.cpu(), strict=True):
        source[start : start + stride] = source[order][: max(frames - start, 0)]
    return noise.index_select(dim, source.to(noise.device))


__all__ = [
    "covering_views",
    "draw_block_orders",
    "fuse_windows",
    "reschedule_noise",
    "window_attention",
    "window_views",
    "window_weights",
]
