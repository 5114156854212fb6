"""Which ground truth each proposal answers for: SimOTA's dynamic k (arXiv:2107.08430), for all images, heads and levels at once.

Golden vectors come from Tankowa/ConsistencyDet@0f6e44a (loss.py), which is DiffusionDet's. Ground truths are padded: a mask says which
exist. Nothing waits for the device.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_methods.detection.boxes import image_scale, overlaps

_OUTSIDE, _FOREIGN, _TAKEN = 100.0, 10_000.0, 100_000.0


class Targets(NamedTuple):
    """What is to be found in B images, padded to the most boxes that one of them has.

    Attributes:
        labels: (B, G) int64 in 0..K-1; anything where there is no box.
        boxes: (B, G, 4) corners in pixels, of positive width and height; anything where there is no box.
        valid: (B, G) bool, which boxes exist.
        size: (B, 2) float, width and height of the images in pixels.
    """

    labels: Tensor
    boxes: Tensor
    valid: Tensor
    size: Tensor

    def repeat(self, times: int) -> "Targets":
        """The same images ``times`` times, one whole batch behind the other."""
        return Targets(*(part.repeat(times, *[1] * (part.ndim - 1)) for part in self))

    @property
    def at_least_one(self) -> "Targets":
        """The same with one column that is not valid where there are no columns, so that reductions over them are defined."""
        if self.labels.shape[1]:
            return self
        return Targets(F.pad(self.labels, (0, 1)), F.pad(self.boxes, (0, 0, 0, 1)), F.pad(self.valid, (0, 1)), self.size)


class MatchCosts(NamedTuple):
    """Weights of the costs, and the rules of the matching.

    Attributes:
        label: Factor of the focal cost of the class.
        l1: Factor of the L1 distance of corners, in shares of the image.
        giou: Factor of the negative generalised IoU.
        alpha: Share of the positives in the focal cost.
        gamma: Focusing power of the focal cost.
        top: So many of the largest IoU of a ground truth are summed to the number of its proposals.
        radius: Half a side of the centre region, in sizes of the ground truth.
    """

    label: float = 2.0
    l1: float = 5.0
    giou: float = 2.0
    alpha: float = 0.25
    gamma: float = 2.0
    top: int = 5
    radius: float = 2.5


def focal_cost(logits: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Alpha (1 - p)^gamma (-ln p) - (1 - alpha) p^gamma (-ln(1 - p)) of sigmoids p, each logarithm of its argument plus 1e-8."""
    p = logits.sigmoid()
    rest = 1 - p
    return (1 - alpha) * p**gamma * (rest + 1e-8).log() - alpha * rest**gamma * (p + 1e-8).log()


@torch.no_grad()
def match_costs(logits: Tensor, boxes: Tensor, targets: Targets, costs: MatchCosts) -> tuple[Tensor, Tensor]:
    """Cost and IoU of every ground truth with every proposal, each (B, G, P); columns that aren't valid hold anything."""
    labels, truths, valid, size = targets
    scale = image_scale(size)
    iou, giou = overlaps(truths[:, :, None], boxes[:, None])
    distance = torch.cdist(truths / scale, boxes / scale, p=1.0)
    index = labels.clamp(0, logits.shape[-1] - 1)[:, None].expand(-1, logits.shape[1], -1)
    label = focal_cost(logits.gather(2, index), costs.alpha, costs.gamma).mT

    inside = near = valid[:, :, None]
    for axis in (0, 1):
        centre = ((boxes[..., axis] + boxes[..., axis + 2]) / 2)[:, None]
        low, high = truths[:, :, axis, None], truths[:, :, axis + 2, None]
        middle, reach = (low + high) / 2, costs.radius * (high - low)
        inside = inside & (centre > low) & (centre < high)
        near = near & (centre > middle - reach) & (centre < middle + reach)
    known = (inside | near).any(1, keepdim=True)
    cost = distance.mul_(costs.l1).add_(label, alpha=costs.label).sub_(giou, alpha=costs.giou)
    return cost.add_(~(inside & near), alpha=_OUTSIDE).add_(~known, alpha=_FOREIGN), iou


@torch.no_grad()
def dynamic_k_match(logits: Tensor, boxes: Tensor, targets: Targets, costs: MatchCosts | None = None) -> Tensor:
    """Index of the ground truth that each proposal is trained on.

    A ground truth takes its k cheapest proposals, where k is the sum of its ``top`` largest IoU, rounded down, at least 1. A proposal that
    several took keeps the one that it is cheapest for. Ground truths that have none then take the cheapest proposal that is free; where
    several take the same one, the first of them has it. With fewer proposals than ground truths some therefore stay without.

    Args:
        logits: (B, P, K), before the sigmoid.
        boxes: (B, P, 4) corners in pixels.
        targets: Of the same B images.
        costs: Weights and rules; None: those of the paper.

    Returns:
        (B, P) int64, index in 0..G-1, or -1. Computed in float32 or wider.
    """
    costs = MatchCosts() if costs is None else costs
    with torch.autocast(logits.device.type, enabled=False):
        wide = torch.promote_types(torch.promote_types(logits.dtype, boxes.dtype), torch.float32)
        targets = targets.at_least_one
        targets = targets._replace(boxes=targets.boxes.to(wide), size=targets.size.to(wide))
        cost, iou = match_costs(logits.to(wide), boxes.to(wide), targets, costs)
        valid, (truths, proposals) = targets.valid, cost.shape[1:]
        cost.masked_fill_(~valid[:, :, None], torch.inf)
        top = min(costs.top, proposals)
        count = iou.topk(top, dim=2).values.sum(2).long().clamp(min=1)

        # proposals that each truth takes, (B, G, top), of which the first k count
        chosen = torch.zeros(*count.shape, top, dtype=torch.long, device=cost.device)
        for k in range(1, top + 1):  # of equally cheap proposals topk chooses others for another k, so each k is asked for itself
            cheapest = cost.topk(k, dim=2, largest=False).indices
            chosen = torch.where((count == k)[..., None], F.pad(cheapest, (0, top - k)), chosen)
        own = (torch.arange(top, device=cost.device) < count[..., None]) & valid[..., None]

        number = torch.arange(truths, device=cost.device)[:, None].expand_as(chosen)
        hits = torch.zeros_like(boxes[..., 0], dtype=torch.long).scatter_add(1, chosen.flatten(1), own.long().flatten(1))
        nobody = torch.full_like(hits, truths)
        owner = nobody.scatter_reduce(1, chosen.flatten(1), torch.where(own, number, truths).flatten(1), "amin")
        contested = hits > 1
        owner = torch.where(contested, cost.argmin(1), owner)

        # truths that have none take the cheapest proposal that is free; one that was contested keeps what it has
        held = torch.zeros(len(cost), truths + 1, dtype=torch.bool, device=cost.device).scatter(1, owner, True)[:, :truths]
        free = (cost + _TAKEN * (hits > 0)[:, None]).argmin(2)
        late = nobody.scatter_reduce(1, free, torch.where(valid & ~held, number[..., 0], truths), "amin")
        owner = torch.where(contested, owner, torch.minimum(owner, late))
        return torch.where(owner < truths, owner, -1)


__all__ = ["MatchCosts", "Targets", "dynamic_k_match", "focal_cost", "match_costs"]
