"""MaskSparsity as a callback: fixed channels, the penalty, and the channels' removal.

Maths, paper and origin: :mod:`~lit_methods.callbacks.sparsity.masksparsity.core`.
"""

import functools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lit_methods import checks
from lit_methods.callbacks.batch import Key, find_in_batch
from lit_methods.callbacks.ordering import OrderedCallback
from lit_methods.callbacks.sparsity import channels
from lit_methods.callbacks.sparsity.callback import check_ranks
from lit_methods.callbacks.sparsity.channels import PLAN_KEY, ChannelGroup, ChannelPlan
from lit_methods.callbacks.sparsity.flops import count_macs
from lit_methods.callbacks.sparsity.masksparsity import core
from lit_methods.callbacks.sparsity.masksparsity.core import Criterion, Penalty
from lit_methods.callbacks.sparsity.store import prunable_weights
from lit_methods.callbacks.targets import plain_modules, plain_parameters, refuse_lazy, refuse_sharded
from lit_methods.callbacks.twin import independent_copy, training_batches
from lit_methods.callbacks.wrapping import attach, built_by, detach
from lit_methods.catalog import Technique
from lit_methods.compiled import plain_names
from lit_methods.panels import Curve, HistogramMedia, HistogramPanel, Media, Panel, TableMedia, TablePanel
from lit_methods.runs.checkpoints import check_readable
from lit_methods.runs.folder import run_dir
from lit_methods.steps import log_global

TECHNIQUE = Technique(
    slug="masksparsity",
    short="MaskSparsity",
    title="Pruning-aware Sparse Regularization for Network Pruning",
    arxiv="2201.06776",
    family="sparsity",
    form="callback",
    classes=("lit_methods.callbacks.MaskedBNSparsity",),
    configs=("masksparsity.yaml",),
    golden=("bn_sparse_grad", "residual_group_mask", "channel_prune", "ot_threshold"),
    claim="Right after the same channels are cut, without fine-tuning, MaskSparsity has a higher accuracy than a sparsity penalty on all "
    "channels.",
    summary="Penalises the batch-norm scales of doomed channels alone, then removes those channels for good; with Network Slimming.",
)

_KEPT = ("macs", "start", "before")  # in the state
Stage = Literal["baseline", "global_sparsity", "mask", "mask_sparsity", "prune", "finetune"]


