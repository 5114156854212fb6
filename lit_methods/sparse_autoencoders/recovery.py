"""How well the directions of a dictionary match others: the true features, or the dictionary of another run.

Paper of the names: "Taming Polysemanticity in LLMs: Provable Feature Recovery via Sparse Autoencoders", arXiv:2506.14002.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK = 2**24  # cosines that are held at a time


def max_cosine(directions: Tensor, others: Tensor, *, absolute: bool = False) -> Tensor:
    """The largest cosine of each direction with any of the others; with another run's directions, MCS.

    Args:
        directions: (n, d) floating point, any length; a zero row has the cosine 0 with everything.
        others: (m, d), m >= 1.
        absolute: Take |cos|: opposite directions count as one.

    Returns:
        (n,) float32 or wider, in [-1, 1]. The (n, m) cosines are made in pieces.

    Raises:
        ValueError: Shapes that don't fit, or no others.
    """
    if directions.ndim != 2 or others.ndim != 2 or directions.shape[1] != others.shape[1] or not len(others):
        given = f"{tuple(directions.shape)} and {tuple(others.shape)}"
        raise ValueError(f"cosines need directions (n, d) and others (m >= 1, d) of the same width, got {given}")
    wide = torch.promote_types(torch.promote_types(directions.dtype, others.dtype), torch.float32)
    with torch.autocast(directions.device.type, enabled=False):  # bf16 has no digits to tell .9 from .901
        rows, columns = F.normalize(directions.to(wide), dim=1), F.normalize(others.to(wide), dim=1).T
        cosines = (rows[start : start + step] @ columns for step in [max(1, _CHUNK // len(others))] for start in range(0, len(rows), step))
        best = [(found.abs() if absolute else found).amax(1) for found in cosines]
    return torch.cat(best) if best else rows.new_zeros(0)


def share_above(cosines: Tensor, tau: float) -> Tensor:
    """Share of the cosines above ``tau``: FRR over the true features, consistency over the neurons of a run.

    Args:
        cosines: (n,) as :func:`max_cosine` gives them; n >= 1.
        tau: Threshold; a cosine at it doesn't count.

    Returns:
        Scalar in [0, 1], in the dtype of ``cosines``.
    """
    return (cosines > tau).to(cosines.dtype).mean()


__all__ = ["max_cosine", "share_above"]
