"""``lit claims`` and ``lit compare``. Neither imports torch: the runs have processes of their own."""

import argparse
import json
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_methods.catalog import configs_folder, techniques
from lit_methods.cli.commands import Parser, parsed
from lit_methods.errors import CommandError, suggest

if TYPE_CHECKING:
    from lit_methods.claims.study import Study

_PASSED_ON = ("--data", "--model", "--trainer", "--optimizer", "--lr_scheduler")


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Our own words, and those for every stage: ``--data…``, ``--model…``, ``--trainer…`` with their values."""
    own: list[str] = []
    passed: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith(_PASSED_ON):
            own.append(word)
            continue
        passed.append(word)
        if "=" not in word and rest and not rest[0].startswith("--"):
            passed.append(rest.pop(0))
    return own, passed


def find_studies(folder: str, names: Sequence[str]) -> dict[str, Path]:
    """Files ``configs/<folder>/<name>.yaml`` of the current folder, then of the package; all of them without names.

    Raises:
        CommandError: There is no such file; the message holds the nearest names.
    """
    known = {path.stem: path for base in (configs_folder(), Path("configs")) for path in sorted((base / folder).glob("*.yaml"))}
    for name in names:
        if name not in known:
            what = "claim" if folder == "claims" else "comparison"
            raise CommandError(f"no {what} called {name!r}: looked for configs/{folder}/{name}.yaml{suggest(name, known)}")
    return {name: known[name] for name in (names or sorted(known))}


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
    parser.add_argument("--quick", action="store_true", help="smoke: one seed, two batches, no verdict and no evidence")
    parser.add_argument("--plan", action="store_true", help="check the file and its fairness, list the stages, run nothing")
    parser.add_argument("--jobs", type=int, default=1, help="stages at a time; results don't depend on it")
    parser.add_argument("--root", type=Path, default=Path("runs/claims"), help="folder of the stages and results (default: %(default)s)")
    parser.add_argument("--wandb", action="store_true", help="log every stage to W&B, grouped by claim, arm and seed")
    if claims:
        parser.add_argument("--no-evidence", action="store_true", help="leave docs/evidence as it is")
        parser.add_argument("--page", action="store_true", help="only write the evidence page anew from the stored results")
    return parser


def claims(words: list[str]) -> int:
    """``lit claims [technique]...``."""
    return _command("claims", words)


def compare(words: list[str]) -> int:
    """``lit compare <family>``."""
    return _command("compare", words)


def _command(command: str, words: list[str]) -> int:
    own, passed = split_words(words)
    options = parsed(_parser(command), own)
    if options is None:
        return 0
    if options.jobs < 1:
        raise CommandError(f"--jobs must be 1 or more, got {options.jobs}")
    if command == "claims" and options.page:
        print(write_page(options.root))
        return 0
    from lit_methods.claims.runner import stops_on_sigterm

    studies = find_studies(command, options.names)
    status = 0
    try:
        with stops_on_sigterm():
            for name, file in studies.items():
                try:
                    _run_one(command, name, file, options, passed)
                except CommandError as error:  # the others can still run
                    if len(studies) == 1:
                        raise
                    print(f"error: {error}", flush=True)
                    status = max(status, error.exit_code)
    except KeyboardInterrupt:
        print(f"\nstopped; finished stages are kept. Go on: lit {command} {shlex.join(words)}".rstrip())
        return 130
    return status


def _run_one(command: str, name: str, file: Path, options: argparse.Namespace, passed: list[str]) -> None:
    from lit_methods.claims.cost import cost_nodes, measure
    from lit_methods.claims.display import Display
    from lit_methods.claims.plan import QUICK, make_plan
    from lit_methods.claims.runner import Runner
    from lit_methods.claims.study import read_study
    from lit_methods.claims.summary import check_before, summarise

    study = read_study(file, "claim" if command == "claims" else "compare")
    seeds = list(dict.fromkeys(options.seeds or study.seeds))
    if options.quick:
        seeds = seeds[:1]
    extra = [*(["--config", "configs/logger/wandb.yaml"] if options.wandb else []), *(QUICK if options.quick else []), *passed]
    print(f"{name}: {study.sentence}", flush=True)
    plan = make_plan(study, seeds, extra)
    found = check_before(study, plan, file)
    runner = Runner(options.root, study.threads, name)
    if options.plan:
        for node in plan.nodes:
            print(f"  {node.name:50} {', '.join(node.arms)}")
        print(f"{len(plan.nodes)} stages; the arms' configs are fair as declared")
        return
    display = Display(len(plan.nodes), options.jobs)
    try:
        results = runner.run(plan.nodes, options.jobs, display)
    finally:
        display.close()
    summary: dict[str, Any] = summarise(study, plan, seeds, results, found, file, strict=not options.quick)
    rounds = {}
    if study.cost is not None:
        print("cost: both arms in turn, nothing beside them", flush=True)
        steps, turns = (8, 1) if options.quick else (study.cost.steps, 3)
        rounds = measure(runner, cost_nodes(study.cost, plan, seeds[0], steps, turns))
    summary["overrides"] = [*passed, *(QUICK if options.quick else [])]
    gpus = sorted({gpu for result in results.values() for gpu in _gpus(runner.root / result["run"])})
    folder = options.root / (name if command == "claims" else f"compare-{name}")
    folder.mkdir(parents=True, exist_ok=True)
    if command == "claims":
        _conclude_claim(study, summary, rounds, folder, gpus, options)
    else:
        _conclude_comparison(summary, rounds, folder, gpus)
    kept = f", {display.cached} of them kept from before" if display.cached else ""
    print(f"{len(plan.nodes)} stages{kept}; {time.monotonic() - display.started:.0f} s here, {summary['seconds']:.0f} s of stages in all")


def _conclude_claim(
    study: "Study", summary: dict[str, Any], rounds: Any, folder: Path, gpus: list[str], options: argparse.Namespace
) -> None:
    from lit_methods.claims.cost import compare_cost
    from lit_methods.claims.evidence import cost_line, differences_lines, facts, summary_row, values_table, verdict_line
    from lit_methods.files import write_json

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
        print("smoke only: no verdict")
        write_json(folder / "quick.json", summary)
        return
    print(verdict_line(summary))
    checkout = find_checkout()
    technique = techniques().get(study.slug)
    tell = summary["verdict"] is not None and technique is not None and not summary["overrides"] and not options.no_evidence
    summary |= facts(checkout if tell else None, study.slug, gpus)
    write_json(folder / "summary.json", summary)
    if technique is not None and summary["verdict"] is not None:
        (folder / "row.md").write_text(summary_row(study.slug, summary, technique) + "\n", encoding="utf-8")
    if tell:
        store = evidence_folder(checkout, options.root)
        store.mkdir(parents=True, exist_ok=True)
        write_json(store / f"{study.slug}.json", summary)
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
    from lit_methods.claims.comparison import comparison_plot, comparison_table, step_seconds
    from lit_methods.claims.evidence import differences_lines, facts
    from lit_methods.files import write_json

    summary["cost"] = step_seconds(rounds)
    summary |= facts(find_checkout(), "", gpus)
    differences = "".join(f"- {line}\n" for line in differences_lines(summary))
    table = comparison_table(summary)
    print(f"\n{table}\n\n{differences}", end="")
    write_json(folder / "compare.json", summary)
    plot = comparison_plot(summary)
    (folder / "compare.svg").write_text(plot, encoding="utf-8")
    note = f"\nNot the whole task; run with {shlex.join(summary['overrides'])}\n" if summary["overrides"] else ""
    text = f"# {summary['sentence']}\n{note}\nMetric: `{summary['metric']}`.\n\n{table}\n\n![plot](compare.svg)\n\n{differences}"
    (folder / "compare.md").write_text(text, encoding="utf-8")
    print(f"{folder}/compare.md, compare.json, compare.svg")


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
    """Write the evidence page from the stored records; its path."""
    from lit_methods.claims.evidence import evidence_page

    folder = evidence_folder(find_checkout(), root)
    records = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    page = folder.with_suffix(".md")
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(evidence_page(records, {slug: entry for slug, entry in techniques().items() if not entry.draft}), encoding="utf-8")
    return page
