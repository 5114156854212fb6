"""What a sparsity report has found: the network's weights, their masks over time, their cost, and how all of it is told."""

import copy
import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from lit_methods.callbacks.sparsity.card import SparsityCard
from lit_methods.callbacks.sparsity.cost import Timing, size_in_bytes
from lit_methods.callbacks.sparsity.dynamics import itop_rate, mask_change
from lit_methods.callbacks.sparsity.health import Health, chains, effective_masks, health
from lit_methods.callbacks.sparsity.history import MaskHistory
from lit_methods.callbacks.sparsity.masks import is_nm
from lit_methods.callbacks.sparsity.meter import FlopMeter
from lit_methods.callbacks.sparsity.parametrized import LatentWeight
from lit_methods.callbacks.sparsity.sparseland.guards import Guards, mask_warnings
from lit_methods.callbacks.sparsity.store import prunable_weights
from lit_methods.callbacks.targets import plain_modules, plain_parameters
from lit_methods.panels import Media, TableMedia


class Network:
    """The weights of a module, as the network uses them.

    Args:
        module: Any module.

    Attributes:
        sizes: Entries of each parameter.
        prunable: Names of the weights of linear, convolution and attention layers.
        chains: Weights of layers that are known to feed each other.
    """

    def __init__(self, module: nn.Module) -> None:
        self.sizes = {name: parameter.numel() for name, parameter in plain_parameters(module).items()}
        self._modules = plain_modules(module)
        try:
            self.prunable = [name for name in prunable_weights(module) if name in self.sizes]
        except ValueError:  # no linear or convolution layer of its own
            self.prunable = []
        self.chains = [chain for chain in chains(module) if all(name in self.sizes for name in chain)]

    def has(self, name: str) -> bool:
        """Whether a weight can be masked: not one inside a parametrisation."""
        return name in self.sizes and ".parametrizations." not in f".{name}"

    @torch.no_grad()
    def value(self, name: str) -> Tensor:
        """A weight through its parametrisation; somebody else's may count its calls (spectral norm), so a copy of it is asked."""
        owner, _, attribute = name.rpartition(".")
        module = self._modules[owner]
        chain: Any = getattr(module, "parametrizations", {})
        if attribute in chain and not isinstance(chain[attribute][0], LatentWeight):
            module = copy.deepcopy(module, {id(parameter): parameter for parameter in module.parameters()}).eval()
        return getattr(module, attribute).detach()  # type: ignore[no-any-return]


