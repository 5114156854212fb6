"""Base of the callbacks that put sparse attention into a module while it is evaluated."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch

from lit_methods import checks, distributed
from lit_methods.callbacks.ordering import OrderedCallback
from lit_methods.checks import naming
from lit_methods.panels import Curve, Panel
from lit_methods.sparse_attention.attention import PHASES, AttentionSwap, attention_layers
from lit_methods.sparse_attention.blocks import IMPLEMENTATIONS, Implementation
from lit_methods.sparse_attention.method import SparseAttention
from lit_methods.steps import log_global

Stage = Literal["validate", "test", "predict"]


class AttentionCallback(OrderedCallback):
    """Subclass it, and write :meth:`make_method`, which gives the method, and ``prefix``, with which figures begin.

    Runs: from the start of an evaluation to its end the module's attention layers compute what the method chooses; training is dense. At
    the end of validation and test the share of pairs of query and key that wasn't computed is logged, over all ranks, for each place where
    attention was computed.

    Saves: nothing.

    Refuses: modules without attention layers that it could reach; what
    :class:`~lit_methods.sparse_attention.attention.AttentionSwap` refuses.

    Args:
        targets: fnmatch patterns on names of attention layers; None: all but those with a sliding window.
        implementation: ``blocked`` gathers the kept keys and computes these; ``flex`` is FlexAttention, for blocks on a grid; ``dense``
            computes everything under a mask, to compare with; ``auto``: ``flex`` on CUDA where it can, else ``blocked``.
        during: Evaluations in which the method is on.
    """

    prefix: ClassVar[str] = "sparse_attention"
    runs_before: ClassVar[Sequence[str]] = ("Dashboard",)

    def __init__(
        self,
        targets: Sequence[str] | None = None,
        implementation: Implementation = "auto",
        during: Sequence[Stage] = ("validate", "test", "predict"),
    ) -> None:
        super().__init__()
        checks.one_of(IMPLEMENTATIONS, implementation=implementation)
        for stage in during:
            checks.one_of(Stage, during=stage)
        self.targets, self.implementation, self.during = targets, implementation, tuple(during)
        self.swap: AttentionSwap | None = None

    def make_method(self) -> SparseAttention:
        """The method, fresh."""
        raise NotImplementedError

    @classmethod
    def sparsity_curves(cls) -> tuple[Panel, ...]:
        """Panels of what is logged."""
        names = tuple(f"{cls.prefix}/{part}_{phase}_sparsity" for part in ("val", "test") for phase in PHASES)
        return (Curve("Pairs of query and key that aren't computed", names, note="As a share of those of full attention."),)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Look for attention layers.

        Raises:
            ValueError: There are none.
        """
        super().setup(trainer, pl_module, stage)
        self.when_built(pl_module, lambda: self._look(pl_module))

    def _look(self, pl_module: pl.LightningModule) -> None:
        with naming(type(self).__name__):
            attention_layers(pl_module, self.targets)

    def begin(self, pl_module: pl.LightningModule, stage: Stage) -> None:
        """Put the method in, if it is on in ``stage``."""
        self.end()
        if stage in self.during:
            with naming(type(self).__name__):
                self.swap = AttentionSwap(self.make_method(), self.implementation).attach(pl_module, self.targets)

    def end(self) -> None:
        """Take it out; a second call does nothing."""
        if self.swap is not None:
            self.swap.detach()
        self.swap = None

    def sparsities(self) -> dict[str, float]:
        """Place -> 1 - computed / all pairs, over all ranks; to be called on each of them, before :meth:`end`."""
        if self.swap is None:
            return {}
        counts = torch.tensor([[float(self.swap.kept[phase]), self.swap.full[phase]] for phase in PHASES], dtype=torch.float64)
        totals = distributed.sum_over_ranks(counts)
        return {phase: 1 - float(kept / full) for phase, (kept, full) in zip(PHASES, totals, strict=True) if full > 0}

    def log_sparsities(self, pl_module: pl.LightningModule, part: str) -> dict[str, float]:
        """Log :meth:`sparsities`."""
        found = self.sparsities()
        if found:
            log_global(pl_module, {f"{self.prefix}/{part}_{phase}_sparsity": value for phase, value in found.items()})
        return found

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """:meth:`begin`."""
        self.begin(pl_module, "validate")

    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """:meth:`begin`."""
        self.begin(pl_module, "test")

    def on_predict_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """:meth:`begin`."""
        self.begin(pl_module, "predict")

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log, and :meth:`end`."""
        self.log_sparsities(pl_module, "val")
        self.end()

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log, and :meth:`end`."""
        self.log_sparsities(pl_module, "test")
        self.end()

    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """:meth:`end`."""
        self.end()

    def leave(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """:meth:`end`."""
        self.end()

    def __getstate__(self) -> dict[str, Any]:
        """Without the module's layers, for pickling within an evaluation."""
        return {**vars(self), "swap": None}


__all__ = ["AttentionCallback", "Stage"]
