"""ConR: a contrastive regulariser for regression with skewed labels (arXiv:2309.06651), attached to any module with features.

Golden vectors come from BorealisAI/ConR@ad6a8c9: imdb-wiki-dir/loss.py (one number per image) and nyud2-dir/ConR.py (dense targets).
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lit_methods.callbacks.batch import Key, find_in_batch, rows_of, values_of_batch
from lit_methods.callbacks.loss_term import LossTerm
from lit_methods.catalog import Technique
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


class ConRLoss(NamedTuple):
    """The scalar loss, and the numbers of negatives and positives of each anchor, (M,) int64."""

    loss: Tensor
    negatives: Tensor
    positives: Tensor


def _column(values: Tensor, rows: int, name: str) -> Tensor:
    """(M, 1), the mean where a sample has several values."""
    if values.ndim < 1 or len(values) != rows:
        raise ValueError(f"{name} are {tuple(values.shape)} for {rows} rows of features: expected one row for each")
    wide = values.detach().to(torch.promote_types(values.dtype, torch.float32))
    return wide.reshape(rows, -1).mean(dim=1, keepdim=True)


def _contrast(
    features: Tensor, alike: Tensor, negative: Tensor, push: Tensor, temperature: float, extra_positive: int, strict: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of each anchor (M,), 0 where it has no negative or no positive; and the numbers of both."""
    unit = F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=1)
    similarity = unit @ unit.T / temperature
    nothing = similarity.new_tensor(-torch.inf)
    others = ~torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    positive = alike & others
    negatives, positives = negative.sum(1), positive.sum(1)
    counted = (negatives > 0) & (positives > 0)
    # the reference sums exp(P * S) over all columns: every column that is no positive adds exp(0) = 1
    pull = torch.where(positive, similarity, nothing if strict else similarity.new_zeros(()))
    pushed = torch.where(negative & (push > 0), similarity + push.clamp(min=torch.finfo(push.dtype).tiny).log(), nothing)
    denominator = torch.where(counted[:, None], torch.cat([pull, pushed], dim=1), similarity.new_zeros(())).logsumexp(dim=1)
    pulls = torch.where(positive, denominator[:, None] - similarity, 0).sum(1)
    return torch.where(counted, pulls / (positives + extra_positive).clamp(min=1), 0), negatives, positives


def conr_loss(
    features: Tensor,
    targets: Tensor,
    predictions: Tensor,
    weights: Tensor | None = None,
    window: float = 1.0,
    temperature: float = 0.07,
    eta: float = 0.01,
    strict: bool = False,
) -> ConRLoss:
    """Contrast of samples with near labels against those with far labels but near predictions.

    Positives of an anchor: other samples whose label is at most ``window`` away. Negatives: samples whose label is farther and whose
    prediction is at most ``window`` away; they are pushed with the weight ``s_i exp(eta |y_i - y_j|)`` of anchor i. The loss of an
    anchor is the mean over its positives of -log(exp(S_ij) / D_i), S the cosines over ``temperature``, times s_i; 0 without a negative or a
    positive. The result is the mean over all M anchors. D_i holds all positives and the weighted negatives, and as in the authors' code 1
    for every column that is no positive, the anchor itself included.

    Args:
        features: (M, D) floating point of any length, both views one behind the other; the only input that gets a gradient.
        targets: (M, 1) or (M,) labels.
        predictions: (M, 1) or (M,), in the unit of the labels.
        weights: (M, 1) or (M,) rarity s of each sample, >= 0; None: 1.
        window: Largest distance of near labels and predictions, inclusive, in their unit.
        temperature: > 0.
        eta: Growth of the push with the distance of labels, per unit.
        strict: Only positives and negatives in D_i, as the paper's equation has it.

    Returns:
        The loss in float32 or wider, and the numbers of negatives and positives of each anchor.

    Raises:
        ValueError: The rows differ in number.
    """
    if features.ndim != 2:
        raise ValueError(f"features must be (M, D), got {tuple(features.shape)}")
    with torch.autocast(features.device.type, enabled=False):
        rows = len(features)
        y, guess = _column(targets, rows, "targets"), _column(predictions, rows, "predictions")
        far, confused = (y - y.T).abs(), (guess - guess.T).abs() <= window
        rarity = torch.ones_like(y) if weights is None else _column(weights, rows, "weights")
        near = far <= window
        each, negatives, positives = _contrast(features, near, ~near & confused, rarity * (eta * far).exp(), temperature, 0, strict)
        return ConRLoss((rarity[:, 0] * each).mean(), negatives, positives)


