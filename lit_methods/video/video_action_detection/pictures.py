"""What clips and their masks look like."""

import torch
import torch.nn.functional as F
from torch import Tensor

PREDICTED, TRUE = (0.95, 0.25, 0.2), (0.2, 0.85, 0.3)  # colours of outlines
_SIDE = 64  # pixels that a frame has at least


def outline(mask: Tensor) -> Tensor:
    """Border pixels of a mask (..., H, W), bool: those inside that have a neighbour outside."""
    x = mask.flatten(0, -3).float()[:, None]
    inside = -F.max_pool2d(-F.pad(x, (1, 1, 1, 1)), 3, stride=1)
    return ((x > 0) & (inside <= 0)).view(mask.shape)


def outlined(clip: Tensor, predicted: Tensor, true: Tensor | None = None) -> Tensor:
    """Clips with the outline of the predicted mask in red and of the true one in green.

    Args:
        clip: (B, 1 or 3, T, H, W) in [0, 1].
        predicted: (B, 1, T, H, W) bool.
        true: Of the same shape; None: there is none.

    Returns:
        (B, 3, T, H, W) in [0, 1].
    """
    shown = clip.float().clamp(0, 1).expand(-1, 3, -1, -1, -1).clone()
    for mask, colour in ((true, TRUE), (predicted, PREDICTED)):
        if mask is not None:
            border = outline(mask).expand_as(shown)
            shown = torch.where(border, shown.new_tensor(colour).view(1, 3, 1, 1, 1).expand_as(shown), shown)
    return shown


def strip(rows: list[Tensor]) -> Tensor:
    """Clips below each other, their frames side by side: (B, 1 or 3, T, H, W) in [0, 1] each -> (h, w, 3) uint8.

    The rows of a clip stand together: its first tensor, then its second, and so on.
    """
    wide = torch.stack([row.float().clamp(0, 1).expand(-1, 3, -1, -1, -1) for row in rows], dim=1).flatten(0, 1)
    times = max(1, -(-_SIDE // min(wide.shape[-2:])))
    frames = wide.repeat_interleave(times, dim=3).repeat_interleave(times, dim=4)
    frames = F.pad(frames, (1, 1, 1, 1), value=1.0)
    picture = frames.permute(0, 3, 2, 4, 1).flatten(0, 1).flatten(1, 2)  # (rows h, T w, 3)
    return picture.mul(255).round().byte().cpu()


__all__ = ["outline", "outlined", "strip"]
