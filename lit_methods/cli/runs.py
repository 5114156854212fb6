"""``lit runs``: a table of the runs below a folder, with their figures; filters, and the best of them. Nothing is written."""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_methods.cli.commands import Parser, _table, parsed
from lit_methods.cli.report import MARKS, find_runs
from lit_methods.errors import CommandError, suggest

CONDITION = re.compile(r"(?P<key>[^<>=!]+?)\s*(?P<sign><=|>=|!=|=|<|>)\s*(?P<value>.*)", flags=re.S)
COLUMNS = 4  # figures of a table, unless --metric names some


@dataclass(frozen=True)
class Run:
    """What the table knows of a run.

    Attributes:
        folder: Its folder.
        name: How it is shown: ``<name>/<time>``.
        status: finished, running, interrupted or unknown.
        step: The last one that has figures; -1 where there is none.
        config: Dotted key -> value as text; ``init_args`` is left out of the keys.
        history: Metric -> its (step, value) in order.
        goals: Metric -> "min" or "max", as the panels of the run declare.
    """

    folder: Path
    name: str
    status: str
    step: int
    config: Mapping[str, str]
    history: Mapping[str, list[tuple[int, float]]]
    goals: Mapping[str, str]

    def last(self, metric: str) -> float | None:
        """The last value; None where it was never logged."""
        rows = self.history.get(metric)
        return rows[-1][1] if rows else None

    def best(self, metric: str, goal: str) -> tuple[int, float] | None:
        """(step, value) of the best value, the first of equal ones; None where no finite one was logged."""
        rows = [row for row in self.history.get(metric, ()) if math.isfinite(row[1])]
        return None if not rows else (min if goal == "min" else max)(rows, key=lambda row: row[1])


def runs(words: list[str]) -> int:
    """``lit runs [name...]``."""
    parser = Parser(prog="lit runs", description="A table of runs and their figures: the last value of each, or with --best the best one.")
    parser.add_argument("runs", nargs="*", metavar="run", help="a run's folder, a name below runs/ or a pattern; default: all")
    parser.add_argument("--metric", action="append", default=[], help="show this metric; again for another; default: those with a goal")
    parser.add_argument("--config", action="append", default=[], help="show this key of the config, whole or its end; again for another")
    parser.add_argument("--where", action="append", default=[], help="only runs of which it holds: 'learning_rate=0.1', 'val_acc>0.5'")
    parser.add_argument("--best", metavar="METRIC", help="sort by the best value of this metric, the best run first")
    parser.add_argument("--sort", metavar="KEY", help="sort by the last value of a metric, or by a key of the config; default: by time")
    parser.add_argument("--min", action="store_true", help="lower is better, where the run's panels don't say it")
    parser.add_argument("--max", action="store_true", help="higher is better")
    parser.add_argument("--top", type=int, help="show so many runs")
    parser.add_argument("--json", action="store_true", help="every field, as a JSON list")
    parser.add_argument("--run_root", type=Path, default=Path("runs"), help="parent of all runs (default: %(default)s)")
    options = parsed(parser, words)
    if options is None:
        return 0
    if options.min and options.max:
        raise CommandError("give --min or --max, not both")
    if options.best and options.sort:
        raise CommandError("give --best or --sort, not both")
    if options.top is not None and options.top < 1:
        raise CommandError(f"--top is {options.top}: give 1 or more")
    found = [read_run(folder, options.run_root) for folder in folders_of(options.runs, options.run_root)]
    for condition in options.where:
        holds = condition_of(condition, found)
        found = [run for run in found if holds(run)]
    metrics = [named_metric(name, found) for name in options.metric]
    goal = ""
    if options.best:
        metric = named_metric(options.best, found)
        goal = _goal(metric, found, options.min, options.max)
        ranked = [(run.best(metric, goal), run) for run in found]
        sign = 1 if goal == "min" else -1
        found = [run for best, run in sorted((pair for pair in ranked if pair[0]), key=lambda pair: sign * pair[0][1])]  # type: ignore[index]
        metrics = [metric, *(other for other in metrics if other != metric)]
    elif options.sort:
        found = _sorted(found, options.sort, reverse=options.max)
    keys = [named_key(key, found) for key in options.config]
    shown = found[: options.top]
    if options.json:
        print(json.dumps([_fields(run, metrics or list(run.history), keys, goal) for run in shown], indent=2, ensure_ascii=False))
        return 0
    if not shown:
        print("no run of which this holds" if options.where else "no run has a value of this metric")
        return 0
    print(_table(_rows(shown, metrics or key_metrics(shown), keys, options.best, goal), title_width=60))
    if len(shown) < len(found):
        print(f"\n{len(shown)} of {len(found)} runs")
    if options.best:
        print(f"\nbest: {shown[0].folder}")
    return 0


