"""DSnoT as a callback.

Maths, paper and origin: :mod:`~lit_methods.callbacks.sparsity.dsnot.core`.
"""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from lit_methods import checks
from lit_methods.arguments import handed_on
from lit_methods.callbacks.sparsity.dsnot.core import dsnot_nm, dsnot_unstructured
from lit_methods.callbacks.sparsity.input_statistics import InputStatistics
from lit_methods.callbacks.sparsity.one_shot import Method, expected_error, initial_score, keep_high_scores
from lit_methods.callbacks.sparsity.post_training import PostTrainingPruning, Pruned, matches
from lit_methods.catalog import Technique
from lit_methods.panels import Curve, Panel

TECHNIQUE = Technique(
    slug="dsnot",
    short="DSnoT",
    title="Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs",
    arxiv="2310.08915",
    family="sparsity",
    form="callback",
    classes=(
        "lit_methods.callbacks.DSnoT",
        "lit_methods.callbacks.Wanda",
        "lit_methods.callbacks.SparseGPT",
        "lit_methods.callbacks.Magnitude",
    ),
    configs=("dsnot.yaml", "dsnot_lm.yaml"),
    golden=("dsnot_unstructured", "dsnot_nm", "baseline_prune"),
    claim="At 60 % sparsity per row, DSnoT cuts the expected error of the pruned layers' outputs to a third of its first mask's (Wanda) or "
    "less.",
    summary="Improves the mask of a pruned network without training: swaps in each row bring the expected error of its output near 0.",
)

TINY = 1e-12
"""Least error that something is divided by."""


class DSnoT(PostTrainingPruning):
    """Prunes the linear layers of a trained network and improves the mask by swaps within rows, without gradients (DSnoT).

    A first mask per row comes from ``initial``. Then, at most ``max_cycles`` times and as long as a row's expected error
    E_r = sum over pruned c of W[r, c] s_c is above ``update_threshold``, a pruned weight whose contribution has the sign of E_r comes back,
    and a kept one of the other sign goes, the cheapest by Wanda's metric. Weights keep their values.

    Runs, Saves, Refuses: as :class:`PostTrainingPruning`.

    Args:
        sparsity: Share of each row that goes, in (0, 1): int(inputs * sparsity) weights.
        pattern: ``N:M``: N of every M consecutive inputs go instead; null: unstructured. The released same-sign test then always applies.
        initial: First mask: ``wanda``, ``magnitude`` (per row, unlike :class:`Magnitude`), or ``sparsegpt`` (its metric on dense weights,
            per row; kept weights aren't changed).
        max_cycles: Swaps per row at most. For narrow layers 1 to 2 % of their inputs.
        update_threshold: Rows with |E| at most this are left alone; E is summed over a sample's tokens.
        variance_power: The larger it is, the less columns with a large variance are regrown.
        require_same_sign: A row stops before E changes its sign. Off as released.
        untuned: Patterns of layers that keep the first mask, such as ``*mlp*``, which is the released default for language models.
        samples: Calibration samples of all ranks together.
        blocks: Name of the list of blocks that are pruned one after the other, as in :class:`PostTrainingPruning`.
        forward: Name of the module's method (batch) that runs the network.
        at_step: Optimiser steps before pruning, in ``fit``.
        targets: Patterns of the layers; empty: every linear layer (of the blocks).
        skip: Patterns of what stays dense.
        mask_gradients: Gradients of pruned weights are 0.
        mask_optimizer_state: Momenta of pruned weights are 0.

    Raises:
        ValueError: A value outside its range.
    """

    panels: ClassVar[tuple[Panel, ...]] = (
        Curve(
            "Expected error per token, first mask and last",
            ("dsnot/error_before", "post_training/expected_error"),
            note="Mean of |E| over rows and layers. Swaps should cut it to a fraction.",
        ),
        Curve("How many times smaller the error became", ("dsnot/error_cut",)),
        Curve("Swaps per row", ("dsnot/swaps_per_row",), note="Near max_cycles: rows were stopped before they were done."),
        *PostTrainingPruning.panels[1:],
    )

    def __init__(
        self,
        sparsity: float = 0.5,
        pattern: str | None = None,
        initial: Method = "wanda",
        max_cycles: int = 50,
        update_threshold: float = 0.1,
        variance_power: float = 1.0,
        require_same_sign: bool = False,
        untuned: Sequence[str] = (),
        samples: int = 128,
        blocks: str | None = None,
        forward: str | None = None,
        at_step: int = 0,
        targets: Sequence[str] = (),
        skip: Sequence[str] = (),
        mask_gradients: bool = True,
        mask_optimizer_state: bool = True,
    ) -> None:
        super().__init__(**handed_on(PostTrainingPruning, locals()))
        checks.one_of(Method, initial=initial)
        checks.at_least(0, "a whole number", max_cycles=max_cycles)
        checks.at_least(0, update_threshold=update_threshold, variance_power=variance_power)
        checks.patterns(untuned=untuned)
        self.initial, self.max_cycles, self.update_threshold = initial, max_cycles, update_threshold
        self.variance_power, self.require_same_sign, self.untuned = variance_power, require_same_sign, list(untuned)

    @property
    def needs_hessian(self) -> bool:
        """For SparseGPT's metric."""
        return self.initial == "sparsegpt"

    def prune_layer(self, name: str, weight: Tensor, statistics: InputStatistics | None) -> Pruned:
        """The first mask, and what swaps make of it."""
        assert statistics is not None
        score = initial_score(self.initial, weight, statistics)
        first = keep = keep_high_scores(score, self.sparsity, self.pattern)
        swaps: Tensor | float = 0.0
        if not matches(name, self.untuned):
            how = (self.max_cycles, self.update_threshold, self.variance_power)
            if self.pattern is None:
                found = dsnot_unstructured(weight, statistics, first, *how, require_same_sign=self.require_same_sign)
            else:
                found = dsnot_nm(weight, statistics, first, score, self.pattern, *how)
            keep, swaps = found.keep, found.swaps.float().mean()
        before = expected_error(weight, weight * first, statistics).abs().mean() * statistics.samples / statistics.tokens
        return Pruned(keep, figures={"error_before": before, "swaps": swaps})

    def figures(self) -> dict[str, float]:
        """With the first masks' errors and the swaps."""
        layers = list(self.report.values())
        if not layers:
            return super().figures()
        before, after, swaps = (sum(layer[key] for layer in layers) / len(layers) for key in ("error_before", "error", "swaps"))
        own = {"dsnot/error_before": before, "dsnot/error_cut": before / max(after, TINY), "dsnot/swaps_per_row": swaps}
        return {**super().figures(), **own}
