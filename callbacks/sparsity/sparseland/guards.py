"""What makes two sparse runs comparable, and the tables that compare them."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_methods.callbacks.sparsity.card import SparsityCard
from lit_methods.callbacks.sparsity.cost import Cost
from lit_methods.callbacks.sparsity.flops import training_flops
from lit_methods.callbacks.sparsity.masks import is_nm
from lit_methods.panels import TableMedia


def training_cost(cost: Cost, cards: Mapping[str, SparsityCard]) -> float:
    """FLOPs to train on one sample: each weight by the regime of the method that masks it, all else dense.

    Args:
        cost: Of a forward pass, per sample.
        cards: Weight -> card of the method that masks it.
    """
    total = 6 * cost.attention_macs
    for name, dense in cost.macs_dense.items():
        card = cards.get(name)
        if card is None:
            total += training_flops("static", 2 * dense, 2 * cost.macs_sparse[name])  # dense, where nothing is masked
        else:
            total += training_flops(card.cost, 2 * dense, 2 * cost.macs_sparse[name], card.update_interval)
    return total


def not_comparable(run: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Why the results of two runs don't compare (guard 4); [] if they do.

    Budgets are equal if samples are, or training FLOPs (1 % apart at most).

    Args:
        run: Content of a ``sparsity.json``.
        other: Of another one.
    """
    reasons = []
    a, b = run["training"], other["training"]
    flops = [side["flops"] for side in (a, b)]
    same_flops = None not in flops and abs(flops[0] - flops[1]) <= 0.01 * max(flops)
    if a["samples"] != b["samples"] and not same_flops:
        reasons.append(f"training budget: {a['samples']:,} and {b['samples']:,} samples, neither equal FLOPs")
    for key, words in {"density_base": "density base", "layerwise": "layer-wise rule", "masked": "masked layers"}.items():
        one, two = run["setting"][key], other["setting"][key]
        if one != two and not (key != "density_base" and (_is_dense(run) or _is_dense(other))):  # a dense run has no rule and no masks
            if key == "masked":
                odd = sorted(set(one) ^ set(two))
                reasons.append(f"{words}: {', '.join(odd[:4])}{', ...' if len(odd) > 4 else ''} in one of them alone")
            else:
                reasons.append(f"{words}: {_words(one)} and {_words(two)}")
    starts = [side["setting"]["pretrained"] for side in (run, other)]
    if starts[0] != starts[1]:
        reasons.append("start: {} and {}".format(*({True: "pretrained", False: "from scratch", None: "not stated"}[s] for s in starts)))
    return reasons


def _words(value: Any) -> str:
    return ", ".join(value) or "none" if isinstance(value, list) else str(value)


def _is_dense(run: Mapping[str, Any]) -> bool:
    return bool(run["density"]["prunable"] == 1)


