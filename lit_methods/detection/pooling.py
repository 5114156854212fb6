"""ROIAlign: the features inside boxes, on a grid of fixed size (arXiv:1703.06870), with detectron2's half-pixel offset."""

from collections.abc import Sequence

import torch
from torch import Tensor

_SMALL = 1024  # positions of a map up to which products took less time than the operator, forward and backward, on a CPU


def has_compiled_operator(name: str) -> bool:
    """Whether torchvision's compiled operator is there: wheels that don't fit the installed torch import without it."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        return False
    return hasattr(torch.ops.torchvision, name)


def _weights(low: Tensor, high: Tensor, size: int, bins: int, samples: int) -> Tensor:
    """(..., bins, size) shares of the rows (or columns) of a map that each bin of boxes from ``low`` to ``high`` (...) averages."""
    count = bins * samples
    place = (torch.arange(count, device=low.device, dtype=low.dtype) + 0.5) / count
    at = low[..., None] + (high - low)[..., None] * place
    inside = (at >= -1) & (at <= size)  # a sample farther away is 0
    at = at.clamp(0, size - 1)
    rows = torch.arange(size, device=low.device, dtype=low.dtype)
    hat = (1 - (at[..., None] - rows).abs()).clamp(min=0) * inside[..., None]
    return hat.unflatten(-2, (bins, samples)).mean(-2)


def roi_align_by_products(features: Tensor, boxes: Tensor, scale: float, bins: int = 7, samples: int = 2) -> Tensor:
    """ROIAlign in plain torch: bilinear samples on a grid are two matrix products, one for each axis.

    The same numbers as torchvision's operator with ``aligned=True``. Its cost grows with the size of the map: on large maps the operator is
    far cheaper.

    Args:
        features: (B, C, h, w).
        boxes: (B, R, 4) corners in pixels of the image.
        scale: Positions of the map in a pixel, 1 / stride.
        bins: Side of the grid.
        samples: Samples in a bin along each axis.

    Returns:
        (B, R, C, bins, bins).
    """
    at = boxes * scale - 0.5
    rows = _weights(at[..., 1], at[..., 3], features.shape[2], bins, samples)
    columns = _weights(at[..., 0], at[..., 2], features.shape[3], bins, samples)
    along = torch.einsum("brph,bchw->brcpw", rows, features)
    return torch.einsum("brcpw,brqw->brcpq", along, columns)


def roi_align(features: Tensor, boxes: Tensor, scale: float, bins: int = 7, samples: int = 2) -> Tensor:
    """:func:`roi_align_by_products`, on large maps by torchvision's operator where it is there."""
    if features.shape[2] * features.shape[3] <= _SMALL or not has_compiled_operator("roi_align"):
        return roi_align_by_products(features, boxes, scale, bins, samples)
    import torchvision

    images, count = boxes.shape[:2]
    number = torch.arange(images, device=boxes.device, dtype=boxes.dtype).repeat_interleave(count)
    rows = torch.cat([number[:, None], boxes.flatten(0, 1)], dim=1)
    found: Tensor = torchvision.ops.roi_align(features, rows, (bins, bins), scale, samples, aligned=True)
    return found.unflatten(0, (images, count))


def pyramid_level(boxes: Tensor, strides: Sequence[int]) -> Tensor:
    """Which map each box is read from: a box of 224 pixels from the one of stride 16, half as large a box from one finer.

    Args:
        boxes: (..., 4) corners in pixels.
        strides: Pixels from one position of each map to the next, from fine to coarse, each twice the one before.

    Returns:
        (...) int64, index into ``strides``.
    """
    area = ((boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])).clamp(min=1e-8)
    level = torch.floor(torch.log2(area.sqrt() / 224 * 16 / strides[0] + 1e-8))
    return level.clamp(0, len(strides) - 1).long()


def pyramid_align(features: Sequence[Tensor], boxes: Tensor, strides: Sequence[int], bins: int = 7, samples: int = 2) -> Tensor:
    """ROIAlign of each box on the map that :func:`pyramid_level` names, without waiting for the device.

    On the other maps a box is moved outside, where it reads 0.

    Args:
        features: Maps (B, C, h, w), from fine to coarse.
        boxes: (B, R, 4) corners in pixels.
        strides: Of the maps.
        bins: Side of the grid.
        samples: Samples in a bin along each axis.

    Returns:
        (B, R, C, bins, bins).
    """
    if len(features) == 1:
        return roi_align(features[0], boxes, 1 / strides[0], bins, samples)
    level = pyramid_level(boxes, strides)
    outside = torch.full_like(boxes, -1e6)
    parts = [
        roi_align(one, torch.where((level == number)[..., None], boxes, outside), 1 / stride, bins, samples)
        for number, (one, stride) in enumerate(zip(features, strides, strict=True))
    ]
    return torch.stack(parts).sum(0)


__all__ = ["has_compiled_operator", "pyramid_align", "pyramid_level", "roi_align", "roi_align_by_products"]
