"""Blind degradations: what a camera, a network and a screen may have done to an image, drawn at random for each image or clip.

``FaceDegradation`` is one blur, one reduction, one noise and one JPEG, as CodeFormer (arXiv:2206.11253) and InterLCM (arXiv:2502.02215)
have it. ``RealDegradation`` is all of it twice, as Real-ESRGAN (arXiv:2107.10833) has it; its numbers are from memory (mem).
Draws come from a numpy generator that the caller brings, so that a sample follows from seed, epoch and index.
"""

import io
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lit_methods import checks

Range = tuple[float, float]
Floats = NDArray[np.float64]
KernelKind = Literal["gaussian", "generalised", "plateau"]


class BlindDegradation:
    """Base of what datamodules degrade images with."""

    def __call__(self, images: Tensor, rng: np.random.Generator) -> Tensor:
        """(N, C, H, W) in [0, 1] -> the same images degraded; what is drawn is the same for all N, but for noise."""
        raise NotImplementedError


# ---- kernels ---------------------------------------------------------------------------------------------------------------------------


def blur_kernel(size: int, sigmas: Sequence[float], angle: float = 0.0, kind: KernelKind = "gaussian", shape: float = 1.0) -> Floats:
    """A blur around the middle, by q = (x', y') S^-1 (x', y')^T of coordinates that are turned by ``angle``.

    Args:
        size: Side in pixels, odd.
        sigmas: Standard deviations along both axes in pixels, > 0.
        angle: In radians.
        kind: ``gaussian``: exp(-q / 2). ``generalised``: exp(-q^shape / 2). ``plateau``: 1 / (1 + q^shape).
        shape: > 0; 1 makes ``generalised`` a Gaussian.

    Returns:
        (size, size), sum 1.

    Raises:
        ValueError: An even size, or a number outside its range.
    """
    if size < 1 or size % 2 == 0:
        raise ValueError(f"size is {size}: give an odd number of pixels")
    checks.positive(sigma_x=sigmas[0], sigma_y=sigmas[1], shape=shape)
    checks.one_of(KernelKind, kind=kind)
    y, x = np.mgrid[:size, :size] - size // 2
    along, across = math.cos(angle) * x + math.sin(angle) * y, math.cos(angle) * y - math.sin(angle) * x
    q = (along / sigmas[0]) ** 2 + (across / sigmas[1]) ** 2
    q = q if kind == "gaussian" else q**shape
    kernel = 1 / (1 + q) if kind == "plateau" else np.exp(-0.5 * q)
    found: Floats = kernel / kernel.sum()
    return found


def sinc_kernel(size: int, cutoff: float) -> Floats:
    """A circular low-pass filter, which rings: c J1(c r) / (2 pi r).

    Args:
        size: Side in pixels, odd.
        cutoff: c in radians a pixel, (0, pi].

    Returns:
        (size, size), sum 1.
    """
    from scipy.special import j1

    if size < 1 or size % 2 == 0:
        raise ValueError(f"size is {size}: give an odd number of pixels")
    checks.within("(0, 3.1416]", "radians a pixel", cutoff=cutoff)
    y, x = np.mgrid[:size, :size] - size // 2
    radius = np.hypot(x, y)
    with np.errstate(invalid="ignore", divide="ignore"):
        kernel = cutoff * j1(cutoff * radius) / (2 * math.pi * radius)
    kernel[size // 2, size // 2] = cutoff**2 / (4 * math.pi)
    found: Floats = kernel / kernel.sum()
    return found


# ---- what is done to images (N, C, H, W) in [0, 1] -------------------------------------------------------------------------------------


def _mirrored(length: int, margin: int) -> Tensor:
    """Indices of ``length`` pixels and ``margin`` more on both sides, mirrored at the border as often as needed."""
    period = max(1, 2 * (length - 1))
    place = (torch.arange(-margin, length + margin) % period).abs()
    return torch.minimum(place, period - place) if length > 1 else torch.zeros_like(place)


def filtered(images: Tensor, kernel: Floats) -> Tensor:
    """Images convolved with a kernel (k, k), mirrored at their borders; any size of images, however small."""
    channels, margin = images.shape[1], kernel.shape[0] // 2
    rows, columns = (_mirrored(side, margin) for side in images.shape[-2:])
    padded = images[:, :, rows][..., columns]
    weight = torch.from_numpy(np.ascontiguousarray(kernel[::-1, ::-1])).to(images).expand(channels, 1, *kernel.shape)
    return F.conv2d(padded, weight, groups=channels)


def resized(images: Tensor, size: Sequence[int], mode: Literal["area", "bilinear", "bicubic"] = "bilinear") -> Tensor:
    """Images (N, C, H, W) in another size, height and width; without antialiasing."""
    if mode == "area":
        return F.interpolate(images, size=list(size), mode="area")
    return F.interpolate(images, size=list(size), mode=mode, align_corners=False)


def with_gaussian_noise(images: Tensor, sigma: float, rng: np.random.Generator, grey: bool = False) -> Tensor:
    """Normal noise of standard deviation ``sigma``, of 255; ``grey``: the same in all channels."""
    shape = (len(images), 1, *images.shape[2:]) if grey else images.shape
    return images + torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)).to(images) * (sigma / 255)


