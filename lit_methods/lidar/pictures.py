"""Pictures of clouds and images for the dashboards: arrays in, media out."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_methods.panels import CloudMedia, ImageMedia


def class_colors(number: int) -> NDArray[np.uint8]:
    """(number, 3) well-separated RGB colours: hues by the golden ratio, three levels of brightness."""
    index = np.arange(number)
    hue, value = (index * 0.618034) % 1.0, np.array([1.0, 0.75, 0.55])[index % 3]
    wheel = np.abs((hue[:, None] * 6 + np.array([0, 4, 2])) % 6 - 3) - 1
    return (255 * value[:, None] * (0.25 + 0.75 * np.clip(wheel, 0, 1))).astype(np.uint8)


def ramp(value: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
    """(...) in [0, 1] -> (..., 3) RGB, blue (0) over green to red (1)."""
    anchors = np.array([[40, 80, 230], [40, 190, 200], [90, 210, 70], [240, 200, 40], [220, 50, 30]], dtype=np.float64)
    place = np.clip(value, 0, 1) * (len(anchors) - 1)
    low = np.minimum(place.astype(int), len(anchors) - 2)
    part = (place - low)[..., None]
    return (anchors[low] * (1 - part) + anchors[low + 1] * part).astype(np.uint8)


def superpixel_overlay(view: dict[str, Any], sample: int = 0) -> ImageMedia:
    """The images of one sample: above with the paired points coloured by distance, below with superpixels blended in.

    Args:
        view: A view of the pretraining batch.
        sample: Which sample of the batch.
    """
    images = (view["images"][sample].detach().float().cpu().permute(0, 2, 3, 1).numpy() * 255).clip(0, 255).astype(np.uint8)
    ids = view["superpixels"][sample].cpu().numpy()
    blended = (0.45 * images + 0.55 * class_colors(int(ids.max()) + 1)[ids]).astype(np.uint8)
    point_start, pair_start = (int(view[name][:sample].sum()) for name in ("points_per_sample", "pairs_per_sample"))
    pairs = slice(pair_start, pair_start + int(view["pairs_per_sample"][sample]))
    points = view["points"].detach().float().cpu().numpy()[point_start + view["pairing_points"][pairs].cpu().numpy(), :3]
    camera, row, column = view["pairing_images"][pairs].cpu().numpy().T
    near_last = np.argsort(-np.linalg.norm(points, axis=1))
    colors = ramp(1 - np.linalg.norm(points, axis=1) / 50.0)[near_last]
    dotted = images.copy()
    for dr, dc in ((0, 0), (0, 1), (1, 0), (1, 1)):
        r, c = np.minimum(row + dr, images.shape[1] - 1)[near_last], np.minimum(column + dc, images.shape[2] - 1)[near_last]
        dotted[camera[near_last], r, c] = colors
    picture = np.concatenate([np.concatenate(list(rows), axis=1) for rows in (dotted, blended)], axis=0)
    return ImageMedia(picture, f"{len(images)} camera images: above with LiDAR points coloured by distance, below with their superpixels")


def feature_cloud(points: Tensor, features: Tensor, caption: str) -> CloudMedia:
    """A cloud coloured by the first three principal components of its features.

    Args:
        points: (N, 3) metres.
        features: (N, C).
        caption: Line under the cloud.
    """
    with torch.autocast(features.device.type, enabled=False):
        centred = features.detach().float() - features.detach().float().mean(0)
        covariance = centred.T @ centred / max(len(centred) - 1, 1)
        # eigenvectors have no sign: fixed by the largest entry, so that colours don't jump between epochs
        axes = torch.linalg.eigh(covariance)[1][:, -3:].flip(1)
        axes = axes * torch.sign(axes.gather(0, axes.abs().argmax(0, keepdim=True)))
        main = centred @ axes
    low, high = (torch.quantile(main[:: max(len(main) // 10_000, 1)], q, dim=0) for q in (0.02, 0.98))
    rgb = ((main - low) / (high - low).clamp(min=1e-9)).clamp(0, 1)
    return CloudMedia(points.detach().float().cpu().numpy(), (255 * rgb).byte().cpu().numpy(), caption)


def label_cloud(points: Tensor, labels: Tensor, class_names: Sequence[str], caption: str) -> CloudMedia:
    """A cloud coloured by class; labels outside the names are grey."""
    index = labels.detach().cpu().numpy()
    palette = np.concatenate([class_colors(len(class_names)), np.full((1, 3), 90, dtype=np.uint8)])
    colors = palette[np.where((index >= 0) & (index < len(class_names)), index, len(class_names))]
    return CloudMedia(points.detach().float().cpu().numpy(), colors, caption, labels=index, class_names=tuple(class_names))
