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
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lit_methods import checks
from lit_methods.callbacks.ordering import OrderedCallback
from lit_methods.callbacks.sparsity.card import SparsityCard
from lit_methods.callbacks.sparsity.history import pack, unpack
from lit_methods.callbacks.sparsity.sparseland.findings import Findings, Network, tables
from lit_methods.callbacks.sparsity.sparseland.guards import Guards, final_warnings, nonzero_where_removed
from lit_methods.callbacks.targets import plain_parameter_name, plain_parameters, refuse_lazy, refuse_sharded
from lit_methods.callbacks.wrapping import built_by, takes_iterator
from lit_methods.catalog import Technique
from lit_methods.files import write_atomically
from lit_methods.panels import Curve, Media, Panel, TablePanel
from lit_methods.runs.folder import run_dir
from lit_methods.steps import log_global

TECHNIQUE = Technique(
    slug="sparseland",
    short="Sparseland",
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


class SparsityReport(OrderedCallback):
    """Says what a sparse network is and costs while it trains, and warns of what must not be claimed about it.

    It reads the masks of every callback (and of the module) that has ``sparsity_masks() -> {parameter name: bool mask}``; where nobody has
    it, weights that are 0 count as removed. Reported are, per layer and in all: density, FLOPs of inference and training (theory, 2 FLOPs
    per MAC), exploration and stability of the masks, dead units, bytes, and with ``measure_speed`` the measured latency. Two densities are
    named: over the prunable weights (linear, convolution and attention layers, and whatever is masked), and over all parameters. Training
    FLOPs follow the regime in the ``sparsity_card`` of the callback that masks a weight (see :class:`SparsityCard`), at the density of the
    moment, from one forward pass per sample; a step with several passes costs a multiple.

    Runs: at the first training batch one extra forward pass, on a copy in eval mode that shares the parameters; the generators of random
    numbers stay as they were. Then at changes of the masks (event ``on_mask_updated``) and at the end of epochs. On every
    ``mask_check_every_n``-th optimiser step it reads whether removed weights are 0; other steps add one product on the host. Each time a
    row of figures is logged, at the start the cards as hyperparameters. Under DDP every rank watches its own masks, and rank 0 writes
    ``sparsity.json`` into the run's folder, which :func:`not_comparable`, :func:`missing_evidence` and :func:`comparison_table` read.

    Saves: union of the masks, first and last ones (a bit per weight), updates, FLOPs.

    Refuses: strategies that shard weights, and masks of no parameter of the module.

    Args:
        strict: Raise where a guard would warn.
        forward: Name of a method of the module, ``(batch)``, that runs the network once. None: ``validation_step``, ``test_step``,
            ``training_step`` or ``predict_step``, the first that works on a training batch.
        mask_check_every_n: Optimiser steps between two checks that removed weights are exactly 0; 0: never.
        measure_speed: Time the network at the end of training, as it is: with masked dense weights.
        metric: Validation metric that stands beside the FLOPs; None: the first with ``val`` and the word ``acc``, ``accuracy``, ``iou``,
            ``miou``, ``f1`` or ``dice`` in its name, or else ``jaccard``, in capitals or not.
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
        checks.at_least(0, "optimiser steps, or 0 for never,", mask_check_every_n=mask_check_every_n)
        checks.within("(0, 1]", "a share", target_density=target_density)
        self.strict, self.forward, self.mask_check_every_n, self.measure_speed = strict, forward, mask_check_every_n, measure_speed
        self.metric, self.target_density, self.pretrained = metric, target_density, pretrained
        self._reset()

    def _reset(self) -> None:
        self._findings = Findings(Guards(self.strict))
        self._batch: Any = None  # to be timed
        self._watching, self._resumed, self._checked = False, False, -1
        self._report: dict[str, Any] = {}

    # ---- hooks -------------------------------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what can't work."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        refuse_sharded(trainer, type(self).__name__)
        if built_by(pl_module) is None:
            refuse_lazy(pl_module, type(self).__name__)
        if self.forward is not None and not callable(getattr(pl_module, self.forward, None)):
            raise TypeError(f"forward is {self.forward!r}, but {type(pl_module).__name__} has no such method: name one that takes a batch")
        self._reset()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at weights and masks for the first time; all callbacks have made theirs."""
        refuse_lazy(pl_module, type(self).__name__)
        self._findings.network, self._watching = Network(pl_module), True
        self._observe(trainer, pl_module)
        cards = {name: asdict(card) for name, card in self._findings.sources.items() if card is not None}
        for logger in trainer.loggers if cards else ():
            logger.log_hyperparams({"sparsity_card": cards})

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Count the FLOPs of this batch; at the first one, those of a sample. Guards 2 and 3, now and then."""
        if self._due(trainer) and self._checked != trainer.fit_loop.epoch_loop._batches_that_stepped:
            self._check(trainer, pl_module)
        if not takes_iterator(pl_module):
            self._spend(trainer, pl_module, batch)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the batch of a step that takes ``dataloader_iter``: now it is known."""
        if takes_iterator(pl_module):
            self._spend(trainer, pl_module, batch)

    def _spend(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> None:
        meter = self._findings.meter
        if meter.macs is None and not meter.uncountable:
            meter.count(trainer, pl_module, batch, self.forward, type(self).__name__)
            self._findings.price()
            if not self._resumed:
                self._log_row(trainer)
        if self.measure_speed and self._batch is None and meter.macs is not None:
            self._batch = apply_to_collection(batch, Tensor, torch.clone)
        meter.spend(batch, trainer.world_size)

    def on_mask_updated(self, trainer: pl.Trainer, pl_module: pl.LightningModule, source: Any) -> None:
        """Compare new masks with the old ones."""
        if self._watching and self._observe(trainer, pl_module):
            self._log_row(trainer)

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        """Guard 3, on gradients: after the mask callbacks have had them."""
        if self._due(trainer):
            owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}  # the others' are not masked yet
            mine = {name: parameter for name, parameter in plain_parameters(pl_module).items() if id(parameter) in owned}
            promised = [
                name for name, card in self._findings.cards.items() if card.regime == "sparse_to_sparse" and not card.backward_dense
            ]
            grads = {name: grad for name in promised if name in mine and (grad := mine[name].grad) is not None}
            for name in nonzero_where_removed(grads, self._findings.history.last):
                self._findings.guards.warn(3, f"{name} has gradients of removed weights at an optimiser step")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log where things stand."""
        if not self._findings.by_mask:
            self._observe(trainer, pl_module)
        values = {f"sparsity/{name}": float(value) for name, value in self._findings.values().items()}
        log_global(pl_module, values, batch_size=1)
        if not trainer.enable_validation:
            self._write(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the result beside the FLOPs."""
        if trainer.sanity_checking or not self._watching:
            return
        metrics, meter = trainer.callback_metrics, self._findings.meter
        name = self.metric or likely_metric(metrics)
        if name is not None and name in metrics:
            flops = meter.flops if meter.macs is not None else None
            row = {"step": trainer.global_step, "samples": meter.samples, "flops": flops, "metric": name, "value": float(metrics[name])}
            self._findings.results.append(row)
        self._write(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The last look, and the guards that need it."""
        self._observe(trainer, pl_module)
        if self._findings.by_mask and self.mask_check_every_n:
            self._check(trainer, pl_module)
        for source in self._sources(trainer, pl_module):
            own = getattr(source, "density", None)
            target = own if self.target_density is None and isinstance(own, float) else self.target_density
            names = [plain_parameter_name(name) for name in source.sparsity_masks()]
            self._findings.guards.take(final_warnings(source, names, self._findings.history, target))
        if self.measure_speed and self._batch is not None:
            try:
                self._findings.timing = self._findings.meter.time(trainer, pl_module, self._batch)
            except Exception as error:  # a figure isn't worth a trained network
                rank_zero_warn(f"SparsityReport could not measure the speed: {type(error).__name__}: {error}")
        self._log_row(trainer, ended=True)
        self._write(trainer)
        self.leave(trainer, pl_module)

    def leave(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let go of the module."""
        self._watching, self._batch = False, None

    def state_dict(self) -> dict[str, Any]:
        """What can't be computed again: masks of the past, and sums."""
        findings, history = self._findings, self._findings.history
        if not history.last:
            return {}
        return {
            "first": pack(history.first),
            "last": pack(history.last),
            "seen": pack(history.ever),
            "updates": findings.updates,
            "changes": dict(findings.changes),
            **findings.meter.state(),
            "results": copy.deepcopy(findings.results),
            "warnings": dict(findings.guards.warnings),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the checkpoint was saved."""
        if not state:
            return
        findings, history = self._findings, self._findings.history
        history.first, history.last, history.ever = (unpack(state[key]) for key in ("first", "last", "seen"))
        findings.updates, findings.changes = int(state["updates"]), dict(state["changes"])
        findings.meter.load(state)
        findings.results, findings.guards.warnings = copy.deepcopy(state["results"]), dict(state["warnings"])
        self._resumed = True

    # ---- looking -----------------------------------------------------------------------------------------------------------------------

    def _sources(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[Any]:
        """The module and the callbacks that have masks."""
        everybody = (pl_module, *trainer.callbacks)  # type: ignore[attr-defined]
        return [source for source in everybody if callable(getattr(source, "sparsity_masks", None))]

    def _observe(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        """Take in all masks there are, or which weights are not 0 where nobody has masks; whether masks have changed."""
        findings, network = self._findings, self._findings.network
        sources, masks = self._sources(trainer, pl_module), {}
        findings.by_mask = bool(sources)
        for source in sources:
            card = findings.sources[type(source).__name__] = getattr(source, "sparsity_card", None)
            for name, mask in source.sparsity_masks().items():
                plain = plain_parameter_name(name)
                if not network.has(plain):
                    raise ValueError(f"{type(source).__name__}.sparsity_masks() names {name!r}, no parameter of {type(pl_module).__name__}")
                masks[plain] = mask.detach().to("cpu", torch.bool, copy=True)
                if isinstance(card, SparsityCard):
                    findings.cards[plain] = card
        return findings.look(masks if sources else {name: (network.value(name) != 0).cpu() for name in network.prunable})

    def _due(self, trainer: pl.Trainer) -> bool:
        watches = self._watching and self._findings.by_mask and self.mask_check_every_n > 0
        stepped: int = trainer.fit_loop.epoch_loop._batches_that_stepped  # global_step counts each of several optimisers
        return watches and stepped % self.mask_check_every_n == 0

    @torch.no_grad()
    def _check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Guards 2 and 3, on weights as the next forward pass will use them and on the optimisers' state."""
        self._checked = trainer.fit_loop.epoch_loop._batches_that_stepped
        self._observe(trainer, pl_module)  # masks that are made anew in every forward pass have moved since the last event
        findings, network = self._findings, self._findings.network
        last, parameters = findings.history.last, plain_parameters(pl_module)
        for name in nonzero_where_removed({name: network.value(name) for name in last}, last):
            findings.guards.warn(2, f"{name}: something (weight decay, momentum, averaging, loading) has brought removed weights back")
        for name, card in findings.cards.items():
            if card.regime != "sparse_to_sparse" or card.optimizer_dense or name not in parameters:
                continue
            for state in [optimizer.state.get(parameters[name], {}).values() for optimizer in trainer.optimizers]:
                tensors = [value for value in state if isinstance(value, Tensor) and value.shape == parameters[name].shape]
                if any(nonzero_where_removed({name: value}, last) for value in tensors):
                    findings.guards.warn(3, f"{name} has optimiser state of removed weights")

    # ---- telling -----------------------------------------------------------------------------------------------------------------------

    def _log_row(self, trainer: pl.Trainer, ended: bool = False) -> None:
        """Straight to the loggers: masks change between the steps at which Lightning logs."""
        step = trainer.fit_loop.epoch_loop._batches_that_stepped - ended  # as Lightning counts what it logs
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            for logger in trainer.loggers:
                logger.log_metrics({f"sparsity/{name}": value for name, value in self._findings.values().items()}, step=step)

    def report(self) -> dict[str, Any]:
        """What ``sparsity.json`` holds, as it is now; while a fit runs."""
        return self._findings.report(self.pretrained)

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
        return tables(self._report) if self._report else {}


_SCORES = ("acc|accuracy|iou|miou|f1|dice", "jaccard")  # the former first


def likely_metric(names: Iterable[str]) -> str | None:
    """The first name that says it is of a validation and the higher the better, such as ``val/acc`` or ``val_MulticlassF1Score``."""
    words = {name: re.findall(r"[A-Z]+(?![a-z])\d*|[A-Z]?[a-z]+\d*", name.replace("IoU", "Iou")) for name in names}
    words = {name: [word.lower() for word in parts] for name, parts in words.items()}
    own = [name for name, parts in words.items() if any(word.startswith(("val", "eval")) for word in parts)]
    scores = (name for kind in _SCORES for name in own if any(re.fullmatch(rf"({kind})\d*", word) for word in words[name]))
    return next(scores, None)
