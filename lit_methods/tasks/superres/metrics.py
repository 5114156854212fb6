"""PSNR and SSIM on the luminance, as super-resolution papers report them.

Golden vectors: Jiamian-Wang/Iterative-Soft-Shrinkage-SR at 6e11c43, basicsr/metrics/psnr_ssim.py, see tests/golden/data/issp/README.md.
SSIM: Wang et al. 2004, doi:10.1109/TIP.2003.819861.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

_WEIGHTS = (65.481, 128.553, 24.966)  # BT.601 for RGB in [0, 1], studio range
_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def to_uint8(images: Tensor) -> Tensor:
    """Values in [0, 1] as whole numbers 0 to 255, as if written to a file; uint8 stays as it is.

    Args:
        images: Any shape, floating point (clipped to [0, 1]) or uint8.
    """
    return images if images.dtype == torch.uint8 else (images.clamp(0, 1) * 255).round().to(torch.uint8)


def luminance(images: Tensor) -> Tensor:
    """Y of BT.601: 16 + 65.481 R + 128.553 G + 24.966 B, not rounded.

    Args:
        images: (B, 3, H, W) RGB, or (B, 1, H, W), which is luminance already; uint8, or floating point in [0, 1] (rounded to uint8 first).

    Returns:
        (B, 1, H, W) float64, 16 to 235 for RGB, 0 to 255 for one channel.

    Raises:
        ValueError: Another shape.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must be (B, 3, H, W) RGB or (B, 1, H, W) luminance, got {tuple(images.shape)}")
    images = to_uint8(images)
    wide = (images.cpu() if images.device.type == "mps" else images).double()  # Apple's GPUs have no float64
    if images.shape[1] == 1:
        return wide
    return 16 + (wide / 255 * wide.new_tensor(_WEIGHTS).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)


def _cropped_pair(sr: Tensor, hr: Tensor, border: int) -> tuple[Tensor, Tensor]:
    if sr.shape != hr.shape:
        raise ValueError(f"images of shape {tuple(sr.shape)} can't be compared with {tuple(hr.shape)}: crop them to one size")
    if border < 0 or min(sr.shape[2:]) <= 2 * border:
        raise ValueError(f"a border of {border} pixels leaves nothing of {sr.shape[2]} x {sr.shape[3]}: give fewer, 0 or more")
    height, width = sr.shape[2:]
    inside = (..., slice(border, height - border), slice(border, width - border))
    return luminance(sr[inside]), luminance(hr[inside])


def psnr_y(sr: Tensor, hr: Tensor, crop_border: int = 0) -> Tensor:
    """Peak signal-to-noise ratio on the luminance, peak 255.

    Args:
        sr: See :func:`luminance`.
        hr: What it should be, same shape.
        crop_border: Pixels left out on every side; by convention the scale.

    Returns:
        (B,) float64, dB; inf where both are equal.

    Raises:
        ValueError: Shapes that don't fit.
    """
    a, b = _cropped_pair(sr, hr, crop_border)
    return 10 * torch.log10(255**2 / (a - b).square().mean(dim=(1, 2, 3)))


def ssim_y(sr: Tensor, hr: Tensor, crop_border: int = 0) -> Tensor:
    """Structural similarity on the luminance: 11 x 11 Gaussian of sigma 1.5, whole windows only, biased moments, mean of the map.

    Args:
        sr: See :func:`luminance`.
        hr: What it should be, same shape.
        crop_border: Pixels left out on every side.

    Returns:
        (B,) float64, at most 1.

    Raises:
        ValueError: Shapes that don't fit, or fewer than 11 pixels left on a side.
    """
    a, b = _cropped_pair(sr, hr, crop_border)
    if min(a.shape[2:]) < _WINDOW:
        raise ValueError(f"SSIM needs {_WINDOW} x {_WINDOW} pixels inside the border, got {a.shape[2]} x {a.shape[3]}")
    offsets = torch.arange(_WINDOW, dtype=torch.float64, device=a.device) - _WINDOW // 2
    line = torch.exp(-offsets.square() / (2 * _SIGMA**2))
    line = line / line.sum()

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, line.view(1, 1, -1, 1)), line.view(1, 1, 1, -1))

    mean_a, mean_b, aa, bb, ab = blur(torch.cat([a, b, a * a, b * b, a * b])).chunk(5)
    var_a, var_b, covariance = aa - mean_a.square(), bb - mean_b.square(), ab - mean_a * mean_b
    luma = (2 * mean_a * mean_b + _C1) / (mean_a.square() + mean_b.square() + _C1)
    contrast = (2 * covariance + _C2) / (var_a + var_b + _C2)
    return (luma * contrast).mean(dim=(1, 2, 3))


class _MeanOverImages(Metric):
    """Mean over all images of all ranks; images of different sizes count alike."""

    higher_is_better = True
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, crop_border: int = 0) -> None:
        super().__init__()
        self.crop_border = crop_border
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def _add(self, values: Tensor) -> None:
        self.total += values.sum().to(self.total)
        self.count += len(values)

    def compute(self) -> Tensor:
        """The mean; NaN without images."""
        return self.total / self.count


class LuminancePSNR(_MeanOverImages):
    """Mean of :func:`psnr_y` over images, dB.

    Args:
        crop_border: Pixels left out on every side.
    """

    def update(self, sr: Tensor, hr: Tensor) -> None:
        """Add (B, C, H, W) images, C 1 or 3, in [0, 1] or uint8."""
        self._add(psnr_y(sr, hr, self.crop_border))


class LuminanceSSIM(_MeanOverImages):
    """Mean of :func:`ssim_y` over images.

    Args:
        crop_border: Pixels left out on every side.
    """

    def update(self, sr: Tensor, hr: Tensor) -> None:
        """Add (B, C, H, W) images, C 1 or 3, in [0, 1] or uint8."""
        self._add(ssim_y(sr, hr, self.crop_border))


__all__ = ["LuminancePSNR", "LuminanceSSIM", "luminance", "psnr_y", "ssim_y", "to_uint8"]
