r"""SuperFlow++ maths: tensors in, tensors out.

Sources: SuperFlow++ (arXiv:2503.19912) and its predecessor SuperFlow (arXiv:2407.06190). The golden vectors of this
file were made with the authors' code, Xiangxu-0103/SuperFlow at commit 7dbdd1c:
``superflow/models/selfsup/superflow.py`` (losses), ``superflow/models/data_preprocessors/data_preprocessor.py``
(voxels), ``superflow/datasets/transforms`` (projection, pairs, sweeps); the Lovasz loss with MMDetection3D at
fe25f7a. The rule of temporal voting is not public: ours is a reconstruction from the paper's abstract.

Order of this file: projection and pairs, dense cloud, voxels, pooling, losses, segmentation loss, temporal voting.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

VoxelType = Literal["cylinder", "cubic"]


def wide(x: Tensor) -> Tensor:
    """``x`` in float32 or wider (float64 stays): the precision in which pooling and contrast are computed."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# --------------------------------------------------------------------------------------------------------------- projection and pairs


def _rotate(points: Tensor, rotation: Tensor) -> Tensor:
    """``R p`` for each row p, computed in float64 and rounded to the points' float32 as the reference does between any two steps."""
    return (points.double() @ rotation.double().T).to(points.dtype)


def _translate(points: Tensor, translation: Tensor) -> Tensor:
    return (points.double() + translation.double()).to(points.dtype)


