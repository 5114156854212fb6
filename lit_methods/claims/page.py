"""The evidence page: all techniques in one table, a plot, and what was measured of each. Pure functions of what is kept."""

import re
import statistics
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lit_methods.catalog import Technique
from lit_methods.claims.evidence import Summary, cost_line, differences_lines, values_table, verdict_line
from lit_methods.claims.forest import Row, advantage, forest_plot
from lit_methods.claims.records import NOT_RUN, named_like, setting_records, verdict_of, verdicts_of

Declared = Mapping[str, Mapping[str, str]]  # slug -> setting -> what its data is

HEAD = """# Evidence

What each technique claims, and whether it holds here, in the setting that it was built with and in further ones in which nothing was tuned.
Written by `lit claims` from the files in `docs/evidence/`; nothing in it is typed by hand, and a test compares the two.

"""

PLOT = """
Each row has a scale of its own, as units differ: the end of the 95 % interval that is farther from zero stands at the edge.

![Forest plot: difference and interval of every technique in every setting](evidence.svg)

"""

READING = """
(mem): figures from memory, which were not read again.

## How to read it

- **Claim**: method and baseline run through the ordinary command with the same seeds, data and budget. The runner refuses a claim whose two
  arms differ otherwise; the differences that a claim file declares stand below, with their reasons. Further arms are ablations.
- **Setting**: the data and sizes that a claim is tried on. In the first one, hyperparameters may have been chosen by looking at results,
  and they are listed. In a further one nothing was: it is named in the claim file, committed and then run, and the page says on which
  commit it first stood as it was run. No setting is taken out because of its result; one that its file no longer has is marked.
- **Difference**: method - baseline, paired by seed, with the 95 % interval of the mean after Student's t.
- **Verdict** in a setting: *holds* if the interval excludes zero on the claimed side and every seed reaches the gate; *does not hold* if it
  lies on the other side or a certain advantage misses the gate; else *undecided*. Never from fewer than three seeds. Where a *margin* is
  named, the claim is that nothing is lost: minus the margin takes the place of zero.
- **Verdict over all settings**: *holds everywhere* if it holds in each; *holds in n of m* if it holds in n, at least one; *does not hold*
  if it holds in none and the verdict of at least one is *does not hold*; *undecided* if all are. With one setting run, its own verdict.
- **The paper's own**: at the paper's scale, on its data. Figures from small data can only show the same direction, never the same size.
- **Golden vectors**: cases made with the authors' code, or with an independent script where there is none, that ours reproduces.
- **Cost**: what a training step takes more than the baseline's, both run in turn; medians, and quartiles of the ratio over paired steps.
  Memory on a CPU is how far the process's resident memory rises during training above that at its start.
- **Again**: `lit claims <technique>`, and `--setting <name>` for one setting. Finished stages are kept as long as their configs, seeds,
  library versions and all source files that they import stay the same.
"""


def evidence_page(records: Mapping[str, Summary], techniques: Mapping[str, Technique], declared: Declared | None = None) -> str:
    """The page ``docs/evidence.md``.

    Args:
        records: Slug -> record of evidence, as stored.
        techniques: The catalogue; one without a record gets a row that says so.
        declared: Slug -> name of each setting of its claim file, the first one first -> what its data is.

    Returns:
        Markdown: totals, the plot, a table of all techniques, how to read it, and a section for each record.
    """
    declared = declared or {}
    rows = [summary_row(slug, records.get(slug), technique, declared.get(slug, {})) for slug, technique in techniques.items()]
    sections = [
        _section(slug, records[slug], technique, declared.get(slug, {})) for slug, technique in techniques.items() if slug in records
    ]
    table = "| technique | verdict | in each setting | the paper's own | cost per step |\n|---|---|---|---|---|\n" + "\n".join(rows) + "\n"
    totals = _wrapped(_totals(records, techniques, declared))
    plot = PLOT if any(slug in records for slug in techniques) else "\n"
    return HEAD + totals + plot + table + READING + "".join(sections)


def evidence_plot(records: Mapping[str, Summary], techniques: Mapping[str, Technique], declared: Declared) -> str:
    """The page's plot, an SVG: a row for each technique and setting that has a verdict."""
    rows = []
    for slug in techniques:
        kept = setting_records(records.get(slug))
        names = named_like(kept, declared.get(slug, {}))
        for name, one in kept.items():
            if one["verdict"]:
                rows.append(Row(slug, names[name], *advantage(one["verdict"], one["higher"]), one["verdict"]["verdict"]))
    return forest_plot(rows)


