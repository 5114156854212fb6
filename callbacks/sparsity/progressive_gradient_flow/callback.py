"""N:M sparsity with decaying masks as a callback.

Maths, paper and origin: :mod:`~lit_methods.callbacks.sparsity.progressive_gradient_flow.core`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lit_methods import checks
from lit_methods.callbacks.sparsity.callback import notify_mask_updated
from lit_methods.callbacks.sparsity.card import SparsityCard
from lit_methods.callbacks.sparsity.history import MaskHistory, flips
from lit_methods.callbacks.sparsity.latent import (
    Direction,
    Gradient,
    LatentCallback,
    LatentWeight,
    ParametrizedWeight,
    Place,
    Shared,
    group_dim,
    masked_weight,
)
from lit_methods.callbacks.sparsity.masks import check_pattern
from lit_methods.callbacks.sparsity.progressive_gradient_flow import core
from lit_methods.callbacks.sparsity.progressive_gradient_flow.core import Phase, Recipe, parse_pattern, sparse_mask
from lit_methods.catalog import Technique
from lit_methods.panels import Curve, Media, Panel, TableMedia, TablePanel
from lit_methods.steps import log_global, logs_now, training_length

TECHNIQUE = Technique(
    slug="progressive_gradient_flow",
    short="Progressive Gradient Flow (N:M)",
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


class _Flow(Shared):
    """What the weights of one pattern share."""

    def __init__(self, n: int, m: int, rate: float, gradient: Gradient) -> None:
        self.target, self.rate, self.gradient = (n, m), rate, gradient
        self.kept = 1.0 - rate if rate else n / m  # share of the weights that the target mask keeps
        self.beta = torch.ones((), dtype=torch.float64)  # on the CPU: goes with weights on any device, and reading it waits for none
        self.phase = Phase("dense", -1.0, n, m)  # before the first one
        self.set(Phase("dense", 1.0, n, m))

    def set(self, phase: Phase) -> bool:
        """Take over a phase; whether the mask that the forward pass applies is another kind of mask now."""
        before, self.phase = self.phase, phase
        self.beta.fill_(phase.beta)  # in place: compiled code keeps the tensor
        return (before.n, before.m, before.beta > 0) != (phase.n, phase.m, phase.beta > 0)

    @property
    def dense(self) -> bool:
        """Whether the forward pass sees latent weights as they are."""
        return self.phase.name == "dense"

    @property
    def density(self) -> float:
        """Share of the weights that take part in the forward pass."""
        if self.phase.beta > 0:
            return 1.0
        return self.kept if self.rate else self.phase.n / self.phase.m


class MaskedForward(LatentWeight):
    """Parametrisation: latent weight -> masked weight of the phase. The mask follows from the latent weight at every forward pass."""

    def __init__(self, flow: _Flow, dim: int) -> None:
        super().__init__()
        self.flow, self.dim = flow, dim
        self._last: tuple[tuple[int, int], Tensor, Tensor] | None = None  # pattern, weight and mask of the last evaluation

    def mask(self, weight: Tensor) -> Tensor:
        """Mask of the present pattern, bool. In evaluation it is kept as long as the weight has the same values.

        The values decide, as in-place changes through ``weight.data`` leave no other trace.
        """
        pattern = (self.flow.phase.n, self.flow.phase.m)
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or weight.device.type != "cpu":
            self._last = None
            return sparse_mask(weight, *pattern, self.flow.rate, self.dim)
        if self._last is not None and self._last[0] == pattern and torch.equal(self._last[1], weight):
            return self._last[2]
        mask = sparse_mask(weight, *pattern, self.flow.rate, self.dim)
        self._last = pattern, weight.detach().clone(), mask
        return mask

    def forward(self, weight: Tensor) -> Tensor:
        """Latent weight -> weight of the forward pass."""
        return weight if self.flow.dense else masked_weight(weight, self.mask(weight), self.flow.beta, self.flow.gradient)


class _Layer(ParametrizedWeight[MaskedForward]):
    @property
    def flow(self) -> _Flow:
        return self.parametrization.flow

    @torch.no_grad()
    def mask(self) -> Tensor:
        return self.parametrization.mask(self.latent)

    @torch.no_grad()
    def active(self) -> Tensor:
        """Weights that take part in the forward pass."""
        return torch.ones_like(self.latent, dtype=torch.bool) if self.flow.phase.beta > 0 else self.mask()


class NMSparsity(LatentCallback):
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

    Runs: as :class:`LatentCallback`. Beta and pattern are set before each batch as a pure function of ``trainer.global_step`` and
    ``trainer.current_epoch``. Fit ends with the target pattern and beta = 0: from its last batch on, weights are exactly N:M. With manual
    optimisation every optimiser's steps count. Masks come from the weights that the optimiser holds, whatever the precision; all DDP ranks
    have the same. ``EMATeacher`` averages latent weights, and its copy masks its own average, so that it is N:M, too.

    Saves: what :class:`LatentCallback` saves, first sparse step, decay, last masks and the phase.

    Refuses: what :class:`LatentCallback` refuses, and patterns that don't fit a weight.

    Args:
        n: Weights that stay in each group.
        m: Size of a group: consecutive inputs of a linear layer, input channels of a convolution. Must divide their number.
        recipe: How the weights get sparse, one of the list above.
        targets: ``fnmatch`` patterns on submodule names; or pattern -> ``"N:M"``, where the first pattern that fits a module counts. Empty:
            every linear, convolution and attention module except the first and the last one.
        skip: Patterns on submodule names that stay dense.
        decay: c of MdGf per optimiser step; None: beta is 0.01 (exponential) or 0 (linear) after 0.6 of all steps. Authors: 1e-4, 2e-4.
        gradient: ``ste``: pruned weights get the full gradient, as in the released code; ``exact``: beta times it.
        srste_decay: lambda of ``srste``.
        dense_epochs: First epochs without a mask.
        fine_tune_epochs: Last epochs with the target pattern and beta = 0, from epoch ``total_epochs - fine_tune_epochs`` on.
        total_epochs: Epochs of the schedule; None: ``trainer.max_epochs``.
        stages: Number of stages of ``sdgf_geometric`` and ``sdgf_densify``; list of patterns for ``sdgf_custom``.
        rate: Above 0: unstructured, each weight loses this share, and ``n`` and ``m`` don't matter.
        direction: ``input``, or ``output``: groups of linear layers run over the outputs.

    Raises:
        ValueError: An argument outside its range, here or in ``setup``, where the weights are known.
    """

    prefix = "progressive_gradient_flow"
    kept: ClassVar[Mapping[str, str]] = {name: f"_{name}" for name in ("first_step", "decay", "spent", "batches")}
    panels: ClassVar[tuple[Panel, ...]] = (
        Curve("Flow through pruned weights (beta)", ("progressive_gradient_flow/beta",), note="1: dense, 0: the mask is hard."),
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
        super().__init__(targets, skip)
        checks.literals(NMSparsity, locals())
        checks.at_least(0, decay=decay, srste_decay=srste_decay)
        checks.at_least(0, "epochs", dense_epochs=dense_epochs, fine_tune_epochs=fine_tune_epochs)
        checks.at_least(1, "epochs", total_epochs=total_epochs)
        checks.within("[0, 1)", "the share of weights to prune, or 0 for N:M,", rate=rate)
        if rate and (recipe.startswith("sdgf_") or isinstance(targets, Mapping)):
            raise ValueError(f"rate={rate} is unstructured, but {recipe} or targets ask for N:M patterns: leave one of them out")
        if (recipe == "sdgf_custom") == isinstance(stages, int):
            raise ValueError(f"stages is {stages!r}: a list of patterns such as ['4:8', '2:8'] with sdgf_custom, a number otherwise")
        self.stages: int | list[tuple[int, int]] = stages if isinstance(stages, int) else [parse_pattern(stage) for stage in stages]
        checks.at_least(1, "a number of stages", stages=self.stages if isinstance(self.stages, int) else None)
        self.recipe, self.decay, self.gradient, self.srste_decay = recipe, decay, gradient, srste_decay
        self.rate, self.direction = rate, direction
        self.dense_epochs, self.fine_tune_epochs, self.total_epochs = dense_epochs, fine_tune_epochs, total_epochs
        self._pattern = (n, m)
        patterns = {parse_pattern(pattern) for pattern in self.targets.values()} if isinstance(self.targets, dict) else {self._pattern}
        for pattern in (self._pattern, *patterns):
            check_pattern(*pattern)
        self.n: int | None
        self.m: int | None
        self.n, self.m = next(iter(patterns)) if len(patterns) == 1 else (None, None)  # where all weights have the same pattern

    def reset(self) -> None:
        """Forget the last run."""
        super().reset()
        self._layers: dict[str, _Layer] = {}
        self._flows: dict[tuple[int, int], _Flow] = {}
        self._first_step: int | None = None  # t0
        self._in_phase = False  # that of a checkpoint
        self._decay: float | None = None
        self._history = MaskHistory("last")  # at the ends of epochs
        self._spent, self._batches = 0.0, 0  # FLOPs so far, in dense batches
        self._final: dict[str, Tensor] = {}  # masks after fit

    @property
    def density(self) -> float | None:
        """Share of the chosen weights that stays in the end; None where it isn't known yet, and for ``dense``."""
        return self._mean({key: flow.kept for key, flow in self._flows.items()}) if self._layers else None

    def _mean(self, shares: Mapping[tuple[int, int], float]) -> float:
        """Mean over the weights of a share that each pattern has."""
        sizes = [(shares[layer.flow.target], layer.latent.numel()) for layer in self._layers.values()]
        return sum(share * size for share, size in sizes) / sum(size for _, size in sizes)

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
        if not isinstance(self.targets, dict):
            return dict.fromkeys(super().chosen(pl_module), self._pattern)
        patterns: dict[str, tuple[int, int]] = {}
        for target, pattern in self.targets.items():
            for name in self.trained(pl_module, [target]).weights:
                patterns.setdefault(name, parse_pattern(pattern))
        return patterns

    def make_layers(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, chosen: Mapping[str, tuple[int, int]], places: Mapping[str, Place]
    ) -> dict[str, _Layer]:
        """Weights that follow the flow of their pattern; none for ``dense``."""
        end = self._end(trainer)
        if not math.isfinite(end) and (self.fine_tune_epochs or self.recipe.startswith("sdgf_")):
            given = f"recipe={self.recipe!r} with fine_tune_epochs={self.fine_tune_epochs}"
            raise ValueError(f"NMSparsity: {given} counts from the last epoch, but the Trainer has no max_epochs: give total_epochs")
        layers = {}
        for name, pattern in chosen.items() if self.recipe != "dense" else ():
            place = places[name]
            dim = group_dim(place.weight.ndim, self.direction, place.transposed)
            if int((1.0 - self.rate) * place.weight.numel()) < 1:
                size = place.weight.numel()
                raise ValueError(f"NMSparsity, {name}: rate={self.rate} leaves none of {size} weights: give a lower rate, or skip it")
            for n, m in dict.fromkeys([*self._stages(*pattern, end), pattern]):
                try:
                    sparse_mask(place.weight, n, m, self.rate, dim)
                except ValueError as error:
                    raise ValueError(f"NMSparsity, {name}: {error}") from error
            flow = self._flows.setdefault(pattern, _Flow(*pattern, self.rate, self.gradient))
            layers[name] = _Layer(place.module, place.attribute, MaskedForward(flow, dim))
        return layers

    def title(self) -> str:
        """Recipe and patterns."""
        kinds = ", ".join(f"{n}:{m}" for n, m in self._flows) if not self.rate else f"{self.rate:.0%} unstructured"
        return f"NMSparsity ({self.recipe}, {kinds})"

    def _stages(self, n: int, m: int, end: float) -> list[tuple[int, int]]:
        """All patterns of a weight on its way to n:m."""
        if not self.recipe.startswith("sdgf_"):
            return [(n, m)]
        kind: Any = self.recipe.removeprefix("sdgf_")
        stages = core.sdgf_schedule(kind, n, m, int(end), self.dense_epochs, self.fine_tune_epochs, self.stages)
        if stages[-1][1:] != (n, m) and not self.fine_tune_epochs:
            last = f"the last stage of {self.recipe} is {stages[-1][1]}:{stages[-1][2]}, the target {n}:{m}"
            rank_zero_warn(f"NMSparsity: {last}; without fine_tune_epochs the target is reached at the very end alone")
        return [stage[1:] for stage in stages]

    def _end(self, trainer: pl.Trainer) -> float:
        epochs = trainer.max_epochs if self.total_epochs is None else self.total_epochs
        return epochs if epochs is not None and epochs > 0 else math.inf

    # ---- the schedule ------------------------------------------------------------------------------------------------------------------

    def _follow(self, trainer: pl.Trainer) -> bool:
        """Set the phase of this step; whether masks are of another kind now."""
        if self._first_step is None and trainer.current_epoch >= self.dense_epochs:
            self._first_step = trainer.global_step
        since = -1 if self._first_step is None else trainer.global_step - self._first_step
        epochs: dict[str, Any] = {"dense_epochs": self.dense_epochs, "fine_tune_epochs": self.fine_tune_epochs, "stages": self.stages}
        epochs |= {"decay": self._decay or 0.0, "total_epochs": self._end(trainer)}
        now = trainer.current_epoch
        return any([flow.set(core.phase_at(now, since, self.recipe, *pattern, **epochs)) for pattern, flow in self._flows.items()])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Settle the decay, and set the phase that the run starts with."""
        self._decay = self._decay if self.decay is None else self.decay
        if self._decay is None and self.recipe in ("mdgf_exp", "mdgf_linear"):
            steps = training_length(pl_module, what="NMSparsity's choice of decay", instead="decay")
            self._decay = (math.log(100) if self.recipe == "mdgf_exp" else 1.0) / (0.6 * steps)
            rank_zero_info(f"NMSparsity: decay {self._decay:.6g} per optimiser step")
        if not self._in_phase:
            self._follow(trainer)
        self._in_phase = False

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Set beta and pattern."""
        if not self._layers:
            return
        if self._follow(trainer):
            notify_mask_updated(trainer, pl_module, self)
        self._spent += self._density()
        self._batches += 1
        if not logs_now(pl_module):
            return
        logs: dict[str, float] = {"beta": max(flow.phase.beta for flow in self._flows.values())}
        for index, flow in enumerate(self._flows.values() if not self.rate else ()):
            ending = f"_{index}" if len(self._flows) > 1 else ""
            logs |= {f"n{ending}": float(flow.phase.n), f"m{ending}": float(flow.phase.m)}
        self.log_step(pl_module, logs)

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        """SR-STE's decay, on gradients that are unscaled, averaged and accumulated; norms, on steps that are logged. Before clipping."""
        logged = logs_now(pl_module)
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
                squares.append(torch.stack([grad.masked_fill(part, 0.0).float().square().sum() for part in (mask, ~mask)]))
            if self.recipe == "srste":
                grad.copy_(core.decay_pruned(grad, layer.latent, mask, self.srste_decay))
        if squares:
            norms = torch.stack([pair.to(squares[0].device) for pair in squares]).sum(0).sqrt()
            self.log_step(pl_module, {"grad_pruned_norm": norms[0], "grad_kept_norm": norms[1]})

    def finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The target masks, with nothing through pruned weights."""
        if any([flow.set(Phase("fine_tune", 0.0, *flow.target)) for flow in self._flows.values()]):  # a list: all of them
            notify_mask_updated(trainer, pl_module, self)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log what costs a pass over the weights, and tell the others about the masks."""
        if not self._layers:
            return
        logs = {"density": self._density(), "train_flops": self._spent / max(1, self._batches)}
        masks = {name: layer.mask() for name, layer in self._layers.items() if not layer.flow.dense}
        if shared := sum(mask.numel() for name, mask in masks.items() if name in self._history.last):
            logs["mask_flip_rate"] = float(flips(self._history.last, masks)) / shared
        self._history.last = masks or self._history.last
        values = {f"progressive_gradient_flow/{name}": value for name, value in logs.items()}
        log_global(pl_module, values, batch_size=1)
        notify_mask_updated(trainer, pl_module, self)

    def _density(self) -> float:
        """Share of the weights that take part in the forward pass now."""
        return self._mean({key: flow.density for key, flow in self._flows.items()})

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
        rows = []
        for name, layer in self._layers.items():
            phase, (n, m) = layer.flow.phase, layer.flow.target
            target, now = (f"{self.rate:.1%} pruned",) * 2 if self.rate else (f"{n}:{m}", f"{phase.n}:{phase.m}")
            rows.append((name, " x ".join(map(str, layer.latent.shape)), target, "dense" if layer.flow.dense else now, phase.beta))
        table = TableMedia(("weight", "shape", "target", "now", "beta"), tuple(rows))
        return {"progressive_gradient_flow/layers": table} if rows else {}

    # ---- state -------------------------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Latent weights and what the schedule and the logs need."""
        phases = [[flow.phase.name, flow.phase.beta, flow.phase.n, flow.phase.m] for flow in self._flows.values()]
        return super().state() | self._history.state(previous="last") | {"phases": phases}

    def restore(self, state: dict[str, Any]) -> None:
        """The masks of the last epoch, and the phase of the last batch, which a validation that is still due sees."""
        self._history.load(state, {name: layer.latent for name, layer in self._layers.items()}, previous="last")
        phases = state.get("phases", [])
        self._in_phase = len(phases) == len(self._flows)
        for flow, (name, beta, n, m) in zip(self._flows.values(), phases, strict=False) if self._in_phase else ():
            flow.set(Phase(name, beta, n, m))

    def leave(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave an ordinary module; state and masks stay readable."""
        self._final = self.sparsity_masks()
        super().leave(trainer, pl_module)


__all__ = ["MaskedForward", "NMSparsity"]