def project_points(
    points: Tensor,
    lidar2ego_rotation: Tensor,
    lidar2ego_translation: Tensor,
    ego2global_rotation: Tensor,
    ego2global_translation: Tensor,
    cam_sensor2ego_rotation: Tensor,
    cam_sensor2ego_translation: Tensor,
    cam_ego2global_rotation: Tensor,
    cam_ego2global_translation: Tensor,
    cam_intrinsic: Tensor,
    image_height: int,
    image_width: int,
    min_dist: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Pair LiDAR points with the pixels that they fall on, through the poses at the LiDAR's and each camera's time.

    Args:
        points: (N, >= 3) float32, x, y, z in metres in the LiDAR frame.
        lidar2ego_rotation: (3, 3) LiDAR -> vehicle; likewise ``lidar2ego_translation`` (3,), metres.
        lidar2ego_translation: See above.
        ego2global_rotation: (3, 3) vehicle -> world at the LiDAR's time; likewise ``ego2global_translation`` (3,).
        ego2global_translation: See above.
        cam_sensor2ego_rotation: (c, 3, 3) camera -> vehicle; likewise ``cam_sensor2ego_translation`` (c, 3).
        cam_sensor2ego_translation: See above.
        cam_ego2global_rotation: (c, 3, 3) vehicle -> world at each camera's time; likewise
            ``cam_ego2global_translation`` (c, 3).
        cam_ego2global_translation: See above.
        cam_intrinsic: (c, 3, 3) pinhole matrices for the native image size.
        image_height: Native height in pixels, the same for all cameras.
        image_width: Native width in pixels.
        min_dist: Points at this depth or nearer are dropped, metres.

    Returns:
        ``pairing_points`` (M,) int64 row in ``points``, and ``pairing_images`` (M, 3) int64 (camera, row, column);
        cameras one after the other, points in input order. A pixel is kept when 0 < u < W-1 and 0 < v < H-1 before
        rounding half to even.
    """
    rows, pixels = [], []
    world = _translate(_rotate(points[:, :3], lidar2ego_rotation), lidar2ego_translation)
    world = _translate(_rotate(world, ego2global_rotation), ego2global_translation)
    for camera in range(cam_intrinsic.shape[0]):
        ego = _rotate(_translate(world, -cam_ego2global_translation[camera]), cam_ego2global_rotation[camera].T)
        seen = _rotate(_translate(ego, -cam_sensor2ego_translation[camera]), cam_sensor2ego_rotation[camera].T)
        image = seen.double() @ cam_intrinsic[camera].double().T
        uv = image[:, :2] / image[:, 2:3]
        inside = (seen[:, 2] > min_dist) & (uv > 0).all(dim=1) & (uv[:, 0] < image_width - 1) & (uv[:, 1] < image_height - 1)
        kept = inside.nonzero().squeeze(1)
        rows.append(kept)
        pixels.append(torch.cat([torch.full_like(kept, camera)[:, None], uv[kept].flip(1).round().long()], dim=1))
    return torch.cat(rows), torch.cat(pixels)


def resize_pairs(pairing_images: Tensor, native_size: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Pixel coordinates after resizing the whole image.

    Args:
        pairing_images: (M, 3) int64 (camera, row, column) at the native size.
        native_size: (H, W) in pixels.
        size: (h, w) in pixels.

    Returns:
        (M, 3) int64: row = min(round(row * h / H), h - 1), half to even; likewise the column.
    """
    # the authors' arithmetic: (coordinate * new) / old in float64, so that exact ties stay exact
    new, old = torch.tensor(size, device=pairing_images.device), torch.tensor(native_size, device=pairing_images.device)
    scaled = (pairing_images[:, 1:] * new).double() / old
    return torch.cat([pairing_images[:, :1], torch.minimum(scaled.round().long(), new - 1)], dim=1)


def resize_superpixels(superpixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Nearest-neighbour resize of id maps.

    Args:
        superpixels: (c, H, W) integer ids.
        size: (h, w) in pixels.

    Returns:
        (c, h, w), dtype of the input.
    """
    if superpixels.dtype != torch.uint8:  # float32 is exact for ids below 2**24
        return F.interpolate(superpixels[None].float(), size=size, mode="nearest")[0].to(superpixels.dtype)
    return F.interpolate(superpixels[None], size=size, mode="nearest")[0]


def flip_cameras(
    flip: Tensor, pairing_images: Tensor, superpixels: Tensor, images: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Mirror chosen cameras left to right: pixels, ids and pairs together.

    Args:
        flip: (c,) bool, which cameras to mirror.
        pairing_images: (M, 3) int64 (camera, row, column).
        superpixels: (c, h, w) integer ids.
        images: (c, 3, h, w) or None.

    Returns:
        The last three arguments, mirrored; the inputs are left as they are.
    """
    width = superpixels.shape[-1]
    column = torch.where(flip[pairing_images[:, 0]], width - 1 - pairing_images[:, 2], pairing_images[:, 2])
    pairing_images = torch.cat([pairing_images[:, :2], column[:, None]], dim=1)
    superpixels = torch.where(flip[:, None, None], superpixels.flip(-1), superpixels)
    images = None if images is None else torch.where(flip[:, None, None, None], images.flip(-1), images)
    return pairing_images, superpixels, images


# ------------------------------------------------------------------------------------------------------------------------ dense cloud


def dense_cloud(points: Tensor, sweeps: Sequence[Tensor], lidar2sensor: Tensor) -> Tensor:
    """The key scan followed by its sweeps, all in the key scan's LiDAR frame (stored matrices as in MMDetection3D).

    Args:
        points: (N, >= 4) float32 x, y, z (metres), intensity of the key scan.
        sweeps: One (n_s, >= 4) float32 cloud per sweep, each in its own frame.
        lidar2sensor: (S, 4, 4) with (R | t) in its top rows; row-vector form ``p_key = p_sweep @ R - t``. For a true
            rigid key -> sweep motion (R, t0) pass ``t = t0 @ R``.

    Returns:
        (N', 4) float32, the key scan's N points first.
    """
    moved = [points[:, :4]]
    for sweep, matrix in zip(sweeps, lidar2sensor, strict=False):
        xyz = (sweep[:, :3].double() @ matrix[:3, :3].double() - matrix[:3, 3].double()).to(sweep.dtype)
        moved.append(torch.cat([xyz, sweep[:, 3:4]], dim=1))
    return torch.cat(moved)


# ----------------------------------------------------------------------------------------------------------------------------- voxels


class Voxels(NamedTuple):
    """Voxels of a batch of clouds.

    Attributes:
        features: (V, C) features of each voxel's first point (lowest row), not their mean.
        coords: (V, 4) int32 (a, b, c, sample), each sample's smallest coordinate at 0.
        point2voxel: (N,) int64, voxel of each point.
        first_point: (V,) int64, the point whose features and label stand for the voxel.
    """

    features: Tensor
    coords: Tensor
    point2voxel: Tensor
    first_point: Tensor


def voxelize(
    points: Tensor,
    batch_index: Tensor,
    voxel_size: Sequence[float] | Tensor,
    voxel_type: VoxelType = "cylinder",
    batch_size: int | None = None,
) -> Voxels:
    """Round points to voxels: one list for a batch, sample after sample, sorted by (a, b, c) within a sample.

    Args:
        points: (N, C >= 3) float32, x, y, z in metres first.
        batch_index: (N,) integer, sample of each point.
        voxel_size: 3 numbers: (rho m, phi degrees, z m) for ``cylinder``, (x, y, z) in metres for ``cubic``.
        voxel_type: Coordinates that are rounded.
        batch_size: Number of samples; None reads it from ``batch_index`` (a host sync on an accelerator).

    Returns:
        The voxels; coordinates are rounded half to even.

    Raises:
        ValueError: Unknown ``voxel_type``, or no point at all.
    """
    if points.ndim != 2 or points.shape[0] == 0 or points.shape[1] < 3:
        raise ValueError(f"points must be (N >= 1, C >= 3), got {tuple(points.shape)}: an empty scan can't be voxelised")
    x, y, z = points[:, 0], points[:, 1], points[:, 2]
    if voxel_type == "cylinder":
        position = torch.stack([torch.sqrt(x**2 + y**2), torch.atan2(y, x) * (180 / torch.pi), z], dim=1)
    elif voxel_type == "cubic":
        position = points[:, :3]
    else:
        raise ValueError(f"voxel_type must be 'cylinder' or 'cubic', got {voxel_type!r}")
    cell = torch.round(position / torch.as_tensor(voxel_size, dtype=points.dtype, device=points.device)).int()
    sample = batch_index.long()
    batch_size = int(sample.max()) + 1 if batch_size is None else batch_size
    smallest = torch.full((batch_size, 3), torch.iinfo(torch.int32).max, dtype=torch.int32, device=points.device)
    smallest.scatter_reduce_(0, sample[:, None].expand(-1, 3), cell, reduce="amin")
    cell = (cell - smallest[sample]).long()
    # one integer per voxel, last coordinate fastest, so that sorting the integers sorts the voxels
    extent = cell.amax(0) + 1
    key = ((sample * extent[0] + cell[:, 0]) * extent[1] + cell[:, 1]) * extent[2] + cell[:, 2]
    keys, point2voxel = torch.unique(key, return_inverse=True)
    first = torch.full(keys.shape, points.shape[0], dtype=torch.long, device=points.device)
    first.scatter_reduce_(0, point2voxel, torch.arange(points.shape[0], device=points.device), reduce="amin")
    coords = torch.cat([cell, sample[:, None]], dim=1)[first].int()
    return Voxels(points[first], coords, point2voxel, first)


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


def group_mean(embeddings: Tensor, groups: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Mean embedding of each group, ``sum / (n + 1e-6)``: zero for an empty group, and NOT normalised again.

    Args:
        embeddings: (n, D).
        groups: (n,) int64 in 0..num_groups-1.
        num_groups: G.

    Returns:
        Means (G, D) in float32 or wider, and sizes (G,) of the same dtype.
    """
    embeddings = wide(embeddings)
    total = embeddings.new_zeros(num_groups, embeddings.shape[1]).index_add(0, groups, embeddings)
    size = embeddings.new_zeros(num_groups).index_add(0, groups, embeddings.new_ones(groups.shape[0]))
    return total / (size[:, None] + 1e-6), size


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


def info_nce(a: Tensor, b: Tensor, temperature: float, mask: Tensor | None = None) -> Tensor:
    """One-directional InfoNCE: rows of ``a`` against all rows of ``b``, positives on the diagonal.

    Nothing is normalised or detached inside.

    ``mean_i -log softmax_j(<a_i, b_j> / temperature)_i`` over the rows of the mask. Computed outside autocast,
    without a host sync.

    Args:
        a: (n, D).
        b: (n, D).
        temperature: > 0.
        mask: (n,) bool, rows (and columns) that take part; None takes all.

    Returns:
        Scalar, float32 or wider; 0 (with zero gradients) when no row takes part.
    """
    with torch.autocast(a.device.type, enabled=False):
        logits = wide(a) @ wide(b).T / temperature
        if mask is None:
            mask = torch.ones(logits.shape[0], dtype=torch.bool, device=logits.device)
        # rows that don't take part get finite logits, so that neither their value nor their gradient is ever NaN
        logits = logits.masked_fill(~mask[None], -torch.inf).masked_fill(~mask[:, None], 0.0)
        loss = torch.logsumexp(logits, dim=1) - logits.diagonal() if logits.numel() else logits.sum(1)
        return torch.where(mask, loss, 0.0).sum() / mask.sum().clamp(min=1)


def retrieval_accuracy(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """Share of the mask's rows of ``a`` whose most similar row of ``b`` (of the mask) is their own; 0 for an empty mask."""
    similarity = (a.detach() @ b.detach().T).masked_fill(~mask[None], -torch.inf)
    hit = similarity.argmax(dim=1) == torch.arange(a.shape[0], device=a.device)
    return (hit & mask).sum() / mask.sum().clamp(min=1)


def dense_to_sparse_loss(
    k: Tensor, k_dense: Tensor, mask: Tensor, temperature: float = 0.07, mode: Literal["nce", "cosine"] = "nce"
) -> Tensor:
    """Agreement of a scan's groups with those of its dense, multi-sweep cloud.

    Args:
        k: (G, D) pooled embeddings of the scan.
        k_dense: (G, D) pooled embeddings of the dense cloud.
        mask: (G,) bool, groups of the SCAN with a pair; a group without a dense pair stays in, as a zero row.
        temperature: Of ``nce``.
        mode: ``nce`` as the authors' code, ``cosine`` = mean(1 - <k, k_dense>) as the ECCV paper states it (mem).

    Returns:
        Scalar.
    """
    if mode == "nce":
        return info_nce(k, k_dense, temperature, mask)
    if mode != "cosine":
        raise ValueError(f"d2s mode must be 'nce' or 'cosine', got {mode!r}")
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
        temperature: Of every InfoNCE.
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


def effective_rank(embeddings: Tensor, mask: Tensor) -> Tensor:
    """Exp of the entropy of the normalised singular values of the mask's rows (Roy & Vetterli 2007): 1 when all rows are parallel."""
    with torch.autocast(embeddings.device.type, enabled=False):
        rows = wide(embeddings.detach()) * mask[:, None]
        share = torch.linalg.svdvals(rows)
        share = share / share.sum().clamp(min=1e-12)
        return torch.exp(torch.special.entr(share).sum())


# ------------------------------------------------------------------------------------------------------------------ segmentation loss


def lovasz_softmax(probs: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Lovasz-softmax (arXiv:1705.08790) over the classes present in the batch, points of all samples together.

    Args:
        probs: (n, C) softmax over all C outputs.
        labels: (n,) int64.
        ignore_index: Points with this label take no part.

    Returns:
        Scalar; 0 (with zero gradients) when every point is ignored.
    """
    valid = labels != ignore_index
    target = F.one_hot(torch.where(valid, labels, 0), probs.shape[1]).to(probs.dtype) * valid[:, None]
    # ignored points sort behind all others, where they change no value and no rank
    error = torch.where(valid[:, None], (target - probs).abs(), -1.0)
    error, order = error.sort(dim=0, descending=True)
    target = target.gather(0, order)
    present = target.sum(0)
    hit = target.cumsum(0)
    miss = (1 - target).cumsum(0)
    jaccard = 1 - (present - hit) / (present + miss)
    step = torch.cat([jaccard[:1], jaccard[1:] - jaccard[:-1]])
    per_class = (error.clamp(min=0) * step).sum(0)
    return torch.where(present > 0, per_class, 0.0).sum() / (present > 0).sum().clamp(min=1)


def segmentation_losses(logits: Tensor, labels: Tensor, ignore_index: int, lovasz_weight: float = 2.0) -> dict[str, Tensor]:
    """Cross-entropy averaged over the points that are not ignored, and the weighted Lovasz-softmax.

    Args:
        logits: (n, C) any float dtype; computed in float32 or wider.
        labels: (n,) int64 in 0..C-1, or ``ignore_index``.
        ignore_index: Label that takes no part.
        lovasz_weight: 2.0 in the authors' configuration.

    Returns:
        ``ce``, ``lovasz`` (already weighted), ``total``; zeros with zero gradients when every point is ignored.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits = wide(logits)
        valid = labels != ignore_index
        ce = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum") / valid.sum().clamp(min=1)
        lovasz = lovasz_weight * lovasz_softmax(logits.softmax(dim=1), labels, ignore_index)
        return {"ce": ce, "lovasz": lovasz, "total": ce + lovasz}


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
    if mode not in ("soft", "hard"):
        raise ValueError(f"mode must be 'soft' or 'hard', got {mode!r}")
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