def _totals(records: Mapping[str, Summary], techniques: Mapping[str, Technique], declared: Declared) -> str:
    over_all, settings = Counter[str](), Counter[str]()
    for slug in techniques:
        each = verdicts_of(records.get(slug), declared.get(slug, {}))
        settings.update(each.values())
        run = [verdict for verdict in each.values() if verdict != NOT_RUN]
        if not run:
            over_all[NOT_RUN] += 1
        elif len(run) == 1:
            over_all[f"{run[0]} (one setting run)"] += 1
        else:
            over_all[re.sub(r"\d+ of \d+", "some", verdict_of(records.get(slug), {}))] += 1
    order = ("holds", "undecided", "does not hold", NOT_RUN)
    measured = settings.total() - settings[NOT_RUN]
    counts = "; ".join(f"{word}: {settings[word]}" for word in order if settings[word])
    whole = "; ".join(f"{word}: {count}" for word, count in sorted(over_all.items(), key=lambda item: -item[1]))
    return f"**{len(techniques)} techniques**: {whole}. **{measured} settings run**, by verdict: {counts}.\n"


def summary_row(slug: str, record: Summary | None, technique: Technique, declared: Mapping[str, str] | None = None) -> str:
    """One row of the page's table; the verdict stands beside the name, where a phone shows it."""
    declared = declared or {}
    name = slug.replace("_", "\\_<wbr>")
    if not setting_records(record):
        return f"| [{name}](techniques/{technique.slug}.md) | {NOT_RUN} | - | - | - |"
    assert record is not None  # it has settings
    kept = setting_records(record)
    names = named_like(kept, declared)
    each = []
    for key, one in kept.items():
        method, baseline, verdict = one["judged"][0], one["reference"], one["verdict"]
        means = [statistics.fmean(one["values"][arm]) for arm in (method, baseline)]
        figures = f"{means[0]:.3g} against {means[1]:.3g}: {verdict['mean']:+.3g} [{verdict['low']:+.3g}, {verdict['high']:+.3g}]"
        label = f"{text(names[key])}: " if names[key] else ""
        word = f", {verdict['verdict']}" if len(kept) > 1 else ""
        each.append(f"{label}{figures}{word}")
    each += [f"{text(key)}: {NOT_RUN}" for key in declared if key not in names.values()]
    cost, paper = record.get("cost"), next(iter(kept.values()))["paper"]
    price = f"{cost['added_seconds']:+.2g} s (x {cost['ratio']:.2f}), {cost['added_mib']:+.0f} MiB" if cost else "-"
    theirs = paper_figures(paper) or "-"
    return f"| [{name}](#{slug}) | **{verdict_of(record, declared)}** | {'<br>'.join(each)} | {theirs} | {price} |"


def paper_figures(paper: Mapping[str, Any]) -> str:
    """The paper's own two figures, with (mem) behind those from memory; "" where there are none."""
    if "method" not in paper:
        return ""
    memory = paper.get("memory") or ()
    from_memory = ("method", "baseline") if memory is True else memory
    sides = [f"{paper[side]}{' (mem)' if side in from_memory else ''}" for side in ("method", "baseline")]
    return f"{sides[0]} against {sides[1]} {text(str(paper.get('unit', '')))}".strip()


def _section(slug: str, record: Summary, technique: Technique, declared: Mapping[str, str]) -> str:
    kept = setting_records(record)
    names = named_like(kept, declared)
    first = next(iter(kept.values()))
    lines = [f"\n## {slug}\n", _wrapped(f"{text(technique.title)}: [its page](techniques/{slug}.md).")]
    lines += [_wrapped(f"**Claim.** {text(first['sentence'])}"), f"**Verdict over all settings: {verdict_of(record, declared)}.**\n"]
    lines += ['<details markdown="1">', f"<summary>{_count(declared, names)}, every seed, budget, cost, run</summary>\n"]
    lines += [_wrapped(f"Source: {text(first['source'])}.")]
    paper = first["paper"]
    if paper:
        figures = f": {paper_figures(paper)}" if "method" in paper else ""
        note = f" {text(paper['note'])}" if paper.get("note") else ""
        lines.append(_wrapped(f"**In the paper.** {text(paper['headline'])}{figures}.{note}"))
    for key, one in kept.items():
        lines += _setting(one, names[key], key == next(iter(kept)), declared, first["sentence"])
    waiting = [key for key in declared if key not in names.values()]
    lines += [_wrapped(f"**Setting {code(key)}**: {text(declared[key])}. {NOT_RUN.capitalize()}.") for key in waiting]
    if cost := record.get("cost"):
        measured = cost.get("measured")
        when = ""
        if measured:
            load = f", with a load of {measured['load']:.1f} on {measured['cores']} cores" if "load" in measured else ""
            commit = f", commit {measured['git']['commit'][:9]}" if measured["git"] else ""
            when = f" Measured by itself on {measured['date']}{commit}, {measured['cpu']}{load}."
        lines.append(
            _wrapped(
                f"**Cost.** {text(cost['method'])} against {text(cost['baseline'])}, per training step: {cost_line(cost)}. Of a step "
                f"{cost['data_seconds']:.2g} s pass before it starts (data). {cost['pairs']} paired steps, trainable parameters "
                f"{cost['parameters']:,} against {cost['baseline_parameters']:,}, memory: {text(cost['memory'])}.{when}"
            )
        )
    if golden := first.get("golden"):
        kinds = ", ".join(f"{text(kind)} {passed} of {total}" for kind, (passed, total) in golden.items())
        lines.append(_wrapped(f"**Golden vectors passed.** {kinds}."))
    return "\n".join([*lines, "</details>\n"])


