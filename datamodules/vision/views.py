"""Weak and strong views of an image, for methods that compare them. What is drawn follows from (seed, epoch, index) alone.

A policy is a pair of functions (image as stored, draw) -> (C, H, W) float32.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_methods.checks import at_least, one_of
from lit_methods.datamodules.pictures import IMAGENET_MEAN, IMAGENET_STD
from lit_methods.datamodules.vision.imagenet import seeded

Policy = Literal["small_grey", "small_colour", "imagenet"]
View = Callable[[Any, tuple[int, int, int]], Tensor]

# draws of the views of one image come from different seeds
_WEAK, _STRONG = 101, 211


def affine(image: Tensor, angle: float, scale: float, shift: tuple[float, float]) -> Tensor:
    """Rotated, scaled and shifted about its middle; bilinear, 0 outside.

    Args:
        image: (C, H, W) floating point.
        angle: Radians, counter-clockwise.
        scale: Above 1 enlarges.
        shift: To the right and downwards, in pixels.
    """
    height, width = image.shape[1:]
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    # where each pixel of the result comes from, in coordinates of -1 to 1
    theta = torch.tensor([[[cos, -sin * height / width, 0.0], [sin * width / height, cos, 0.0]]])
    theta[0, :, 2] = -(theta[0, :, :2] @ torch.tensor([2 * shift[0] / width, 2 * shift[1] / height]))
    grid = F.affine_grid(theta, [1, *image.shape], align_corners=False)
    return F.grid_sample(image[None], grid, align_corners=False)[0]


def cut_out(image: Tensor, size: int, rng: np.random.Generator, value: float = 0.0) -> Tensor:
    """A copy with a square of ``size`` pixels set to ``value``; its middle may lie anywhere, so that it may be cut off at a border."""
    height, width = image.shape[-2:]
    row, column = int(rng.integers(height)) - size // 2, int(rng.integers(width)) - size // 2
    image = image.clone()
    image[..., max(0, row) : max(0, row + size), max(0, column) : max(0, column + size)] = value
    return image


class SmallGreyView:
    """Grey images of a few pixels, (1, H, W) float32 in [0, 1].

    Weak: rolled by up to a pixel, noise of 0.02. Strong: turned by up to 26 degrees, scaled by up to 20 %, shifted by up to a pixel, a hole
    of 3 x 3 pixels, noise of 0.05. The noise and the shift are ours; the rest is the setting of the small-scale claims.
    """

    def __init__(self, strong: bool) -> None:
        self.strong = strong

    def __call__(self, image: Tensor, draw: tuple[int, int, int]) -> Tensor:
        rng = np.random.default_rng([_STRONG if self.strong else _WEAK, *draw])
        if not self.strong:
            down, right = rng.integers(-1, 2, size=2).tolist()
            return self._noise(image.roll((down, right), dims=(1, 2)), 0.02, rng)
        angle, scale = float(rng.uniform(-26, 26)) * math.pi / 180, float(rng.uniform(0.8, 1.2))
        across, down = rng.uniform(-1, 1, size=2).tolist()
        return self._noise(cut_out(affine(image, angle, scale, (across, down)), 3, rng), 0.05, rng)

    @staticmethod
    def _noise(image: Tensor, std: float, rng: np.random.Generator) -> Tensor:
        return image + std * torch.from_numpy(rng.standard_normal(image.shape, dtype=np.float32))


class SmallColourView:
    """Colour images of CIFAR's kind, (3, H, W) uint8: FixMatch's views, normalised.

    Weak: mirror image, crop after padding by an eighth with reflections. Strong: the same, then RandAugment with two operations of
    torchvision and a hole of half the side.

    Args:
        strong: The strong view; False: the weak one.
        mean: Mean of the channels in [0, 1].
        std: Standard deviation of the channels in [0, 1].
        operations: Number of RandAugment's operations.
        magnitude: Strength of RandAugment, 0 to 30 in torchvision's bins; 10 as in the recipe.
    """

    def __init__(self, strong: bool, mean: Sequence[float], std: Sequence[float], operations: int = 2, magnitude: int = 10) -> None:
        self.strong = strong
        self.mean, self.std = torch.tensor(list(mean)).view(3, 1, 1), torch.tensor(list(std)).view(3, 1, 1)
        if strong:
            from torchvision.transforms import RandAugment

            self.augment = RandAugment(operations, magnitude)

    def __call__(self, image: Tensor, draw: tuple[int, int, int]) -> Tensor:
        rng = np.random.default_rng([_STRONG if self.strong else _WEAK, *draw])
        height, width = image.shape[1:]
        border = max(1, height // 8)
        top, left = rng.integers(2 * border + 1, size=2).tolist()
        padded = F.pad(image.float(), (border,) * 4, mode="reflect")[:, top : top + height, left : left + width]
        view = (padded.flip(2) if rng.integers(2) else padded).to(torch.uint8)
        if self.strong:
            with seeded((_STRONG + draw[0], *draw[1:])):
                view = self.augment(view)
            view = cut_out(view, height // 2, rng, value=127)
        return (view / 255 - self.mean) / self.std


class ImageNetView:
    """Photographs, RGB images of Pillow.

    Weak: a random crop of 20 to 100 % of the area, mirror image. Strong: a crop, mirror image, jitter of colours (0.4, 0.4, 0.2, 0.1) in
    80 %, grey in 20 %, blur in 50 %, solarised in 10 %: SimMatchV2's recipe.

    Args:
        strong: The strong view; False: the weak one.
        size: Side of the view in pixels.
        scale: Smallest and largest share of the area that a crop keeps.
    """

    def __init__(self, strong: bool, size: int = 224, scale: tuple[float, float] = (0.2, 1.0)) -> None:
        from torchvision import transforms as T

        self.strong = strong
        steps: list[Any] = [T.RandomResizedCrop(size, scale=scale), T.RandomHorizontalFlip()]
        if strong:
            steps += [
                T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
                T.RandomGrayscale(p=0.2),
                T.RandomApply([T.GaussianBlur(kernel_size=max(3, size // 10 // 2 * 2 + 1), sigma=(0.1, 2.0))], p=0.5),
                T.RandomSolarize(threshold=128, p=0.1),
            ]
        self.transform = T.Compose([*steps, T.ToTensor(), T.Normalize(IMAGENET_MEAN, IMAGENET_STD)])

    def __call__(self, image: Any, draw: tuple[int, int, int]) -> Tensor:
        with seeded(((_STRONG if self.strong else _WEAK) + draw[0], *draw[1:])):
            return self.transform(image)


# crops of SimMatchV2 with five strong views: side, share of the area
MULTI_CROP = ((224, (0.14, 1.0)), (192, (0.117, 0.86)), (160, (0.095, 0.715)), (120, (0.073, 0.571)), (96, (0.05, 0.429)))


def make_views(
    policy: Policy, strong_views: int = 1, mean: Sequence[float] = (0.5,) * 3, std: Sequence[float] = (0.5,) * 3
) -> tuple[View, list[View]]:
    """The weak view and the strong ones of a policy.

    Args:
        policy: ``small_grey``, ``small_colour`` or ``imagenet``.
        strong_views: S >= 1; with ``imagenet`` and more than one the first S of :data:`MULTI_CROP`, so at most five.
        mean: Mean of the channels, for ``small_colour``.
        std: Standard deviation of the channels, for ``small_colour``.

    Raises:
        ValueError: An unknown policy or number.
    """
    one_of(Policy, policy=policy)
    at_least(1, strong_views=strong_views)
    if policy == "imagenet" and strong_views > len(MULTI_CROP):
        raise ValueError(f"strong_views is {strong_views}: with policy='imagenet' give at most {len(MULTI_CROP)}")
    if policy == "small_grey":
        return SmallGreyView(False), [SmallGreyView(True)] * strong_views
    if policy == "small_colour":
        return SmallColourView(False, mean, std), [SmallColourView(True, mean, std)] * strong_views
    if strong_views == 1:
        return ImageNetView(False), [ImageNetView(True)]
    return ImageNetView(False), [ImageNetView(True, size, scale) for size, scale in MULTI_CROP[:strong_views]]