class Findings:
    """Everything that a report knows of one run.

    Args:
        guards: Where warnings go.

    Attributes:
        network: Weights of the module, once training starts.
        sources: Class of each callback or module that masks -> its card.
        cards: Masked weight -> card of the method that masks it.
        by_mask: Whether anybody has masks; otherwise weights that are 0 count as removed.
        history: First and last masks, and which positions were ever active.
        updates: How often the masks have changed.
        changes: Measures of the last change.
        meter: FLOPs.
        timing: Measured latency.
        results: Validation results beside the FLOPs of their moment.
    """

    network: Network

    def __init__(self, guards: Guards) -> None:
        self.guards = guards
        self.sources: dict[str, SparsityCard | None] = {}
        self.cards: dict[str, SparsityCard] = {}
        self.by_mask = False
        self.history = MaskHistory("first", "last", "ever")
        self.updates = 0
        self.changes: dict[str, float] = {}
        self.meter = FlopMeter()
        self.timing: Timing | None = None
        self.results: list[dict[str, Any]] = []
        self._kept: dict[str, int] = {}
        self._health: dict[str, Health] = {}
        self._effective: int | None = None

    def look(self, masks: Mapping[str, Tensor]) -> bool:
        """Take in the masks as they are, on the CPU; whether they have changed since the last time."""
        change = self.history.change(masks) if self.by_mask else None
        self.history.note(masks)
        last = self.history.last
        if change is not None:
            self.updates += 1
            self.changes = {"changed": change.changed, "jaccard": change.jaccard, "survival": change.survival}
            self.changes["jaccard_first"] = mask_change(self.history.first, last).jaccard
        self._kept = {name: int(mask.sum()) for name, mask in last.items()}
        self._health = {name: health(mask) for name, mask in last.items() if mask.ndim >= 2}
        self._effective = self._count_effective()
        self.price()
        if self.by_mask:
            self.guards.take(mask_warnings(self.history, self.cards, self._health, self.updates))
        return change is not None

    def price(self) -> None:
        """Set the cost of a sample by the densities of the moment."""
        self.meter.price({name: kept / self.network.sizes[name] for name, kept in self._kept.items()}, self.cards)

    def _left(self) -> dict[str, int]:
        """Prunable or masked weight -> entries that are left."""
        return {name: self._kept.get(name, self.network.sizes[name]) for name in (*self.network.prunable, *self.history.last)}

    def _count_effective(self) -> int | None:
        if not self.network.chains:
            return None
        left, last = self._left(), self.history.last
        for chain in self.network.chains:
            masks = [last[name] if name in last else torch.ones(self.network.value(name).shape, dtype=torch.bool) for name in chain]
            left |= {name: int(mask.sum()) for name, mask in zip(chain, effective_masks(masks), strict=True)}
        return sum(left.values())

    # ---- telling -----------------------------------------------------------------------------------------------------------------------

    def values(self) -> dict[str, float]:
        """Every figure that is logged, by name."""
        left = self._left()
        size, kept, everything = sum(self.network.sizes[name] for name in left), sum(left.values()), sum(self.network.sizes.values())
        values: dict[str, float] = {"density": kept / size if size else 1.0, "density_all": (everything - size + kept) / max(1, everything)}
        if self.by_mask and self.history.ever:
            values |= {"itop": itop_rate(self.history.ever)[0], "updates": self.updates, **self.changes}
        if self._health:
            for name in ("dead_outputs", "dead_inputs", "disconnected"):
                values[name] = sum(getattr(state, name) for state in self._health.values())
        if self._effective is not None:
            values["effective_density"] = self._effective / size if size else 1.0
        if (cost := self.meter.cost) is not None:
            values |= {"flops_ratio": cost.ratio, "flops_ratio_without_attention": cost.ratio_without_attention}
            values["training_flops"] = self.meter.flops
        if self.timing is not None:
            values["latency_ms"] = 1000 * self.timing.seconds
        return values

    @torch.no_grad()
    def report(self, pretrained: bool | None) -> dict[str, Any]:
        """What ``sparsity.json`` holds, as it is now."""
        values, layers, meter, cost = self.values(), self._layers(), self.meter, self.meter.cost
        seed = os.environ.get("PL_GLOBAL_SEED")
        return {
            "method": list(self.sources),
            "cards": {name: asdict(card) for name, card in self.sources.items() if card is not None},
            "setting": {
                "density_base": "masked weights",
                "layerwise": sorted({card.layerwise for card in self.cards.values()}),
                "masked": [row["name"] for row in layers if row["masked"]],
                "pretrained": pretrained,
                "seed": None if seed is None else int(seed),
            },
            "density": {"prunable": values["density"], "all": values["density_all"], "basis": "masks" if self.by_mask else "weight != 0"},
            "layers": layers,
            "inference": None if cost is None else {"counted_on": meter.macs["method"] if meter.macs else None, **cost.figures()},
            "training": {"samples": meter.samples, "flops": cost and meter.flops, "flops_per_sample": cost and meter.per_sample},
            "dynamics": {key: values[key] for key in ("itop", "updates", *self.changes) if key in values},
            "health": {key: values[key] for key in ("dead_outputs", "dead_inputs", "disconnected", "effective_density") if key in values},
            "bytes": {key: sum(row["bytes"][key] for row in layers) for key in ("dense", "csr", "bitmask")},
            "speed": None if self.timing is None else asdict(self.timing),
            "results": self.results,
            "guards": [{"number": number, "message": message} for message, number in self.guards.warnings.items()],
        }

    def _layers(self) -> list[dict[str, Any]]:
        """A row for each prunable or masked weight."""
        left, last, cost = self._left(), self.history.last, self.meter.cost
        rates = itop_rate(self.history.ever)[1] if self.by_mask and self.history.ever else {}
        weights = {name: self.network.value(name) for name in left}
        nonzero = torch.stack([(weight != 0).sum().cpu() for weight in weights.values()]).tolist() if weights else []
        layers = []
        for (name, weight), count in zip(weights.items(), nonzero, strict=True):
            kept, mask = left[name], last.get(name)
            two_four = mask is not None and mask.ndim >= 2 and is_nm(mask, 2, 4) and not bool(mask.all())
            row: dict[str, Any] = {
                "name": name,
                "shape": list(weight.shape),
                "size": weight.numel(),
                **{"kept": kept, "nonzero": int(count), "density": kept / weight.numel()},
                "share": kept / max(1, sum(left.values())),
                "masked": self.by_mask and mask is not None,
                "itop": rates.get(name),
                "macs_dense": None if cost is None else cost.macs_dense.get(name, 0.0),
                "macs_sparse": None if cost is None else cost.macs_sparse.get(name, 0.0),
                "bytes": size_in_bytes(weight.shape, kept, weight.element_size(), two_four),
            }
            if name in self._health:
                row |= {"dead_outputs": self._health[name].dead_outputs, "dead_inputs": self._health[name].dead_inputs}
            layers.append(row)
        return layers


def tables(report: Mapping[str, Any]) -> dict[str, Media]:
    """A report as tables: layers, totals, FLOPs against the result, guards."""
    keys = ("name", "shape", "size", "kept", "nonzero", "density", "share", "itop", "dead_outputs", "dead_inputs")
    heads = ("layer", "shape", "weights", "kept by mask", "not 0", "density", "share of kept", "ITOP", "dead outputs", "dead inputs")
    rows = [{**row, "shape": " x ".join(map(str, row["shape"]))} for row in report["layers"]]
    guards = [(guard["number"], guard["message"]) for guard in report["guards"]]
    results = [(row["step"], row["samples"], row["flops"], row["metric"], row["value"]) for row in report["results"]]
    media: dict[str, Media] = {
        "sparsity/layers": TableMedia(heads, tuple(tuple(row.get(key) for key in keys) for row in rows)),
        "sparsity/totals": TableMedia(("what", "figure"), tuple(_totals(report))),
        "sparsity/guards": TableMedia(("guard", "warning"), tuple(guards) or ((None, "none"),)),
    }
    table = TableMedia(("step", "samples", "training FLOPs", "metric", "value"), tuple(results))
    return media | ({"sparsity/results": table} if results else {})


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
