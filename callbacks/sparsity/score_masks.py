"""Masks that follow from learned scores, layer by layer: the largest scores stay, and scores learn through the mask. Pure functions.

Sources: "What's hidden in a randomly weighted neural network?" (arXiv:1911.13299) and HYDRA (arXiv:2002.10509), as DASS (arXiv:2207.06968)
uses them. Golden vectors come from HERO-MDH/DASS-Differentiable-Architecture-Search-for-Sparse-Neural-Networks@0aab24e: DASS/layers.py
(SubnetConv, SubnetLinear) and DASS/pruning.py (initialize_scaled_score).
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor

Phase = Literal["pretrain", "prune", "finetune"]


def pruning_phase(step: int, pretrain_steps: int, prune_steps: int) -> tuple[Phase, int]:
    """Phase of a training that learns weights, then scores, then the weights that stay, and the steps already done in that phase.

    Args:
        step: Optimiser steps done, >= 0.
        pretrain_steps: Steps with all weights, whose scores rest.
        prune_steps: Steps in which scores alone are learned.
    """
    if step < pretrain_steps:
        return "pretrain", step
    if step < pretrain_steps + prune_steps:
        return "prune", step - pretrain_steps
    return "finetune", step - pretrain_steps - prune_steps


@torch.no_grad()
def score_mask(scores: Tensor, keep: float) -> Tensor:
    """The mask of one layer: without the int((1 - keep) N) entries of the smallest |S|; of equal ones the first go.

    Args:
        scores: S, any shape, N >= 1 entries, floating point.
        keep: k, share of the entries that stay, in (0, 1].

    Returns:
        bool, shape of ``scores``, with at least one True.

    Raises:
        ValueError: ``keep`` lies outside (0, 1], or is so small that nothing would stay.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep is {keep}: give a share in (0, 1]")
    size = scores.numel()
    removed = int((1 - keep) * size)
    if removed >= size:
        raise ValueError(f"keep={keep} of {size} entries leaves none: raise keep")
    if removed == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    size_of = scores.abs().flatten()
    threshold = size_of.kthvalue(removed).values  # some times faster than sorting
    below, equal = size_of < threshold, size_of == threshold
    return ~(below | equal & (equal.cumsum(0) <= removed - below.sum())).view_as(scores)


class _Scored(torch.autograd.Function):
    """W * M forwards; backwards g M to W, and g W sign(S) to S, as if the mask were |S|."""

    @staticmethod
    def forward(weight: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
        return weight * mask

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        weight, scores, mask = ctx.saved_tensors
        to_weight, to_scores, _ = ctx.needs_input_grad
        return grad * mask if to_weight else None, grad * weight * scores.sign() if to_scores else None, None


def scored_weight(weight: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
    """The weight of the forward pass, W * M, with a gradient for the scores that goes straight through the mask.

    With g the gradient of the result, W gets g * M, and S gets g * W * sign(S), at removed entries too.

    Args:
        weight: W, any shape, floating point.
        scores: S, shape of ``weight``.
        mask: M, bool, shape of ``weight``, such as :func:`score_mask` makes.

    Returns:
        Shape and dtype of ``weight``.
    """
    return _Scored.apply(weight, scores, mask)  # type: ignore[no-any-return]


def scaled_scores(weight: Tensor) -> Tensor:
    """First scores of a trained layer, S = sqrt(6 / fan_in) W / max|W|: their order is that of the magnitudes.

    Args:
        weight: W, (out, in) or (out, in / groups, ...), floating point; fan_in is the number of entries of ``weight[0]``.

    Returns:
        Shape and dtype of ``weight``; zeros where all of ``weight`` is 0.
    """
    largest = weight.detach().abs().max()
    scale = math.sqrt(6 / max(1, weight[0].numel()))
    return scale * weight.detach() / torch.where(largest == 0, torch.ones_like(largest), largest)


__all__ = ["pruning_phase", "scaled_scores", "score_mask", "scored_weight"]
