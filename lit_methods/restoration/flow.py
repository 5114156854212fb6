"""Optical flow that gradients go through: warping, three estimators, and how far a video moves against its own flow.

A flow (B, 2, H, W) is (dx, dy) in pixels: the content at x of the reference stands at x + flow in the support. Images are (B, C, H, W) in
[-1, 1]. An estimator is a module of (reference, support) -> flow.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_methods import checks

Padding = Literal["zeros", "border", "reflection"]
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# ---- warping ---------------------------------------------------------------------------------------------------------------------------


def flow_warp(x: Tensor, flow: Tensor, padding_mode: Padding = "zeros") -> Tensor:
    """The support seen from the reference: x at each pixel's place plus flow, between pixels bilinearly.

    Args:
        x: (B, C, H, W), the support.
        flow: (B, 2, H, W): dx and dy in pixels.
        padding_mode: What lies outside: ``zeros``, the nearest pixel of the ``border``, or a ``reflection``.

    Returns:
        Like ``x``.

    Raises:
        ValueError: The sizes differ.
    """
    if flow.shape != (x.shape[0], 2, *x.shape[2:]):
        raise ValueError(f"flow is {tuple(flow.shape)} and x {tuple(x.shape)}: give a flow (B, 2, H, W) of the same size")
    height, width = x.shape[-2:]
    rows = torch.arange(height, device=x.device, dtype=flow.dtype)[:, None] + flow[:, 1]
    columns = torch.arange(width, device=x.device, dtype=flow.dtype) + flow[:, 0]
    # corners are the centres of the outer pixels; a side of one pixel has its only centre there
    place = torch.stack([2 * columns / max(width - 1, 1) - 1, 2 * rows / max(height - 1, 1) - 1], dim=-1)
    return F.grid_sample(x, place.to(x.dtype), mode="bilinear", padding_mode=padding_mode, align_corners=True)


def resize_flow(flow: Tensor, height: int, width: int) -> Tensor:
    """A flow (B, 2, h, w) for images of another size, (B, 2, height, width): larger images move by more pixels."""
    scale = flow.new_tensor([width / flow.shape[-1], height / flow.shape[-2]]).view(2, 1, 1)
    return F.interpolate(flow, (height, width), mode="bilinear", align_corners=False) * scale


def warping_error(first: Tensor, second: Tensor, flow: Tensor, back: Tensor | None = None) -> Tensor:
    """Mean absolute difference of a frame and the next one, warped back to it, where the content stays in sight (arXiv:1808.00449).

    Args:
        first: (B, C, H, W).
        second: Like ``first``.
        flow: (B, 2, H, W) from first to second, of clean frames.
        back: From second to first; pixels where the two disagree, |f + b(x + f)|^2 > 0.01 (|f|^2 + |b|^2) + 0.5, are hidden in one of the
            frames and don't count. None: all inside the frame count.

    Returns:
        (B,); 0 where no pixel counts.
    """
    seen = flow_warp(torch.ones_like(first[:, :1]), flow) > 0.999
    if back is not None:
        returned = flow_warp(back, flow)
        power = flow.square().sum(1, keepdim=True) + returned.square().sum(1, keepdim=True)
        seen = seen & ((flow + returned).square().sum(1, keepdim=True) <= 0.01 * power + 0.5)
    error = (first - flow_warp(second, flow)).abs().mean(1, keepdim=True)
    counted = seen.to(error.dtype)
    return (error * counted).flatten(1).sum(1) / counted.flatten(1).sum(1).clamp(min=1)


def flow_difference(flow: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference of two flows (B, 2, H, W), each direction as a share of the width and the height."""
    size = flow.new_tensor([flow.shape[-1], flow.shape[-2]]).view(2, 1, 1)
    return ((flow - target) / size).abs().mean()


# ---- estimators ------------------------------------------------------------------------------------------------------------------------


class CorrelationFlow(nn.Module):
    """Flow by comparing neighbourhoods, from coarse to fine; nothing is learned, and gradients go to both images.

    At each size the support is warped by the flow so far. For each shift d of up to ``radius`` pixels the squared difference of reference
    and shifted support is averaged over a neighbourhood, and the flow grows by the mean of d with weights softmax(-difference / T).

    Work: (2 radius + 1)^2 comparisons of each size.

    Args:
        levels: Sizes, each half of the one before; the coarsest keeps 8 pixels and more.
        radius: Largest shift at a size, in its pixels.
        window: Side of the neighbourhood, odd.
        temperature: T: in squared units of images in [-1, 1], lower is harder.
    """

    def __init__(self, levels: int = 3, radius: int = 2, window: int = 5, temperature: float = 0.002) -> None:
        super().__init__()
        checks.at_least(1, levels=levels, radius=radius, window=window)
        checks.positive(temperature=temperature)
        if not window % 2:
            raise ValueError(f"window is {window}: give an odd number of pixels")
        self.levels, self.radius, self.window, self.temperature = levels, radius, window, temperature

    def forward(self, reference: Tensor, support: Tensor) -> Tensor:
        """(B, C, H, W) twice -> (B, 2, H, W) in float32 or wider."""
        with torch.autocast(reference.device.type, enabled=False):
            wide = torch.promote_types(reference.dtype, torch.float32)
            pairs = [(reference.to(wide), support.to(wide))]
            while len(pairs) < self.levels and min(pairs[-1][0].shape[-2:]) >= 16:
                pairs.append((F.avg_pool2d(pairs[-1][0], 2), F.avg_pool2d(pairs[-1][1], 2)))
            coarse = pairs[-1][0]
            flow = coarse.new_zeros(len(coarse), 2, *coarse.shape[-2:])
            for first, second in reversed(pairs):
                flow = resize_flow(flow, first.shape[-2], first.shape[-1])
                flow = flow + self._step(first, flow_warp(second, flow, "border"))
            return flow

    def _step(self, first: Tensor, second: Tensor) -> Tensor:
        side, around = 2 * self.radius + 1, self.window // 2
        batch, channels, height, width = second.shape
        shifted = F.unfold(F.pad(second, (self.radius,) * 4, mode="replicate"), side).view(batch, channels, side * side, height, width)
        cost = (shifted - first[:, :, None]).square().mean(1)
        cost = F.avg_pool2d(F.pad(cost, (around,) * 4, mode="replicate"), self.window, stride=1)
        weights = (-cost / self.temperature).softmax(1)
        steps = torch.arange(-self.radius, self.radius + 1, device=first.device, dtype=first.dtype)
        dy, dx = (part.flatten() for part in torch.meshgrid(steps, steps, indexing="ij"))
        return torch.einsum("bkhw,ck->bchw", weights, torch.stack([dx, dy]))


