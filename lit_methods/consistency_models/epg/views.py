"""Two augmented views of every image of a batch, made on its device, from a generator that the caller gives."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_methods.consistency_models.levels import like


class Views:
    """Makes one view of a batch of images in [-1, 1]; a subclass says how.

    ``view(images (B, C, H, W), second, generator)`` returns the same shape; ``second`` is true for the other of the two views.
    """

    def view(self, images: Tensor, second: bool, generator: torch.Generator) -> Tensor:
        """The view of each image."""
        raise NotImplementedError

    def __call__(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) in [-1, 1] -> both views, each like it. The generator lives on their device."""
        if images.ndim != 4:
            raise ValueError(
                f"{type(self).__name__} takes images (B, C, H, W) and got {tuple(images.shape)}: put view1 and view2 in the batch"
            )
        return self.view(images, False, generator), self.view(images, True, generator)


class ShiftedViews(Views):
    """For tiny images: moved by a pixel or so, brighter or darker, some pixels black.

    Args:
        shift: Largest move in pixels, across and down; what leaves on one side comes in on the other.
        gain: Largest relative change of the brightness, above black.
        drop: Share of the pixels that become black.
    """

    def __init__(self, shift: int = 1, gain: float = 0.2, drop: float = 0.1) -> None:
        self.shift, self.gain, self.drop = shift, gain, drop

    def view(self, images: Tensor, second: bool, generator: torch.Generator) -> Tensor:
        """Both views are made alike."""
        device, moved = images.device, images
        for dim in (2, 3):
            size = images.shape[dim]
            steps = torch.randint(-self.shift, self.shift + 1, (len(images), 1), generator=generator, device=device)
            place = (torch.arange(size, device=device) - steps) % size
            place = place[:, None, :, None] if dim == 2 else place[:, None, None]
            moved = moved.gather(dim, place.expand_as(moved))
        gain = 1 + self.gain * (2 * torch.rand(len(images), generator=generator, device=device) - 1)
        kept = torch.rand(images.shape[0], 1, *images.shape[2:], generator=generator, device=device) >= self.drop
        return (moved + 1) * like(gain, images).to(images.dtype) * kept - 1


