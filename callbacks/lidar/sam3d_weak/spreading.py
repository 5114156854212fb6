"""Labels of a few points spread over masks, before training and again with reliable pseudo-labels (arXiv:2508.19909)."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_methods import checks
from lit_methods.callbacks.features import one_submodule
from lit_methods.callbacks.lidar.sam3d_weak.consistency import cloud_logits, deformation_of
from lit_methods.callbacks.lidar.sam3d_weak.core import deformed_views, reliable_points, spread_masks, spread_pseudo_labels
from lit_methods.callbacks.noisy_labels.label_correction import Correction, LabelCorrection
from lit_methods.catalog import Technique
from lit_methods.datamodules.indoor.base import packed_labels, unpacked_labels
from lit_methods.datamodules.label_store import LabelStore
from lit_methods.distributed import rank, sum_over_ranks, world_size
from lit_methods.lidar.pictures import class_colors, label_cloud
from lit_methods.panels import CloudMedia, CloudPanel, Curve, Media, Panel
from lit_methods.steps import log_global, training_length

TECHNIQUE = Technique(
    slug="sam3d_weak",
    short="SAM for weak 3D",
    title="Integrating SAM Supervision for 3D Weakly Supervised Point Cloud Segmentation",
    arxiv="2508.19909",
    family="lidar",
    form="callback",
    classes=(
        "lit_methods.callbacks.MaskLabelSpreading",
        "lit_methods.callbacks.ReliabilityConsistency",
        "lit_methods.WeakPointSegmentor",
        "lit_methods.PointNetOfCells",
        "lit_methods.SparseUNet",
        "lit_methods.datamodules.RoomsDataModule",
    ),
    configs=("sam3d_weak.yaml",),
    golden=("link", "mask_spread", "reliability_loss"),
    claim=(
        "In generated rooms with ten labelled points each, labels that masks spread raise the mIoU on unseen rooms over the given labels "
        "alone."
    ),
    summary="Spreads a few points' labels over image masks lifted to 3D, and lets deformed clouds agree where points are reliable.",
)

_SUMS = ("points", "extended", "extended_right", "extended_known", "spread", "spread_right", "spread_known", "reliable", "passed")


class MaskLabelSpreading(LabelCorrection):
    """Spreads the labels of a few points over masks: once before training, and anew with reliable pseudo-labels at the end of epochs.

    A mask whose labelled points agree votes for their class on all of its points, and a point without a label takes the class with most
    votes over the views. From the share ``spread_start`` of training on, each scene is predicted, and its reliable points vote along with
    the labels; what points get by that has the weight ``spread_weight``, and is computed anew at each round:
    :func:`~lit_methods.callbacks.lidar.sam3d_weak.core.spread_masks`. Given labels are never changed. The rules are our
    reconstruction: the authors' are not public.

    Runs: before the first batch, and at the end of training epochs, before checkpoints are saved. Scenes are shared out over ranks. It
    needs a label store with (2, N) labels of each scene, classes and weights in hundredths; a loader of the training scenes as they are, in
    batches with ``points`` (P, D), ``points_per_sample`` (B,) and ``index`` (B,); and masks (V, N) of each scene: ``label_store``,
    ``correction_dataloader()`` and ``point_masks(index)`` of the datamodule, or given here. Where the datamodule has
    ``clean_labels(index)``, the labels' precision is measured.
    Saves: the labels as they are.
    Refuses: runs without store, loader or masks; masks of another number of points; modules without the submodule; a training without an
    end.

    Args:
        num_classes: Number of classes.
        network: Submodule that maps points (P, D), and the clouds' sizes (B,) if its ``forward`` takes them, to logits (P, num_classes).
        min_purity: Share of a mask's labelled points that must have one class, in the spreading of given labels.
        min_count: Labelled points that a mask must have there.
        respread: Spread reliable pseudo-labels, too; False: the given labels alone.
        spread_start: Share of training after which pseudo-labels are spread.
        spread_every: Epochs between two rounds.
        spread_purity: As ``min_purity``, with pseudo-labels.
        spread_count: As ``min_count``, with pseudo-labels.
        spread_weight: Weight of labels from pseudo-labels; that of the others is 1.
        tau: Smallest confidence of a reliable point.
        kappa: Reliable points have a smaller uncertainty.
        anchors: Places of a cloud that deform their surroundings, in the two views that decide who is reliable.
        width: Standard deviation of their kernel; this and ``shift`` in shares of the cloud's radius.
        rotation: Largest angle about each axis, degrees.
        scale: Largest stretch, 1 or more.
        shift: Largest shift along each axis.
        dense: The network takes points (B, N, D), and gives (B, N, num_classes) or (B, num_classes, N).
        ignore_index: Label of points that have none.
        class_names: Names of the classes, for the pictures; None numbers them.
        seed: Seed of the views.
        store: Store of the labels; None: the datamodule's ``label_store``.
        loader: Training scenes as they are; None: the datamodule's ``correction_dataloader()``. Each of several ranks needs its own share.
        masks: Index of a scene -> (V, N) masks; None: the datamodule's ``point_masks``.

    Raises:
        ValueError: A value lies outside its range.
    """

    panels: ClassVar[tuple[Panel, ...]] = (
        Curve("Labels spread over masks", ("mask_spreading/extended", "mask_spreading/spread"), note="Shares of all training points."),
        Curve(
            "Precision of spread labels",
            ("mask_spreading/extended_precision", "mask_spreading/spread_precision"),
            note="Where all labels are known. Below about 0.9 the spread labels may cost more than they bring.",
            goal="max",
        ),
        Curve("Reliable points of the last pass", ("mask_spreading/reliable",), note="Share of all training points."),
        CloudPanel("Given labels", "mask_spreading/given", note="A training scene; grey points have no label."),
        CloudPanel("Labels now", "mask_spreading/now", note="The same scene with what masks have spread."),
        CloudPanel("Masks", "mask_spreading/masks", note="The same scene, colour: mask of the view that sees most of it."),
    )

    def __init__(
        self,
        num_classes: int,
        network: str = "network",
        min_purity: float = 1.0,
        min_count: int = 1,
        respread: bool = True,
        spread_start: float = 0.3,
        spread_every: int = 1,
        spread_purity: float = 0.9,
        spread_count: int = 5,
        spread_weight: float = 0.5,
        tau: float = 0.7,
        kappa: float = 0.05,
        anchors: int = 4,
        width: float = 0.5,
        rotation: float = 10.0,
        scale: float = 3.0,
        shift: float = 0.25,
        dense: bool = False,
        ignore_index: int = 255,
        class_names: Sequence[str] | None = None,
        seed: int = 0,
        store: LabelStore | None = None,
        loader: Iterable[Any] | None = None,
        masks: Callable[[int], NDArray[Any]] | None = None,
    ) -> None:
        super().__init__(store, loader, restart=True)
        checks.at_least(2, "classes", num_classes=num_classes)
        checks.share(min_purity=min_purity, spread_start=spread_start, spread_purity=spread_purity, spread_weight=spread_weight, tau=tau)
        checks.at_least(1, min_count=min_count, spread_every=spread_every, spread_count=spread_count)
        checks.positive(kappa=kappa)
        checks.at_least(0, seed=seed)
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(f"class_names has {len(class_names)} names, but num_classes={num_classes}")
        self.num_classes, self.network = num_classes, network
        self.first_votes = (min_purity, min_count)
        self.later_votes = (spread_purity, spread_count)
        self.respread, self.spread_start, self.spread_every, self.spread_weight = respread, spread_start, spread_every, spread_weight
        self.tau, self.kappa = tau, kappa
        self.deformation = deformation_of(anchors, width, rotation, scale, shift)
        self.dense, self.ignore_index, self.seed, self.given_masks = dense, ignore_index, seed, masks
        self.class_names = tuple(class_names or map(str, range(num_classes)))
        self._masks: Callable[[int], NDArray[Any]] | None = None
        self._sums = torch.zeros(len(_SUMS), dtype=torch.int64)
        self._figures: dict[str, float] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find store, loader, masks and network."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self._masks = self.given_masks or getattr(self.datamodule, "point_masks", None)
        if self._masks is None:
            raise ValueError(
                "MaskLabelSpreading spreads labels over masks, and there are none: give masks=, a function of a scene's index that returns "
                "(V, N) mask numbers of its points, -1 for none, or a datamodule with point_masks(index)"
            )
        if self.respread:
            self.when_built(pl_module, lambda: self._find(pl_module))

    def _find(self, pl_module: pl.LightningModule) -> None:
        with checks.naming(type(self).__name__):
            self._name = one_submodule(pl_module, self.network, "network")[0]

    # ---- before training ---------------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the store where the run is; in a fresh run, spread the given labels."""
        assert self.store is not None
        resumed = self._saved is not None
        super().on_fit_start(trainer, pl_module)
        if self.respread:
            training_length(pl_module, what="spread_start", instead=None)
        self._sums.zero_()
        if trainer.is_global_zero:
            self.store.clear_next()
        trainer.strategy.barrier("labels are spread")
        with self.store.writer(rank()) as writer:
            for index in range(rank(), len(self.store), world_size()):
                labels = self._extended(index)
                if not resumed:
                    writer.write(index, packed_labels(labels, labels != self.ignore_index))
        trainer.strategy.barrier("spread labels are written")
        if not resumed and trainer.is_global_zero:
            self.store.publish()
        trainer.strategy.barrier("spread labels are published")
        self._figures = self._measured()

    def _scene(self, index: int) -> tuple[Tensor, Tensor]:
        """Given labels (N,) and masks (V, N) of a scene."""
        assert self.store is not None
        assert self._masks is not None
        labels = unpacked_labels(self.store.original(index)).labels.astype(np.int64)
        masks = np.asarray(self._masks(index))
        if masks.ndim != 2 or masks.shape[1] != len(labels):
            raise ValueError(
                f"MaskLabelSpreading: the masks of scene {index} are {masks.shape}, and it has {len(labels)} points: expected (views, "
                f"{len(labels)})"
            )
        return torch.from_numpy(labels), torch.from_numpy(masks.astype(np.int64))

    def _extended(self, index: int) -> NDArray[np.int64]:
        """Given labels of a scene and what the masks make of them, counted."""
        labels, masks = self._scene(index)
        found = spread_masks(masks, labels, self.num_classes, *self.first_votes, self.ignore_index).labels
        new = (found != self.ignore_index) & (labels == self.ignore_index)
        self._count("points", torch.tensor(len(labels)))
        self._count_labels("extended", index, found, new)
        return found.numpy()

    # ---- at the end of epochs ----------------------------------------------------------------------------------------------------

    def wants(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        """Whether pseudo-labels are spread after this epoch."""
        if not self.respread or (trainer.current_epoch + 1) % self.spread_every:
            return False
        return trainer.global_step >= self.spread_start * training_length(pl_module, what="spread_start", instead=None)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Spread pseudo-labels, if it is time, and log what the labels are like."""
        super().on_train_epoch_end(trainer, pl_module)
        figures = {f"mask_spreading/{name}": value for name, value in self._figures.items()}
        log_global(pl_module, figures, batch_size=1)  # Lightning can't read it where a step fetches its batches itself

    def correct(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Correction:
        """One pass over the training scenes; called on all ranks."""
        self._sums.zero_()
        self._epoch = trainer.current_epoch
        found = super().correct(trainer, pl_module)
        self._figures = self._measured()
        return found

    def relabelled(self, trainer: pl.Trainer, twin: pl.LightningModule, batch: Any) -> Iterator[tuple[int, NDArray[Any]]]:
        """Scenes of a batch and their labels: given ones, those of the first spreading, and those of reliable pseudo-labels."""
        if not isinstance(batch, dict) or not {"points", "points_per_sample", "index"} <= set(batch):
            got = sorted(batch) if isinstance(batch, dict) else type(batch).__name__
            raise ValueError(f"MaskLabelSpreading needs batches with 'points', 'points_per_sample' and 'index' from its loader, got {got}")
        network = twin.get_submodule(self._name)
        for index, points in zip(batch["index"].tolist(), batch["points"].split(batch["points_per_sample"].tolist()), strict=True):
            pseudo = self._pseudo_labels(trainer, network, points.to(twin.device), index)
            fixed = torch.from_numpy(self._extended(index))
            masks = self._scene(index)[1]
            extra = spread_pseudo_labels(masks, fixed, pseudo, self.num_classes, *self.later_votes, self.ignore_index)
            self._count_labels("spread", index, extra, extra != self.ignore_index)
            self._count("passed", torch.tensor(len(points)))
            known = fixed != self.ignore_index
            weights = known + self.spread_weight * (extra != self.ignore_index)
            yield index, packed_labels(torch.where(known, fixed, extra).numpy(), weights.numpy())

    def _pseudo_labels(self, trainer: pl.Trainer, network: torch.nn.Module, points: Tensor, index: int) -> Tensor:
        """(N,) classes of a scene's reliable points, on the CPU; ``ignore_index`` for the others."""
        size = torch.tensor([len(points)], device=points.device)
        place = f"MaskLabelSpreading {self._epoch} {index}"
        views = deformed_views(points[:, :3], size, place, self.seed, self.deformation)
        with trainer.precision_plugin.forward_context():
            clouds = [torch.cat([moved, points[:, 3:]], dim=1) for moved in (points[:, :3], views.first, views.second)]
            logits = [cloud_logits(network, cloud, self.dense) for cloud in clouds]
        about = reliable_points(logits[0], logits[1], logits[2], self.tau, self.kappa)
        self._count("reliable", about.selected.sum())
        return torch.where(about.selected, about.pseudo_labels, self.ignore_index).cpu()

    # ---- figures and pictures ----------------------------------------------------------------------------------------------------

    def _count(self, name: str, number: Tensor) -> None:
        self._sums[_SUMS.index(name)] += number.cpu()

    def _count_labels(self, name: str, index: int, labels: Tensor, new: Tensor) -> None:
        self._count(name, new.sum())
        clean = getattr(self.datamodule, "clean_labels", None)
        if clean is not None:
            truth = torch.from_numpy(np.asarray(clean(index)).astype(np.int64))
            known = new & (truth != self.ignore_index)
            self._count(f"{name}_known", known.sum())
            self._count(f"{name}_right", (known & (labels == truth)).sum())

    def _measured(self) -> dict[str, float]:
        sums = dict(zip(_SUMS, sum_over_ranks(self._sums.clone()).tolist(), strict=True))
        found = {"extended": sums["extended"] / max(sums["points"], 1), "spread": sums["spread"] / max(sums["points"], 1)}
        found["reliable"] = sums["reliable"] / max(sums["passed"], 1)
        for name in ("extended", "spread"):
            if sums[f"{name}_known"]:
                found[f"{name}_precision"] = sums[f"{name}_right"] / sums[f"{name}_known"]
        return found

    def quality(self, labels: Callable[[int], Any]) -> None:
        """Not measured here: precision is, which leaves given labels out."""

    def dashboard_media(self) -> dict[str, Media]:
        """A training scene by given label, by label now, and by mask."""
        scene = getattr(self.datamodule, "training_scene", None)
        if scene is None or self.store is None or self._masks is None:
            return {}
        room = scene(0)
        points, masks = torch.from_numpy(room.points[:, :3]), self._scene(0)[1]
        found: dict[str, Media] = {}
        for key, stored in (("given", self.store.original(0)), ("now", self.store.current(0))):
            labels = torch.from_numpy(stored[0].astype(np.int64))
            found[f"mask_spreading/{key}"] = label_cloud(points, labels, self.class_names, f"labels {key}, scene {room.name}")
        view = masks[(masks >= 0).sum(1).argmax()] if len(masks) else torch.full((len(points),), -1)
        _, mask = np.unique(view.numpy(), return_inverse=True)
        colors = np.where(view.numpy()[:, None] >= 0, class_colors(int(mask.max(initial=0)) + 1)[mask], 90).astype(np.uint8)
        found["mask_spreading/masks"] = CloudMedia(points.numpy(), colors, f"masks of one view, scene {room.name}; grey: none")
        return found


__all__ = ["MaskLabelSpreading"]