def missing_evidence(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a set of runs lacks before it supports a claim: seeds (guard 9) and baselines (guard 10).

    Args:
        runs: Contents of ``sparsity.json`` files: all seeds of a method and of what it is compared with.

    Returns:
        Sentences; [] if nothing is missing. A baseline counts for a run if :func:`not_comparable` has no objection.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        setting = {key: value for key, value in run["setting"].items() if key != "seed"}
        groups.setdefault(json.dumps([run["method"], run["cards"], setting], sort_keys=True), []).append(run)
    missing = [f"one seed only: {_label(group[0])}" for group in groups.values() if len({run["setting"]["seed"] for run in group}) < 2]

    def is_kind(run: Mapping[str, Any], criterion: str) -> bool:
        return bool(run["cards"]) and all(
            card["criterion"] == criterion and (criterion != "random" or card["mask"] == "static") for card in run["cards"].values()
        )

    for group in groups.values():
        run = group[0]
        if _is_dense(run) or is_kind(run, "random") or is_kind(run, "magnitude"):
            continue
        rivals = [other for other in runs if other is not run and not not_comparable(run, other)]
        alike = [other for other in rivals if _same_layers(run, other)]
        for what, present in {
            "dense, same budget": any(map(_is_dense, rivals)),
            "static random masks with the same layer densities": any(is_kind(other, "random") for other in alike),
            "magnitude pruning": any(is_kind(other, "magnitude") for other in rivals),
        }.items():
            if not present:
                missing.append(f"no baseline for {_label(run)}: {what}")
    return missing


def _label(run: Mapping[str, Any]) -> str:
    return f"{_words(run['method'])}, density {run['density']['prunable']:.3g}"


def _same_layers(run: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    mine, theirs = ({row["name"]: row for row in side["layers"]} for side in (run, other))
    return mine.keys() == theirs.keys() and all(
        abs(row["kept"] - theirs[name]["kept"]) <= 1 + 0.01 * row["kept"] for name, row in mine.items()
    )


def comparison_table(runs: Mapping[str, Mapping[str, Any]]) -> TableMedia:
    """Runs beside each other, theory and measurement in columns of their own, and why a run doesn't compare with the first.

    Args:
        runs: Name -> content of its ``sparsity.json``; the first is what the others are compared with.
    """
    columns = (
        *("run", "density of prunable weights", "density of all parameters", "FLOPs ratio (theory)", "training FLOPs (theory)"),
        *("samples", "result", "latency in ms (measured)", "not comparable"),
    )
    first = next(iter(runs.values()))
    rows = []
    for name, run in runs.items():
        inference, speed, results = run["inference"], run["speed"], run["results"]
        rows.append(
            (
                name,
                run["density"]["prunable"],
                run["density"]["all"],
                inference["flops_ratio"] if inference else None,
                run["training"]["flops"],
                run["training"]["samples"],
                results[-1]["value"] if results else None,
                1000 * speed["seconds"] if speed else None,
                "; ".join(not_comparable(first, run)),
            )
        )
    return TableMedia(columns, tuple(rows))


def _aligned(mask: Tensor, card: SparsityCard, source: Any) -> bool:
    """Whether zeros lie in the units that the card declares; True for those that can't be checked from a mask."""
    if card.granularity == "layer":
        return bool(mask.all()) or not bool(mask.any())
    if card.granularity == "channel" and mask.ndim >= 2:  # every removed weight lies in a removed row or column
        rows, columns = mask.flatten(1).any(1), mask.transpose(0, 1).flatten(1).any(1)
        whole = (rows[:, None] & columns).view(*mask.shape[:2], *[1] * (mask.ndim - 2))
        return torch.equal(mask, whole.expand_as(mask))
    n, m = getattr(source, "n", None), getattr(source, "m", None)
    if card.granularity == "n:m" and isinstance(n, int) and isinstance(m, int):
        return mask.ndim < 2 or is_nm(mask, n, m, 1) or is_nm(mask, n, m, 0)
    return True


def _totals(report: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The second table: one row per figure, theory and measurement told apart."""
    inference, speed, sizes = report["inference"], report["speed"], report["bytes"]
    rows: list[tuple[str, Any]] = [
        ("density of the prunable weights", report["density"]["prunable"]),
        ("density of all parameters", report["density"]["all"]),
        ("counted by", report["density"]["basis"]),
    ]
    if inference:
        rows += [
            ("FLOPs of a forward pass, dense (theory, per sample)", inference["flops_dense"]),
            ("FLOPs of a forward pass, sparse (theory, per sample)", inference["flops_sparse"]),
            ("ratio, attention included", inference["flops_ratio"]),
            ("ratio of the weights alone", inference["flops_ratio_without_attention"]),
            ("training FLOPs so far (theory)", report["training"]["flops"]),
        ]
    rows += [(f"{key} (masks)", value) for key, value in report["dynamics"].items()]
    rows += [(key.replace("_", " "), value) for key, value in report["health"].items()]
    rows += [(f"bytes of the prunable weights, {key}", value) for key, value in sizes.items()]
    if speed:
        where = f"{speed['kernel']}, {speed['device']}, batch {speed['batch_size']}"
        rows += [(f"latency in ms (measured: {where})", 1000 * speed["seconds"]), (f"peak MiB ({speed['memory']})", speed["peak_mib"])]
    return rows
