"""CAST as a callback, with its baselines: masks and losses put on anyone's module.

Maths, paper and origin: :mod:`~lit_methods.callbacks.sparsity.cast.core`.
"""

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lit_methods import distributed
from lit_methods.callbacks.ordering import OrderedCallback
from lit_methods.callbacks.sparsity.callback import notify_mask_updated
from lit_methods.callbacks.sparsity.card import SparsityCard
from lit_methods.callbacks.sparsity.cast.adams import AdamS, Rule
from lit_methods.callbacks.sparsity.cast.core import (
    expand_blocks,
    is_refresh_step,
    magnitude_statistics,
    pack_bits,
    pruned_block_means,
    scaled_weight,
    unpack_bits,
)
from lit_methods.callbacks.sparsity.cast.self_distillation import DenseSelf, convex_loss, distillation_loss, kl_to_teacher
from lit_methods.callbacks.sparsity.latent import LatentWeight, ParametrizedWeight, group_dim, masked_weight, refuse_unfit
from lit_methods.callbacks.sparsity.masks import is_nm, nm_mask
from lit_methods.callbacks.sparsity.store import MaskStore, prunable_weights
from lit_methods.callbacks.targets import plain_module, plain_name, refuse_sharded
from lit_methods.callbacks.twin import shadow
from lit_methods.catalog import Technique
from lit_methods.panels import Curve, Media, Panel, TableMedia, TablePanel
from lit_methods.runs.folder import run_dir

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


# ---- the maths -------------------------------------------------------------------------------------------------------------------------


# ---- the parametrisation ---------------------------------------------------------------------------------------------------------------


class _Cell:
    """Mask of one weight and what it is used for. Copies of the module (an EMA teacher) share it, and so follow it."""

    def __init__(self, masked_forward: bool) -> None:
        self.masked_forward, self.pruned = masked_forward, False
        self.mask: Tensor | None = None  # before training

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Cell":
        return self


