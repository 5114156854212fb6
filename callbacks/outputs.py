"""What anybody's segmentation network puts out, as logits of the size of the labels."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def logits_from(output: Any, who: str) -> Tensor:
    """The logits in what a network returns: a tensor, ``output["out"]`` (torchvision), or ``output.logits`` (transformers).

    Raises:
        ValueError: None of them is there.
    """
    found = output
    if isinstance(output, Mapping):
        found = output.get("out", output.get("logits"))
    elif not isinstance(output, Tensor):
        found = getattr(output, "logits", None)
    if not isinstance(found, Tensor) or found.ndim < 2 or not found.is_floating_point():
        kind = f"{tuple(found.shape)} {found.dtype}" if isinstance(found, Tensor) else type(output).__name__
        raise ValueError(f"{who} puts out {kind}: expected (B, classes, ...) logits, or a mapping with 'out' or 'logits'")
    return found


def resized(logits: Tensor, size: Sequence[int], *, align_corners: bool = False) -> Tensor:
    """(B, C, *size): bilinear where the size is another."""
    if tuple(logits.shape[2:]) == tuple(size):
        return logits
    if logits.ndim != 4 or len(size) != 2:
        raise ValueError(f"logits are {tuple(logits.shape)} and labels have {tuple(size)} pixels: only (B, C, h, w) can be resized")
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=align_corners)


def rows_of_calls(outputs: Sequence[Any], who: str) -> Tensor:
    """Logits of all calls of a network in a step, one behind the other."""
    return torch.cat([logits_from(output, who) for output in outputs])


__all__ = ["logits_from", "resized", "rows_of_calls"]
