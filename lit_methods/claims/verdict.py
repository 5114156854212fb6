"""From paired values, one pair a seed, to an interval and a verdict. Pure functions of lists of numbers."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

LEAST_SEEDS = 3


@dataclass(frozen=True)
class Verdict:
    """Paired comparison of two arms.

    Attributes:
        mean: Mean difference, method - baseline, in the metric's unit.
        low: Lower end of the 95 % t-interval of the mean.
        high: Upper end of that interval.
        better: Seeds in which the method is better.
        verdict: ``holds``, ``does not hold`` or ``undecided``.
    """

    mean: float
    low: float
    high: float
    better: int
    verdict: str


def t_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean of ``values`` and the ends of its 95 % interval after Student's t (n - 1 degrees of freedom).

    Values that are all equal have an interval of width 0.

    Raises:
        ValueError: Fewer than two values, or one that isn't finite.
    """
    if len(values) < 2 or not all(map(math.isfinite, values)):
        raise ValueError(f"an interval needs at least 2 finite values, got {list(values)}")
    from scipy import stats

    mean = statistics.fmean(values)
    half = float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return mean, mean - half, mean + half


@dataclass(frozen=True)
class Welch:
    """Two arms that share no pairs.

    Attributes:
        mean: Difference of the means, first - second.
        error: Its standard error.
        t: Welch's t, their quotient; 0 where both are 0.
        df: Degrees of freedom after Welch and Satterthwaite; inf where neither arm varies.
    """

    mean: float
    error: float
    t: float
    df: float

    @property
    def p(self) -> float:
        """Two-sided probability of a |t| so large without a difference."""
        from scipy import stats

        return float(2 * stats.t.sf(abs(self.t), self.df))


def welch(first: Sequence[float], second: Sequence[float]) -> Welch:
    """Welch's test of two arms whose seeds have nothing to do with each other, with unbiased variances.

    Args:
        first: Values of one arm, two or more.
        second: Values of the other, two or more.

    Raises:
        ValueError: Fewer, or one that isn't finite.
    """
    if min(len(first), len(second)) < 2 or not all(map(math.isfinite, [*first, *second])):
        raise ValueError(f"Welch's test needs at least 2 finite values of both arms, got {list(first)} and {list(second)}")
    mean = statistics.fmean(first) - statistics.fmean(second)
    parts = [statistics.variance(values) / len(values) for values in (first, second)]
    error = sum(parts) ** 0.5
    if not error:
        return Welch(mean, 0.0, math.copysign(math.inf, mean) if mean else 0.0, math.inf)
    df = sum(parts) ** 2 / sum(part**2 / (len(values) - 1) for part, values in zip(parts, (first, second), strict=True))
    return Welch(mean, error, mean / error, df)


def judge(method: Sequence[float], baseline: Sequence[float], higher: bool = True, gate: float = 0.0, margin: float = 0.0) -> Verdict:
    """Decide a claim from paired values, one pair a seed.

    Args:
        method: Values of the method.
        baseline: Values of the baseline, same seeds.
        higher: Whether larger is better.
        gate: The advantage must be at least this in every seed.
        margin: So much worse still counts as no worse (a test of non-inferiority); 0: the method must be better.

    Returns:
        ``holds`` if the interval lies on the better side of zero, or of minus the margin, and the gate is met; ``does not hold`` if it
        lies on the other side, or the advantage misses the gate although it is certain; else ``undecided``.

    Raises:
        ValueError: Fewer than three pairs, or a value that isn't finite.
    """
    if len(method) != len(baseline) or len(method) < LEAST_SEEDS:
        raise ValueError(f"a verdict needs at least {LEAST_SEEDS} seeds of both arms, got {len(method)} and {len(baseline)}")
    sign = 1 if higher else -1
    gains = [sign * (a - b) for a, b in zip(method, baseline, strict=True)]
    mean, least, most = t_interval(gains)
    verdict = "undecided"
    if least > -margin or most < -margin:
        verdict = "holds" if least > -margin and min(gains) >= gate else "does not hold"
    low, high = sorted((sign * least, sign * most))
    return Verdict(sign * mean, low, high, sum(gain > 0 for gain in gains), verdict)


def overall(verdicts: Sequence[str]) -> str:
    """The verdict over all settings of a claim that were run.

    Args:
        verdicts: That of each setting: ``holds``, ``does not hold`` or ``undecided``; at least one.

    Returns:
        Of a single setting its own verdict. Else ``holds everywhere`` if every setting holds, ``holds in n of m`` if n of m do, with n at
        least 1, ``does not hold`` if none holds and at least one does not, and ``undecided`` if all are undecided.
    """
    if len(verdicts) == 1:
        return verdicts[0]
    holding = sum(verdict == "holds" for verdict in verdicts)
    if holding:
        return "holds everywhere" if holding == len(verdicts) else f"holds in {holding} of {len(verdicts)}"
    return "does not hold" if "does not hold" in verdicts else "undecided"
