"""How well a long video hangs together: jumps at junctions, drift from its start, likeness of its frames, which stand at dimension 1."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def junction_jump(video: Tensor, junctions: Sequence[int]) -> Tensor:
    """Mean absolute difference of a junction's frame and the one before it.

    Args:
        video: (B, F, ...).
        junctions: First frame of each piece but the first, at least one.

    Returns:
        (B,).
    """
    places = list(junctions)
    return (video[:, places] - video[:, [place - 1 for place in places]]).abs().flatten(1).mean(1)


def content_drift(video: Tensor, frames: int) -> Tensor:
    """Mean absolute difference of the mean of the first ``frames`` frames and that of the last: (B, F, ...) -> (B,)."""
    return (video[:, :frames].mean(1) - video[:, -frames:].mean(1)).abs().flatten(1).mean(1)


def adjacent_similarity(video: Tensor) -> Tensor:
    """Cosine of each frame and the next: (B, F, ...) -> (B, F - 1)."""
    flat = video.flatten(2)
    return F.cosine_similarity(flat[:, 1:], flat[:, :-1], dim=-1)


def similarity_to_start(video: Tensor, frames: int) -> Tensor:
    """Cosine of each frame and the mean of the first ``frames``: (B, F, ...) -> (B, F)."""
    flat = video.flatten(2)
    return F.cosine_similarity(flat, flat[:, :frames].mean(1, keepdim=True), dim=-1)


__all__ = ["adjacent_similarity", "content_drift", "junction_jump", "similarity_to_start"]
