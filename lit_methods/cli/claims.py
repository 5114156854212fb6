"""``lit claims`` and ``lit compare``. Neither imports torch: the runs have processes of their own."""

import argparse
import json
import os
import re
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_methods.catalog import configs_folder, techniques
from lit_methods.cli.commands import Parser, parsed
from lit_methods.errors import CommandError, suggest
from lit_methods.files import write_atomically, write_json

if TYPE_CHECKING:
    from lit_methods.claims.plan import Plan
    from lit_methods.claims.study import Study

QUICK_NOTE = "A quick run's figures mean nothing: two training batches, one validation batch. It shows that every stage runs."
_PASSED_ON = ("--data", "--model", "--trainer", "--optimizer", "--lr_scheduler")


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Our own words, and those for every stage: ``--data…``, ``--model…``, ``--trainer…`` with their values."""
    ours: list[str] = []
    passed: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith(_PASSED_ON):
            ours.append(word)
            continue
        passed.append(word)
        if "=" not in word and rest and not rest[0].startswith("--"):
            passed.append(rest.pop(0))
    return ours, passed


def find_studies(folder: str, names: Sequence[str]) -> dict[str, Path]:
    """Files ``configs/<folder>/<name>.yaml`` of the current folder, then of the package; all of them without names.

    Config files that a setting lays over its arms may stand beside them, and are left out.

    Raises:
        CommandError: There is no such file; the message holds the nearest names.
    """
    files = [path for base in (configs_folder(), Path("configs")) for path in sorted((base / folder).glob("*.yaml"))]
    known = {path.stem: path for path in files if _is_study(path)}
    for name in names:
        if name not in known:
            what, stem = "claim" if folder == "claims" else "comparison", Path(name).stem
            raise CommandError(f"no {what} called {name!r}: looked for configs/{folder}/{stem}.yaml{suggest(stem, known)}")
    return {name: known[name] for name in (names or sorted(known))}


def _is_study(path: Path) -> bool:
    text = path.read_text(encoding="utf-8", errors="replace")
    keys = set(re.findall(r"^(\w+)\s*:", text, flags=re.M))
    return bool(keys & {"claim", "question", "arms", "metric"}) or not keys & {"model", "data", "trainer"}


def _parser(command: str) -> Parser:
    claims = command == "claims"
    what = "Re-show the claims of papers: method against baseline over several seeds, fairness checked, verdict, evidence."
    parser = Parser(
        prog=f"lit {command}",
        description=what if claims else "All techniques of a family on one task at equal budget.",
        epilog="Further words for every stage: --data.KEY VALUE, --model.KEY VALUE, --trainer.KEY VALUE. A run that was interrupted "
        "goes on with the same command: finished stages are kept while configs, seeds, versions and imported sources stay the same.",
    )
    parser.add_argument(
        "names", nargs="*" if claims else "+", metavar="technique" if claims else "family", help="such as superflow" * claims
    )
    parser.add_argument("--seeds", nargs="+", type=int, help="instead of those of the file; a verdict needs three")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="smoke: one seed, two batches, one validation; figures mean nothing, no verdict and no evidence",
    )
    parser.add_argument(
        "--plan", action="store_true", help="check keys and fairness, list the stages and about how long they take, run nothing"
    )
    parser.add_argument("--jobs", type=int, default=1, help="stages at a time; results don't depend on it")
    parser.add_argument("--root", type=Path, default=Path("runs/claims"), help="folder of the stages and results (default: %(default)s)")
    parser.add_argument("--wandb", action="store_true", help="log every stage to W&B, grouped by claim, arm and seed")
    if claims:
        parser.add_argument("--setting", help="only this one of the claim's settings")
        parser.add_argument("--cost", action="store_true", help="only time the training steps anew, and put that beside the kept results")
        parser.add_argument("--no-evidence", action="store_true", help="leave docs/evidence as it is")
        parser.add_argument(
            "--page",
            action="store_true",
            help="only write the evidence page, its plot and the list of verdicts anew from the stored results",
        )
    return parser


def claims(words: list[str]) -> int:
    """``lit claims [technique]...``."""
    return _command("claims", words)


def compare(words: list[str]) -> int:
    """``lit compare <family>``."""
    return _command("compare", words)


def _command(command: str, words: list[str]) -> int:
    ours, passed = split_words(words)
    options = parsed(_parser(command), ours)
    if options is None:
        return 0
    if options.jobs < 1:
        raise CommandError(f"--jobs must be 1 or more, got {options.jobs}")
    if command == "claims" and options.page:
        print(write_page(options.root))
        return 0
    from lit_methods.claims.plan import MissingData
    from lit_methods.claims.runner import stops_on_sigterm
    from lit_methods.claims.study import read_settings

    files = find_studies(command, options.names)
    status = 0
    try:
        with stops_on_sigterm():
            for name, file in files.items():
                try:
                    studies = _chosen(read_settings(file, "claim" if command == "claims" else "compare"), file, options)
                except CommandError as error:
                    studies, status = [], _told(error, len(files) == 1, status)
                for study in studies:
                    alone = len(files) == len(studies) == 1
                    try:
                        if command == "claims" and options.cost:
                            _measure_cost(study, name, file, options, passed)
                        else:
                            _run_one(command, study, name, file, options, passed)
                    except MissingData as error:
                        if alone:
                            raise
                        print(f"{name}, setting {study.setting}: skipped, as its data or a library isn't there\n  {error}", flush=True)
                    except CommandError as error:  # the others can still run
                        status = _told(error, alone, status)
    except KeyboardInterrupt:
        print(f"\nstopped; finished stages are kept. Go on: lit {command} {shlex.join(words)}".rstrip())
        return 130
    return status


def _told(error: CommandError, alone: bool, status: int) -> int:
    if alone:
        raise error
    print(f"error: {error}", flush=True)
    return max(status, error.exit_code)


def _chosen(settings: "dict[str, Study]", file: Path, options: argparse.Namespace) -> "list[Study]":
    """The settings that the command is about."""
    wanted = getattr(options, "setting", None)
    if wanted is None:
        return list(settings.values())[: 1 if getattr(options, "cost", False) else None]
    if wanted not in settings:
        if not options.names:
            return []
        raise CommandError(f"{file} has no setting {wanted!r}{suggest(wanted, filter(None, settings), 'it has one, without a name')}")
    return [settings[wanted]]


def _planned(study: "Study", file: Path, seeds: list[int], extra: list[str], passed: list[str]) -> "tuple[Plan, Any]":
    """The stages of a study, with its keys and its fairness checked."""
    from lit_methods.claims.keys import check_keys
    from lit_methods.claims.plan import make_plan
    from lit_methods.claims.summary import check_before

    where = file if study.first else Path(f"{file}, setting {study.setting}")
    check_keys(study, where, passed)
    plan = make_plan(study, seeds, extra)
    return plan, check_before(study, plan, where)


def _timed_plan(study: "Study", file: Path, seed: int, extra: list[str], passed: list[str]) -> "Plan":
    """The stages that are timed, and what they need."""
    from lit_methods.claims.cost import timed_study
    from lit_methods.claims.keys import check_keys
    from lit_methods.claims.plan import make_plan

    timed = timed_study(study)
    check_keys(timed, Path(f"{file}, cost"), passed)
    return make_plan(timed, [seed], extra)


def _run_one(command: str, study: "Study", name: str, file: Path, options: argparse.Namespace, passed: list[str]) -> None:
    from lit_methods.claims.cost import cost_nodes, measure
    from lit_methods.claims.display import Display
    from lit_methods.claims.duration import duration_line
    from lit_methods.claims.naming import named
    from lit_methods.claims.plan import QUICK_WORDS
    from lit_methods.claims.runner import Runner
    from lit_methods.claims.summary import summarise

    seeds = list(dict.fromkeys(options.seeds or study.seeds))
    if options.quick:
        seeds = seeds[:1]
    extra = [*(["--config", "configs/logger/wandb.yaml"] if options.wandb else []), *(QUICK_WORDS if options.quick else []), *passed]
    setting = f" in the setting {study.setting} ({study.data})" if study.setting else ""
    print(f"{name}{setting}: {study.sentence}", flush=True)
    naming = None
    if not study.first and not options.quick:
        try:
            naming = named(file, study.setting)
        except CommandError as error:
            if not options.plan:
                raise
            print(f"can't be run yet: {error}")
    plan, differences = _planned(study, file, seeds, extra, passed)
    runner = Runner(options.root, study.threads, name)
    if options.plan:
        for node in plan.nodes:
            print(f"  {node.name:50} {', '.join(node.arms)}")
        print(f"{len(plan.nodes)} stages; the arms' configs are fair as declared")
        record = None if options.quick or passed or command != "claims" else read_record(options.root, name)
        print(duration_line(plan, runner, options.jobs, _record_of(record, study)))
        return
    display = Display(len(plan.nodes), options.jobs)
    try:
        results = runner.run(plan.nodes, options.jobs, display)
    finally:
        display.close()
    summary: dict[str, Any] = summarise(study, plan, seeds, results, differences, file, strict=not options.quick)
    if not study.first:
        summary["named"] = naming
    rounds = {}
    if study.cost is not None:
        print("cost: both arms in turn, nothing beside them", flush=True)
        steps, turns = (8, 1) if options.quick else (study.cost.steps, 3)
        timed = _timed_plan(study, file, seeds[0], extra, passed) if study.cost.own else plan
        rounds = measure(runner, cost_nodes(study.cost, timed, seeds[0], steps, turns))
    summary["overrides"] = [*passed, *(QUICK_WORDS if options.quick else [])]
    if options.quick:
        summary["note"] = QUICK_NOTE
    gpus = sorted({gpu for result in results.values() for gpu in _gpus(runner.root / result["run"])})
    folder = options.root / (name if command == "claims" else f"compare-{name}") / ("" if study.first else study.setting)
    folder.mkdir(parents=True, exist_ok=True)
    if command == "claims":
        _conclude_claim(study, summary, rounds, folder, gpus, options)
    else:
        _conclude_comparison(summary, rounds, folder, gpus)
    kept = f", {display.cached} of them kept from before" if display.cached else ""
    print(f"{len(plan.nodes)} stages{kept}; {time.monotonic() - display.started:.0f} s here, {summary['seconds']:.0f} s of stages in all")


def _measure_cost(study: "Study", name: str, file: Path, options: argparse.Namespace, passed: list[str]) -> None:
    """Time the training steps of a claim and put that into its kept record; nothing else of it runs."""
    from lit_methods.claims.cost import compare_cost, cost_nodes, measure
    from lit_methods.claims.evidence import cost_line, cpu_model, git_commit
    from lit_methods.claims.runner import Runner

    if study.cost is None:
        raise CommandError(f"{file} declares no cost, such as cost: {{method: {study.judged[0]}, baseline: {study.reference}}}")
    if options.setting or options.quick or passed:
        raise CommandError("--cost times the first setting as its file has it: leave out --setting, --quick and the words for every stage")
    record = read_record(options.root, name)
    if not options.plan and (record is None or "verdict" not in record):
        raise CommandError(f"no result of {name} is kept that a cost could stand beside: run lit claims {name}")
    plan = _timed_plan(study, file, study.seeds[0], [], [])
    method, baseline = study.cost.arms
    print(f"{name}: a training step of {method} against one of {baseline}, in turn, nothing beside them", flush=True)
    nodes = cost_nodes(study.cost, plan, study.seeds[0], study.cost.steps)
    if options.plan or record is None:
        print(f"{len(nodes)} runs of {study.cost.steps} steps")
        return
    load = os.getloadavg()[0]
    rounds = measure(Runner(options.root, study.threads, name), nodes)
    cost = {"method": method, "baseline": baseline, **compare_cost(rounds[method], rounds[baseline])}
    checkout = find_checkout()
    git = git_commit(checkout) if checkout else None
    beside = {"load": round(max(load, os.getloadavg()[0]), 1), "cores": os.cpu_count()}  # of other processes, and of this one at the end
    record["cost"] = cost | {"measured": {"date": time.strftime("%Y-%m-%d"), "git": git, "cpu": cpu_model(), **beside}}
    print(f"cost per training step, {method} against {baseline}: {cost_line(record['cost'])}")
    if not options.no_evidence:
        write_json(evidence_folder(checkout, options.root) / f"{name}.json", record)
        print(f"evidence: {write_page(options.root)}")


def _conclude_claim(
    study: "Study", summary: dict[str, Any], rounds: Any, folder: Path, gpus: list[str], options: argparse.Namespace
) -> None:
    from lit_methods.claims.cost import compare_cost
    from lit_methods.claims.evidence import cost_line, differences_lines, facts, values_table, verdict_line
    from lit_methods.claims.page import summary_row
    from lit_methods.claims.records import with_setting

    summary["cost"] = None
    if study.cost is not None:
        method, baseline = study.cost.arms
        summary["cost"] = {"method": method, "baseline": baseline, **compare_cost(rounds[method], rounds[baseline])}
    print(f"\nmetric: {summary['metric']}\n\n{values_table(summary)}\n")
    for line in differences_lines(summary):
        print(f"difference: {line}")
    if summary["cost"]:
        print(f"cost per training step, {method} against {baseline}: {cost_line(summary['cost'])}")
    if options.quick:
        print(f"smoke only: no verdict. {QUICK_NOTE}")
        write_json(folder / "quick.json", summary)
        return
    print(verdict_line(summary))
    checkout = find_checkout()
    technique = techniques().get(study.slug)
    tell = summary["verdict"] is not None and technique is not None and not summary["overrides"] and not options.no_evidence
    summary |= facts(checkout if tell else None, study.slug, gpus)
    write_json(folder / "summary.json", summary)
    if technique is not None and summary["verdict"] is not None:
        write_atomically(folder / "row.md", summary_row(study.slug, summary, technique) + "\n")
    if tell:
        store = evidence_folder(checkout, options.root)
        store.mkdir(parents=True, exist_ok=True)
        write_json(store / f"{study.slug}.json", with_setting(read_record(options.root, study.slug), summary, study.first))
        print(f"evidence: {write_page(options.root)}")
    elif not options.no_evidence:
        why = (
            "words were passed on"
            if summary["overrides"]
            else "there is no verdict"
            if technique
            else "it is no technique of the catalogue"
        )
        print(f"no evidence stored, as {why}; results: {folder / 'summary.json'}")


def _conclude_comparison(summary: dict[str, Any], rounds: Any, folder: Path, gpus: list[str]) -> None:
    from lit_methods.claims.comparison import comparison_plot, comparison_table, frontier_plot, step_seconds
    from lit_methods.claims.evidence import differences_lines, facts

    summary["cost"] = step_seconds(rounds)
    summary |= facts(find_checkout(), "", gpus)
    differences = "".join(f"- {line}\n" for line in differences_lines(summary))
    table = comparison_table(summary)
    print(f"\n{table}\n\n{differences}{summary.get('note', '')}", end="")
    write_json(folder / "compare.json", summary)
    write_atomically(folder / "compare.svg", comparison_plot(summary))
    plots = ["compare.svg"]
    if summary["over"]:
        write_atomically(folder / "frontier.svg", frontier_plot(summary))
        plots.append("frontier.svg")
    said = f" {summary['note']}" if "note" in summary else ""
    note = f"\nNot the whole task; run with {shlex.join(summary['overrides'])}.{said}\n" if summary["overrides"] else ""
    text = f"# {summary['sentence']}\n{note}\nMetric: `{summary['metric']}`.\n\n{table}\n\n"
    text += "".join(f"![plot]({plot})\n\n" for plot in plots) + differences
    write_atomically(folder / "compare.md", text)
    print(f"{folder}/compare.md, compare.json, {', '.join(plots)}")


def read_record(root: Path, slug: str) -> dict[str, Any] | None:
    """The stored record of a claim; None where there is none, or it can't be read."""
    try:
        record: dict[str, Any] = json.loads((evidence_folder(find_checkout(), root) / f"{slug}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record


def _record_of(record: dict[str, Any] | None, study: "Study") -> Any:
    """What is kept of one setting of a claim, or None."""
    if record is None:
        return None
    return (record if "stages" in record else None) if study.first else (record.get("settings") or {}).get(study.setting)


def _gpus(run: Path) -> list[str]:
    file = run / "environment.json"
    return list(json.loads(file.read_text(encoding="utf-8")).get("gpus", [])) if file.is_file() else []


def find_checkout() -> Path | None:
    """Top folder of the checkout of this project that holds the current folder, or None."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "lit_methods" / "catalog.py").is_file() and (folder / "docs").is_dir() and (folder / "configs" / "claims").is_dir():
            return folder
    return None


def evidence_folder(checkout: Path | None, root: Path) -> Path:
    """Where records are stored: ``docs/evidence`` of the checkout, else ``<root>/evidence``."""
    return checkout / "docs" / "evidence" if checkout else root / "evidence"


def write_page(root: Path) -> Path:
    """Write the evidence page, its plot and the list of verdicts from the stored records; the page's path."""
    from lit_methods.claims.page import evidence_page, evidence_plot
    from lit_methods.claims.records import read_records, verdict_file, verdict_table
    from lit_methods.claims.study import read_settings

    checkout = find_checkout()
    folder = evidence_folder(checkout, root)
    records = read_records(folder)
    studies = {slug: read_settings(file) for slug, file in find_studies("claims", []).items()}
    declared = {slug: {name: study.data for name, study in settings.items()} for slug, settings in studies.items()}
    for slug, record in records.items():
        first = next(iter(studies.get(slug, {}).values()), None)
        if first is not None and redescribe(record, first):
            write_json(folder / f"{slug}.json", record)
    page = folder.with_suffix(".md")
    page.parent.mkdir(parents=True, exist_ok=True)
    finished = {slug: entry for slug, entry in techniques().items() if not entry.draft}
    write_atomically(page, evidence_page(records, finished, declared))
    write_atomically(page.with_suffix(".svg"), evidence_plot(records, finished, declared))
    if checkout and verdict_file().is_relative_to(checkout):
        write_json(verdict_file(), verdict_table(records, declared, finished))
    return page


def redescribe(record: dict[str, Any], study: "Study") -> bool:
    """Take over what the claim file says of its first setting and of the paper, which no run can change; whether anything was new."""
    if record.get("setting") not in (None, "", study.setting) or "verdict" not in record:
        return False
    told = {"setting": study.setting, "data": study.data, "real": study.real, "paper": study.paper}
    new = any(record.get(key) != value for key, value in told.items() if value or record.get(key))
    record |= told if new else {}
    return new
