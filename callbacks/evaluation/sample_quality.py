"""FID, precision and recall of samples, in the features of any network."""

from collections.abc import Mapping
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lit_methods.consistency_models.evaluation import frechet_distance, precision_recall
from lit_methods.distributed import gather_rows
from lit_methods.frozen import Frozen
from lit_methods.panels import Curve, Panel


class SampleQuality(pl.Callback):
    """Compares the samples that a module draws in validation and test with the data there, by features.

    For any module whose ``validation_step`` (``test_step``) gets a batch with ``image`` (B, ...) and returns {``<n>_steps``: (B, ...)
    samples}, as ``ConsistencyTraining`` does. If the module has ``to_images``, both are shown to the features as it makes them: latents are
    decoded, the data's, too, so that the autoencoder's own error isn't seen.

    Logs ``samples/val_feature_fid``, ``samples/val_precision`` and ``samples/val_recall`` of one step, and with ``_<n>_steps`` of several;
    ``samples/test_...`` likewise. Feature FID is FID if the features are Inception's and the numbers of samples and data are those of what
    it is compared with (50,000 mostly). With other features it compares runs with each other.

    Runs: at each validation batch and epoch end. Saves: nothing. Features of all ranks are gathered.

    Args:
        features: (B, C, H, W) images in [-1, 1] -> (B, D). ``ScriptedFeatures`` or ``DigitFeatures``, or yours. It is frozen.
        neighbours: k of precision and recall.

    Raises:
        ValueError: The module returns something else, or there are fewer samples than neighbours.
    """

    panels: ClassVar[tuple[Panel, ...]] = (
        Curve("Feature FID", ("samples/val_feature_fid*",), note="Lower is better. FID if the features are Inception's."),
        Curve("Precision and recall", ("samples/val_precision*", "samples/val_recall*"), note="In [0, 1]; higher is better."),
    )

    def __init__(self, features: nn.Module, neighbours: int = 3) -> None:
        if neighbours < 1:
            raise ValueError(f"neighbours is {neighbours}: give 1 or more")
        self.features = Frozen(features)
        self.neighbours = neighbours
        self._found: dict[str, list[Tensor]] = {}

    def _begin(self, pl_module: pl.LightningModule) -> None:
        self._found = {}
        self.features.to(pl_module.device)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin anew."""
        self._begin(pl_module)

    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin anew."""
        self._begin(pl_module)

    def _keep(self, pl_module: pl.LightningModule, outputs: Any, batch: Any) -> None:
        if not isinstance(outputs, Mapping) or not outputs or not all(isinstance(value, Tensor) for value in outputs.values()):
            raise ValueError(
                f"{type(pl_module).__name__}'s validation_step and test_step must return a dict of samples for SampleQuality, got "
                f"{type(outputs).__name__}"
            )
        show = getattr(pl_module, "to_images", None)
        for name, images in {"data": batch["image"], **outputs}.items():
            seen = self.features((images if show is None else show(images)).float())
            self._found.setdefault(name, []).append(seen.float().cpu())

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the features."""
        self._keep(pl_module, outputs, batch)

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the features."""
        self._keep(pl_module, outputs, batch)

    def _compare(self, pl_module: pl.LightningModule, kind: str) -> None:
        all_features = {name: gather_rows(torch.cat(parts), with_grad=False) for name, parts in self._found.items()}
        self._found = {}
        data = all_features.pop("data", None)
        for name, samples in all_features.items():
            ending = "" if name == "1_steps" else f"_{name}"
            assert data is not None
            precision, recall = precision_recall(samples, data, self.neighbours)
            found = {"feature_fid": frechet_distance(samples, data), "precision": precision, "recall": recall}
            logs = {f"samples/{kind}_{metric}{ending}": value.to(pl_module.device) for metric, value in found.items()}
            pl_module.log_dict(logs, rank_zero_only=False)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log."""
        self._compare(pl_module, "val")

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log."""
        self._compare(pl_module, "test")
