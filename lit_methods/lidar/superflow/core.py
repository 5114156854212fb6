r"""SuperFlow++ maths: tensors in, tensors out.

Sources: SuperFlow++ (arXiv:2503.19912) and its predecessor SuperFlow (arXiv:2407.06190). The golden vectors were made with the authors'
code, Xiangxu-0103/SuperFlow at commit 7dbdd1c (``superflow/models/selfsup/superflow.py``). The rule of temporal voting is not public: ours
is a reconstruction from the paper's abstract.

Projection, voxels, InfoNCE and the Lovasz loss are the family's: :mod:`~lit_methods.lidar.projection`, :mod:`~lit_methods.lidar.voxels`,
:mod:`~lit_methods.lidar.contrast`, :mod:`~lit_methods.lidar.point_losses`. Their names are here, too. Order of this file: pooling, losses,
temporal voting.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_methods import checks
from lit_methods.lidar.contrast import effective_rank, group_mean, info_nce, retrieval_accuracy, wide
from lit_methods.lidar.point_losses import lovasz_softmax, segmentation_losses
from lit_methods.lidar.projection import dense_cloud, flip_cameras, project_points, resize_pairs, resize_superpixels
from lit_methods.lidar.voxels import Voxels, voxelize

# ---------------------------------------------------------------------------------------------------------------------------- pooling


def to_batch_rows(local: Tensor, counts: Tensor, sizes: Tensor) -> Tensor:
    """Indices local to a sample -> rows of the batch's concatenated list.

    Args:
        local: (n,) int64, entries of all samples one after the other.
        counts: (B,) int64, entries per sample, sum n.
        sizes: (B,) int64, length of each sample's part of the list that is indexed.

    Returns:
        (n,) int64, a new tensor.
    """
    return local + torch.repeat_interleave(sizes.cumsum(0) - sizes, counts, output_size=local.shape[0])


def superpixel_groups(superpixels: Tensor, num_superpixels: int, view_consistency: bool = True) -> Tensor:
    """Group of every pixel. With view consistency, one id is one group in all cameras of a sample.

    Args:
        superpixels: (B, c, H, W) int64 ids in 0..num_superpixels-1. Id 0 is an id like the others.
        num_superpixels: S.
        view_consistency: False gives every image its own S groups.

    Returns:
        (B, c, H, W) int64 in 0..B*S-1, or 0..B*c*S-1 without view consistency.
    """
    batch, cameras = superpixels.shape[:2]
    image = torch.arange(batch * cameras, device=superpixels.device).view(batch, cameras, 1, 1)
    return superpixels + num_superpixels * (image // cameras if view_consistency else image)


class Pairs(NamedTuple):
    """Point-pixel pairs of a batch, samples one after the other.

    Attributes:
        points: (M,) int64, point index local to the sample.
        images: (M, 3) int64 (camera local to the sample, row, column).
        per_sample: (B,) int64.
    """

    points: Tensor
    images: Tensor
    per_sample: Tensor


def look_up_pairs(pairs: Pairs, point2voxel: Tensor, points_per_sample: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Voxel and group of every pair. Out of place: a batch can be used again.

    Args:
        pairs: Point-pixel pairs.
        point2voxel: (N,) int64, row of each point's voxel in the batch's voxel list.
        points_per_sample: (B,) int64.
        groups: (B, c, H, W) int64, group of every pixel.

    Returns:
        ``pair_voxel`` (M,) and ``pair_group`` (M,), int64.
    """
    batch, cameras = groups.shape[:2]
    point = to_batch_rows(pairs.points, pairs.per_sample, points_per_sample)
    image = to_batch_rows(pairs.images[:, 0], pairs.per_sample, torch.full((batch,), cameras, device=groups.device))
    return point2voxel[point], groups.flatten(0, 1)[image, pairs.images[:, 1], pairs.images[:, 2]]


