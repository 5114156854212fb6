"""Random numbers of one's own: seeds and noise that no other code disturbs."""

import hashlib

import torch
from torch import Tensor


def own_seed(owner: str, seed: int) -> int:
    """A seed that nobody else uses, from the user's.

    With the user's own a mask would be drawn from the very numbers that a network seeded alike was initialised with: it would keep, say,
    the most negative weights of the first layer.

    Args:
        owner: Name of what draws.
        seed: The user's seed.

    Returns:
        In [0, 2**56), the same on every machine.
    """
    return int.from_bytes(hashlib.sha256(f"{owner} {seed}".encode()).digest()[:7], "little")


def seeded_noise(place: str, seed: int, x: Tensor) -> Tensor:
    """Normal noise like ``x`` that follows from place and seed alone; the global generators stay as they are."""
    generator = torch.Generator(x.device).manual_seed(own_seed(place, seed))
    return torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
