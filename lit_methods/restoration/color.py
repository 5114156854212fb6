"""Colours of a restored image taken from the degraded one: by wavelets or by means and deviations (StableSR, arXiv:2305.07015)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def _widened(images: Tensor) -> Tensor:
    if images.ndim != 4:
        raise ValueError(f"images are {tuple(images.shape)}: give (batch, channels, height, width)")
    return images.to(torch.promote_types(images.dtype, torch.float32))


def wavelet_decompose(images: Tensor, levels: int = 5) -> tuple[Tensor, Tensor]:
    """Splits images into high and low frequencies by a-trous wavelets; their sum is the images.

    Each level blurs with [1 2 1; 2 4 2; 1 2 1] / 16, whose taps lie 2^level pixels apart; the border's pixels go on outside.

    Args:
        images: (B, C, H, W) floating point, any size.
        levels: Blurs, one after the other, >= 1.

    Returns:
        High and low frequencies, like ``images``, in float32 or wider.

    Raises:
        ValueError: Another shape, or no level.
    """
    low = images = _widened(images)
    if levels < 1:
        raise ValueError(f"levels is {levels}: give 1 or more")
    channels = images.shape[1]
    taps = torch.tensor([1.0, 2.0, 1.0], dtype=images.dtype, device=images.device) / 4
    kernel = torch.outer(taps, taps).expand(channels, 1, 3, 3)
    with torch.autocast(images.device.type, enabled=False):
        for level in range(levels):
            apart = 2**level
            low = F.conv2d(F.pad(low, [apart] * 4, mode="replicate"), kernel, dilation=apart, groups=channels)
    return images - low, low


def wavelet_color_fix(restored: Tensor, reference: Tensor, levels: int = 5) -> Tensor:
    """High frequencies of ``restored`` and low ones of ``reference``, added.

    Args:
        restored: (B, C, H, W), any range.
        reference: The same shape and range: the degraded image.
        levels: See :func:`wavelet_decompose`.

    Returns:
        (B, C, H, W) in the dtype of ``restored``; it may leave the range.

    Raises:
        ValueError: The shapes differ.
    """
    if restored.shape != reference.shape:
        raise ValueError(f"restored is {tuple(restored.shape)} and reference {tuple(reference.shape)}: give images of one size")
    return (wavelet_decompose(restored, levels)[0] + wavelet_decompose(reference, levels)[1]).to(restored.dtype)


def adain_color_fix(restored: Tensor, reference: Tensor, eps: float = 1e-5) -> Tensor:
    """``restored`` with the mean and standard deviation that each channel of ``reference`` has.

    Args:
        restored: (B, C, H, W) of two pixels or more, any range.
        reference: (B, C, h, w), the degraded image.
        eps: Added to the unbiased variances.

    Returns:
        (B, C, H, W) in the dtype of ``restored``.

    Raises:
        ValueError: Batches or channels differ.
    """
    first, second = _widened(restored), _widened(reference)
    if first.shape[:2] != second.shape[:2]:
        raise ValueError(f"restored is {tuple(restored.shape)} and reference {tuple(reference.shape)}: give as many images and channels")

    def statistics(images: Tensor) -> tuple[Tensor, Tensor]:
        variance, mean = torch.var_mean(images, dim=(2, 3), keepdim=True)
        return mean, (variance + eps).sqrt()

    mean, std = statistics(first)
    wanted_mean, wanted_std = statistics(second)
    return ((first - mean) / std * wanted_std + wanted_mean).to(restored.dtype)


__all__ = ["adain_color_fix", "wavelet_color_fix", "wavelet_decompose"]
