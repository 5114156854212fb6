"""CAST: a dense network becomes an N:M sparse one while its forward pass stays dense (arXiv:2509.25996).

Equations and algorithms by number from a third party's line-by-line reading of the paper, whose own text could not be opened; there is no
public code. Golden vectors come from these equations, see tests/golden/data/cast/README.md. Where the reading is silent the choice is ours
and marked on the technique's page. Baselines: AST (arXiv:2407.20584) and naive masked retraining; SR-STE is a recipe of
:class:`~lit_methods.callbacks.NMSparsity`. The optimiser: :mod:`~lit_methods.callbacks.sparsity.cast.adams`. Left out: N:M masks by
Wanda or SparseGPT as the start of naive retraining, MaskLLM.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def is_refresh_step(step: int, interval: int) -> bool:
    """Whether masks are made anew before optimiser step ``step`` (counted from 0): at 0, ``interval``, 2 ``interval``, ... (Eq. 6)."""
    return step % interval == 0


def expand_blocks(values: Tensor, weight: Tensor, dim: int = 1) -> Tensor:
    """Values of row blocks, spread over the weight that they belong to.

    Args:
        values: (R, b), one value for each of b contiguous blocks of inputs of each of R outputs.
        weight: (R, C, ...) with ``dim`` 1, (C, R, ...) with ``dim`` 0; b divides C.
        dim: The weight's dimension of inputs.

    Returns:
        Broadcasts with ``weight``.
    """
    spread = values.repeat_interleave(weight.shape[dim] // values.shape[1], dim=1)
    spread = spread if dim == 1 else spread.T
    return spread.reshape(*spread.shape, *[1] * (weight.ndim - 2))


def scaled_weight(weight: Tensor, scale: Tensor, dim: int = 1) -> Tensor:
    """W_s[r, c] = W[r, c] A[r, c // (C / n)] (Eq. 11 and 12).

    Args:
        weight: W, see :func:`expand_blocks`.
        scale: A, (R, n), floating point; 1 changes nothing.
        dim: The weight's dimension of inputs.
    """
    return weight * expand_blocks(scale, weight, dim)


def finalized_weight(weight: Tensor, mask: Tensor, scale: Tensor | None = None, dim: int = 1) -> Tensor:
    """The N:M weight of Alg. 2: masked, then scaled; removed entries are exactly 0.

    Args:
        weight: W, unscaled.
        mask: bool, shape of ``weight``.
        scale: A; None: without scaling.
        dim: The weight's dimension of inputs.
    """
    pruned = weight.masked_fill(~mask, 0.0)
    return pruned if scale is None else scaled_weight(pruned, scale, dim)


def pruned_block_means(weight: Tensor, mask: Tensor, block: int, dim: int = 1) -> Tensor:
    """Start of AST's low-rank branch (SLoRB): for each row and block of inputs the mean of the weights that the mask removes.

    Args:
        weight: (R, C) with ``dim`` 1, (C, R) with ``dim`` 0.
        mask: bool, shape of ``weight``.
        block: Inputs of a block; divides C.
        dim: The weight's dimension of inputs.

    Returns:
        (R, C / block); 0 where nothing is removed.
    """
    rows, removed = (weight, ~mask) if dim == 1 else (weight.T, ~mask.T)
    removed = removed.unflatten(1, (-1, block))
    return (rows.unflatten(1, (-1, block)) * removed).sum(-1) / removed.sum(-1).clamp(min=1)


@torch.no_grad()
def magnitude_statistics(weights: Sequence[Tensor], masks: Sequence[Tensor]) -> dict[str, Tensor]:
    """How far the weights that a mask removes have come on their way to 0.

    Args:
        weights: Latent weights, any shapes and devices.
        masks: bool, True where a weight is kept.

    Returns:
        Scalars on the first weight's device: ``masked_magnitude`` and ``kept_magnitude``, mean absolute values over all weights;
        ``magnitude_ratio``, masked / kept; ``masked_below_1e-4``, share of the masked weights. NaN where there is none of a kind.
    """
    sums = []
    for weight, mask in zip(weights, masks, strict=True):
        size = weight.detach().abs().float()
        removed = ~mask
        parts = [size.sum(), (size * removed).sum(), removed.sum(), ((size < 1e-4) & removed).sum()]
        sums.append(torch.stack([part.float() for part in parts]).to(weights[0].device))
    everything, masked, count, small = torch.stack(sums).sum(0)
    kept = (everything - masked) / (sum(weight.numel() for weight in weights) - count)
    return {
        "masked_magnitude": masked / count,
        "kept_magnitude": kept,
        "magnitude_ratio": masked / count / kept,
        "masked_below_1e-4": small / count,
    }


def pack_bits(mask: Tensor) -> Tensor:
    """A bool mask as bytes, eight entries each: the first mask is kept for the whole training."""
    bits = F.pad(mask.flatten(), (0, -mask.numel() % 8)).view(-1, 8).to(torch.uint8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Undo :func:`pack_bits`."""
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    return bits.flatten()[: math.prod(shape)].bool().view(*shape)
