"""N:M sparsity trained by progressive gradient flow (arXiv:2402.04744): MdGf, SdGf, and what they are compared with.

Golden vectors: abhibambhaniya/progressive_gradient_flow_nm_sparsity at 4ee44a4, timm/sparse_pruning/sparse_functions.py, see
tests/golden/data/progressive_gradient_flow/README.md. The paper's text could not be read: what isn't in the released code is marked (mem)
on the technique's page. SR-STE: Zhou et al., arXiv:2102.04010. Left out: the paper's language tasks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_methods import checks
from lit_methods.callbacks.sparsity.masks import is_nm, keep_largest, nm_mask

Recipe = Literal[
    "mdgf_exp", "mdgf_linear", "sdgf_stepwise", "sdgf_geometric", "sdgf_densify", "sdgf_custom", "ste", "srste", "one_shot", "dense"
]
Stage = tuple[int, int, int]


def sparse_mask(weight: Tensor, n: int, m: int, rate: float = 0.0, dim: int = 1) -> Tensor:
    """Mask of the largest magnitudes: N of every M, or a share of the whole weight.

    Args:
        weight: At least ``dim + 1`` dimensions, real, no NaN.
        n: Kept per group, 0 to ``m``.
        m: Consecutive entries along ``dim`` that form a group.
        rate: Above 0: unstructured; ``n``, ``m`` and ``dim`` don't matter, and ``int((1 - rate) * numel)`` entries of the weight are kept.
        dim: Dimension along which the groups run.

    Returns:
        bool, shape of ``weight``, without a gradient; of equal magnitudes the first is kept.

    Raises:
        ValueError: ``rate`` lies outside [0, 1], or the groups don't fit the weight.
    """
    checks.share(rate=rate)
    if rate > 0:
        return keep_largest(weight.detach().abs(), int((1.0 - rate) * weight.numel()))
    return nm_mask(weight, n, m, dim)


def flow_factor(recipe: Recipe, steps: int, decay: float) -> float:
    """Factor beta of pruned weights in the forward pass, while training is sparse.

    Args:
        recipe: ``mdgf_linear``: max(1 - c t, 0); ``mdgf_exp``: exp(-c t); all others: 0.
        steps: t, optimiser steps since the first sparse one, >= 0.
        decay: c, >= 0.
    """
    if recipe == "mdgf_linear":
        return max(1.0 - decay * steps, 0.0)
    return math.exp(-decay * steps) if recipe == "mdgf_exp" else 0.0


def decay_pruned(grad: Tensor, weight: Tensor, mask: Tensor, decay: float) -> Tensor:
    """SR-STE's gradient: G + lambda (1 - M) W, which goes through the optimiser's moments like any gradient.

    Args:
        grad: G, gradient of the masked weight.
        weight: Latent weight W, same shape.
        mask: M, bool, same shape.
        decay: lambda, >= 0.
    """
    return torch.addcmul(grad, weight, (~mask).to(weight.dtype), value=decay)


def sdgf_schedule(
    kind: Literal["stepwise", "geometric", "densify", "custom"],
    n: int,
    m: int,
    total_epochs: int,
    dense_epochs: int = 0,
    fine_tune_epochs: int = 0,
    stages: int | Sequence[tuple[int, int]] = 4,
) -> list[Stage]:
    """Stages of SdGf; stage i starts at epoch ``dense_epochs + int(i * interval)``, interval = (total - dense - fine-tune) / number.

    Args:
        kind: ``stepwise``: (M-1):M, then int(M / 2^i):M, in int(log2(M / N)) + 1 stages. ``geometric``: N 2^k : M 2^k, with k falling to 0.
            ``densify``: N : M 2^k. ``custom``: ``stages`` as they are.
        n: N of the target.
        m: M of the target.
        total_epochs: Epochs of the training.
        dense_epochs: Before the first stage.
        fine_tune_epochs: After the last one.
        stages: Number of stages of ``geometric`` and ``densify``; for ``custom`` the patterns (n, m) themselves.

    Returns:
        (start epoch, n, m) by epoch. Where two stages start at one epoch, the later one alone is there.

    Raises:
        ValueError: Numbers that make no schedule.
    """
    room = total_epochs - dense_epochs - fine_tune_epochs
    if room < 0:
        given = f"dense_epochs={dense_epochs} and fine_tune_epochs={fine_tune_epochs} are more than total_epochs={total_epochs}"
        raise ValueError(f"{given}: the stages of SdGf need epochs between them")
    if not 1 <= n <= m:
        raise ValueError(f"SdGf can't end at {n}:{m}: give 1 <= n <= m")
    if kind == "custom":
        if isinstance(stages, int) or not stages:
            raise ValueError("sdgf_custom needs stages, a list of patterns such as ['6:8', '4:8', '2:8']")
        patterns = [(int(a), int(b)) for a, b in stages]
    elif kind == "stepwise":
        patterns = [(m - 1 if i == 0 else int(m / 2**i), m) for i in range(int(math.log2(m / n)) + 1)]
    else:
        if not isinstance(stages, int) or stages < 1:
            raise ValueError(f"stages is {stages!r}: {kind} takes a number of stages, at least 1")
        factors = [2 ** (stages - 1 - i) for i in range(stages)]
        patterns = [(n * factor if kind == "geometric" else n, m * factor) for factor in factors]
    interval = room / len(patterns)
    starts = {dense_epochs + int(i * interval): pattern for i, pattern in enumerate(patterns)}
    return [(start, *pattern) for start, pattern in sorted(starts.items())]


@dataclass(frozen=True)
class Phase:
    """How the forward pass treats a weight at one moment.

    Attributes:
        name: ``dense``: as it is; ``sparse``: by the recipe; ``fine_tune``: the target mask.
        beta: Factor of pruned weights.
        n: Kept per group.
        m: Size of a group.
    """

    name: Literal["dense", "sparse", "fine_tune"]
    beta: float
    n: int
    m: int


def phase_at(
    epoch: int,
    step: int,
    recipe: Recipe,
    n: int,
    m: int,
    *,
    decay: float = 0.0,
    total_epochs: float = math.inf,
    dense_epochs: int = 0,
    fine_tune_epochs: int = 0,
    stages: int | Sequence[tuple[int, int]] = 4,
) -> Phase:
    """Phase, beta and pattern as a pure function of epoch and step.

    Args:
        epoch: e, counted from 0.
        step: t - t0, optimiser steps since the first one of the first sparse epoch; negative before.
        recipe: How weights get sparse, as :class:`~lit_methods.callbacks.NMSparsity` lists it.
        n: N of the target.
        m: M of the target.
        decay: c of MdGf.
        total_epochs: E; SdGf and fine-tuning need it.
        dense_epochs: E_d; dense while e < E_d.
        fine_tune_epochs: E_f; fine-tuning from e >= E - E_f on. The released code has e > E - E_f, one epoch later.
        stages: Number of stages, or the patterns themselves, as in :func:`sdgf_schedule`.

    Raises:
        ValueError: SdGf without an end.
    """
    if recipe == "dense" or epoch < dense_epochs or step < 0:
        return Phase("dense", 1.0, n, m)
    if fine_tune_epochs > 0 and epoch >= total_epochs - fine_tune_epochs:
        return Phase("fine_tune", 0.0, n, m)
    if recipe == "one_shot":
        return Phase("dense", 1.0, n, m)
    if recipe.startswith("sdgf_"):
        if not math.isfinite(total_epochs):
            raise ValueError(f"{recipe} divides the epochs among its stages, but this training has no last epoch: give total_epochs")
        kind: Any = recipe.removeprefix("sdgf_")
        schedule = sdgf_schedule(kind, n, m, int(total_epochs), dense_epochs, fine_tune_epochs, stages)
        _, n, m = [stage for stage in schedule if stage[0] <= epoch][-1]
    return Phase("sparse", flow_factor(recipe, step, decay), n, m)


def parse_pattern(pattern: str) -> tuple[int, int]:
    """``"1:32"`` -> (1, 32).

    Raises:
        ValueError: No pattern.
    """
    n, _, m = str(pattern).partition(":")
    if not (n.strip().isdigit() and m.strip().isdigit()):
        raise ValueError(f"{pattern!r} is no N:M pattern: write '1:32' (in YAML with the quotes)")
    return int(n), int(m)


def to_semi_structured(module: nn.Module) -> list[str]:
    """Turn 2:4 weights of linear layers into torch's semi-structured tensors, in place, for faster inference on NVIDIA GPUs.

    Args:
        module: A trained module, after fit, on a GPU of compute capability 8.0 or more, in float16 or bfloat16.

    Returns:
        Names of the converted layers: ``nn.Linear`` whose groups of four inputs have at most two weights that aren't 0. Others stay.

    Raises:
        RuntimeError: The weights aren't on such a GPU.
        ValueError: No layer is 2:4, or a weight has another dtype.
    """
    found = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear) and is_nm(layer.weight, 2, 4)}
    if not found:
        raise ValueError(f"{type(module).__name__} has no linear layer with a 2:4 weight: train it with NMSparsity(n=2, m=4) first")
    for name, layer in found.items():
        weight = layer.weight
        if weight.device.type != "cuda" or torch.cuda.get_device_capability(weight.device) < (8, 0):
            raise RuntimeError(
                f"{name}.weight is on {weight.device}: semi-structured tensors need an NVIDIA GPU of compute capability 8.0 or more; "
                "move the module there with .cuda().half(). On a CPU the weights stay dense tensors with zeros"
            )
        if weight.dtype not in (torch.float16, torch.bfloat16):
            raise ValueError(f"{name}.weight is {weight.dtype}, expected torch.float16 or torch.bfloat16: call .half() first")
    for layer in found.values():
        layer.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(layer.weight.detach()), requires_grad=False)
    return list(found)


# not phase_at: the bare name belongs to no technique alone
__all__ = ["decay_pruned", "flow_factor", "parse_pattern", "sdgf_schedule", "sparse_mask", "to_semi_structured"]
