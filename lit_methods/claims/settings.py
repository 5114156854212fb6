"""The further settings of a claim: each as the content of a claim file of its own. Pure functions of what the file holds."""

from collections.abc import Mapping
from typing import Any

from lit_methods.errors import suggest

REPLACES = ("claim", "metric", "direction", "gate", "margin", "seeds", "seed_keys", "threads", "budget", "differences", "arms", "reports")
KEYS = ("data", "real", "config", "set", *REPLACES)
_OF_THE_FIRST = ("settings", "setting", "data", "real", "tuned", "cost", "paper")  # what a further setting doesn't inherit


class SettingError(ValueError):
    """A further setting is wrong; the message names the field."""


def content_of(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A further setting as the content of a claim file of its own, in which nothing was tuned.

    It has the first setting's keys, but for those that it replaces. Its ``config`` files lie over those of every stage, its ``set`` over
    the stage's own. ``arms`` may be a list of names: those arms of the first setting. Reports of arms that it leaves out are left out, too.

    Args:
        content: The whole claim file.
        name: A key of its ``settings``.

    Raises:
        SettingError: A key is unknown or has no use in a further setting, or a list of arms names one that isn't there.
    """
    setting, where = content["settings"][name], f"settings.{name}"
    if not isinstance(setting, Mapping):
        raise SettingError(f"{where} must be a mapping of keys, got {setting!r}")
    if "tuned" in setting:
        raise SettingError(f"{where} has `tuned`: nothing is tuned in a further setting; what the first one found stands in the arms")
    for key in setting:
        if key not in KEYS:
            raise SettingError(f"{where} has no {key!r}{suggest(str(key), KEYS)}")
    if not isinstance(setting.get("data"), str):
        raise SettingError(f"{where}.data is missing: what its data is, in one line")
    merged = {key: value for key, value in content.items() if key not in _OF_THE_FIRST}
    merged |= {key: setting[key] for key in ("data", "real", *REPLACES) if key in setting}
    if "differences" not in setting and isinstance(merged.get("differences"), Mapping):
        merged["differences"] = {kind: reason for kind, reason in merged["differences"].items() if kind != "tuned"}
    arms, declared = merged.get("arms"), content.get("arms")
    if isinstance(arms, list) and isinstance(declared, Mapping):
        for arm in arms:
            if arm not in declared:
                raise SettingError(f"{where}.arms: the first setting has no arm {arm!r}{suggest(str(arm), map(str, declared))}")
        merged["arms"] = arms = {arm: declared[arm] for arm in arms}
    if isinstance(arms, Mapping):
        merged["arms"] = {arm: [_laid_over(stage, setting) for stage in chain] for arm, chain in arms.items() if isinstance(chain, list)}
        merged["tuned"] = {arm: [] for arm in arms}
    if isinstance(merged.get("reports"), list):
        kept = [entry for entry in merged["reports"] if "reports" in setting or entry.get("arm") in (arms or ())]
        merged["reports"] = [entry | {"stage": _laid_over(entry["stage"], setting)} if entry.get("stage") else entry for entry in kept]
    return merged


def _laid_over(stage: Any, setting: Mapping[str, Any]) -> Any:
    if not isinstance(stage, Mapping) or "config" not in stage:
        return stage  # refused where stages are read
    own, ours = dict(stage.get("set") or {}), dict(setting.get("set") or {})
    for key in ours:
        own.pop(key, None)  # so that the setting's comes after all of the stage's
    configs = [*listed(stage["config"]), *listed(setting.get("config") or [])]
    return {**stage, "config": configs, "set": {**own, **ours}}


def listed(value: Any) -> list[Any]:
    """A list as it is, one value as a list of it."""
    return list(value) if isinstance(value, list) else [value]