def with_shot_noise(images: Tensor, scale: float, rng: np.random.Generator, grey: bool = False) -> Tensor:
    """Poisson noise of images counted in as many levels as they have, times ``scale``; ``grey``: that of the mean of their channels."""
    source = (images.mean(1, keepdim=True) if grey else images).clamp(0, 1).mul(255).round() / 255
    found = []
    for image in source:
        counts = 2.0 ** math.ceil(math.log2(max(2, image.unique().numel())))
        drawn = rng.poisson((image * counts).double().cpu().numpy()) / counts
        found.append(torch.from_numpy(drawn).to(image) - image)
    return images + torch.stack(found) * scale


def jpeg(images: Tensor, quality: int) -> Tensor:
    """Images (N, 1 or 3, H, W), clamped to [0, 1], written as JPEG of a quality 1 to 100 and read again."""
    pixels = images.clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    read = []
    for image in pixels:
        file = io.BytesIO()
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, format="JPEG", quality=quality)
        read.append(np.atleast_3d(np.asarray(Image.open(file))))
    return torch.from_numpy(np.stack(read)).to(images).permute(0, 3, 1, 2).contiguous() / 255


def _ordered(what: str, low: float, **ranges: Sequence[float]) -> None:
    for name, pair in ranges.items():
        if len(pair) != 2 or not low <= pair[0] <= pair[1] < math.inf:
            raise ValueError(f"{name} is {list(pair)}: give the smallest and largest {what}, from {low:g}")


# ---- one stage -------------------------------------------------------------------------------------------------------------------------


