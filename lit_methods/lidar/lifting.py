"""Lifting of image masks to points through posed depth cameras, and masks made of geometry alone.

Cameras look along +z, with x to the right and y down: ``p_cam = R p + t`` takes world coordinates to the camera's, in metres. The equations
of the link are those reported for arXiv:2508.19909; that a pixel takes the smallest mask which covers it, and the superpoints, are ours.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_methods.checks import at_least, within


def link_points(points: Tensor, intrinsic: Tensor, rotation: Tensor, translation: Tensor, depth: Tensor, delta: float = 0.05) -> Tensor:
    """Link every point to its pixel in every view, where the view sees it.

    With ``z'`` the depth of a point in a camera, its pixel is ``round((K p_cam)[:2] / z')``, halves to even. The view sees the point if
    z' > 0, the pixel lies in the image, the pixel has a depth, and that depth differs from z' by ``delta`` at most.

    Args:
        points: (N, 3) floats, world coordinates in metres.
        intrinsic: (3, 3) floats of all cameras, or (V, 3, 3), in pixels.
        rotation: (V, 3, 3) world to camera.
        translation: (V, 3) world to camera, metres.
        depth: (V, H, W) metres along the camera's z; 0 is a hole, which shows no point.
        delta: Largest difference of depths, metres.

    Returns:
        (V, N, 3) int64: column, row, and 1 where the point is seen; three zeros where it isn't.
    """
    views, height, width = depth.shape
    camera = points @ rotation.mT + translation[:, None]
    z = camera[..., 2]
    projected = camera @ intrinsic.mT
    pixel = (projected[..., :2] / torch.where(z > 0, z, 1.0)[..., None]).round()
    column, row = pixel[..., 0], pixel[..., 1]
    inside = (z > 0) & (column >= 0) & (column <= width - 1) & (row >= 0) & (row <= height - 1)
    # positions outside may be too large for integers
    column, row = (torch.where(inside, place, 0).long() for place in (column, row))
    found = depth.reshape(views, -1).gather(1, row * width + column) if height * width else torch.zeros_like(z)
    seen = inside & (found > 0) & ((found - z).abs() <= delta)
    return torch.stack([column, row, torch.ones_like(column)], dim=2) * seen[..., None]


def smallest_masks(masks: Tensor) -> Tensor:
    """The smallest mask that covers each pixel.

    Args:
        masks: (M, H, W) bool, of one view, which may overlap.

    Returns:
        (H, W) int64 numbers in 0..M-1, of masks of equal size the lower one; -1 where no mask is.
    """
    number, height, width = masks.shape
    if number == 0:
        return torch.full((height, width), -1, dtype=torch.int64, device=masks.device)
    order = masks.flatten(1).sum(1).argsort(stable=True)
    first = masks[order].to(torch.uint8).argmax(0)  # of equal values the first
    return torch.where(masks.any(0), order[first], -1)


def masks_at_points(link: Tensor, masks: Tensor) -> Tensor:
    """The mask of each point in each view.

    Args:
        link: (V, N, 3) of :func:`link_points`.
        masks: (V, H, W) integers, the mask of each pixel; below 0: none.

    Returns:
        (V, N) int64; -1 where the point isn't seen or has no mask.
    """
    views, _, width = masks.shape
    found = masks.reshape(views, -1).gather(1, link[..., 1] * width + link[..., 0]).long()
    return torch.where(link[..., 2] > 0, found, -1).clamp(min=-1)


def superpoints(
    points: NDArray[np.floating[Any]], normals: NDArray[np.floating[Any]], neighbours: int = 8, radius: float = 0.2, angle: float = 20.0
) -> NDArray[np.int64]:
    """Masks without images: pieces of surface whose neighbouring points have normals of nearly one direction.

    Two points are joined if one is among the other's nearest ones, nearer than ``radius``, and their normals, whose sign doesn't count,
    differ by less than ``angle``. A superpoint is what hangs together.

    Args:
        points: (N, 3) metres.
        normals: (N, 3) unit vectors.
        neighbours: Nearest points that are looked at.
        radius: Metres.
        angle: Degrees.

    Returns:
        (N,) numbers 0, 1, ... in the order of their first point.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components
    from scipy.spatial import KDTree

    at_least(1, neighbours=neighbours)
    within("(0, inf)", "metres", radius=radius)
    within("(0, 90]", "degrees", angle=angle)
    number = len(points)
    if number == 0:
        return np.zeros(0, dtype=np.int64)
    distance, other = KDTree(points).query(points, k=min(neighbours + 1, number), distance_upper_bound=radius)
    distance, other = distance.reshape(number, -1), other.reshape(number, -1)
    one = np.broadcast_to(np.arange(number)[:, None], other.shape)
    near = np.isfinite(distance)
    one, two = one[near], other[near]
    alike = np.abs((normals[one] * normals[two]).sum(axis=1)) >= np.cos(np.radians(angle))
    graph = coo_matrix((np.ones(int(alike.sum()), dtype=np.int8), (one[alike], two[alike])), shape=(number, number))
    found = connected_components(graph, directed=False)[1]
    _, first, inverse = np.unique(found, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse]


__all__ = ["link_points", "masks_at_points", "smallest_masks", "superpoints"]
