"""Tables and the evidence page, as pure functions of what was measured; and the facts that a record of evidence holds beside it."""

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

from lit_methods.catalog import Technique
from lit_methods.claims.plan import library_versions

Summary = Mapping[str, Any]

# ---- tables ----------------------------------------------------------------------------------------------------------------------------


def values_table(summary: Summary) -> str:
    """Markdown table with a row for each arm and each further figure: the value of every seed, mean and standard deviation."""
    seeds = summary["seeds"]
    lines = [f"| arm | {' | '.join(f'seed {seed}' for seed in seeds)} | mean | std |", "|---|" + "---|" * (len(seeds) + 2)]
    rows = {name: values for name, values in summary["values"].items()}
    rows |= {f"{report['name']} (`{report['metric']}`)": report["values"] for report in summary["reports"]}
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
    return (
        f"{method} - {baseline}: {verdict['mean']:+.4g}, paired 95 % t-interval [{verdict['low']:+.4g}, {verdict['high']:+.4g}], "
        f"better in {verdict['better']} of {len(summary['seeds'])} seeds, gate {summary['gate']:g}: {verdict['verdict']}"
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


def summary_row(slug: str, record: Summary | None, technique: Technique) -> str:
    """One row of the page's table."""
    if record is None:
        return f"| {_page_link(technique)} | {technique.claim or '-'} | not yet run | - | - | - | - | - |"
    method, baseline, verdict = record["judged"][0], record["reference"], record["verdict"]
    means = [statistics.fmean(record["values"][arm]) for arm in (method, baseline)]
    ours = f"{means[0]:.3g} against {means[1]:.3g}: {verdict['mean']:+.3g} [{verdict['low']:+.3g}, {verdict['high']:+.3g}]"
    paper = record["paper"]
    theirs = f"{paper['method']} against {paper['baseline']} {paper.get('unit', '')}".strip() if "method" in paper else "-"
    golden, cost = record["golden"], record["cost"]
    cases = "-"
    if golden:
        whole = sum(passed == total for passed, total in golden.values())
        cases = f"{whole} of {len(golden)} kinds, {sum(passed for passed, _ in golden.values())} cases"
    price = f"{cost['added_seconds']:+.2g} s (x {cost['ratio']:.2f}), {cost['added_mib']:+.0f} MiB" if cost else "-"
    git = record["git"]
    commit = f"{git['commit'][:9]}{' + changes' if git['dirty'] else ''}" if git else "-"
    cells = [f"[{slug}](#{slug})", record["sentence"], f"**{verdict['verdict']}**", ours, theirs, cases, price]
    return f"| {' | '.join(cells)} | {record['date']}, {commit}, {record['machine']['cpu']} |"


def _page_link(technique: Technique) -> str:
    return f"[{technique.slug}](techniques/{technique.slug}.md)"


HEAD = """# Evidence

What each technique claims, and whether it holds here. Written by `lit claims` from the files in `docs/evidence/`; nothing in it is typed by
hand, and a test compares the two.

| technique | claim | verdict | here: method, baseline, difference [95 %] | the paper's own | golden vectors | cost per step | run |
|---|---|---|---|---|---|---|---|
"""

READING = """
## How to read it

- **Claim**: method and baseline run through the ordinary command with the same seeds, data and budget. The runner refuses a claim whose two
  arms differ otherwise; the differences that a claim file declares stand below, with their reasons. Further arms are ablations.
- **Difference**: method - baseline, paired by seed, with the 95 % interval of the mean after Student's t.
- **Verdict**: *holds* if the interval excludes zero on the claimed side and every seed reaches the gate; *does not hold* if it lies on the
  other side or a certain advantage misses the gate; else *undecided*. Never from fewer than three seeds.
- **The paper's own**: at the paper's scale, on its data. Figures from built-in data can only show the same direction, never the same size.
- **Golden vectors**: cases made with the authors' code, or with an independent script where there is none, that ours reproduces.
- **Cost**: what a training step takes more than the baseline's, both run in turn with nothing beside them; medians, and quartiles of the
  ratio over paired steps. Memory on a CPU is how far the process's resident memory rises during training above that at its start.
- **Again**: `lit claims <technique>`. Finished stages are kept as long as their configs, seeds, library versions and all source files that
  they import stay the same.
"""


def evidence_page(
    records: Mapping[str, Summary], techniques: Mapping[str, Technique], declared: Mapping[str, Mapping[str, str]] | None = None
) -> str:
    """The page ``docs/evidence.md``.

    Args:
        records: Slug -> record of evidence, as stored.
        techniques: The catalogue; one without a record gets a row that says so.
        declared: Slug -> name of each setting of its claim file -> what its data is.

    Returns:
        Markdown: a table of all techniques, how to read it, and a section for each record.
    """
    records = {slug: record for slug, record in records.items() if "verdict" in record}
    rows = [summary_row(slug, records.get(slug), technique) for slug, technique in techniques.items()]
    sections = [_section(slug, records[slug], technique) for slug, technique in techniques.items() if slug in records]
    return HEAD + "\n".join(rows) + "\n" + READING + "".join(sections)


def _section(slug: str, record: Summary, technique: Technique) -> str:
    machine, versions, git, paper = record["machine"], record["versions"], record["git"], record["paper"]
    lines = [f"\n## {slug}\n", f"{technique.title}: [its page](techniques/{slug}.md).\n", f"**Claim.** {record['sentence']}\n"]
    lines += [f"Source: {record['source']}. Metric: `{record['metric']}`, {'higher' if record['higher'] else 'lower'} is better.\n"]
    lines += [values_table(record), "", f"**Verdict.** {verdict_line(record)}.\n"]
    if paper:
        figures = f": {paper['method']} against {paper['baseline']} {paper.get('unit', '')}".rstrip() if "method" in paper else ""
        note = f" {paper['note']}" if paper.get("note") else ""
        lines.append(f"**In the paper.** {paper['headline']}{figures}.{note}\n")
    budget = "; ".join(f"{arm} {_budget(seen)}" for arm, seen in record["budget"].items())
    lines.append(f"**Budget.** Equal in {' and '.join(record['units'])} unless declared. Measured: {budget}.\n")
    tuned = "; ".join(f"{arm}: {', '.join(f'`{key}`' for key in keys) or 'none'}" for arm, keys in record["tuned"].items())
    lines.append(f"**Tuned hyperparameters.** {tuned}.\n")
    if listed := differences_lines(record):
        lines += ["**Differences.**\n", *(f"- {line}" for line in listed), ""]
    if record["changes"]:
        lines.append(f"**Further arms**, with what they set otherwise ({record['judged'][0]}'s value in brackets):\n")
        for arm, changed in record["changes"].items():
            lines.append(f"- {arm}: {', '.join(f'`{text}`' for text in changed) or 'nothing'}")
        lines.append("")
    if record["cost"]:
        cost = record["cost"]
        lines.append(
            f"**Cost.** {cost['method']} against {cost['baseline']}, per training step: {cost_line(cost)}. Of a step "
            f"{cost['data_seconds']:.2g} s pass before it starts (data). {cost['pairs']} paired steps, trainable parameters "
            f"{cost['parameters']:,} against {cost['baseline_parameters']:,}, memory: {cost['memory']}.\n"
        )
    if record["golden"]:
        kinds = ", ".join(f"{kind} {passed} of {total}" for kind, (passed, total) in record["golden"].items())
        lines.append(f"**Golden vectors passed.** {kinds}.\n")
    commit = f"commit {git['commit']}{' with uncommitted changes' if git['dirty'] else ''}" if git else "no git checkout"
    gpus = f", {', '.join(machine['gpus'])}" if machine["gpus"] else ", no GPU"
    lines.append(
        f"**Run.** {record['date']}, {commit}; {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB{gpus}; "
        f"{', '.join(f'{name} {number}' for name, number in versions.items())}; {record['stages']} stages of {record['threads']} "
        f"thread{'s' if record['threads'] > 1 else ''} each, {record['seconds'] / 60:.0f} minutes in all.\n"
    )
    return "\n".join(lines)


def _budget(seen: Sequence[Mapping[str, float]]) -> str:
    return ", ".join(f"{seen[0][unit]:,.0f} {unit}" for unit in seen[0])


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

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(checkout), *words], capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)docs/evidence*")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changed)}
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
