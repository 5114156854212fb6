"""Noisy targets that fade into exact ones, for any module with queries, targets and a loss of both (arXiv:2211.07394)."""

from collections.abc import Mapping
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor

from lit_methods import checks
from lit_methods.callbacks.batch import rows_of
from lit_methods.callbacks.features import one_of_calls
from lit_methods.callbacks.loss_term import LossTerm
from lit_methods.panels import Curve, Panel
from lit_methods.retrieval.cir_uncertainty.core import augment_targets, coarse_weight, on_sphere, uncertainty_loss
from lit_methods.retrieval.cir_uncertainty.schedule import CoarseSchedule, planned_progress
from lit_methods.seeds import seeded_noise


class UncertaintyRegularizer(LossTerm):
    """Replaces the module's loss L by gamma L_u + (1 - gamma) L: coarse targets first, the module's own loss later.

    L_u = (exp(-s) InfoNCE(q, t') + s) / 2 with t' = alpha (t - mean) / std + beta: the target features t under noise of their own
    statistics, alpha ~ N(1, std), beta ~ N(mean, std), and s the deviation of all of t'. gamma = exp(-gamma_0 epoch / epochs).

    Runs: as :class:`LossTerm`, on what two submodules put out in ``training_step``; no second pass is made. Rows of all ranks are compared,
    with gradient. The module's loss is what ``training_step`` returned, the terms of callbacks before this one included.

    Saves: nothing; gamma and the noise follow from epoch, step and batch.

    Refuses: what :class:`LossTerm` refuses; queries and targets of different shapes; one call of a submodule for both; a training without
    an end.

    Args:
        query: ``fnmatch`` pattern of the submodule that puts out queries (B, D), in the order of the targets; it must match one.
        target: That of the targets (B, D); it may be the same, called twice.
        query_call: Which of the calls in a step gives the queries, from 0; -1: the last.
        target_call: The same for the targets.
        norm_scale: Both are brought to this length first, so that logits are its square times the cosine; None: taken as they are.
        alpha_scale: Factor of alpha.
        beta_scale: Factor of beta.
        gamma_0: How fast gamma falls from 1.
        schedule: gamma changes once per ``epoch``, or at each ``step``.
        seed: Seed of the noise.

    Raises:
        ValueError: A value outside its range, or the same call for both.

    Example:
        ``UncertaintyRegularizer(query="projector", target="projector", query_call=0, target_call=1)`` for a module that projects two views.
    """

    name = "uncertainty"
    replaces = True
    panels: ClassVar[tuple[Panel, ...]] = (
        Curve(
            "Loss under uncertainty", ("uncertainty/loss", "uncertainty/own"), note="The weighted sum, and the module's own.", goal="min"
        ),
        Curve("Uncertainty loss", ("uncertainty/uncertainty",), note="L_u before its weight."),
        Curve("Weight of the uncertainty loss", ("uncertainty/gamma",)),
        Curve("Spread of the noisy targets", ("uncertainty/spread",), note="s; near 1, as each target is standardised."),
    )

    def __init__(
        self,
        query: str,
        target: str,
        query_call: int = -1,
        target_call: int = -1,
        norm_scale: float | None = 4.0,
        alpha_scale: float = 1.0,
        beta_scale: float = 1.0,
        gamma_0: float = 1.0,
        schedule: CoarseSchedule = "epoch",
        seed: int = 0,
    ) -> None:
        checks.literals(UncertaintyRegularizer, locals())
        checks.positive(norm_scale=norm_scale)
        checks.at_least(0, alpha_scale=alpha_scale, beta_scale=beta_scale, gamma_0=gamma_0, seed=seed)
        checks.at_least(-1, "a call", query_call=query_call, target_call=target_call)
        if (query, query_call) == (target, target_call):
            raise ValueError(
                f"query and target are both call {query_call} of {query!r}: name two submodules, or set query_call=0 and target_call=1 for "
                "one that is called twice"
            )
        super().__init__([query] if query == target else [query, target])
        self.query, self.target, self.query_call, self.target_call = query, target, query_call, target_call
        self.norm_scale, self.alpha_scale, self.beta_scale = norm_scale, alpha_scale, beta_scale
        self.gamma_0, self.schedule, self.seed = gamma_0, schedule, seed
        self._planned: int | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ask how long the training is; not earlier, as a resumed loader would be made before it is told its place."""
        with checks.naming(type(self).__name__):
            self._planned = planned_progress(pl_module, self.schedule)

    def _rows(self, inputs: dict[str, Any], pattern: str, call: int, argument: str) -> Tensor:
        name = one_of_calls(inputs["feature_calls"], pattern, argument)
        calls = inputs["feature_calls"][name]
        if call >= len(calls):
            raise ValueError(f"{argument}_call is {call}, and {name} was called {len(calls)} times in the step: count from 0")
        rows = rows_of({name: [calls[call]]}, name, argument)
        return rows if self.norm_scale is None else on_sphere(rows, self.norm_scale)

    def term(self, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The whole loss.

        Raises:
            ValueError: Queries and targets don't fit together.
        """
        queries, targets = (
            self._rows(inputs, *which) for which in ((self.query, self.query_call, "query"), (self.target, self.target_call, "target"))
        )
        if queries.shape != targets.shape:
            raise ValueError(f"queries are {tuple(queries.shape)} and targets {tuple(targets.shape)}: expected one target a query, (B, D)")
        queries, targets = self.gather(queries), self.gather(targets)
        step = inputs["step"]
        assert self._planned is not None
        gamma = coarse_weight((step if self.schedule == "step" else inputs["epoch"]) / self._planned, self.gamma_0)
        place = f"uncertainty step {step} batch {inputs['batch_idx']}"
        alpha, beta = (seeded_noise(f"{place} {part}", self.seed, targets) for part in ("alpha", "beta"))
        augmented = augment_targets(targets, alpha, beta, self.alpha_scale, self.beta_scale).features
        found = uncertainty_loss(queries, targets, augmented, gamma)
        output = inputs["output"]
        own = output["loss"] if isinstance(output, Mapping) else output
        logs = {"own": own, "uncertainty": found.uncertainty, "spread": found.spread, "gamma": torch.tensor(gamma)}
        return gamma * found.uncertainty + (1 - gamma) * own, logs


__all__ = ["UncertaintyRegularizer"]
