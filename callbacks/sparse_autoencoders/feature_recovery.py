"""Feature recovery: how well a dictionary matches the true features, or another run's."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lit_methods import checks
from lit_methods.callbacks.batch import Key
from lit_methods.callbacks.evaluation.callback import Split
from lit_methods.callbacks.sparse_autoencoders.judge import AutoencoderJudge, decoder_directions
from lit_methods.datamodules.reading import read_npy
from lit_methods.distributed import gather_rows, sum_over_ranks
from lit_methods.panels import Curve, HistogramMedia, HistogramPanel, Media, Panel
from lit_methods.runs.checkpoints import load_into
from lit_methods.sparse_autoencoders.recovery import max_cosine, share_above
from lit_methods.steps import log_global


class FeatureRecovery(AutoencoderJudge):
    """Compares the decoder directions of a sparse autoencoder with true features (FRR), and with those of another run (MCS).

    FRR(tau) is the share of the true features v that have a direction w with cos(v, w) > tau. A direction's MCS is its largest cosine with
    a direction of the other run; consistency is the share of the directions with an MCS above tau: of all, and of those that are most
    active in the validation data, by their largest activation and by its Z-score (largest less mean, in standard deviations).

    Runs: at the end of validation and test. It looks at weights alone, and at the codes of the data only where ``other`` is given.
    Saves: nothing.
    Refuses: modules without ``encode``, ``decode`` and ``decoder_directions``; features of another width. Where there are neither true
    features nor another run it warns and logs nothing.

    Args:
        truth: A ``.npy`` file with the true features (n, d); None: the datamodule's ``directions``, if it has them.
        other: The other run: a checkpoint of a module with the same shapes, or a ``.npy`` file with its directions (h, d).
        taus: Thresholds of the cosine, in (0, 1).
        absolute: Take |cos| where features have no sign of their own: x = +-v.
        most_active: Share of the directions that counts as most active, in (0, 1].
        autoencoder: Name of the submodule that is the autoencoder; "": the module itself.
        activation: Key or position of the activations in a batch; None: ``activation``, or 0.

    Raises:
        ValueError: An argument outside its range.
    """

    panels: ClassVar[tuple[Panel, ...]] = (
        Curve(
            "Recovered true features", ("recovery/frr_0.8", "recovery/frr_0.9"), note="FRR, by the cosine that is asked for.", goal="max"
        ),
        Curve("Mean of the largest cosines with the true features", ("recovery/max_cosine",), goal="max"),
        Curve("Features split into two opposite directions", ("recovery/split_0.9",), note="Both poles have a direction of their own."),
        Curve(
            "Directions that another run has, too",
            ("recovery/consistency_0.9", "recovery/consistency_largest_0.9", "recovery/consistency_z_score_0.9"),
            goal="max",
        ),
        HistogramPanel("Largest cosine of each true feature", "recovery/cosines"),
    )

    def __init__(
        self,
        truth: Path | None = None,
        other: Path | None = None,
        taus: Sequence[float] = (0.8, 0.9),
        absolute: bool = False,
        most_active: float = 0.1,
        autoencoder: str = "",
        activation: Key = None,
    ) -> None:
        super().__init__(autoencoder, activation)
        for tau in taus:
            checks.within("(0, 1)", "a cosine", taus=tau)
        checks.within("(0, 1]", "a share", most_active=most_active)
        self.truth, self.other = (None if path is None else Path(path) for path in (truth, other))
        self.taus, self.absolute, self.most_active = tuple(taus), absolute, most_active
        self._cosines: Tensor | None = None
        self._reset()

    def _reset(self) -> None:
        self._true: Tensor | None = None
        self._others: Tensor | None = None
        self._rows, self._sum, self._squares, self._peak = 0, torch.zeros(0), torch.zeros(0), torch.zeros(0)

    def begin_evaluation(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: Split) -> None:
        """Read what is compared with.

        Raises:
            FileNotFoundError: A file isn't there.
            ValueError: What is compared has another width, or can't be read.
        """
        super().begin_evaluation(trainer, pl_module, split)
        self._reset()
        directions = self.directions
        with checks.naming("FeatureRecovery"):
            self._true = self._read_truth(trainer, directions)
            if self.other is not None:
                self._others = self._read_other(directions)
                wide = torch.promote_types(directions.dtype, torch.float32)
                self._sum, self._squares, self._peak = (directions.new_zeros(len(directions), dtype=wide) for _ in range(3))
        if self._true is None and self._others is None and not trainer.sanity_checking:
            rank_zero_warn("FeatureRecovery has nothing to compare with: give truth or other, or data whose datamodule has directions")

    def _read_truth(self, trainer: pl.Trainer, directions: Tensor) -> Tensor | None:
        if self.truth is not None:
            return _features(_read_array(self.truth), f"truth={str(self.truth)!r}", directions)
        known = getattr(trainer.datamodule, "directions", None)  # type: ignore[attr-defined]
        return None if known is None else _features(known, "the datamodule's directions", directions)

    def _read_other(self, directions: Tensor) -> Tensor:
        assert self.other is not None
        if self.other.suffix == ".npy":
            return _features(_read_array(self.other), f"other={str(self.other)!r}", directions)
        with torch.inference_mode(False):
            theirs = copy.deepcopy(self.judged)
            load_into(theirs, self.other, f"{self.autoencoder}." if self.autoencoder else "")
        return decoder_directions(theirs)

    def evaluate_batch(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, split: Split, dataloader_idx: int
    ) -> None:
        """How active each direction is."""
        if self._others is None:
            return
        with torch.no_grad():
            z = self.judged.encode(self.activations(batch)).abs().to(self._sum.dtype)
        self._rows += len(z)
        self._sum += z.sum(0)
        self._squares += z.square().sum(0)
        if len(z):
            self._peak = torch.maximum(self._peak, z.amax(0))

    def end_evaluation(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: Split) -> None:
        """Log."""
        directions, logs = self.directions, {}
        if self._true is not None:
            self._cosines = cosines = max_cosine(self._true, directions, absolute=self.absolute)
            opposite = max_cosine(-self._true, directions)
            logs["max_cosine"] = cosines.mean()
            for tau in self.taus:
                logs[f"frr_{tau:g}"] = share_above(cosines, tau)
                logs[f"split_{tau:g}"] = share_above(torch.minimum(max_cosine(self._true, directions), opposite), tau)
        if self._others is not None:
            cosines = max_cosine(directions, self._others, absolute=self.absolute)
            logs["mcs"] = cosines.mean()
            active = {"largest": self._peak_of_all_ranks(), "z_score": self._z_scores()}
            count = max(1, round(self.most_active * len(cosines)))
            for tau in self.taus:
                logs[f"consistency_{tau:g}"] = share_above(cosines, tau)
                for name, score in active.items():
                    logs[f"consistency_{name}_{tau:g}"] = share_above(cosines[score.topk(count).indices], tau)
        if logs:
            log_global(pl_module, {f"recovery/{name}": value for name, value in logs.items()})
        super().end_evaluation(trainer, pl_module, split)

    def _peak_of_all_ranks(self) -> Tensor:
        return gather_rows(self._peak[None], with_grad=False).amax(0)

    def _z_scores(self) -> Tensor:
        """How many standard deviations each direction's largest activation lies above its mean; 0 where it never changes."""
        rows = sum_over_ranks(torch.tensor(self._rows, device=self._sum.device)).clamp(min=1)
        mean, square = sum_over_ranks(self._sum) / rows, sum_over_ranks(self._squares) / rows
        deviation = (square - mean.square()).clamp(min=0).sqrt()
        return torch.where(deviation > 0, (self._peak_of_all_ranks() - mean) / deviation, torch.zeros_like(mean))

    def dashboard_media(self) -> dict[str, Media]:
        """The largest cosine of each true feature."""
        if self._cosines is None:
            return {}
        return {"recovery/cosines": HistogramMedia(*np.histogram(self._cosines.float().cpu().numpy(), bins=40, range=(-1.0, 1.0)))}


def _read_array(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"FeatureRecovery: {path} does not exist: give a .npy file of directions, one a row")
    return read_npy(path, "directions")


def _features(values: Any, what: str, directions: Tensor) -> Tensor:
    """(n, d) as a tensor beside the directions."""
    features = torch.as_tensor(values)
    if features.ndim != 2 or not len(features) or features.shape[1] != directions.shape[1] or not features.is_floating_point():
        given = f"{tuple(features.shape)} {features.dtype}"
        raise ValueError(f"{what} is {given}: expected numbers (n >= 1, {directions.shape[1]}), as wide as the autoencoder's activations")
    features = features.to(directions)
    if not features.isfinite().all():
        raise ValueError(f"{what} holds a NaN or an infinity in {features.dtype}: expected finite directions")
    return features


__all__ = ["FeatureRecovery"]
