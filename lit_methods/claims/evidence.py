"""Tables and lines of what was measured, as pure functions; and the facts that a record of evidence holds beside it."""

import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_methods.claims.plan import library_versions
from lit_methods.git import git

Summary = Mapping[str, Any]

_BAR = "\\|"  # which would end a table's cell

# ---- tables ----------------------------------------------------------------------------------------------------------------------------


def values_table(summary: Summary) -> str:
    """Markdown table with a row for each arm and each further figure: the value of every seed, mean and standard deviation."""
    seeds = summary["seeds"]
    lines = [f"| arm | {' | '.join(f'seed {seed}' for seed in seeds)} | mean | std |", "|---|" + "---|" * (len(seeds) + 2)]
    rows = {name: values for name, values in summary["values"].items()}
    rows |= {f"{report['name'].replace('|', _BAR)} (`{report['metric']}`)": report["values"] for report in summary["reports"]}
    for name, row in rows.items():
        cells = " | ".join(f"{value:.4g}" for value in row)
        lines.append(f"| {name} | {cells} | {statistics.fmean(row):.4g} | {spread(row)} |")
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """Standard deviation (n - 1), or "-" for one value."""
    return f"{statistics.stdev(values):.2g}" if len(values) > 1 else "-"


def verdict_line(summary: Summary) -> str:
    """Difference, interval, sign count, gate and verdict in one line."""
    method, baseline, verdict = summary["judged"][0], summary["reference"], summary["verdict"]
    if verdict is None:
        gaps = [a - b for a, b in zip(summary["values"][method], summary["values"][baseline], strict=True)]
        return f"{method} - {baseline}: {statistics.fmean(gaps):+.4g}; no verdict: that needs at least 3 seeds"
    allowed = f", margin {summary['margin']:g}" if summary.get("margin") else ""
    return (
        f"{method} - {baseline}: {verdict['mean']:+.4g}, paired 95 % t-interval [{verdict['low']:+.4g}, {verdict['high']:+.4g}], "
        f"better in {verdict['better']} of {len(summary['seeds'])} seeds, gate {summary['gate']:g}{allowed}: {verdict['verdict']}"
    )


def differences_lines(summary: Summary) -> list[str]:
    """Every difference, with its reason, one a line."""
    lines = []
    for arm, listed in summary["differences"].items():
        for one in listed:
            reason = f": {one['reason']}" if one["reason"] else " (not judged)" if arm not in summary["judged"] else ""
            lines.append(f"{arm} against {one['against']}, {one['kind']}: {one['text']}{reason}")
    return lines


def cost_line(cost: Mapping[str, Any] | None) -> str:
    """What a training step costs more than the baseline's, in words; "" if it wasn't measured."""
    if not cost:
        return ""
    low, high = cost["ratio_quartiles"]
    return (
        f"{cost['added_seconds']:+.3g} s ({cost['seconds']:.3g} against {cost['baseline_seconds']:.3g} s, ratio {cost['ratio']:.2f}, "
        f"quartiles {low:.2f} to {high:.2f}) and {cost['added_mib']:+.0f} MiB ({cost['mib']:.0f} against {cost['baseline_mib']:.0f})"
    )


# ---- facts -----------------------------------------------------------------------------------------------------------------------------


def facts(checkout: Path | None, slug: str, gpus: Sequence[str]) -> dict[str, Any]:
    """Date, git state, machine, versions and, in a checkout, the golden vectors that pass.

    Args:
        checkout: Top folder of a checkout, or None.
        slug: Technique whose golden tests run.
        gpus: Names of the GPUs that the runs saw.
    """
    return {
        "date": time.strftime("%Y-%m-%d"),
        "git": git_commit(checkout) if checkout else None,
        "machine": {"cpu": cpu_model(), "cores": os.cpu_count(), "memory_gib": _memory_gib(), "gpus": list(gpus)},
        "versions": {**library_versions(), "python": platform.python_version()},
        "golden": golden_counts(checkout, slug) if checkout else None,
    }


def git_commit(checkout: Path) -> dict[str, Any] | None:
    """``commit`` and ``dirty`` (tracked files changed, the evidence itself left out); None without git."""
    try:
        changed = git(checkout, "status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)docs/evidence*", timeout=30)
        return {"commit": git(checkout, "rev-parse", "HEAD").strip(), "dirty": bool(changed.strip())}
    except (OSError, subprocess.SubprocessError):
        return None


def cpu_model() -> str:
    """Name of the processor."""
    info = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", info.read_text(encoding="utf-8"), flags=re.M) if info.is_file() else None
    return model[1].strip() if model else platform.processor() or platform.machine()


def _memory_gib() -> int:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)


def golden_counts(checkout: Path, slug: str) -> dict[str, list[int]] | None:
    """Run the technique's golden test; kind -> [passed, cases]. None without such a test."""
    if not (checkout / "tests" / "golden" / f"test_{slug}.py").is_file():
        return None
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "golden.xml"
        command = [sys.executable, "-m", "pytest", f"tests/golden/test_{slug}.py", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
        if not report.is_file():
            raise RuntimeError(f"the golden tests of {slug} can't be run: {done.stdout[-500:]}{done.stderr[-500:]}")
        return read_golden_report(report.read_text(encoding="utf-8"))


def read_golden_report(text: str) -> dict[str, list[int]]:
    """Kind -> [passed, cases] from pytest's JUnit XML, whose cases are called ``test_golden[<kind>-<number>]``."""
    counts: dict[str, list[int]] = {}
    for case in ElementTree.fromstring(text).iter("testcase"):
        named = re.fullmatch(r"test_golden\[(.+)-[^-]+\]", case.get("name", ""))
        if named:
            failed = any(child.tag in ("failure", "error", "skipped") for child in case)
            count = counts.setdefault(named[1], [0, 0])
            count[0] += not failed
            count[1] += 1
    return dict(sorted(counts.items()))
