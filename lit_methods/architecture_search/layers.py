"""Linear layers and convolutions that see their weights through the mask of learned scores: SparseConv and SparseLinear of DASS.

Maths: :mod:`lit_methods.callbacks.sparsity.score_masks`. Layers of a network that has none of these get scores by the callback
:class:`~lit_methods.callbacks.ScorePruning`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_methods.callbacks.sparsity.score_masks import scaled_scores, score_mask, scored_weight
from lit_methods.checks import at_least


class Scored(nn.Module):
    """What the two layers share: scores, their mask, and the share of the weights that stays.

    Attributes:
        weight: W.
        scores: S, a parameter of the weight's shape; at first Kaiming-normal.
        mask: M, a bool buffer; at first all of it is True.
        keep: Share of the weights that stays.
        learning: In training the mask is made from the scores at each forward pass; else it is the buffer.
    """

    weight: Tensor
    scores: nn.Parameter
    mask: Tensor

    def add_scores(self) -> None:
        """Give a layer that has its weight scores and a mask."""
        self.scores = nn.Parameter(torch.empty_like(self.weight))
        nn.init.kaiming_normal_(self.scores)
        self.register_buffer("mask", torch.ones_like(self.weight, dtype=torch.bool))
        self.keep, self.learning = 1.0, False

    def seen(self) -> Tensor:
        """The weight of the forward pass."""
        return scored_weight(self.weight, self.scores, score_mask(self.scores, self.keep) if self.learning and self.training else self.mask)

    def set_keep(self, keep: float, learning: bool = False, rescore: bool = False) -> None:
        """Another share of the weights, or another phase.

        Args:
            keep: Share that stays, in (0, 1].
            learning: Scores are being trained.
            rescore: Let scores follow from the weights, in the order of their magnitudes.
        """
        self.keep, self.learning = keep, learning
        if rescore:
            with torch.no_grad():
                self.scores.copy_(scaled_scores(self.weight))
        self.refresh()

    def refresh(self) -> None:
        """Make the mask from the scores, which have changed."""
        self.mask.copy_(score_mask(self.scores, self.keep))


class SparseConv2d(Scored, nn.Conv2d):
    """A convolution with scores, padded by zeros.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Pixels of a side of the kernel.
        stride: Pixels between two places of the kernel.
        padding: Zeros on each side.
        dilation: Pixels between two entries of the kernel.
        groups: Groups of channels that don't see each other.
        bias: With a bias, which is never masked.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        at_least(1, in_channels=in_channels, out_channels=out_channels, kernel_size=kernel_size)
        at_least(1, stride=stride, dilation=dilation, groups=groups)
        at_least(0, padding=padding)
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        self.add_scores()

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, H', W')."""
        return F.conv2d(x, self.seen(), self.bias, self.stride, self.padding, self.dilation, self.groups)


class SparseLinear(Scored, nn.Linear):
    """A linear layer with scores.

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        bias: With a bias, which is never masked.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        at_least(1, in_features=in_features, out_features=out_features)
        super().__init__(in_features, out_features, bias)
        self.add_scores()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return F.linear(x, self.seen(), self.bias)


def scored_layers(module: nn.Module) -> dict[str, Scored]:
    """Name -> layer with scores, of all inside a module."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, Scored)}


__all__ = ["Scored", "SparseConv2d", "SparseLinear", "scored_layers"]
