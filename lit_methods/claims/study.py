"""A claim or a comparison as its YAML file declares it, checked: arms of ``lit`` stages, metric, seeds, budget, differences, cost."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lit_methods.claims.settings import SettingError, content_of
from lit_methods.errors import CommandError, suggest
from lit_methods.files import read_yaml

UNITS = ("steps", "parameters", "flops")
KINDS = ("data", "seeds", "tuned", *UNITS)  # of differences that may be declared
COMMANDS = ("soup", "fit", "validate", "test")
TRAINS = ("fit", "soup")
SOUP_OPTIONS = ("candidates", "vary", "soup", "metric", "bn_fraction")  # keys of a stage that are options of lit soup
_STAGE_KEYS = ("command", "config", "set", "callbacks", "checkpoint")
_COMMON = {"source", "metric", "direction", "seeds", "seed_keys", "threads", "budget", "tuned", "differences", "arms", "reports", "cost"}
_CLAIM_KEYS = _COMMON | {"claim", "method", "baseline", "gate", "margin", "paper", "setting", "data", "real", "settings"}
_COMPARE_KEYS = _COMMON | {"question", "reference", "over"}


@dataclass(frozen=True)
class Stage:
    """One ``lit`` command of an arm.

    Attributes:
        command: ``fit``, ``soup``, ``validate`` or ``test``.
        configs: Files for ``--config``, below ``configs/``.
        set: Key -> value; ``{checkpoint}`` stands for the last checkpoint of the stages before.
        callbacks: Class names of further callbacks.
        checkpoint: Value of ``--ckpt_path``, or "".
    """

    command: str
    configs: tuple[str, ...]
    set: dict[str, Any] = field(default_factory=dict)
    callbacks: tuple[str, ...] = ()
    checkpoint: str = ""


@dataclass(frozen=True)
class Report:
    """A further figure without a verdict: ``metric`` of an arm's last stage, or of an extra stage after it."""

    name: str
    arm: str
    metric: str
    stage: Stage | None


@dataclass(frozen=True)
class Cost:
    """Arms whose stage number ``stage`` is timed in turn, for ``steps`` training steps each time; the last one is what is compared with.

    What is timed may also be a fit of its own, no arm of the claim: ``own`` has its stage, and ``arms`` its name.
    """

    arms: tuple[str, ...]
    stage: int
    steps: int
    own: dict[str, Stage] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """What both kinds of file declare.

    Attributes:
        kind: ``claim`` or ``compare``.
        slug: Stem of the file.
        sentence: The claim, or the question of a comparison.
        source: Where the paper says it.
        metric: Name of the logged metric that decides; its last value in an arm's last stage counts.
        higher: Whether larger is better.
        gate: Advantage that every seed must show; below 0 where single seeds may be worse.
        margin: So much worse still counts as no worse, where the claim is that there is no loss; 0: the method must be better.
        seeds: All arms run with each of them.
        seed_keys: Keys that take the seed, in every stage.
        threads: Torch threads of one run.
        arms: Name -> stages.
        reference: The baseline of a claim, the reference of a comparison.
        judged: Arms that must be fair to the reference: the method of a claim, all others of a comparison.
        units: What must be equal: ``steps``, ``parameters``, ``flops``.
        tolerance: Relative difference of the measured budget that still counts as equal.
        tuned: Arm -> keys that were chosen by looking at results.
        differences: Arm -> kind -> reason in words.
        reports: Further figures.
        over: Of a comparison: a reported metric of every arm over which the deciding one is drawn, too; "": it isn't.
        cost: What is timed, or None.
        paper: The paper's own figures, as they stand in the file.
        setting: Name of this setting of a claim; "" where the file has one setting and no name for it.
        data: What its data is, in one line.
        real: Whether the data is real; None where the file doesn't say.
        first: Whether it is the file's first setting, the only one in which something may be tuned.
    """

    kind: str
    slug: str
    sentence: str
    source: str
    metric: str
    higher: bool
    gate: float
    margin: float
    seeds: tuple[int, ...]
    seed_keys: tuple[str, ...]
    threads: int
    arms: dict[str, tuple[Stage, ...]]
    reference: str
    judged: tuple[str, ...]
    units: tuple[str, ...]
    tolerance: float
    tuned: dict[str, tuple[str, ...]]
    differences: dict[str, dict[str, str]]
    reports: tuple[Report, ...]
    cost: Cost | None
    paper: dict[str, Any]
    setting: str = ""
    data: str = ""
    real: bool | None = None
    first: bool = True
    over: str = ""

    def against(self, arm: str) -> str:
        """The arm that ``arm`` is held against: judged ones against the reference, ablations of a claim against its method."""
        return self.reference if arm in self.judged else self.judged[0]


