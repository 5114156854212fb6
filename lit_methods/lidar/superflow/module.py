"""SuperFlow++ pretraining as a LightningModule. The maths stands in :mod:`lit_methods.lidar.superflow.core`."""

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from lit_methods import checks
from lit_methods.catalog import Technique
from lit_methods.distributed import gather_rows
from lit_methods.frozen import Frozen
from lit_methods.lidar import pictures
from lit_methods.lidar.minkunet import VoxelFeatures
from lit_methods.lidar.superflow import core
from lit_methods.lidar.superpixels import agree_on_superpixels
from lit_methods.optim import adamw_one_cycle
from lit_methods.panels import CloudPanel, Curve, ImagePanel, Media, Panel

TECHNIQUE = Technique(
    slug="superflow",
    title="SuperFlow++: Enhanced Spatiotemporal Consistency for Image-to-LiDAR Data Pretraining",
    arxiv="2503.19912",
    family="lidar",
    form="module",
    classes=(
        "lit_methods.lidar.superflow.SuperFlow",
        "lit_methods.lidar.segmentor.PointSegmentor",
        "lit_methods.callbacks.lidar.dense_to_sparse.DenseToSparse",
        "lit_methods.callbacks.lidar.temporal_voting.TemporalVoting",
    ),
    configs=("superflow.yaml", "superflow_probe.yaml", "superflow_semi.yaml", "superflow_slidr.yaml", "superflow_ppkt.yaml"),
    golden=(
        "infonce",
        "loss",
        "voxelize",
        "project",
        "pairs_resize_flip",
        "sweeps",
        "seg_loss",
        "temporal_vote",
        "temporal_vote_hard",
    ),
    claim="A linear probe on the pretrained, frozen 3D backbone reaches a higher mIoU than one on the random, frozen backbone.",
    summary="Pretrains a sparse 3D U-Net on LiDAR without labels by contrast with a frozen image encoder over semantic superpixels, "
    "view consistency, dense-to-sparse agreement and flow over neighbouring frames; votes over neighbouring scans downstream.",
)


