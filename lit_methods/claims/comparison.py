"""``lit compare``: one table and the plots of several arms. Pure functions of the summary."""

import math
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from lit_methods.claims.evidence import spread
from lit_methods.claims.verdict import t_interval

Summary = Mapping[str, Any]


def ranked(summary: Summary) -> list[str]:
    """Arms, best mean first."""
    return sorted(summary["values"], key=lambda arm: statistics.fmean(summary["values"][arm]), reverse=summary["higher"])


def comparison_table(summary: Summary) -> str:
    """Markdown: arms, best first, with every seed, mean, std, difference to the reference with its interval, parameters, step seconds."""
    seeds, reference = summary["seeds"], summary["reference"]
    head = [
        "arm",
        *(f"seed {seed}" for seed in seeds),
        "mean",
        "std",
        f"minus {reference}, 95 % t-interval",
        "parameters",
        "steps",
        "s/step",
    ]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for arm in ranked(summary):
        values, budget, cost = summary["values"][arm], summary["budget"][arm][0], summary["cost"].get(arm)
        gap = "-"
        if arm in summary["intervals"]:
            mean, low, high = summary["intervals"][arm]
            gap = f"{mean:+.3g} [{low:+.3g}, {high:+.3g}]"
        cells = [arm, *(f"{value:.4g}" for value in values), f"{statistics.fmean(values):.4g}", spread(values), gap]
        cells += [f"{budget['parameters']:,.0f}", f"{budget['steps']:,.0f}", f"{cost:.3g}" if cost else "-"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers that span ``low`` to ``high``."""
    span = (high - low) or abs(high) or 1.0
    rough = span / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.floor(low / step)
    return [round((first + index) * step, 12) for index in range(max(math.ceil(high / step) - first, 1) + 1)]


_STYLE = """
  svg { font: 13px system-ui, sans-serif; background: #fff }
  text { fill: #222 } .grid { stroke: #ddd } .range { stroke: #1b62a5; stroke-width: 2 } .mean { fill: #1b62a5 }
  .seed { fill: none; stroke: #b34700; stroke-width: 1.5 }
  @media (prefers-color-scheme: dark) {
    svg { background: #14181d } text { fill: #e6e6e6 } .grid { stroke: #3a4048 }
    .range { stroke: #7db8ec } .mean { fill: #7db8ec } .seed { stroke: #ffa566 }
  }
"""


def comparison_plot(summary: Summary) -> str:
    """An SVG: one row an arm, best first; circles are seeds, the diamond their mean, the line its 95 % t-interval.

    It follows the reader's light or dark colours, and says in words what it shows.
    """
    arms, values = ranked(summary), summary["values"]
    ranges = {arm: t_interval(values[arm]) if len(values[arm]) > 1 else (values[arm][0],) * 3 for arm in arms}
    marks = ticks(min(min(ranges[arm][1], *values[arm]) for arm in arms), max(max(ranges[arm][2], *values[arm]) for arm in arms))
    left, width, row, top = 24 + 8 * max(map(len, arms)), 720, 40, 44
    bottom = top + row * len(arms)

    def x(value: float) -> float:
        return left + (value - marks[0]) / (marks[-1] - marks[0]) * (width - left - 30)

    parts = []
    for mark in marks:
        parts.append(f'<line class="grid" x1="{x(mark):.1f}" x2="{x(mark):.1f}" y1="{top}" y2="{bottom}"/>')
        parts.append(f'<text x="{x(mark):.1f}" y="{bottom + 18}" text-anchor="middle">{mark:g}</text>')
    for index, arm in enumerate(arms):
        y, (mean, low, high) = top + row * (index + 0.5), ranges[arm]
        parts.append(f'<text x="{left - 12}" y="{y + 4:.1f}" text-anchor="end">{escape(arm)}</text>')
        parts.append(f'<line class="range" x1="{x(low):.1f}" x2="{x(high):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<path class="mean" d="M{x(mean):.1f} {y - 6:.1f}l6 6l-6 6l-6 -6z"/>')
        parts += [f'<circle class="seed" cx="{x(value):.1f}" cy="{y:.1f}" r="4.5"/>' for value in values[arm]]
    better = "higher" if summary["higher"] else "lower"
    words = "; ".join(f"{arm}: mean {ranges[arm][0]:.4g}, interval {ranges[arm][1]:.4g} to {ranges[arm][2]:.4g}" for arm in arms)
    count = len(summary["seeds"])
    legend = f"circles: {count} seed{'' if count == 1 else 's'}, diamond: mean, line: its 95 % t-interval; {better} is better"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {bottom + 48}" role="img" aria-labelledby="title desc">\n'
        f'<title id="title">{escape(summary["sentence"])}</title>\n<desc id="desc">{escape(summary["metric"])}. {escape(words)}</desc>\n'
        f'<style>{_STYLE}</style>\n<text x="12" y="24" font-weight="600">{escape(summary["metric"])}</text>\n'
        + "\n".join(parts)
        + f'\n<text x="12" y="{bottom + 40}">{escape(legend)}</text>\n</svg>\n'
    )


_FRONTIER_STYLE = """
  svg { font: 13px system-ui, sans-serif; background: #fff }
  text { fill: #222 } .grid { stroke: #ddd } .leader { stroke: #999; fill: none } .seed { fill: #1b62a5; fill-opacity: .45 }
  .mean { fill: #1b62a5; stroke: #fff } .front { stroke: #b34700; stroke-width: 2; stroke-dasharray: 6 4; fill: none }
  @media (prefers-color-scheme: dark) {
    svg { background: #14181d } text { fill: #e6e6e6 } .grid { stroke: #3a4048 } .leader { stroke: #777 } .seed { fill: #7db8ec }
    .mean { fill: #7db8ec; stroke: #14181d } .front { stroke: #ffa566 }
  }
"""


def frontier(points: Mapping[str, tuple[float, float]], higher: bool) -> list[str]:
    """Names of the points that no other beats in both, from small to large cost.

    Args:
        points: Name -> (cost, value); a smaller cost is better.
        higher: Whether a larger value is better, too.
    """
    best, names = -math.inf, []
    for name in sorted(points, key=lambda name: (points[name][0], -points[name][1] if higher else points[name][1])):
        value = points[name][1] if higher else -points[name][1]
        if value > best:
            best = value
            names.append(name)
    return names


def frontier_plot(summary: Summary) -> str:
    """An SVG: the metric over what it costs (``summary["over"]``, a reported metric), a diamond for the mean of each arm's seeds.

    The dashed line joins the arms that no other beats in both. The cost's axis is logarithmic where the largest is over ten times the
    smallest. It follows the reader's light or dark colours, and says in words what it shows.
    """
    costs = {report["arm"]: report["values"] for report in summary["reports"] if report["metric"] == summary["over"]}
    seeds = {arm: list(zip(costs[arm], values, strict=True)) for arm, values in summary["values"].items()}
    means = {arm: (statistics.fmean(costs[arm]), statistics.fmean(values)) for arm, values in summary["values"].items()}
    every = [point for arm in seeds for point in (*seeds[arm], means[arm])]
    low, high = min(cost for cost, _ in every), max(cost for cost, _ in every)
    logarithmic = low > 0 and high > 10 * low
    if logarithmic:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        across: list[float] = [10.0**power for power in powers]
    else:
        across = ticks(low, high)
    up = ticks(min(0.0, *(value for _, value in every)), max(value for _, value in every))
    names = {arm: f"{arm}: {value:.3g} at {cost:.3g}" for arm, (cost, value) in means.items()}
    left, right, top, bottom = 80, 500, 44, 400
    width, height = right + 40 + 7 * max(map(len, names.values())), bottom + 76

    def x(cost: float) -> float:
        first, last, at = (math.log10(value) if logarithmic else value for value in (across[0], across[-1], cost))
        return left + (at - first) / (last - first) * (right - left)

    def y(value: float) -> float:
        return bottom - (value - up[0]) / (up[-1] - up[0]) * (bottom - top)

    parts = []
    for mark in across:
        parts.append(f'<line class="grid" x1="{x(mark):.1f}" x2="{x(mark):.1f}" y1="{top}" y2="{bottom}"/>')
        parts.append(f'<text x="{x(mark):.1f}" y="{bottom + 18}" text-anchor="middle">{mark:g}</text>')
    for mark in up:
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y(mark):.1f}" y2="{y(mark):.1f}"/>')
        parts.append(f'<text x="{left - 8}" y="{y(mark) + 4:.1f}" text-anchor="end">{mark:g}</text>')
    on_line = frontier(means, summary["higher"])
    parts.append(f'<polyline class="front" points="{" ".join(f"{x(means[arm][0]):.1f},{y(means[arm][1]):.1f}" for arm in on_line)}"/>')
    by_height = sorted(means, key=lambda arm: y(means[arm][1]))
    heights: list[float] = []  # of the names, which must not lie on each other
    for arm in by_height:
        heights.append(max(y(means[arm][1]), heights[-1] + 18 if heights else top))
    over = max(0.0, heights[-1] - bottom)
    heights = [place - over if over else place for place in heights]
    for row in reversed(range(len(heights) - 1)):
        heights[row] = min(heights[row], heights[row + 1] - 18)
    for arm, place in zip(by_height, heights, strict=True):
        cx, cy = x(means[arm][0]), y(means[arm][1])
        parts.append(f'<path class="leader" d="M{cx:.1f} {cy:.1f}L{right + 12} {place:.1f}h10"/>')
        parts.append(f'<text x="{right + 28}" y="{place + 4:.1f}">{escape(names[arm])}</text>')
    for arm in by_height:
        if len(seeds[arm]) > 1:
            parts += [f'<circle class="seed" cx="{x(cost):.1f}" cy="{y(value):.1f}" r="4"/>' for cost, value in seeds[arm]]
        parts.append(f'<path class="mean" d="M{x(means[arm][0]):.1f} {y(means[arm][1]) - 7:.1f}l7 7l-7 7l-7 -7z"/>')
    better, count = "higher" if summary["higher"] else "lower", len(summary["seeds"])
    legend = f"diamond: an arm, mean of {count} seeds (circles)" if count > 1 else "diamond: an arm, one seed"
    said = f"{legend}; dashed: no other arm beats these in both. {better.capitalize()} and further left is better"
    title = f"{summary['metric']} over {summary['over']}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-labelledby="title desc">\n'
        f'<title id="title">{escape(title)}</title>\n<desc id="desc">{escape("; ".join(names[arm] for arm in by_height))}</desc>\n'
        f'<style>{_FRONTIER_STYLE}</style>\n<text x="12" y="24" font-weight="600">{escape(title)}</text>\n'
        + "\n".join(parts)
        + f'\n<text x="{(left + right) / 2:.0f}" y="{bottom + 38}" text-anchor="middle">{escape(summary["over"])}</text>'
        + f'\n<text transform="translate(18 {(top + bottom) / 2:.0f}) rotate(-90)" text-anchor="middle">{escape(summary["metric"])}</text>'
        + f'\n<text x="12" y="{bottom + 64}">{escape(said)}</text>\n</svg>\n'
    )


def step_seconds(rounds: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, float]:
    """Arm -> median seconds of a training step over all rounds."""
    seen = {arm: [value for one in costs for value in one["seconds"]] for arm, costs in rounds.items()}
    return {arm: statistics.median(values) for arm, values in seen.items() if values}