class SPyNet(nn.Module):
    """Spatial pyramid network (arXiv:1611.00850): at each size five convolutions of 7 x 7 correct the flow of the size below.

    Weights are a plain state dict with the names of BasicSR's ``spynet_sintel_final``, which lie under ``params`` in that file (mem).

    Cost: 1.44 million parameters with six levels.

    Args:
        weights: File of weights; None: random ones, to be trained.
        levels: Sizes of the pyramid.

    Raises:
        ValueError: The file holds other weights.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, weights: Path | None = None, levels: int = 6) -> None:
        super().__init__()
        checks.at_least(1, levels=levels)
        widths = (8, 32, 64, 32, 16, 2)
        self.basic_module = nn.ModuleList()
        for _ in range(levels):
            layers = [part for a, b in pairwise(widths) for part in (nn.Conv2d(a, b, 7, padding=3), nn.ReLU())]
            level = nn.Module()
            level.basic_module = nn.Sequential(*layers[:-1])
            self.basic_module.append(level)
        self.register_buffer("mean", torch.tensor(_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_STD).view(3, 1, 1), persistent=False)
        if weights is not None:
            _load(self, weights, "the weights of a SPyNet with as many levels")

    def forward(self, reference: Tensor, support: Tensor) -> Tensor:
        """(B, 3, H, W) twice -> (B, 2, H, W)."""
        height, width = reference.shape[-2:]
        step = 2 ** (len(self.basic_module) - 1)
        size = (-(-height // step) * step, -(-width // step) * step)
        images = [F.interpolate(image, size, mode="bilinear", align_corners=False) for image in (reference, support)]
        pairs = [[(image / 2 + 0.5 - self.mean) / self.std for image in images]]
        for _ in range(len(self.basic_module) - 1):
            pairs.append([F.avg_pool2d(image, 2) for image in pairs[-1]])
        coarse = pairs[-1][0]
        flow = coarse.new_zeros(len(coarse), 2, *coarse.shape[-2:])
        for level, (first, second) in zip(self.basic_module, reversed(pairs), strict=True):
            if flow.shape[-2:] != first.shape[-2:]:
                flow = 2 * F.interpolate(flow, first.shape[-2:], mode="bilinear", align_corners=True)
            correction: Tensor = level.basic_module(torch.cat([first, flow_warp(second, flow, "border"), flow], dim=1))  # type: ignore[operator,union-attr]
            flow = flow + correction
        return resize_flow(flow, height, width)


class RAFTFlow(nn.Module):
    """torchvision's RAFT (arXiv:2003.12039), small or large, from a file of its weights.

    Args:
        weights: File that torchvision offers, such as ``raft_small_C_T_V2-01064c6d.pth``; None: random weights, for trials.
        size: ``small`` or ``large``.
        updates: Rounds of correction.

    Raises:
        ValueError: The file holds other weights.
    """

    def __init__(self, weights: Path | None = None, size: Literal["small", "large"] = "small", updates: int = 12) -> None:
        super().__init__()
        checks.literals(RAFTFlow, locals())
        checks.at_least(1, updates=updates)
        from torchvision.models.optical_flow import raft_large, raft_small

        self.model: Any = (raft_small if size == "small" else raft_large)(weights=None, progress=False)
        self.updates = updates
        if weights is not None:
            _load(self.model, weights, f"the weights of raft_{size}")

    def forward(self, reference: Tensor, support: Tensor) -> Tensor:
        """(B, 3, H, W) twice -> (B, 2, H, W); sides below 128 pixels are enlarged for RAFT."""
        height, width = reference.shape[-2:]
        size = tuple(max(128, -(-side // 8) * 8) for side in (height, width))
        images = [F.interpolate(image, size, mode="bilinear", align_corners=False) for image in (reference, support)]
        flow: Tensor = self.model(*images, num_flow_updates=self.updates)[-1]
        return resize_flow(flow, height, width)


def _load(model: nn.Module, file: Path, wanted: str) -> None:
    from lit_methods.hub import leave_out
    from lit_methods.runs.checkpoints import read_state_dict

    if leave_out(f"weights={str(file)!r}", file):
        return
    try:
        state = read_state_dict(Path(file).expanduser())
        model.load_state_dict({name: value for name, value in state.items() if name not in ("mean", "std")})
    except RuntimeError as error:
        raise ValueError(f"weights={str(file)!r} don't fit ({str(error).splitlines()[-1].strip()}): give {wanted}") from error


__all__ = ["CorrelationFlow", "RAFTFlow", "SPyNet", "flow_difference", "flow_warp", "resize_flow", "warping_error"]
