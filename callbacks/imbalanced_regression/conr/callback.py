"""ConR as a Callback: a contrastive regulariser for regression with skewed labels, attached to any module with features.

The maths and its golden vectors: :mod:`lit_methods.callbacks.imbalanced_regression.conr.core`.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lit_methods.callbacks.batch import Key, find_in_batch, rows_of, values_of_batch
from lit_methods.callbacks.imbalanced_regression.conr.core import conr_dense_loss, conr_loss
from lit_methods.callbacks.loss_term import LossTerm
from lit_methods.catalog import Technique
from lit_methods.checks import at_least, one_of, patterns, positive
from lit_methods.panels import Curve, Panel

TECHNIQUE = Technique(
    slug="conr",
    title="ConR: Contrastive Regularizer for Deep Imbalanced Regression",
    arxiv="2309.06651",
    family="imbalanced_regression",
    form="callback",
    classes=(
        "lit_methods.callbacks.ConR",
        "lit_methods.callbacks.FDS",
        "lit_methods.ImbalancedRegression",
        "lit_methods.ShotMetrics",
    ),
    configs=("conr.yaml", "lds_fds.yaml"),
    golden=("loss", "loss_dense", "lds_weights", "fds", "shot_metrics"),
    claim="On noisy bars with skewed angles, ConR lowers the mean absolute error of few-shot labels, against the same L1 regression "
    "without it.",
    summary="Pulls features of near labels together and pushes those apart whose labels are far but whose predictions are near.",
)

Variant = Literal["scalar", "dense"]


class ConR(LossTerm):
    """Adds the contrastive regulariser to the loss of any regression module.

    For an anchor i with near labels N_i it is s_i times the mean over j in N_i of -log(exp(S_ij) / D_i): S are cosines over the
    temperature, D_i holds the near ones and, weighted by s_i exp(eta |y_i - y_j|), those whose label is far but whose prediction is near.

    Runs: around ``training_step``. With ``views`` these parts of the batch are sent, one behind the other, through the module's ``forward``
    once more, and what comes out is contrasted; the module's own loss sees its own input (the authors forward three views: one for the
    loss, two for ConR). Without ``views`` the features and predictions of the step itself are taken, and an anchor without a near label in
    the batch adds nothing. Pairs are those of each rank, as in the authors' code, unless ``gather_ranks``.
    Saves: nothing.
    Refuses: with ``views``, modules without ``forward``; submodules that don't put out a row for each sample. Samples with several numbers
    (pixels) count by their mean.

    Args:
        features: Name or ``fnmatch`` pattern of the submodule before the regressor; it must match one.
        predictions: Name or pattern of the regressor.
        labels: Key or position of the labels in the batch; None: ``target`` of a dictionary, 1 of a sequence.
        weights: Key or position of the samples' weights; None: 1 for each. ``AgeDataModule`` and its like give ``weight``.
        views: Keys or positions of the views that are forwarded for the term; none: those of ``training_step``.
        variant: ``scalar``, or ``dense`` for a target at each pixel.
        window: Largest distance of near labels and predictions, in their unit; the authors: 1 (years), 0.2 (metres, ``dense``).
        temperature: Divides the cosines.
        eta: Growth of the push; the authors: 0.01, and 0.2 for ``dense``.
        strict: Leave out the ones that the authors' code adds to the denominator.
        gather_ranks: Pairs of all ranks, with gradient.
        weight: Factor of the term, beta; the authors: 4, and 0.2 for ``dense``.

    Raises:
        ValueError: A value lies outside its range.
    """

    name = "conr"
    panels: ClassVar[tuple[Panel, ...]] = (
        Curve("ConR", ("conr/loss",), goal="min"),
        Curve("Anchors that count", ("conr/anchors",), note="Share with a negative and a positive. 0: the term does nothing."),
        Curve("Pairs of an anchor", ("conr/negatives", "conr/positives"), note="Negatives are confusions: far labels, near predictions."),
    )

    def __init__(
        self,
        features: str = "backbone",
        predictions: str = "regressor",
        labels: Key = None,
        weights: Key = None,
        views: Sequence[str | int] = (),
        variant: Variant = "scalar",
        window: float = 1.0,
        temperature: float = 0.07,
        eta: float = 0.01,
        strict: bool = False,
        gather_ranks: bool = False,
        weight: float = 4.0,
    ) -> None:
        one_of(Variant, variant=variant)
        at_least(0, window=window, eta=eta)
        positive(temperature=temperature)
        patterns(views=views)
        super().__init__([features, predictions], weight)
        self.labels, self.weights = labels, weights
        self.views, self.variant, self.window, self.temperature = tuple(views), variant, window, temperature
        self.eta, self.strict, self.gather_ranks = eta, strict, gather_ranks

    def term(self, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The contrast of the batch.

        Raises:
            ValueError: A pattern matches several submodules, or the batch lacks something.
        """
        batch, calls = inputs["batch"], inputs["feature_calls"]
        if self.views:
            views = torch.cat([find_in_batch(batch, view, ("", 0), "views") for view in self.views])
            calls = self.run_again(views, inputs["module"]).feature_calls
        z, guess = rows_of(calls, self.targets[0], "features"), rows_of(calls, self.targets[1], "predictions")
        if len(guess) != len(z):
            raise ValueError(f"{self.targets[0]!r} put out {len(z)} rows and {self.targets[1]!r} {len(guess)}: give one of each a sample")
        guess = guess.detach().to(torch.promote_types(guess.dtype, torch.float32)).mean(dim=1, keepdim=True)
        y = values_of_batch(batch, self.labels, ("target", 1), len(z), "labels", mean=True)
        s = None if self.weights is None else values_of_batch(batch, self.weights, ("weight", 2), len(z), "weights", mean=True)
        if self.gather_ranks:
            z, y, guess = self.gather(z), self.gather(y), self.gather(guess)
            s = None if s is None else self.gather(s)
        loss = conr_loss if self.variant == "scalar" else conr_dense_loss
        contrast = loss(z, y, guess, s, self.window, self.temperature, self.eta, self.strict)
        counted = (contrast.negatives > 0) & (contrast.positives > 0)
        counts = {"anchors": counted, "negatives": contrast.negatives, "positives": contrast.positives}
        return contrast.loss, {name: count.float().mean() for name, count in counts.items()}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Hook into the module.

        Raises:
            TypeError: ``views`` are given and the module has no ``forward``.
            ValueError: The module optimises manually, or a pattern matches nothing.
        """
        if stage == "fit" and self.views and not is_overridden("forward", pl_module, pl.LightningModule):
            raise TypeError(
                f"ConR sends views={list(self.views)} through forward, and {type(pl_module).__name__} has none: define forward(view), "
                "or set views=[] to use the features of training_step"
            )
        super().setup(trainer, pl_module, stage)


__all__ = ["ConR"]