def conr_dense_loss(
    features: Tensor,
    targets: Tensor,
    predictions: Tensor,
    weights: Tensor | None = None,
    window: float = 0.2,
    temperature: float = 0.07,
    eta: float = 0.2,
    strict: bool = False,
) -> ConRLoss:
    """The variant for images with a target at each pixel, such as depth: an image counts by the means of its pixels.

    As :func:`conr_loss`, but the push is ``eta s_i |y_i - y_j|``, linear; the sum over positives is divided by their number plus 1; and the
    anchors aren't weighted.

    Args:
        features: (N, C, h, w) or (N, D); flattened.
        targets: (N, ...) one value for each pixel.
        predictions: (N, ...).
        weights: (N, ...) >= 0; None: 1.
        window: Of the means, inclusive, in the unit of the targets.
        temperature: > 0.
        eta: Push per unit.
        strict: As in :func:`conr_loss`.

    Returns:
        As :func:`conr_loss`.

    Raises:
        ValueError: The rows differ in number.
    """
    with torch.autocast(features.device.type, enabled=False):
        rows = len(features)
        y, guess = _column(targets, rows, "targets"), _column(predictions, rows, "predictions")
        far, confused = (y - y.T).abs(), (guess - guess.T).abs() <= window
        rarity = torch.ones_like(y) if weights is None else _column(weights, rows, "weights")
        near = far <= window
        found = _contrast(features.flatten(1), near, ~near & confused, eta * rarity * far, temperature, 1, strict)
        return ConRLoss(found[0].mean(), *found[1:])


class ConR(LossTerm):
    """Adds the contrastive regulariser to the loss of any regression module.

    With ``views`` the callback sends these parts of the batch, one behind the other, through the module's ``forward`` once more and
    contrasts what comes out; the module's own loss sees its own input (the authors forward three views: one for the loss, two for ConR).
    Without ``views`` it takes the features and predictions of the module's own ``training_step``, and makes no forward pass; an anchor
    without a near label in the batch then adds nothing.

    Needs: a submodule whose output is the features (B, ...), one whose output is the predictions (B, ...), labels in the batch, and with
    ``views`` a ``forward`` that takes one view. Samples with several numbers (pixels) count by their mean.
    Logs: ``conr/loss``; ``conr/anchors``, the share of anchors with a negative and a positive; ``conr/negatives`` and ``conr/positives``,
    mean numbers for each anchor.
    Saves: nothing. Pairs are those of each rank, as in the authors' code, unless ``gather_ranks``.

    Args:
        features: Name or ``fnmatch`` pattern of the submodule before the regressor; it must match one.
        predictions: Name or pattern of the regressor.
        labels: Key or position of the labels in the batch; None: ``target`` of a dictionary, 1 of a sequence.
        weights: Key or position of the samples' weights; None: 1 for each. ``AgeDataModule`` and its like give ``weight``.
        views: Keys or positions of the views that are forwarded for the term; none: those of ``training_step``.
        variant: ``scalar``, or ``dense`` for a target at each pixel.
        window: Largest distance of near labels and predictions, in their unit; the authors: 1 (years), 0.2 (metres, ``dense``).
        temperature: Of the cosines.
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
        if variant not in get_args(Variant):
            raise ValueError(f"variant={variant!r}: give one of {', '.join(get_args(Variant))}")
        if window < 0 or temperature <= 0 or eta < 0:
            raise ValueError(f"window={window} and eta={eta} must not be negative, and temperature={temperature} must be above 0")
        if isinstance(views, str):
            raise ValueError(f"views is the string {views!r}: give a list, [{views!r}]")
        super().__init__([features, predictions], weight)
        self.labels, self.weights = labels, weights
        self.views, self.variant, self.window, self.temperature = tuple(views), variant, window, temperature
        self.eta, self.strict, self.gather_ranks = eta, strict, gather_ranks

    def term(self, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The contrast of the batch.

        Raises:
            ValueError: A pattern matches several submodules, or the batch lacks something.
        """
        batch, calls = inputs["batch"], self._forward_views(inputs) if self.views else inputs["feature_calls"]
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
        found = loss(z, y, guess, s, self.window, self.temperature, self.eta, self.strict)
        counted = (found.negatives > 0) & (found.positives > 0)
        counts = {"anchors": counted, "negatives": found.negatives, "positives": found.positives}
        return found.loss, {name: count.float().mean() for name, count in counts.items()}

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

    def _forward_views(self, inputs: dict[str, Any]) -> dict[str, list[Any]]:
        """What the submodules put out for the views."""
        assert self._features is not None
        before = {name: len(outputs) for name, outputs in self._features.calls.items()}
        inputs["module"](torch.cat([find_in_batch(inputs["batch"], view, ("", 0), "views") for view in self.views]))
        return {name: outputs[before[name] :] for name, outputs in self._features.calls.items()}


__all__ = ["ConR", "ConRLoss", "conr_dense_loss", "conr_loss"]
