"""A small detector of actions in clips, and what any such network gives."""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lit_methods.checks import at_least, share


class Detection(NamedTuple):
    """What a network says about clips.

    Attributes:
        logits: (B, 1, T, H, W), foreground above 0.
        scores: (B, C), how much each class is there, 0 to 1.
        features: (B, ...), what the class scores are computed from.
    """

    logits: Tensor
    scores: Tensor
    features: Tensor


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(max(groups for groups in (8, 4, 2, 1) if channels % groups == 0), channels)


class SpaceThenTime(nn.Sequential):
    """A (2+1)D convolution: within the frames, then along the frames, each with norm and ReLU.

    Args:
        inputs: Channels in.
        outputs: Channels out.
        stride: Of height and width.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv3d(inputs, outputs, (1, 3, 3), (1, stride, stride), (0, 1, 1), bias=False),
            _norm(outputs),
            nn.ReLU(),
            nn.Conv3d(outputs, outputs, (3, 1, 1), padding=(1, 0, 0), bias=False),
            _norm(outputs),
            nn.ReLU(),
        )


class CompactVideoDetector(nn.Module):
    """Encoder and decoder of (2+1)D convolutions with skips, and a class head; any number of frames, which all layers keep.

    Cost: 79 thousand parameters with 16 channels and 4 classes.

    Args:
        num_classes: C.
        channels: At full resolution; twice as many at each further level.
        levels: Halvings of height and width.
        in_channels: Of the clips.
        dropout: Share of the deepest channels that are left out in training.

    Raises:
        ValueError: A number outside its range.
    """

    def __init__(self, num_classes: int, channels: int = 16, levels: int = 2, in_channels: int = 3, dropout: float = 0.0) -> None:
        super().__init__()
        at_least(1, num_classes=num_classes, channels=channels, levels=levels, in_channels=in_channels)
        share(dropout=dropout)
        widths = [channels * 2**level for level in range(levels + 1)]
        self.stem = SpaceThenTime(in_channels, channels)
        self.down = nn.ModuleList(SpaceThenTime(fine, coarse, stride=2) for fine, coarse in itertools.pairwise(widths))
        self.up = nn.ModuleList(SpaceThenTime(fine + coarse, fine) for fine, coarse in itertools.pairwise(widths))
        self.dropout = nn.Dropout3d(dropout)
        self.mask_head = nn.Conv3d(channels, 1, 1)
        self.class_head = nn.Linear(widths[-1], num_classes)
        self.levels = levels

    def forward(self, clip: Tensor) -> Detection:
        """(B, 3, T, H, W) clips in [0, 1], H and W divisible by 2 for each level.

        Raises:
            ValueError: They aren't.
        """
        side = 2**self.levels
        if clip.ndim != 5 or clip.shape[3] % side or clip.shape[4] % side:
            raise ValueError(f"clips are {tuple(clip.shape)}: expected (B, channels, T, H, W) with H and W divisible by {side}")
        levels = [self.stem(clip)]
        for down in self.down:
            levels.append(down(levels[-1]))
        x = self.dropout(levels[-1])
        features = x.mean(dim=(2, 3, 4))
        for up, skip in zip(reversed(self.up), reversed(levels[:-1]), strict=True):
            x = x.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)
            x = up(torch.cat([x, skip], dim=1))
        return Detection(self.mask_head(x), self.class_head(features).sigmoid(), features)


__all__ = ["CompactVideoDetector", "Detection", "SpaceThenTime"]
