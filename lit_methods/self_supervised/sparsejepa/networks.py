"""What SparseJEPA adds to I-JEPA: latents of an embedding, and a generator for each group of the embedding's numbers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_methods.self_supervised.sparsejepa.core import group_maps

_SMALLEST = 1e-6  # of a standard deviation, whose logarithm is taken


class GroupMaps(nn.Module):
    """The maps W^(g), a column for each latent: what the group lasso makes sparse.

    Args:
        groups: G.
        latents: K.
        map_width: p, numbers that a map puts out.

    Attributes:
        weight: (G, K, p), standard normal at first, so that no column dies before it has been tried.
    """

    def __init__(self, groups: int, latents: int, map_width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(groups, latents, map_width))

    def forward(self, latents: Tensor) -> Tensor:
        """(B, K) -> (B, G, p)."""
        return group_maps(latents, self.weight)


class GroupedAutoencoder(nn.Module):
    """q(z | e), and e_hat^(g) = A_g GELU(W^(g) z + b_g) + c_g for each of G equal groups of the embedding's numbers.

    Args:
        width: D, numbers in an embedding, a multiple of ``groups``.
        groups: G.
        latents: K.
        map_width: p, numbers that W^(g) puts out.
    """

    def __init__(self, width: int, groups: int, latents: int, map_width: int) -> None:
        super().__init__()
        if width % groups:
            raise ValueError(f"groups={groups} must divide the encoder's width={width}")
        self.mean, self.spread = nn.Linear(width, latents), nn.Linear(width, latents)
        self.maps = GroupMaps(groups, latents, map_width)
        self.map_bias = nn.Parameter(torch.zeros(groups, map_width))
        self.out_weight = nn.Parameter(torch.randn(groups, map_width, width // groups) / map_width**0.5)
        self.out_bias = nn.Parameter(torch.zeros(groups, width // groups))

    def encode(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """(B, D) -> mean and standard deviation of the latents, (B, K) each."""
        return self.mean(embedding), F.softplus(self.spread(embedding).float()) + _SMALLEST

    def decode(self, latents: Tensor) -> Tensor:
        """(B, K) -> (B, D)."""
        inside = F.gelu(self.maps(latents) + self.map_bias)
        return (torch.einsum("bgp,gpd->bgd", inside, self.out_weight) + self.out_bias).flatten(1)

    def forward(self, embedding: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, D) and (B, K) normal noise -> reconstruction (B, D), mean and standard deviation of the latents."""
        mean, std = self.encode(embedding)
        return self.decode((mean + std * noise).to(mean.dtype)), mean, std


__all__ = ["GroupMaps", "GroupedAutoencoder"]