class MaskedBNSparsity(OrderedCallback):
    """Removes channels from any network with batch norms: MaskSparsity, and Network Slimming as its baseline.

    A recipe of stages, a run each; ``weights`` is the checkpoint of the stage before:

    1. ``baseline`` (fit): the dense network; this callback does nothing.
    2. ``global_sparsity`` (fit): the penalty on the scales of all prunable batch norms (Network Slimming). At its end the smallest scales
       tell which channels can go.
    3. ``mask`` (validate, not needed): writes ``masks.npz`` into the run's folder, from the scales in ``weights``.
    4. ``mask_sparsity`` (fit): starts again from the baseline; the penalty acts on the channels that ``mask`` doesn't keep, on no other.
    5. ``prune`` (validate or test): removes the channels, evaluates the smaller network, and writes ``checkpoints/pruned.ckpt``.
    6. ``finetune`` (fit): removes the channels before the optimiser is made, and trains on.

    The penalty's gradient, lambda r(gamma), is added to the scales' gradients once per optimiser step: after they are summed over
    micro-batches and averaged over ranks, unscaled, and clipped. Logged losses don't contain it. (With manual optimisation it is added in
    ``on_before_optimizer_step``, which comes after the module's own clipping.) Weight decay stays as it is, shifts aren't penalised.

    Runs: prunable are the batch norms whose channels can be traced and removed (see
    :func:`~lit_methods.callbacks.sparsity.channels.channel_groups`), on a copy, with one batch of the training data, when fit starts; which
    norms share a mask, and which are left alone and why, is printed. It needs the extra ``sparsity`` (Torch-Pruning). Masks aren't applied
    while training, so there is nothing for ``SparsityReport`` to see before channels are gone.

    Saves: masks, groups of channels, MACs; in ``global_sparsity`` the weights that it started from, so that the next stage can go back to
    them; once channels are removed, the channel plan, under ``channel_plan`` of the checkpoint. With this callback, fit, validate, test and
    predict rebuild the smaller network from that before loading; without it, ``load_pruned`` does.

    Refuses: sharding strategies, a second of its kind, and ``ModelPruning``.

    Args:
        stage: One of the list above.
        weights: Checkpoint to start from. For ``mask_sparsity`` either the baseline's, or that of the global run, which holds the
            baseline's weights, too. None: the module as it was built.
        mask: For ``mask_sparsity``: a ``.npz`` or ``.pt`` file, name of the batch norm -> bool (True: kept), as ``save_masks`` writes it
            and as it lies in ``artifacts/`` of a run; or a checkpoint, whose scales make it. None: the scales that training starts with.
        lambda_: Strength of the penalty; authors: 5e-4, 2e-4.
        penalty: r, one of ``l1``, ``l2``, ``smooth_l1`` and ``bounded_l2``, as ``penalty_gradient`` in the core says.
        criterion: How scales make a mask: ``threshold``, ``ot``, ``ratio`` or ``global_ratio``, as ``keep_masks`` in the core says.
        threshold: Scales above it stay (authors: 0.01); also that of the log.
        energy: Share of the energy that ``ot`` discards.
        ratio: Share of the channels that goes; or pattern -> share.
        min_channels: So many channels of each layer stay at least.
        cut: What ``prune`` and ``finetune`` remove from a network of ``mask_sparsity``: what its ``mask`` says, or what the criterion says
            now (``criterion``). A network of ``global_sparsity`` is cut by the criterion.
        from_scratch: In ``finetune``: take the shape of ``weights`` and none of its values.
        keep_start: In ``global_sparsity``: save the weights of the start, which makes checkpoints larger.
        forward: Method or submodule that maps inputs to outputs, for tracing; ``forward``: the module itself.
        inputs: Key or position of the inputs in a batch; null: ``image``, or 0.
        input_shape: Shape of one input, without the batch: trace with random numbers in place of a training batch.
        targets: ``fnmatch`` patterns on names of batch norms that may be pruned; empty: all.
        skip: Patterns of those that may not. A group with one of them stays whole.

    Raises:
        ValueError: An argument outside its range; in ``setup``, files that don't fit.
        ImportError: Torch-Pruning is missing, in the stages 2 and 4.
    """

    runs_before: ClassVar[Sequence[str]] = ("SparsityReport", "Dashboard")
    set_up_before: ClassVar[Sequence[str]] = ("WeightAveraging", "StochasticWeightAveraging", "NMSparsity")
    conflicts_with: ClassVar[Mapping[str, str]] = {"ModelPruning": "it renames the weights while fit runs"}

    panels: ClassVar[tuple[Panel, ...]] = (
        Curve(
            "Mean |scale| of channels that stay and that go",
            ("masksparsity/gamma_kept", "masksparsity/gamma_removed"),
            note="What goes should be near 0 at the end, what stays should not be pushed down with it.",
        ),
        Curve("Channels to be removed that are below the threshold", ("masksparsity/removed_below_threshold",), note="1: cutting is free."),
        HistogramPanel("|scale| of channels that go", "masksparsity/removed", note="One peak at 0 is what the penalty is for."),
        HistogramPanel("|scale| of channels that stay", "masksparsity/kept", note="Network Slimming moves these to the left, too."),
        TablePanel("Channels per layer", "masksparsity/layers"),
        TablePanel(
            "Before and after removing channels",
            "masksparsity/pruning",
            note="While training: what the masks would leave. MACs are theory.",
        ),
    )

    def __init__(
        self,
        stage: Stage = "mask_sparsity",
        weights: Path | None = None,
        mask: Path | None = None,
        lambda_: float = 5e-4,
        penalty: Penalty = "l1",
        criterion: Criterion = "threshold",
        threshold: float = 0.01,
        energy: float = 1e-4,
        ratio: float | dict[str, float] = 0.5,
        min_channels: int = 1,
        cut: Literal["mask", "criterion"] = "mask",
        from_scratch: bool = False,
        keep_start: bool = True,
        forward: str = "forward",
        inputs: Key = None,
        input_shape: Sequence[int] | None = None,
        targets: Sequence[str] = (),
        skip: Sequence[str] = (),
    ) -> None:
        super().__init__()
        checks.literals(MaskedBNSparsity, locals())
        checks.patterns(targets=targets, skip=skip)
        checks.at_least(0, lambda_=lambda_)
        if stage in ("mask", "prune", "finetune") and weights is None:
            raise ValueError(f"stage={stage!r} needs weights: give the checkpoint of the stage before")
        if mask is not None and stage != "mask_sparsity":
            raise ValueError(f"mask goes with stage='mask_sparsity', not with {stage!r}: in other stages the checkpoint tells the channels")
        self.stage, self.lambda_, self.penalty, self.cut = stage, lambda_, penalty, cut
        self.weights, self.mask = (None if path is None else Path(path) for path in (weights, mask))
        self.criterion, self.threshold, self.energy, self.ratio, self.min_channels = criterion, threshold, energy, ratio, min_channels
        self.from_scratch, self.keep_start, self.forward, self.inputs = from_scratch, keep_start, forward, inputs
        self.input_shape = None if input_shape is None else list(input_shape)
        self.targets, self.skip = list(targets), list(skip)
        core.keep_masks({}, "threshold", threshold=threshold, ratio=ratio, min_channels=min_channels)  # checks their ranges
        core.ot_threshold(torch.ones(1), energy)
        self.plan: ChannelPlan = {}
        self._last: tuple[list[Any], dict[str, Tensor], dict[str, Tensor]] = ([], {}, {})  # scales of the last fit, its masks, its start
        self._reset()

    def _reset(self) -> None:
        self._norms: dict[str, nn.Module] = {}  # prunable ones, while fit runs
        self._prune: dict[int, Tensor | None] = {}  # id of a scale -> channels that the penalty acts on
        self._groups: list[ChannelGroup] = []
        self._masks: dict[str, Tensor] = {}  # keep; of mask_sparsity
        self._macs: dict[str, float] = {}  # per sample, before cutting
        self._start: dict[str, Tensor] = {}
        self._before: dict[str, float] = {}  # results of the last validation, before cutting
        self._after: dict[str, float] = {}
        self._cost: dict[str, tuple[float, float]] = {}  # what -> before and after cutting
        self._parameters: dict[str, tuple[int, int]] = {}  # name -> entries and dimensions
        self._scales: tuple[Tensor, Tensor] | None = None  # of kept and removed channels, as they were when cut
        self._loaded: dict[str, Any] | None = None
        self._module: Any = None

    @property
    def _names(self) -> list[str]:
        """Prunable batch norms."""
        return [name for group in self._groups for name in group.norms]

    @property
    def _penalises(self) -> bool:
        return self.stage in ("global_sparsity", "mask_sparsity")

    # ---- hooks -------------------------------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Load and cut, before the optimisers are made and before a checkpoint is loaded.

        Raises:
            ValueError: What can't work: a stage that doesn't train, files that don't fit, a strategy that shards weights.
            TypeError: The module has nothing to trace.
        """
        super().setup(trainer, pl_module, stage)
        self.leave(trainer, pl_module)
        self._reset()
        if not _is_cut(pl_module, self.plan):  # another module than last time
            self.plan = {}
        self._module = pl_module
        attach(pl_module, self._rebuild, "on_load_checkpoint", around=True)
        if stage == "fit":
            refuse_sharded(trainer, "MaskedBNSparsity")
            if self.stage in ("mask", "prune"):
                raise ValueError(f"MaskedBNSparsity: stage={self.stage!r} doesn't train: run `lit validate` (trainer.validate), not fit")
            if self._penalises:
                self._refuse(pl_module)
                if pl_module.automatic_optimization:  # Lightning calls it at every step, clipping or not
                    attach(pl_module, self._penalise, "configure_gradient_clipping")
        if self.weights is not None and not self.plan and (stage == "fit" or self.stage in ("mask", "prune")):
            self._begin(pl_module)

    def _refuse(self, pl_module: pl.LightningModule) -> None:
        if built_by(pl_module) is None:
            refuse_lazy(pl_module, "MaskedBNSparsity")
        root: Any = pl_module
        found = functools.reduce(lambda part, name: getattr(part, name, None), self.forward.split("."), root)
        if not callable(found) or (self.forward == "forward" and not is_overridden("forward", pl_module, pl.LightningModule)):
            missing = f"{type(pl_module).__name__} has no {self.forward!r} that maps inputs to outputs"
            raise TypeError(f"MaskedBNSparsity traces the network, but {missing}: give forward the name of such a method or submodule")

    def _rebuild(self, call: Any, checkpoint: dict[str, Any]) -> Any:
        """Around ``on_load_checkpoint``: give the module the widths of the checkpoint first."""
        plan = checkpoint.get(PLAN_KEY)
        if plan and plan != self.plan:
            if self.plan:
                raise ValueError(f"the checkpoint's network was cut otherwise than that of weights={str(self.weights)!r}: give the same")
            channels.apply_plan(self._module, plan)
            self.plan = plan
        return call(checkpoint)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Trace the network and make the masks, or restore them.

        Raises:
            ValueError: A checkpoint of another stage, a mask that doesn't fit, nothing to prune.
        """
        if self._loaded is not None and self._loaded.get("stage") != self.stage:
            stages = f"the checkpoint is of stage {self._loaded.get('stage')!r}, this run of {self.stage!r}"
            raise ValueError(f"MaskedBNSparsity: {stages}: give it as weights of the callback; a resume goes on in the same stage")
        if not self._penalises:
            return
        if self._loaded is None:
            with isolate_rng(pl_module.device.type == "cuda"):  # a loader draws a seed, data sets may draw more
                left = self._trace(trainer, pl_module)
            scales, masks, start = self._last
            if scales and {id(scale) for scale in scales} <= {id(parameter) for parameter in pl_module.parameters()}:  # a second fit
                self._masks, self._start = masks, start
            elif self.stage == "mask_sparsity":
                self._masks = self._initial_masks(pl_module)
            elif self.keep_start:
                self._start = {name: value.detach().cpu().clone() for name, value in pl_module.state_dict().items()}
            self._announce(left)
        else:
            self._groups = [ChannelGroup.from_state(group) for group in self._loaded["groups"]]
            if self.stage == "mask_sparsity":
                self._masks = {name: mask.clone() for name, mask in self._loaded["masks"].items()}
            for name in _KEPT:
                setattr(self, f"_{name}", dict(self._loaded[name]))
        self._loaded = None
        named = plain_modules(pl_module)
        self._norms, self._parameters = {name: named[name] for name in self._names}, _sizes(pl_module)
        for name, norm in self._norms.items():
            gamma: Any = norm.weight
            if self.stage == "global_sparsity":
                self._prune[id(gamma)] = None
            elif not self._masks[name].all():
                self._prune[id(gamma)] = ~self._masks[name].to(gamma.device)
        self._last = [norm.weight for norm in self._norms.values()], self._masks, self._start
        check_ranks("MaskedBNSparsity", [mask.to(pl_module.device) for mask in self._masks.values()], "weights or files")

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        """With manual optimisation, add the penalty here: the module has clipped already."""
        if self._penalises and not pl_module.automatic_optimization:
            self._penalise(None, optimizer)

    @torch.no_grad()
    def _penalise(self, _: None, optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            for gamma in group["params"]:
                if gamma.grad is not None and id(gamma) in self._prune:
                    prune = self._prune[id(gamma)]
                    gamma.grad.copy_(core.sparse_gradient(gamma, gamma.grad, prune, self.penalty, self.lambda_, group["lr"]))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the scales of channels that stay and that go."""
        if self._norms:
            log_global(pl_module, self._figures(), batch_size=1)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """While training: keep the results for the table. In the stages ``mask`` and ``prune``: write the file."""
        if self._penalises and not trainer.sanity_checking:
            self._before = {name: float(value) for name, value in trainer.callback_metrics.items() if "val" in name}
        self._write(trainer)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """In the stages ``mask`` and ``prune``: write the file."""
        self._write(trainer)

    def _write(self, trainer: pl.Trainer) -> None:
        if self.stage not in ("mask", "prune") or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._after = {name: float(value) for name, value in trainer.callback_metrics.items()}
        folder = run_dir(trainer)  # on every rank: it may broadcast
        path = folder / "masks.npz" if self.stage == "mask" else folder / "checkpoints" / "pruned.ckpt"
        if self.stage == "prune":
            trainer.save_checkpoint(path)
        elif trainer.is_global_zero:
            path.parent.mkdir(parents=True, exist_ok=True)
            core.save_masks(path, self._masks)
        rank_zero_info(f"MaskedBNSparsity: {self.stage} written to {path}")

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log what was removed."""
        if self._scales is not None:
            shares = {f"masksparsity/{name}_kept": after / before for name, (before, after) in self._cost.items() if before}
            log_global(pl_module, self._figures() | shares, batch_size=1)

    on_test_epoch_end = on_validation_epoch_end

    # ---- which channels ----------------------------------------------------------------------------------------------------------------

    def _trace(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, str]:
        """Groups of prunable channels and the MACs of the network; why other norms are left alone."""
        refuse_lazy(pl_module, "MaskedBNSparsity")
        twin: Any = independent_copy(trainer, pl_module)
        twin.trainer = None  # what is copied again shouldn't copy it

        def run(net: Any, inputs: Tensor) -> Any:
            return net(inputs) if self.forward == "forward" else operator.attrgetter(self.forward)(net)(inputs)

        inputs = self._example(trainer, pl_module)
        groups, left = channels.channel_groups(twin, inputs, run)
        self._groups = [group for group in groups if all(self._chosen(name) for name in group.norms)]
        left |= {name: "targets or skip say so" for group in groups if group not in self._groups for name in group.norms}
        if not self._groups:
            reasons = "; ".join(f"{name}: {why}" for name, why in left.items())
            way = "at least one must stand behind a linear layer or convolution whose weight is an ordinary parameter"
            raise ValueError(f"MaskedBNSparsity: no batch norm of {type(pl_module).__name__} can be pruned ({reasons}): {way}")
        counted = count_macs(twin.eval(), lambda: run(twin, inputs), prunable_weights(twin))
        self._macs = {name: macs / len(inputs) for name, macs in counted.per_weight.items()}
        return left

    def _example(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Tensor:
        """A few inputs of the network."""
        if self.input_shape is not None:
            return torch.rand(4, *self.input_shape, device=pl_module.device)
        try:
            batch = next(iter(training_batches(trainer)), None)
        except ValueError as error:
            why = "MaskedBNSparsity traces the network with a batch of a DataLoader, and the training data are something else"
            raise ValueError(f"{why}: give input_shape, the shape of one input such as [3, 224, 224]") from error
        if batch is None:
            raise ValueError("MaskedBNSparsity traces the network with a training batch, but the training data are empty")
        inputs = batch if isinstance(batch, Tensor) else find_in_batch(batch, self.inputs, ("image", 0), "inputs")
        inputs = inputs[:4]
        return inputs.float() if inputs.is_floating_point() else inputs

    def _chosen(self, name: str) -> bool:
        wanted = not self.targets or any(fnmatchcase(name, pattern) for pattern in self.targets)
        return wanted and not any(fnmatchcase(name, pattern) for pattern in self.skip)

    def _by_criterion(self, gammas: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Masks from scales, agreed upon in each group."""
        options: dict[str, Any] = {name: getattr(self, name) for name in ("threshold", "energy", "ratio", "min_channels")}
        masks = core.keep_masks(gammas, self.criterion, **options)
        return channels.agree(self._groups, masks, gammas, self.min_channels)

    def _gammas_in(self, state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
        state = plain_names(state)
        if missing := [name for name in self._names if f"{name}.weight" not in state]:
            raise ValueError(f"{path} has no weight of the batch norm {missing[0]!r}: give a checkpoint of the same module")
        return {name: state[f"{name}.weight"] for name in self._names}

    def _gammas(self) -> dict[str, Tensor]:
        return {name: norm.weight.detach() for name, norm in self._norms.items()}  # type: ignore[union-attr, operator, misc]

    def _initial_masks(self, pl_module: pl.LightningModule) -> dict[str, Tensor]:
        if self.mask is None:
            named = plain_parameters(pl_module)
            return self._by_criterion({name: named[f"{name}.weight"].detach().cpu() for name in self._names})
        if self.mask.suffix in (".npz", ".pt"):
            masks = core.load_masks(self.mask)
            if unknown := sorted(set(masks) - set(plain_modules(pl_module))):
                raise ValueError(f"{self.mask} has a mask of {unknown[0]!r}, which {type(pl_module).__name__} has not")
            if ignored := sorted(name for name in set(masks) - set(self._names) if not masks[name].all()):
                rank_zero_warn(f"MaskedBNSparsity: {', '.join(ignored)} can't be pruned, so their masks in {self.mask} don't count")
            whole = {name: torch.ones(group.channels) for group in self._groups for name in group.norms}
            scores = whole | {name: mask.float() for name, mask in masks.items()}
            return channels.agree(self._groups, masks, scores, self.min_channels)
        content = check_readable(self.mask)
        return self._by_criterion(self._gammas_in(content.get("state_dict", content), self.mask))

    def _announce(self, left: Mapping[str, str]) -> None:
        several = [" + ".join(group.norms) for group in self._groups if len(group.norms) > 1]
        words = f"MaskedBNSparsity ({self.stage}): {len(self._names)} batch norms"
        if self._masks:
            kept = [int(mask.sum()) for mask in self._masks.values()]
            words += f", {sum(kept):,} of {sum(map(len, self._masks.values())):,} channels stay"
        words += f"; one mask each for {', '.join(several)}" if several else ""
        words += f"; left alone: {'; '.join(f'{name} ({why})' for name, why in left.items())}" if left else ""
        rank_zero_info(words)

    # ---- cutting -----------------------------------------------------------------------------------------------------------------------

    def _begin(self, pl_module: pl.LightningModule) -> None:
        """Load ``weights`` and, in the later stages, cut."""
        assert self.weights is not None
        if not self.weights.is_file():
            raise FileNotFoundError(f"weights={str(self.weights)!r} does not exist: give the checkpoint of the stage before")
        content = check_readable(self.weights)
        state, plan = content.get("state_dict", content), content.get(PLAN_KEY) or {}
        mine: dict[str, Any] = next((s for key, s in content.get("callbacks", {}).items() if key.startswith("MaskedBNSparsity")), {})
        if self.stage == "mask_sparsity" and mine.get("start"):
            state = mine["start"]
        channels.apply_plan(pl_module, plan)
        self.plan = plan
        if not self.from_scratch or self.stage != "finetune":
            channels.load_state(pl_module, state, self.weights)
        self._before = dict(mine.get("before", {}))
        if self.stage not in ("mask", "prune", "finetune"):
            return
        self._groups = [ChannelGroup.from_state(group) for group in mine.get("groups", [])]
        if not self._groups:
            if plan and self.stage != "mask":
                return  # cut already
            stages = "a checkpoint of stage global_sparsity or mask_sparsity"
            raise ValueError(f"weights={str(self.weights)!r} doesn't say which channels can go: give {stages}")
        gammas = self._gammas_in(state, self.weights)
        own = mine["stage"] == "mask_sparsity" and self.cut == "mask" and self.stage != "mask"
        self._masks = {name: mask.clone() for name, mask in mine["masks"].items()} if own else self._by_criterion(gammas)
        self._scales = _divide(gammas, self._masks)
        if self.stage != "mask":
            self._cut(pl_module, mine.get("macs", {}))

    def _cut(self, pl_module: pl.LightningModule, macs: Mapping[str, float]) -> None:
        plan = channels.make_plan(self._groups, self._masks)
        self._cost = _cost(_sizes(pl_module), macs, plan)
        channels.apply_plan(pl_module, plan)
        self.plan = channels.compose(self.plan, plan)
        shares = ", ".join(f"{one:,.0f} -> {other:,.0f} {name}" for name, (one, other) in self._cost.items())
        rank_zero_info(f"MaskedBNSparsity: channels removed, {shares}")

    # ---- what is shown -----------------------------------------------------------------------------------------------------------------

    def _sides(self) -> tuple[Tensor, Tensor] | None:
        """|scale| of the channels that stay and that go: as they were when cut, or by the masks (or the criterion) as they are now."""
        if self._scales is not None or not self._norms:
            return self._scales
        gammas = self._gammas()
        return _divide(gammas, self._masks or self._by_criterion(gammas))

    def _figures(self) -> dict[str, Any]:
        kept, removed = self._sides() or (torch.ones(0), torch.ones(0))
        figures: dict[str, Any] = {"removed_share": len(removed) / max(1, len(kept) + len(removed))}
        if len(kept) and len(removed):
            figures |= {
                "gamma_kept": kept.mean(),
                "gamma_removed": removed.mean(),
                "gamma_ratio": kept.mean() / removed.mean().clamp(min=1e-12),
                "removed_below_threshold": (removed <= self.threshold).float().mean(),
            }
        return {f"masksparsity/{name}": value for name, value in figures.items()}

    def keep_masks(self) -> dict[str, Tensor]:
        """Batch norm -> (C,) bool, True: stays. In ``global_sparsity`` what the criterion says now; {} before fit."""
        if self._norms and self.stage == "global_sparsity":
            return self._by_criterion(self._gammas())
        return dict(self._masks)

    def dashboard_media(self) -> dict[str, Media]:
        """Histograms of the scales, and tables."""
        found: dict[str, Media] = {}
        if (scales := self._sides()) is not None:
            sides = [side.float().cpu().numpy() for side in scales]
            edges = np.linspace(0.0, max((float(side.max()) for side in sides if len(side)), default=1.0) or 1.0, 41)
            for name, side in zip(("kept", "removed"), sides, strict=True):
                found[f"masksparsity/{name}"] = HistogramMedia(np.histogram(side, edges)[0], edges)
        if masks := self.keep_masks():
            shared = [f"group {index}" if len(group.norms) > 1 else "" for index, group in enumerate(self._groups)]
            members = [(name, label, group.channels) for group, label in zip(self._groups, shared, strict=True) for name in group.norms]
            rows = [(*member, int(masks[member[0]].sum())) for member in members]
            found["masksparsity/layers"] = TableMedia(("batch norm", "shares a mask", "channels", "stay"), tuple(rows))
        cost = self._cost
        if not cost and masks and self._parameters:
            cost = _cost(self._parameters, self._macs, channels.make_plan(self._groups, masks))
        if cost:
            results = {name: (self._before[name], self._after[name]) for name in sorted(set(self._before) & set(self._after))}
            pairs = [(name, *pair) for name, pair in (*cost.items(), *results.items())]
            found["masksparsity/pruning"] = TableMedia(("what", "before", "after"), tuple(pairs))
        return found

    def dashboard_artifacts(self) -> dict[str, dict[str, Tensor]]:
        """The keep masks; the file serves as ``mask`` of another run."""
        masks = self.keep_masks()
        return {"masksparsity_keep_masks": masks} if masks else {}

    # ---- state -------------------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What the next stage needs; the plan stands in the checkpoint itself."""
        if not self._penalises:
            return {"stage": self.stage}
        if not self._groups:  # before fit
            return {}
        return {
            "stage": self.stage,
            "groups": [asdict(group) for group in self._groups],
            "masks": {name: mask.cpu() for name, mask in self.keep_masks().items()},
            **{name: dict(getattr(self, f"_{name}")) for name in _KEPT},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep the state until fit starts; Lightning calls this before ``on_fit_start``."""
        if not self._norms:  # a tuner restores what it saved while fit ran
            self._loaded = state or None

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the plan beside the weights."""
        if self.plan:
            checkpoint[PLAN_KEY] = self.plan

    def leave(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the module's methods as they were; masks stay readable."""
        detach(pl_module, self._rebuild, "on_load_checkpoint")
        detach(pl_module, self._penalise, "configure_gradient_clipping")
        self._module = None
        if self._norms:
            self._masks = {name: mask.cpu() for name, mask in self.keep_masks().items()}
            self._norms, self._prune = {}, {}


def _is_cut(module: nn.Module, plan: ChannelPlan) -> bool:
    """Whether the module has the widths that a plan leaves."""
    named = plain_modules(module)
    return all(
        channels.channel_counts(named[name]).get(side) == len(cut["kept"]) if name in named else False
        for name, sides in plan.items()
        for side, cut in sides.items()
    )


def _sizes(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Parameter -> entries and dimensions."""
    return {name: (parameter.numel(), parameter.ndim) for name, parameter in plain_parameters(module).items()}


def _cost(sizes: Mapping[str, tuple[int, int]], macs: Mapping[str, float], plan: ChannelPlan) -> dict[str, tuple[float, float]]:
    """Parameters and MACs, before and after a plan."""

    def left(name: str) -> float:
        shares = {side: len(cut["kept"]) / cut["size"] for side, cut in plan.get(name.rpartition(".")[0], {}).items()}
        return shares.get("out", 1.0) * (shares.get("in", 1.0) if sizes[name][1] > 1 else 1.0)

    after = sum(round(count * left(name)) for name, (count, _) in sizes.items())
    return {
        "parameters": (float(sum(count for count, _ in sizes.values())), float(after)),
        "macs": (sum(macs.values()), sum(count * left(name) for name, count in macs.items() if name in sizes)),
    }


def _divide(gammas: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """|scale| of kept and of removed channels, each in one vector."""
    kept = torch.cat([gamma[masks[name].to(gamma.device)].abs() for name, gamma in gammas.items()])
    removed = torch.cat([gamma[~masks[name].to(gamma.device)].abs() for name, gamma in gammas.items()])
    return kept.detach(), removed.detach()


__all__ = ["MaskedBNSparsity"]
