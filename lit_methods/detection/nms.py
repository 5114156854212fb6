"""Non-maximum suppression, and the detections that are left of the proposals of one or several steps."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lit_methods.detection.boxes import overlaps
from lit_methods.detection.pooling import has_compiled_operator


class Detections(NamedTuple):
    """What was found in an image, the surest first.

    Attributes:
        boxes: (D, 4) corners in pixels.
        scores: (D,) in [0, 1].
        labels: (D,) int64.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor


def suppress_by_rounds(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """Greedy suppression in plain torch, the same as the operator's.

    A box stays if no box that stays, has the same label and a higher score overlaps it by more than ``threshold``. Whether a box stays
    follows from those before it, so the answer is repeated until it no longer changes: as often as the longest chain of overlaps is long.

    Args:
        boxes: (N, 4) corners.
        scores: (N,).
        labels: (N,) int64.
        threshold: Largest IoU of two boxes that both stay.

    Returns:
        (M,) int64 rows that stay, the highest score first.
    """
    order = scores.argsort(descending=True, stable=True)
    boxes, labels = boxes[order], labels[order]
    beats = (overlaps(boxes[:, None], boxes)[0] > threshold) & (labels[:, None] == labels)
    beats = beats.triu(1)
    stays = torch.ones_like(labels, dtype=torch.bool)
    while True:
        now = ~(beats & stays[:, None]).any(0)
        if torch.equal(now, stays):
            return order[stays]
        stays = now


def suppress(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """:func:`suppress_by_rounds`, by torchvision's operator where it is there."""
    if not has_compiled_operator("nms"):
        return suppress_by_rounds(boxes, scores, labels, threshold)
    import torchvision

    return torchvision.ops.batched_nms(boxes, scores, labels, threshold)


def detections_of(logits: Sequence[Tensor], boxes: Sequence[Tensor], iou: float, most: int = 100) -> list[Detections]:
    """Detections of each image, from the proposals of one step or of several together.

    Of each step the P highest of the P x K scores count, each with its proposal's box; then each class is suppressed by itself.

    Args:
        logits: (B, P, K) of each step, before the sigmoid.
        boxes: (B, P, 4) of each step, corners in pixels.
        iou: Largest IoU of two detections of a class.
        most: Detections of an image.

    Returns:
        B entries, in float32.
    """
    scores, labels, places = [], [], []
    for one, place in zip(logits, boxes, strict=True):
        proposals, classes = one.shape[1:]
        found = one.float().sigmoid().flatten(1).topk(proposals, dim=1)
        scores.append(found.values)
        labels.append(found.indices % classes)
        row = (found.indices // classes)[..., None].expand(-1, -1, 4)
        places.append(place.float().gather(1, row))
    together = [torch.cat(parts, dim=1) for parts in (places, scores, labels)]
    detections = []
    for image in range(len(together[0])):
        candidates = Detections(*(part[image] for part in together))
        kept = suppress(*candidates, iou)[:most]
        detections.append(Detections(*(part[kept] for part in candidates)))
    return detections


__all__ = ["Detections", "detections_of", "suppress", "suppress_by_rounds"]
