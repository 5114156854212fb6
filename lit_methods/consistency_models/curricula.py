"""Number of noise levels over training, their distance in a pair, and the rate of CT's teacher, as pure functions of the optimiser step."""

import math
from typing import Literal

import torch
from torch import Tensor


def check_intervals(s0: int, s1: int) -> None:
    """Raise ValueError unless 1 <= s0 <= s1."""
    if not 1 <= s0 <= s1:
        raise ValueError(f"s0={s0} and s1={s1} are the numbers of intervals at start and end: give 1 <= s0 <= s1")


def doubling_stage_length(total_steps: int, s0: int, s1: int, rounding: Literal["floor", "ceil"] = "floor") -> int:
    """K': optimiser steps of a stage of :func:`doubling_levels`.

    Args:
        total_steps: K >= 1.
        s0: Intervals at the start, >= 1.
        s1: Intervals at the end, >= s0.
        rounding: ``floor``: floor(K / (log2(floor(s1 / s0)) + 1)), iCT. ``ceil``: ceil(K / log2(ceil(s1 / s0) + 1)), EPG's code.

    Returns:
        At least 1.
    """
    if rounding == "floor":
        return max(1, math.floor(total_steps / (math.log2(s1 // s0) + 1)))
    return max(1, math.ceil(total_steps / math.log2(math.ceil(s1 / s0) + 1)))


def doubling_levels(step: int, total_steps: int, s0: int = 10, s1: int = 1280, rounding: Literal["floor", "ceil"] = "floor") -> int:
    """N(k) = min(s0 2^floor(k / K'), s1) + 1: the curriculum of iCT (arXiv:2310.14189, Table 1).

    Args:
        step: k, optimiser steps done.
        total_steps: K, of the whole training.
        s0: Intervals at the start.
        s1: Intervals at the end.
        rounding: ``ceil``: EPG's variant, whose first doubling comes at k = 1; see :func:`doubling_stage_length`.

    Returns:
        Levels, one more than intervals.
    """
    length = doubling_stage_length(total_steps, s0, s1, rounding)
    stage = step // length if rounding == "floor" else -(-step // length)
    return min(s0 * 2 ** min(stage, 64), s1) + 1


def square_root_levels(step: int, total_steps: int, s0: int = 2, s1: int = 150) -> int:
    """N(k) = max(ceil(sqrt(k / K ((s1 + 1)^2 - s0^2) + s0^2) - 1), 1) + 1: the curriculum of CT (arXiv:2303.01469, Appendix C).

    Arguments as in :func:`doubling_levels`.
    """
    return max(math.ceil(math.sqrt(step / total_steps * ((s1 + 1) ** 2 - s0**2) + s0**2) - 1), 1) + 1


def ct_teacher_decay(levels: int, s0: int = 2, initial: float = 0.9) -> float:
    """Decay mu = exp(s0 ln(mu0) / N'): how much of itself CT's teacher keeps at a step.

    Args:
        levels: N(k). The paper divides by N, the released code by N' = N - 1, which golden vectors ask for.
        s0: Intervals at the start.
        initial: mu0 in (0, 1).
    """
    return math.exp(s0 * math.log(initial) / (levels - 1))


def ect_stage(step: int, delta: int = 1, first: int = 100_000, length: int = 100_000) -> int:
    """Stage of ECT's curriculum (arXiv:2406.14548) in EPG's form: ``delta`` at first, and one more whenever ``length`` steps are over.

    Args:
        step: Optimiser steps done.
        delta: Stage at the start; 0: a phase of denoising, see :func:`ect_lower`.
        first: d0, steps of the first stage, >= 0.
        length: d1, steps of every further one, >= 1.
    """
    return delta if step < first else (step - (first - length)) // length + delta


def ect_lower(upper: Tensor, stage: int, q: float = 2.0, k: float = 8.0, b: float = 1.0, sigma_min: float = 0.002) -> Tensor:
    """Lower level r = max(t (1 - q^-stage (1 + k sigmoid(-b t))), sigma_min) of a pair (ECT, arXiv:2406.14548).

    Args:
        upper: t, any shape, in any float dtype: give float32 or wider.
        stage: What :func:`ect_stage` gives. At 0 all are ``sigma_min``.
        q: > 1: how much nearer the levels come with each stage.
        k: How much wider pairs are where t is small.
        b: How fast that fades with t.
        sigma_min: Smallest level.

    Returns:
        Like ``upper``, at most as large as it where it is at least ``sigma_min``.
    """
    share = float(q) ** -stage * (1 + k * torch.sigmoid(-b * upper))
    return (upper * (1 - share)).clamp(min=sigma_min)
