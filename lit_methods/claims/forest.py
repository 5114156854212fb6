"""The forest plot of the evidence page: difference and interval of every technique in every setting, as pure functions."""

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, LEFT, RIGHT, ROW, TOP = 420, 150, 406, 20, 62  # a phone shows it nearly at its full size
ZERO = (LEFT + RIGHT) / 2
HALF = (RIGHT - LEFT) / 2 - 10

_STYLE = """
  svg { font: 12px system-ui, sans-serif; background: #fff }
  text { fill: #222 } .slug { font-weight: 600 } .grid { stroke: #bbb } .axis { stroke: #555 }
  .holds { stroke: #1b62a5; fill: #1b62a5 } .undecided { stroke: #6b6b6b; fill: #fff } .against { stroke: #b34700; fill: #b34700 }
  line.undecided { stroke-dasharray: 4 3 } line, path, circle, rect { stroke-width: 1.6 } .grid { stroke-width: .5 }
  @media (prefers-color-scheme: dark) {
    svg { background: #14181d } text { fill: #e6e6e6 } .grid { stroke: #4a515a } .axis { stroke: #aaa }
    .holds { stroke: #7db8ec; fill: #7db8ec } .undecided { stroke: #b5b5b5; fill: #14181d } .against { stroke: #ffa566; fill: #ffa566 }
  }
"""
_CLASSES = {"holds": "holds", "undecided": "undecided", "does not hold": "against"}


class Row(NamedTuple):
    """One setting: its technique, its name, and the advantage of the method (larger is better) with its interval and verdict."""

    slug: str
    setting: str
    mean: float
    low: float
    high: float
    verdict: str


def advantage(verdict: dict[str, float], higher: bool) -> tuple[float, float, float]:
    """Mean, low and high of a difference with the better side positive, in units of the interval's end that is farther from zero."""
    mean, low, high = (verdict[key] * (1 if higher else -1) for key in ("mean", "low", "high"))
    low, high = min(low, high), max(low, high)
    unit = max(abs(low), abs(high)) or 1.0
    return mean / unit, low / unit, high / unit


def forest_plot(rows: Sequence[Row]) -> str:
    """An SVG with a line for each row, under the name of its technique.

    Units differ, so each row has a scale of its own: the end of the interval that is farther from zero stands at the edge. A verdict is a
    shape as well as a colour: filled circle, empty diamond with a dashed line, filled square. It follows the reader's light or dark
    colours, and says in words what it shows.
    """

    def x(value: float) -> float:
        return ZERO + HALF * value

    parts, y = [], TOP
    for index, row in enumerate(rows):
        if index == 0 or rows[index - 1].slug != row.slug:
            y += ROW
            parts.append(f'<line class="grid" x1="8" x2="{WIDTH - 8}" y1="{y - 14}" y2="{y - 14}"/>')
            parts.append(f'<text class="slug" x="10" y="{y}">{escape(row.slug)}</text>')
        y += ROW
        kind = _CLASSES[row.verdict]
        parts.append(f'<text x="22" y="{y}">{escape(row.setting or "first setting")}</text>')
        parts.append(f'<line class="{kind}" x1="{x(row.low):.1f}" x2="{x(row.high):.1f}" y1="{y - 4}" y2="{y - 4}"/>')
        parts.append(_mark(kind, x(row.mean), y - 4))
    bottom = y + 12
    axis = f'<line class="axis" x1="{ZERO}" x2="{ZERO}" y1="{TOP - 8}" y2="{bottom}"/>'
    legend, place = [], 14.0
    for verdict, kind in _CLASSES.items():
        legend.append(f'{_mark(kind, place, 16)}<text x="{place + 10}" y="20">{verdict}</text>')
        place += 34 + 6.2 * len(verdict)
    words = "; ".join(f"{row.slug}, {row.setting or 'first setting'}: {row.verdict}" for row in rows)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 8}" width="{WIDTH}" height="{bottom + 8}" '
        'role="img" aria-labelledby="title desc">\n'
        '<title id="title">Difference and 95 % interval of every claim in every setting</title>\n'
        f'<desc id="desc">{escape(words)}</desc>\n<style>{_STYLE}</style>\n' + "\n".join(legend) + "\n"
        f'<text x="{ZERO - 8}" y="{TOP - 14}" text-anchor="end">baseline better</text>'
        f'<text x="{ZERO + 8}" y="{TOP - 14}">method better</text>\n{axis}\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _mark(kind: str, x: float, y: float) -> str:
    if kind == "holds":
        return f'<circle class="{kind}" cx="{x:.1f}" cy="{y}" r="4.5"/>'
    if kind == "undecided":
        return f'<path class="{kind}" d="M{x:.1f} {y - 5.5}l5.5 5.5l-5.5 5.5l-5.5 -5.5z"/>'
    return f'<rect class="{kind}" x="{x - 4:.1f}" y="{y - 4}" width="8" height="8"/>'