# ---- reading ---------------------------------------------------------------------------------------------------------------------------


def folders_of(words: Sequence[str], root: Path) -> list[Path]:
    """Folders of the runs that are meant, the oldest first.

    A name means all of its runs, where ``lit report`` takes the newest.

    Raises:
        CommandError: A word means no run, or there is none at all.
    """
    below = sorted(
        path for path in (*root.glob("*"), *root.glob("*/*")) if path.is_dir() and any((path / mark).is_file() for mark in MARKS)
    )
    if not words:
        if not below:
            raise CommandError(f"{root}/ holds no runs: lit fit makes one, --run_root says where they lie")
        found = below
    else:
        found = []
        for word in words:
            named = [path for path in below if path.parent.name == word.rstrip("/") or path.parent == Path(word)]
            found += named or find_runs([word], root)
    return sorted(dict.fromkeys(found), key=lambda path: (path.name, str(path)))


def read_run(folder: Path, root: Path = Path("runs")) -> Run:
    """What a run's folder says; a file that is missing or broken leaves its part empty."""
    from lit_methods.reports.record import flat_config, read_config

    history: dict[str, list[tuple[int, float]]] = {}
    last = -1
    for line in _lines(folder / "metrics.jsonl"):
        try:
            entry = json.loads(line)
            step, values = int(entry["step"]), dict(entry["metrics"])
            rows = [(name, float(value)) for name, value in values.items()]
        except (ValueError, KeyError, TypeError):  # a line that a kill cut off
            continue
        last = max(last, step)
        for name, value in rows:
            history.setdefault(name, []).append((step, value))
    record = _record(folder / "report.json")
    goals: dict[str, str] = {}
    for section in _list(record.get("sections")):
        for panel in _list(section.get("panels") if isinstance(section, dict) else None):
            if isinstance(panel, dict) and panel.get("goal") in ("min", "max"):
                goals.update(dict.fromkeys(_selected(panel.get("metrics"), history), str(panel["goal"])))
    status = "finished" if (folder / "finished.json").is_file() else str(record.get("status", "unknown"))
    return Run(folder, f"{folder.parent.name}/{folder.name}", status, last, flat_config(read_config(folder)), history, goals)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _record(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _selected(patterns: Any, names: Mapping[str, Any]) -> list[str]:
    """As :meth:`lit_methods.panels.Curve.select`, which would cost an import of NumPy."""
    found = []
    for pattern in map(str, _list(patterns)):
        wanted = {pattern, f"{pattern}_step", f"{pattern}_epoch"}
        found += [name for name in names if (name.startswith(pattern[:-1]) if pattern.endswith("*") else name in wanted)]
    return found


# ---- choosing --------------------------------------------------------------------------------------------------------------------------


def _named(given: str, known: Sequence[str], what: str) -> str:
    """The name that is meant by a whole name or by its end behind a dot or slash.

    Raises:
        CommandError: None ends so, or several do.
    """
    if given in known:
        return given
    ending = [name for name in known if re.search(rf"[./]{re.escape(given)}$", name)]
    if len(ending) == 1:
        return ending[0]
    if ending:
        raise CommandError(f"{given!r} means several {what}: {', '.join(sorted(ending)[:6])}\n  give more of it")
    raise CommandError(f"no run has the {what} {given!r}" + suggest(given, known))


def named_metric(given: str, found: Sequence[Run]) -> str:
    """A metric by its name or the end of it."""
    return _named(given, list(dict.fromkeys(name for run in found for name in run.history)), "metric")


def named_key(given: str, found: Sequence[Run]) -> str:
    """A key of the config by its name or the end of it."""
    return _named(given, list(dict.fromkeys(name for run in found for name in run.config)), "key of the config")


def condition_of(text: str, found: Sequence[Run]) -> Callable[[Run], bool]:
    """The test that ``key=value``, ``!=``, ``<``, ``<=``, ``>`` or ``>=`` stands for.

    The key is one of the config or a metric, whose last value counts; ``status`` and ``step`` are keys, too. Numbers are compared as such.

    Raises:
        CommandError: It is no condition, or no run has the key.
    """
    parts = CONDITION.fullmatch(text.strip())
    if parts is None:
        raise CommandError(f"--where {text!r} is no condition: give key=value, or key with !=, <, <=, > or >=")
    given, sign, wanted = parts["key"].strip(), parts["sign"], parts["value"].strip()
    metrics = list(dict.fromkeys(name for run in found for name in run.history))
    keys = list(dict.fromkeys(name for run in found for name in run.config))
    if not found:
        return lambda run: False
    name = given if given in ("status", "step") else _named(given, [*keys, *metrics], "key or metric")

    def value_of(run: Run) -> Any:
        if name in ("status", "step"):
            return getattr(run, name)
        return run.config.get(name) if name in keys else run.last(name)

    def holds(run: Run) -> bool:
        value = value_of(run)
        if value is None:
            return False
        one, other = _number(value), _number(wanted)
        if one is None or other is None:
            if sign not in ("=", "!="):
                return False
            return (str(value) == wanted) == (sign == "=")
        return {"=": one == other, "!=": one != other, "<": one < other, "<=": one <= other, ">": one > other, ">=": one >= other}[sign]

    return holds


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _goal(metric: str, found: Sequence[Run], low: bool, high: bool) -> str:
    if low or high:
        return "min" if low else "max"
    goals = {run.goals[metric] for run in found if metric in run.goals}
    if len(goals) != 1:
        raise CommandError(f"no panel says whether a low or a high {metric} is better: add --min or --max")
    return goals.pop()


def _sorted(found: Sequence[Run], given: str, reverse: bool) -> list[Run]:
    metrics = list(dict.fromkeys(name for run in found for name in run.history))
    name = _named(given, [*metrics, *dict.fromkeys(key for run in found for key in run.config)], "key or metric")

    def value(run: Run) -> Any:
        return run.last(name) if name in metrics else run.config.get(name)

    have = [run for run in found if value(run) is not None]
    numbers = all(_number(value(run)) is not None for run in have)
    have.sort(key=lambda run: _number(value(run)) if numbers else str(value(run)), reverse=reverse)  # type: ignore[arg-type, return-value]
    return [*have, *(run for run in found if value(run) is None)]


def key_metrics(found: Sequence[Run]) -> list[str]:
    """Metrics with a goal that most runs have, those of validation first."""
    counts: dict[str, int] = {}
    for run in found:
        for name in run.goals:
            if run.last(name) is not None:
                counts[name] = counts.get(name, 0) + 1
    order = sorted(counts, key=lambda name: (-counts[name], "val" not in name, list(counts).index(name)))
    return order[:COLUMNS]


# ---- showing ---------------------------------------------------------------------------------------------------------------------------


def _rows(found: Sequence[Run], metrics: Sequence[str], keys: Sequence[str], best: str | None, goal: str) -> list[list[str]]:
    head = ["run", "status", "step", *([f"best {metrics[0]}", "at step", *metrics[1:]] if best else metrics), *keys]
    rows = [head]
    for run in found:
        row = [run.name, run.status, "-" if run.step < 0 else str(run.step)]
        rest = list(metrics)
        if best:
            step, value = run.best(rest.pop(0), goal) or (0, math.nan)
            row += [_short(value), str(step)]
        rows.append([*row, *(_short(run.last(metric)) for metric in rest), *(run.config.get(key, "-") for key in keys)])
    return rows


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.5g}"


def _fields(run: Run, metrics: Sequence[str], keys: Sequence[str], goal: str) -> dict[str, Any]:
    def plain(value: float | None) -> float | str | None:
        return value if value is None or math.isfinite(value) else str(value)

    fields: dict[str, Any] = {"run": str(run.folder), "status": run.status, "step": run.step}
    fields["metrics"] = {name: plain(run.last(name)) for name in metrics}
    if goal and (best := run.best(metrics[0], goal)):
        fields["best"] = {"metric": metrics[0], "step": best[0], "value": best[1]}
    fields["config"] = {key: run.config.get(key) for key in keys} if keys else dict(run.config)
    return fields
