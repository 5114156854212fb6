"""Training stages of DLoRAL (arXiv:2506.15591) for any module: parameters that learn in turn, and the data of the stage."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn

from lit_methods import checks
from lit_methods.callbacks.ordering import OrderedCallback
from lit_methods.callbacks.targets import plain_parameters, refuse_sharded
from lit_methods.panels import Curve, Panel
from lit_methods.restoration.dloral.core import CONSISTENCY, DETAIL, FixedStage, StageSchedule


class AlternatingLoRAStages(OrderedCallback):
    """Lets two groups of parameters learn in turn: those of a consistency stage, then those of a detail stage, and so on.

    What belongs to neither list is left alone; what belongs to both learns in both stages. The stage follows from ``trainer.global_step``
    alone: ``schedule.at(step)``. A parameter that rests has ``requires_grad`` False and no gradient, so that AdamW doesn't touch it, not
    even by weight decay.

    Runs: before each training batch; after each step the datamodule's ``set_stage(stage)``, if it has one, hears which data the next batch
    is to be of. Logs stage and factors. Parameters are in the optimiser from the start, and get their ``requires_grad`` back after fit.
    Under DDP it asks for ``find_unused_parameters``, since what rests has no gradient to wait for.

    Saves: nothing: the stage follows from the step.

    Refuses: strategies that shard weights; a pattern that matches no parameter; a module without ``schedule``, unless one is given;
    optimisers that lack a parameter of a stage.

    Args:
        consistency: ``fnmatch`` patterns on names of parameters that learn in stage 0.
        detail: Those that learn in stage 1.
        schedule: Stages and factors; None: the module's ``schedule``.

    Raises:
        ValueError: A list is empty, or a single string.
    """

    conflicts_with: ClassVar[Mapping[str, str]] = {
        "SubsetCallback": "each freezes what the other one trains",
        "LoRA": "each freezes what the other one trains",
    }
    panels: ClassVar[tuple[Panel, ...]] = (
        Curve("Stage", ("dloral/stage",), note="0: consistency; 1: detail; 2: both, a baseline."),
        Curve("Factors", ("dloral/lambda_lpips", "dloral/lambda_csd", "dloral/lambda_consistency"), note="Linear behind a switch."),
    )

    def __init__(
        self,
        consistency: Sequence[str] = ("*.lora_?.consistency.*", "retrieval.*", "*.widened.*"),
        detail: Sequence[str] = ("*.lora_?.quality.*", "*.widened.*"),
        schedule: StageSchedule | FixedStage | None = None,
    ) -> None:
        super().__init__()
        checks.patterns(consistency=consistency, detail=detail)
        if not consistency or not detail:
            raise ValueError("consistency and detail both need patterns, such as ['*.lora_A.consistency.*']")
        self.consistency, self.detail, self.schedule = tuple(consistency), tuple(detail), schedule
        self._groups: list[tuple[nn.Parameter, bool, bool, bool]] = []  # parameter, learns in 0, in 1, required a gradient before
        self._stage: int | None = None

    # ---- a fit -----------------------------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find the parameters, which all learn until the first batch: DDP then knows of every one.

        Raises:
            ValueError: A strategy that shards weights, a pattern that matches nothing, or no schedule.
        """
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        refuse_sharded(trainer, "AlternatingLoRAStages")
        self.leave(trainer, pl_module)
        self._plan(pl_module)
        if isinstance(trainer.strategy, DDPStrategy):
            trainer.strategy._ddp_kwargs["find_unused_parameters"] = True
        self.when_built(pl_module, lambda: self._find(pl_module))

    def _plan(self, pl_module: pl.LightningModule) -> StageSchedule | FixedStage:
        plan = getattr(pl_module, "schedule", None) if self.schedule is None else self.schedule
        if not callable(getattr(plan, "at", None)):
            raise ValueError(
                f"AlternatingLoRAStages: {type(pl_module).__name__} has no schedule with at(step): give schedule=StageSchedule(...)"
            )
        return plan  # type: ignore[return-value]

    def _find(self, pl_module: pl.LightningModule) -> None:
        parameters = plain_parameters(pl_module)
        for stage, patterns in (("consistency", self.consistency), ("detail", self.detail)):
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name in parameters):
                    some = ", ".join(list(parameters)[:6]) or "none"
                    raise ValueError(
                        f"AlternatingLoRAStages: {stage} has {pattern!r}, which matches no parameter of {type(pl_module).__name__}; it "
                        f"has {some}, ..."
                    )
        for name, parameter in parameters.items():
            first, second = (any(fnmatchcase(name, pattern) for pattern in patterns) for patterns in (self.consistency, self.detail))
            if first or second:
                self._groups.append((parameter, first, second, parameter.requires_grad))
                parameter.requires_grad_(True)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin with the stage of the step that a resume goes on with.

        Raises:
            ValueError: The optimisers lack a parameter that a stage trains.
        """
        held = {id(parameter) for optimizer in trainer.optimizers for group in optimizer.param_groups for parameter in group["params"]}
        if missing := sum(id(parameter) not in held for parameter, *_ in self._groups):
            raise ValueError(
                f"AlternatingLoRAStages: {missing} of {len(self._groups)} parameters are in no optimiser: give configure_optimizers all "
                "that either stage trains, also those that begin at rest"
            )
        count = [sum(p.numel() for p, *flags in self._groups if flags[stage]) for stage in (CONSISTENCY, DETAIL)]
        rank_zero_info(f"AlternatingLoRAStages: consistency trains {count[0]:,} values, detail {count[1]:,}")
        self._announce(trainer, pl_module)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Switch, where the stage has changed."""
        weights = self._plan(pl_module).at(trainer.global_step)
        if weights.stage != self._stage:
            self._stage = weights.stage
            for parameter, first, second, _ in self._groups:
                learns = {CONSISTENCY: first, DETAIL: second}.get(weights.stage, True)
                parameter.requires_grad_(learns)
                if not learns:
                    parameter.grad = None  # AdamW passes over it, its weight decay included
        factors = {f"dloral/lambda_{name}": getattr(weights, name) for name in ("l2", "lpips", "csd", "consistency")}
        pl_module.log_dict({"dloral/stage": float(weights.stage), **factors}, batch_size=1)  # steps that take dataloader_iter must say it

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Say which data the next batch is to be of."""
        self._announce(trainer, pl_module)

    def _announce(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        set_stage = getattr(trainer.datamodule, "set_stage", None)  # type: ignore[attr-defined]
        if callable(set_stage):
            set_stage(self._plan(pl_module).at(trainer.global_step).stage)

    def leave(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """All parameters learn again that did before."""
        for parameter, _, _, before in self._groups:
            parameter.requires_grad_(before)
        self._groups, self._stage = [], None


__all__ = ["AlternatingLoRAStages"]
