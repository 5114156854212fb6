"""Dynamic sparse training: masks that change while the network learns (SET, RigL), on any LightningModule."""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lit_methods import checks
from lit_methods.callbacks.sparsity.callback import MaskCallback
from lit_methods.callbacks.sparsity.card import SparsityCard
from lit_methods.callbacks.sparsity.density import Method, exact_counts, layer_density
from lit_methods.callbacks.sparsity.drop_grow import update_mask
from lit_methods.callbacks.sparsity.masks import keep_largest, random_mask
from lit_methods.callbacks.sparsity.schedules import drop_fraction, drop_schedule
from lit_methods.steps import remaining_steps


class MovingMasks(MaskCallback):
    """Base of the mask callbacks whose masks change after chosen optimiser steps, weight by weight.

    With several optimisers each updates the masks of its own weights, counting its own steps. An update whose gradients aren't finite is
    left out where gradients are needed.
    """

    conflicts_with: ClassVar[Mapping[str, str]] = {
        **MaskCallback.conflicts_with,
        "StochasticWeightAveraging": "the mean of networks with different masks isn't sparse; EMATeacher's copy is masked at each update",
    }

    def is_update(self, step: int) -> bool:
        """Whether masks change after optimiser step ``step``, counted from 1."""
        raise NotImplementedError

    def moved(self, name: str, step: int, gradient: Tensor | None) -> Tensor | None:
        """The new mask of a weight; None leaves the old one.

        Args:
            name: Name of the weight.
            step: Optimiser step just made.
            gradient: Its dense gradient, if one was wanted and it is finite.
        """
        raise NotImplementedError

    def after_step(self, step: int, names: list[str], gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Move the masks, if this is a step for it."""
        if not self.is_update(step):
            return {}
        finite = {name: gradient for name, gradient in gradients.items() if bool(gradient.isfinite().all())}
        moved = {name: self.moved(name, step, finite.get(name)) for name in names}
        return {name: mask for name, mask in moved.items() if mask is not None}


class DynamicSparsity(MovingMasks):
    """Trains a sparse network from the start: every ``interval`` optimiser steps the smallest weights give way to new ones.

    SET (Mocanu et al. 2018) grows at random, RigL (Evci et al., arXiv:1911.11134) where the dense gradient is largest, ``static`` keeps the
    first masks. The update follows the released code of Sparse-IFT (see :mod:`lit_methods.callbacks.sparsity.drop_grow`).

    Runs: as :class:`MovingMasks`. Dense gradients are kept on update steps alone.

    Saves: what :class:`MaskCallback` saves.

    Refuses: what :class:`MaskCallback` refuses, and Lightning's ``StochasticWeightAveraging``.

    Args:
        density: Share of the chosen weights that is active, in (0, 1].
        method: ``static``, ``set`` or ``rigl``.
        distribution: How the density is spread over the layers: ``uniform``, ``er``, ``erk`` or a plus variant of
            :func:`~lit_methods.callbacks.sparsity.density.layer_density`.
        start: First masks: ``random``, each entry by itself; ``random_exact``, the exact count; ``magnitude``, the largest initial weights.
        interval: Optimiser steps between two updates.
        drop_fraction: Share of the active weights that is replaced at the first updates, in [0, 1].
        anneal: ``cosine`` to 0 at the last update, ``constant``, or ``exponential``: times exp(-``rate`` * progress).
        rate: How fast ``exponential`` falls.
        begin: Updates come after this step.
        end_fraction: Updates end before this share of all optimiser steps.
        total_steps: All optimiser steps; None: ``trainer.estimated_stepping_batches``.
        targets: Patterns of the modules to mask, as ``skip``, ``seed``, ``mask_gradients`` and ``mask_optimizer_state`` in
            :class:`MaskCallback`.

    Raises:
        ValueError: An argument outside its range.
    """

    def __init__(
        self,
        density: float,
        method: Literal["static", "set", "rigl"] = "rigl",
        distribution: Method = "erk",
        start: Literal["random", "random_exact", "magnitude"] = "random_exact",
        interval: int = 100,
        drop_fraction: float = 0.3,
        anneal: Literal["cosine", "constant", "exponential"] = "cosine",
        rate: float = 3.0,
        begin: int = 0,
        end_fraction: float = 0.75,
        total_steps: int | None = None,
        targets: Sequence[str] = (),
        skip: Sequence[str] = (),
        seed: int = 0,
        mask_gradients: bool = True,
        mask_optimizer_state: bool = True,
    ) -> None:
        super().__init__(targets, skip, seed, mask_gradients, mask_optimizer_state)
        checks.within("(0, 1]", "a share", density=density)
        checks.share(drop_fraction=drop_fraction, end_fraction=end_fraction)
        checks.at_least(1, "optimiser steps", interval=interval, total_steps=total_steps)
        checks.at_least(0, "optimiser steps", begin=begin)
        checks.at_least(0, rate=rate)
        checks.literals(DynamicSparsity, locals())
        self.density, self.method, self.distribution, self.start = density, method, distribution, start
        self.interval, self.drop_fraction, self.anneal, self.rate = interval, drop_fraction, anneal, rate
        self.begin, self.end_fraction, self.total_steps = begin, end_fraction, total_steps
        self.layer_densities: dict[str, float] = {}
        self.updates: dict[int, float] = {}  # optimiser step after which masks change -> drop fraction
        self._length = 0  # optimiser steps of this fit
        self._counts: dict[str, int] = {}

    @property
    def sparsity_card(self) -> SparsityCard:
        """What kind of sparsity this is."""
        still = self.method == "static"
        return SparsityCard(
            stage="before" if still else "during",
            regime="sparse_to_sparse",
            mask="static" if still else "dynamic",
            layerwise=self.distribution,
            criterion={"static": "magnitude" if self.start == "magnitude" else "random", "set": "other", "rigl": "gradient"}[self.method],
            cost=self.method,
            update_interval=self.interval,
        )

    def begin_fit(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Settle the schedule's end and the layers' densities."""
        if self.method != "static":
            self._length = remaining_steps(pl_module, self.total_steps)
            schedule = (self.interval, self.begin, self.end_fraction, self.drop_fraction, self.anneal, self.rate)
            self.updates = dict(zip(*drop_schedule(self._length, *schedule), strict=True))
        self.layer_densities = self.densities(self.store.weights)
        self._counts = self.counts(self.store.weights)

    def densities(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """Density of each weight."""
        shares = layer_density([weight.shape for weight in weights.values()], self.density, self.distribution, names=list(weights))
        return dict(zip(weights, shares, strict=True))

    def counts(self, weights: Mapping[str, Tensor]) -> dict[str, int]:
        """Active entries of each weight after an update, from ``layer_densities``."""
        sizes = [weight.numel() for weight in weights.values()]
        return dict(zip(weights, exact_counts(sizes, [self.layer_densities[name] for name in weights]), strict=True))

    def initial_masks(self, trainer: pl.Trainer, pl_module: pl.LightningModule, weights: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        """Random or by magnitude, at the layers' densities."""
        if self.start == "random":
            return {name: random_mask(weight.shape, self.layer_densities[name], self.generator) for name, weight in weights.items()}
        drawn = self.start == "random_exact"
        scores = {name: torch.rand(w.shape, generator=self.generator) if drawn else w.abs() for name, w in weights.items()}
        return {name: keep_largest(score, self._counts[name]) for name, score in scores.items()}

    def fraction(self, step: int) -> float:
        """Share of the active weights that an update after ``step`` replaces."""
        end = int(self.end_fraction * self._length)
        return drop_fraction(step, self.anneal, self.drop_fraction, self.begin, end, self.rate) if end > self.begin else 0.0

    def is_update(self, step: int) -> bool:
        """As scheduled."""
        return step in self.updates

    def wants_gradients(self, step: int) -> bool:
        """RigL grows by them."""
        return self.method == "rigl" and step in self.updates

    def moved(self, name: str, step: int, gradient: Tensor | None) -> Tensor | None:
        """Drop and grow."""
        weight, mask = self.store.weights[name], self.store.masks[name]
        if self.method == "set":
            score = torch.rand(weight.shape, generator=self.generator).to(weight.device)
        elif gradient is not None:
            score = gradient.abs()
        else:
            return None
        return update_mask(weight, mask, score, self.updates[step], self._counts[name])
