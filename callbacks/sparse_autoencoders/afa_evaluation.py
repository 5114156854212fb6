"""The AFA evaluation of any sparse autoencoder: ZF plot and eps-LBO (arXiv:2503.24277); the maths stand in top-AFA's core."""

from collections.abc import Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from lit_methods import checks
from lit_methods.callbacks.batch import Key, find_in_batch
from lit_methods.callbacks.evaluation.callback import Split
from lit_methods.callbacks.sparse_autoencoders.afa_pictures import half_violins, zf_plot
from lit_methods.callbacks.sparse_autoencoders.judge import AutoencoderJudge
from lit_methods.distributed import gather_rows
from lit_methods.panels import Curve, ImagePanel, Media, Panel, TableMedia, TablePanel
from lit_methods.sparse_autoencoders.top_afa.core import band_slopes, decoder_coherence, zf_metrics
from lit_methods.steps import log_global


class AFAEvaluation(AutoencoderJudge):
    """Compares the norms of codes with the norms of inputs, for any sparse autoencoder.

    If the features' directions are nearly orthogonal, a good code has the norm that its input has. The ZF plot shows both norms; eps-LBO is
    the least quasi-orthogonality that explains how far they are apart.

    Runs: on the codes of validation and test, with a copy of the module; over all ranks. What ``normalized`` of the autoencoder gives is
    its input, if it has such a method, else the activations as they are. Logged as ``top_afa/val_*`` and ``top_afa/test_*``: the mean of
    eps-LBO and its median, ``eps_lbo`` and ``eps_lbo_median``; the mean of the code's norm over the input's, ``norm_ratio``; the share of
    samples below 1, ``under``; the mean over samples of the squared error over the squared norm, ``relative_mse``; largest and mean inner
    product of two directions, ``epsilon_max`` and ``epsilon_mean``.

    Saves: nothing.

    Refuses: modules without ``encode``, ``decode`` and ``decoder_directions``.

    Args:
        layer: Key or position in a batch of each sample's layer, (B,) integers, which get a colour and a violin each; None: one layer.
        max_samples: Samples that each rank looks at, the first ones of an evaluation.
        pairs_among: Directions, evenly chosen, among which inner products are taken: memory grows with the square.
        bands: Values of eps (h - 1) whose bands the ZF plot shows, >= 0.
        autoencoder: Name of the submodule that is the autoencoder; "": the module itself.
        activation: Key or position of the activations in a batch; None: ``activation``, or 0.

    Raises:
        ValueError: An argument outside its range.
    """

    panels: ClassVar[tuple[Panel, ...]] = (
        ImagePanel("ZF plot", "top_afa/zf_plot", note="Under the line: too little is active; above it: too much."),
        ImagePanel("Errors per layer", "top_afa/violins", note="Normalised squared error and eps-LBO, clipped at 99 %."),
        TablePanel("Layers", "top_afa/layers", note="Best first, by the median of eps-LBO."),
        Curve("eps-LBO", ("top_afa/val_eps_lbo", "top_afa/val_eps_lbo_median"), goal="min"),
        Curve("Code's norm over input's", ("top_afa/val_norm_ratio",), note="1: equal."),
        Curve("Inner products of directions", ("top_afa/val_epsilon_max", "top_afa/val_epsilon_mean")),
    )

    def __init__(
        self,
        layer: Key = None,
        max_samples: int = 10_000,
        pairs_among: int = 2048,
        bands: Sequence[float] = (0.25, 0.5, 1.0),
        autoencoder: str = "",
        activation: Key = None,
    ) -> None:
        super().__init__(autoencoder, activation)
        checks.at_least(1, max_samples=max_samples)
        checks.at_least(2, "directions", pairs_among=pairs_among)
        for error in bands:
            checks.within("[0, inf)", bands=error)
        self.layer, self.max_samples, self.pairs_among, self.bands = layer, max_samples, pairs_among, tuple(bands)
        self._rows: list[Tensor] = []  # per batch (B, 5): the four metrics, and the layer
        self._media: dict[str, Media] = {}

    def begin_evaluation(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: Split) -> None:
        """Begin anew."""
        super().begin_evaluation(trainer, pl_module, split)
        self._rows = []

    @torch.no_grad()
    def evaluate_batch(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, split: Split, dataloader_idx: int
    ) -> None:
        """Keep the figures of each sample."""
        room = self.max_samples - sum(map(len, self._rows))
        if room <= 0:
            return
        raw = self.activations(batch)[:room]
        code = self.judged.encode(raw)
        x = self.judged.normalized(raw) if hasattr(self.judged, "normalized") else raw
        bias = getattr(self.judged, "decoder_bias", None)
        found = zf_metrics(x, code, self.directions, x.new_zeros(x.shape[1]) if bias is None else bias, self.judged.decode(code))
        layer = torch.zeros(len(x)) if self.layer is None else find_in_batch(batch, self.layer, ("layer", 1), "layer").flatten()[:room]
        self._rows.append(torch.stack([*(one.double() for one in found), layer.to(x.device).double()], dim=1))

    def end_evaluation(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: Split) -> None:
        """Log, and draw on rank 0."""
        mine = torch.cat(self._rows) if self._rows else torch.zeros(0, 5, dtype=torch.float64, device=pl_module.device)
        rows = gather_rows(mine, with_grad=False)
        if len(rows):
            norm_z, norm_f, eps_lbo, relative_mse, _ = rows.T
            directions = self.directions
            chosen = torch.linspace(0, len(directions) - 1, min(self.pairs_among, len(directions)), device=directions.device).round().long()
            largest, mean = decoder_coherence(directions[chosen]) if len(directions) > 1 else (directions.new_zeros(()),) * 2
            figures = {
                "eps_lbo": eps_lbo.mean(),
                "eps_lbo_median": eps_lbo.median(),
                "norm_ratio": (norm_f / norm_z).mean(),
                "under": (norm_f < norm_z).double().mean(),
                "relative_mse": relative_mse.mean(),
                "epsilon_max": largest,
                "epsilon_mean": mean,
            }
            log_global(pl_module, {f"top_afa/{split}_{name}": value.float() for name, value in figures.items()})
            if trainer.is_global_zero:
                self._draw(rows.cpu().numpy())
        self._rows = []
        super().end_evaluation(trainer, pl_module, split)

    def _draw(self, rows: np.ndarray) -> None:
        rows = rows[np.isfinite(rows).all(axis=1)]
        if not len(rows):
            self._media = {}
            return
        norm_z, norm_f, eps_lbo, mse, layer = rows.T
        table = [
            (name, int(here.sum()), float(np.median(mse[here])), float(np.median(eps_lbo[here])), float((norm_f < norm_z)[here].mean()))
            for name in np.unique(layer).tolist()
            for here in [layer == name]
        ]
        self._media = {
            "top_afa/zf_plot": zf_plot(norm_z, norm_f, layer, [(error, *band_slopes(error)) for error in self.bands]),
            "top_afa/violins": half_violins([("normalised squared error", mse), ("eps-LBO", eps_lbo)], layer),
            "top_afa/layers": TableMedia(
                ("layer", "samples", "median error", "median eps-LBO", "under the line"), tuple(sorted(table, key=lambda row: row[3]))
            ),
        }

    def dashboard_media(self) -> dict[str, Media]:
        """ZF plot, violins, table of the layers."""
        return self._media


__all__ = ["AFAEvaluation"]
