"""Voxels of point clouds, cylindrical or cubic.

Golden vectors come from Xiangxu-0103/SuperFlow at commit 7dbdd1c (``superflow/models/data_preprocessors/data_preprocessor.py``).
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lit_methods import checks

VoxelType = Literal["cylinder", "cubic"]


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
    checks.one_of(VoxelType, voxel_type=voxel_type)
    x, y, z = points[:, 0], points[:, 1], points[:, 2]
    if voxel_type == "cylinder":
        position = torch.stack([torch.sqrt(x**2 + y**2), torch.atan2(y, x) * (180 / torch.pi), z], dim=1)
    else:
        position = points[:, :3]
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


__all__ = ["VoxelType", "Voxels", "voxelize"]
