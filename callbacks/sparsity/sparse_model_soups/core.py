"""Maths of Sparse Model Soups: magnitude pruning in phases, retraining schedules, averages of models that share a mask, their diversity.

Paper: "Sparse Model Soups: A Recipe for Improved Pruning via Model Averaging" (arXiv:2306.16788). Golden vectors come from
ZIB-IOL/SMS@d04d002: strategies/strategies.py (pruning in phases), strategies/ensembleStrategies.py (uniform and greedy averages),
utilities/utilities.py (diversity), runners/baseRunner.py (retraining schedules). Left out: the released code's wiggle of the cosine
schedule, which comes from a recursive scheduler.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_methods import checks
from lit_methods.callbacks.sparsity.masks import keep_largest

Selector = Literal["global", "uniform", "random"]
Schedule = Literal["FT", "LRW", "SLR", "CLR", "LLR", "ALLR"]

# ---- pruning in phases -----------------------------------------------------------------------------------------------------------------


def phase_fraction(sparsity: float, phases: int) -> float:
    """Share of the remaining weights that each phase removes: f = 1 - (1 - s)^(1/P).

    Args:
        sparsity: Share s of all weights that is gone after the last phase, in [0, 1).
        phases: P >= 1.
    """
    checks.within("[0, 1)", "a share", sparsity=sparsity)
    checks.at_least(1, "phases", phases=phases)
    return float(1.0 - (1.0 - sparsity) ** (1.0 / phases))


def nominal_sparsity(sparsity: float, phases: int) -> list[float]:
    """Share of the weights that is gone after each of the ``phases``: 1 - (1 - f)^p, before counts are rounded."""
    fraction = phase_fraction(sparsity, phases)
    return [1.0 - (1.0 - fraction) ** phase for phase in range(1, phases + 1)]


@torch.no_grad()
def pruned_masks(
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    fraction: float,
    selector: Selector = "global",
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """The masks without the smallest of the remaining weights: masks only shrink.

    Args:
        weights: Name -> floating-point tensor, any shape.
        masks: Name -> bool, the weight's shape; False: gone already.
        fraction: Share of the remaining entries that goes, in [0, 1]: round(fraction * remaining) of them.
        selector: ``global``: the smallest magnitudes of all weights together; ``uniform``: the same share of each weight; ``random``: any
            of all weights together. Of equal magnitudes the later ones go.
        generator: CPU generator for ``random``.

    Returns:
        Name -> bool.
    """
    checks.share(fraction=fraction)
    if not weights:
        return {}
    if selector == "uniform":
        return {name: _shrunk(weight.abs(), masks[name], fraction) for name, weight in weights.items()}
    if selector == "random":
        scores = [torch.rand(weight.shape, generator=generator).to(weight.device) for weight in weights.values()]
    else:
        scores = [weight.abs().to(torch.promote_types(weight.dtype, torch.float32)) for weight in weights.values()]
    joint = _shrunk(torch.cat([score.flatten() for score in scores]), torch.cat([masks[name].flatten() for name in weights]), fraction)
    parts = joint.split([weight.numel() for weight in weights.values()])
    return {name: part.view(weight.shape) for (name, weight), part in zip(weights.items(), parts, strict=True)}


def _shrunk(score: Tensor, mask: Tensor, fraction: float) -> Tensor:
    remaining = int(mask.sum())
    gone = torch.full_like(score, -torch.inf)
    return keep_largest(torch.where(mask, score, gone), remaining - round(fraction * remaining)) & mask


@torch.no_grad()
def relative_norm_drop(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> Tensor:
    """||w - w * M|| / ||w|| over all weights together, a scalar in [0, 1]; 0 where all weights are 0.

    Args:
        weights: Name -> tensor, before pruning.
        masks: Name -> bool, what stays.
    """
    whole = nn.utils.get_total_norm(list(weights.values()))
    lost = nn.utils.get_total_norm([torch.where(masks[name], torch.zeros_like(weight), weight) for name, weight in weights.items()])
    return torch.where(whole > 0, lost / whole, torch.zeros_like(whole))


# ---- learning rates of the retraining --------------------------------------------------------------------------------------------------


def retrain_rates(
    history: Tensor,
    steps: int,
    schedule: Schedule = "LLR",
    *,
    original_warmup: int = 0,
    norm_drop: float = 0.0,
    fraction: float = 1.0,
    peak: float | None = None,
    warmup_share: float = 0.1,
) -> Tensor:
    """Learning rate of each step of a retraining.

    ``FT``: the smallest rate of the original training. ``LRW``: its last ``steps`` rates again. The others rise along half a cosine from 0
    to their peak over w = int(``warmup_share`` * ``steps``) steps, and then fall over the r = ``steps`` - w others, j = 0, 1, ... of them:

    - ``SLR``: the whole history, compressed: h[int(j * len(h) / r)], its own warm-up replaced by its largest rate
    - ``CLR``: half a cosine from the largest rate to the smallest one
    - ``LLR``: a line, peak * (1 - j / r)
    - ``ALLR``: the same from a peak that grows with what pruning has destroyed: largest rate * norm_drop / sqrt(fraction), at least the
      largest rate * min(steps / len(h), 1), at most the largest rate

    Args:
        history: (S,) learning rate of each step of the original training, S >= 1.
        steps: n >= 1.
        schedule: See above.
        original_warmup: First steps of the history that were a warm-up, < S.
        norm_drop: Relative drop of the weights' norm by pruning, for ``ALLR``.
        fraction: Share of the remaining weights that was pruned, in (0, 1], for ``ALLR``.
        peak: In place of the largest rate, for all but ``FT`` and ``LRW``.
        warmup_share: Share of the steps that is the warm-up, in [0, 1).

    Returns:
        (n,) float64.

    Raises:
        ValueError: ``LRW`` is asked for more steps than the history has; a value out of range.
    """
    checks.at_least(1, "steps", steps=steps, history=len(history))
    checks.within("[0, 1)", "a share", warmup_share=warmup_share)
    checks.one_of(Schedule, schedule=schedule)
    history = history.double()
    after = history[original_warmup:]
    largest, smallest = after.max(), after.min()
    if schedule == "FT":
        return smallest.expand(steps).clone()
    if schedule == "LRW":
        if steps > len(history):
            raise ValueError(
                f"LRW replays the last {steps} learning rates of the original training, of which {len(history)} are known: "
                "retrain for less, or choose schedule='LLR'"
            )
        return history[len(history) - steps :].clone()
    if peak is not None:
        largest = torch.as_tensor(peak, dtype=torch.float64)
    warmup = int(warmup_share * steps)
    rest = steps - warmup
    begun = warmup + 1 if warmup else 0  # the released rise takes one step more, so as to reach the peak
    j = torch.arange(steps - begun, dtype=torch.float64)
    if schedule == "ALLR":
        checks.within("(0, 1]", "a share", fraction=fraction)
        least = min(steps / len(history), 1.0) * largest
        largest = (largest * norm_drop / math.sqrt(fraction)).clamp(least, largest)
    if schedule == "SLR":
        compressed = history.clone() if peak is None else history * (largest / after.max())
        compressed[:original_warmup] = largest
        falling = compressed[(j * len(history) / rest).long()]
    elif schedule == "CLR":
        falling = smallest + (largest - smallest) * (1 + torch.cos(math.pi * j / rest)) / 2
    else:
        falling = largest * (1 - j / rest)
    rise = largest * (1 - torch.cos(math.pi * torch.arange(begun, dtype=torch.float64) / max(warmup, 1))) / 2
    return torch.cat([rise, falling])


# ---- soups -----------------------------------------------------------------------------------------------------------------------------


def masked_state(state: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict whose weights are 0 where their mask (bool, by the weight's name) is False; what has no mask stays."""
    return {name: torch.where(masks[name], value, torch.zeros_like(value)) if name in masks else value for name, value in state.items()}