def pool_points(voxel_embeddings: Tensor, pair_voxel: Tensor, pair_group: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Mean L2-normalised voxel embedding over the pairs of each group: K of the paper.

    Args:
        voxel_embeddings: (V, D) raw.
        pair_voxel: (M,) int64, row of each pair's voxel. A point seen by two cameras counts twice.
        pair_group: (M,) int64, group of each pair's pixel.
        num_groups: G.

    Returns:
        K (G, D) and the number of pairs (G,).
    """
    return group_mean(F.normalize(wide(voxel_embeddings), dim=1)[pair_voxel], pair_group, num_groups)


def pool_pixels(pixel_embeddings: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """Mean L2-normalised pixel embedding over ALL pixels of each group, paired or not: Q of the paper.

    Args:
        pixel_embeddings: (n, D, H, W) raw, at full resolution.
        groups: int64 of n * H * W entries in the same order.
        num_groups: G.

    Returns:
        Q (G, D).
    """
    pixels = wide(pixel_embeddings).permute(0, 2, 3, 1).flatten(0, 2)
    return group_mean(F.normalize(pixels, dim=1), groups.flatten(), num_groups)[0]


# ----------------------------------------------------------------------------------------------------------------------------- losses


def dense_to_sparse_loss(
    k: Tensor, k_dense: Tensor, mask: Tensor, temperature: float = 0.07, mode: Literal["nce", "cosine"] = "nce"
) -> Tensor:
    """Agreement of a scan's groups with those of its dense, multi-sweep cloud.

    Args:
        k: (G, D) pooled embeddings of the scan.
        k_dense: (G, D) pooled embeddings of the dense cloud.
        mask: (G,) bool, groups of the SCAN with a pair; a group without a dense pair stays in, as a zero row.
        temperature: Temperature of ``nce``.
        mode: ``nce`` as the authors' code, ``cosine`` = mean(1 - <k, k_dense>) as the ECCV paper states it (mem).

    Returns:
        Scalar.
    """
    checks.one_of(("nce", "cosine"), mode=mode)
    if mode == "nce":
        return info_nce(k, k_dense, temperature, mask)
    return torch.where(mask, 1 - (wide(k) * wide(k_dense)).sum(1), 0.0).sum() / mask.sum().clamp(min=1)


class PooledView(NamedTuple):
    """A cloud (and its images) pooled over groups.

    Attributes:
        points: (G, D), K.
        mask: (G,) bool, groups with at least one pair.
        pixels: (G, D), Q; None for the dense cloud, which has no images of its own.
    """

    points: Tensor
    mask: Tensor
    pixels: Tensor | None = None


def superflow_losses(
    cur: PooledView,
    neighbours: Sequence[PooledView] = (),
    dense: PooledView | None = None,
    *,
    temperature: float = 0.07,
    d2s_mode: Literal["nce", "cosine"] = "nce",
    use_temporal: bool = True,
    spatial_neighbours: bool = True,
) -> dict[str, Tensor]:
    """The three losses of SuperFlow; gradients flow into both arguments of every contrast.

    Args:
        cur: The key frame.
        neighbours: Its previous and next key frames; their groups are matched to ``cur``'s by position.
        dense: The key frame's multi-sweep cloud; None leaves the dense-to-sparse term out.
        temperature: Temperature of every InfoNCE.
        d2s_mode: See :func:`dense_to_sparse_loss`.
        use_temporal: False leaves the flow-based temporal term out.
        spatial_neighbours: False keeps the spatial term to ``cur``.

    Returns:
        ``spatial``, ``d2s``, ``temporal`` (those that are on) and their sum ``total``, scalars.
    """
    losses = {}
    views = [cur, *neighbours] if spatial_neighbours else [cur]
    spatial = [info_nce(view.points, view.pixels, temperature, view.mask) for view in views if view.pixels is not None]
    losses["spatial"] = torch.stack(spatial).mean()
    if dense is not None:
        losses["d2s"] = dense_to_sparse_loss(cur.points, dense.points, cur.mask, temperature, d2s_mode)
    if use_temporal and neighbours:
        flow = [info_nce(cur.points, view.points, temperature, cur.mask & view.mask) for view in neighbours]
        losses["temporal"] = torch.stack(flow).mean()
    losses["total"] = torch.stack(list(losses.values())).sum()
    return losses


# -------------------------------------------------------------------------------------------------------------------- temporal voting


class Vote(NamedTuple):
    """Outcome of temporal voting for the points of the current frame, in input order.

    Attributes:
        labels: (n,) int64, ``ignore_index`` below the confidence threshold.
        confidence: (n,) largest probability, given also where the label is ignored.
        num_frames: (n,) int64, different frames with a point in the point's voxel.
        probs: (n, C) the distribution that decided.
    """

    labels: Tensor
    confidence: Tensor
    num_frames: Tensor
    probs: Tensor


def temporal_vote(
    points: Tensor,
    frame: Tensor,
    frame_to_current: Tensor,
    probs: Tensor,
    current_frame: int,
    voxel_size: float = 0.25,
    min_frames: int = 2,
    confidence_threshold: float = 0.0,
    ignore_index: int = -100,
    mode: Literal["soft", "hard"] = "soft",
    exclude_classes: Sequence[int] = (),
    sample: Tensor | None = None,
) -> Vote:
    """Let neighbouring scans vote on each other's predictions in a common voxel grid (SuperFlow++, our reconstruction).

    Args:
        points: (N, >= 3) x, y, z in metres, each point in its own frame's coordinates.
        frame: (N,) int64 in 0..S-1.
        frame_to_current: (S, 4, 4), or (B, S, 4, 4) with ``sample``: rigid motion of each frame into the current one.
        probs: (N, C) class probabilities.
        current_frame: Frame whose points are answered.
        voxel_size: Edge of the Cartesian voxels, metres.
        min_frames: A voxel with points of fewer frames doesn't vote: its points keep their own distribution.
        confidence_threshold: Labels with a confidence below it become ``ignore_index`` (equal is kept).
        ignore_index: Label of unsure points.
        mode: ``soft`` adds probabilities up, ``hard`` one-hot votes; the fallback is the own soft distribution in
            both.
        exclude_classes: Points predicted as one of these (moving objects, say) neither give nor take votes.
        sample: (N,) int64, sample of each point in a batch of scenes; None for a single scene.

    Returns:
        The vote, for the current frame's points in input order. Ties go to the lowest class.
    """
    checks.one_of(("soft", "hard"), mode=mode)
    sample = torch.zeros_like(frame) if sample is None else sample
    motion = frame_to_current.double().reshape(-1, frame_to_current.shape[-3], 4, 4)[sample, frame]
    position = (motion[:, :3, :3] @ points[:, :3, None].double()).squeeze(2) + motion[:, :3, 3]
    cell = torch.cat([sample[:, None], torch.floor(position / voxel_size).long()], dim=1)
    voxel = torch.unique(cell, dim=0, return_inverse=True)[1]

    own_label = probs.argmax(dim=1)
    excluded = torch.isin(own_label, torch.tensor(list(exclude_classes), dtype=torch.long, device=probs.device))
    ballots = probs if mode == "soft" else F.one_hot(own_label, probs.shape[1]).to(probs.dtype)
    voter = ~excluded
    num_voxels = points.shape[0]  # an upper bound that needs no host sync
    total = ballots.new_zeros(num_voxels, probs.shape[1]).index_add(0, voxel, ballots * voter[:, None])
    count = ballots.new_zeros(num_voxels).index_add(0, voxel, voter.to(ballots.dtype))
    num_frames = frame_to_current.shape[-3]
    seen = torch.zeros(num_voxels * num_frames, dtype=torch.long, device=points.device)
    seen[(voxel * num_frames + frame)[voter]] = 1
    frames = seen.view(num_voxels, num_frames).sum(1)

    here = frame == current_frame
    at, own = voxel[here], probs[here]
    votes = (frames[at] >= min_frames) & voter[here]
    decided = torch.where(votes[:, None], total[at] / count[at].clamp(min=1)[:, None], own)
    confidence = decided.max(dim=1).values
    labels = torch.where(confidence < confidence_threshold, ignore_index, decided.argmax(dim=1))
    return Vote(labels, confidence, frames[at], decided)


__all__ = [
    "Pairs", "PooledView", "Vote", "Voxels", "dense_cloud", "dense_to_sparse_loss", "effective_rank", "flip_cameras", "group_mean",
    "info_nce", "look_up_pairs", "lovasz_softmax", "pool_pixels", "pool_points", "project_points", "resize_pairs", "resize_superpixels",
    "retrieval_accuracy", "segmentation_losses", "superflow_losses", "superpixel_groups", "temporal_vote", "to_batch_rows", "voxelize",
    "wide",
]  # fmt: skip
