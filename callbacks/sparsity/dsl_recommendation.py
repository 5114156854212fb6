"""DSL, dynamic sparse learning for recommenders: embedding tables are trained sparse, and their masks keep moving.

Paper: "Dynamic Sparse Learning: A Novel Paradigm for Efficient Recommendation", arXiv:2402.02855 (WSDM 2024). Golden vectors come from the
authors' code, shuyao-wang/DSL@a93cc5d, LightGCN/utils/core.py (``Masking.truncate_weights``, ``CosineDecay``). Left out: its linear
schedule, which doesn't work there. Where the maths here differ from that code: docs/techniques/dsl_recommendation.md.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn

from lit_methods import checks
from lit_methods.callbacks.sparsity.card import SparsityCard
from lit_methods.callbacks.sparsity.density import layer_density
from lit_methods.callbacks.sparsity.drop_grow import drop_below_threshold, grow
from lit_methods.callbacks.sparsity.dynamic import MovingMasks
from lit_methods.callbacks.sparsity.dynamics import itop_rate
from lit_methods.callbacks.sparsity.masks import keep_largest, random_mask
from lit_methods.callbacks.sparsity.schedules import cosine_drop
from lit_methods.callbacks.sparsity.store import Choice
from lit_methods.callbacks.targets import plain_modules, select_modules
from lit_methods.catalog import Technique
from lit_methods.panels import Curve, HistogramMedia, HistogramPanel, Media, Panel, TableMedia, TablePanel
from lit_methods.steps import remaining_steps

TECHNIQUE = Technique(
    slug="dsl_recommendation",
    short="DSL",
    title="Dynamic Sparse Learning: A Novel Paradigm for Efficient Recommendation",
    arxiv="2402.02855",
    family="sparsity",
    form="callback",
    classes=(
        "lit_methods.callbacks.sparsity.dsl_recommendation.DSL",
        "lit_methods.tasks.recommendation.lightgcn.LightGCN",
        "lit_methods.tasks.recommendation.neumf.NeuMF",
        "lit_methods.tasks.recommendation.multvae.MultVAE",
        "lit_methods.datamodules.recommendation.ratings.RatingsDataModule",
    ),
    configs=("dsl_recommendation.yaml",),
    golden=("mask_update", "update_ratio", "topk_metrics", "lightgcn_loss"),
    claim="With 10 % of LightGCN's embedding table active, DSL reaches a higher Recall@20 than a static random mask of the same density.",
    summary="Trains recommenders sparse from the start: small weights give way to those with the largest gradient, at a constant budget.",
)

Start = Literal["uniform", "lottery_ticket"]
Death = Literal["magnitude", "set", "taylor", "threshold"]
Growth = Literal["gradient", "random", "random_unfired", "momentum"]
_GROUPS = 10  # of rows, by popularity


# ---- the maths -------------------------------------------------------------------------------------------------------------------------


def update_ratio(step: int, total_steps: int, initial: float = 0.5, floor: float = 0.005) -> float:
    """Share of the active weights that an update after ``step`` prunes: half a cosine from ``initial`` to ``floor``.

    Args:
        step: Optimiser steps done, >= 0.
        total_steps: Optimiser steps of the whole training, >= 1; from there on the ratio stays at ``floor``.
        initial: Ratio at step 0, in [0, 1].
        floor: Ratio at the end, in [0, 1].
    """
    return cosine_drop(step, initial, 0, total_steps, floor)


def global_magnitude_masks(weights: dict[str, Tensor], density: float) -> dict[str, Tensor]:
    """The largest magnitudes of all tensors together: the start that the paper calls lottery ticket.

    Args:
        weights: Name -> tensor, any shapes, on one device.
        density: Share of all entries that stays, in [0, 1]; exactly ``round(density * entries)`` are kept.

    Returns:
        Name -> bool mask.
    """
    sizes = [weight.numel() for weight in weights.values()]
    flat = torch.cat([weight.detach().abs().flatten() for weight in weights.values()])
    kept = keep_largest(flat, round(density * flat.numel()))
    parts = zip(weights.items(), kept.split(sizes), strict=True)
    return {name: part.view(weight.shape) for (name, weight), part in parts}


def prune(weight: Tensor, mask: Tensor, ratio: float, death: Death, gradient: Tensor | None = None, threshold: float = 1e-3) -> Tensor:
    """First half of an update: the active weights that stay.

    Args:
        weight: Any shape, zero where ``mask`` is False.
        mask: bool, same shape; a of it are True.
        ratio: Share of the active weights to remove, in [0, 1]; n = ceil(ratio * a).
        death: ``magnitude``: all that are at most as large as the n-th smallest active one, ties included. ``set``: the ceil(n / 2)
            smallest positive and the ceil(n / 2) largest negative ones, and active zeros. ``taylor``: the n smallest of
            |weight * gradient|. ``threshold``: all with a magnitude of ``threshold`` or less, whatever ``ratio`` is.
        gradient: Same shape, of the step just taken; for ``taylor`` alone.
        threshold: >= 0, in the unit of the weights; for ``threshold`` alone.

    Returns:
        bool, a subset of ``mask``.

    Raises:
        ValueError: ``taylor`` without a gradient, or an unknown ``death``.
    """
    checks.one_of(Death, death=death)
    weight = weight.detach()
    if death == "magnitude":
        return drop_below_threshold(weight, mask, ratio) & mask
    if death == "threshold":
        return mask & (weight.abs() > threshold)
    active = int(mask.sum())
    removed = math.ceil(ratio * active)
    if death == "set":
        sides = (mask & (weight > 0), mask & (weight < 0))
        half = math.ceil(removed / 2)
        return torch.stack([_keep_all_but(side, weight.abs(), half) for side in sides]).any(dim=0) if removed else mask
    if gradient is None:
        raise ValueError("death='taylor' weighs weights by their gradient, and none was given")
    return _keep_all_but(mask, (weight * gradient).abs(), removed)


def _keep_all_but(mask: Tensor, score: Tensor, count: int) -> Tensor:
    """``mask`` without its ``count`` smallest scores."""
    return keep_largest(score.masked_fill(~mask, -1.0), max(int(mask.sum()) - count, 0))


def regrow(kept: Tensor, score: Tensor, count: int, uniform: Tensor) -> Tensor:
    """Second half of an update: the ``count`` inactive positions of the largest score come to life, just-pruned ones included.

    A score of 0 says nothing: if fewer than ``count`` inactive positions have a positive one, the others are chosen at random among the
    inactive, so that the budget stays whole.

    Args:
        kept: bool, any shape.
        score: Same shape, >= 0, floating point.
        count: Positions to switch on; at most the number of inactive ones.
        uniform: Same shape, random in [0, 1): decides among zero scores.

    Returns:
        bool, shape of ``kept``.
    """
    return grow(kept, torch.where(score > 0, score, uniform.to(score) - 1.0), count)


def update_mask(
    weight: Tensor,
    mask: Tensor,
    score: Tensor,
    ratio: float,
    uniform: Tensor,
    death: Death = "magnitude",
    gradient: Tensor | None = None,
    threshold: float = 1e-3,
) -> tuple[Tensor, Tensor]:
    """One update of DSL: prune, then grow as many elsewhere. The caller sets weight = weight * new mask.

    A weight that was pruned and grown in the same update keeps its value.

    Args:
        weight: Any shape, zero where ``mask`` is False.
        mask: bool, same shape.
        score: Same shape, >= 0; for DSL's own growth the magnitude of the dense gradient.
        ratio: Share of the active weights to remove, in [0, 1].
        uniform: Same shape, random in [0, 1): decides among zero scores.
        death: What is pruned, as in :func:`prune`.
        gradient: Same shape, of the step just taken; for ``taylor`` alone.
        threshold: Largest magnitude that ``threshold`` prunes.

    Returns:
        The new mask with as many True entries as ``mask``, and the number of pruned weights, a scalar int64 tensor.
    """
    kept = prune(weight, mask, ratio, death, gradient, threshold)
    removed = mask.sum() - kept.sum()
    return regrow(kept, score, int(removed), uniform), removed


# ---- the callback ----------------------------------------------------------------------------------------------------------------------


class DSL(MovingMasks):
    """Trains chosen weights, such as embedding tables, sparse from the start, with masks that keep moving at a constant budget.

    Every ``interval`` optimiser steps the smallest weights give way to the inactive ones with the largest gradient. Every chosen tensor has
    the same density. The share that an update replaces falls along a cosine over all optimiser steps, and updates go on to the last step.

    Runs: as :class:`MovingMasks`.

    Saves: what :class:`MaskCallback` saves, and which weights were ever active.

    Refuses: what :class:`MaskCallback` refuses, Lightning's ``StochasticWeightAveraging``, and embeddings with ``sparse=True``, as dense
    gradients are needed.

    Args:
        density: Share of the chosen weights that is active, in (0, 1].
        start: First masks. ``uniform``: each entry by itself with probability ``density``; ``lottery_ticket``: the largest initial weights
            of all chosen tensors together.
        death: What is pruned: ``magnitude``, ``set``, ``taylor`` or ``threshold``, as :func:`prune` says.
        growth: What grows: ``gradient``; ``random``; ``random_unfired``, at random, never active ones first; ``momentum``: size of
            Adam's mean / sqrt(mean of squares), or of SGD's momentum.
        interval: Optimiser steps between two updates.
        initial_ratio: Share of the active weights that the first updates replace, in [0, 1].
        min_ratio: Share at the end, in [0, 1].
        death_threshold: Largest magnitude that ``death: threshold`` prunes.
        fix: Keep the first masks: the static baseline.
        include_vectors: Mask tensors of one dimension as well, such as biases, as the authors do for MultVAE.
        total_steps: All optimiser steps; None: ``trainer.estimated_stepping_batches``.
        targets: Patterns on names of the modules to mask; empty: every linear, convolution and attention module.
        skip: Patterns on submodule names that stay dense.
        seed: Seed of everything random about the masks.
        mask_gradients: Set gradients of dead weights to 0 before the optimiser's step. The authors don't.
        mask_optimizer_state: Set Adam's moments (SGD's momentum) of dead weights to 0 after every step. The authors do so for SGD, not for
            Adam. True is the cleaner choice: a weight that grows then starts without a memory of its dead time.

    Raises:
        ValueError: An argument outside its range.
    """

    artifact, remembers = "dsl_masks", {"fired": "ever"}

    panels: ClassVar[tuple[Panel, ...]] = (
        Curve("DSL: density and exploration", ("dsl/density", "dsl/itop"), note="itop: share of the weights that were ever active."),
        Curve("DSL: update ratio", ("dsl/ratio", "dsl/survival"), note="survival: share of active weights that the last update kept."),
        HistogramPanel("DSL: active entries per row", "dsl/active_per_row", note="For embeddings: dimensions that a user or item has."),
        TablePanel("DSL: density by popularity", "dsl/groups", note="Ten equal groups of rows, from rare to popular."),
    )

    def __init__(
        self,
        density: float = 0.5,
        start: Start = "uniform",
        death: Death = "magnitude",
        growth: Growth = "gradient",
        interval: int = 3000,
        initial_ratio: float = 0.5,
        min_ratio: float = 0.005,
        death_threshold: float = 1e-3,
        fix: bool = False,
        include_vectors: bool = False,
        total_steps: int | None = None,
        targets: Sequence[str] = (),
        skip: Sequence[str] = (),
        seed: int = 0,
        mask_gradients: bool = False,
        mask_optimizer_state: bool = False,
    ) -> None:
        super().__init__(targets, skip, seed, mask_gradients, mask_optimizer_state)
        checks.within("(0, 1]", "a share", density=density)
        checks.share(initial_ratio=initial_ratio, min_ratio=min_ratio)
        checks.at_least(1, "optimiser steps", interval=interval, total_steps=total_steps)
        checks.at_least(0, "a magnitude", death_threshold=death_threshold)
        checks.literals(DSL, locals())
        if growth == "momentum" and (mask_gradients or mask_optimizer_state):
            raise ValueError("growth='momentum' reads the moments of dead weights: set mask_gradients and mask_optimizer_state to false")
        self.density, self.start, self.death, self.growth, self.interval = density, start, death, growth, interval
        self.initial_ratio, self.min_ratio, self.death_threshold = initial_ratio, min_ratio, death_threshold
        self.fix, self.include_vectors, self.total_steps = fix, include_vectors, total_steps
        self._module: pl.LightningModule | None = None
        self._optimizers: list[torch.optim.Optimizer] = []
        self._length = 1  # optimiser steps of this fit
        self._logged: dict[str, float] = {}

    @property
    def fired(self) -> dict[str, Tensor]:
        """Name -> which entries were ever active."""
        return self.history.ever

    @property
    def sparsity_card(self) -> SparsityCard:
        """What kind of sparsity this is."""
        return SparsityCard(
            stage="before" if self.fix else "during",
            regime="sparse_to_sparse",
            mask="static" if self.fix else "dynamic",
            backward_dense=not self.fix and self.growth == "momentum",
            optimizer_dense=not self.mask_optimizer_state,
            layerwise="uniform" if self.start == "uniform" else "global",
            criterion="gradient" if not self.fix and self.growth == "gradient" else "random" if self.start == "uniform" else "magnitude",
            cost="static" if self.fix else "rigl" if self.growth == "gradient" else "set",
            update_interval=self.interval,
        )

    # ---- which weights, which masks ----------------------------------------------------------------------------------------------------

    def check(self, trainer: pl.Trainer, pl_module: pl.LightningModule, weights: Mapping[str, nn.Parameter]) -> None:
        """As mask callbacks; embeddings with sparse gradients are refused, too."""
        super().check(trainer, pl_module, weights)
        chosen = {id(weight) for weight in weights.values()}
        for name, module in pl_module.named_modules():
            if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse and id(module.weight) in chosen:
                raise ValueError(f"{name!r} has sparse gradients, and DSL grows by dense ones: build the embedding with sparse=False")

    def candidates(self, pl_module: nn.Module) -> Choice:
        """The weights that targets and skip mean; vectors too with ``include_vectors``."""
        choice = super().candidates(pl_module)
        if not self.include_vectors:
            return choice
        owners = {name.rpartition(".")[0] for name in choice.weights}
        if self.targets:
            owners |= set(select_modules(pl_module, self.targets)) - set(select_modules(pl_module, self.skip) if self.skip else ())
        named = plain_modules(pl_module)
        found: dict[str, nn.Parameter] = {}
        for owner in (name for name in named if name in owners):
            for own, parameter in named[owner].named_parameters(recurse=False):
                if not any(parameter is other for other in found.values()):
                    found[f"{owner}.{own}" if owner else own] = parameter
        return Choice({name: weight for name, weight in found.items() if name not in choice.left}, choice.left)

    def begin_fit(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Settle the schedule's end."""
        if not self.fix:
            self._length = remaining_steps(pl_module, self.total_steps)
        self._module, self._optimizers = pl_module, list(trainer.optimizers)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make, keep or restore the masks."""
        super().on_fit_start(trainer, pl_module)
        self._logged = {"dsl/survival": 1.0} | self._shares()

    def initial_masks(self, trainer: pl.Trainer, pl_module: pl.LightningModule, weights: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        """Random, or by magnitude over all tensors.

        Raises:
            ValueError: A tensor is so small that it would keep less than one weight.
        """
        layer_density([weight.shape for weight in weights.values()], self.density, "uniform", names=list(weights))
        if self.start == "lottery_ticket":
            return global_magnitude_masks(dict(weights), self.density)
        return {name: random_mask(weight.shape, self.density, self.generator) for name, weight in weights.items()}

    # ---- updates -----------------------------------------------------------------------------------------------------------------------

    def ratio(self, step: int) -> float:
        """Share of the active weights that an update after optimiser step ``step`` prunes."""
        return update_ratio(step, self._length, self.initial_ratio, self.min_ratio)

    def is_update(self, step: int) -> bool:
        """Whether masks change after optimiser step ``step``, counted from 1."""
        return not self.fix and step > 0 and step % self.interval == 0

    def wants_gradients(self, step: int) -> bool:
        """By gradient growth and by Taylor pruning, on update steps."""
        return self.is_update(step) and (self.growth == "gradient" or self.death == "taylor")

    def after_step(self, step: int, names: list[str], gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Prune and grow in every tensor, and count what survived."""
        changed = super().after_step(step, names, gradients)
        if changed:
            before = sum(int(self.store.masks[name].sum()) for name in changed)
            after = sum(int((self.store.masks[name] & mask).sum()) for name, mask in changed.items())
            self._logged["dsl/survival"] = after / before if before else 1.0
        return changed

    def moved(self, name: str, step: int, gradient: Tensor | None) -> Tensor | None:
        """Prune and grow; not without a gradient that is needed."""
        weight, mask = self.store.weights[name], self.store.masks[name]
        uniform = torch.rand(weight.shape, generator=self.generator).to(weight.device)
        if gradient is None and self.wants_gradients(step):
            return None
        score = uniform
        if self.growth == "gradient" and gradient is not None:
            score = gradient.abs()
        elif self.growth == "momentum":
            score = self._momentum(name, weight)
        elif self.growth == "random_unfired":
            score = uniform + (~self.history.ever[name]).to(uniform)
        return update_mask(weight, mask, score, self.ratio(step), uniform, self.death, gradient, self.death_threshold)[0]

    def _momentum(self, name: str, weight: nn.Parameter) -> Tensor:
        state: dict[str, Any] = next((optimizer.state[weight] for optimizer in self._optimizers if weight in optimizer.state), {})
        if "exp_avg" in state and "exp_avg_sq" in state:
            return (state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-8)).abs()
        if isinstance(state.get("momentum_buffer"), Tensor):
            return state["momentum_buffer"].abs()
        raise ValueError(f"growth='momentum' finds no moments of {name!r} in the optimiser: use Adam, AdamW or SGD with momentum")

    # ---- what is shown and saved -------------------------------------------------------------------------------------------------------

    def _shares(self) -> dict[str, float]:
        return {"dsl/density": self.store.density(), "dsl/itop": itop_rate(self.history.ever)[0]}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log; the counts are taken anew only when masks have changed."""
        if self.store.version != self._told:
            self._logged |= self._shares()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        ratio = {} if self.fix else {"dsl/ratio": self.ratio(max(self._steps, default=0))}
        pl_module.log_dict(self._logged | ratio, batch_size=1)

    def dashboard_media(self) -> dict[str, Media]:
        """Active entries per row; density by popularity where the module knows ``row_popularity()``."""
        matrices = {name: mask for name, mask in self.sparsity_masks().items() if mask.ndim >= 2}
        if not matrices:
            return {}
        rows = torch.cat([mask.flatten(1).sum(dim=1) for mask in matrices.values()]).cpu().numpy()
        counts, edges = np.histogram(rows, bins=np.arange(rows.max() + 2) - 0.5 if rows.max() < 100 else 50)
        media: dict[str, Media] = {"dsl/active_per_row": HistogramMedia(counts, edges)}
        known = getattr(self._module, "row_popularity", None)
        if callable(known):
            table = [
                (kind, group + 1, round(float(seen), 1), round(float(share), 4), round(float(share) * matrices[name].shape[1], 2))
                for name, kinds in known().items()
                if name in matrices
                for kind, (span, popularity) in kinds.items()
                for group, (seen, share) in enumerate(density_by_popularity(matrices[name][span], popularity))
            ]
            columns = ("rows", "group", "mean interactions", "density", "mean active dimensions")
            media["dsl/groups"] = TableMedia(columns, tuple(table))
        return media


def density_by_popularity(mask: Tensor, popularity: Tensor, groups: int = _GROUPS) -> list[tuple[float, float]]:
    """Rows in equal groups from rare to popular: (mean popularity, share of active entries) of each.

    Args:
        mask: (rows, D) bool.
        popularity: (rows,) interactions of each row.
        groups: At most so many; no group is empty.
    """
    order = popularity.to(mask.device).argsort(stable=True)
    share, seen = mask.float().mean(dim=1)[order], popularity.to(mask.device).float()[order]
    parts = zip(seen.tensor_split(min(groups, len(order))), share.tensor_split(min(groups, len(order))), strict=True)
    return [(float(a.mean()), float(b.mean())) for a, b in parts]


__all__ = ["DSL", "density_by_popularity", "global_magnitude_masks", "prune", "regrow", "update_mask", "update_ratio"]