def read_study(path: Path, kind: str = "claim") -> Study:
    """Read and check a file; of a claim with several settings, this is the first.

    Args:
        path: ``configs/claims/<slug>.yaml`` or ``configs/compare/<family>.yaml``.
        kind: ``claim`` or ``compare``.

    Raises:
        CommandError: Anything that the file lacks or has too much; the message names file and field.
    """
    return next(iter(read_settings(path, kind).values()))


def read_settings(path: Path, kind: str = "claim") -> dict[str, Study]:
    """Read and check a file: name of each setting -> what it declares, the first setting first.

    Args:
        path: As for :func:`read_study`.
        kind: As for :func:`read_study`.

    Raises:
        CommandError: As :func:`read_study`.
    """
    try:
        content = read_yaml(path)
    except yaml.YAMLError as error:
        raise CommandError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    except ValueError as error:
        raise CommandError(str(error)) from error
    if not isinstance(content, dict):
        raise CommandError(f"{path} must be a mapping of keys, got {type(content).__name__}")
    first = _Reader(path, kind, content)
    studies = {str(content.get("setting") or ""): first.study()}
    for name in first.settings():
        try:
            reader = _Reader(path, kind, content_of(content, name), name)
        except SettingError as error:
            raise first.fail(str(error)) from error
        studies[name] = reader.study()
    return studies