class FaceDegradation(BlindDegradation):
    """resize_up(JPEG_q(down_r(image * k) + noise)): the size stays.

    Example:
        >>> import numpy as np, torch
        >>> degrade = FaceDegradation(kernel_size=9, downsample=(1, 4))
        >>> degrade(torch.rand(1, 3, 32, 32), np.random.default_rng(0)).shape
        torch.Size([1, 3, 32, 32])

    Args:
        kernel_size: Side of the blur in pixels, odd.
        blur: Smallest and largest standard deviation of the blur, in pixels.
        isotropic: Share of blurs that are round.
        downsample: Smallest and largest factor of the reduction.
        noise: Smallest and largest standard deviation of the noise, of 255.
        quality: Smallest and largest quality of JPEG; null: none, as for images of a few pixels.
        grey: Share of images that lose their colours.

    Raises:
        ValueError: A range that is none.
    """

    def __init__(
        self,
        kernel_size: int = 41,
        blur: Range = (0.1, 10.0),
        isotropic: float = 0.5,
        downsample: Range = (1.0, 12.0),
        noise: Range = (0.0, 15.0),
        quality: tuple[int, int] | None = (60, 100),
        grey: float = 0.0,
    ) -> None:
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {kernel_size}: give an odd number of pixels")
        _ordered("standard deviation in pixels", 0.01, blur=blur)
        _ordered("factor", 1, downsample=downsample)
        _ordered("standard deviation, of 255", 0, noise=noise)
        if quality is not None:
            _ordered("quality of JPEG", 1, quality=quality)
        checks.share(isotropic=isotropic, grey=grey)
        self.kernel_size, self.blur, self.isotropic, self.downsample = kernel_size, blur, isotropic, downsample
        self.noise, self.quality, self.grey = noise, quality, grey

    def __call__(self, images: Tensor, rng: np.random.Generator) -> Tensor:
        """(N, C, H, W) in [0, 1] -> the same shape and range; N images share blur, factor and quality."""
        height, width = images.shape[-2:]
        first, second, angle = rng.uniform(*self.blur), rng.uniform(*self.blur), rng.uniform(-math.pi, math.pi)
        round_one = rng.random() < self.isotropic
        images = filtered(images, blur_kernel(self.kernel_size, (first, first if round_one else second), 0.0 if round_one else angle))
        factor = rng.uniform(*self.downsample)
        images = resized(images, [max(1, int(side // factor)) for side in (height, width)])
        images = with_gaussian_noise(images, rng.uniform(*self.noise), rng).clamp(0, 1)
        if self.quality is not None:
            images = jpeg(images, int(rng.integers(self.quality[0], self.quality[1] + 1)))
        if rng.random() < self.grey:
            images = images.mean(1, keepdim=True).expand_as(images)
        return resized(images, (height, width)).clamp(0, 1)


# ---- two stages ------------------------------------------------------------------------------------------------------------------------

_KINDS: tuple[tuple[KernelKind, bool], ...] = tuple(
    (kind, flat) for kind in ("gaussian", "generalised", "plateau") for flat in (True, False)
)  # type: ignore[misc]
_KIND_SHARES = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
_MODES: tuple[Any, ...] = ("area", "bilinear", "bicubic")


class RealDegradation(BlindDegradation):
    """Blur, resize, noise and JPEG twice, then a reduction by ``scale`` and a ringing filter: the second order of Real-ESRGAN.

    Numbers of the recipe that are no arguments are those of Real-ESRGAN (mem).

    Args:
        scale: Result is this many times smaller.
        kernel_size: Largest side of a blur in pixels, odd; smaller ones, from 7, are as likely.
        blur: Smallest and largest standard deviation of the first blur, in pixels; the second's is at most half of the largest.
        resize: Smallest and largest factor of the first change of the size.
        resize_again: Of the second.
        noise: Smallest and largest standard deviation of Gaussian noise, of 255.
        shot_noise: Smallest and largest scale of Poisson noise, which is as likely.
        quality: Smallest and largest quality of JPEG.

    Raises:
        ValueError: A range that is none.
    """

    def __init__(
        self,
        scale: int = 4,
        kernel_size: int = 21,
        blur: Range = (0.2, 3.0),
        resize: Range = (0.15, 1.5),
        resize_again: Range = (0.3, 1.2),
        noise: Range = (1.0, 30.0),
        shot_noise: Range = (0.05, 3.0),
        quality: tuple[int, int] = (30, 95),
    ) -> None:
        checks.at_least(1, scale=scale)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {kernel_size}: give an odd number of pixels")
        _ordered("standard deviation in pixels", 0.01, blur=blur)
        _ordered("factor", 0.01, resize=resize, resize_again=resize_again)
        _ordered("number", 0, noise=noise, shot_noise=shot_noise)
        _ordered("quality of JPEG", 1, quality=quality)
        self.scale, self.kernel_size, self.blur, self.resize, self.resize_again = scale, kernel_size, blur, resize, resize_again
        self.noise, self.shot_noise, self.quality = noise, shot_noise, quality

    def _kernel(self, rng: np.random.Generator, blur: Range) -> Floats:
        sizes = np.arange(min(7, self.kernel_size), self.kernel_size + 1, 2)
        size = int(rng.choice(sizes))
        if rng.random() < 0.1:
            return sinc_kernel(size, rng.uniform(math.pi / (3 if size < 13 else 5), math.pi))
        kind, flat = _KINDS[int(rng.choice(len(_KINDS), p=_KIND_SHARES))]
        first, second, angle = rng.uniform(*blur), rng.uniform(*blur), rng.uniform(-math.pi, math.pi)
        shape = rng.uniform(0.5, 4.0) if kind == "generalised" else rng.uniform(1.0, 2.0)
        return blur_kernel(size, (first, first if flat else second), 0.0 if flat else angle, kind, shape)

    def _scaled(self, images: Tensor, rng: np.random.Generator, factors: Range, shares: Sequence[float], whole: Sequence[int]) -> Tensor:
        """Larger, smaller or as it is, of a size that is a share of ``whole``."""
        way = rng.choice(3, p=shares)
        above, below = (max(1.0, factors[0]), max(1.0, factors[1])), (min(1.0, factors[0]), min(1.0, factors[1]))
        factor = 1.0 if way == 2 else rng.uniform(*(above if way == 0 else below))
        return resized(images, [max(1, round(side * factor)) for side in whole], _MODES[int(rng.integers(3))])

    def _noisy(self, images: Tensor, rng: np.random.Generator, share: float = 1.0) -> Tensor:
        grey = bool(rng.random() < 0.4)
        if rng.random() < 0.5:
            return with_gaussian_noise(images, rng.uniform(*self.noise) * share, rng, grey).clamp(0, 1)
        return with_shot_noise(images, rng.uniform(*self.shot_noise) * share, rng, grey).clamp(0, 1)

    def __call__(self, images: Tensor, rng: np.random.Generator) -> Tensor:
        """(N, C, H, W) in [0, 1] -> (N, C, H // scale, W // scale) in [0, 1]; N images share all draws but noise.

        Raises:
            ValueError: Images of fewer pixels than ``scale``.
        """
        whole = images.shape[-2:]
        if min(whole) < self.scale:
            raise ValueError(f"images of {whole[0]} x {whole[1]} pixels can't become {self.scale} times smaller: give larger ones")
        images = filtered(images, self._kernel(rng, self.blur))
        images = self._scaled(images, rng, self.resize, (0.2, 0.7, 0.1), whole)
        images = jpeg(self._noisy(images, rng), self._quality(rng))
        if rng.random() < 0.8:
            images = filtered(images, self._kernel(rng, (self.blur[0], max(self.blur[0], self.blur[1] / 2))))
        last = [side // self.scale for side in whole]
        images = self._scaled(images, rng, self.resize_again, (0.3, 0.4, 0.3), last)
        images = self._noisy(images, rng, 5 / 6)
        ringing = sinc_kernel(self.kernel_size, rng.uniform(math.pi / 3, math.pi)) if rng.random() < 0.8 else None
        mode, jpeg_last = _MODES[int(rng.integers(3))], rng.random() < 0.5
        if not jpeg_last:
            images = jpeg(images, self._quality(rng))
        images = resized(images, last, mode)
        images = images if ringing is None else filtered(images, ringing)
        if jpeg_last:
            images = jpeg(images, self._quality(rng))
        return images.clamp(0, 1)

    def _quality(self, rng: np.random.Generator) -> int:
        return int(rng.integers(self.quality[0], self.quality[1] + 1))


__all__ = [
    "BlindDegradation",
    "FaceDegradation",
    "RealDegradation",
    "blur_kernel",
    "filtered",
    "jpeg",
    "resized",
    "sinc_kernel",
    "with_gaussian_noise",
    "with_shot_noise",
]
