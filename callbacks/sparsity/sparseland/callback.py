"""The sparsity report: what a sparse network is, what it costs, and what may be said about it (Sparseland, arXiv:2302.02596).

The handbook has no algorithm and no code; of its text we could read the abstract and summaries alone. Taxonomy, measures and guards follow
the common rules of the papers it is about: densities and training cost from RigL (arXiv:1911.11134) and gradual pruning
(arXiv:1710.01878), exploration from ITOP (arXiv:2102.02887). Golden vectors test them, see tests/golden/data/sparseland/README.md.
The measures themselves stand in :mod:`~lit_methods.callbacks.sparsity.density`, :mod:`~lit_methods.callbacks.sparsity.flops`,
:mod:`~lit_methods.callbacks.sparsity.dynamics`, :mod:`~lit_methods.callbacks.sparsity.health` and
:mod:`~lit_methods.callbacks.sparsity.cost`.
"""

import copy
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lit_methods import distributed
from lit_methods.callbacks.ordering import OrderedCallback
from lit_methods.callbacks.sparsity.card import SparsityCard
from lit_methods.callbacks.sparsity.cost import Cost, Timing, measure, size_in_bytes, theoretical_cost
from lit_methods.callbacks.sparsity.dynamics import itop_rate, mask_change, union
from lit_methods.callbacks.sparsity.flops import Macs
from lit_methods.callbacks.sparsity.health import Health, chains, effective_masks, health
from lit_methods.callbacks.sparsity.masks import is_nm
from lit_methods.callbacks.sparsity.sparseland.guards import _aligned, _totals, training_cost
from lit_methods.callbacks.sparsity.store import prunable_weights
from lit_methods.callbacks.targets import plain_module, plain_name, refuse_sharded
from lit_methods.callbacks.twin import _call, _parameters, _plain_parameter_name, _samples, count_on_batch, shadow
from lit_methods.catalog import Technique
from lit_methods.files import write_atomically
from lit_methods.panels import Curve, Media, Panel, TableMedia, TablePanel
from lit_methods.runs.folder import run_dir

TECHNIQUE = Technique(
    slug="sparseland",
    title='Ten Lessons We Have Learned in the New "Sparseland": A Short Handbook for Sparse Neural Network Researchers',
    arxiv="2302.02596",
    family="sparsity",
    form="callback",
    classes=("lit_methods.callbacks.SparsityReport", "lit_methods.callbacks.DynamicSparsity"),
    configs=("sparseland.yaml",),
    golden=("erk_density", "itop_and_stability", "cnn_flops", "transformer_flops", "training_flops"),
    claim="Dynamic sparse training explores more weights than the density that it keeps (ITOP rate above density), "
    "static sparse training doesn't.",
    summary="Reports density, FLOPs, exploration, health, size and measured speed of a sparse network, and warns of misleading claims.",
)

# ---- taxonomy --------------------------------------------------------------------------------------------------------------------------


# ---- guards over several runs ----------------------------------------------------------------------------------------------------------


# ---- reading a module ------------------------------------------------------------------------------------------------------------------


def _pack(masks: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: {"shape": list(mask.shape), "bits": torch.from_numpy(np.packbits(mask.numpy()))} for name, mask in masks.items()}


def _unpack(packed: Mapping[str, Any]) -> dict[str, Tensor]:
    return {
        name: torch.from_numpy(np.unpackbits(entry["bits"].numpy(), count=math.prod(entry["shape"])).astype(bool)).view(entry["shape"])
        for name, entry in packed.items()
    }


# ---- the callback ----------------------------------------------------------------------------------------------------------------------

_GUARDS = {
    2: "weights that their mask removes are not exactly 0",
    3: "declared sparse to sparse, but something dense is there",
    5: "density far from its target",
    6: "a layer has collapsed",
    7: "the masks don't move as declared",
    8: "zeros don't lie as declared",
}


