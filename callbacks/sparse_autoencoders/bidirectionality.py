"""Whether features of a sparse autoencoder carry two poles: both signs of one feature, or two opposite features."""

from typing import Any, ClassVar

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from lit_methods import checks
from lit_methods.callbacks.batch import Key
from lit_methods.callbacks.evaluation.callback import Split
from lit_methods.callbacks.sparse_autoencoders.judge import AutoencoderJudge
from lit_methods.distributed import sum_over_ranks
from lit_methods.panels import Curve, HistogramMedia, HistogramPanel, Media, Panel
from lit_methods.sparse_autoencoders.abstopk.core import opposite_pairs, sign_counts, two_signed_share
from lit_methods.steps import log_global


class BidirectionalityMonitor(AutoencoderJudge):
    """Counts the signs of the codes of any sparse autoencoder, and looks for features whose directions are opposite.

    A concept with two poles takes one feature that is active with both signs, or two features with opposite directions, which is what
    autoencoders with non-negative codes are left with.

    Runs: on the codes of validation and test, and on the directions at the end of each; over all ranks.
    Saves: nothing.
    Refuses: modules without ``encode``, ``decode`` and ``decoder_directions``.

    Args:
        minority: A feature counts as two-signed if its rarer sign makes up more than this share of its active samples.
        opposite: Directions with a cosine below it are an opposite pair, in [-1, 0).
        autoencoder: Name of the submodule that is the autoencoder; "": the module itself.
        activation: Key or position of the activations in a batch; None: ``activation``, or 0.

    Raises:
        ValueError: An argument outside its range.
    """

    panels: ClassVar[tuple[Panel, ...]] = (
        Curve("Features with both signs", ("bidirectionality/two_signed",), note="Share of the features in use."),
        Curve("Active features of a sample, by sign", ("bidirectionality/positive", "bidirectionality/negative")),
        Curve("Features with an opposite", ("bidirectionality/opposite_pairs",), note="Share of all features. Concepts in two pieces."),
        HistogramPanel("Share of a feature's activity that is positive", "bidirectionality/positive_share", note="1/2: both poles alike."),
    )

    def __init__(self, minority: float = 0.05, opposite: float = -0.9, autoencoder: str = "", activation: Key = None) -> None:
        super().__init__(autoencoder, activation)
        checks.within("[0, 0.5)", "a share", minority=minority)
        checks.within("[-1, 0)", "a cosine", opposite=opposite)
        self.minority, self.opposite = minority, opposite
        self._counts: Tensor | None = None  # (2, h) int64, samples in which each feature is positive and negative
        self._samples = 0
        self._shares: Tensor | None = None  # of the features in use

    def begin_evaluation(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: Split) -> None:
        """Begin to count."""
        super().begin_evaluation(trainer, pl_module, split)
        directions = self.directions
        self._counts, self._samples = directions.new_zeros(2, len(directions), dtype=torch.int64), 0

    def evaluate_batch(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, split: Split, dataloader_idx: int
    ) -> None:
        """Count signs."""
        assert self._counts is not None
        with torch.no_grad():
            code = self.judged.encode(self.activations(batch))
        self._counts += torch.stack(sign_counts(code))
        self._samples += len(code)

    def end_evaluation(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: Split) -> None:
        """Log."""
        assert self._counts is not None
        positive, negative = sum_over_ranks(self._counts)
        samples = sum_over_ranks(torch.tensor(self._samples, device=positive.device)).clamp(min=1)
        active = positive + negative
        self._shares = (positive / active)[active > 0]
        logs = {
            "two_signed": two_signed_share(positive, negative, self.minority),
            "positive": positive.sum() / samples,
            "negative": negative.sum() / samples,
            "opposite_pairs": opposite_pairs(self.directions, self.opposite).float().mean(),
        }
        log_global(pl_module, {f"bidirectionality/{name}": value for name, value in logs.items()})
        super().end_evaluation(trainer, pl_module, split)

    def dashboard_media(self) -> dict[str, Media]:
        """How often each feature is positive."""
        if self._shares is None or not len(self._shares):
            return {}
        return {"bidirectionality/positive_share": HistogramMedia(*np.histogram(self._shares.cpu().numpy(), bins=20, range=(0.0, 1.0)))}


__all__ = ["BidirectionalityMonitor"]
