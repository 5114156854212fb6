"""Boxes as tensors (..., 4): conversions, areas, overlaps. Any float dtype; nothing is checked."""

import torch
from torch import Tensor


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """(centre x, centre y, width, height) -> (left, top, right, bottom), in the same unit; (..., 4)."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """(left, top, right, bottom) -> (centre x, centre y, width, height), in the same unit; (..., 4)."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def image_scale(size: Tensor) -> Tensor:
    """(..., 2) width and height of images -> (..., 1, 4) the divisor (W, H, W, H) of their boxes (..., P, 4)."""
    return torch.cat([size, size], dim=-1).unsqueeze(-2)


def box_area(boxes: Tensor) -> Tensor:
    """(..., 4) corners -> (...) width times height."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def overlaps(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU (arXiv:1902.09630) of boxes that broadcast with each other.

    For all pairs of (N, 4) and (M, 4) give ``a[:, None]`` and ``b``.

    Args:
        a: (..., 4) corners.
        b: (..., 4) corners.

    Returns:
        Two of the shape that both broadcast to, without its last dimension: IoU in [0, 1], generalised IoU in [-1, 1]. Where both boxes
        are empty, both are 0.
    """
    (a0, a1, a2, a3), (b0, b1, b2, b3) = a.unbind(-1), b.unbind(-1)  # one coordinate at a time: pairs of them would be slow to multiply
    shared = (torch.minimum(a2, b2) - torch.maximum(a0, b0)).clamp(min=0) * (torch.minimum(a3, b3) - torch.maximum(a1, b1)).clamp(min=0)
    union = box_area(a) + box_area(b) - shared
    hull = (torch.maximum(a2, b2) - torch.minimum(a0, b0)).clamp(min=0) * (torch.maximum(a3, b3) - torch.minimum(a1, b1)).clamp(min=0)
    iou = shared / torch.where(union > 0, union, 1.0)
    return iou, iou - (hull - union) / torch.where(hull > 0, hull, 1.0)


__all__ = ["box_area", "cxcywh_to_xyxy", "image_scale", "overlaps", "xyxy_to_cxcywh"]
