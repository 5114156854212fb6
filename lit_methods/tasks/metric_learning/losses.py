"""Base losses of metric learning with a proxy for each class. Others: any ``loss(embeddings, labels)``, as in pytorch-metric-learning."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_methods import checks

MarginOn = Literal["cosine", "angle"]


def proxy_softmax(
    embeddings: Tensor, proxies: Tensor, labels: Tensor, scale: float = 16.0, margin: float = 0.0, margin_on: MarginOn = "cosine"
) -> Tensor:
    """Cross-entropy over the scaled cosines of embeddings and proxies: the normalised softmax, CosFace or ArcFace.

    The margin is subtracted from the cosine of the own class (CosFace, arXiv:1801.09414 (mem)), or added to its angle, which stays
    below pi (ArcFace, arXiv:1801.07698 (mem)). It is relative to the proxy, unlike the margins of TCM.

    Args:
        embeddings: (B, D) floating point of any length.
        proxies: (C, D).
        labels: (B,) int64 in 0..C-1.
        scale: > 0.
        margin: >= 0; 0: the normalised softmax (arXiv:1811.12649 (mem)).
        margin_on: ``cosine`` or ``angle`` (radians).

    Returns:
        Scalar in float32 or wider, mean over the batch.
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        dtype = torch.promote_types(embeddings.dtype, torch.float32)
        cosine = F.normalize(embeddings.to(dtype), dim=1) @ F.normalize(proxies.to(dtype), dim=1).T
        if margin > 0:
            own = cosine.gather(1, labels[:, None])
            if margin_on == "angle":
                angle = own.clamp(-1 + 1e-7, 1 - 1e-7).acos()
                moved = (angle + margin).clamp(max=torch.pi).cos()
            else:
                moved = own - margin
            cosine = cosine.scatter(1, labels[:, None], moved)
        return F.cross_entropy(scale * cosine, labels)


class ProxySoftmax(nn.Module):
    """:func:`proxy_softmax` with trained proxies, one for each training class.

    Args:
        num_classes: Training classes, C.
        embedding_dim: D.
        scale: Factor of the cosines.
        margin: 0: normalised softmax; above: CosFace or ArcFace.
        margin_on: ``cosine`` (CosFace) or ``angle`` (ArcFace).

    Raises:
        ValueError: A value lies outside its range.
    """

    def __init__(
        self, num_classes: int, embedding_dim: int, scale: float = 16.0, margin: float = 0.0, margin_on: MarginOn = "cosine"
    ) -> None:
        super().__init__()
        checks.at_least(2, "classes", num_classes=num_classes)
        checks.at_least(1, embedding_dim=embedding_dim)
        checks.at_least(0, margin=margin)
        checks.positive(scale=scale)
        checks.one_of(MarginOn, margin_on=margin_on)
        self.proxies = nn.Parameter(F.normalize(torch.randn(num_classes, embedding_dim), dim=1))
        self.scale, self.margin, self.margin_on = scale, margin, margin_on

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """(B, D) and (B,) int64 -> scalar."""
        return proxy_softmax(embeddings, self.proxies, labels, self.scale, self.margin, self.margin_on)


__all__ = ["ProxySoftmax", "proxy_softmax"]