class AugmentedViews(Views):
    """For photographs: MoCo v3's recipe (arXiv:2104.02057, which took BYOL's): crop, colours, grey, blur, solarisation, mirror.

    Hue is turned in the YIQ space, and the four changes of colour come in a fixed order, another one in the second view.

    Args:
        min_crop: Smallest share of the area that a crop has; the largest is 1.
        brightness: Largest relative change.
        contrast: How much the contrast changes, in the same way.
        saturation: How much the saturation changes, in the same way.
        hue: Largest turn, in turns of the circle.
        jitter: Chance of the four.
        grey: Chance.
        blur: Chance, of the first and of the second view.
        solarise: Chance, of the first and of the second view.
        mirror: Chance.
    """

    def __init__(
        self,
        min_crop: float = 0.08,
        brightness: float = 0.4,
        contrast: float = 0.4,
        saturation: float = 0.2,
        hue: float = 0.1,
        jitter: float = 0.8,
        grey: float = 0.2,
        blur: tuple[float, float] = (1.0, 0.1),
        solarise: tuple[float, float] = (0.0, 0.2),
        mirror: float = 0.5,
    ) -> None:
        self.min_crop, self.brightness, self.contrast, self.saturation, self.hue = min_crop, brightness, contrast, saturation, hue
        self.jitter, self.grey, self.blur, self.solarise, self.mirror = jitter, grey, blur, solarise, mirror

    def view(self, images: Tensor, second: bool, generator: torch.Generator) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> the same."""
        if images.shape[1] != 3:
            raise ValueError(f"AugmentedViews takes images of 3 colours and got {images.shape[1]}: use ShiftedViews, or views of your own")

        def uniform(low: float = 0.0, high: float = 1.0) -> Tensor:
            return like(torch.rand(len(images), generator=generator, device=images.device) * (high - low) + low, images)

        x = random_crop((images.float() + 1) / 2, self.min_crop, generator)
        changed = x
        for number in (2, 3, 0, 1) if second else (0, 1, 2, 3):
            changed = self._colour(number, changed, uniform)
        x = torch.where(uniform() < self.jitter, changed, x)
        x = torch.where(uniform() < self.grey, luma(x).expand_as(x), x)
        x = torch.where(uniform() < self.blur[second], gaussian_blur(x, uniform(0.1, 2.0).flatten()), x)
        x = torch.where((uniform() < self.solarise[second]) & (x >= 0.5), 1 - x, x)
        x = torch.where(uniform() < self.mirror, x.flip(3), x)
        return (2 * x - 1).to(images.dtype)

    def _colour(self, number: int, x: Tensor, uniform: Callable[[float, float], Tensor]) -> Tensor:
        if number == 3:
            return turn_hue(x, uniform(-self.hue, self.hue).flatten()).clamp(0, 1)
        size = (self.brightness, self.contrast, self.saturation)[number]
        grey = luma(x)
        other = (torch.zeros_like(x), grey.mean((2, 3), keepdim=True), grey)[number]
        return (other + uniform(1 - size, 1 + size) * (x - other)).clamp(0, 1)


def luma(x: Tensor) -> Tensor:
    """Brightness of (B, 3, H, W) colours: (B, 1, H, W)."""
    return (x * x.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)


def turn_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Turn the colours of (B, 3, H, W) by (B,) turns of the circle, at constant brightness in YIQ; nothing is clamped."""
    to_yiq = x.new_tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    cos, sin, zero = (2 * math.pi * turns).cos(), (2 * math.pi * turns).sin(), torch.zeros_like(turns)
    turn = torch.stack([zero + 1, zero, zero, zero, cos, -sin, zero, sin, cos], dim=1).view(-1, 3, 3)
    return torch.einsum("bij,bjhw->bihw", torch.linalg.inv(to_yiq) @ turn @ to_yiq, x)


def gaussian_blur(x: Tensor, sigma: Tensor, radius: int = 6) -> Tensor:
    """Blur each of (B, C, H, W) with its own standard deviation (B,) in pixels, > 0; at the edges the picture is mirrored."""
    radius = min(radius, min(x.shape[2:]) - 1)
    place = torch.arange(-radius, radius + 1, device=x.device)
    kernel = (-0.5 * (place / sigma[:, None]).square()).softmax(1).repeat_interleave(x.shape[1], 0)
    flat = F.pad(x, [radius] * 4, mode="reflect").flatten(0, 1)[None]
    flat = F.conv2d(flat, kernel[:, None, :, None], groups=len(kernel))
    return F.conv2d(flat, kernel[:, None, None, :], groups=len(kernel)).view_as(x)


def random_crop(x: Tensor, min_area: float, generator: torch.Generator) -> Tensor:
    """Cut a piece out of each of (B, C, H, W) and enlarge it to the whole: area U(min_area, 1), sides from 3:4 to 4:3.

    The first of ten draws that fits is taken; the whole image if none does.
    """
    batch = len(x)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=x.device)

    area, ratio = uniform(batch, 10) * (1 - min_area) + min_area, ((2 * uniform(batch, 10) - 1) * math.log(4 / 3)).exp()
    sides = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], dim=2)  # share of width and height
    fits = (sides <= 1).all(2)
    first = fits.float().argmax(1)[:, None, None].expand(-1, 1, 2)
    chosen = torch.where(fits.any(1, keepdim=True), sides.gather(1, first)[:, 0], 1.0)
    centre = (2 * uniform(batch, 2) - 1) * (1 - chosen)
    zero = torch.zeros_like(chosen[:, 0])
    theta = torch.stack([chosen[:, 0], zero, centre[:, 0], zero, chosen[:, 1], centre[:, 1]], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bicubic", padding_mode="border", align_corners=False).clamp(0, 1)
