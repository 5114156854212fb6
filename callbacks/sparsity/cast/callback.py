"""CAST as a callback, with its baselines: masks and losses put on anyone's module.

Maths, paper and origin: :mod:`~lit_methods.callbacks.sparsity.cast.core`.
"""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lit_methods import checks
from lit_methods.callbacks.batch import find_in_batch
from lit_methods.callbacks.sparsity.callback import check_ranks, notify_mask_updated
from lit_methods.callbacks.sparsity.card import SparsityCard
from lit_methods.callbacks.sparsity.cast import core
from lit_methods.callbacks.sparsity.cast.adams import AdamS, Rule
from lit_methods.callbacks.sparsity.cast.self_distillation import DenseSelf
from lit_methods.callbacks.sparsity.history import flips, pack_bits, unpack_bits
from lit_methods.callbacks.sparsity.latent import LatentCallback, LatentWeight, ParametrizedWeight, Place, Shared, group_dim, masked_weight
from lit_methods.callbacks.sparsity.masks import check_pattern, is_nm, nm_mask
from lit_methods.callbacks.sparsity.store import MaskStore
from lit_methods.callbacks.twin import shadow, unwritten
from lit_methods.callbacks.wrapping import refuse_iterators, takes_iterator
from lit_methods.catalog import Technique
from lit_methods.optim import repoint
from lit_methods.panels import Curve, Media, Panel, TableMedia, TablePanel
from lit_methods.runs.folder import run_dir
from lit_methods.steps import training_length

TECHNIQUE = Technique(
    slug="cast",
    title="CAST: Continuous and Differentiable Semi-Structured Sparsity-Aware Training for Large Language Models",
    arxiv="2509.25996",
    family="sparsity",
    form="callback",
    classes=("lit_methods.callbacks.CAST", "lit_methods.callbacks.AdamS"),
    configs=("cast.yaml", "cast_dense.yaml", "cast_lm.yaml", "cast_lm_dense.yaml"),
    golden=("mask", "adams", "weight_scaling", "kd_loss"),
    claim="After removal of the masked weights (1:8), training with AdamS's decay reaches a higher accuracy than the same training without "
    "decay.",
    summary="Makes a dense network 2:4 or N:M sparse while its forward pass stays dense, by an optimiser that shrinks what a mask removes.",
)

Recipe = Literal["cast", "ast", "naive"]
Update = Literal["adams", "ast", "adam"]


class _Cell(Shared):
    """Mask of one weight and what it is used for."""

    def __init__(self, masked_forward: bool) -> None:
        self.masked_forward, self.pruned = masked_forward, False
        self.mask: Tensor | None = None  # before training


