"""Points, pixels and superpixels of one scene: which point falls on which pixel, and how pairs follow when images are resized or mirrored.

The arithmetic is that of Xiangxu-0103/SuperFlow at commit 7dbdd1c (``superflow/datasets/transforms``), whose results are golden vectors.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


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
        lidar2ego_rotation: (3, 3) LiDAR -> vehicle.
        lidar2ego_translation: (3,) LiDAR -> vehicle, metres.
        ego2global_rotation: (3, 3) vehicle -> world at the LiDAR's time.
        ego2global_translation: (3,) vehicle -> world at the LiDAR's time, metres.
        cam_sensor2ego_rotation: (c, 3, 3) camera -> vehicle.
        cam_sensor2ego_translation: (c, 3) camera -> vehicle, metres.
        cam_ego2global_rotation: (c, 3, 3) vehicle -> world at each camera's time.
        cam_ego2global_translation: (c, 3) vehicle -> world at each camera's time, metres.
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
        (M, 3) int64: row = min(round(row * h / H), h - 1), half to even; the column in the same way.
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


__all__ = ["dense_cloud", "flip_cameras", "project_points", "resize_pairs", "resize_superpixels"]
