"""From finished stages to the summary of a study: values, fairness, verdict."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lit_methods.claims.fairness import (
    Difference,
    after_running,
    before_running,
    config_differences,
    merged,
    stale,
    undeclared,
    unknown_tuned,
)
from lit_methods.claims.plan import Node, Plan
from lit_methods.claims.runner import Result, value_of
from lit_methods.claims.study import UNITS, Study
from lit_methods.claims.verdict import LEAST_SEEDS, judge, t_interval
from lit_methods.errors import CommandError


def check_before(study: Study, plan: Plan, file: Path) -> dict[str, list[Difference]]:
    """Differences that the configs show, for every arm but the reference (against it, or for an ablation against the method).

    Raises:
        CommandError: A judged arm has one that isn't declared; a declared one doesn't exist; a tuned key doesn't exist.
    """
    if missing := unknown_tuned(study.tuned, plan.resolved):
        raise CommandError(f"{file}: tuned names keys that no stage of the arm has: {', '.join(missing)}")
    differences = {
        arm: before_running(arm, study.against(arm), plan.resolved, seed_keys=study.seed_keys, tuned=study.tuned, units=study.units)
        for arm in study.arms
        if arm != study.reference
    }
    for arm in study.judged:
        declared = study.differences.get(arm, {})
        _refuse(study, file, arm, undeclared(differences[arm], declared))
        decided = ("data", "seeds", "tuned", *(unit for unit in UNITS if unit not in study.units))
        _refuse_stale(file, arm, study, stale(differences[arm], declared, decided))
    return differences


def check_after(
    study: Study, before: Mapping[str, Sequence[Difference]], measured: Mapping[str, list[dict[str, float]]], file: Path, strict: bool
) -> dict[str, list[Difference]]:
    """All differences of each arm: those that the configs showed, and those of what was measured.

    Args:
        study: What the file declares.
        before: What :func:`check_before` returned.
        measured: Arm -> for each seed ``steps``, ``parameters`` and perhaps ``flops``.
        file: For messages.
        strict: Whether a declared difference that wasn't measured is an error.

    Raises:
        CommandError: As in :func:`check_before`.
    """
    every = {}
    for arm in before:
        later = after_running(measured, arm, study.against(arm), study.units, study.tolerance)
        every[arm] = merged([*before[arm], *later])
        if arm in study.judged:
            declared = study.differences.get(arm, {})
            _refuse(study, file, arm, undeclared(every[arm], declared))
            if strict:
                _refuse_stale(file, arm, study, stale(every[arm], declared, study.units))
    return every


def _refuse(study: Study, file: Path, arm: str, differences: Sequence[Difference]) -> None:
    if differences:
        lines = [f"{file}: {arm} and {study.reference} don't have the same chances; {arm}'s ({study.reference}'s):"]
        lines += [f"  {difference.kind}: {difference.text}" for difference in differences]
        lines += ["make them equal, or say in the file why the difference belongs to it:", "  differences:"]
        indent = "    "
        if study.kind == "compare":
            lines, indent = [*lines, f"    {arm}:"], "      "
        lines += [f'{indent}{kind}: "the reason in words"' for kind in dict.fromkeys(difference.kind for difference in differences)]
        raise CommandError("\n".join(lines))


def _refuse_stale(file: Path, arm: str, study: Study, kinds: Sequence[str]) -> None:
    if kinds:
        raise CommandError(f"{file}: differences declares {', '.join(kinds)}, but there {arm} and {study.reference} are equal: remove it")


def measured_budget(chain: Sequence[Node], results: Mapping[str, Result]) -> dict[str, float]:
    """What an arm used for one seed: optimiser steps and operations of all its fits, the largest number of trainable parameters."""
    costs = [results[node.key]["cost"] for node in chain if node.fits]
    budget: dict[str, float] = {
        "steps": sum(cost["steps"] for cost in costs),
        "parameters": max((cost["parameters"] for cost in costs), default=0),
    }
    if costs and all(cost["flops_per_batch"] is not None for cost in costs):
        budget["flops"] = sum(cost["flops_per_batch"] * cost["batches"] for cost in costs)
    return budget


def changes(study: Study, plan: Plan, arm: str, other: str) -> list[str]:
    """What an arm's configs set otherwise than another's, stage by stage, where both have as many stages; else a word on that.

    Keys are those of ``lit report``: an item of a list that names a class goes by that class. Of an item that one of them lacks, only its
    class is listed.
    """
    from lit_methods.reports.record import flat_config

    ours, theirs = plan.resolved[arm], plan.resolved[other]
    if len(ours) != len(theirs):
        return [f"{len(ours)} stages ({len(theirs)})"]
    pairs = [[flat_config(yaml.safe_dump(stage.config, sort_keys=False)) for stage in pair] for pair in zip(ours, theirs, strict=True)]
    changed = list(dict.fromkeys(text for one, another in pairs for text in config_differences(one, another)))
    items = (re.match(r"(.+\])\.class_path: (?:None \(|.+ \(None\)$)", text) for text in changed)
    lacking = tuple(f"{item[1]}." for item in items if item)
    return [text for text in changed if not text.startswith(lacking) or ".class_path: " in text]


def summarise(
    study: Study,
    plan: Plan,
    seeds: Sequence[int],
    results: Mapping[str, Result],
    before: Mapping[str, Sequence[Difference]],
    file: Path,
    strict: bool = True,
) -> dict[str, Any]:
    """The content of ``summary.json`` and ``compare.json``.

    Returns:
        ``kind``, ``slug``, ``sentence``, ``source``, ``metric``, ``higher``, ``gate``, ``margin``, ``seeds``, ``reference``, ``judged``,
        ``units``, ``tolerance``, ``threads``, ``tuned``, ``paper``, of a claim ``setting``, ``data``, ``real``, of a comparison ``over``:
        as in the file. ``values``: arm -> value for each seed. ``reports``: list of ``name``, ``arm``, ``metric``, ``values``. ``budget``:
        arm -> for each seed what was measured. ``differences``: arm -> list of ``kind``, ``text``, ``against``, ``reason`` (null where none
        is declared). ``changes``: further arms -> what their configs set otherwise than the method's. ``seconds``: sum over all ``stages``.
        ``intervals``: arm -> mean, low, high of the difference to the reference, from two seeds on. ``verdict``: for a claim with three
        seeds or more, else null. The command adds ``cost``, ``overrides``, of a further setting ``named``
        (:func:`lit_methods.claims.naming.named`), and the facts of :func:`lit_methods.claims.evidence.facts`.

    Raises:
        CommandError: A metric is missing or not finite; the arms turn out to be unfair.
    """
    values = {arm: [_last(plan, arm, seed, results, study.metric) for seed in seeds] for arm in study.arms}
    reports = []
    for report in study.reports:
        name = f"report: {report.name}" if report.stage else report.arm
        reported = [_last(plan, name, seed, results, report.metric) for seed in seeds]
        reports.append({"name": report.name, "arm": report.arm, "metric": report.metric, "values": reported})
    budget = {arm: [measured_budget(plan.chains[arm][seed], results) for seed in seeds] for arm in study.arms}
    if "flops" in study.units:
        for arm, seen in budget.items():
            if any("flops" not in one for one in seen):
                raise CommandError(f"{file}: the operations of {arm} weren't counted: it must train more batches than the warm-up", 1)
    every = check_after(study, before, budget, file, strict)
    others = {arm: values[arm] for arm in study.arms if arm != study.reference}
    intervals = {
        arm: t_interval([a - b for a, b in zip(arm_values, values[study.reference], strict=True)])
        for arm, arm_values in others.items()
        if len(seeds) > 1
    }
    verdict = None
    if study.kind == "claim" and len(seeds) >= LEAST_SEEDS:
        verdict = dataclasses.asdict(judge(values[study.judged[0]], values[study.reference], study.higher, study.gate, study.margin))
    further = [arm for arm in study.arms if arm != study.reference and arm not in study.judged]
    fields = ["kind", "slug", "sentence", "source", "metric", "higher", "gate", "margin", "reference", "judged", "units", "tolerance"]
    fields += ["threads", *(["setting", "data", "real"] if study.kind == "claim" else ["over"])]
    return {
        **{name: getattr(study, name) for name in fields},
        "seeds": list(seeds),
        "tuned": study.tuned,
        "paper": study.paper,
        "values": values,
        "reports": reports,
        "budget": budget,
        "differences": {
            arm: [
                {**one._asdict(), "against": study.against(arm), "reason": study.differences.get(arm, {}).get(one.kind)} for one in listed
            ]
            for arm, listed in every.items()
        },
        "changes": {arm: changes(study, plan, arm, study.judged[0]) for arm in further},
        "seconds": round(sum(results[node.key]["seconds"] for node in plan.nodes), 1),
        "stages": len(plan.nodes),
        "intervals": intervals,
        "verdict": verdict,
    }


def _last(plan: Plan, name: str, seed: int, results: Mapping[str, Result], metric: str) -> float:
    node, stages = plan.chains[name][seed][-1], plan.resolved.get(name)
    return value_of(results[node.key], metric, node, stages[-1].config if stages else None)
