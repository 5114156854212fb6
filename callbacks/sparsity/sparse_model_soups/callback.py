"""Iterative magnitude pruning as a callback; ``lit soup`` runs its phases with several candidates and averages them.

Maths, paper and origin: :mod:`~lit_methods.callbacks.sparsity.sparse_model_soups.core`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from lit_methods import checks
from lit_methods.callbacks.sparsity.callback import MaskCallback
from lit_methods.callbacks.sparsity.card import SparsityCard
from lit_methods.callbacks.sparsity.sparse_model_soups.core import (
    Schedule,
    Selector,
    nominal_sparsity,
    phase_fraction,
    pruned_masks,
    relative_norm_drop,
    retrain_rates,
)
from lit_methods.catalog import Technique
from lit_methods.panels import Curve, Panel
from lit_methods.runs.checkpoints import check_readable, load_into
from lit_methods.steps import logs_now, steps_per_epoch

TECHNIQUE = Technique(
    slug="sparse_model_soups",
    title="Sparse Model Soups: A Recipe for Improved Pruning via Model Averaging",
    arxiv="2306.16788",
    family="sparsity",
    form="callback",
    classes=("lit_methods.callbacks.IMP",),
    configs=("sparse_model_soups.yaml",),
    golden=("imp_schedule", "soup", "retrain_lr"),
    claim="At 90 % sparsity, pruning in three phases with three candidates each, averaged after every phase, reaches a higher accuracy "
    "than pruning with one candidate that is retrained three times as long.",
    summary="Prunes in phases; each retrains several copies of the pruned model, which share its mask, and goes on with their average.",
)


class IMP(MaskCallback):
    """Iterative magnitude pruning: removes the smallest of the remaining weights, retrains the rest, and does so again.

    Each of P phases removes the share f = 1 - (1 - s)^(1/P) of what remains, so that s of the weights is gone in the end. A phase begins
    with a fresh momentum and retrains by a learning-rate schedule of its own, made from the rates of the dense training. One run goes
    through dense training and phases, one after the other; ``start`` begins behind what another run or a soup has done. That is how
    ``lit soup`` retrains several candidates of one phase, which share the mask, and averages them: Sparse Model Soups.

    Runs: as :class:`MaskCallback`. The first ``dense_epochs`` train the whole network, and the rates of its optimiser are noted. Then,
    before the first batch of each phase, weights are pruned and the optimiser forgets its state; from there on the rates are set before
    each of its steps, whatever the module's own scheduler says. A run that is longer than the phases keeps masks and last rate; a shorter
    one ends sooner. A second fit goes on with the next phase.

    Saves: what :class:`MaskCallback` saves, the phase and the rates of the dense training.

    Refuses: what :class:`MaskCallback` refuses; several optimisers; a training loader without a length; ``LRW`` for more steps than
    there are dense ones; in ``start``, a checkpoint of another architecture, with masks of other weights, or behind the last phase.

    Args:
        sparsity: Share of the chosen weights that is gone after all phases, in [0, 1).
        phases: Number of phases; 1: all at once.
        retrain_epochs: Epochs of retraining in each phase.
        dense_epochs: Epochs of dense training before the first phase; 0: the module comes trained.
        start: Checkpoint whose weights, masks and phase the run begins with, such as a dense run's or a soup; null: none.
        selector: ``global``: the smallest magnitudes of all weights together; ``uniform``: the same share of each; ``random``: any.
        schedule: Learning rates of a phase: ``FT``, ``LRW``, ``SLR``, ``CLR``, ``LLR`` or ``ALLR``; null: the module's own go on.
        peak: Highest rate of a phase for the schedules but ``FT`` and ``LRW``; null: the highest of the dense training.
        warmup_share: Share of a phase in which the rate rises.
        targets: Patterns of the modules to mask, as ``skip``, ``seed``, ``mask_gradients`` and ``mask_optimizer_state`` in
            :class:`MaskCallback`.

    Raises:
        ValueError: An argument outside its range.
    """

    prefix, stream, on_all_ranks = "sparse_model_soups", "sparse_model_soups", True
    artifact = "sparse_model_soups_masks{where}"
    kept: ClassVar[Mapping[str, str]] = {"phase": "phase", "began": "_began", "next": "_next", "norm_drop": "norm_drop"}
    panels: ClassVar[tuple[Panel, ...]] = (
        Curve("Share of the weights that is gone", ("sparse_model_soups/sparsity",), note="Rises when a phase begins."),
        Curve("Learning rate, dense and in each phase", ("sparse_model_soups/learning_rate",)),
        Curve("Phase", ("sparse_model_soups/phase",), note="0: dense training."),
        Curve(
            "Relative drop of the weights' norm by pruning", ("sparse_model_soups/norm_drop",), note="Of the phase; small: little was lost."
        ),
    )

    def __init__(
        self,
        sparsity: float = 0.9,
        phases: int = 3,
        retrain_epochs: int = 10,
        dense_epochs: int = 0,
        start: str | None = None,
        selector: Selector = "global",
        schedule: Schedule | None = "LLR",
        peak: float | None = None,
        warmup_share: float = 0.1,
        targets: Sequence[str] = (),
        skip: Sequence[str] = (),
        seed: int = 0,
        mask_gradients: bool = True,
        mask_optimizer_state: bool = True,
    ) -> None:
        super().__init__(targets, skip, seed, mask_gradients, mask_optimizer_state)
        self.fraction = phase_fraction(sparsity, phases)
        checks.at_least(1, "epochs", retrain_epochs=retrain_epochs)
        checks.at_least(0, "epochs", dense_epochs=dense_epochs)
        checks.within("[0, 1)", "a share", warmup_share=warmup_share)
        checks.positive(peak=peak)
        checks.literals(IMP, locals())
        if start is not None and dense_epochs:
            raise ValueError(f"start={start!r} begins behind the dense training, but dense_epochs is {dense_epochs}: set it to 0")
        self.sparsity, self.phases, self.retrain_epochs, self.dense_epochs, self.start = (
            sparsity,
            phases,
            retrain_epochs,
            dense_epochs,
            start,
        )
        self.selector, self.schedule, self.peak, self.warmup_share = selector, schedule, peak, warmup_share
        self.phase = 0
        self.norm_drop = 0.0
        self.rates: list[list[float]] = []  # of the dense training: step -> rate of each group of parameters
        self._began = self._next = 0  # optimiser steps of this fit when the phase began, and when the next one will
        self._per_phase = self._dense = 0
        self._sparsity = 0.0
        self._plan = torch.empty(0, 0)  # (steps, groups) rates of the phase

    @property
    def sparsity_card(self) -> SparsityCard:
        """What kind of sparsity this is."""
        return SparsityCard(
            stage="during",
            regime="dense_to_sparse",
            mask="dynamic",
            forward_dense=self.dense_epochs > 0,
            backward_dense=self.dense_epochs > 0,
            layerwise="uniform" if self.selector == "uniform" else "global",
            criterion="random" if self.selector == "random" else "magnitude",
        )

    # ---- before the first step ---------------------------------------------------------------------------------------------------------

    def begin_fit(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Turn epochs into optimiser steps."""
        if len(trainer.optimizers) != 1:
            raise ValueError(
                f"phases count the steps of one optimiser, but {type(pl_module).__name__} has {len(trainer.optimizers)}: "
                "give one, or prune with DynamicSparsity or RandomPruning"
            )
        per_epoch = steps_per_epoch(pl_module, "retrain_epochs")
        self._per_phase, self._dense = self.retrain_epochs * per_epoch, self.dense_epochs * per_epoch
        self._began, self._next = 0, max(0, self._dense - len(self.rates)) if self.phase == 0 else 0

    def initial_masks(self, trainer: pl.Trainer, pl_module: pl.LightningModule, weights: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        """All ones, or those of ``start``."""
        self.phase, self.norm_drop, self.rates, self._next = 0, 0.0, [], self._dense
        if self.start is None:
            return self.store.masks
        load_into(pl_module, self.start)
        callbacks = check_readable(self.start).get("callbacks", {})
        state = callbacks.get(self.state_key)
        if not state:
            others = [key for key in callbacks if key.startswith(f"{type(self).__name__}{{")]
            if others:
                raise ValueError(f"start={self.start!r} was made by {others[0]}: give the same targets and skip")
            return self.store.masks  # a dense model from elsewhere
        self.phase, self.rates = int(state["phase"]), state["rates"].tolist()
        if self.phase >= self.phases:
            raise ValueError(f"start={self.start!r} is behind phase {self.phase}, and phases is {self.phases}: nothing is left to prune")
        if set(state["masks"]) != set(weights):
            odd = ", ".join(sorted(set(state["masks"]) ^ set(weights))[:4])
            raise ValueError(f"start={self.start!r} has masks of other weights ({odd}): give the same targets and skip, and freeze nothing")
        return {name: mask.bool().clone() for name, mask in state["masks"].items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """With the rates of the dense training."""
        super().restore(state)
        self.rates = state["rates"].tolist()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make, keep or restore the masks; know the rates of the dense training, and those of a phase that goes on."""
        super().on_fit_start(trainer, pl_module)
        with checks.naming(type(self).__name__):
            if not self.rates and not self._next:  # trained elsewhere: what the optimiser was made with stands for its training
                self.rates = [[float(group.get("initial_lr", group["lr"])) for group in trainer.optimizers[0].param_groups]]
            if self.schedule == "LRW":
                retrain_rates(torch.zeros(max(len(self.rates), self._dense)), self._per_phase, "LRW")  # refuses what can't be replayed
            if self.phase and self.rates:
                self._plan = self._planned(trainer.optimizers[0])
        self._sparsity = 1.0 - self.store.density()

    # ---- phases ------------------------------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin the next phase where it is due."""
        if self.phase < self.phases and self._steps[0] >= self._next:
            self._begin_phase(trainer.optimizers[0])

    def _begin_phase(self, optimizer: torch.optim.Optimizer) -> None:
        """Prune, and start the retraining afresh."""
        before = {name: weight.detach() for name, weight in self.store.weights.items()}
        masks = pruned_masks(before, self.store.masks, self.fraction, self.selector, self.generator)
        self.norm_drop = float(relative_norm_drop(before, masks))
        self.store.set(masks)
        self.store.apply()
        self.history.note(masks)
        self._check_ranks()
        optimizer.state.clear()
        self.phase, self._began, self._next = self.phase + 1, self._steps[0], self._steps[0] + self._per_phase
        self._plan = self._planned(optimizer)
        self._sparsity = 1.0 - self.store.density()
        nominal = nominal_sparsity(self.sparsity, self.phases)[self.phase - 1]
        rank_zero_info(
            f"{type(self).__name__}: phase {self.phase} of {self.phases} begins, {self._sparsity:.2%} pruned ({nominal:.2%} meant)"
        )

    def _planned(self, optimizer: torch.optim.Optimizer) -> Tensor:
        """(steps, groups) learning rates of the phase."""
        if self.schedule is None:
            return torch.empty(0, 0)
        groups = torch.tensor(self.rates, dtype=torch.float64).T
        if len(groups) != len(optimizer.param_groups):
            raise ValueError(
                f"the dense training had {len(groups)} groups of parameters, this optimiser has {len(optimizer.param_groups)}: "
                "configure the same, or give schedule=None"
            )
        highest = float(groups.max())
        return torch.stack(
            [
                retrain_rates(
                    history,
                    self._per_phase,
                    self.schedule,
                    original_warmup=int(history.argmax()),  # a rise to the first highest rate
                    norm_drop=self.norm_drop,
                    fraction=self.fraction or 1.0,
                    peak=None if self.peak is None else self.peak * float(history.max()) / (highest or 1.0),  # groups keep their ratio
                    warmup_share=self.warmup_share,
                )
                for history in groups
            ],
            dim=1,
        )

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        """Set the phase's rate; mask gradients."""
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if self.phase and len(self._plan):
            rates = self._plan[min(self._steps[0] - self._began, len(self._plan) - 1)].tolist()
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate
        self._rate = [group["lr"] for group in optimizer.param_groups]

    def after_step(self, step: int, names: list[str], gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Note the rates of the dense training; masks change before a batch, not here."""
        if self.phase == 0:
            self.rates.append([float(rate) for rate in self._rate])
        return {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log where the run is."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if logs_now(pl_module) and self._rate:
            figures = {"sparsity": self._sparsity, "phase": float(self.phase), "learning_rate": float(self._rate[0])}
            self.log_step(pl_module, figures | ({"norm_drop": self.norm_drop} if self.phase else {}))

    _rate: Sequence[Any] = ()  # of the last step

    def state_dict(self) -> dict[str, Any]:
        """With the rates of the dense training, (steps, groups) float64."""
        state = super().state_dict()
        return state | {"rates": torch.tensor(self.rates, dtype=torch.float64)} if state else state