@torch.no_grad()
def uniform_soup(states: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of models of one architecture: theta = (1/m) sum_i theta_i.

    Args:
        states: State dicts with the same names and shapes, at least one. They are read one after the other.

    Returns:
        Floating-point entries: the mean, summed in float32 or wider, in their own dtype. Others (counters, masks): those of the first.

    Raises:
        ValueError: No state, or names or shapes differ.
    """
    first: dict[str, Tensor] = {}
    sums: dict[str, Tensor] = {}
    number = 0
    for number, state in enumerate(states, start=1):
        if number == 1:
            first = dict(state)
        check_alike(first, state, f"model {number}")
        for name, value in state.items():
            if value.is_floating_point():
                wide = value.to(torch.promote_types(value.dtype, torch.float32))
                sums[name] = sums[name] + wide if name in sums else wide
    if number == 0:
        raise ValueError("a soup needs at least one model, got none")
    return {name: (sums[name] / number).to(value.dtype) if name in sums else value.clone() for name, value in first.items()}


def check_alike(first: Mapping[str, Tensor], other: Mapping[str, Tensor], what: str = "the other model") -> None:
    """Raise unless two state dicts are of one architecture.

    Raises:
        ValueError: Names, shapes or dtypes differ; the message names ``what`` and the first differences.
    """
    names = sorted(set(first) ^ set(other))
    names += [
        name for name, value in first.items() if name in other and (value.shape, value.dtype) != (other[name].shape, other[name].dtype)
    ]
    if names:
        shown = ", ".join(f"{name} {_shape(other.get(name))} against {_shape(first.get(name))}" for name in names[:3])
        raise ValueError(f"{what} has another architecture than the first: {shown}{', ...' if len(names) > 3 else ''}")


def _shape(value: Tensor | None) -> str:
    return "missing" if value is None else f"{tuple(value.shape)}"


def greedy_selection(scores: Sequence[float], evaluate: Callable[[list[int]], float]) -> tuple[list[int], float]:
    """Which models make the greedy soup: from the best one on, each that doesn't lower the soup's score on held-out data.

    Args:
        scores: Score of each model, the higher the better; equal ones keep their order.
        evaluate: Places of models -> score of their uniform soup.

    Returns:
        Places of the chosen models in the order in which they came, and the score of their soup.
    """
    if not scores:
        raise ValueError("a soup needs at least one model, got none")
    best_first = sorted(range(len(scores)), key=lambda place: -scores[place])
    chosen, best = best_first[:1], scores[best_first[0]]
    for place in best_first[1:]:
        score = evaluate([*chosen, place])
        if score >= best:
            chosen, best = [*chosen, place], score
    return chosen, best


def diversity(vectors: Tensor) -> dict[str, Tensor]:
    """How far models lie apart.

    Args:
        vectors: (m, n) floating point: the masked weights of each model in a row, m >= 1.

    Returns:
        ``max_barycentre_distance``, ``min_barycentre_distance``: L2 distance of the models to their mean. ``max_l2_distance``, ``min_``,
        ``mean_``: of the pairs. ``max_angle_deg``, ``min_``, ``mean_``: angle of the pairs, degrees. Scalars; those of the pairs are 0
        where there is none.
    """
    vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    centre = (vectors - vectors.mean(dim=0)).norm(dim=1)
    one, other = torch.triu_indices(len(vectors), len(vectors), 1, device=vectors.device)
    units = F.normalize(vectors, dim=1)
    angles = torch.rad2deg(torch.acos((units @ units.T)[one, other].clamp(-1.0, 1.0)))
    distances = F.pdist(vectors)
    found = {"max_barycentre_distance": centre.max(), "min_barycentre_distance": centre.min()}
    for name, values in (("l2_distance", distances), ("angle_deg", angles)):
        values = values if len(values) else vectors.new_zeros(1)
        found |= {f"max_{name}": values.max(), f"min_{name}": values.min(), f"mean_{name}": values.mean()}
    return found


def ensemble_probabilities(logits: Tensor) -> Tensor:
    """Prediction ensemble: the mean of the models' softmaxes.

    Args:
        logits: (m, B, C) of m models.

    Returns:
        (B, C) probabilities, float32 or wider.
    """
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=-1).mean(dim=0)


def batch_norms(module: nn.Module) -> list[nn.Module]:
    """The batch norms of a module that keep running statistics."""
    return [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.track_running_stats]


@contextmanager
def recalibrating(module: nn.Module) -> Iterator[None]:
    """Inside, forward passes in training mode measure the running statistics of all batch norms anew, without a gradient.

    They start from nothing, and end as the mean over the batches, each of which counts alike. An averaged model needs this before it is
    used, as its activations aren't the mean of the models' activations.

    Args:
        module: Any module. Its mode is the caller's: ``module.train()``.

    Example:
        >>> network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).train()
        >>> with recalibrating(network):
        ...     _ = network(torch.randn(8, 3))
    """
    norms = batch_norms(module)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()  # type: ignore[operator]
        norm.momentum = None  # type: ignore[assignment]  # PyTorch's word for the mean over all batches
    try:
        with torch.no_grad():
            yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


__all__ = [
    "diversity", "ensemble_probabilities", "greedy_selection", "masked_state", "nominal_sparsity", "phase_fraction", "pruned_masks",
    "recalibrating", "relative_norm_drop", "retrain_rates", "uniform_soup",
]  # fmt: skip
