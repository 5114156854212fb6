"""Schedules of sparse training, pure functions of the optimiser step: a resumed run is where it would have been."""

import math
from typing import Literal


def cubic_sparsity(step: int, start: int, end: int, initial: float, final: float) -> float:
    """Sparsity of gradual magnitude pruning (Zhu and Gupta, arXiv:1710.01878, eq. 1).

    Args:
        step: Optimiser steps so far.
        start: First step at which sparsity grows.
        end: Step from which it stays at ``final``; >= start.
        initial: Sparsity up to ``start``, in [0, 1].
        final: Sparsity from ``end`` on, in [0, 1].
    """
    if step <= start:
        return initial if step < end else final
    return final + (initial - final) * (1 - min(1.0, (step - start) / (end - start))) ** 3


def cosine_drop(step: int, initial: float, begin: int, end: int, floor: float = 0.0) -> float:
    """Drop fraction that falls from ``initial`` at ``begin`` to ``floor`` at ``end`` along half a cosine (RigL; DSL with its floor)."""
    progress = min(1.0, max(0.0, (step - begin) / (end - begin)))
    return floor + (initial - floor) * (1 + math.cos(math.pi * progress)) / 2


def exponential_drop(step: int, initial: float, begin: int, end: int, rate: float) -> float:
    """Drop fraction ``initial * exp(-rate * progress)``, progress from 0 at ``begin`` to 1 at ``end``."""
    return initial * math.exp(-rate * (step - begin) / (end - begin))


def drop_fraction(step: int, anneal: str, initial: float, begin: int, end: int, rate: float = 3.0) -> float:
    """Drop fraction at an update between ``begin`` and ``end``.

    Args:
        step: Optimiser steps so far.
        anneal: ``cosine``: :func:`cosine_drop` to 0; ``exponential``: :func:`exponential_drop`; ``constant``.
        initial: At ``begin``.
        begin: Step from which it falls.
        end: Step of the end; > ``begin``.
        rate: How fast ``exponential`` falls.

    Raises:
        ValueError: An unknown ``anneal``.
    """
    if anneal == "cosine":
        return cosine_drop(step, initial, begin, end)
    if anneal == "exponential":
        return exponential_drop(step, initial, begin, end, rate)
    if anneal == "constant":
        return initial
    raise ValueError(f"anneal is {anneal!r}: give one of cosine, constant, exponential")


def is_update_step(step: int, interval: int, begin: int = 0, end: float = math.inf) -> bool:
    """Whether masks change after optimiser step ``step``, counted from 1: a multiple of ``interval``, strictly between the two."""
    return begin < step < end and step % interval == 0


def drop_schedule(
    total_steps: int,
    interval: int = 100,
    begin: int = 0,
    end_fraction: float = 0.75,
    initial: float = 0.3,
    anneal: Literal["cosine", "constant", "exponential"] = "cosine",
    rate: float = 3.0,
) -> tuple[list[int], list[float]]:
    """All updates of a training: optimiser steps, counted from 1, after which masks change, and the drop fraction of each.

    Args:
        total_steps: Optimiser steps of the training.
        interval: Updates come at its multiples.
        begin: Updates come after this step.
        end_fraction: Updates come before step int(end_fraction * total_steps).
        initial: Drop fraction at ``begin``.
        anneal: ``cosine`` to 0 at the end, ``constant``, or ``exponential``.
        rate: How fast ``exponential`` falls.
    """
    end = int(end_fraction * total_steps)
    steps = [step for step in range(interval, total_steps + 1, interval) if is_update_step(step, interval, begin, end)]
    return steps, [drop_fraction(step, anneal, initial, begin, end, rate) for step in steps]
