"""N:M sparsity with decaying masks as a callback.

Maths, paper and origin: :mod:`~lit_methods.callbacks.sparsity.progressive_gradient_flow.core`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lit_methods.callbacks.ordering import OrderedCallback
from lit_methods.callbacks.sparsity.callback import notify_mask_updated
from lit_methods.callbacks.sparsity.card import SparsityCard
from lit_methods.callbacks.sparsity.latent import (
    Direction,
    Gradient,
    LatentWeight,
    ParametrizedWeight,
    group_dim,
    masked_weight,
    refuse_unfit,
)
from lit_methods.callbacks.sparsity.progressive_gradient_flow.core import (
    Phase,
    Recipe,
    decay_pruned,
    parse_pattern,
    phase_at,
    sdgf_schedule,
    sparse_mask,
)
from lit_methods.callbacks.sparsity.store import prunable_weights
from lit_methods.callbacks.targets import plain_module, plain_name, refuse_sharded
from lit_methods.catalog import Technique
from lit_methods.panels import Curve, Media, Panel, TableMedia, TablePanel

TECHNIQUE = Technique(
    slug="progressive_gradient_flow",
    title="Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers",
    arxiv="2402.04744",
    family="sparsity",
    form="callback",
    classes=("lit_methods.callbacks.NMSparsity",),
    configs=("progressive_gradient_flow.yaml",),
    golden=("mask", "masked_weight", "sdgf_schedule", "phase"),
    claim="At 1:32 sparsity, MdGf-Exponential reaches a higher test accuracy than SR-STE with the same number of steps.",
    summary="Trains N:M sparse weights by gradually restricting what flows through pruned weights: MdGf, SdGf, SR-STE, STE.",
)


# ---- the maths -------------------------------------------------------------------------------------------------------------------------


# ---- the parametrisation ---------------------------------------------------------------------------------------------------------------


class _Flow:
    """What the weights of one pattern share. Copies of the module (an EMA teacher) share it too, so that they follow the same phase."""

    def __init__(self, n: int, m: int, rate: float, gradient: Gradient) -> None:
        self.target = (n, m)
        self.rate, self.gradient = rate, gradient
        self.beta = torch.ones((), dtype=torch.float64)  # on the CPU: goes with weights on any device, and reading it waits for none
        self.set(Phase("dense", 1.0, n, m))

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Flow":
        return self

    def set(self, phase: Phase) -> bool:
        """Take over a phase; whether the mask that the forward pass applies is another kind of mask now."""
        before = getattr(self, "phase", None)
        self.phase, self.dense, self.n, self.m = phase, phase.name == "dense", phase.n, phase.m
        self.beta.fill_(phase.beta)  # in place: compiled code keeps the tensor
        return before is None or (before.n, before.m, before.beta > 0) != (phase.n, phase.m, phase.beta > 0)

    def finish(self) -> bool:
        """The target mask, with nothing through pruned weights."""
        return self.set(Phase("fine_tune", 0.0, *self.target))

    @property
    def kept(self) -> float:
        """Share of the weights that the mask keeps."""
        return 1.0 - self.rate if self.rate else self.n / self.m

    @property
    def density(self) -> float:
        """Share of the weights that take part in the forward pass."""
        return 1.0 if self.phase.beta > 0 else self.kept


class MaskedForward(LatentWeight):
    """Parametrisation: latent weight -> masked weight of the phase. The mask is made anew from the latent weight at every forward pass."""

    def __init__(self, flow: _Flow, dim: int) -> None:
        super().__init__()
        self.flow, self.dim = flow, dim

    def mask(self, weight: Tensor) -> Tensor:
        """Mask of the present pattern, bool."""
        return sparse_mask(weight, self.flow.n, self.flow.m, self.flow.rate, self.dim)

    def forward(self, weight: Tensor) -> Tensor:
        """Latent weight -> weight of the forward pass."""
        if self.flow.dense:
            return weight
        return masked_weight(weight, self.mask(weight), self.flow.beta, self.flow.gradient)


class _Layer(ParametrizedWeight):
    """A weight that we parametrise."""

    def __init__(self, module: nn.Module, attribute: str, flow: _Flow, dim: int) -> None:
        self.flow, self.masking = flow, MaskedForward(flow, dim)
        super().__init__(module, attribute, self.masking)

    @torch.no_grad()
    def mask(self) -> Tensor:
        return self.masking.mask(self.latent)

    @torch.no_grad()
    def active(self) -> Tensor:
        """Weights that take part in the forward pass."""
        return torch.ones_like(self.latent, dtype=torch.bool) if self.flow.phase.beta > 0 else self.mask()


# ---- the callback ----------------------------------------------------------------------------------------------------------------------


class NMSparsity(OrderedCallback):
    """Trains chosen weights of any module to N:M sparsity: in every group of M consecutive weights N stay.

    The optimiser keeps dense latent weights W; the forward pass uses W * (M + (1 - M) beta), with a mask M of the N largest magnitudes that
    is made anew from W at every forward pass. ``recipe`` says how it gets sparse:

    - ``mdgf_exp``: beta = exp(-c t), t optimiser steps after the first sparse one (MdGf-Exponential)
    - ``mdgf_linear``: beta = max(1 - c t, 0) (MdGf-Linear)
    - ``sdgf_stepwise``: beta = 0; (M-1):M, then M/2:M, M/4:M, ... (SdGf-Stepwise)
    - ``sdgf_geometric``: beta = 0; 8N:8M, 4N:4M, 2N:2M, N:M (SdGf-Geometric; ``stages`` of them)
    - ``sdgf_densify``: beta = 0; N:8M, N:4M, N:2M, N:M
    - ``sdgf_custom``: beta = 0; the patterns of ``stages``
    - ``ste``: beta = 0 from the first sparse step on
    - ``srste``: as ``ste``, and ``srste_decay`` * W is added to the gradient of pruned weights (SR-STE)
    - ``one_shot``: dense until fine-tuning or the end of fit, then the largest magnitudes
    - ``dense``: nothing: a baseline in the same place

    Runs: weights are parametrised in ``setup``, before the optimisers are made. Beta and pattern are set before each batch as a pure
    function of ``trainer.global_step`` and ``trainer.current_epoch``. Fit ends with the target pattern and beta = 0: from its last batch
    on, the last validation and the last checkpoint included, weights are exactly N:M, and after fit the module is an ordinary one again. A
    run that is stopped early gets its N:M weights when training ends.
    Saves: under the weights' own names those of the forward pass, so that checkpoints load and export without this callback; in its own
    state latent weights, first sparse step, decay and last masks. While fit runs, parameters are called
    ``<module>.parametrizations.weight.original`` in ``named_parameters()``.
    Works with any precision (masks come from the weights that the optimiser holds), accumulation, manual optimisation (every optimiser's
    steps count), compiled inner networks, DDP (all ranks have the same weights, so the same masks). ``EMATeacher`` averages latent weights,
    and its copy masks its own average, so that it is N:M, too. Refuses strategies that shard weights, Lightning's ``ModelPruning``,
    ``WeightAveraging`` and ``StochasticWeightAveraging``, tied weights, and mask callbacks on the same weights.

    Args:
        n: Weights that stay in each group.
        m: Size of a group: consecutive inputs of a linear layer, input channels of a convolution. Must divide their number.
        recipe: See above.
        targets: ``fnmatch`` patterns on submodule names; or pattern -> ``"N:M"``, where the first pattern that fits a module counts. Empty:
            every linear, convolution and attention module except the first and the last one.
        skip: Patterns on submodule names that stay dense.
        decay: c of MdGf per optimiser step; None: beta is 0.01 (exponential) or 0 (linear) after 0.6 of all steps. Authors: 1e-4, 2e-4.
        gradient: ``ste``: pruned weights get the full gradient, as in the released code; ``exact``: beta times it.
        srste_decay: lambda of ``srste``.
        dense_epochs: First epochs without a mask.
        fine_tune_epochs: Last epochs with the target pattern and beta = 0, from epoch ``total_epochs - fine_tune_epochs`` on.
        total_epochs: Of the schedule; None: ``trainer.max_epochs``.
        stages: Number of stages of ``sdgf_geometric`` and ``sdgf_densify``; list of patterns for ``sdgf_custom``.
        rate: Above 0: unstructured, each weight loses this share, and ``n`` and ``m`` don't matter.
        direction: ``input``, or ``output``: groups of linear layers run over the outputs.

    Raises:
        ValueError: An argument outside its range, here or in ``setup``, where the weights are known.
    """

    runs_before: ClassVar[Sequence[str]] = ("SparsityReport", "Dashboard")
    conflicts_with: ClassVar[Mapping[str, str]] = {
        "ModelPruning": "both replace the weights while fit runs",
        "WeightAveraging": "its checkpoints hold masked weights only, so a resumed average would lose the others; use EMATeacher",
        "StochasticWeightAveraging": "its checkpoints hold masked weights only, so a resumed average would lose the others",
    }

    panels: ClassVar[tuple[Panel, ...]] = (
        Curve(
            "Flow through pruned weights (beta)",
            ("progressive_gradient_flow/beta",),
            note="1: dense, 0: the mask is hard. Should be near 0 well before training ends.",
        ),
        Curve("Pattern", ("progressive_gradient_flow/n*", "progressive_gradient_flow/m", "progressive_gradient_flow/m_*")),
        Curve(
            "Density and training FLOPs",
            ("progressive_gradient_flow/density", "progressive_gradient_flow/train_flops"),
            note="Share of the chosen weights in the forward pass; FLOPs so far as a share of dense training (theory, the paper's count).",
        ),
        Curve("Mask bits changed since the last epoch", ("progressive_gradient_flow/mask_flip_rate",), note="Falls as masks settle."),
        Curve(
            "Gradient norm on pruned and kept weights",
            ("progressive_gradient_flow/grad_pruned_norm", "progressive_gradient_flow/grad_kept_norm"),
            note="Pruned weights get gradients though they don't act: noise, if it is large while beta is small.",
        ),
        TablePanel("Masked weights", "progressive_gradient_flow/layers"),
    )

    def __init__(
        self,
        n: int = 2,
        m: int = 4,
        recipe: Recipe = "mdgf_exp",
        targets: Sequence[str] | Mapping[str, str] = (),
        skip: Sequence[str] = (),
        decay: float | None = None,
        gradient: Gradient = "ste",
        srste_decay: float = 2e-4,
        dense_epochs: int = 0,
        fine_tune_epochs: int = 0,
        total_epochs: int | None = None,
        stages: int | Sequence[str] = 4,
        rate: float = 0.0,
        direction: Direction = "input",
    ) -> None:
        super().__init__()
        if isinstance(targets, str) or isinstance(skip, str):
            raise ValueError(f"targets and skip are lists of patterns, got targets={targets!r}, skip={skip!r}: write ['encoder.*']")
        for name, value, known in (("recipe", recipe, Recipe), ("gradient", gradient, Gradient), ("direction", direction, Direction)):
            if value not in get_args(known):
                raise ValueError(f"{name} is {value!r}: give one of {', '.join(get_args(known))}")
        if not 1 <= n <= m:
            raise ValueError(f"a pattern of {n}:{m} can't be: give 1 <= n <= m")
        for name, number in (("decay", decay or 0.0), ("srste_decay", srste_decay), ("dense_epochs", dense_epochs)):
            if number < 0:
                raise ValueError(f"{name} is {number}: give 0 or more")
        if fine_tune_epochs < 0 or (total_epochs is not None and total_epochs < 1):
            raise ValueError(f"fine_tune_epochs={fine_tune_epochs} must be 0 or more, total_epochs={total_epochs} 1 or more")
        if not 0 <= rate < 1:
            raise ValueError(f"rate is {rate}: give the share of weights to prune, 0 (N:M instead) up to below 1")
        if rate and (recipe.startswith("sdgf_") or isinstance(targets, Mapping)):
            raise ValueError(f"rate={rate} is unstructured, but {recipe} or targets ask for N:M patterns: leave one of them out")
        if (recipe == "sdgf_custom") == isinstance(stages, int):
            raise ValueError(f"stages is {stages!r}: a list of patterns such as ['4:8', '2:8'] with sdgf_custom, a number otherwise")
        if isinstance(stages, int) and stages < 1:
            raise ValueError(f"stages is {stages}: give at least 1")
        self.recipe, self.decay, self.gradient, self.srste_decay = recipe, decay, gradient, srste_decay
        self.targets = {str(k): str(v) for k, v in targets.items()} if isinstance(targets, Mapping) else list(targets)
        self.skip, self.rate, self.direction = list(skip), rate, direction
        self.dense_epochs, self.fine_tune_epochs, self.total_epochs = dense_epochs, fine_tune_epochs, total_epochs
        self.stages: int | list[tuple[int, int]] = stages if isinstance(stages, int) else [parse_pattern(stage) for stage in stages]
        self._pattern = (n, m)
        for pattern in self.targets.values() if isinstance(self.targets, dict) else ():
            if not 1 <= parse_pattern(pattern)[0] <= parse_pattern(pattern)[1]:
                raise ValueError(f"targets: a pattern of {pattern} can't be: give 1 <= N <= M")
        self._reset()

    def _reset(self) -> None:
        self._layers: dict[str, _Layer] = {}
        self._flows: dict[tuple[int, int], _Flow] = {}
        self._first_step: int | None = None  # t0
        self._decay = self.decay
        self._previous: dict[str, Tensor] = {}  # masks of the last epoch's end
        self._spent, self._batches = 0.0, 0  # FLOPs so far, in dense batches
        self._left: dict[str, Any] = {}  # state after fit
        self._final: dict[str, Tensor] = {}  # masks after fit

    @property
    def state_key(self) -> str:
        """Differs between callbacks of different targets: several may be used together."""
        return self._generate_state_key(targets=self.targets, skip=self.skip)

    @property
    def n(self) -> int | None:
        """N, where all weights have the same pattern."""
        return self._one_pattern()[0]

    @property
    def m(self) -> int | None:
        """M, where all weights have the same pattern."""
        return self._one_pattern()[1]

    def _one_pattern(self) -> tuple[int, int] | tuple[None, None]:
        patterns = {parse_pattern(p) for p in self.targets.values()} if isinstance(self.targets, dict) else {self._pattern}
        return next(iter(patterns)) if len(patterns) == 1 else (None, None)

    @property
    def density(self) -> float | None:
        """Share of the chosen weights that stays in the end; None where it isn't known yet, and for ``dense``."""
        if self.recipe == "dense" or not self._layers:
            return None
        shares = {flow: 1.0 - flow.rate if flow.rate else flow.target[0] / flow.target[1] for flow in self._flows.values()}
        sizes = {name: layer.latent.numel() for name, layer in self._layers.items()}
        return sum(shares[layer.flow] * sizes[name] for name, layer in self._layers.items()) / sum(sizes.values())

    @property
    def sparsity_card(self) -> SparsityCard:
        """What kind of sparsity this is. All recipes hold dense latent weights and dense gradients."""
        return SparsityCard(
            stage="post" if self.recipe == "one_shot" and not self.fine_tune_epochs else "during",
            regime="dense_to_dense" if self.recipe == "dense" else "dense_to_sparse",
            mask="dynamic",
            granularity="unstructured" if self.rate else "n:m",
            forward_dense=self.recipe in ("mdgf_exp", "mdgf_linear", "one_shot", "dense") or self.dense_epochs > 0,
            backward_dense=True,
            optimizer_dense=True,
            criterion="magnitude",
            cost="ste",
        )

    # ---- the weights -------------------------------------------------------------------------------------------------------------------

    def chosen(self, pl_module: nn.Module) -> dict[str, tuple[int, int]]:
        """Names of the weights, with the pattern of each."""
        if isinstance(self.targets, dict):
            found: dict[str, tuple[int, int]] = {}
            for target, pattern in self.targets.items():
                for name in prunable_weights(pl_module, [target], self.skip):
                    found.setdefault(name, parse_pattern(pattern))
            return found
        names = list(prunable_weights(pl_module, self.targets, self.skip))
        if not self.targets:
            every = list(prunable_weights(pl_module))
            names = [name for name in names if name not in (every[0], every[-1])]
            if not names:
                raise ValueError(
                    f"{type(pl_module).__name__} has no linear, convolution or attention module between its first and its last one, which "
                    "stay dense by default: name the ones to prune with targets"
                )
        return dict.fromkeys(names, self._pattern)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Choose the weights and parametrise them, before the optimisers are made.

        Raises:
            ValueError: What can't work: patterns that don't fit a weight, a sharding strategy, weights that somebody else masks or ties.
        """
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        refuse_sharded(trainer, type(self).__name__)
        self._detach()
        self._reset()
        patterns = self.chosen(pl_module)
        refuse_unfit(trainer, pl_module, "NMSparsity", set(patterns))
        if self.recipe == "dense":
            return
        modules = {plain_name(name): plain_module(module) for name, module in pl_module.named_modules()}
        end = self._end(trainer)
        if not math.isfinite(end) and (self.fine_tune_epochs or self.recipe.startswith("sdgf_")):
            raise ValueError(
                f"NMSparsity: recipe={self.recipe!r} with fine_tune_epochs={self.fine_tune_epochs} counts from the last epoch, but the "
                "Trainer has no max_epochs: give total_epochs"
            )
        layers = {}
        for name, (n, m) in patterns.items():
            owner, _, attribute = name.rpartition(".")
            module = modules[owner]
            flow = self._flows.setdefault((n, m), _Flow(n, m, self.rate, self.gradient))
            stored_in_out = isinstance(module, nn.modules.conv._ConvTransposeNd) or type(module).__name__ == "Conv1D"
            weight = getattr(module, attribute)
            dim = group_dim(weight.ndim, self.direction, stored_in_out)
            for one_n, one_m in dict.fromkeys([*self._stages(n, m, end), (n, m)]):
                try:
                    sparse_mask(weight, one_n, one_m, self.rate, dim)
                except ValueError as error:
                    raise ValueError(f"NMSparsity, {name}: {error}") from error
            layers[name] = _Layer(module, attribute, flow, dim)
        for layer in layers.values():
            layer.attach()
        self._layers = layers
        kinds = ", ".join(f"{n}:{m}" for n, m in self._flows) if not self.rate else f"{self.rate:.0%} unstructured"
        rank_zero_info(f"NMSparsity ({self.recipe}, {kinds}): {len(layers)} weights: {', '.join(layers)}")

    def _stages(self, n: int, m: int, end: float) -> list[tuple[int, int]]:
        """All patterns of a weight on its way to n:m."""
        if not self.recipe.startswith("sdgf_"):
            return [(n, m)]
        kind: Any = self.recipe.removeprefix("sdgf_")
        stages = sdgf_schedule(kind, n, m, int(end), self.dense_epochs, self.fine_tune_epochs, self.stages)
        if stages[-1][1:] != (n, m) and not self.fine_tune_epochs:
            rank_zero_warn(
                f"NMSparsity: the last stage of {self.recipe} is {stages[-1][1]}:{stages[-1][2]}, the target {n}:{m}; without "
                "fine_tune_epochs the target is reached at the very end alone"
            )
        return [stage[1:] for stage in stages]

    def _end(self, trainer: pl.Trainer) -> float:
        if self.total_epochs is not None:
            return self.total_epochs
        return trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs > 0 else math.inf

    # ---- the schedule ------------------------------------------------------------------------------------------------------------------

    def _follow(self, trainer: pl.Trainer) -> bool:
        """Set the phase of this step; whether masks are of another kind now."""
        if self._first_step is None and trainer.current_epoch >= self.dense_epochs:
            self._first_step = trainer.global_step
        since = -1 if self._first_step is None else trainer.global_step - self._first_step
        changed = False
        for (n, m), flow in self._flows.items():
            phase = phase_at(
                trainer.current_epoch,
                since,
                self.recipe,
                n,
                m,
                decay=self._decay or 0.0,
                total_epochs=self._end(trainer),
                dense_epochs=self.dense_epochs,
                fine_tune_epochs=self.fine_tune_epochs,
                stages=self.stages,
            )
            changed |= flow.set(phase)
        return changed

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Settle the decay, and set the phase that the run starts or goes on with."""
        if self._decay is None and self.recipe in ("mdgf_exp", "mdgf_linear"):
            steps = trainer.estimated_stepping_batches
            if not math.isfinite(steps):
                raise ValueError("NMSparsity can't choose decay for a training without an end: give decay, or max_steps / max_epochs")
            self._decay = (math.log(100) if self.recipe == "mdgf_exp" else 1.0) / (0.6 * max(1, int(steps)))
            rank_zero_info(f"NMSparsity: decay {self._decay:.6g} per optimiser step")
        self._follow(trainer)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Set beta and pattern."""
        if not self._layers:
            return
        if self._follow(trainer):
            notify_mask_updated(trainer, pl_module, self)
        self._spent += self._density()
        self._batches += 1
        logs: dict[str, float] = {"beta": max(flow.phase.beta for flow in self._flows.values())}
        for index, flow in enumerate(self._flows.values()):
            ending = f"_{index}" if len(self._flows) > 1 else ""
            if not self.rate:
                logs |= {f"n{ending}": float(flow.n), f"m{ending}": float(flow.m)}
        pl_module.log_dict({f"progressive_gradient_flow/{name}": value for name, value in logs.items()}, on_step=True, on_epoch=False)

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        """SR-STE's decay, on gradients that are unscaled, averaged and accumulated; norms, on steps that are logged. Before clipping."""
        logged = (trainer.global_step + 1) % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        if not self._layers or not (logged or self.recipe == "srste"):
            return
        owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        squares: list[Tensor] = []
        for layer in self._layers.values():
            grad = layer.latent.grad
            if grad is None or id(layer.latent) not in owned or layer.flow.dense:
                continue
            mask = layer.mask()
            if logged:
                pruned = grad.masked_fill(mask, 0.0).float().square().sum()
                squares.append(torch.stack([pruned, grad.masked_fill(~mask, 0.0).float().square().sum()]))
            if self.recipe == "srste":
                grad.copy_(decay_pruned(grad, layer.latent, mask, self.srste_decay))
        if squares:
            norms = torch.stack([pair.to(squares[0].device) for pair in squares]).sum(0).sqrt()
            names = ("progressive_gradient_flow/grad_pruned_norm", "progressive_gradient_flow/grad_kept_norm")
            pl_module.log_dict(dict(zip(names, norms, strict=True)), on_step=True, on_epoch=False)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After the last batch: the target, so that the last validation and checkpoint are of the sparse network."""
        last = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        epochs_over = last and trainer.max_epochs is not None and 0 < trainer.max_epochs <= trainer.current_epoch + 1
        if epochs_over or 0 <= trainer.max_steps <= trainer.global_step:
            self._finish(trainer, pl_module)

    def _finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if any([flow.finish() for flow in self._flows.values()]):  # a list: all of them
            notify_mask_updated(trainer, pl_module, self)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log what costs a pass over the weights, and tell the others about the masks."""
        if not self._layers:
            return
        logs = {"density": self._density(), "train_flops": self._spent / max(1, self._batches)}
        if not all(flow.dense for flow in self._flows.values()):
            masks = {name: layer.mask() for name, layer in self._layers.items() if not layer.flow.dense}
            shared = [name for name in masks if name in self._previous]
            if shared:
                flips = torch.stack([(masks[name] != self._previous[name].to(masks[name].device)).sum().cpu() for name in shared]).sum()
                logs["mask_flip_rate"] = float(flips) / sum(masks[name].numel() for name in shared)
            self._previous = masks
        values = {f"progressive_gradient_flow/{name}": value for name, value in logs.items()}
        pl_module.log_dict(values, sync_dist=trainer.world_size > 1)
        notify_mask_updated(trainer, pl_module, self)

    def _density(self) -> float:
        sizes = [(layer.flow.density, layer.latent.numel()) for layer in self._layers.values()]
        return sum(density * size for density, size in sizes) / sum(size for _, size in sizes)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Training may have been stopped early."""
        self._finish(trainer, pl_module)

    # ---- what others ask for -----------------------------------------------------------------------------------------------------------

    def sparsity_masks(self) -> dict[str, Tensor]:
        """Parameter name -> bool mask of the weights that take part in the forward pass: all of them while beta is above 0."""
        return {name: layer.active() for name, layer in self._layers.items()} if self._layers else dict(self._final)

    def dashboard_artifacts(self) -> dict[str, dict[str, Tensor]]:
        """The masks."""
        masks = self.sparsity_masks()
        return {"nm_sparsity_masks": masks} if masks else {}

    def dashboard_media(self) -> dict[str, Media]:
        """A table of the masked weights."""
        if not self._layers:
            return {}
        rows = []
        for name, layer in self._layers.items():
            n, m = layer.flow.target
            target = f"{self.rate:.1%} pruned" if self.rate else f"{n}:{m}"
            now = target if self.rate else f"{layer.flow.n}:{layer.flow.m}"
            shape = " x ".join(map(str, layer.latent.shape))
            rows.append((name, shape, target, "dense" if layer.flow.dense else now, layer.flow.phase.beta))
        return {"progressive_gradient_flow/layers": TableMedia(("weight", "shape", "target", "now", "beta"), tuple(rows))}

    # ---- state -------------------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Latent weights and what the schedule and the logs need."""
        if not self._layers:
            return self._left
        return {
            "latent": {name: layer.latent.detach() for name, layer in self._layers.items()},
            "first_step": self._first_step,
            "decay": self._decay,
            "previous": dict(self._previous),
            "spent": self._spent,
            "batches": self._batches,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over latent weights: the module has loaded the masked ones just before.

        Raises:
            ValueError: The checkpoint's weights are others.
        """
        if not state or not self._layers:
            return
        if set(state["latent"]) != set(self._layers):
            odd = sorted(set(state["latent"]) ^ set(self._layers))[:6]
            raise ValueError(
                f"the checkpoint's latent weights are others ({', '.join(odd)}): resume with the same module, targets and skip"
            )
        for name, latent in state["latent"].items():
            self._layers[name].latent.copy_(latent)
        self._first_step = None if state["first_step"] is None else int(state["first_step"])
        self._decay = self.decay if self.decay is not None else state["decay"]
        self._previous = dict(state["previous"])
        self._spent, self._batches = float(state["spent"]), int(state["batches"])

    def _detach(self) -> None:
        """Leave an ordinary module with the weights of the forward pass; state and masks stay readable."""
        if not self._layers:
            return
        state = self.state_dict()
        self._left = state | {"latent": {name: latent.cpu().clone() for name, latent in state["latent"].items()}}
        self._final = self.sparsity_masks()
        layers, self._layers = self._layers, {}
        for layer in layers.values():
            layer.detach()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Make the module an ordinary one again."""
        self._detach()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Make the module an ordinary one again: Lightning doesn't call ``teardown`` here."""
        self._detach()


__all__ = ["MaskedForward", "NMSparsity"]
