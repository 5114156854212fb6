"""Steering by a feature of a sparse autoencoder, beside steering along the difference in means."""

from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lit_methods import checks
from lit_methods.callbacks.batch import Key, find_in_batch
from lit_methods.callbacks.evaluation.callback import Split
from lit_methods.callbacks.sparse_autoencoders.judge import AutoencoderJudge
from lit_methods.distributed import gather_rows
from lit_methods.panels import Curve, Media, Panel, TableMedia, TablePanel
from lit_methods.sparse_autoencoders.abstopk.core import (
    ablate_direction,
    add_direction,
    clamp_feature,
    concept_score,
    difference_in_means,
    steer_by_clamping,
)
from lit_methods.steps import log_global


class SteeringProbe(AutoencoderJudge):
    """Steers activations towards a concept and away from it, by one feature of any sparse autoencoder and by the difference in means.

    Of the validation data's samples with the concept (label above 0) and without it the first ones are kept. The feature is the one
    whose mean over the two kinds differs most, and c its mean over the samples with the concept. Each way of steering gets a score: 0 means
    as far along v as the mean sample without the concept, 1 as far as the mean one with it, where v is the difference of the means::

        clamped           samples without it, the feature set to c, the change added: x + D (z' - z)
        clamped_decoded   the same, decoded: D z' + b
        opposite          samples with it, the feature set to -c, the change added
        ablated_feature   samples with it, the feature set to 0, the change added
        added             samples without it, alpha v added
        ablated           samples with it, nothing left along v

    What a change does across v is ``off_axis_*``, in units of ||v||: side effects.

    Runs: at the end of validation and test, on the samples of all ranks; in the space of the autoencoder's ``normalized(x)``, where it has
    that.
    Saves: nothing.
    Refuses: modules without ``encode``, ``decode`` and ``decoder_directions``; batches without the labels. Where one kind of samples is
    missing it warns and logs nothing.

    Args:
        concept: Key or position of the labels in a batch, (B,) or (B, n): above 0 with the concept, else without.
        column: Which of n labels; null: there is one.
        feature: Number of the feature; None: chosen as above.
        value: c; None: as above.
        alpha: How much of v is added.
        samples: So many of each kind, and of each rank, are kept.
        autoencoder: Name of the submodule that is the autoencoder; "": the module itself.
        activation: Key or position of the activations in a batch; None: ``activation``, or 0.

    Raises:
        ValueError: An argument outside its range.
    """

    panels: ClassVar[tuple[Panel, ...]] = (
        Curve(
            "Towards the concept",
            ("steering/clamped", "steering/clamped_decoded", "steering/added"),
            note="1: as far as samples that have it.",
        ),
        Curve(
            "Away from the concept", ("steering/opposite", "steering/ablated_feature", "steering/ablated"), note="0: as those without it."
        ),
        Curve(
            "Side effects across the concept's direction", ("steering/off_axis_clamped", "steering/off_axis_clamped_decoded"), goal="min"
        ),
        TablePanel("Ways of steering", "steering/ways"),
    )

    def __init__(
        self,
        concept: str | int = "concept",
        column: int | None = None,
        feature: int | None = None,
        value: float | None = None,
        alpha: float = 1.0,
        samples: int = 1024,
        autoencoder: str = "",
        activation: Key = None,
    ) -> None:
        super().__init__(autoencoder, activation)
        checks.at_least(0, "a number from 0", feature=feature, column=column)
        checks.at_least(1, "samples", samples=samples)
        self.concept, self.feature, self.value, self.alpha, self.samples = concept, feature, value, alpha, samples
        self.column = column
        self._kept: tuple[list[Tensor], list[Tensor]] = ([], [])  # activations without the concept, and with it
        self._rows: tuple[tuple[str, float, float], ...] = ()

    def begin_evaluation(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: Split) -> None:
        """Keep nothing yet."""
        super().begin_evaluation(trainer, pl_module, split)
        self._kept = ([], [])

    def evaluate_batch(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, split: Split, dataloader_idx: int
    ) -> None:
        """Keep samples of both kinds.

        Raises:
            ValueError: The batch has no labels, or they don't fit.
        """
        x = self.activations(batch)
        labels = find_in_batch(batch, self.concept, ("concept", 1), "concept", "it needs labels of the concept")
        if labels.shape[: labels.ndim - (self.column is not None)].numel() != len(x) or (self.column or 0) >= labels.shape[-1]:
            raise ValueError(
                f"concept={self.concept!r} is {tuple(labels.shape)} for {len(x)} activations, and column is {self.column}: expected one "
                "label of each, or several and the column of one"
            )
        present = (labels if self.column is None else labels[..., self.column]).flatten() > 0
        for label, kept in enumerate(self._kept):
            missing = self.samples - sum(map(len, kept))
            if missing > 0:
                kept.append(x[present == bool(label)][:missing])

    def end_evaluation(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: Split) -> None:
        """Steer, and log."""
        width = self.directions.shape[1]
        without, with_it = (
            gather_rows(torch.cat(kept) if kept else self.directions.new_zeros(0, width), with_grad=False) for kept in self._kept
        )
        if len(without) and len(with_it):
            with checks.naming("SteeringProbe"), torch.no_grad():
                scores, off_axis = self._steer(without, with_it)
            self._rows = tuple((name, float(score), float(off_axis[name])) for name, score in scores.items())
            logs = {**scores, **{f"off_axis_{name}": value for name, value in off_axis.items()}}
            log_global(pl_module, {f"steering/{name}": value for name, value in logs.items()})
        elif not trainer.sanity_checking:
            rank_zero_warn(f"SteeringProbe: {len(with_it)} samples with the concept and {len(without)} without it, so nothing is measured")
        self._kept = ([], [])
        super().end_evaluation(trainer, pl_module, split)

    def _steer(self, without: Tensor, with_it: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Way -> mean score, and mean change across v."""
        directions, sae = self.directions, self.judged
        z0, z1 = sae.encode(without), sae.encode(with_it)
        if hasattr(sae, "normalized"):  # the space in which directions are added
            without, with_it = sae.normalized(without), sae.normalized(with_it)
        difference = z1.mean(0) - z0.mean(0)
        feature = int(difference.abs().argmax()) if self.feature is None else self.feature
        checks.within(f"[0, {len(directions)})", "the number of a feature", feature=feature)
        value = z1[:, feature].mean() if self.value is None else self.value
        v = difference_in_means(with_it, without)
        steered = {
            "clamped": (without, steer_by_clamping(without, z0, feature, value, directions)),
            "clamped_decoded": (without, sae.decode(clamp_feature(z0, feature, value))),
            "opposite": (with_it, steer_by_clamping(with_it, z1, feature, -value, directions)),
            "ablated_feature": (with_it, steer_by_clamping(with_it, z1, feature, 0.0, directions)),
            "added": (without, add_direction(without, v, self.alpha)),
            "ablated": (with_it, ablate_direction(with_it, v)),
        }
        means = with_it.mean(0), without.mean(0)
        scores = {name: concept_score(after, *means).mean() for name, (_, after) in steered.items()}
        across = {name: ablate_direction(after - before, v).norm(dim=1).mean() / v.norm() for name, (before, after) in steered.items()}
        return scores, across

    def dashboard_media(self) -> dict[str, Media]:
        """Scores and side effects of all ways."""
        return {"steering/ways": TableMedia(("way", "score", "off axis"), self._rows)} if self._rows else {}


__all__ = ["SteeringProbe"]