class SparsityReport(OrderedCallback):
    """Says what a sparse network is and costs while it trains, and warns of what must not be claimed about it.

    It reads the masks of every callback (and of the module) that has ``sparsity_masks() -> {parameter name: bool mask}``; where nobody has
    it, weights that are 0 count as removed. Reported are, per layer and in all: density, FLOPs of inference and training (theory, 2 FLOPs
    per MAC), exploration and stability of the masks, dead units, bytes, and with ``measure_speed`` the measured latency. Two densities are
    named: over the prunable weights (linear, convolution and attention layers, and whatever is masked), and over all parameters.

    Training FLOPs follow the regime in the ``sparsity_card`` of the callback that masks a weight (see :class:`SparsityCard`), at the
    density of the moment, from one forward pass per sample; a step with several passes costs a multiple.

    Runs: at the first training batch one extra forward pass, on a copy in eval mode that shares the parameters; the generators of random
    numbers stay as they were. Then at changes of the masks (event ``on_mask_updated``) and at the end of epochs. On every
    ``mask_check_every_n``-th optimiser step it reads whether removed weights are 0; other steps add one product on the host. Works on any
    module and under DDP, where every rank watches its own masks and rank 0 writes; refuses strategies that shard weights.
    Logs: a row ``sparsity/...`` at the start, at each change and after each epoch; the cards as hyperparameters. Writes ``sparsity.json``
    into the run's folder, which :func:`not_comparable`, :func:`missing_evidence` and :func:`comparison_table` read.
    Saves: union of the masks, first and last ones (a bit per weight), updates, FLOPs.

    Args:
        strict: Raise where a guard would warn.
        forward: Name of a method of the module, ``(batch)``, that runs the network once. None: ``validation_step``, ``test_step``,
            ``training_step`` or ``predict_step``, the first that works on a training batch.
        mask_check_every_n: Optimiser steps between two checks that removed weights are exactly 0; 0: never.
        measure_speed: Time the network at the end of training, as it is: with masked dense weights.
        metric: Validation metric that stands beside the FLOPs; None: the first with ``val`` and ``acc``, ``iou`` or ``f1`` in its name.
        target_density: What the masked weights should have at the end; None: the ``density`` of the callback, if it has one.
        pretrained: Whether training starts from trained weights, for comparisons; None: not stated.

    Raises:
        RuntimeError: With ``strict``, a guard.
        ValueError: In ``setup``, a strategy that shards weights; while running, masks of no parameter of the module.
        TypeError: In ``setup``, ``forward`` is no method of the module.
    """

    runs_after: ClassVar[Sequence[str]] = ("MaskCallback",)
    runs_before: ClassVar[Sequence[str]] = ("Dashboard",)

    panels: ClassVar[tuple[Panel, ...]] = (
        TablePanel(
            "Density per layer", "sparsity/layers", note="By mask, and by weights that are not 0. A layer near 0 is about to collapse."
        ),
        TablePanel("Totals", "sparsity/totals", note="FLOPs are theory (2 per multiply-accumulate) and say nothing about speed."),
        Curve(
            "Exploration (ITOP)", ("sparsity/itop", "sparsity/density"), note="Share of weights that were ever active. Static masks stay."
        ),
        Curve(
            "Change of the masks at an update",
            ("sparsity/changed", "sparsity/jaccard", "sparsity/survival", "sparsity/jaccard_first"),
            note="The Jaccard index with the masks before tends to 1 as training settles; that with the first masks falls.",
        ),
        Curve("Density", ("sparsity/density", "sparsity/density_all", "sparsity/effective_density")),
        Curve("FLOPs of a forward pass, sparse / dense", ("sparsity/flops_ratio", "sparsity/flops_ratio_without_attention")),
        Curve("Training FLOPs so far", ("sparsity/training_flops",)),
        TablePanel("FLOPs so far against the result", "sparsity/results", note="Two methods compare at equal FLOPs or at equal samples."),
        Curve("Dead units", ("sparsity/dead_outputs", "sparsity/dead_inputs", "sparsity/disconnected")),
        TablePanel("Guards", "sparsity/guards", note="What must not be claimed of this run."),
    )

    def __init__(
        self,
        strict: bool = False,
        forward: str | None = None,
        mask_check_every_n: int = 100,
        measure_speed: bool = False,
        metric: str | None = None,
        target_density: float | None = None,
        pretrained: bool | None = None,
    ) -> None:
        super().__init__()
        if mask_check_every_n < 0:
            raise ValueError(f"mask_check_every_n is {mask_check_every_n}: give a number of optimiser steps, or 0 for never")
        if target_density is not None and not 0 < target_density <= 1:
            raise ValueError(f"target_density is {target_density}: give a share above 0, at most 1")
        self.strict, self.forward, self.mask_check_every_n, self.measure_speed = strict, forward, mask_check_every_n, measure_speed
        self.metric, self.target_density, self.pretrained = metric, target_density, pretrained
        self._reset()

    def _reset(self) -> None:
        self._started = False
        self._weights: dict[str, tuple[nn.Module, str]] = {}  # name -> where its value as it is used is found
        self._sizes: dict[str, int] = {}  # of all parameters
        self._prunable: list[str] = []
        self._chains: list[list[str]] = []
        self._cards: dict[str, SparsityCard] = {}  # of masked weights
        self._sources: dict[str, SparsityCard | None] = {}  # class of the callback or module -> its card
        self._by_mask = False  # whether anybody has masks
        self._first: dict[str, Tensor] = {}
        self._last: dict[str, Tensor] = {}
        self._seen: dict[str, Tensor] = {}
        self._kept: dict[str, int] = {}
        self._updates = 0
        self._changes: dict[str, float] = {}
        self._health: dict[str, Health] = {}
        self._effective: int | None = None
        self._macs: dict[str, Any] | None = None  # per_weight, other, samples, method
        self._uncountable = ""
        self._cost: Cost | None = None
        self._per_sample = 0.0
        self._flops = 0.0
        self._samples = 0
        self._resumed = False
        self._checked = -1
        self._batch: Any = None
        self._timing: Timing | None = None
        self._results: list[dict[str, Any]] = []
        self._warnings: dict[str, int] = {}
        self._report: dict[str, Any] = {}

    # ---- hooks -------------------------------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what can't work."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        refuse_sharded(trainer, type(self).__name__)
        if self.forward is not None and not callable(getattr(pl_module, self.forward, None)):
            raise TypeError(f"forward is {self.forward!r}, but {type(pl_module).__name__} has no such method: name one that takes a batch")
        self._reset()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at weights and masks for the first time; all callbacks have made theirs."""
        parameters = _parameters(pl_module)
        self._sizes = {name: parameter.numel() for name, parameter in parameters.items()}
        modules = {plain_name(name): plain_module(module) for name, module in pl_module.named_modules()}
        self._weights = {
            name: (modules[name.rpartition(".")[0]], name.rpartition(".")[2])
            for name in parameters
            if ".parametrizations." not in f".{name}"
        }
        try:
            self._prunable = [name for name in prunable_weights(pl_module) if name in self._sizes]
        except ValueError:  # no linear or convolution layer of its own
            self._prunable = []
        self._chains = [chain for chain in chains(pl_module) if all(name in self._sizes for name in chain)]
        self._started = True
        self._observe(trainer, pl_module)
        cards = {name: asdict(card) for name, card in self._sources.items() if card is not None}
        for logger in trainer.loggers if cards else ():
            logger.log_hyperparams({"sparsity_card": cards})

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Count the FLOPs of this batch; at the first one, those of a sample. Guards 2 and 3, now and then."""
        if self._due(trainer) and self._checked != trainer.global_step:
            self._check(trainer, pl_module)
        if self._macs is None and not self._uncountable:
            self._count(trainer, pl_module, batch)
            if not self._resumed:
                self._log_row(trainer)
        if self.measure_speed and self._batch is None and self._macs is not None:
            self._batch = apply_to_collection(batch, Tensor, torch.clone)
        samples = (_samples(batch) or 1) * trainer.world_size
        self._samples += samples
        self._flops += samples * self._per_sample

    def on_mask_updated(self, trainer: pl.Trainer, pl_module: pl.LightningModule, source: Any) -> None:
        """Compare new masks with the old ones."""
        if self._started and self._observe(trainer, pl_module):
            self._log_row(trainer)

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        """Guard 3, on gradients: after the mask callbacks have had them."""
        if self._due(trainer):
            owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}  # the others' are not masked yet
            mine = {name: parameter for name, parameter in _parameters(pl_module).items() if id(parameter) in owned}
            promised = [name for name, card in self._cards.items() if card.regime == "sparse_to_sparse" and not card.backward_dense]
            grads = {name: grad for name in promised if name in mine and (grad := mine[name].grad) is not None}
            for name in self._nonzero_where_removed(grads):
                self._warn(3, f"{name} has gradients of removed weights at an optimiser step")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log where things stand."""
        if not self._by_mask:
            self._observe(trainer, pl_module)
        values = self._values()
        pl_module.log_dict({name: float(value) for name, value in values.items()}, sync_dist=trainer.world_size > 1)
        if not trainer.enable_validation:
            self._write(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the result beside the FLOPs."""
        if trainer.sanity_checking or not self._started:
            return
        name = self.metric or next(
            (name for name in trainer.callback_metrics if "val" in name and any(word in name for word in ("acc", "iou", "f1"))), None
        )
        if name is not None and name in trainer.callback_metrics:
            value = float(trainer.callback_metrics[name])
            flops = self._flops if self._macs is not None else None
            self._results.append({"step": trainer.global_step, "samples": self._samples, "flops": flops, "metric": name, "value": value})
        self._write(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The last look, and the guards that need it."""
        self._observe(trainer, pl_module)
        if self._by_mask and self.mask_check_every_n:
            self._check(trainer, pl_module)
        self._guard_at_the_end(trainer, pl_module)
        if self.measure_speed and self._batch is not None:
            self._time(trainer, pl_module)
        self._log_row(trainer)
        self._write(trainer)
        self._leave()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Let go of the module."""
        self._leave()

    def _leave(self) -> None:
        self._started, self._weights, self._batch = False, {}, None

    def state_dict(self) -> dict[str, Any]:
        """What can't be computed again: masks of the past, and sums."""
        if not self._last:
            return {}
        return {
            "first": _pack(self._first),
            "last": _pack(self._last),
            "seen": _pack(self._seen),
            "updates": self._updates,
            "changes": dict(self._changes),
            "macs": copy.deepcopy(self._macs),
            "uncountable": self._uncountable,
            "flops": self._flops,
            "samples": self._samples,
            "results": copy.deepcopy(self._results),
            "warnings": dict(self._warnings),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the checkpoint was saved."""
        if not state:
            return
        self._first, self._last, self._seen = (_unpack(state[key]) for key in ("first", "last", "seen"))
        self._updates, self._changes = int(state["updates"]), dict(state["changes"])
        self._macs, self._uncountable = copy.deepcopy(state["macs"]), str(state["uncountable"])
        self._flops, self._samples = float(state["flops"]), int(state["samples"])
        self._results, self._warnings = copy.deepcopy(state["results"]), dict(state["warnings"])
        self._resumed = True

    # ---- looking -----------------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _value(self, name: str) -> Tensor:
        """A weight as the network uses it: through its parametrisation."""
        module, attribute = self._weights[name]
        return getattr(module, attribute).detach()  # type: ignore[no-any-return]

    def _masks(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Tensor]:
        """All masks there are, on the CPU and our own; of weights that are not 0 where nobody has masks."""
        found: dict[str, Tensor] = {}
        self._by_mask = False
        for source in (pl_module, *trainer.callbacks):  # type: ignore[attr-defined]
            give = getattr(source, "sparsity_masks", None)
            if not callable(give):
                continue
            self._by_mask = True
            card = getattr(source, "sparsity_card", None)
            self._sources[type(source).__name__] = card
            for name, mask in give().items():
                plain = _plain_parameter_name(name)
                if plain not in self._weights:
                    raise ValueError(f"{type(source).__name__}.sparsity_masks() names {name!r}, no parameter of {type(pl_module).__name__}")
                found[plain] = mask.detach().to("cpu", torch.bool, copy=True)
                if isinstance(card, SparsityCard):
                    self._cards[plain] = card
        return found if self._by_mask else {name: (self._value(name) != 0).cpu() for name in self._prunable}

    def _observe(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        """Take in the masks as they are; whether they have changed since the last time."""
        masks = self._masks(trainer, pl_module)
        before = {name: self._last[name] for name in masks if name in self._last}
        changed = self._by_mask and any(not torch.equal(mask, masks[name]) for name, mask in before.items())
        if changed:
            change = mask_change(before, masks)
            self._updates += 1
            self._changes = {"changed": change.changed, "jaccard": change.jaccard, "survival": change.survival}
        for name, mask in masks.items():
            self._first.setdefault(name, mask)
        self._seen |= union(self._seen, masks)
        self._last |= masks
        if changed:
            self._changes["jaccard_first"] = mask_change(self._first, self._last).jaccard
        self._kept = {name: int(mask.sum()) for name, mask in self._last.items()}
        self._health = {name: health(mask) for name, mask in self._last.items() if mask.ndim >= 2}
        self._effective = self._effective_count()
        self._price()
        self._guard_masks()
        return changed

    def _effective_count(self) -> int | None:
        if not self._chains:
            return None
        kept = {name: self._kept.get(name, self._sizes[name]) for name in self._prunable_names()}
        for chain in self._chains:
            masks = [self._last[name] if name in self._last else torch.ones(self._value(name).shape, dtype=torch.bool) for name in chain]
            kept |= {name: int(mask.sum()) for name, mask in zip(chain, effective_masks(masks), strict=True)}
        return sum(kept.values())

    def _prunable_names(self) -> list[str]:
        return list(dict.fromkeys([*self._prunable, *self._last]))

    def _densities(self) -> dict[str, float]:
        return {name: kept / self._sizes[name] for name, kept in self._kept.items()}

    def _price(self) -> None:
        if self._macs is not None:
            macs = Macs(self._macs["per_weight"], self._macs["other"])
            self._cost = theoretical_cost(macs, self._densities(), self._macs["samples"])
            self._per_sample = training_cost(self._cost, self._cards)

    def _count(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> None:
        """One forward pass on a shadow of the module, on all ranks, as a step may gather."""
        macs, method, problems = count_on_batch(trainer, pl_module, batch, self.forward)
        found: dict[str, Any] | None = None
        if macs is not None:
            found = {"per_weight": macs.per_weight, "other": macs.other, "samples": _samples(batch) or 1, "method": method}
        ready = distributed.gather_rows(torch.tensor([found is not None], device=pl_module.device), with_grad=False)
        if bool(ready.all()):
            self._macs = found
            self._price()
            return
        self._uncountable = "; ".join(" ".join(problem.split())[:300] for problem in problems) or "another process failed"
        if self.forward is not None:
            raise RuntimeError(f"SparsityReport can't count FLOPs with forward={self.forward!r}: {self._uncountable}")
        rank_zero_warn(
            f"SparsityReport reports no FLOPs, as it can't run {type(pl_module).__name__} on a training batch ({self._uncountable}); "
            "give forward the name of a method (batch) that runs the network once"
        )

    def _time(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._macs is not None
        name, batch = str(self._macs["method"]), self._batch
        try:
            with isolate_rng(pl_module.device.type == "cuda"):
                twin = shadow(trainer, pl_module)
                context = trainer.precision_plugin.val_step_context
                size = _samples(batch) or 1
                self._timing = measure(lambda: _call(twin, name, batch, context()), pl_module.device, "dense-masked", size)
        except Exception as error:  # a figure isn't worth a trained network
            rank_zero_warn(f"SparsityReport could not measure the speed: {type(error).__name__}: {error}")

    # ---- guards ------------------------------------------------------------------------------------------------------------------------

    def _warn(self, number: int, what: str) -> None:
        message = f"{_GUARDS[number]}: {what}"
        if self.strict:
            raise RuntimeError(f"SparsityReport, guard {number}, {message}")
        if message not in self._warnings:
            self._warnings[message] = number
            rank_zero_warn(f"SparsityReport, guard {number}, {message}")

    def _due(self, trainer: pl.Trainer) -> bool:
        return self._started and self._by_mask and self.mask_check_every_n > 0 and trainer.global_step % self.mask_check_every_n == 0

    @torch.no_grad()
    def _check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Guards 2 and 3, on weights as the next forward pass will use them and on the optimisers' state."""
        self._checked = trainer.global_step
        self._observe(trainer, pl_module)  # masks that are made anew in every forward pass have moved since the last event
        for name in self._nonzero_where_removed({name: self._value(name) for name in self._last}):
            self._warn(2, f"{name}: something (weight decay, momentum, averaging, loading) has brought removed weights back")
        parameters = _parameters(pl_module)
        for name, card in self._cards.items():
            if card.regime != "sparse_to_sparse" or card.optimizer_dense or name not in parameters:
                continue
            for optimizer in trainer.optimizers:
                state = optimizer.state.get(parameters[name], {}).values()
                tensors = [value for value in state if isinstance(value, Tensor) and value.shape == parameters[name].shape]
                if any(self._nonzero_where_removed({name: value}) for value in tensors):
                    self._warn(3, f"{name} has optimiser state of removed weights")

    def _nonzero_where_removed(self, tensors: Mapping[str, Tensor]) -> list[str]:
        if not tensors:
            return []
        flags = [(tensor.masked_fill(self._last[name].to(tensor.device), 0) != 0).any() for name, tensor in tensors.items()]
        wrong = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist()  # one wait for the device
        return [name for name, flag in zip(tensors, wrong, strict=True) if flag]

    def _guard_masks(self) -> None:
        for name, state in self._health.items():
            if state.disconnected and self._by_mask:
                self._warn(6, f"{name} has no weight left")
        if self._updates:
            for name, card in self._cards.items():
                if card.mask == "static" and not torch.equal(self._first[name], self._last[name]):
                    self._warn(7, f"{name} is declared static, but its mask changed")
        for name, card in self._cards.items():
            if card.regime == "sparse_to_sparse" and bool(self._first[name].all()) and not bool(self._last[name].all()):
                self._warn(3, f"the first mask of {name} was dense")

    def _guard_at_the_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for source in (pl_module, *trainer.callbacks):  # type: ignore[attr-defined]
            give, target = getattr(source, "sparsity_masks", None), self.target_density
            if not callable(give):
                continue
            names = [_plain_parameter_name(name) for name in give()]
            own = getattr(source, "density", None)
            target = own if target is None and isinstance(own, float) else target
            kept, size = sum(self._kept[name] for name in names), sum(self._sizes[name] for name in names)
            if target is not None and abs(kept - target * size) > 0.01 * target * size + 1:
                self._warn(
                    5, f"{type(source).__name__} keeps {kept:,} of {size:,} weights, {kept / size:.4f} where {target:.4f} was asked for"
                )
            card = getattr(source, "sparsity_card", None)
            if not isinstance(card, SparsityCard) or not names:
                continue
            first, seen = (sum(int(masks[name].sum()) for name in names) for masks in (self._first, self._seen))
            if card.mask == "dynamic" and seen == first < size:
                self._warn(7, f"{type(source).__name__} is declared dynamic, but no weight was ever tried beside the first ones")
            for name in names:
                if not _aligned(self._last[name], card, source):
                    self._warn(8, f"{name} is declared {card.granularity}")

    # ---- telling -----------------------------------------------------------------------------------------------------------------------

    def _values(self) -> dict[str, float]:
        """Everything that is logged, by name."""
        names = self._prunable_names()
        size = sum(self._sizes[name] for name in names)
        kept = sum(self._kept.get(name, self._sizes[name]) for name in names)
        everything = sum(self._sizes.values())
        values: dict[str, float] = {"density": kept / max(1, size), "density_all": (everything - size + kept) / max(1, everything)}
        if self._by_mask and self._seen:
            values |= {"itop": itop_rate(self._seen)[0], "updates": self._updates, **self._changes}
        if self._health:
            values["dead_outputs"] = sum(state.dead_outputs for state in self._health.values())
            values["dead_inputs"] = sum(state.dead_inputs for state in self._health.values())
            values["disconnected"] = sum(state.disconnected for state in self._health.values())
        if self._effective is not None:
            values["effective_density"] = self._effective / size
        if self._cost is not None:
            values["flops_ratio"] = self._cost.ratio
            values["flops_ratio_without_attention"] = self._cost.ratio_without_attention
            values["training_flops"] = self._flops
        if self._timing is not None:
            values["latency_ms"] = 1000 * self._timing.seconds
        return {f"sparsity/{name}": value for name, value in values.items()}

    def _log_row(self, trainer: pl.Trainer) -> None:
        """Straight to the loggers: masks change between the steps at which Lightning logs."""
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            for logger in trainer.loggers:
                logger.log_metrics(self._values(), step=trainer.global_step)

    @torch.no_grad()
    def report(self) -> dict[str, Any]:
        """What ``sparsity.json`` holds, as it is now; while a fit runs."""
        values = {name.removeprefix("sparsity/"): value for name, value in self._values().items()}
        rates = itop_rate(self._seen)[1] if self._by_mask and self._seen else {}
        weights = {name: self._value(name) for name in self._prunable_names()}
        nonzero = torch.stack([(weight != 0).sum().cpu() for weight in weights.values()]).tolist() if weights else []
        total = sum(self._kept.get(name, self._sizes[name]) for name in weights)
        layers = []
        for (name, weight), count in zip(weights.items(), nonzero, strict=True):
            kept = self._kept.get(name, weight.numel())
            mask = self._last.get(name)
            two_four = mask is not None and mask.ndim >= 2 and is_nm(mask, 2, 4) and not bool(mask.all())
            row: dict[str, Any] = {
                "name": name,
                "shape": list(weight.shape),
                "size": weight.numel(),
                "kept": kept,
                "nonzero": int(count),
                "density": kept / weight.numel(),
                "share": kept / max(1, total),
                "masked": self._by_mask and name in self._last,
                "itop": rates.get(name),
                "macs_dense": None if self._cost is None else self._cost.macs_dense.get(name, 0.0),
                "macs_sparse": None if self._cost is None else self._cost.macs_sparse.get(name, 0.0),
                "bytes": size_in_bytes(weight.shape, kept, weight.element_size(), two_four),
            }
            if name in self._health:
                row |= {"dead_outputs": self._health[name].dead_outputs, "dead_inputs": self._health[name].dead_inputs}
            layers.append(row)
        cost = self._cost
        masked = [row["name"] for row in layers if row["masked"]]
        seed = os.environ.get("PL_GLOBAL_SEED")
        return {
            "method": list(self._sources),
            "cards": {name: asdict(card) for name, card in self._sources.items() if card is not None},
            "setting": {
                "density_base": "masked weights",
                "layerwise": sorted({card.layerwise for card in self._cards.values()}),
                "masked": masked,
                "pretrained": self.pretrained,
                "seed": None if seed is None else int(seed),
            },
            "density": {"prunable": values["density"], "all": values["density_all"], "basis": "masks" if self._by_mask else "weight != 0"},
            "layers": layers,
            "inference": None
            if cost is None
            else {
                "counted_on": self._macs["method"] if self._macs else None,
                "flops_dense": cost.flops_dense,
                "flops_sparse": cost.flops_sparse,
                "flops_ratio": cost.ratio,
                "flops_ratio_without_attention": cost.ratio_without_attention,
                "attention_macs": cost.attention_macs,
            },
            "training": {
                "samples": self._samples,
                "flops": None if cost is None else self._flops,
                "flops_per_sample": None if cost is None else self._per_sample,
            },
            "dynamics": {key: values[key] for key in ("itop", "updates", *self._changes) if key in values},
            "health": {key: values[key] for key in ("dead_outputs", "dead_inputs", "disconnected", "effective_density") if key in values},
            "bytes": {key: sum(row["bytes"][key] for row in layers) for key in ("dense", "csr", "bitmask")},
            "speed": None if self._timing is None else asdict(self._timing),
            "results": self._results,
            "guards": [{"number": number, "message": message} for message, number in self._warnings.items()],
        }

    def _write(self, trainer: pl.Trainer) -> None:
        folder = run_dir(trainer)  # on every rank: it may broadcast
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._report = self.report()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / "sparsity.json", json.dumps(self._report, indent=1) + "\n")
        except OSError as error:  # a report isn't worth a training run
            rank_zero_warn(f"SparsityReport can't write sparsity.json into {folder}: {error}")

    def dashboard_media(self) -> dict[str, Media]:
        """Tables: layers, totals, FLOPs against the result, guards."""
        if not self._report:
            return {}
        keys = ("name", "shape", "size", "kept", "nonzero", "density", "share", "itop", "dead_outputs", "dead_inputs")
        rows = [{**row, "shape": " x ".join(map(str, row["shape"]))} for row in self._report["layers"]]
        heads = ("layer", "shape", "weights", "kept by mask", "not 0", "density", "share of kept", "ITOP", "dead outputs", "dead inputs")
        results = [(row["step"], row["samples"], row["flops"], row["metric"], row["value"]) for row in self._report["results"]]
        guards = [(guard["number"], guard["message"]) for guard in self._report["guards"]]
        found: dict[str, Media] = {
            "sparsity/layers": TableMedia(heads, tuple(tuple(row.get(key) for key in keys) for row in rows)),
            "sparsity/totals": TableMedia(("what", "figure"), tuple(_totals(self._report))),
            "sparsity/guards": TableMedia(("guard", "warning"), tuple(guards) or ((None, "none"),)),
        }
        if results:
            found["sparsity/results"] = TableMedia(("step", "samples", "training FLOPs", "metric", "value"), tuple(results))
        return found
