"""How far samples are from data."""

import torch
from torch import Tensor


def sliced_wasserstein(samples: Tensor, data: Tensor, projections: int = 64, seed: int = 0) -> Tensor:
    """Sliced Wasserstein-2 distance: root of the mean squared distance of sorted projections on random directions (arXiv:1804.01947).

    Args:
        samples: (N, D).
        data: (N, D).
        projections: Number of directions.
        seed: Of the directions: the same on every machine.

    Returns:
        Scalar >= 0; 0 if both are the same set.

    Raises:
        ValueError: Shapes that differ.
    """
    if samples.shape != data.shape:
        raise ValueError(f"{tuple(samples.shape)} samples don't fit {tuple(data.shape)} data: give as many of the same size")
    directions = torch.randn(data.shape[1], projections, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    directions = (directions / directions.norm(dim=0)).to(data)
    gaps = (samples @ directions).sort(dim=0).values - (data @ directions).sort(dim=0).values
    return gaps.square().mean().sqrt()