class SuperFlow(LightningModule):
    """Image-to-LiDAR pretraining with semantic superpixels (arXiv:2503.19912, arXiv:2407.06190).

    A step embeds four clouds (the key frame, its neighbours, its dense multi-sweep cloud) and the images of three key frames, pools both
    over superpixels to K and Q, and adds up InfoNCE(K, Q) (spatial), InfoNCE(K, K of the dense cloud) and InfoNCE(K, K of a neighbour)
    (flow). Baselines by configuration: SLidR = ``view_consistency: false, use_d2s: false, use_temporal: false`` with SLIC superpixels and
    one frame (``configs/superflow_slidr.yaml``); PPKT = the same with ``contrast: pixel`` (``configs/superflow_ppkt.yaml``).

    Runs: batches of :class:`lit_methods.datamodules.NuScenesDataModule` with ``mode: pretrain``. Negatives are those of the local batch, or
    of all ranks with ``gather_negatives``. The number of groups, hence of negatives, is that of one micro-batch: gradient accumulation
    doesn't raise it.

    Saves: 3D backbone, both heads, optimiser, schedule. The teacher is frozen and stays out of optimiser, checkpoint and DDP.

    Refuses: ``use_d2s`` with batches that have no dense cloud; a training without an end.

    Args:
        backbone_3d: (points, points_per_sample) -> ``VoxelFeatures`` with an attribute ``out_channels``, such as
            ``MinkUNet``.
        backbone_2d: Image teacher, (n, 3, H, W) in [0, 1] -> (n, C, H / stride, W / stride), with ``embed_dim`` and
            ``stride``.
        num_superpixels: Ids per sample (17 semantic categories), or per image without view consistency.
        embed_dim: Width D of the common space.
        temperature: Temperature of every InfoNCE.
        view_consistency: One id is one group in all cameras of a sample; False: every image has groups of its own.
        use_d2s: Dense-to-sparse regularisation; needs ``batch["dense"]``.
        d2s_mode: ``nce`` as the authors' code, ``cosine`` as the ECCV paper states it (mem).
        use_temporal: Flow-based contrast with the neighbouring key frames that the batch holds.
        spatial_neighbours: Also contrast the neighbours with their own images.
        contrast: ``superpixel``, or ``pixel`` for PPKT: sampled point-pixel pairs instead of groups, no other term.
        num_pixel_pairs: Pairs per batch with ``contrast: pixel`` (4096 in SLidR's PPKT, mem).
        gather_negatives: Contrast with the groups of all ranks, gradient included.
        learning_rate: Peak of the one-cycle schedule.
        weight_decay: AdamW's weight decay.
        pct_start: Share of the steps in which the learning rate rises.
    """

    panels: ClassVar[tuple[Panel, ...]] = (
        Curve(
            "Loss terms",
            ("superflow/loss", "superflow/loss_spatial", "superflow/loss_d2s", "superflow/loss_temporal", "superflow/val_loss"),
            note="Each InfoNCE starts near the logarithm of the number of groups; all terms should fall together.",
            goal="min",
        ),
        Curve(
            "Retrieval accuracy",
            ("superflow/top1_spatial", "superflow/top1_d2s", "superflow/top1_temporal", "superflow/val_top1_spatial"),
            note="Share of groups whose nearest partner is their own.",
            goal="max",
        ),
        Curve("Groups per step", ("superflow/num_groups",), note="A fall means fewer negatives."),
        Curve("Point-pixel pairs per step", ("superflow/num_pairs",)),
        Curve("Cosine of positive and negative pairs", ("superflow/positive_cosine", "superflow/negative_cosine")),
        Curve("Effective rank of the pooled embeddings", ("superflow/effective_rank",), note="Falling towards 1 is collapse.", goal="max"),
        ImagePanel("Superpixels and projected points", "superflow/superpixels", note="Point colour is depth; edges must line up."),
        CloudPanel("Embeddings of a held-out scan", "superflow/embedding_cloud", note="Colour: first three principal components."),
    )

    def __init__(
        self,
        backbone_3d: nn.Module,
        backbone_2d: nn.Module,
        num_superpixels: int = 17,
        embed_dim: int = 64,
        temperature: float = 0.07,
        view_consistency: bool = True,
        use_d2s: bool = True,
        d2s_mode: Literal["nce", "cosine"] = "nce",
        use_temporal: bool = True,
        spatial_neighbours: bool = True,
        contrast: Literal["superpixel", "pixel"] = "superpixel",
        num_pixel_pairs: int = 4096,
        gather_negatives: bool = False,
        learning_rate: float = 0.01,
        weight_decay: float = 0.01,
        pct_start: float = 0.2,
    ) -> None:
        super().__init__()
        checks.at_least(1, num_superpixels=num_superpixels, embed_dim=embed_dim, num_pixel_pairs=num_pixel_pairs)
        checks.positive(temperature=temperature, learning_rate=learning_rate)
        checks.at_least(0, weight_decay=weight_decay)
        checks.within("(0, 1)", "the share of the steps that rise", pct_start=pct_start)
        self.save_hyperparameters(ignore=["backbone_3d", "backbone_2d"])
        self.backbone_3d = backbone_3d
        self.teacher = Frozen(backbone_2d)
        self.head_3d = nn.Linear(int(backbone_3d.out_channels), embed_dim)  # type: ignore[arg-type]
        self.head_2d = nn.Conv2d(int(backbone_2d.embed_dim), embed_dim, kernel_size=1)  # type: ignore[arg-type]
        self._media: dict[str, Media] = {}

    def setup(self, stage: str) -> None:
        """Compare with the data's number of superpixels."""
        if stage != "predict" and self.hparams["contrast"] != "pixel":
            agree_on_superpixels(self._trainer, self.hparams["num_superpixels"], type(self).__name__)

    # --------------------------------------------------------------------------------------------------------------------- embeddings

    def embed_points(self, cloud: dict[str, Any]) -> VoxelFeatures:
        """Raw voxel embeddings, width ``embed_dim``."""
        voxels: VoxelFeatures = self.backbone_3d(cloud["points"], cloud["points_per_sample"])
        return voxels._replace(features=self.head_3d(voxels.features))

    def embed_images(self, images: Tensor) -> Tensor:
        """(B, c, 3, H, W) in [0, 1] -> (B * c, embed_dim, H, W), raw."""
        # channels last: pooling reads pixel by pixel
        features = self.head_2d(self.teacher(images.flatten(0, 1))).contiguous(memory_format=torch.channels_last)
        return F.interpolate(features, size=images.shape[-2:], mode="bilinear", align_corners=True)

    def pool(self, cloud: dict[str, Any], groups: Tensor, num_groups: int, images: Tensor | None) -> core.PooledView:
        """Embed a cloud, and images if given, and pool both over the groups."""
        voxels = self.embed_points(cloud)
        pairs = core.Pairs(cloud["pairing_points"], cloud["pairing_images"], cloud["pairs_per_sample"])
        pair_voxel, pair_group = core.look_up_pairs(pairs, voxels.point2voxel, cloud["points_per_sample"], groups)
        points, counts = core.pool_points(voxels.features, pair_voxel, pair_group, num_groups)
        pixels = None if images is None else core.pool_pixels(self.embed_images(images), groups, num_groups)
        if self.hparams["gather_negatives"]:
            points, counts = gather_rows(points), gather_rows(counts, with_grad=False)
            pixels = None if pixels is None else gather_rows(pixels)
        return core.PooledView(points, counts > 0, pixels)

    # -------------------------------------------------------------------------------------------------------------------------- steps

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Four 3D and three 2D forwards, one backward."""
        return self._step(batch, "")

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """The same losses on held-out scenes, without augmentation; the first batch is drawn for the dashboard."""
        self._step(batch, "val_")
        if batch_idx == 0 and self.trainer.is_global_zero:
            self._draw(batch)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """The same losses on the test split."""
        self._step(batch, "test_")

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """``token`` list[str] and ``embeddings`` list of (n_i, embed_dim): the L2-normalised embedding of every point of the key scans."""
        embeddings = F.normalize(core.wide(self.embed_points(batch["cur"]).at_points()), dim=1)
        return {"token": batch["token"], "embeddings": list(embeddings.split(batch["cur"]["points_per_sample"].tolist()))}

    def _step(self, batch: dict[str, Any], prefix: str) -> Tensor:
        cur, size = batch["cur"], len(batch["token"])
        if self.hparams["contrast"] == "pixel":
            loss, logs = self._pixel_contrast(cur)
        else:
            loss, logs = self._superpixel_contrast(batch)
        logs["num_pairs"] = cur["pairs_per_sample"].sum().float()
        logged = {f"superflow/{prefix}{name}": value.detach() for name, value in logs.items()}
        self.log_dict(logged, batch_size=size, sync_dist=bool(prefix), on_step=not prefix, on_epoch=bool(prefix))
        self.log(f"superflow/{prefix}loss", loss.detach(), batch_size=size, prog_bar=True, sync_dist=bool(prefix))
        return loss

    def _superpixel_contrast(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        hp = self.hparams
        frames = [batch[name] for name in ("cur", "prev", "next") if name in batch]
        if not hp["use_temporal"] and not hp["spatial_neighbours"]:
            frames = frames[:1]
        samples, cameras = frames[0]["superpixels"].shape[:2]
        num_groups = hp["num_superpixels"] * samples * (1 if hp["view_consistency"] else cameras)
        groups = [core.superpixel_groups(frame["superpixels"], hp["num_superpixels"], hp["view_consistency"]) for frame in frames]
        cur, *neighbours = [
            self.pool(frame, ids, num_groups, frame["images"] if index == 0 or hp["spatial_neighbours"] else None)
            for index, (frame, ids) in enumerate(zip(frames, groups, strict=True))
        ]
        dense = None
        if hp["use_d2s"]:
            if "dense" not in batch:
                raise ValueError(
                    "use_d2s needs batch['dense'], the multi-sweep cloud: set num_sweeps >= 1 in the datamodule, or use_d2s: false"
                )
            dense = self.pool(batch["dense"], groups[0], num_groups, None)
        losses = core.superflow_losses(
            cur,
            neighbours,
            dense,
            temperature=hp["temperature"],
            d2s_mode=hp["d2s_mode"],
            use_temporal=hp["use_temporal"],
            spatial_neighbours=hp["spatial_neighbours"],
        )
        logs = {f"loss_{name}": value for name, value in losses.items() if name != "total"}
        logs |= contrast_report(cur, neighbours, dense)
        return losses["total"], logs

    def _pixel_contrast(self, cur: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        voxels, pixels = self.embed_points(cur), self.embed_images(cur["images"])
        index = torch.arange(pixels.shape[0] * pixels.shape[2] * pixels.shape[3], device=pixels.device)
        pairs = core.Pairs(cur["pairing_points"], cur["pairing_images"], cur["pairs_per_sample"])
        flat_pixel = index.view(*cur["superpixels"].shape)  # every pixel is its own group
        pair_voxel, pair_pixel = core.look_up_pairs(pairs, voxels.point2voxel, cur["points_per_sample"], flat_pixel)
        chosen = torch.randperm(pair_voxel.shape[0], device=pair_voxel.device)[: self.hparams["num_pixel_pairs"]]
        k = F.normalize(core.wide(voxels.features), dim=1)[pair_voxel[chosen]]
        q = F.normalize(core.wide(pixels).permute(0, 2, 3, 1).flatten(0, 2)[pair_pixel[chosen]], dim=1)
        if self.hparams["gather_negatives"]:
            k, q = gather_rows(k), gather_rows(q)
        view = core.PooledView(k, torch.ones(k.shape[0], dtype=torch.bool, device=k.device), q)
        losses = core.superflow_losses(view, temperature=self.hparams["temperature"])
        return losses["total"], {"loss_spatial": losses["spatial"]} | contrast_report(view, [], None)

    def _draw(self, batch: dict[str, Any]) -> None:
        cur = batch["cur"]
        first = int(cur["points_per_sample"][0])
        with torch.no_grad():
            embedding = F.normalize(self.embed_points(cur).at_points()[:first], dim=1)
        points = cur["points"][:first, :3]
        self._media = {
            "superflow/superpixels": pictures.superpixel_overlay(cur),
            "superflow/embedding_cloud": pictures.feature_cloud(points, embedding, "Colour: principal components of the voxel embeddings"),
        }

    def dashboard_media(self) -> dict[str, Media]:
        """Pictures of the last validation's first batch."""
        return self._media

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW with one cycle per run (betas .9, .999, eps 1e-6)."""
        hp = self.hparams
        return adamw_one_cycle(self, learning_rate=hp["learning_rate"], weight_decay=hp["weight_decay"], pct_start=hp["pct_start"])


def contrast_report(cur: core.PooledView, neighbours: list[core.PooledView], dense: core.PooledView | None) -> dict[str, Tensor]:
    """What to watch of one step, as tensors: top-1 retrieval of every contrast, groups, positive and negative cosine, effective rank."""
    report = {"num_groups": cur.mask.sum().float(), "effective_rank": core.effective_rank(cur.points, cur.mask)}
    if cur.pixels is not None:
        report["top1_spatial"] = core.retrieval_accuracy(cur.points, cur.pixels, cur.mask)
        k, q = F.normalize(cur.points.detach(), dim=1), F.normalize(cur.pixels.detach(), dim=1)
        cosine, pairs = k @ q.T, cur.mask[:, None] & cur.mask[None]
        same = pairs & torch.eye(len(k), dtype=torch.bool, device=k.device)
        for name, chosen in (("positive", same), ("negative", pairs & ~same)):
            report[f"{name}_cosine"] = torch.where(chosen, cosine, 0.0).sum() / chosen.sum().clamp(min=1)
    if dense is not None:
        report["top1_d2s"] = core.retrieval_accuracy(cur.points, dense.points, cur.mask)
    if neighbours:
        hits = [core.retrieval_accuracy(cur.points, view.points, cur.mask & view.mask) for view in neighbours]
        report["top1_temporal"] = torch.stack(hits).mean()
    return report