class CastWeight(LatentWeight):
    """Parametrisation: W -> the weight of the forward pass, scaled, masked, or with the low-rank branch.

    Args:
        weight: W, as :func:`~lit_methods.callbacks.sparsity.cast.core.expand_blocks` takes it.
        masked_forward: Mask the forward pass, and let the gradient through (AST).
        dim: The weight's dimension of inputs.
        groups: n of the scale A (R, n); 0: none.
        block: Inputs of a block of the low-rank branch; 0: none.
    """

    scale: nn.Parameter | None
    branch: nn.Parameter | None

    def __init__(self, weight: Tensor, masked_forward: bool, dim: int, groups: int, block: int) -> None:
        super().__init__()
        self.cell, self.dim = _Cell(masked_forward), dim
        rows, columns, trains = weight.shape[1 - dim], weight.shape[dim], weight.requires_grad
        self.register_parameter("scale", nn.Parameter(weight.new_ones(rows, groups), requires_grad=trains) if groups else None)
        self.register_parameter("branch", nn.Parameter(weight.new_zeros(rows, columns // block), requires_grad=trains) if block else None)

    def forward(self, weight: Tensor) -> Tensor:
        """Latent weight -> weight of the forward pass."""
        mask = self.cell.mask
        if mask is not None and self.cell.pruned:
            weight = core.finalized_weight(weight, mask, self.scale, self.dim)
        else:
            weight = masked_weight(weight, mask, 0.0) if mask is not None and self.cell.masked_forward else weight
            weight = weight if self.scale is None else core.scaled_weight(weight, self.scale, self.dim)
        return weight if self.branch is None else weight + core.expand_blocks(self.branch, weight, self.dim)

    def neutral_state(self, weight: Tensor) -> Mapping[str, Tensor]:
        """Scales of 1 and an empty branch."""
        neutral = {"scale": torch.ones_like, "branch": torch.zeros_like}
        return {name: neutral[name](parameter) for name, parameter in self.named_parameters()}


_Layer = ParametrizedWeight[CastWeight]


class _Preset(NamedTuple):
    """What a recipe stands for where the user says nothing."""

    update: Update
    masked_forward: bool
    l1_decay: float
    scale_groups: int
    temperature: float


_PRESETS = {
    "cast": _Preset("adams", False, 4e-7, 2, 1.0),
    "ast": _Preset("ast", True, 6e-5, 0, 2.0),
    "naive": _Preset("adam", True, 0.0, 0, 1.0),
}


class CAST(LatentCallback):
    """Makes a pretrained module N:M sparse by continuous adaptive sparse training.

    In every group of M consecutive inputs the N largest magnitudes are kept. ``recipe``:

    - ``cast``: the forward pass stays dense; :class:`AdamS` shrinks the weights outside the mask by a decay that grows with time, learned
      scales make up for lost magnitude, and a frozen copy of the dense network teaches: eta KL + (1 - eta) loss. At the end the shrunken
      weights are removed.
    - ``ast``: baseline. Masked forward pass with straight-through gradients, masks that move, decay in Adam; ``slorb_block`` adds its
      low-rank branch.
    - ``naive``: baseline. Masked forward pass with straight-through gradients, one mask for the whole training, plain Adam.

    Runs: as :class:`LatentCallback`; when fit starts, Adam and AdamW are replaced by AdamS with the same groups and schedules. Masks are
    made at the start of every ``mask_interval``-th optimiser step, on its first micro-batch, from latent weights. Behind the last batch
    weights outside the last mask are removed and scales folded in. ``cast/unfinalized.ckpt`` and ``cast/finalized.ckpt`` in the run's
    folder are written if the Trainer saves checkpoints. With manual optimisation ``distill_weight`` must be 0; give ``total_steps`` where
    several optimisers step. Scales are called ``<module>.parametrizations.weight.0.scale`` in ``named_parameters()``;
    a momentum branch that walks ``parameters()`` needs ``scale_groups=0``.

    Saves: what :class:`LatentCallback` saves, scales, masks, T and the teacher. T, the number of optimiser steps, must be the same at a
    resume.

    Refuses: what :class:`LatentCallback` refuses, and weights in half precision.

    Args:
        n: Weights that stay in each group.
        m: Size of a group: consecutive inputs of a linear layer, input channels of a convolution. Must divide their number.
        recipe: One of the list above; decides what the arguments that are None mean.
        targets: ``fnmatch`` patterns on submodule names; empty: every linear, convolution and attention module except first and last.
        skip: Patterns on submodule names that stay dense.
        l1_decay: lambda, of the order of typical gradients. None: 4e-7 (``cast``, the paper's for LLaMA2-7B), 6e-5 (``ast``).
        mask_interval: T1, optimiser steps between two refreshes of the masks.
        scale_groups: n of the scales, blocks of a row; 0: no scaling. None: 2 for ``cast``, else 0.
        distill_weight: eta of eta KL + (1 - eta) loss, 0 to 1; 0: no distillation.
        temperature: Temperature of the KL. None: 1, for ``ast`` 2.
        temperature_squared: Multiply the KL by the temperature squared.
        distill: Submodule whose output are the logits: a tensor, or something with ``logits``. None: the one child with parameters.
        labels: Key of the batch's labels, aligned with the logits, if some entries must not count; None: all count.
        ignore_index: Label of entries that don't count.
        save_teacher: Keep the teacher in checkpoints; False: at a resume the module must start with the same weights, which is checked.
        teacher_dtype: ``same``, or ``bfloat16`` to save memory.
        update: ``adams``, ``ast``, or ``adam``: the module's own optimiser, whatever it is. None: the recipe's.
        ramp_steps: For ``ast``: steps over which lambda rises from 0. None: a quarter of all steps, a choice of ours.
        slorb_block: Inputs of a block of AST's low-rank branch, 64 in AST; 0: none. The final weight then isn't N:M alone: the module gets
            the sum, and :meth:`parts` both.
        total_steps: T; None: ``trainer.estimated_stepping_batches``.
        probe_interval: Optimiser steps between two measurements of the virtual hard prune; 0: none.
        finalize: False: leave the dense weights at the end, to look at them.

    Raises:
        ValueError: An argument outside its range; in ``setup`` or when training starts, something that can't work.
    """

    latents, prefix = "weights", "cast"
    kept: ClassVar[Mapping[str, str]] = {
        **{name: f"_{name}" for name in ("refreshed", "probed", "stats")},
        **{"first_masks": "_first", "total_steps": "_steps"},
    }
    without_added = "set scale_groups to 0 (and slorb_block, if you gave it), so that each weight stays one parameter"
    runs_before: ClassVar[Sequence[str]] = ("MaskCallback", "SparsityReport", "Dashboard", "Preemption")

    panels: ClassVar[tuple[Panel, ...]] = (
        Curve("Decay of masked weights", ("cast/alpha", "cast/decay_budget"), note="The budget must exceed the size of typical weights."),
        Curve(
            "Mean magnitude of masked and kept weights",
            ("cast/masked_magnitude", "cast/kept_magnitude", "cast/magnitude_ratio"),
            note="The ratio should end near 0: then the final prune is free.",
        ),
        Curve("Masked weights below 1e-4", ("cast/masked_below_1e-4",), note="Share; rises as learning rate and masks settle."),
        Curve(
            "Loss before and after a virtual hard prune",
            ("cast/loss_dense", "cast/loss_pruned"),
            note="Same batch, eval mode. The gap is what finalising would cost now.",
            goal="min",
        ),
        Curve("Mask bits changed", ("cast/flips", "cast/initial_flips"), note="Per refresh, and against the first mask."),
        Curve("Own loss and KL to the dense self", ("cast/ce", "cast/kl"), goal="min"),
        TablePanel("Layers", "cast/layers"),
    )

    def __init__(
        self,
        n: int = 2,
        m: int = 4,
        recipe: Recipe = "cast",
        targets: Sequence[str] = (),
        skip: Sequence[str] = (),
        l1_decay: float | None = None,
        mask_interval: int = 10,
        scale_groups: int | None = None,
        distill_weight: float = 1 / 3,
        temperature: float | None = None,
        temperature_squared: bool = True,
        distill: str | None = None,
        labels: str | None = None,
        ignore_index: int = -100,
        save_teacher: bool = True,
        teacher_dtype: Literal["same", "bfloat16"] = "same",
        update: Update | None = None,
        ramp_steps: int | None = None,
        slorb_block: int = 0,
        total_steps: int | None = None,
        probe_interval: int = 100,
        finalize: bool = True,
    ) -> None:
        super().__init__(targets, skip)
        checks.literals(CAST, locals())
        check_pattern(n, m)
        checks.at_least(1, "optimiser steps", mask_interval=mask_interval, total_steps=total_steps)
        checks.at_least(0, "optimiser steps", probe_interval=probe_interval, ramp_steps=ramp_steps)
        checks.at_least(0, l1_decay=l1_decay, scale_groups=scale_groups, slorb_block=slorb_block)
        checks.share(distill_weight=distill_weight)
        checks.positive(temperature=temperature)
        preset = _PRESETS[recipe]
        self.n, self.m, self.recipe = n, m, recipe
        self.l1_decay = preset.l1_decay if l1_decay is None else l1_decay
        self.scale_groups = preset.scale_groups if scale_groups is None else scale_groups
        self.temperature = preset.temperature if temperature is None else temperature
        self.update: Update = preset.update if update is None else update
        self.masked_forward, self.fixed_mask = preset.masked_forward, recipe == "naive"
        if slorb_block and not self.masked_forward:
            raise ValueError(f"slorb_block={slorb_block} goes with a masked forward pass: choose recipe='ast' or 'naive', or 0")
        self.mask_interval, self.distill_weight, self.temperature_squared = mask_interval, distill_weight, temperature_squared
        self.distill, self.labels, self.ignore_index = distill, labels, ignore_index
        self.save_teacher, self.teacher_dtype = save_teacher, teacher_dtype
        self.ramp_steps, self.slorb_block, self.total_steps = ramp_steps, slorb_block, total_steps
        self.probe_interval, self.finalize = probe_interval, finalize

    def reset(self) -> None:
        """Forget the last run."""
        super().reset()
        self._layers: dict[str, _Layer] = {}
        self.store = MaskStore({})
        self.dense: DenseSelf | None = None
        self._first: dict[str, Tensor] = {}  # packed bits of the first masks
        self._refreshed = -1  # optimiser step of the last refresh
        self._probed = -1
        self._steps: int | None = None  # T
        self._stats: dict[str, Tensor] = {}
        self._fingerprint: Tensor | None = None
        self._resumed = self._unmeasurable = False

    @property
    def sparsity_card(self) -> SparsityCard:
        """What kind of sparsity this is."""
        return SparsityCard(
            stage="during",
            regime="dense_to_sparse",
            mask="static" if self.fixed_mask else "dynamic",
            granularity="n:m",
            forward_dense=not self.masked_forward,
            backward_dense=True,
            optimizer_dense=True,
            criterion="magnitude",
            cost="ste" if self.masked_forward else "dense",
        )

    # ---- setting up --------------------------------------------------------------------------------------------------------------------

    def make_layers(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, chosen: Mapping[str, Any], places: Mapping[str, Place]
    ) -> dict[str, _Layer]:
        """Copy the teacher, and make the weights with scale and branch."""
        if str(trainer.precision) in ("bf16-true", "16-true", "transformer-engine", "transformer-engine-float16"):
            raise ValueError(
                f"CAST needs float32 weights, in which its small decay isn't lost, but precision is {trainer.precision!r}: use bf16-mixed"
            )
        layers = {name: self._layer(name, place) for name, place in places.items()}
        if self.labels is not None:
            refuse_iterators(pl_module, "CAST with labels")
        if self.distill_weight:
            self.dense = DenseSelf(pl_module, self.distill, "CAST", self._mix)
        return layers

    def _mix(self, pl_module: pl.LightningModule, loss: Tensor, student: Tensor, teacher: Tensor, batch: Any) -> Tensor:
        """Eq. 13: the KL of the logits of student and teacher, mixed into the module's own loss."""
        targets = None if self.labels is None else find_in_batch(batch, self.labels, (self.labels, 0), "labels")
        if targets is not None and targets.shape != student.shape[:-1]:
            shapes = f"the batch's {self.labels!r} are {tuple(targets.shape)}, but the logits {tuple(student.shape)}"
            raise ValueError(f"CAST: {shapes}: the labels must be aligned with them")
        settings = (self.distill_weight, self.temperature, self.temperature_squared, self.ignore_index)
        mixed, kl, _ = core.distillation_loss(student, teacher, targets, *settings, own=loss)
        pl_module.log_dict({"cast/ce": loss.detach(), "cast/kl": kl.detach()}, batch_size=1)
        return mixed

    def parametrise(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Copy the teacher, and put the parametrisations on."""
        super().parametrise(trainer, pl_module)
        self.store = MaskStore({name: layer.latent for name, layer in self._layers.items()})

    def title(self) -> str:
        """Recipe and pattern."""
        return f"CAST ({self.recipe}, {self.n}:{self.m})"

    def _layer(self, name: str, place: Place) -> _Layer:
        weight, dim = place.weight, group_dim(place.weight.ndim, transposed=place.transposed)
        columns = weight.shape[dim]
        for what, size in (("m", self.m), ("scale_groups", self.scale_groups), ("slorb_block", self.slorb_block)):
            if size and columns % size:
                fitting = "choose another number, or leave this layer out of targets"
                raise ValueError(f"CAST, {name}: {what}={size} doesn't divide its {columns} inputs: {fitting}")
        if self.slorb_block and weight.ndim != 2:
            raise ValueError(f"CAST, {name}: slorb_block is for linear layers, not for {tuple(weight.shape)}: leave it out of targets")
        if weight.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"CAST, {name} is {weight.dtype}: it needs float32 weights; load the module in float32 and use bf16-mixed")
        return _Layer(place.module, place.attribute, CastWeight(weight, self.masked_forward, dim, self.scale_groups, self.slorb_block))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """First masks, teacher and optimisers: the weights are on their device, equal on all ranks, and restored if the run is resumed.

        Raises:
            ValueError: No optimiser holds a weight, or the training has no end or another length than before the resume.
        """
        super().on_fit_start(trainer, pl_module)
        self.store.follow_device()
        self._settle_teacher(pl_module)
        if not self._resumed:
            self._make_masks()
            self._first = {name: pack_bits(mask, low_first=True) for name, mask in self.store.masks.items()}
            for name, layer in self._layers.items():
                if layer.parametrization.branch is not None:
                    removed = (layer.latent.detach(), self.store.masks[name], self.slorb_block, layer.parametrization.dim)
                    layer.parametrization.branch.data.copy_(core.pruned_block_means(*removed))
        self._first = {name: packed.to(self._layers[name].latent.device) for name, packed in self._first.items()}
        self._share_masks(trainer)
        check_ranks("CAST", self.store.masks.values(), "weights")
        if self.update != "adam":
            self._replace_optimizers(trainer, self.update)
        self._settle_length(trainer, pl_module)
        notify_mask_updated(trainer, pl_module, self)

    def _settle_teacher(self, pl_module: pl.LightningModule) -> None:
        if self.dense is None:
            return
        if not self._resumed:  # all ranks have the same weights now, and nothing is masked yet
            self.dense.copy_student(pl_module)
        if not self.save_teacher:
            before, self._fingerprint = self._fingerprint, self.dense.fingerprint()
            same = before is None or (before.shape == self._fingerprint.shape and torch.allclose(before, self._fingerprint, 1e-5, 1e-6))
            if not same:  # more than sums differ from device to device
                why = "the module starts with other weights than the run that saved this checkpoint, so its teacher would be another one"
                raise ValueError(f"CAST: {why}: build it with the same pretrained weights, or use save_teacher=True from the start")
        self.dense.teacher.to(pl_module.device)
        if self.teacher_dtype == "bfloat16":
            self.dense.teacher.to(torch.bfloat16)

    def _replace_optimizers(self, trainer: pl.Trainer, rule: Rule) -> None:
        """AdamS in the place of Adam and AdamW, for the schedulers, too."""
        optimizers: list[torch.optim.Optimizer] = []
        for old in trainer.optimizers:
            members = {id(parameter) for group in old.param_groups for parameter in group["params"]}
            sparse = [weight for weight in self.store.weights.values() if id(weight) in members]
            new = old
            if sparse and not isinstance(old, AdamS):
                if not isinstance(old, torch.optim.Adam | torch.optim.AdamW):
                    why = f"CAST turns Adam and AdamW into AdamS, but the sparse weights are trained by {type(old).__name__}"
                    raise ValueError(f"{why}: return one of them from configure_optimizers, or keep your optimiser by update='adam'")
                new = AdamS.from_adam(old, rule=rule)
            if isinstance(new, AdamS):
                new.add_sparse(sparse)
            for config in trainer.lr_scheduler_configs:
                repoint(config.scheduler, old, new)
            optimizers.append(new)
        trainer.strategy.optimizers = optimizers
        self._share_masks(trainer)

    def _settle_length(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Settle T."""
        steps = training_length(pl_module, self.total_steps, what="CAST's decay, which grows until training ends,")
        if self._steps is not None and self._steps != steps:
            change = f"was to take {self._steps} optimiser steps and is now to take {steps}"
            raise ValueError(f"CAST: the training {change}, so that alpha = t / T would jump: train as long, or set total_steps")
        self._steps = steps
        self.on_train_start(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the optimisers this run's settings: a checkpoint has restored those of its own."""
        assert self._steps is not None
        ramp = self._steps // 4 if self.ramp_steps is None else self.ramp_steps
        for optimizer in self._adams(trainer):
            for group in optimizer.param_groups:
                group.update(l1_decay=self.l1_decay, total_steps=self._steps, ramp_steps=ramp)

    def _adams(self, trainer: pl.Trainer) -> list[AdamS]:
        return [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, AdamS)]

    # ---- training ----------------------------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Refresh the masks, where a step begins that is due; listen to the distilled submodule."""
        step = trainer.global_step
        if core.is_refresh_step(step, self.mask_interval) and self._refreshed != step:
            self._refreshed = step
            self._refresh(trainer, pl_module)
        if self.probe_interval and not self._unmeasurable and step % self.probe_interval == 0 and self._probed != step:
            self._probed = step
            self._probe(trainer, pl_module, batch, batch_idx)
        if self.dense is not None:
            self.dense.listen(True)

    @torch.no_grad()
    def _refresh(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        before = dict(self.store.masks)
        if not self.fixed_mask:
            self._make_masks()
            self._share_masks(trainer)
        masks, total = self.store.masks, sum(mask.numel() for mask in before.values())
        first = {name: unpack_bits(self._first[name], mask.shape, low_first=True) for name, mask in masks.items()}
        self._stats |= {"flips": flips(before, masks) / total, "initial_flips": flips(first, masks) / total, **self._magnitudes()}
        self._stats = {name: value.to(pl_module.device) for name, value in self._stats.items()}
        if self.masked_forward and not self.fixed_mask:
            notify_mask_updated(trainer, pl_module, self)

    def _magnitudes(self) -> dict[str, Tensor]:
        return core.magnitude_statistics(list(self.store.weights.values()), list(self.store.masks.values()))

    def _make_masks(self) -> None:
        dims = {name: layer.parametrization.dim for name, layer in self._layers.items()}
        self.store.set({name: nm_mask(weight, self.n, self.m, dims[name]) for name, weight in self.store.weights.items()})

    def _share_masks(self, trainer: pl.Trainer) -> None:
        """Let the forward passes and the optimisers have the masks."""
        for name, layer in self._layers.items():
            layer.parametrization.cell.mask = self.store.masks[name]
        for optimizer in self._adams(trainer):
            own = [name for name, weight in self.store.weights.items() if weight in optimizer.sparse]
            optimizer.set_masks({self.store.weights[name]: self.store.masks[name] for name in own})

    @torch.no_grad()
    def _probe(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """The loss of this batch as it is, and after a virtual hard prune; on a copy that shares parameters and logs nothing."""
        if not pl_module.automatic_optimization or takes_iterator(pl_module):
            return
        try:
            with isolate_rng(pl_module.device.type == "cuda"), torch.compiler.set_stance("force_eager"):
                twin = shadow(trainer, pl_module)
                arguments = (batch, batch_idx)[: len(inspect.signature(twin.training_step).parameters)]
                for name, pruned in (("loss_dense", False), ("loss_pruned", True)):
                    self._prune(pruned)
                    with trainer.precision_plugin.train_step_context(), unwritten(twin):
                        output = twin.training_step(*arguments)
                    loss = output["loss"] if isinstance(output, Mapping) else output
                    if isinstance(loss, Tensor):
                        self._stats[name] = loss.detach()
        except Exception as error:  # a figure isn't worth a training run
            rank_zero_warn(f"CAST can't measure the loss after a virtual prune ({type(error).__name__}: {error}): probe_interval is off")
            self._unmeasurable = True
        finally:
            self._prune(False)

    def _prune(self, pruned: bool) -> None:
        """Whether the forward pass leaves out what the masks remove."""
        for layer in self._layers.values():
            layer.parametrization.cell.pruned = pruned

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log; behind the last batch finalise."""
        if self.dense is not None:
            self.dense.listen(False)
        logs: dict[str, Any] = dict(self._stats)
        for optimizer in self._adams(trainer):
            group = max(optimizer.param_groups, key=lambda group: group.get("decay_budget", -1.0))
            logs |= {"alpha": group.get("alpha", 0.0), "decay_budget": group.get("decay_budget", 0.0)}
        self.log_step(pl_module, logs)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    # ---- the end -----------------------------------------------------------------------------------------------------------------------

    @property
    def finalized(self) -> bool:
        """Whether the weights outside the last mask have been removed."""
        return any(layer.parametrization.cell.pruned for layer in self._layers.values()) or bool(self._left.get("finalized"))

    @torch.no_grad()
    def finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remove the weights outside the last mask, for good."""
        if not self.finalize or not self._layers or self.finalized:
            return
        ratio = float(self._magnitudes()["magnitude_ratio"])
        if not self.masked_forward and ratio > 0.1:
            budget = max((group.get("decay_budget", 0.0) for o in trainer.optimizers for group in o.param_groups), default=0.0)
            far = f"the decay could move a weight by about {budget:.3g} (sum of lr * alpha)"
            small = f"on average {ratio:.1%} of the kept ones' size, and {far}"
            rank_zero_warn(f"CAST removes weights that are not small: {small}: raise l1_decay, the learning rate or the number of steps")
        self._save(trainer, "unfinalized.ckpt", weights_only=False)
        self.store.apply()
        self._prune(True)
        for name, layer in self._layers.items():
            if not is_nm(layer.latent, self.n, self.m, layer.parametrization.dim):
                raise RuntimeError(f"CAST: {name} isn't {self.n}:{self.m} after its mask was applied; please report this")
        check_ranks("CAST", self.store.masks.values(), "weights")
        notify_mask_updated(trainer, pl_module, self)

    def _save(self, trainer: pl.Trainer, name: str, weights_only: bool) -> None:
        """Not into ``checkpoints``: a resume looks there for the newest file, and it must not find an end that isn't one."""
        if trainer.checkpoint_callback is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.save_checkpoint(Path(run_dir(trainer)) / "cast" / name, weights_only=weights_only)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Training may have been stopped early."""
        super().on_train_end(trainer, pl_module)
        if self.finalized:
            self._save(trainer, "finalized.ckpt", weights_only=True)

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """Weight -> ``latent`` (N:M when finalised), and ``scale`` and ``branch`` where there are; during and after fit."""
        if not self._layers:
            return self._left.get("weights", {})
        return {name: {key: value.detach() for key, value in layer.parts().items()} for name, layer in self._layers.items()}

    def sparsity_masks(self) -> dict[str, Tensor]:
        """Parameter name -> bool mask of the weights that act: all of them until a dense forward pass is finalised.

        {} with a low-rank branch, which makes the weight dense again.
        """
        if self.slorb_block:
            return {}
        if self.masked_forward or self.finalized:
            return self.store.masks
        return {name: torch.ones_like(mask) for name, mask in self.store.masks.items()}

    def dashboard_artifacts(self) -> dict[str, dict[str, Tensor]]:
        """The masks as the last refresh made them."""
        return {"cast_masks": self.store.masks} if self.store.masks else {}

    def dashboard_media(self) -> dict[str, Media]:
        """A table of the layers."""
        rows = []
        for name, layer in self._layers.items():
            stats = core.magnitude_statistics([layer.latent], [self.store.masks[name]])
            masked, kept = float(stats["masked_magnitude"]), float(stats["kept_magnitude"])
            scale = layer.parametrization.scale
            size = None if scale is None else float(scale.detach().mean())
            rows.append((name, " x ".join(map(str, layer.latent.shape)), f"{self.n}:{self.m}", masked, kept, size))
        table = TableMedia(("weight", "shape", "pattern", "mean |masked|", "mean |kept|", "mean scale"), tuple(rows))
        return {"cast/layers": table} if rows else {}

    # ---- state -------------------------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Latent weights, scales, masks, T, the teacher."""
        teacher = self.dense.teacher.module.state_dict() if self.dense is not None and self.save_teacher else {}
        own = {"finalized": self.finalized, "fingerprint": self._fingerprint, "teacher": dict(teacher)}
        return super().state() | self.store.state_dict() | own

    def restore(self, state: dict[str, Any]) -> None:
        """Masks, the teacher, and whether the end has come."""
        self.store.load_state_dict(state)
        self._prune(bool(state["finalized"]))
        if self.dense is not None and state["teacher"]:
            self.dense.teacher.module.load_state_dict(state["teacher"])
        else:
            self._fingerprint = state["fingerprint"]
        self._resumed = bool(self._first)  # not by a tuner's checkpoint of before the first masks

    def leave(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave an ordinary module with the weights of the forward pass; state and masks stay readable."""
        if self.dense is not None:
            self.dense.close()
        super().leave(trainer, pl_module)


__all__ = ["CAST", "CastWeight"]
