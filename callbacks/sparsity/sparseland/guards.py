"""What must not be claimed: guards over one sparse run, what makes two comparable, and the table that compares them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lit_methods.callbacks.sparsity.card import SparsityCard
from lit_methods.callbacks.sparsity.health import Health
from lit_methods.callbacks.sparsity.history import MaskHistory
from lit_methods.callbacks.sparsity.masks import is_nm
from lit_methods.panels import TableMedia

GUARDS = {
    2: "weights that their mask removes are not exactly 0",
    3: "declared sparse to sparse, but something dense is there",
    5: "density far from its target",
    6: "a layer has collapsed",
    7: "the masks don't move as declared",
    8: "zeros don't lie as declared",
}
Warnings = Iterator[tuple[int, str]]


class Guards:
    """Warnings of one run, each given once.

    Args:
        strict: Raise where a guard would warn.

    Attributes:
        warnings: Message -> number of the guard.
    """

    def __init__(self, strict: bool) -> None:
        self.strict = strict
        self.warnings: dict[str, int] = {}

    def warn(self, number: int, what: str) -> None:
        """Warn, or raise where that was asked for."""
        message = f"{GUARDS[number]}: {what}"
        if self.strict:
            raise RuntimeError(f"SparsityReport, guard {number}, {message}")
        if message not in self.warnings:
            self.warnings[message] = number
            rank_zero_warn(f"SparsityReport, guard {number}, {message}")

    def take(self, warnings: Warnings) -> None:
        """Warn of everything that was found."""
        for number, what in warnings:
            self.warn(number, what)


def nonzero_where_removed(tensors: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors with a value other than 0 where their mask is False."""
    if not tensors:
        return []
    flags = [(tensor.masked_fill(masks[name].to(tensor.device), 0) != 0).any() for name, tensor in tensors.items()]
    wrong = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist()  # one wait for the device
    return [name for name, flag in zip(tensors, wrong, strict=True) if flag]


def mask_warnings(history: MaskHistory, cards: Mapping[str, SparsityCard], health: Mapping[str, Health], updates: int) -> Warnings:
    """Guards 3, 6 and 7 that can be told from the masks so far.

    Args:
        history: First and last masks.
        cards: Weight -> card of the method that masks it.
        health: Dead units of the masked weights.
        updates: How often the masks have changed.
    """
    for name, state in health.items():
        if state.disconnected:
            yield 6, f"{name} has no weight left"
    for name, card in cards.items():
        if updates and card.mask == "static" and not torch.equal(history.first[name], history.last[name]):
            yield 7, f"{name} is declared static, but its mask changed"
    for name, card in cards.items():
        if card.regime == "sparse_to_sparse" and bool(history.first[name].all()) and not bool(history.last[name].all()):
            yield 3, f"the first mask of {name} was dense"


def final_warnings(source: Any, names: Sequence[str], history: MaskHistory, target: float | None) -> Warnings:
    """Guards 5, 7 and 8 at the end of training.

    Args:
        source: The callback or module that masks, with its card and its pattern.
        names: Weights that it masks.
        history: First and last masks, and which positions were ever active.
        target: Share of its weights that it should keep; None: not known.
    """
    who, card = type(source).__name__, getattr(source, "sparsity_card", None)
    kept, first, ever = (sum(int(masks[name].sum()) for name in names) for masks in (history.last, history.first, history.ever))
    size = sum(history.last[name].numel() for name in names)
    if target is not None and abs(kept - target * size) > 0.01 * target * size + 1:
        yield 5, f"{who} keeps {kept:,} of {size:,} weights, {kept / size:.4f} where {target:.4f} was asked for"
    if not isinstance(card, SparsityCard) or not names:
        return
    if card.mask == "dynamic" and ever == first < size:
        yield 7, f"{who} is declared dynamic, but no weight was ever tried beside the first ones"
    for name in names:
        if not _aligned(history.last[name], card, source):
            yield 8, f"{name} is declared {card.granularity}"


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


# ---- over several runs -----------------------------------------------------------------------------------------------------------------


def not_comparable(run: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Why the results of two runs don't compare (guard 4); [] if they do.

    Budgets are equal if samples are, or training FLOPs (1 % apart at most).

    Args:
        run: Content of a ``sparsity.json``.
        other: Content of another one.
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


__all__ = ["comparison_table", "missing_evidence", "not_comparable"]