def _count(declared: Mapping[str, str], names: Mapping[str, str]) -> str:
    count = len(set(names.values()) | set(declared))
    return f"{count} setting{'s' if count > 1 else ''}"


def _setting(record: Summary, name: str, first: bool, declared: Mapping[str, str], sentence: str) -> list[str]:
    """What was measured in one setting."""
    machine, versions, git = record["machine"], record["versions"], record["git"]
    lines = []
    data = str(record.get("data") or declared.get(name, ""))
    if name:
        real = " Real data." if record.get("real") else ""
        gone = "" if not declared or name in declared else " It is no longer in the claim file."
        named = ""
        if not first:
            commit = record.get("named")
            where = f"Named on commit {commit['commit'][:9]} of {commit['date']}" if commit else "Its commit isn't known: no git checkout"
            named = f" {where}; nothing was tuned in it."
        lines.append(_wrapped(f"**Setting {code(name)}**: {text(data)}.{real}{named}{gone}"))
        if record["sentence"] != sentence:
            lines.append(_wrapped(f"Claim here: {text(record['sentence'])}"))
    lines.append(_wrapped(f"Metric: {code(record['metric'])}, {'higher' if record['higher'] else 'lower'} is better."))
    lines += [values_table(record), "", _wrapped(f"**Verdict.** {verdict_line(record)}.")]
    budget = "; ".join(f"{arm} {_budget(seen)}" for arm, seen in record["budget"].items())
    lines.append(_wrapped(f"**Budget.** Equal in {' and '.join(record['units'])} unless declared. Measured: {budget}."))
    if first:
        tuned = "; ".join(f"{arm}: {', '.join(map(code, keys)) or 'none'}" for arm, keys in record["tuned"].items())
        lines.append(_wrapped(f"**Tuned hyperparameters.** {tuned}."))
    if listed := differences_lines(record):
        lines += ["**Differences.**\n", *(f"- {text(line)}" for line in listed), ""]
    if record["changes"]:
        lines.append(f"**Further arms**, with what they set otherwise ({text(record['judged'][0])}'s value in brackets):\n")
        for arm, changed in record["changes"].items():
            lines.append(f"- {text(arm)}: {', '.join(map(code, changed)) or 'nothing'}")
        lines.append("")
    commit = f"commit {git['commit']}{' with uncommitted changes' if git['dirty'] else ''}" if git else "no git checkout"
    gpus = f", {', '.join(machine['gpus'])}" if machine["gpus"] else ", no GPU"
    lines.append(
        _wrapped(
            f"**Run.** {record['date']}, {commit}; {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB{gpus}; "
            f"{', '.join(f'{name} {number}' for name, number in versions.items())}; {record['stages']} stages of {record['threads']} "
            f"thread{'s' if record['threads'] > 1 else ''} each, {record['seconds'] / 60:.0f} minutes in all."
        )
    )
    return lines


def _budget(seen: Sequence[Mapping[str, float]]) -> str:
    return ", ".join(f"{seen[0][unit]:,.0f} {unit}" for unit in seen[0])


# ---- Markdown --------------------------------------------------------------------------------------------------------------------------


def text(words: str) -> str:
    """Words of a file as they are: what would be markup in Markdown, HTML or a table is escaped."""
    words = re.sub(r"([\\`*|\[\]])", r"\\\1", words.replace("&", "&amp;").replace("<", "&lt;"))
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", words)


def code(words: str) -> str:
    """Words as code, with a fence that is longer than any of backticks in them."""
    fence = "`" * (max(map(len, re.findall("`+", words)), default=0) + 1)
    return f"{fence} {words} {fence}" if "`" in words else f"`{words}`"


def _wrapped(paragraph: str) -> str:
    """A paragraph in lines of 140 characters, none of which begins like an item of a list or a heading."""
    glued = re.sub(r" (?=(?:[-+*#>]|\d+[.)])(?: |$))", "\N{NO-BREAK SPACE}", paragraph)
    lines = textwrap.wrap(glued, 140, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines).replace("\N{NO-BREAK SPACE}", " ") + "\n"
