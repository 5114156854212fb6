"""Maths of top-AFA and of the AFA evaluation (arXiv:2503.24277).

Follows SewoongLee/top-afa-sae at commit 1c7a683: training/sae.py (TopAFASAE) and visualization/zf-plot.ipynb. If an input is a sum of
nearly orthogonal unit directions, the norm of its code is near its own, up to a factor that the largest inner product of two directions
bounds. That norm tells how many features to keep (:func:`topafa`, :func:`afa_loss`), and how good a trained autoencoder is
(:func:`zf_metrics`).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lit_methods.sparse_autoencoders.dictionary import wide

__all__ = ["ZFMetrics", "afa_loss", "band_slopes", "decoder_coherence", "topafa", "zf_metrics"]


def topafa(u: Tensor, centred: Tensor, decoder_norms: Tensor) -> Tensor:
    """Keeps, of each sample, as many of the largest activations as bring the norm of its code nearest to the norm of its input.

    Activations max(u, 0) are ordered by their size times the norm of their direction. The norm of the first j of them is compared with the
    input's for each j; the first j that comes nearest is kept. All h are kept where h = 1, and for inputs of a norm of thousands: the
    authors' code gives that choice the norm 10^4.

    Args:
        u: (B, h) pre-activations.
        centred: (B, d) inputs minus the decoder's bias.
        decoder_norms: (h,) norms of the features' directions.

    Returns:
        (B, h) codes >= 0 in the dtype of ``u``. Gradients flow through what is kept; the choice has none.
    """
    a = u.relu()
    with torch.no_grad(), torch.autocast(u.device.type, enabled=False):
        powers = (wide(a) * wide(decoder_norms)).square()
        ordered, order = powers.sort(dim=1, descending=True)
        total = ordered.cumsum(dim=1)
        total[:, -1] = 1e8
        target = torch.linalg.vector_norm(wide(centred), dim=1, keepdim=True)
        last = (total.sqrt() - target).abs().argmin(dim=1, keepdim=True)
        kept = torch.arange(u.shape[1], device=u.device) <= last
        mask = torch.zeros_like(kept).scatter(1, order, kept)
    return a * mask


def afa_loss(code: Tensor, x: Tensor) -> Tensor:
    """Mean over the batch of (|z| - |x|)^2, to be multiplied by the coefficient.

    As in the authors' code the norms are those of the code as it is, not times its directions' norms, and of the input with the decoder's
    bias. A norm of 0 has gradient 0.

    Args:
        code: (B, h).
        x: (B, d), normalised as the autoencoder sees it.
    """
    norms = [torch.linalg.vector_norm(wide(one), dim=1) for one in (code, x)]
    return (norms[0] - norms[1]).square().mean()


class ZFMetrics(NamedTuple):
    """What the AFA evaluation says of N samples, (N,) each.

    Attributes:
        norm_z: L2 norm of the input: x of the ZF plot.
        norm_f: L2 norm of the code, each entry times its direction's norm, and the bias as one more feature: y of the plot.
        eps_lbo: The least quasi-orthogonality that explains the two norms; lower is better.
        normalized_mse: |z - z_hat|^2 / |z|^2.
    """

    norm_z: Tensor
    norm_f: Tensor
    eps_lbo: Tensor
    normalized_mse: Tensor


def zf_metrics(x: Tensor, code: Tensor, decoder: Tensor, decoder_bias: Tensor, reconstruction: Tensor | None = None) -> ZFMetrics:
    """Norms of inputs and codes, eps-LBO = | |z|^2 - |f|^2 | / ((h - 1) |f|^2), and the normalised error of each sample.

    Args:
        x: (N, d) inputs.
        code: (N, h).
        decoder: (h, d) directions.
        decoder_bias: (d,).
        reconstruction: (N, d); None: code x decoder + decoder_bias.

    Returns:
        Of float32 or wider. The bias counts in |f|, and not in h; eps-LBO isn't finite for h = 1. An input of norm 0 has an infinite
        error, or none: NaN.
    """
    with torch.autocast(x.device.type, enabled=False):
        z, f, directions, bias = wide(x), wide(code), wide(decoder), wide(decoder_bias)
        norm_z = torch.linalg.vector_norm(z, dim=1)
        of_features = (f * torch.linalg.vector_norm(directions, dim=1)).square().sum(dim=1)
        power = of_features + bias.square().sum()
        found = f @ directions + bias if reconstruction is None else wide(reconstruction)
        gap = (norm_z.square() - power).abs()
        return ZFMetrics(norm_z, power.sqrt(), gap / ((code.shape[1] - 1) * power), (z - found).square().sum(dim=1) / z.square().sum(dim=1))


def band_slopes(error: float) -> tuple[float, float]:
    """Slopes between which the code's norm lies over the input's, for eps (h - 1) = ``error`` >= 0.

    Returns:
        lower: sqrt(1 / (1 + error)).
        upper: sqrt(1 / (1 - error)); infinite from 1 on.
    """
    return math.sqrt(1 / (1 + error)), math.sqrt(1 / (1 - error)) if error < 1 else math.inf


def decoder_coherence(decoder: Tensor) -> tuple[Tensor, Tensor]:
    """Largest and mean inner product of two different directions: (h, d) -> two scalars; O(h^2) memory.

    The mean is over ordered pairs. Directions are taken as they are, not at unit norm; for h = 1 there is no pair.
    """
    with torch.autocast(decoder.device.type, enabled=False):
        rows = wide(decoder)
        products = rows @ rows.T
    others = ~torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    pairs = products[others]
    return pairs.max(), pairs.mean()
