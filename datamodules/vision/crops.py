"""Several crops of an image and their overlaps, and colours changed at random, for learning without labels.

Source: how the crops of "Self-Supervised Learning of Object Parts for Semantic Segmentation" (Leopart, arXiv:2204.13101) keep the boxes of
their overlaps; sizes, and what is done to colours, as CoTAP (arXiv:2509.09429) has them.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]
_TRIES = 20  # boxes that a crop may choose from


@dataclass(frozen=True)
class Crops:
    """How many crops an image has, and of what size.

    Attributes:
        large: G, crops of most of the image.
        small: L, crops of a little of it.
        large_size: Side of a large crop in pixels.
        small_size: Side of a small crop in pixels.
        large_scale: Smallest and largest share of the image's area.
        small_scale: The same of small crops.
        overlap: Share of the image's area that a small crop shares with each large one at least, and a large one twice that.
    """

    large: int = 2
    small: int = 4
    large_size: int = 224
    small_size: int = 96
    large_scale: tuple[float, float] = (0.25, 1.0)
    small_scale: tuple[float, float] = (0.05, 0.1)
    overlap: float = 0.01


def random_boxes(height: int, width: int, scale: tuple[float, float], rng: np.random.Generator) -> Floats:
    """20 boxes (x0, y0, x1, y1) inside an image, in pixels: area by ``scale``, width / height 3/4 to 4/3 where the image allows it."""
    area = height * width * rng.uniform(*scale, _TRIES)
    aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3), _TRIES))
    sides = np.stack([np.minimum(np.sqrt(area * aspect), width), np.minimum(np.sqrt(area / aspect), height)], axis=1)
    corner = rng.uniform(0, 1, (_TRIES, 2)) * (np.array([width, height]) - sides)
    return np.concatenate([corner, corner + sides], axis=1)


def intersections(boxes: Floats, others: Floats) -> Floats:
    """(n, m, 4) boxes that n and m boxes have in common; without area where they have none."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    return np.concatenate([low, np.maximum(np.minimum(boxes[:, None, 2:], others[None, :, 2:]), low)], axis=2)


def _area(boxes: Floats) -> Floats:
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def draw_boxes(height: int, width: int, crops: Crops, rng: np.random.Generator) -> Floats:
    """(G + L, 4) boxes of an image's crops, large ones first, each of which overlaps with all large ones before it.

    Of 20 boxes the first that does is taken; where none does, the last one, moved to the middle of what the large crops share.
    """
    found = random_boxes(height, width, crops.large_scale, rng)[:1]
    for number in range(1, crops.large + crops.small):
        large = found[: crops.large]
        some = random_boxes(height, width, crops.large_scale if number < crops.large else crops.small_scale, rng)
        common = _area(intersections(some, large)) / (height * width)
        fits = (common > crops.overlap * (2 if number < crops.large else 1)).all(1)
        chosen = some[fits.argmax()] if fits.any() else some[-1]
        if not fits.any():
            shared = np.concatenate([large[:, :2].max(0), large[:, 2:].min(0)])
            side = chosen[2:] - chosen[:2]
            corner = np.clip((shared[:2] + shared[2:] - side) / 2, 0, np.array([width, height]) - side)
            chosen = np.concatenate([corner, corner + side])
        found = np.concatenate([found, chosen[None]])
    return found


def overlaps(boxes: Floats, crops: Crops) -> NDArray[np.float32]:
    """(G, G + L, 2, 4) what large crop g and crop v share, in pixels of g and then in pixels of v."""
    common = intersections(boxes[: crops.large], boxes)
    size = np.repeat([crops.large_size, crops.small_size], [crops.large, crops.small])[:, None]
    factor = size / (boxes[:, 2:] - boxes[:, :2])  # pixels of the crop in one of the image, (G + L, 2)

    def seen(by: Floats, factors: Floats) -> Floats:
        return (common - np.tile(by[..., :2], 2)) * np.tile(factors, 2)

    first = seen(boxes[: crops.large, None], factor[: crops.large, None])
    return np.stack([first, seen(boxes[None], factor[None])], axis=2).astype(np.float32)


