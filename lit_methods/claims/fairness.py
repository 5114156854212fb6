"""Whether two arms had the same chances. Pure functions of resolved configs (nested dicts) and of what was measured."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

# what decides how many steps a fit stage takes
SCHEDULE = (
    "max_epochs",
    "max_steps",
    "max_time",
    "min_epochs",
    "min_steps",
    "limit_train_batches",
    "overfit_batches",
    "accumulate_grad_batches",
    "devices",
    "num_nodes",
    "fast_dev_run",
)

Config = Mapping[str, Any]


class Difference(NamedTuple):
    """One way in which an arm differs from the one that it is compared with: its kind, and the two sides in words."""

    kind: str
    text: str


class ResolvedStage(NamedTuple):
    """A stage's command, its resolved config, and the keys that the claim file sets in it."""

    command: str
    config: Config
    set: tuple[str, ...] = ()


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """A nested config as one mapping: dotted key -> value; lists are not taken apart."""
    if not isinstance(config, Mapping) or not config:
        return {prefix: config}
    values: dict[str, Any] = {}
    for key, value in config.items():
        values.update(flat(value, f"{prefix}.{key}" if prefix else str(key)))
    return values


def config_differences(ours: Config, theirs: Config, leave_out: Sequence[str] = ()) -> list[str]:
    """``key: our value (their value)`` for every dotted key in which two configs differ."""
    a, b = flat(ours), flat(theirs)
    keys = sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key) and key not in leave_out)
    return [f"{key}: {_short(a.get(key))} ({_short(b.get(key))})" for key in keys]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def schedules(stages: Sequence[ResolvedStage]) -> list[dict[str, Any]]:
    """For each fit stage, what decides its number of steps: keys of the trainer, and the batch size."""
    fits = []
    for stage in stages:
        if stage.command == "fit":
            trainer = stage.config.get("trainer") or {}
            data = {key: value for key, value in flat(stage.config.get("data") or {}).items() if key.rpartition(".")[2] == "batch_size"}
            fits.append({key: trainer.get(key) for key in SCHEDULE} | data)
    return fits


def before_running(
    arm: str,
    reference: str,
    resolved: Mapping[str, Sequence[ResolvedStage]],
    *,
    seed_keys: Sequence[str],
    tuned: Mapping[str, Sequence[str]],
    units: Sequence[str],
) -> list[Difference]:
    """Differences that the resolved configs show: of evaluation data, seeds, tuned hyperparameters and, for the unit ``steps``, schedules.

    Args:
        arm: Name of one arm.
        reference: Name of the arm that it is compared with.
        resolved: Arm -> its stages.
        seed_keys: Keys that take the seed; they don't count as a difference of the data.
        tuned: Arm -> keys that were tuned; an arm that isn't listed isn't compared in this.
        units: Units of the budget.
    """
    differences = []
    ours, theirs = resolved[arm], resolved[reference]
    our_data, their_data = ({"data": stages[-1].config.get("data")} for stages in (ours, theirs))
    if changed := config_differences(our_data, their_data, seed_keys):
        differences.append(Difference("data", f"last stage's {'; '.join(changed)}"))
    for name, stages in ((arm, ours), (reference, theirs)):
        set_here = sorted({key for stage in stages for key in stage.set if key in seed_keys})
        if set_here:
            differences.append(Difference("seeds", f"{name} sets {', '.join(set_here)} itself"))
    if arm in tuned and reference in tuned and len(tuned[arm]) != len(tuned[reference]):
        differences.append(Difference("tuned", f"{len(tuned[arm])} tuned hyperparameters ({len(tuned[reference])})"))
    if "steps" in units:
        our_fits, their_fits = schedules(ours), schedules(theirs)
        if len(our_fits) != len(their_fits):
            differences.append(Difference("steps", f"{len(our_fits)} fit stages ({len(their_fits)})"))
        else:
            pairs = enumerate(zip(our_fits, their_fits, strict=True), start=1)
            changes = [f"fit {number}: {text}" for number, pair in pairs for text in config_differences(*pair)]
            if changes:
                differences.append(Difference("steps", "; ".join(changes)))
    return differences


def unknown_tuned(tuned: Mapping[str, Sequence[str]], resolved: Mapping[str, Sequence[ResolvedStage]]) -> list[str]:
    """Tuned keys that no stage of their arm has, as ``arm: key``."""
    return [
        f"{arm}: {key}"
        for arm, keys in tuned.items()
        for key in keys
        if not any(has_key(stage.config, key.split(".")) for stage in resolved[arm])
    ]


def has_key(config: Any, parts: Sequence[str]) -> bool:
    """Whether a config has a key, written as under ``set``: ``init_args`` may be left out, and a list has what one of its items has.

    Args:
        config: Nested dicts and lists.
        parts: The key, split at its dots, such as ``["trainer", "callbacks", "init_args", "l1_decay"]``.
    """
    if not parts:
        return True
    if isinstance(config, list):
        return any(has_key(item, parts) for item in config)
    if not isinstance(config, Mapping):
        return False
    key = ".".join(parts)
    if key in config or (parts[0] in config and has_key(config[parts[0]], parts[1:])):
        return True
    return parts[0] != "init_args" and has_key(config.get("init_args"), parts)


def after_running(
    measured: Mapping[str, Sequence[Mapping[str, float]]], arm: str, reference: str, units: Sequence[str], tolerance: float
) -> list[Difference]:
    """Differences of the measured budget: any seed in which a unit differs by more than ``tolerance`` (relative to the larger).

    Args:
        measured: Arm -> for each seed unit -> value.
        arm: Name of one arm.
        reference: Name of the arm that it is compared with.
        units: Units of the budget.
        tolerance: 0 for exactly equal.
    """
    differences = []
    for unit in units:
        pairs = [(one[unit], other[unit]) for one, other in zip(measured[arm], measured[reference], strict=True)]
        apart = [pair for pair in pairs if abs(pair[0] - pair[1]) > tolerance * max(map(abs, pair))]
        if apart:
            differences.append(Difference(unit, f"{apart[0][0]:,.0f} {unit} ({apart[0][1]:,.0f})"))
    return differences


def merged(differences: Sequence[Difference]) -> list[Difference]:
    """One difference a kind, in the order of first appearance."""
    texts: dict[str, list[str]] = {}
    for difference in differences:
        if difference.text not in texts.setdefault(difference.kind, []):
            texts[difference.kind].append(difference.text)
    return [Difference(kind, "; ".join(several)) for kind, several in texts.items()]


def undeclared(differences: Sequence[Difference], declared: Mapping[str, str]) -> list[Difference]:
    """Differences that nobody gave a reason for."""
    return [difference for difference in differences if difference.kind not in declared]


def stale(differences: Sequence[Difference], declared: Mapping[str, str], kinds: Sequence[str]) -> list[str]:
    """Declared kinds among ``kinds`` that don't exist."""
    return sorted(kind for kind in declared if kind in kinds and kind not in {difference.kind for difference in differences})
