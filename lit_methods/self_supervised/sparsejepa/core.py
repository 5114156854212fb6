"""The maths of SparseJEPA beside I-JEPA's: latents, generators of groups, their loss, and how much the latents tell of each other.

Source: "SparseJEPA: Sparse Representation Learning of Joint Embedding Predictive Architectures" (arXiv:2504.16140), whose code isn't
public; how its terms are made of oi-VAE (arXiv:1802.06765, and samuela/oi-vae@60922cf: lib/models.py, lib/utils.py) is our reading of
abstract and summaries. The group lasso and its proximal step are those of :mod:`lit_methods.callbacks.sparsity.group_sparsity`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def group_maps(latents: Tensor, maps: Tensor) -> Tensor:
    """W^(g) z of every group.

    Args:
        latents: (B, K).
        maps: (G, K, p): W^(g) transposed, so that a row belongs to a latent.

    Returns:
        (B, G, p).
    """
    return torch.einsum("bk,gkp->bgp", latents, maps)


def kl_to_standard_normal(mean: Tensor, std: Tensor) -> Tensor:
    """Kullback-Leibler divergence of N(mean, diag std^2) from N(0, I): 1/2 sum(mean^2 + std^2 - 1 - log std^2).

    Args:
        mean: (..., K).
        std: (..., K), > 0.

    Returns:
        (...) in nats, >= 0.
    """
    return 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).sum(-1)


class SparseTerms(NamedTuple):
    """The parts of SparseJEPA's second loss.

    Attributes:
        reconstruction: Scalar, squared distance of embedding and its reconstruction: sum over its numbers, mean over embeddings.
        kl: Scalar, mean divergence over embeddings, in nats.
    """

    reconstruction: Tensor
    kl: Tensor


def sparse_terms(embedding: Tensor, reconstruction: Tensor, mean: Tensor, std: Tensor) -> SparseTerms:
    """Reconstruction error and divergence, in float32 or wider.

    Args:
        embedding: (B, D).
        reconstruction: (B, D).
        mean: (B, K) of the latents.
        std: (B, K) of the latents, > 0.
    """
    with torch.autocast(embedding.device.type, enabled=False):
        wide = torch.promote_types(embedding.dtype, torch.float32)
        embedding, reconstruction, mean, std = (part.to(wide) for part in (embedding, reconstruction, mean, std))
        error = F.mse_loss(reconstruction, embedding, reduction="none").sum(-1).mean()
        return SparseTerms(error, kl_to_standard_normal(mean, std).mean())


def multi_information(latents: Tensor) -> Tensor:
    """How much variables tell of each other, sum of H(Z_j) less H(Z), as if they were Gaussian: -1/2 log det of their correlations.

    Args:
        latents: (N, K) samples; N should be much larger than K, as the estimate is about K (K - 1) / (4 N) too high.

    Returns:
        Scalar >= 0 in nats, float64; 0 for uncorrelated variables, infinite for dependent ones. Constant variables count as independent.

    Raises:
        ValueError: Fewer than two samples.
    """
    if latents.ndim != 2 or len(latents) < 2:
        raise ValueError(f"latents are {tuple(latents.shape)}, expected (samples >= 2, variables)")
    z = latents.double() - latents.double().mean(0)
    norms = z.norm(dim=0)
    z = z / torch.where(norms > 0, norms, 1.0)
    correlations = z.T @ z
    correlations.diagonal().fill_(1.0)
    return (-0.5 * torch.linalg.slogdet(correlations).logabsdet).clamp(min=0)


__all__ = ["SparseTerms", "group_maps", "kl_to_standard_normal", "multi_information", "sparse_terms"]
