"""How much of each layer stays: layer-wise densities as pure functions of the weights' shapes.

Sources: ER (SET, Mocanu et al. 2018), ERK (RigL, Evci et al. 2020) and the plus variants as in the released code of "The Unreasonable
Effectiveness of Random Pruning" (arXiv:2202.02643; VITA-Group/Random_Pruning@871077f, CIFAR/sparselearning/core.py and ImageNet/core.py),
against which golden vectors test them; ERK also against Shiweiliuiiiiiii/In-Time-Over-Parameterization@1b6a89e.
"""

import math
from collections.abc import Sequence
from typing import Literal

from lit_methods import checks

Method = Literal["uniform", "uniform_plus", "er", "erk", "erk_plus"]


def layer_density(
    shapes: Sequence[Sequence[int]],
    density: float,
    method: Method = "erk",
    *,
    power: float = 1.0,
    first: int | None = None,
    last: int | None = None,
    last_density: float | None = None,
    exact_budget: bool = True,
    names: Sequence[str] | None = None,
) -> list[float]:
    """Density of each layer, so that ``density`` of all weights stay.

    Args:
        shapes: Weight shapes, output dimension first, kernel dimensions last.
        density: Share of all weights that stays, in (0, 1].
        method: ``uniform``; ``er`` and ``erk``: proportional to (sum of dimensions) / (product of dimensions), ``er`` without the kernel's;
            ``uniform_plus``: first layer dense, last one at least ``last_density``; ``erk_plus``: the last layer at ``last_density``,
            ERK on the rest.
        power: Exponent of the ER and ERK ratio.
        first: Index of the first layer, for ``uniform_plus``; None: 0.
        last: Index of the classifier, for the plus variants; None: the last one.
        last_density: Density of the classifier: ``uniform_plus`` at least that (default 0.2), ``erk_plus`` exactly that (default 1).
        exact_budget: ``uniform_plus`` meets the budget; False: as in the released code, which misses it a little (see the source).
        names: Names of the layers, for messages.

    Returns:
        One float in (0, 1] per layer. Layers that would exceed 1 become dense and the rest takes over their share; sum(density_l * N_l)
        is then ``density`` * N to rounding, as far as the fixed layers leave room.

    Raises:
        ValueError: An unknown method, an argument out of range, or a density at which a layer would keep less than one weight, so that the
            network were cut; the message has the layer and the smallest density that works.
    """
    checks.within("(0, 1]", "a share", density=density, last_density=last_density)
    checks.at_least(0, power=power)
    checks.one_of(Method, method=method)
    sizes = [math.prod(shape) for shape in shapes]
    last = len(sizes) - 1 if last is None else last % len(sizes)
    first = 0 if first is None else first % len(sizes)
    floor = 0.2 if last_density is None else last_density

    def wanted(density: float) -> list[float]:
        """Density of each layer, 0 or less where the fixed layers leave nothing."""
        total = sum(sizes)
        if method == "uniform":
            return [density] * len(sizes)
        if method in ("er", "erk"):
            return proportional_densities(shapes, density, method, power)[0]
        fixed = {last: max(density, floor), first: 1.0}
        if method == "erk_plus":
            fixed = {last: 1.0 if last_density is None else last_density}
        rest = [index for index in range(len(sizes)) if index not in fixed]
        budget = density * total - sum(share * sizes[index] for index, share in fixed.items())
        if method == "erk_plus":
            ratios = _ratios([shapes[index] for index in rest], "erk", power)
            shares = _proportional([sizes[index] for index in rest], ratios, budget)[0]
        elif exact_budget:
            shares = [min(1.0, budget / max(1, sum(sizes[index] for index in rest)))] * len(rest)
        else:  # as released: a share of all weights, not of the rest
            shares = [budget / total if density < floor else density] * len(rest)
        found = fixed | dict(zip(rest, shares, strict=True))
        return [found[index] for index in range(len(sizes))]

    def starved(density: float) -> list[int]:
        return [index for index, share in enumerate(wanted(density)) if share * sizes[index] < 1 - 1e-9]

    if empty := starved(density):
        low, high = density, 1.0
        for _ in range(50):  # a larger budget takes weights from no layer
            middle = (low + high) / 2
            low, high = (middle, high) if starved(middle) else (low, middle)
        way = "no density does: change last_density" if starved(1.0) else f"give at least {math.ceil(high * 1e6) / 1e6:.6g}"
        layer = f"layer {empty[0]}" if names is None else names[empty[0]]
        raise ValueError(f"density {density} leaves {layer} of shape {tuple(shapes[empty[0]])} no weight by {method}: {way}")
    return wanted(density)


def _ratios(shapes: Sequence[Sequence[int]], method: str, power: float) -> list[float]:
    used = [shape[:2] if method == "er" else shape for shape in shapes]
    return [(sum(shape) / math.prod(shape)) ** power for shape in used]


def proportional_densities(
    shapes: Sequence[Sequence[int]], density: float, method: Literal["er", "erk"] = "erk", power: float = 1.0
) -> tuple[list[float], list[bool]]:
    """ER and ERK: density of each layer, and which layers became dense because their share would exceed 1.

    At ``density`` 1 the last layer's share is 1 and doesn't exceed it. Arguments as in :func:`layer_density`.
    """
    sizes = [math.prod(shape) for shape in shapes]
    shares, dense = _proportional(sizes, _ratios(shapes, method, power), density * sum(sizes))
    return shares, [index in dense for index in range(len(sizes))]


def _proportional(sizes: Sequence[int], ratios: Sequence[float], budget: float) -> tuple[list[float], set[int]]:
    """Densities eps * ratio that spend ``budget`` weights, and the layers above 1 that became dense, those tied at the maximum together."""
    dense: set[int] = set()
    while len(dense) < len(sizes):
        free = [index for index in range(len(sizes)) if index not in dense]
        # sum over free of eps * ratio * N = budget - sum over dense of N
        eps = (budget - sum(sizes[index] for index in dense)) / sum(ratios[index] * sizes[index] for index in free)
        largest = max(ratios[index] for index in free)
        if largest * eps <= 1 + 1e-12:  # not 1: near density 1 the last layer's is 1 up to rounding
            break
        dense.update(index for index in free if ratios[index] == largest)
    return [1.0 if index in dense else min(1.0, eps * ratios[index]) for index in range(len(sizes))], dense


def expected_nonzeros(sizes: Sequence[int], densities: Sequence[float]) -> list[float]:
    """Kept weights per layer, before rounding."""
    return [size * density for size, density in zip(sizes, densities, strict=True)]


def exact_counts(sizes: Sequence[int], densities: Sequence[float]) -> list[int]:
    """Kept weights per layer, whole numbers: each at its density, rounded so that the total is the rounded total (largest remainders).

    Args:
        sizes: Weights per layer.
        densities: Densities per layer, in [0, 1].
    """
    wanted = expected_nonzeros(sizes, densities)
    counts = [math.floor(value + 1e-9) for value in wanted]
    missing = round(sum(wanted)) - sum(counts)
    by_remainder = sorted(range(len(sizes)), key=lambda index: counts[index] - wanted[index])
    for index in [index for index in by_remainder if counts[index] < sizes[index]][: max(0, missing)]:
        counts[index] += 1
    return counts
