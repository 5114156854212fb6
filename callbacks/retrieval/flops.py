"""The FLOPS penalty of sparse retrievers, for any module that computes sparse vectors (arXiv:2411.04403)."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lit_methods import checks
from lit_methods.callbacks.batch import rows_of
from lit_methods.callbacks.loss_term import LossTerm
from lit_methods.panels import Curve, Panel
from lit_methods.retrieval.sparse_retriever.core import flops_penalty, quadratic_ramp


class FLOPSRegularizer(LossTerm):
    """Adds lambda_t * sum_j (mean over samples of |w_j|)^2 of chosen outputs to the loss, with lambda_t = lambda ((t + 1) / T)^2 up to T.

    An output that many samples have in the same place costs more than one that few have, so an inverted index of them is cheap to search.

    Runs: as :class:`LossTerm`. The samples of all ranks are gathered, with gradient: the mean comes before the square. Outputs of a target
    that is called several times in a step, such as an encoder of queries and documents, are one batch.

    Saves: nothing; lambda follows from ``trainer.global_step``.

    Refuses: what :class:`LossTerm` refuses; outputs that aren't tensors; numbers of rows that ``docs_per_query`` doesn't divide.

    Args:
        targets: ``fnmatch`` patterns on names of submodules whose output is (N, V), such as ``encoder.head``; others are flattened to it.
        weight: lambda.
        ramp_steps: T, optimiser steps; 0: lambda from the start.
        docs_per_query: Rows that belong together, each with a mean of its own; 1 where the order of rows means nothing.
        l0_threshold: Rows with at most this many values that aren't 0 are left out; None: all count.

    Raises:
        ValueError: A value outside its range.
    """

    name = "flops"
    panels: ClassVar[tuple[Panel, ...]] = (
        Curve("FLOPS penalty", ("flops/loss",), note="Before lambda.", goal="min"),
        Curve("Values that aren't 0", ("flops/length",), note="Of a sample."),
        Curve("Weight of the FLOPS penalty", ("flops/lambda",), note="Rises with the square of the step."),
    )

    def __init__(
        self,
        targets: Sequence[str],
        weight: float = 0.003,
        ramp_steps: int = 200,
        docs_per_query: int = 1,
        l0_threshold: int | None = None,
    ) -> None:
        checks.at_least(0, weight=weight, ramp_steps=ramp_steps, l0_threshold=l0_threshold)
        checks.at_least(1, docs_per_query=docs_per_query)
        super().__init__(targets, weight)
        self.ramp_steps, self.docs_per_query, self.l0_threshold = ramp_steps, docs_per_query, l0_threshold

    def factor(self, step: int) -> float:
        """lambda_t."""
        return quadratic_ramp(step, self.weight, self.ramp_steps)

    def term(self, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of the penalties of the targets."""
        penalties, lengths = [], []
        for target, calls in inputs["feature_calls"].items():
            rows = self.gather(rows_of({target: calls}, target, "targets"))
            penalties.append(flops_penalty(rows, self.docs_per_query, self.l0_threshold))
            lengths.append((rows.detach() != 0).sum(dim=1).float().mean())
        logs = {"length": torch.stack(lengths).mean(), "lambda": torch.tensor(self.factor(inputs["step"]))}
        return torch.stack(penalties).sum(), logs


__all__ = ["FLOPSRegularizer"]
