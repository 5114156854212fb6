"""Boxes as signals that noise is added to: clean boxes of an image, padded with random ones, and the way between signals and pixels.

A signal is x = 2 b - 1, where b is (centre x, centre y, width, height) in shares of the image. Golden vectors come from
Tankowa/ConsistencyDet@0f6e44a (detector.py).
"""

import torch
from torch import Tensor

from lit_methods.detection.boxes import cxcywh_to_xyxy, image_scale, xyxy_to_cxcywh


def clean_boxes(truths: Tensor, valid: Tensor, padding: Tensor, keys: Tensor | None = None) -> Tensor:
    """P boxes of each image without noise: its ground truths, then random ones.

    An image without ground truth gets one that covers it, which is no target. One with more than P gives P of them, chosen by ``keys``.

    Args:
        truths: (B, G, 4) centre, width and height in shares of the image; anything where there is no box.
        valid: (B, G) bool, which boxes exist.
        padding: (B, P, 4) standard normal; a random box is padding / 6 + 0.5, with sides of at least 1e-4. Each proposal takes the one in
            its place.
        keys: (B, G) random numbers: ground truths with the smallest stand first. None: the order that they have.

    Returns:
        (B, P, 4) in signal units: 2 b - 1.
    """
    proposals, given = padding.shape[1], truths.shape[1]
    rank = torch.arange(given, device=truths.device, dtype=padding.dtype).expand_as(valid) if keys is None else keys
    order = torch.where(valid, rank, torch.inf).argsort(dim=1, stable=True)
    truths = truths.gather(1, order[..., None].expand_as(truths))
    truths = torch.cat([truths, truths.new_zeros(len(truths), max(proposals - given, 0), 4)], dim=1)[:, :proposals]
    fresh = padding / 6 + 0.5
    fresh = torch.cat([fresh[..., :2], fresh[..., 2:].clamp(min=1e-4)], dim=-1)
    whole = torch.tensor([0.5, 0.5, 1.0, 1.0], dtype=fresh.dtype, device=fresh.device)
    place, count = torch.arange(proposals, device=truths.device), valid.sum(1, keepdim=True)
    boxes = torch.where((place < count)[..., None], truths, fresh)
    empty = (count == 0) & (place == 0)
    return 2 * torch.where(empty[..., None], whole, boxes) - 1


def to_pixels(signal: Tensor, size: Tensor) -> Tensor:
    """(..., P, 4) signal units -> corners in pixels, of images of (..., 2) width and height; not clamped."""
    return cxcywh_to_xyxy((signal + 1) / 2) * image_scale(size)


def to_signal(boxes: Tensor, size: Tensor) -> Tensor:
    """The inverse of :func:`to_pixels`, clamped to [-1, 1]."""
    return (2 * xyxy_to_cxcywh(boxes / image_scale(size)) - 1).clamp(-1, 1)


def clamp_to_image(boxes: Tensor, size: Tensor) -> Tensor:
    """(..., P, 4) corners in pixels, moved into images of (..., 2) width and height."""
    scale = image_scale(size)
    return (boxes / scale).clamp(0, 1) * scale


def kept_first(boxes: Tensor, kept: Tensor, fresh: Tensor) -> Tensor:
    """(B, P, 4) boxes that are kept, in their order, and then fresh ones of the places that are left."""
    order = (~kept).to(torch.uint8).argsort(dim=1, stable=True)
    moved = boxes.gather(1, order[..., None].expand_as(boxes))
    place = torch.arange(boxes.shape[1], device=boxes.device)
    return torch.where((place < kept.sum(1, keepdim=True))[..., None], moved, fresh)


__all__ = ["clamp_to_image", "clean_boxes", "kept_first", "to_pixels", "to_signal"]
