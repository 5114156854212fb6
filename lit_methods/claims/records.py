"""What is kept of a claim: one record for each of its settings, and the verdict over all of them.

``docs/evidence/<slug>.json`` holds the record of the first setting, and under ``settings`` those of the further ones by name. Nothing is
ever taken out: a setting that was run and then left out of the claim file stays, and says so.
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_methods.catalog import package_folder
from lit_methods.claims.verdict import overall

Record = Mapping[str, Any]
NOT_RUN = "not yet run"


def setting_records(record: Record | None) -> dict[str, Record]:
    """Name of each setting that was run -> its own record, the first setting first ("" where it has no name)."""
    if not record:
        return {}
    first = {str(record.get("setting") or ""): record} if "verdict" in record else {}
    return first | dict(record.get("settings") or {})


def with_setting(record: Record | None, summary: Record, first: bool) -> dict[str, Any]:
    """The record of a claim with the summary of one setting put in, all others left as they are."""
    before = dict(record or {})
    further = dict(before.pop("settings", {}))
    if first:
        if before.get("setting", summary["setting"]) not in ("", summary["setting"]):
            further[before["setting"]] = before  # the file has another first setting by now
        further.pop(summary["setting"], None)
        before = {key: value for key, value in summary.items() if key != "settings"}
    else:
        further[summary["setting"]] = dict(summary)
    return {**before, **({"settings": further} if further else {})}


def verdicts_of(record: Record | None, declared: Mapping[str, str]) -> dict[str, str]:
    """Verdict by setting: those that were run in the order of the claim file, those that were not, those that the file has no more.

    Args:
        record: What is kept of the claim, or None.
        declared: Name of each setting of the claim file -> what its data is; {} where there is no file.
    """
    kept = setting_records(record)
    names = named_like(kept, declared)
    known = {names[name]: one["verdict"]["verdict"] if one["verdict"] else NOT_RUN for name, one in kept.items()}
    return {name: known.get(name, NOT_RUN) for name in declared} | {name: known[name] for name in known if name not in declared}


def named_like(kept: Mapping[str, Record], declared: Mapping[str, str]) -> dict[str, str]:
    """Name under which a setting is kept -> its name in the claim file: the first setting may have got its name after it was run."""
    first = next(iter(declared), "")
    return {name: name or first for name in kept}


def verdict_of(record: Record | None, declared: Mapping[str, str]) -> str:
    """The verdict over all settings that were run, with a word on those that were not.

    Args:
        record: As for :func:`verdicts_of`.
        declared: As for :func:`verdicts_of`.
    """
    verdicts = list(verdicts_of(record, declared).values())
    run = [one for one in verdicts if one != NOT_RUN]
    waiting = len(verdicts) - len(run)
    if not run:
        return NOT_RUN
    return overall(run) + (f" ({waiting} setting{'s' if waiting > 1 else ''} {NOT_RUN})" if waiting else "")


def read_records(folder: Path) -> dict[str, dict[str, Any]]:
    """Slug -> record, of every file in a folder."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def verdict_file() -> Path:
    """The file that ships the verdicts: slug -> ``verdict`` over all settings, and ``settings``: name -> verdict."""
    return package_folder("lit_methods") / "claims" / "verdicts.json"


@functools.cache
def verdicts() -> dict[str, dict[str, Any]]:
    """The shipped verdicts by slug; {} where the file isn't there. Written with the evidence page, and read without torch."""
    try:
        content: dict[str, dict[str, Any]] = json.loads(verdict_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content


def verdict_over_all(slug: str) -> str:
    """The verdict over all settings of a technique's claim; "not yet run" where none is kept."""
    return str(verdicts().get(slug, {}).get("verdict", NOT_RUN))


def verdict_words(slug: str) -> str:
    """The verdict over all settings of a technique's claim and that of each setting; "not yet run" where none is kept."""
    entry = verdicts().get(slug)
    if entry is None:
        return NOT_RUN
    each = "; ".join(f"{name}: {verdict}" for name, verdict in entry["settings"].items())
    return f"{entry['verdict']} ({each})" if len(entry["settings"]) > 1 else str(entry["verdict"])


def verdict_table(records: Mapping[str, Record], declared: Mapping[str, Mapping[str, str]], slugs: Any) -> dict[str, dict[str, Any]]:
    """The content of :func:`verdict_file`.

    Args:
        records: Slug -> record.
        declared: Slug -> settings of its claim file, as for :func:`verdicts_of`.
        slugs: The techniques that are listed.
    """
    return {
        slug: {"verdict": verdict_of(records.get(slug), settings), "settings": verdicts_of(records.get(slug), settings)}
        for slug in slugs
        for settings in [declared.get(slug, {})]
    }
