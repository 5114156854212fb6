"""Which weights matter: scores before training, from one batch. Pure functions of weights and losses.

Sources: SNIP (Lee et al. 2019) and GraSP (Wang et al. 2020) as in VITA-Group/Random_Pruning@871077f, CIFAR/sparselearning/snip.py, against
which golden vectors test the shares of the layers that follow from them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def snip_scores(weights: Sequence[Tensor], loss: Tensor) -> list[Tensor]:
    """|w * dL/dw|: how much the loss feels a weight's removal.

    Args:
        weights: Leaves of the graph of ``loss``, any shapes.
        loss: Scalar.

    Returns:
        One non-negative tensor per weight, its shape, not normalised; no graph.
    """
    gradients = torch.autograd.grad(loss, list(weights))
    return [(weight * gradient).abs().detach() for weight, gradient in zip(weights, gradients, strict=True)]


def grasp_scores(weights: Sequence[Tensor], losses: Sequence[Tensor]) -> list[Tensor]:
    """-w * Hg: a high score marks a weight whose removal helps the gradient to flow, so that the highest are removed.

    Args:
        weights: Leaves of the graphs of ``losses``, any shapes.
        losses: Scalars, one per half of the batch, each with a graph of its own that can be differentiated twice.

    Returns:
        One tensor per weight, its shape, any sign, divided by |sum of all| + 1e-10; no graph.
    """
    weights = list(weights)
    firsts = [torch.autograd.grad(loss, weights, create_graph=True) for loss in losses]
    total = [torch.stack(parts).sum(0).detach() for parts in zip(*firsts, strict=True)]
    products = [sum(((g * f).sum() for g, f in zip(total, first, strict=True)), start=losses[0].new_zeros(())) for first in firsts]
    curvature = [torch.autograd.grad(product, weights) for product in products]
    scores = [-weight.detach() * sum(parts) for weight, parts in zip(weights, zip(*curvature, strict=True), strict=True)]
    norm = torch.cat([score.flatten() for score in scores]).sum().abs() + 1e-10
    return [score / norm for score in scores]


def kept_masks(scores: Sequence[Tensor], density: float, remove: str = "lowest") -> list[Tensor]:
    """What stays if the scores of all layers compete; ties with the threshold stay.

    Args:
        scores: One tensor per layer, no NaN.
        density: Share of all weights that stays, in (0, 1].
        remove: ``lowest`` keeps the int(density * N) highest (SNIP). ``highest`` removes the int((1 - density) * N) highest, of which the
            last one stays after all, as in GraSP's code.

    Returns:
        One bool mask per layer, its scores' shape.

    Raises:
        ValueError: No weight would be kept or removed where at least one must be, or ``remove`` is unknown.
    """
    if remove not in ("lowest", "highest"):
        raise ValueError(f"remove is {remove!r}: give 'lowest' or 'highest'")
    every = torch.cat([score.flatten() for score in scores])
    count = int(density * every.numel()) if remove == "lowest" else int((1 - density) * every.numel())
    if count < 1:
        if remove == "highest":
            return [torch.ones_like(score, dtype=torch.bool) for score in scores]
        raise ValueError(f"density {density} of {every.numel()} weights keeps none")
    threshold = every.kthvalue(every.numel() - count + 1).values
    return [score >= threshold if remove == "lowest" else score <= threshold for score in scores]


def kept_shares(scores: Sequence[Tensor], density: float, remove: str = "lowest") -> list[float]:
    """Share of each layer that stays, in [0, 1]; see :func:`kept_masks`."""
    return [float(mask.sum()) / mask.numel() for mask in kept_masks(scores, density, remove)]
