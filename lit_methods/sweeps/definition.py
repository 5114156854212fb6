"""A sweep's file, in the format of W&B's sweeps, so that ``wandb sweep`` takes it as it is. Imports neither torch nor optuna."""

import itertools
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lit_methods.errors import CommandError, suggest
from lit_methods.files import read_yaml

Method = Literal["grid", "random", "bayes"]
KEYS = ("command", "method", "metric", "parameters", "early_terminate", "run_cap", "name", "description", "program", "project", "entity")
FILLED = ("${env}", "${interpreter}", "${program}", "${args}")  # what W&B's agent fills in
DISTRIBUTIONS = ("constant", "categorical", "int_uniform", "uniform", "q_uniform", "log_uniform_values", "log_uniform")
FIELDS = ("value", "values", "min", "max", "q", "distribution")


@dataclass(frozen=True)
class Parameter:
    """What a key of the runs may be.

    Attributes:
        key: A key of ``lit fit``, such as ``model.init_args.learning_rate``.
        distribution: One of :data:`DISTRIBUTIONS`.
        values: What it is taken from; one value for ``constant``, () for a range.
        low: Lower end of a range.
        high: Upper end, which belongs to it.
        step: Distance of the values of a range; None: any.
    """

    key: str
    distribution: str
    values: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    step: float | None = None

    @property
    def is_range(self) -> bool:
        """Whether it is drawn between two ends."""
        return not self.values

    @property
    def steps(self) -> tuple[Any, ...]:
        """All values, for a grid.

        Raises:
            CommandError: A range without steps has no end of them.
        """
        if not self.is_range:
            return self.values
        if self.step is None:
            raise CommandError(f"parameters: {self.key} is {self.distribution}, and a grid needs values: give values: [...]")
        count = int((self.high - self.low) / self.step + 1e-9) + 1
        return tuple(self._typed(self.low + number * self.step) for number in range(count))

    def _typed(self, value: float) -> float | int:
        return round(value) if self.distribution == "int_uniform" else float(f"{value:.12g}")


@dataclass(frozen=True)
class EarlyTermination:
    """Runs whose metric is behind at a rung stop there (ASHA; W&B's hyperband).

    Attributes:
        first: Logged values of the metric behind which the first rung stands.
        eta: One of so many goes on at each rung, and the next rung is so many times further.
    """

    first: int
    eta: int


@dataclass(frozen=True)
class Sweep:
    """A sweep as its file declares it.

    Attributes:
        name: Of the sweep's folder.
        words: Words of ``lit`` that every trial begins with, ``fit`` first.
        method: How values are chosen.
        metric: Name of what is compared.
        goal: Whether low or high is better.
        parameters: What differs between trials.
        early: When trials stop early; None: never.
        cap: Trials in all; None: not said.
    """

    name: str
    words: tuple[str, ...]
    method: Method
    metric: str
    goal: Literal["minimize", "maximize"]
    parameters: tuple[Parameter, ...]
    early: EarlyTermination | None
    cap: int | None

    def grid(self) -> list[dict[str, Any]]:
        """All combinations, the last parameter fastest."""
        return [
            dict(zip((p.key for p in self.parameters), combination, strict=True))
            for combination in itertools.product(*(p.steps for p in self.parameters))
        ]

    def trial_words(self, values: Mapping[str, Any]) -> list[str]:
        """Words of ``lit`` for one trial."""
        return [*self.words, *(f"--{key}={as_word(value)}" for key, value in values.items())]

    def described(self) -> dict[str, Any]:
        """What must be the same when a sweep goes on in its folder."""
        return json.loads(
            json.dumps(
                {
                    "words": self.words,
                    "method": self.method,
                    "metric": [self.metric, self.goal],
                    "parameters": {p.key: [p.distribution, p.values, p.low, p.high, p.step] for p in self.parameters},
                }
            )
        )  # type: ignore[no-any-return]


def as_word(value: Any) -> str:
    """A value as ``lit`` reads it from the command line."""
    return json.dumps(value) if isinstance(value, bool | list | dict) or value is None else str(value)


def read_sweep(file: Path) -> Sweep:
    """The sweep that a file declares.

    Raises:
        CommandError: What the file says can't be; the message names the key.
    """
    if not file.is_file():
        raise CommandError(f"{file} is no file: give a sweep in W&B's format")
    content = read_yaml(file)
    if not isinstance(content, dict):
        raise CommandError(f"{file} holds no keys: a sweep has command, method, metric and parameters")
    for key in content:
        if key not in KEYS:
            raise CommandError(f"{file}: unknown key {key!r}{suggest(str(key), KEYS)}")
    try:
        metric, goal = _metric(content.get("metric"))
        return Sweep(
            name=str(content.get("name") or file.stem),
            words=_words(content.get("command")),
            method=_method(content.get("method")),
            metric=metric,
            goal=goal,
            parameters=_parameters(content.get("parameters")),
            early=_early(content.get("early_terminate")),
            cap=_whole(content, "run_cap"),
        )
    except CommandError as error:
        raise CommandError(f"{file}: {error}") from error