class CastWeight(LatentWeight):
    """Parametrisation: W -> the weight of the forward pass, scaled, masked, or with the low-rank branch.

    Args:
        weight: W, see :func:`expand_blocks`.
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
        rows, columns = weight.shape[1 - dim], weight.shape[dim]
        trains = weight.requires_grad
        self.register_parameter("scale", nn.Parameter(weight.new_ones(rows, groups), requires_grad=trains) if groups else None)
        self.register_parameter("branch", nn.Parameter(weight.new_zeros(rows, columns // block), requires_grad=trains) if block else None)

    def forward(self, weight: Tensor) -> Tensor:
        """Latent weight -> weight of the forward pass."""
        mask = self.cell.mask
        if mask is not None and self.cell.pruned:
            weight = weight.masked_fill(~mask, 0.0)
        elif mask is not None and self.cell.masked_forward:
            weight = masked_weight(weight, mask, 0.0)
        if self.scale is not None:
            weight = scaled_weight(weight, self.scale, self.dim)
        return weight if self.branch is None else weight + expand_blocks(self.branch, weight, self.dim)

    def neutral_state(self) -> Mapping[str, Tensor]:
        """Scales of 1 and an empty branch."""
        neutral = {"scale": torch.ones_like, "branch": torch.zeros_like}
        return {name: neutral[name](parameter) for name, parameter in self.named_parameters()}


class _Layer(ParametrizedWeight):
    parametrization: CastWeight

    @property
    def cell(self) -> _Cell:
        return self.parametrization.cell

    def own(self) -> dict[str, Tensor]:
        """Latent weight, scale and branch."""
        return {"latent": self.latent.detach(), **{name: value.detach() for name, value in self.parametrization.named_parameters()}}


# ---- the callback ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Preset:
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


class CAST(OrderedCallback):
    """Makes a pretrained module N:M sparse by continuous adaptive sparse training.

    In every group of M consecutive inputs the N largest magnitudes are kept. ``recipe``:

    - ``cast``: the forward pass stays dense; :class:`AdamS` shrinks the weights outside the mask by a decay that grows with time, learned
      scales make up for lost magnitude, and a frozen copy of the dense network teaches. At the end the shrunken weights are removed.
    - ``ast``: baseline. Masked forward pass with straight-through gradients, masks that move, decay in Adam; ``slorb_block`` adds its
      low-rank branch.
    - ``naive``: baseline. Masked forward pass with straight-through gradients, one mask for the whole training, plain Adam.

    Runs: weights are parametrised in ``setup``, before the optimisers are made; when fit starts, Adam and AdamW are replaced by AdamS with
    the same groups and schedules. Masks are made at the start of every ``mask_interval``-th optimiser step, on its first micro-batch, from
    latent weights. Behind the last batch weights outside the last mask are removed and scales folded in, so that the last validation
    and the last checkpoint are of the sparse network; a run that is stopped early gets there when training ends. After fit the module is
    an ordinary one. ``cast/unfinalized.ckpt`` and ``cast/finalized.ckpt`` in the run's folder are written if the Trainer saves checkpoints.
    Saves: under the weights' own names those of the forward pass; in its own state latent weights, scales, masks, T and the teacher. T,
    the number of optimiser steps, must be the same at a resume. While fit runs, parameters are called
    ``<module>.parametrizations.weight.original`` and ``.0.scale`` in ``named_parameters()``.
    Logs ``cast/...``: ``alpha``, ``decay_budget`` (sum of lr alpha: about how far a masked weight could move), ``ce`` (the module's own
    loss), ``kl``, ``flips`` (share of mask bits that the last refresh changed), ``initial_flips`` (against the first mask),
    ``masked_magnitude``, ``kept_magnitude``, ``magnitude_ratio``, ``masked_below_1e-4``, and with ``probe_interval`` ``loss_dense`` and
    ``loss_pruned``: the loss of a batch in eval mode, as it is and after a virtual hard prune.
    Works with bf16-mixed and 16-mixed, accumulation, compiled inner networks, DDP; with manual optimisation if ``distill_weight`` is 0
    (give ``total_steps`` where several optimisers step). Refuses weights in half precision, strategies that shard weights, Lightning's
    ``ModelPruning``, ``WeightAveraging`` and ``StochasticWeightAveraging``, tied weights, mask callbacks on the same weights.

    Args:
        n: Weights that stay in each group.
        m: Size of a group: consecutive inputs of a linear layer, input channels of a convolution. Must divide their number.
        recipe: See above; decides what the arguments that are None mean.
        targets: ``fnmatch`` patterns on submodule names; empty: every linear, convolution and attention module except first and last.
        skip: Patterns on submodule names that stay dense.
        l1_decay: lambda, of the order of typical gradients. None: 4e-7 (``cast``, the paper's for LLaMA2-7B), 6e-5 (``ast``).
        mask_interval: T1, optimiser steps between two refreshes of the masks.
        scale_groups: n of the scales, blocks of a row; 0: no scaling. None: 2 for ``cast``, else 0.
        distill_weight: eta of eta KL + (1 - eta) loss, 0 to 1; 0: no distillation.
        temperature: Of the KL. None: 1, for ``ast`` 2.
        temperature_squared: Multiply the KL by the temperature squared.
        distill: Submodule whose output are the logits: a tensor, or something with ``logits``. None: the one child with parameters.
        labels: Key of the batch's labels, aligned with the logits, if some entries must not count; None: all count.
        ignore_index: Label of entries that don't count.
        save_teacher: Keep the teacher in checkpoints; False: at a resume the module must start with the same weights, which is checked.
        teacher_dtype: ``same``, or ``bfloat16`` to save memory.
        update: ``adams``, ``ast``, or ``adam``: the module's own optimiser, whatever it is. None: the recipe's.
        ramp_steps: Of ``ast``: steps over which lambda rises from 0. None: a quarter of all steps, a choice of ours.
        slorb_block: Inputs of a block of AST's low-rank branch, 64 in AST; 0: none. The final weight then isn't N:M alone: the module gets
            the sum, and :meth:`parts` both.
        total_steps: T; None: ``trainer.estimated_stepping_batches``.
        probe_interval: Optimiser steps between two measurements of the virtual hard prune; 0: none.
        finalize: False: leave the dense weights at the end, to look at them.

    Raises:
        ValueError: An argument outside its range; in ``setup`` or when training starts, something that can't work.
    """

    runs_before: ClassVar[Sequence[str]] = ("MaskCallback", "SparsityReport", "Dashboard", "Preemption")
    conflicts_with: ClassVar[Mapping[str, str]] = {
        "ModelPruning": "both replace the weights while fit runs",
        "WeightAveraging": "its checkpoints hold the weights of the forward pass only, so a resumed average would lose the latent ones",
        "StochasticWeightAveraging": "its checkpoints hold the weights of the forward pass only, so a resumed average would lose others",
    }

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
        super().__init__()
        if isinstance(targets, str) or isinstance(skip, str):
            raise ValueError(f"targets and skip are lists of patterns, got targets={targets!r}, skip={skip!r}: write ['layers.*']")
        for name, choice, known in (("recipe", recipe, Recipe), ("update", update, Update)):
            if choice is not None and choice not in get_args(known):
                raise ValueError(f"{name} is {choice!r}: give one of {', '.join(get_args(known))}")
        if teacher_dtype not in ("same", "bfloat16"):
            raise ValueError(f"teacher_dtype is {teacher_dtype!r}: give 'same' or 'bfloat16'")
        if not 1 <= n <= m:
            raise ValueError(f"a pattern of {n}:{m} can't be: give 1 <= n <= m")
        if mask_interval < 1:
            raise ValueError(f"mask_interval is {mask_interval}: give 1 optimiser step or more")
        if not 0 <= distill_weight <= 1:
            raise ValueError(f"distill_weight is {distill_weight}: give the share of the KL in the loss, 0 to 1")
        preset = _PRESETS[recipe]
        self.n, self.m, self.recipe = n, m, recipe
        self.targets, self.skip = list(targets), list(skip)
        self.l1_decay = preset.l1_decay if l1_decay is None else l1_decay
        self.scale_groups = preset.scale_groups if scale_groups is None else scale_groups
        self.temperature = preset.temperature if temperature is None else temperature
        self.update: Update = preset.update if update is None else update
        self.masked_forward, self.fixed_mask = preset.masked_forward, recipe == "naive"
        for name, value in (
            ("l1_decay", self.l1_decay),
            ("scale_groups", self.scale_groups),
            ("slorb_block", slorb_block),
            ("probe_interval", probe_interval),
            ("ramp_steps", ramp_steps or 0),
        ):
            if value < 0:
                raise ValueError(f"{name} is {value}: give 0 or more")
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}: give a number above 0")
        if slorb_block and not self.masked_forward:
            raise ValueError(f"slorb_block={slorb_block} goes with a masked forward pass: choose recipe='ast' or 'naive', or 0")
        if total_steps is not None and total_steps < 1:
            raise ValueError(f"total_steps is {total_steps}: give 1 or more, or null for the Trainer's number")
        self.mask_interval, self.distill_weight, self.temperature_squared = mask_interval, distill_weight, temperature_squared
        self.distill, self.labels, self.ignore_index = distill, labels, ignore_index
        self.save_teacher, self.teacher_dtype = save_teacher, teacher_dtype
        self.ramp_steps, self.slorb_block, self.total_steps = ramp_steps, slorb_block, total_steps
        self.probe_interval, self.finalize = probe_interval, finalize
        self._reset()

    def _reset(self) -> None:
        self.store: MaskStore | None = None
        self.dense: DenseSelf | None = None
        self._layers: dict[str, _Layer] = {}
        self._first: dict[str, Tensor] = {}  # packed bits of the first masks
        self._refreshed = -1  # optimiser step of the last refresh
        self._probed = -1
        self._steps: int | None = None  # T
        self._stats: dict[str, Tensor] = {}
        self._fingerprint: Tensor | None = None
        self._left: dict[str, Any] = {}  # state after fit
        self._resumed = False

    @property
    def state_key(self) -> str:
        """Differs between callbacks of different targets."""
        return self._generate_state_key(targets=self.targets, skip=self.skip)

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

    def chosen(self, pl_module: nn.Module) -> list[str]:
        """Names of the weights that become sparse."""
        names = list(prunable_weights(pl_module, self.targets, self.skip))
        if not self.targets:
            every = list(prunable_weights(pl_module))
            names = [name for name in names if name not in (every[0], every[-1])]
            if not names:
                raise ValueError(
                    f"{type(pl_module).__name__} has no linear, convolution or attention module between its first and its last one, which "
                    "stay dense by default: name the ones to prune with targets"
                )
        return names

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Copy the teacher, and parametrise the weights before the optimisers are made.

        Raises:
            ValueError: What can't work.
        """
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        refuse_sharded(trainer, type(self).__name__)
        if str(trainer.precision) in ("bf16-true", "16-true", "transformer-engine", "transformer-engine-float16"):
            raise ValueError(
                f"CAST needs float32 weights, in which steps as small as its decay are not lost, but precision is {trainer.precision!r}: "
                "use bf16-mixed"
            )
        self._leave()
        self._reset()
        names = self.chosen(pl_module)
        refuse_unfit(trainer, pl_module, "CAST", set(names))
        modules = {plain_name(name): plain_module(module) for name, module in pl_module.named_modules()}
        layers = {name: self._layer(name, modules[name.rpartition(".")[0]]) for name in names}
        if self.distill_weight:
            self.dense = DenseSelf(
                pl_module,
                self.distill,
                who="CAST",
                eta=self.distill_weight,
                temperature=self.temperature,
                squared=self.temperature_squared,
                labels=self.labels,
                ignore_index=self.ignore_index,
            )
        for layer in layers.values():
            layer.attach()
        self._layers = layers
        self.store = MaskStore({name: layer.latent for name, layer in layers.items()})
        rank_zero_info(f"CAST ({self.recipe}, {self.n}:{self.m}): {len(layers)} weights: {', '.join(layers)}")

    def _layer(self, name: str, module: nn.Module) -> _Layer:
        attribute = name.rpartition(".")[2]
        weight: Tensor = getattr(module, attribute)
        stored_in_out = isinstance(module, nn.modules.conv._ConvTransposeNd) or type(module).__name__ == "Conv1D"
        dim = group_dim(weight.ndim, transposed=stored_in_out)
        columns = weight.shape[dim]
        for what, size in (("m", self.m), ("scale_groups", self.scale_groups), ("slorb_block", self.slorb_block)):
            if size and columns % size:
                raise ValueError(
                    f"CAST, {name}: {what}={size} doesn't divide its {columns} inputs: choose another number, or leave this layer out of "
                    "targets"
                )
        if self.slorb_block and weight.ndim != 2:
            raise ValueError(
                f"CAST, {name}: slorb_block is for linear layers, the weight is {tuple(weight.shape)}: leave it out of targets"
            )
        if weight.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"CAST, {name} is {weight.dtype}: it needs float32 weights; load the module in float32 and use bf16-mixed")
        return _Layer(module, attribute, CastWeight(weight, self.masked_forward, dim, self.scale_groups, self.slorb_block))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """First masks, teacher and optimisers: the weights are on their device, equal on all ranks, and restored if the run is resumed."""
        assert self.store is not None
        self.store.follow_device()
        self._settle_teacher(pl_module)
        if not self._resumed:
            self._make_masks()
            self._first = {name: pack_bits(mask) for name, mask in self.store.masks.items()}
            for name, layer in self._layers.items():
                if layer.parametrization.branch is not None:
                    means = pruned_block_means(layer.latent.detach(), self.store.masks[name], self.slorb_block, layer.parametrization.dim)
                    layer.parametrization.branch.data.copy_(means)
        self._first = {name: packed.to(self._layers[name].latent.device) for name, packed in self._first.items()}
        self._share_masks()
        self._check_ranks()
        if self.update != "adam":
            self._replace_optimizers(trainer, self.update)
        notify_mask_updated(trainer, pl_module, self)

    def _settle_teacher(self, pl_module: pl.LightningModule) -> None:
        if self.dense is None:
            return
        if not self._resumed:  # all ranks have the same weights now, and nothing is masked yet
            self.dense.copy_student(pl_module)
        if not self.save_teacher:
            before, self._fingerprint = self._fingerprint, self.dense.fingerprint()
            if before is not None and not _same(before, self._fingerprint):
                raise ValueError(
                    "CAST: the module starts with other weights than the run that saved this checkpoint, so its teacher would be another "
                    "one: build the module with the same pretrained weights, or use save_teacher=True from the start"
                )
        self.dense.teacher.to(pl_module.device)
        if self.teacher_dtype == "bfloat16":
            self.dense.teacher.to(torch.bfloat16)

    def _replace_optimizers(self, trainer: pl.Trainer, rule: Rule) -> None:
        """AdamS in the place of Adam and AdamW, for the schedulers, too."""
        assert self.store is not None
        optimizers: list[torch.optim.Optimizer] = []
        owned: set[int] = set()
        for old in trainer.optimizers:
            members = {id(parameter) for group in old.param_groups for parameter in group["params"]}
            sparse = [weight for weight in self.store.weights.values() if id(weight) in members]
            owned |= {id(weight) for weight in sparse}
            if not sparse or isinstance(old, AdamS):
                new = old
            elif isinstance(old, torch.optim.Adam | torch.optim.AdamW):
                new = AdamS.from_adam(old, rule=rule)
            else:
                raise ValueError(
                    f"CAST turns Adam and AdamW into AdamS, but the sparse weights are trained by {type(old).__name__}: return one of them "
                    "(or AdamS) from configure_optimizers, or set update='adam' to keep your optimiser"
                )
            if isinstance(new, AdamS):
                new.add_sparse(sparse)
            for config in trainer.lr_scheduler_configs:
                _repoint(config.scheduler, old, new)
            optimizers.append(new)
        trained = {name for name, weight in self.store.weights.items() if weight.requires_grad}
        if missing := [name for name in trained if id(self.store.weights[name]) not in owned]:
            raise ValueError(
                f"CAST: no optimiser holds {missing[0]} (and {len(missing) - 1} more): return it from configure_optimizers, or skip it"
            )
        trainer.strategy.optimizers = optimizers
        self._set_masks(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Settle T.

        Raises:
            ValueError: The training has no end, or another length than before the resume.
        """
        steps = trainer.estimated_stepping_batches if self.total_steps is None else self.total_steps
        if not math.isfinite(steps):
            raise ValueError(
                "CAST's decay grows until the training ends, and this one has no end: set max_steps, max_epochs or total_steps"
            )
        steps = max(1, int(steps))
        if self._steps is not None and self._steps != steps:
            raise ValueError(
                f"CAST: the training was to take {self._steps} optimiser steps and is now to take {steps}, so that alpha = t / T would "
                f"jump: resume with the same length, or set total_steps to {self._steps}"
            )
        self._steps = steps
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, AdamS):
                ramp = steps // 4 if self.ramp_steps is None else self.ramp_steps
                for group in optimizer.param_groups:
                    group.update(l1_decay=self.l1_decay, total_steps=steps, ramp_steps=ramp)

    # ---- training ----------------------------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Refresh the masks, where a step begins that is due; listen to the distilled submodule."""
        step = trainer.global_step
        if is_refresh_step(step, self.mask_interval) and self._refreshed != step:
            self._refreshed = step
            self._refresh(trainer, pl_module)
        if self.probe_interval and step % self.probe_interval == 0 and self._probed != step:
            self._probed = step
            self._probe(trainer, pl_module, batch, batch_idx)
        if self.dense is not None:
            self.dense.listen(True)

    @torch.no_grad()
    def _refresh(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self.store is not None
        before = dict(self.store.masks)
        if not self.fixed_mask:
            self._make_masks()
            self._share_masks()
            self._set_masks(trainer)
        total, device = sum(mask.numel() for mask in before.values()), pl_module.device
        flips = torch.stack([(mask != before[name]).sum().to(device) for name, mask in self.store.masks.items()]).sum()
        changed = [(mask != unpack_bits(self._first[name], mask.shape)).sum().to(device) for name, mask in self.store.masks.items()]
        initial = torch.stack(changed).sum()
        self._stats |= {"flips": flips / total, "initial_flips": initial / total, **self._magnitudes()}
        if self.masked_forward and not self.fixed_mask:
            notify_mask_updated(trainer, pl_module, self)

    def _magnitudes(self) -> dict[str, Tensor]:
        assert self.store is not None
        return magnitude_statistics(list(self.store.weights.values()), list(self.store.masks.values()))

    def _make_masks(self) -> None:
        assert self.store is not None
        dims = {name: layer.parametrization.dim for name, layer in self._layers.items()}
        self.store.set({name: nm_mask(weight, self.n, self.m, dims[name]) for name, weight in self.store.weights.items()})

    def _share_masks(self) -> None:
        assert self.store is not None
        for name, layer in self._layers.items():
            layer.cell.mask = self.store.masks[name]

    def _set_masks(self, trainer: pl.Trainer) -> None:
        assert self.store is not None
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, AdamS):
                own = [name for name, weight in self.store.weights.items() if weight in optimizer.sparse]
                optimizer.set_masks({self.store.weights[name]: self.store.masks[name] for name in own})

    def _check_ranks(self) -> None:
        assert self.store is not None
        if distributed.world_size() > 1:
            packed = torch.cat([pack_bits(mask).to(self._device()) for mask in self.store.masks.values()])
            if not distributed.same_on_all_ranks(packed):
                raise RuntimeError("CAST: the masks differ between ranks, so do the weights that they come from")

    def _device(self) -> torch.device:
        return next(iter(self._layers.values())).latent.device

    @torch.no_grad()
    def _probe(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """The loss of this batch as it is, and after a virtual hard prune; on a copy that shares parameters and logs nothing."""
        if not pl_module.automatic_optimization:
            return
        cells = [layer.cell for layer in self._layers.values()]
        try:
            with isolate_rng(pl_module.device.type == "cuda"), torch.compiler.set_stance("force_eager"):
                twin = shadow(trainer, pl_module)
                arguments = (batch, batch_idx)[: len(inspect.signature(twin.training_step).parameters)]
                for name, pruned in (("loss_dense", False), ("loss_pruned", True)):
                    for cell in cells:
                        cell.pruned = pruned
                    with trainer.precision_plugin.train_step_context():
                        output = twin.training_step(*arguments)
                    loss = output["loss"] if isinstance(output, Mapping) else output
                    if isinstance(loss, Tensor):
                        self._stats[name] = loss.detach()
        except Exception as error:  # a figure isn't worth a training run
            rank_zero_warn(f"CAST can't measure the loss after a virtual prune ({type(error).__name__}: {error}): probe_interval is off")
            self.probe_interval = 0
        finally:
            for cell in cells:
                cell.pruned = False

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log; behind the last batch finalise, so that the last validation and checkpoint are of the sparse network."""
        if self.dense is not None:
            self.dense.listen(False)
        logs: dict[str, Any] = dict(self._stats)
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, AdamS):
                group = max(optimizer.param_groups, key=lambda group: group.get("decay_budget", -1.0))
                logs |= {"alpha": group.get("alpha", 0.0), "decay_budget": group.get("decay_budget", 0.0)}
        pl_module.log_dict({f"cast/{name}": value for name, value in logs.items()}, on_step=True, on_epoch=False)
        last = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        epochs_over = last and trainer.max_epochs is not None and 0 < trainer.max_epochs <= trainer.current_epoch + 1
        if epochs_over or 0 <= trainer.max_steps <= trainer.global_step:
            self._finish(trainer, pl_module)

    # ---- the end -----------------------------------------------------------------------------------------------------------------------

    @property
    def finalized(self) -> bool:
        """Whether the weights outside the last mask have been removed."""
        return any(layer.cell.pruned for layer in self._layers.values()) or bool(self._left.get("finalized"))

    @torch.no_grad()
    def _finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remove the weights outside the last mask, for good."""
        if not self.finalize or not self._layers or self.finalized:
            return
        assert self.store is not None
        ratio = float(self._magnitudes()["magnitude_ratio"])
        if not self.masked_forward and ratio > 0.1:
            budget = max((group.get("decay_budget", 0.0) for o in trainer.optimizers for group in o.param_groups), default=0.0)
            rank_zero_warn(
                f"CAST removes weights that are not small: on average {ratio:.1%} of the kept ones' size. The decay could move a weight by "
                f"about {budget:.3g} (sum of lr * alpha): raise l1_decay, the learning rate or the number of steps"
            )
        self._save(trainer, "unfinalized.ckpt", weights_only=False)
        self.store.apply()
        for layer in self._layers.values():
            layer.cell.pruned = True
        for name, layer in self._layers.items():
            if not is_nm(layer.latent, self.n, self.m, layer.parametrization.dim):
                raise RuntimeError(f"CAST: {name} isn't {self.n}:{self.m} after its mask was applied; please report this")
        self._check_ranks()
        notify_mask_updated(trainer, pl_module, self)

    def _save(self, trainer: pl.Trainer, name: str, weights_only: bool) -> None:
        """Not into ``checkpoints``: a resume looks there for the newest file, and it must not find an end that isn't one."""
        if trainer.checkpoint_callback is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            path = Path(run_dir(trainer)) / "cast" / name
            trainer.save_checkpoint(path, weights_only=weights_only)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Training may have been stopped early."""
        self._finish(trainer, pl_module)
        if self.finalized:
            self._save(trainer, "finalized.ckpt", weights_only=True)

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """Weight -> ``latent`` (N:M when finalised), and ``scale`` and ``branch`` where there are; during and after fit."""
        return {name: layer.own() for name, layer in self._layers.items()} if self._layers else self._left.get("weights", {})

    def sparsity_masks(self) -> dict[str, Tensor]:
        """Parameter name -> bool mask of the weights that act: all of them until a dense forward pass is finalised.

        {} with a low-rank branch, which makes the weight dense again.
        """
        if self.store is None or self.slorb_block:
            return {}
        if self.masked_forward or self.finalized:
            return self.store.masks
        return {name: torch.ones_like(mask) for name, mask in self.store.masks.items()}

    def dashboard_artifacts(self) -> dict[str, dict[str, Tensor]]:
        """The masks as the last refresh made them."""
        return {"cast_masks": self.store.masks} if self.store is not None else {}

    def dashboard_media(self) -> dict[str, Media]:
        """A table of the layers."""
        if not self._layers or self.store is None:
            return {}
        rows = []
        for name, layer in self._layers.items():
            stats = magnitude_statistics([layer.latent], [self.store.masks[name]])
            scale = layer.parametrization.scale
            size = None if scale is None else float(scale.detach().mean())
            masked, kept = float(stats["masked_magnitude"]), float(stats["kept_magnitude"])
            rows.append((name, " x ".join(map(str, layer.latent.shape)), f"{self.n}:{self.m}", masked, kept, size))
        return {"cast/layers": TableMedia(("weight", "shape", "pattern", "mean |masked|", "mean |kept|", "mean scale"), tuple(rows))}

    # ---- state -------------------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Latent weights, scales, masks, T, the teacher."""
        if not self._layers:
            return self._left
        assert self.store is not None
        teacher = self.dense.teacher.module.state_dict() if self.dense is not None and self.save_teacher else {}
        return {
            "weights": {name: layer.own() for name, layer in self._layers.items()},
            **self.store.state_dict(),
            "first_masks": dict(self._first),
            "total_steps": self._steps,
            "refreshed": self._refreshed,
            "probed": self._probed,
            "stats": dict(self._stats),
            "finalized": self.finalized,
            "fingerprint": self._fingerprint,
            "teacher": dict(teacher),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over latent weights: the module has loaded those of the forward pass just before.

        Raises:
            ValueError: The checkpoint's weights are others.
        """
        if not state or not self._layers or self.store is None:
            return
        self.store.load_state_dict(state)
        for name, layer in self._layers.items():
            own = {"latent": layer.latent, **dict(layer.parametrization.named_parameters())}
            if set(own) != set(state["weights"][name]):
                raise ValueError(
                    f"CAST: {name} was saved with {sorted(state['weights'][name])}: resume with the same recipe and scale_groups"
                )
            for key, value in state["weights"][name].items():
                own[key].copy_(value)
            layer.cell.pruned = bool(state["finalized"])
        self._first = dict(state["first_masks"])
        self._steps = state["total_steps"]
        self._refreshed, self._probed = int(state["refreshed"]), int(state["probed"])
        self._stats = dict(state["stats"])
        if self.dense is not None and state["teacher"]:
            self.dense.teacher.module.load_state_dict(state["teacher"])
        else:
            self._fingerprint = state["fingerprint"]
        self._resumed = True

    def _leave(self) -> None:
        """An ordinary module with the weights of the forward pass; state and masks stay readable."""
        if self.dense is not None:
            self.dense.close()
        if self._layers:
            state = self.state_dict()
            weights = {name: {key: value.cpu().clone() for key, value in parts.items()} for name, parts in state["weights"].items()}
            self._left = state | {"weights": weights}
            layers, self._layers = self._layers, {}
            for layer in layers.values():
                layer.detach()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Make the module an ordinary one again."""
        self._leave()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Make the module an ordinary one again: Lightning doesn't call ``teardown`` here."""
        self._leave()


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two fingerprints are of the same weights; sums may differ a little from device to device."""
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-5, atol=1e-6)


def _repoint(scheduler: Any, old: torch.optim.Optimizer, new: torch.optim.Optimizer) -> None:
    """Let a scheduler, and those inside it, see another optimiser."""
    if getattr(scheduler, "optimizer", None) is old:
        scheduler.optimizer = new
    for inner in getattr(scheduler, "_schedulers", ()):
        _repoint(inner, old, new)


__all__ = ["CAST", "CastWeight", "convex_loss", "distillation_loss", "kl_to_teacher"]
