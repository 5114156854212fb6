"""AdaWAC as a Callback: every sample's own balance of supervision and consistency (arXiv:2210.01891), for any module with logits.

The maths and its golden vectors: :mod:`lit_methods.callbacks.noisy_labels.adawac.core`.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from lit_methods.callbacks.batch import find_in_batch, resized, rows_of, rows_of_calls
from lit_methods.callbacks.features import require_network
from lit_methods.callbacks.loss_term import LossTerm
from lit_methods.callbacks.noisy_labels.adawac.core import CONSISTENT, SINGLE_VIEW, Mode, adawac_loss
from lit_methods.catalog import Technique
from lit_methods.checks import at_least, one_of, share
from lit_methods.distributed import rank, sum_over_ranks
from lit_methods.panels import Curve, HistogramMedia, HistogramPanel, Media, Panel
from lit_methods.sample_table import SampleTable
from lit_methods.steps import log_global
from lit_methods.tasks.segmentation.core import has_foreground

TECHNIQUE = Technique(
    slug="adawac",
    short="AdaWAC",
    title="Adaptively Weighted Data Augmentation Consistency Regularization for Robust Optimization under Concept Shift",
    arxiv="2210.01891",
    family="noisy_labels",
    form="callback",
    classes=("lit_methods.callbacks.AdaWAC", "lit_methods.ImageSegmentor", "lit_methods.datamodules.OrganSlicesDataModule"),
    configs=("adawac.yaml",),
    golden=("weight_update", "loss", "metric"),
    claim=(
        "On generated slices, half of them without an organ, AdaWAC learns to give slices with organs a larger weight of supervision than "
        "those without."
    ),
    summary="Every training sample has two learned weights, one for supervision and one for consistency over augmentations.",
)

_GROUPS = ("sparse", "dense")
_NEEDS = {
    "images": "a second augmented view",
    "labels": "the labels of each view",
    "index": "the data set's index of each sample",
    "dense": "whether samples are dense",
}


class AdaWAC(LossTerm):
    """Replaces the loss by r * Dice + (1 - r) * mean_i(w_i1 * ce_i + w_i2 * ac_i), with two weights w_i for every sample i.

    ce_i is the cross-entropy of both views, ac_i the squared difference of their features. The weights of a sample take a step of mirror
    ascent before they are used, so that label-dense samples end up supervised and label-sparse ones regularised.

    Runs: around ``training_step``. What the module puts out there is used for the first view; the second view is sent through ``network``
    here, unless the step did that, too (views one behind the other). So the cost is one forward pass more. It needs in the batch two
    augmented views with their labels, and the index of each sample in the data set; the modes ``base``, ``reweight-only`` and ``pm-dro``
    need one view and no features. On several ranks the rows of a batch are gathered, so that all ranks have the same table; Dice, and the
    normalisation of the modes with one weight, are each rank's own.
    Saves: the weights of all samples; they go on with any number of workers or ranks.
    Refuses: loss terms that are set up before it, whose parts would be thrown away; training sets without a length.

    Args:
        network: Name of the submodule whose output is the logits (B, classes, ...), a mapping with ``out`` or ``logits``, or either on a
            coarser grid than the labels'.
        features: Name or ``fnmatch`` pattern of the submodule whose output is compared: the encoder's deepest features.
        images: Keys or positions of the two views.
        labels: Keys or positions of their labels, (B, ...) integers, 0 for the background.
        index: Key or position of the samples' indices, (B,) integers.
        dense: Key or position of whether a sample is label-dense, (B,) bool, for the logs alone; None: if its first view has foreground.
        num_samples: Size of the training set; None: that of the training loader.
        mode: ``adawac``, or a baseline: ``base``, ``pair``, ``pseudo``, ``dac-only``, ``trim-train``, ``trim-ratio``, ``reweight-only``,
            ``pm-dro``; see :func:`lit_methods.callbacks.noisy_labels.adawac.core.adawac_loss`.
        rate: eta_w, the step of the weights; the authors: 2 with TransUNet, 8 with a U-Net.
        consistency: Compare features; False: none, the modes ``pair`` and ``trim-*`` without them.
        consistency_weight: lambda_AC.
        dice_ratio: Share of the Dice loss.
        trim_quantile: Quantile of the batch's cross-entropies below which ``trim-ratio`` leaves samples out.
        entropy: Strength with which ``pm-dro`` pulls the weights together.
        ignore_index: Label of pixels that don't count.
        replace: Throw away the module's own loss; False: add to it.
        weight: Factor of the whole loss.

    Raises:
        ValueError: A value lies outside its range.
    """

    name = "adawac"
    set_up_before = ("LossTerm",)
    panels: ClassVar[tuple[Panel, ...]] = (
        Curve("AdaWAC", ("adawac/loss", "adawac/ce", "adawac/consistency", "adawac/dice"), goal="min"),
        Curve(
            "Weight of supervision",
            ("adawac/weight_dense", "adawac/weight_sparse", "adawac/supervised"),
            note="Of samples with and without foreground. Dense ones should be above sparse ones.",
        ),
        Curve(
            "What drives the weights",
            ("adawac/ce_dense", "adawac/ce_sparse", "adawac/consistency_dense", "adawac/consistency_sparse"),
            note="A sample's weight moves to the larger of its two losses: lower consistency_weight where consistency is always larger.",
        ),
        Curve("Mean weight, and the gap between dense and sparse samples", ("adawac/weight", "adawac/weight_gap")),
        Curve("Samples of a batch that count", ("adawac/kept",), note="All of them but in the trimming modes."),
        HistogramPanel("Weights of label-dense samples", "adawac/weights_dense", note="1: supervised, 0: regularised."),
        HistogramPanel("Weights of label-sparse samples", "adawac/weights_sparse", note="1: supervised, 0: regularised."),
    )

    def __init__(
        self,
        network: str = "network",
        features: str = "network.bottleneck",
        images: Sequence[str | int] = ("image", "image_2"),
        labels: Sequence[str | int] = ("label", "label_2"),
        index: str | int = "index",
        dense: str | int | None = None,
        num_samples: int | None = None,
        mode: Mode = "adawac",
        rate: float = 1.0,
        consistency: bool = True,
        consistency_weight: float = 2.0,
        dice_ratio: float = 0.5,
        trim_quantile: float = 0.42108,
        entropy: float = 0.01,
        ignore_index: int = 255,
        replace: bool = True,
        weight: float = 1.0,
    ) -> None:
        one_of(Mode, mode=mode)
        for name, keys in (("images", images), ("labels", labels)):
            if isinstance(keys, str) or len(keys) != 2:
                raise ValueError(f"{name}={keys!r}: give a list of two keys or positions, one for each view")
        at_least(0, rate=rate, consistency_weight=consistency_weight, entropy=entropy)
        share(dice_ratio=dice_ratio, trim_quantile=trim_quantile)
        self.compares = consistency and mode in CONSISTENT
        super().__init__([network, features] if self.compares else [network], weight)
        self.replaces = replace
        self.images, self.labels, self.index, self.dense, self.num_samples = tuple(images), tuple(labels), index, dense, num_samples
        self.mode, self.rate, self.consistency_weight, self.dice_ratio = mode, rate, consistency_weight, dice_ratio
        self.trim_quantile, self.entropy, self.ignore_index = trim_quantile, entropy, ignore_index
        self._fresh()

    def _fresh(self) -> None:
        size = self.num_samples or 0
        self.table = SampleTable(size, 2, fill=0.5)
        self.groups = SampleTable(size, 1, fill=-1, dtype=torch.int8)  # -1: not seen yet, 0: sparse, 1: dense
        self._sums = torch.zeros(2, 3, dtype=torch.float64)  # group -> sums of ce and consistency, number
        self._checked = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Hook into the module.

        Raises:
            ValueError: The module optimises manually, or a submodule isn't there.
        """
        if stage == "fit" and trainer.global_step == 0:
            self._fresh()  # an earlier run's weights belong to it
        super().setup(trainer, pl_module, stage)

    def hook_in(self, pl_module: pl.LightningModule) -> None:
        """Hook into the module, if it has the network."""
        require_network(pl_module, self.targets[0], "AdaWAC")
        super().hook_in(pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give every sample a row.

        Raises:
            ValueError: The size of the training set isn't known, or is another than the checkpoint's.
        """
        size = self.num_samples
        if size is None:
            dataset = getattr(trainer.train_dataloader, "dataset", None)
            try:
                size = len(dataset)  # type: ignore[arg-type]
            except TypeError:
                raise ValueError(
                    f"AdaWAC keeps weights for every training sample, and the training loader ({type(trainer.train_dataloader).__name__}) "
                    "has no data set with a length: give num_samples"
                ) from None
        if len(self.table) not in (0, size):
            raise ValueError(f"the weights are those of {len(self.table)} samples, and the training set has {size}: give the same data")
        for table in (self.table, self.groups):
            table.resize(size)
            table.to(pl_module.device)
        self._sums = self._sums.to(pl_module.device, torch.float32 if pl_module.device.type == "mps" else torch.float64)

    def term(self, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective of the batch, after the step of its weights.

        Raises:
            ValueError: The batch or the network's output lacks something.
        """
        batch, module, network = inputs["batch"], inputs["module"], self.targets[0]
        single = self.mode in SINGLE_VIEW
        wanted = 1 if single else 2
        labels = [self._find(batch, key, "labels").long() for key in self.labels[:wanted]]
        index = self._find(batch, self.index, "index")
        size = len(labels[0])
        if index.shape != (size,):
            raise ValueError(
                f"the batch's {self.index!r} is {tuple(index.shape)} for {size} samples: AdaWAC needs the data set's index of each"
            )
        if not self._checked:
            self.table.check(index)
            self._checked = True
        calls = inputs["feature_calls"]
        rows = rows_of_calls(calls[network], f"network={network!r}")
        if len(rows) == size and not single:
            second = self.run_again(self._find(batch, self.images[1], "images"), module.get_submodule(network)).feature_calls
            calls = {name: [*outputs, *second[name]] for name, outputs in calls.items()}
            rows = rows_of_calls(calls[network], f"network={network!r}")
        if len(rows) < wanted * size:
            raise ValueError(
                f"network={network!r} put out {len(rows)} rows for {size} samples: expected {size}, or {2 * size} with both views"
            )
        views = [resized(rows[k * size : (k + 1) * size], label.shape[1:]) for k, label in enumerate(labels)]
        latents = None
        if self.compares:
            within = {name: outputs for name, outputs in calls.items() if name != network} or calls
            features = rows_of(within, self.targets[1], "features")
            if len(features) != 2 * size:
                raise ValueError(
                    f"features={self.targets[1]!r} put out {len(features)} rows for {size} samples: name a submodule that sees two views"
                )
            latents = features[:size], features[size:]
        step = adawac_loss(
            (views[0], views[-1]),
            (labels[0], labels[-1]),
            latents,
            self.table.read(index),
            self.mode,
            self.rate,
            self.consistency_weight,
            self.dice_ratio,
            self.trim_quantile,
            self.entropy,
            self.ignore_index,
        )
        with torch.no_grad():
            dense = has_foreground(labels[0], self.ignore_index) if self.dense is None else self._find(batch, self.dense, "dense").bool()
            self.table.write(index, step.weights, gather=True)
            self.groups.write(index, dense[:, None].to(torch.int8), gather=True)
            each = torch.stack([step.ce, step.consistency, torch.ones_like(step.ce)], dim=1).to(self._sums.dtype)
            self._sums += torch.stack([(each * mask[:, None]).sum(0) for mask in (~dense, dense)])
        logs = {"ce": step.ce.mean(), "consistency": step.consistency.mean(), "dice": step.dice.mean(), "kept": step.kept.float()}
        return step.loss, logs

    def _find(self, batch: Any, key: str | int, argument: str) -> Tensor:
        return find_in_batch(batch, key, ("", 0), argument, f"AdaWAC needs {_NEEDS[argument]}")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the weights, on all ranks alike."""
        weights, groups = self.table.rows[:, 0], self.groups.rows[:, 0]
        sums = sum_over_ranks(self._sums)
        seen = groups >= 0
        logs: dict[str, Tensor] = {}
        if seen.any():
            logs = {"weight": weights[seen].mean(), "supervised": (weights[seen] > 0.5).float().mean()}
        for group, name in enumerate(_GROUPS):
            if (groups == group).any():
                logs[f"weight_{name}"] = weights[groups == group].mean()
            if sums[group, 2] > 0:
                logs |= {f"{loss}_{name}": (sums[group, k] / sums[group, 2]).float() for k, loss in enumerate(("ce", "consistency"))}
        if "weight_dense" in logs and "weight_sparse" in logs:
            logs["weight_gap"] = logs["weight_dense"] - logs["weight_sparse"]
        log_global(pl_module, {f"{self._prefix}/{name}": value for name, value in logs.items()})
        self._sums.zero_()

    def dashboard_media(self) -> dict[str, Media]:
        """Histograms of the weights."""
        weights, groups = self.table.rows[:, 0].float().cpu().numpy(), self.groups.rows[:, 0].cpu().numpy()
        media: dict[str, Media] = {}
        for group, name in enumerate(_GROUPS):
            if (groups == group).any():
                counts, edges = np.histogram(np.clip(weights[groups == group], 0, 1), bins=40, range=(0.0, 1.0))
                media[f"adawac/weights_{name}"] = HistogramMedia(counts, edges)
        return media

    def dashboard_artifacts(self) -> dict[str, dict[str, Tensor]]:
        """The weights of all samples."""
        return {"adawac_weights": {"weights": self.table.rows, "group": self.groups.rows[:, 0]}} if len(self.table) else {}

    def state_dict(self) -> dict[str, Any]:
        """The weights and what is known of the samples."""
        # only rank 0's checkpoint is written, so it holds the sums of all ranks
        return {"weights": self.table.rows.clone(), "groups": self.groups.rows.clone(), "sums": sum_over_ranks(self._sums)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with them."""
        for table, name in ((self.table, "weights"), (self.groups, "groups")):
            table.resize(len(state_dict[name]))
            table.load_state_dict({"rows": state_dict[name]})
        self._sums.copy_(state_dict["sums"])
        if rank():  # the sums of all ranks are rank 0's from now on
            self._sums.zero_()


__all__ = ["AdaWAC"]
