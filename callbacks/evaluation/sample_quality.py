"""FID, precision and recall of samples, in the features of any network."""

from collections.abc import Mapping
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lit_methods.callbacks.evaluation.callback import EvaluationCallback, Split
from lit_methods.callbacks.twin import observed
from lit_methods.checks import at_least
from lit_methods.consistency_models.evaluation import frechet_distance, precision_recall
from lit_methods.distributed import gather_rows
from lit_methods.frozen import Frozen
from lit_methods.panels import Curve, Panel
from lit_methods.steps import log_global


class SampleQuality(EvaluationCallback):
    """Compares the samples that a module draws in validation and test with the data there, by features.

    For any module whose ``validation_step`` (``test_step``) gets a batch with ``image`` (B, ...) and returns {``<n>_steps``: (B, ...)
    samples}, as ``ConsistencyTraining`` does. If the module has ``to_images``, both are shown to the features as it makes them: latents are
    decoded, the data's, too, so that the autoencoder's own error isn't seen. Metrics of samples of several steps end with ``_<n>_steps``.
    Feature FID is FID if the features are Inception's and the numbers of samples and data are those of what it is compared with (50,000
    mostly). With other features it compares runs with each other.

    Runs: at each validation and test batch and epoch end. Features of all ranks are gathered.
    Saves: nothing.
    Refuses: steps that return something else.

    Args:
        features: (B, C, H, W) images in [-1, 1] -> (B, D). ``ScriptedFeatures`` or ``DigitFeatures``, or yours. It is frozen.
        neighbours: k of precision and recall.

    Raises:
        ValueError: The module returns something else, or there are fewer samples than neighbours.
    """

    panels: ClassVar[tuple[Panel, ...]] = (
        Curve(
            "Feature FID",
            ("samples/val_feature_fid*", "samples/test_feature_fid*"),
            note="Lower is better. FID if the features are Inception's.",
        ),
        Curve(
            "Precision and recall",
            ("samples/val_precision*", "samples/val_recall*", "samples/test_precision*", "samples/test_recall*"),
            note="In [0, 1]; higher is better.",
        ),
    )

    def __init__(self, features: nn.Module, neighbours: int = 3) -> None:
        at_least(1, neighbours=neighbours)
        self.features = Frozen(features)
        self.neighbours = neighbours
        self._features_of: dict[str, list[Tensor]] = {}
        self._twin: pl.LightningModule | None = None  # what decodes

    def begin_evaluation(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: Split) -> None:
        """Begin anew."""
        self._features_of, self._twin = {}, None
        self.features.to(pl_module.device)

    def evaluate_batch(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, split: Split, dataloader_idx: int
    ) -> None:
        """Keep the features."""
        if not isinstance(outputs, Mapping) or not outputs or not all(isinstance(value, Tensor) for value in outputs.values()):
            raise ValueError(
                f"{type(pl_module).__name__}'s validation_step and test_step must return a dict of samples for SampleQuality, got "
                f"{type(outputs).__name__}"
            )
        if self._twin is None and hasattr(pl_module, "to_images"):
            self._twin = observed(trainer, pl_module, type(self).__name__)
        show = getattr(self._twin, "to_images", None)
        for name, images in {"data": batch["image"], **outputs}.items():
            seen = self.features((images if show is None else show(images)).float())
            self._features_of.setdefault(name, []).append(seen.float().cpu())

    def end_evaluation(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: Split) -> None:
        """Log."""
        all_features = {name: gather_rows(torch.cat(parts), with_grad=False) for name, parts in self._features_of.items()}
        self._features_of, self._twin = {}, None
        data = all_features.pop("data", None)
        for name, samples in all_features.items():
            ending = "" if name == "1_steps" else f"_{name}"
            assert data is not None
            precision, recall = precision_recall(samples, data, self.neighbours)
            values = {"feature_fid": frechet_distance(samples, data), "precision": precision, "recall": recall}
            log_global(pl_module, {f"samples/{split}_{metric}{ending}": value for metric, value in values.items()})
