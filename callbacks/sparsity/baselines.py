"""The one-shot baselines of post-training pruning as callbacks: magnitude, Wanda and SparseGPT."""

from collections.abc import Sequence

from torch import Tensor

from lit_methods.arguments import handed_on
from lit_methods.callbacks.sparsity.input_statistics import InputStatistics
from lit_methods.callbacks.sparsity.one_shot import magnitude_mask, sparsegpt, wanda_mask
from lit_methods.callbacks.sparsity.post_training import PostTrainingPruning, Pruned


class Magnitude(PostTrainingPruning):
    """Prunes the smallest weights of each linear layer, by one threshold per layer, or the smallest of each N:M group.

    Runs, Saves, Refuses: as :class:`PostTrainingPruning`; needs no calibration data, which only measure the expected error here.

    Args:
        sparsity: Share of each layer that goes, in (0, 1).
        pattern: ``N:M``: N of every M consecutive inputs go instead; null: unstructured.
        samples: Calibration samples to measure the expected error with; 0: it isn't measured.
        blocks: As in :class:`PostTrainingPruning`, as all further arguments.
        forward: Name of the module's method (batch) that runs the network.
        at_step: Optimiser steps before pruning, in ``fit``.
        targets: Patterns of the layers; empty: every linear layer (of the blocks).
        skip: Patterns of what stays dense.
        mask_gradients: Gradients of pruned weights are 0.
        mask_optimizer_state: Momenta of pruned weights are 0.
    """

    criterion = "magnitude"
    least_samples = 0

    def __init__(
        self,
        sparsity: float = 0.5,
        pattern: str | None = None,
        samples: int = 0,
        blocks: str | None = None,
        forward: str | None = None,
        at_step: int = 0,
        targets: Sequence[str] = (),
        skip: Sequence[str] = (),
        mask_gradients: bool = True,
        mask_optimizer_state: bool = True,
    ) -> None:
        super().__init__(**handed_on(PostTrainingPruning, locals()))

    def prune_layer(self, name: str, weight: Tensor, statistics: InputStatistics | None) -> Pruned:
        """Keep the largest weights."""
        return Pruned(magnitude_mask(weight, self.sparsity, self.pattern))


class Wanda(PostTrainingPruning):
    """Prunes, in each row of each linear layer, the weights with the smallest |W| times the norm of their inputs (arXiv:2306.11695).

    Runs, Saves, Refuses, Args: as :class:`PostTrainingPruning`.
    """

    def prune_layer(self, name: str, weight: Tensor, statistics: InputStatistics | None) -> Pruned:
        """Keep the highest scores of each row."""
        assert statistics is not None
        return Pruned(wanda_mask(weight, statistics.square, self.sparsity, self.pattern))


class SparseGPT(PostTrainingPruning):
    """Prunes the columns of each linear layer from left to right, and moves their error into the weights behind (arXiv:2301.00774).

    Kept weights change, too. Runs, Saves, Refuses, Args: as :class:`PostTrainingPruning`. Each layer's statistics have a (C, C) matrix.
    """

    @property
    def needs_hessian(self) -> bool:
        """Always."""
        return True

    def prune_layer(self, name: str, weight: Tensor, statistics: InputStatistics | None) -> Pruned:
        """New weights; those that are 0 are pruned."""
        assert statistics is not None
        assert statistics.hessian is not None
        new = sparsegpt(weight, statistics.hessian, self.sparsity, self.pattern)
        return Pruned(new != 0, new)
