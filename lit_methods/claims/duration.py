"""How long the stages of a plan will take, going by earlier runs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_methods.claims.display import clock, estimate
from lit_methods.claims.plan import Plan
from lit_methods.claims.runner import Result, Runner


def earlier_seconds(root: Path) -> dict[str, list[float]]:
    """Kind of stage -> seconds of each finished run below ``<root>/stages``; damaged results and those without a kind are left out."""
    took: dict[str, list[float]] = {}
    for file in sorted((root / "stages").glob("*/result.json")):
        try:
            result = json.loads(file.read_text(encoding="utf-8"))
            took.setdefault(result["kind"], []).append(float(result["seconds"]))
        except (ValueError, KeyError, TypeError):
            continue
    return took


def duration_line(plan: Plan, runner: Runner, jobs: int, record: Mapping[str, Any] | None) -> str:
    """What is kept, and about how long the rest takes.

    Args:
        plan: All stages.
        runner: Knows which of them are kept.
        jobs: Stages at a time.
        record: Stored evidence of the same stages (``seconds``, ``stages``, ``machine``), or None. It counts where none of the remaining
            stages has run here.

    Returns:
        A sentence; it says so where no estimate can be made.
    """
    results: dict[str, Result] = {}
    rest = []
    for node in plan.nodes:
        upstream = results.get(node.upstream.key) if node.upstream else None
        result = None
        if node.upstream is None or upstream is not None:
            result, _ = runner.cached(node, upstream)
        if result is None:
            rest.append(node.kind)
        else:
            results[node.key] = result
    if not rest:
        return "all stages are kept from before: only the cost, where one is declared, is measured again"
    kept = f"{len(results)} kept from before; " if results else ""
    left = f"{kept}{len(rest)} to run with --jobs {jobs}"
    took = {kind: seconds for kind, seconds in earlier_seconds(runner.root).items() if kind in rest}
    if took:
        known = sum(kind in took for kind in rest)
        others = "" if known == len(rest) else f"; {len(rest) - known} of a kind that never ran are taken to be as long as the others"
        return f"{left}: about {clock(estimate(took, rest, jobs))}, from earlier runs here{others}"
    if record:
        seconds = record["seconds"] / record["stages"] * len(rest) / jobs
        return f"{left}: about {clock(seconds)}, if this machine is like that of the stored evidence ({record['machine']['cpu']})"
    return f"{left}; how long that takes isn't known: none of them has run here, and no evidence is stored"