def cut(image: Tensor, boxes: Floats, size: int) -> Tensor:
    """Crops of an image (3, H, W), each resized to (3, size, size): means over the pixels that a new pixel covers."""
    from torchvision.ops import roi_align

    rois = torch.from_numpy(np.concatenate([np.zeros((len(boxes), 1)), boxes], axis=1)).to(image.dtype)
    return roi_align(image[None], rois, size, aligned=True)


# ---- colours -----------------------------------------------------------------------------------------------------------------------------


def turn_hues(images: Tensor, turns: Tensor) -> Tensor:
    """Hues turned on the wheel of colours.

    Args:
        images: (N, 3, H, W) RGB in [0, 1].
        turns: (N,) in whole turns.
    """
    high, low = images.amax(1), images.amin(1)
    chroma = high - low
    r, g, b = images.unbind(1)
    safe = torch.where(chroma > 0, chroma, 1.0)
    sixths = torch.where(high == r, ((g - b) / safe) % 6, torch.where(high == g, (b - r) / safe + 2, (r - g) / safe + 4))
    place = sixths + 6 * turns[:, None, None]
    k = (torch.tensor([5.0, 3.0, 1.0])[:, None, None] + place[:, None]) % 6
    return high[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def blur(images: Tensor, sigmas: Tensor) -> Tensor:
    """Gaussian blurs over 7 x 7 pixels, one for each image (N, 3, H, W), H and W at least 4; standard deviations (N,) in pixels."""
    steps = torch.arange(-3.0, 4.0)
    kernels = torch.exp(-0.5 * (steps / sigmas[:, None]) ** 2)
    kernels = (kernels / kernels.sum(1, keepdim=True)).repeat_interleave(3, 0)
    flat = F.pad(images, (3, 3, 3, 3), mode="reflect").flatten(0, 1)[None]
    flat = F.conv2d(flat, kernels[:, None, None, :], groups=len(kernels))
    return F.conv2d(flat, kernels[:, None, :, None], groups=len(kernels))[0].unflatten(0, images.shape[:2])


def recolour(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Random colours, each image with its own: brightness, contrast, saturation, hue (with probability 0.8), grey (0.2), blur (0.5).

    The three factors lie in 0.2 to 1.8, the hue is turned by at most 0.2 of the wheel, the blur is of 0.1 to 2 pixels.

    Args:
        images: (N, 3, H, W) RGB in [0, 1].
        rng: What all is drawn from.

    Returns:
        (N, 3, H, W) in [0, 1].
    """
    number = len(images)
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    factors = torch.from_numpy(rng.uniform(0.2, 1.8, (3, number, 1, 1, 1)).astype(np.float32))
    turns = torch.from_numpy(rng.uniform(-0.2, 0.2, number).astype(np.float32))
    sigmas = torch.from_numpy(rng.uniform(0.1, 2.0, number).astype(np.float32))
    jittered, grey, blurred = (torch.from_numpy(rng.uniform(size=number) < share)[:, None, None, None] for share in (0.8, 0.2, 0.5))
    new = (images * factors[0]).clamp(0, 1)
    mean = (new * weights).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    new = (mean + (new - mean) * factors[1]).clamp(0, 1)
    light = (new * weights).sum(1, keepdim=True)
    new = turn_hues((light + (new - light) * factors[2]).clamp(0, 1), turns)
    new = torch.where(jittered, new, images)
    new = torch.where(grey, (new * weights).sum(1, keepdim=True), new)
    return torch.where(blurred, blur(new, sigmas), new).clamp(0, 1)


__all__ = ["Crops", "blur", "cut", "draw_boxes", "intersections", "overlaps", "random_boxes", "recolour", "turn_hues"]
