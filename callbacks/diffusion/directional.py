"""Directional distribution consistency of DDC (arXiv:2309.03729) for any module with a generator."""

from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor

from lit_methods.callbacks.batch import Key, find_in_batch
from lit_methods.callbacks.features import one_of_calls
from lit_methods.callbacks.loss_term import LossTerm
from lit_methods.checks import at_least
from lit_methods.diffusion.ddc_fewshot.consistency import FeatureConsistency, fit_banks
from lit_methods.panels import Curve, Panel


class DirectionalConsistency(LossTerm):
    """Adds DDC, or a baseline of it, between what a generator makes and what it was made from to the loss of any module.

    Mean over the batch of ``consistency(features of generated, features of source)``; with ``DirectionalDistributionConsistency`` the mean
    square of f_G - (f_A + d), d the direction between the mean features of both domains.

    Runs: around ``training_step``, on what ``generator`` puts out there; a generator that is called several times with as many samples each
    is compared at each call. The means are found at the start of fit over all ranks, from the datamodule's ``banks()``, unless ``fit`` of
    ``consistency`` or its files gave them. For modules with manual optimisation, such as most GANs, call ``consistency`` in the step.
    Saves: the means.
    Refuses: what a :class:`LossTerm` refuses; outputs that aren't a tensor with a row for each source sample; a datamodule without
    ``banks()`` where the means are needed.

    Args:
        generator: Name or ``fnmatch`` pattern of the submodule; it must match one.
        consistency: ``DirectionalDistributionConsistency``, ``DirectionalCosine`` or ``PairwiseSimilarity``.
        source: Key or position of the source samples in the batch; None: ``source`` of a dictionary, 0 of a sequence.
        weight: Factor of the term, >= 0.

    Raises:
        ValueError: The weight is negative.
    """

    name = "directional_consistency"
    panels: ClassVar[tuple[Panel, ...]] = (
        Curve("Consistency with the source", ("directional_consistency/loss",), note="Before its factor.", goal="min"),
    )

    def __init__(self, generator: str, consistency: FeatureConsistency, source: Key = None, weight: float = 1.0) -> None:
        at_least(0, weight=weight)
        super().__init__([generator], weight)
        self.consistency, self.source = consistency, source

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Follow the module to its device."""
        self.consistency.to(pl_module.device)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the mean features of both domains."""
        fit_banks(trainer, self.consistency, None, pl_module.device)

    def term(self, inputs: dict[str, Any]) -> Tensor:
        """Mean over the batch.

        Raises:
            ValueError: Generated and source samples don't fit.
        """
        calls = inputs["feature_calls"]
        name = one_of_calls(calls, self.targets[0], "generator")
        source = find_in_batch(inputs["batch"], self.source, ("source", 0), "source", "DirectionalConsistency needs the source samples")
        with torch.no_grad():
            wanted = self.consistency.embed(source)
        losses = []
        for made in calls[name]:
            if not isinstance(made, Tensor) or made.ndim < 2 or len(made) != len(source):
                got = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
                raise ValueError(
                    f"generator={name!r} puts out {got} for {len(source)} source samples: expected a tensor with a row for each"
                )
            losses.append(self.consistency(self.consistency.embed(made), wanted).mean())
        return torch.stack(losses).mean()

    def state_dict(self) -> dict[str, Any]:
        """The means."""
        return self.consistency.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them over."""
        self.consistency.load_state_dict(state_dict)


__all__ = ["DirectionalConsistency"]
