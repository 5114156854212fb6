"""Dense-to-sparse regularisation of SuperFlow (arXiv:2407.06190, arXiv:2503.19912) for any module that yields point features."""

from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from lit_methods.callbacks.loss_term import LossTerm
from lit_methods.lidar.minkunet import VoxelFeatures
from lit_methods.lidar.superflow import core
from lit_methods.lidar.superpixels import agree_on_superpixels
from lit_methods.panels import Curve, Panel


def _voxels(features: Any, number: int) -> VoxelFeatures:
    """Per-voxel output as it is; a per-point tensor (N, C) as voxels of one point each."""
    if isinstance(features, VoxelFeatures):
        return features
    if not isinstance(features, Tensor) or features.ndim != 2 or features.shape[0] != number:
        got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise TypeError(f"DenseToSparse needs (N, C) features of the {number} points, or VoxelFeatures, from its target; got {got}")
    rows = torch.arange(number, device=features.device)
    return VoxelFeatures(features, rows, rows)


class DenseToSparse(LossTerm):
    """Adds the agreement between a scan's superpixel groups and those of its multi-sweep cloud to the loss.

    The groups' mean features of the scan and of the dense cloud are contrasted (``nce``) or aligned (``cosine``).

    Runs: around ``training_step``. The target is a network ``(points, points_per_sample) -> (N, C) features or VoxelFeatures``; its
    features of the scan are caught where the module computes them (at its first call in a step), and it runs again on ``batch["dense"]``.
    The batch is a pretraining batch of the driving family or any dict with the same keys (the scan under ``cur`` or at the top level).
    Saves: nothing.
    Refuses: batches without superpixels, pairs or the dense cloud, and a target that matches several submodules.

    Args:
        target: fnmatch pattern of the submodule, such as ``backbone_3d``.
        weight: Factor of the term, >= 0.
        num_superpixels: Superpixel ids per sample.
        temperature: Divides the cosines in mode ``nce``.
        mode: ``nce`` as the authors' code, ``cosine`` as the ECCV paper states it (mem).
        view_consistency: One id is one group in all cameras.
    """

    panels: ClassVar[tuple[Panel, ...]] = (
        Curve("Dense-to-sparse term", ("dense_to_sparse/loss",), goal="min"),
        Curve("Dense-to-sparse retrieval", ("dense_to_sparse/top1",), note="Share of groups that find their own dense group.", goal="max"),
    )

    def __init__(
        self,
        target: str = "backbone_3d",
        weight: float = 1.0,
        num_superpixels: int = 17,
        temperature: float = 0.07,
        mode: Literal["nce", "cosine"] = "nce",
        view_consistency: bool = True,
    ) -> None:
        super().__init__([target], weight)
        self.num_superpixels, self.temperature, self.mode, self.view_consistency = num_superpixels, temperature, mode, view_consistency

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Compare with the data's number of superpixels."""
        if stage == "fit":
            agree_on_superpixels(trainer, self.num_superpixels, type(self).__name__)
        super().setup(trainer, pl_module, stage)

    def term(self, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The term and its retrieval accuracy; see :func:`lit_methods.lidar.superflow.core.dense_to_sparse_loss`."""
        batch = inputs["batch"]
        scan = batch.get("cur", batch)
        missing = [key for key in ("superpixels", "pairing_points") if key not in scan] + [key for key in ("dense",) if key not in batch]
        if missing:
            raise ValueError(f"DenseToSparse finds no {', '.join(missing)} in the batch: use mode: pretrain with num_sweeps >= 1")
        (name, calls), *more = inputs["feature_calls"].items()
        if more:
            raise ValueError(
                f"DenseToSparse takes one submodule, but its target matches {sorted(inputs['feature_calls'])}: be more specific"
            )
        groups = core.superpixel_groups(scan["superpixels"], self.num_superpixels, self.view_consistency)
        num_groups = self.num_superpixels * groups.shape[0] * (1 if self.view_consistency else groups.shape[1])
        dense = batch["dense"]
        network = inputs["module"].get_submodule(name)
        again = self.run_again(dense, lambda cloud: network(cloud["points"], cloud["points_per_sample"])).output
        pooled = []
        for cloud, output in ((scan, calls[0]), (dense, again)):
            voxels = _voxels(output, cloud["points"].shape[0])
            pairs = core.Pairs(cloud["pairing_points"], cloud["pairing_images"], cloud["pairs_per_sample"])
            pair_voxel, pair_group = core.look_up_pairs(pairs, voxels.point2voxel, cloud["points_per_sample"], groups)
            pooled.append(core.pool_points(voxels.features, pair_voxel, pair_group, num_groups))
        (sparse_mean, counts), (dense_mean, _) = pooled
        mask = counts > 0
        loss = core.dense_to_sparse_loss(sparse_mean, dense_mean, mask, self.temperature, self.mode)
        return loss, {"top1": core.retrieval_accuracy(sparse_mean, dense_mean, mask)}