def _words(command: Any) -> tuple[str, ...]:
    example = "such as command: [lit, fit, --config, configs/ict_digits.yaml, ${args}]"
    if isinstance(command, str):
        command = shlex.split(command)
    if not isinstance(command, list):
        raise CommandError(f"command is {command!r}: give what a trial runs, {example}")
    words = [str(word) for word in command if str(word) not in FILLED]
    if words[:2] != ["lit", "fit"]:
        raise CommandError(f"command is {' '.join(map(str, command))!r}: it must begin with lit fit, {example}")
    if unknown := [word for word in words if word.startswith("${")]:
        raise CommandError(f"command has {unknown[0]}: {' and '.join(FILLED)} are known, {example}")
    return tuple(words[1:])


def _method(method: Any) -> Method:
    if method not in ("grid", "random", "bayes"):
        raise CommandError(f"method is {method!r}: give grid, random or bayes")
    return method  # type: ignore[no-any-return]


def _metric(metric: Any) -> tuple[str, Literal["minimize", "maximize"]]:
    if not isinstance(metric, dict) or not metric.get("name") or metric.get("goal", "minimize") not in ("minimize", "maximize"):
        raise CommandError(f"metric is {metric!r}: give a name that the runs log and a goal, such as {{name: val_loss, goal: minimize}}")
    if unknown := set(metric) - {"name", "goal"}:
        raise CommandError(f"metric has {sorted(unknown)[0]}, which isn't known here: give name and goal; the last value is compared")
    return str(metric["name"]), metric.get("goal", "minimize")


def _parameters(parameters: Any) -> tuple[Parameter, ...]:
    if not isinstance(parameters, dict) or not parameters:
        raise CommandError(f"parameters is {parameters!r}: give at least one key of lit fit with values, or with min and max")
    return tuple(_parameter(str(key), given) for key, given in parameters.items())


def _parameter(key: str, given: Any) -> Parameter:
    where = f"parameters: {key}"
    if not isinstance(given, dict):
        raise CommandError(f"{where} is {given!r}: give values: [...], or min and max")
    if "parameters" in given:
        raise CommandError(f"{where} is nested: write its keys out with dots, such as {key}.learning_rate")
    for name in given:
        if name not in FIELDS:
            raise CommandError(f"{where}: unknown key {name!r}{suggest(str(name), FIELDS)}")
    kind = given.get("distribution") or _kind(given)
    if kind not in DISTRIBUTIONS:
        raise CommandError(f"{where}: distribution is {kind!r}: give {', '.join(DISTRIBUTIONS[:-1])} or {DISTRIBUTIONS[-1]}")
    if kind in ("constant", "categorical"):
        values = [given["value"]] if "value" in given else given.get("values")
        if not isinstance(values, list) or not values:
            raise CommandError(f"{where} has no values: give values: [...], value, or min and max")
        return Parameter(key, kind, tuple(values))
    return _range(where, key, kind, given)


def _kind(given: Mapping[str, Any]) -> str:
    if "value" in given:
        return "constant"
    if "values" in given or not {"min", "max"} <= set(given):
        return "categorical"
    return "int_uniform" if all(isinstance(given[end], int) for end in ("min", "max")) else "uniform"


def _range(where: str, key: str, kind: str, given: Mapping[str, Any]) -> Parameter:
    ends = [_number(where, name, given.get(name)) for name in ("min", "max")]
    if kind == "log_uniform":  # W&B's ends are natural logarithms here
        ends = [math.exp(end) for end in ends]
    low, high = ends
    if low >= high:
        raise CommandError(f"{where}: min is {given['min']} and max {given['max']}: min must be smaller")
    if kind == "log_uniform_values" and low <= 0:
        raise CommandError(f"{where}: min is {given['min']}: it must be above 0 for {kind}")
    step = 1.0 if kind == "int_uniform" else _number(where, "q", given.get("q", 1.0)) if kind == "q_uniform" else None
    if step is not None and step <= 0:
        raise CommandError(f"{where}: q is {step:g}: it must be above 0")
    return Parameter(key, kind, (), low, high, step)


def _number(where: str, name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise CommandError(f"{where}: {name} is {value!r}: give a number")
    return number


def _early(early: Any) -> EarlyTermination | None:
    if early is None:
        return None
    if not isinstance(early, dict) or early.get("type") != "hyperband":
        raise CommandError(f"early_terminate is {early!r}: give type: hyperband with min_iter, or with max_iter and s")
    if unknown := set(early) - {"type", "min_iter", "max_iter", "s", "eta", "strict"}:
        raise CommandError(
            f"early_terminate: unknown key {sorted(unknown)[0]!r}{suggest(sorted(unknown)[0], ['min_iter', 'max_iter', 's', 'eta'])}"
        )
    eta = _whole(early, "eta", 2) or 3
    first = _whole(early, "min_iter")
    if first is None:
        last, brackets = _whole(early, "max_iter"), _whole(early, "s")
        if last is None or brackets is None:
            raise CommandError("early_terminate: give min_iter, or max_iter and s")
        first = max(1, last // eta**brackets)
    return EarlyTermination(first, eta)


def _whole(content: Mapping[str, Any], key: str, least: int = 1) -> int | None:
    value = content.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
        raise CommandError(f"{key} is {value!r}: give a whole number of {least} or more")
    return value


def missing_trials(sweep: Sweep, done: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Combinations of a grid that no trial in ``done`` has."""
    known = {_mark(values) for values in done}
    return [values for values in sweep.grid() if _mark(values) not in known]


def _mark(values: Mapping[str, Any]) -> str:
    return json.dumps(dict(values), sort_keys=True)