class _Reader:
    def __init__(self, path: Path, kind: str, content: dict[str, Any], further: str = "") -> None:
        self.path, self.kind, self.content, self.further = path, kind, content, further

    def fail(self, problem: str) -> CommandError:
        where = f"settings.{self.further}: " if self.further else ""
        return CommandError(f"{self.path}: {where}{problem}")

    def known(self, keys: Any, allowed: Any, where: str) -> None:
        for key in keys:
            if key not in allowed:
                raise self.fail(f"{where} has no {key!r}{suggest(str(key), map(str, allowed))}")

    def get(self, key: str, kind: Any, default: Any = None) -> Any:
        value = self.content.get(key, default)
        if value is None or not isinstance(value, kind) or isinstance(value, bool):
            expected = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
            raise self.fail(f"{key} must be {expected}, got {value!r}" if key in self.content else f"{key} is missing ({expected})")
        return value

    def settings(self) -> tuple[str, ...]:
        """Names of the further settings."""
        settings = self.get("settings", dict, {})
        if settings and not (self.content.get("setting") and self.content.get("data")):
            raise self.fail("a claim with further settings needs `setting`, the first one's name, and `data`, what its data is")
        for name in (self.content.get("setting") or "first", *settings):
            if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)*", name):
                raise self.fail(f"the name of a setting must be lower-case words with _ between them, got {name!r}")
        if self.content.get("setting") in settings:
            raise self.fail(f"two settings are called {self.content['setting']!r}")
        return tuple(settings)

    def real(self) -> bool | None:
        real = self.content.get("real")
        if real is not None and not isinstance(real, bool):
            raise self.fail(f"real must be true or false, got {real!r}")
        return real

    def study(self) -> Study:
        is_claim = self.kind == "claim"
        self.known(self.content, _CLAIM_KEYS if is_claim else _COMPARE_KEYS, f"a {self.kind}")
        arms = {name: self.stages(name, stages) for name, stages in self.get("arms", dict).items()}
        reference = self.arm("baseline" if is_claim else "reference", arms)
        judged = (self.arm("method", arms),) if is_claim else tuple(name for name in arms if name != reference)
        if reference in judged or not judged:
            raise self.fail("method and baseline must be two arms" if is_claim else "a comparison needs at least two arms")
        if self.further and arms[reference] == arms[judged[0]]:
            raise self.fail(f"{judged[0]} and {reference} are the same here: what this setting sets overwrites their difference")
        direction = self.get("direction", str)
        if direction not in ("higher", "lower"):
            raise self.fail(f"direction must be higher or lower, got {direction!r}")
        seeds = self.get("seeds", list)
        if not seeds or not all(type(seed) is int for seed in seeds) or len(set(seeds)) < len(seeds):
            raise self.fail(f"seeds must be different whole numbers, got {seeds}")
        budget = self.get("budget", dict)
        self.known(budget, ("unit", "tolerance"), "budget")
        units = budget.get("unit")
        units = (units,) if isinstance(units, str) else tuple(units or ())
        if not units or not set(units) <= set(UNITS):
            raise self.fail(f"budget.unit must be one or several of {', '.join(UNITS)}, got {budget.get('unit')!r}")
        paper = dict(self.content.get("paper") or {})
        self.known(paper, ("headline", "method", "baseline", "unit", "note", "memory"), "paper")
        if paper and not isinstance(paper.get("headline"), str):
            raise self.fail("paper needs a headline: what the paper measured")
        if (margin := float(self.get("margin", (int, float), 0.0))) < 0:
            raise self.fail(f"margin must be 0 or more, got {margin}")
        reports = tuple(self.report(entry, arms) for entry in self.get("reports", list, []))
        over = self.get("over", str, "")
        reported = {report.arm for report in reports if report.metric == over}
        if over and (lacking := [arm for arm in arms if arm not in reported]):
            raise self.fail(f"over is {over}, which reports doesn't have of {', '.join(lacking)}: add name, arm and metric there")
        return Study(
            kind=self.kind,
            slug=self.path.stem,
            sentence=self.get("claim" if is_claim else "question", str),
            source=self.get("source", str, ""),
            metric=self.get("metric", str),
            higher=direction == "higher",
            gate=float(self.get("gate", (int, float), 0.0)),
            margin=margin,
            seeds=tuple(seeds),
            seed_keys=tuple(self.get("seed_keys", list, ["seed_everything"])),
            threads=self.get("threads", int, 1),
            arms=arms,
            reference=reference,
            judged=judged,
            units=units,
            tolerance=float(budget.get("tolerance", 0.0)),
            tuned=self.tuned(arms, (reference, *judged)),
            differences=self.differences(judged, is_claim),
            reports=reports,
            over=over,
            cost=self.cost(arms, is_claim),
            paper=paper,
            setting=self.further or str(self.content.get("setting") or ""),
            data=self.get("data", str, ""),
            real=self.real(),
            first=not self.further,
        )

    def arm(self, key: str, arms: dict[str, Any]) -> str:
        name = str(self.get(key, str))
        if name not in arms:
            raise self.fail(f"{key} names no arm: {name!r}{suggest(name, arms)}")
        return name

    def stages(self, arm: str, entries: Any) -> tuple[Stage, ...]:
        if not isinstance(entries, list) or not entries:
            raise self.fail(f"arms.{arm} must be a list of stages, got {entries!r}")
        stages = tuple(self.stage(entry, f"arms.{arm}[{index}]") for index, entry in enumerate(entries))
        if "{checkpoint}" in f"{stages[0].set} {stages[0].checkpoint}":
            raise self.fail(f"arms.{arm}[0] asks for the {{checkpoint}} of the stage before, and is the first")
        return stages

    def stage(self, entry: Any, where: str) -> Stage:
        if not isinstance(entry, dict) or "config" not in entry:
            raise self.fail(f"{where} must be a mapping with command and config, got {entry!r}")
        self.known(entry, _STAGE_KEYS, where)
        command = entry.get("command", "fit")
        if command not in COMMANDS:
            raise self.fail(f"{where}.command must be {', '.join(COMMANDS[:-1])} or {COMMANDS[-1]}, got {command!r}")
        configs = entry["config"] if isinstance(entry["config"], list) else [entry["config"]]
        callbacks = tuple(entry.get("callbacks") or ())
        return Stage(command, tuple(configs), dict(entry.get("set") or {}), callbacks, entry.get("checkpoint") or "")

    def tuned(self, arms: dict[str, Any], needed: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
        tuned = self.get("tuned", dict)
        self.known(tuned, arms, "tuned")
        for arm in needed:
            if not isinstance(tuned.get(arm), list):
                raise self.fail(f"tuned.{arm} must list the keys that were chosen by looking at results ([] for none)")
        return {arm: tuple(keys) for arm, keys in tuned.items()}

    def differences(self, judged: tuple[str, ...], is_claim: bool) -> dict[str, dict[str, str]]:
        declared = self.get("differences", dict, {})
        if is_claim:
            declared = {judged[0]: declared} if declared else {}
        self.known(declared, judged, "differences")
        for arm, reasons in declared.items():
            self.known(reasons, KINDS, f"differences of {arm}" if not is_claim else "differences")
            for kind, reason in reasons.items():
                if not isinstance(reason, str) or len(reason.split()) < 3:
                    raise self.fail(f"differences: {kind} needs its reason in words, got {reason!r}")
        return {arm: dict(reasons) for arm, reasons in declared.items()}

    def report(self, entry: dict[str, Any], arms: dict[str, Any]) -> Report:
        self.known(entry, ("name", "arm", "metric", "stage"), "reports")
        missing = [key for key in ("name", "arm", "metric") if key not in entry]
        if missing or entry["arm"] not in arms:
            raise self.fail(f"reports: {entry} needs name, metric and one of the arms {sorted(arms)}")
        stage = self.stage(entry["stage"], f"reports ({entry['name']}).stage") if entry.get("stage") else None
        return Report(entry["name"], entry["arm"], entry["metric"], stage)

    def cost(self, arms: dict[str, Any], is_claim: bool) -> Cost | None:
        entry = self.content.get("cost")
        if not entry:
            return None
        keys = ("method", "baseline") if is_claim else ("arms",)
        self.known(entry, (*keys, "stage", "steps"), "cost")
        given = tuple(entry.get(key) for key in keys) if is_claim else tuple(entry.get("arms") or ())
        own = {
            str(one.get("name")): self.stage({key: value for key, value in one.items() if key != "name"}, f"cost ({one.get('name')})")
            for one in given
            if isinstance(one, dict)
        }
        names = tuple(str(one.get("name")) if isinstance(one, dict) else one for one in given)
        stage, steps = entry.get("stage", 0), entry.get("steps", 10)
        for name in names:
            if name in own:
                if name == "None" or name in arms or own[name].command != "fit":
                    raise self.fail(f"cost: a fit of its own needs a name that no arm has, and config; got {name!r}")
            elif name not in arms or not 0 <= stage < len(arms[name]) or arms[name][stage].command != "fit":
                raise self.fail(f"cost: {name!r} is no arm whose stage {stage} is a fit; arms are {', '.join(arms)}")
        if not isinstance(steps, int) or steps < 3:
            raise self.fail(f"cost.steps must be a whole number of 3 or more, as the first two are warm-up, got {steps!r}")
        return Cost(names, stage, steps, own)
