"""Losses of a set of proposals against the boxes of an image: focal or federated class loss, L1, generalised IoU."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_methods.detection.boxes import image_scale, overlaps
from lit_methods.detection.matcher import MatchCosts, Targets, dynamic_k_match


class LossWeights(NamedTuple):
    """Factors of the three losses."""

    label: float = 2.0
    l1: float = 5.0
    giou: float = 2.0


class SetLosses(NamedTuple):
    """Losses of L heads, each (L,), without their factors.

    Attributes:
        label: Class loss.
        l1: L1 distance of the corners, in shares of the image.
        giou: 1 - generalised IoU.
        matched: Number of proposals that were matched, float; what each loss was divided by is at least 1.
    """

    label: Tensor
    l1: Tensor
    giou: Tensor
    matched: Tensor

    def weighted(self, weights: LossWeights) -> Tensor:
        """(L,) sum of the three, with their factors."""
        return weights.label * self.label + weights.l1 * self.l1 + weights.giou * self.giou


def focal_loss(logits: Tensor, target: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Sigmoid focal loss of each entry (arXiv:1708.02002, Eq. 5); ``target`` holds 0 and 1."""
    p = logits.sigmoid()
    right = p * target + (1 - p) * (1 - target)
    share = alpha * target + (1 - alpha) * (1 - target)
    return share * F.binary_cross_entropy_with_logits(logits, target, reduction="none") * (1 - right) ** gamma


def federated_classes(labels: Tensor, valid: Tensor, weights: Tensor, uniform: Tensor, count: int = 50) -> Tensor:
    """Classes whose loss counts in a batch: those in it, and others drawn without replacement up to ``count`` (arXiv:1908.03195; LVIS).

    Args:
        labels: (B, G) int64 in 0..K-1.
        valid: (B, G) bool, which of them exist.
        weights: (K,) >= 0, how likely a class is drawn: the square root of its number of images.
        uniform: (K,) in (0, 1), drawn by the caller.
        count: Classes in all, unless the batch has more.

    Returns:
        (K,) float, 1 for the chosen ones.
    """
    classes = len(weights)
    present = torch.zeros(classes + 1, device=weights.device).scatter(0, torch.where(valid, labels, classes).flatten(), 1.0)[:-1]
    arrival = torch.where((present == 0) & (weights > 0), -uniform.log() / weights.clamp(min=1e-12), torch.inf)  # exponential times
    rank = arrival.argsort().argsort()
    return present.maximum(((rank < count - present.sum()) & arrival.isfinite()).to(present))


def set_losses(
    logits: Tensor,
    boxes: Tensor,
    targets: Targets,
    costs: MatchCosts | None = None,
    class_weights: Tensor | None = None,
) -> SetLosses:
    """The losses of L heads (or levels) on the same images, each matched by itself: deep supervision in one pass.

    Each loss is a sum over the batch, divided by the number of the head's matched proposals on this process. Without any ground truth the
    losses of boxes are 0 and keep their graph.

    Args:
        logits: (L, B, P, K), before the sigmoid.
        boxes: (L, B, P, 4) corners in pixels.
        targets: Of the B images.
        costs: The matching's, whose alpha and gamma are the class loss's, too; None: those of the paper.
        class_weights: (K,) factors of the classes; the class loss is then the plain binary cross entropy (federated loss). None: focal.

    Returns:
        Computed in float32 or wider, with gradients to logits and boxes.
    """
    costs = MatchCosts() if costs is None else costs
    heads, images = logits.shape[:2]
    with torch.autocast(logits.device.type, enabled=False):
        wide = torch.promote_types(torch.promote_types(logits.dtype, boxes.dtype), torch.float32)
        logits, boxes = logits.to(wide), boxes.to(wide)
        targets = targets.at_least_one
        targets = targets._replace(boxes=targets.boxes.to(wide), size=targets.size.to(wide))
        match = dynamic_k_match(logits.flatten(0, 1), boxes.flatten(0, 1), targets.repeat(heads), costs).view(heads, images, -1)

        matched, index = match >= 0, match.clamp(min=0)
        number = matched.sum((1, 2)).to(wide)
        divisor = number.clamp(min=1)
        labels = targets.labels.expand(heads, -1, -1).gather(2, index)
        hot = torch.zeros_like(logits).scatter(3, labels.clamp(0, logits.shape[-1] - 1)[..., None], matched[..., None].to(wide))
        if class_weights is None:
            label = focal_loss(logits, hot, costs.alpha, costs.gamma)
        else:
            label = F.binary_cross_entropy_with_logits(logits, hot, reduction="none") * class_weights.to(wide)

        wanted = targets.boxes.expand(heads, -1, -1, -1).gather(2, index[..., None].expand(-1, -1, -1, 4))
        some = torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=wide, device=boxes.device)  # in the place of what isn't matched: no 0 / 0
        ours, wanted = (torch.where(matched[..., None], part, some) for part in (boxes, wanted))
        scale = image_scale(targets.size)
        l1 = (ours / scale - wanted / scale).abs().sum((1, 2, 3))
        giou = (1 - overlaps(ours, wanted)[1]).sum((1, 2))
        return SetLosses(label.sum((1, 2, 3)) / divisor, l1 / divisor, giou / divisor, number)


__all__ = ["LossWeights", "SetLosses", "federated_classes", "focal_loss", "set_losses"]
