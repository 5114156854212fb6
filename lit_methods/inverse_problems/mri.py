"""Magnetic resonance imaging: Fourier transforms, coils, and the operator of both.

Complex numbers are a last axis of 2, real and imaginary part.

Shapes: image (B, H, W, 2), k-space and coil maps (B, C, H, W, 2), mask (1 or B, 1, H, W, 1) bool. Coil maps have sum_c |S_c|^2 = 1 where
there is anything. A centred transform has frequency 0 at (H // 2, W // 2), as fastMRI's k-space has.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lit_methods import checks
from lit_methods.inverse_problems.operators import LinearOperator, precise

Normalization = Literal["backward", "ortho", "forward"]


class Fourier(NamedTuple):
    """Which Fourier transform: what the data were written with.

    Attributes:
        centered: Frequency 0 stands in the middle; false: first.
        normalization: ``ortho``: unitary; ``backward``: 1/(HW) on the way to the image; ``forward``: on the way to k-space.
    """

    centered: bool = True
    normalization: Normalization = "ortho"


CENTERED = Fourier()


def _transform(x: Tensor, fourier: Fourier, inverse: bool) -> Tensor:
    def run(values: Tensor) -> Tensor:
        z = torch.view_as_complex(values.contiguous())
        if fourier.centered:
            z = torch.fft.ifftshift(z, dim=(-2, -1))
        z = (torch.fft.ifft2 if inverse else torch.fft.fft2)(z, norm=fourier.normalization)
        if fourier.centered:
            z = torch.fft.fftshift(z, dim=(-2, -1))
        return torch.view_as_real(z)

    return precise(run, x)


def fft2c(image: Tensor, fourier: Fourier = CENTERED) -> Tensor:
    """2-D Fourier transform over (H, W) of (..., H, W, 2), in float32 or wider with autocast off."""
    return _transform(image, fourier, inverse=False)


def ifft2c(kspace: Tensor, fourier: Fourier = CENTERED) -> Tensor:
    """Inverse of :func:`fft2c`."""
    return _transform(kspace, fourier, inverse=True)


def complex_product(a: Tensor, b: Tensor, conjugate: bool = False) -> Tensor:
    """The product a b, or conj(a) b, of tensors (..., 2) that broadcast."""

    def run(a: Tensor, b: Tensor) -> Tensor:
        left = torch.view_as_complex(a.contiguous())
        return torch.view_as_real((left.conj() if conjugate else left) * torch.view_as_complex(b.contiguous()))

    return precise(run, a, b)


def magnitude(x: Tensor) -> Tensor:
    """|x| of (..., 2); its gradient at 0 is 0."""
    return precise(lambda values: torch.view_as_complex(values.contiguous()).abs(), x)


def sense_expand(image: Tensor, maps: Tensor) -> Tensor:
    """What each coil sees of an image, S_c x: (B, H, W, 2) -> (B, C, H, W, 2)."""
    return complex_product(maps, image.unsqueeze(1))


def sense_reduce(coils: Tensor, maps: Tensor) -> Tensor:
    """Coil images as one, sum_c conj(S_c) x_c: (B, C, H, W, 2) -> (B, H, W, 2)."""
    return complex_product(maps, coils, conjugate=True).sum(1)


def sense_combine(kspace: Tensor, maps: Tensor, fourier: Fourier = CENTERED) -> Tensor:
    """The zero-filled image of k-space, sum_c conj(S_c) F^-1 y_c: (B, C, H, W, 2) -> (B, H, W, 2)."""
    return sense_reduce(ifft2c(kspace, fourier), maps)


def normalise_maps(maps: Tensor) -> Tensor:
    """Coil maps with sum_c |S_c|^2 = 1; places where all are 0 stay 0."""
    size = maps.square().sum((1, -1), keepdim=True).sqrt()
    return maps / torch.where(size > 0, size, 1)


def estimate_maps(kspace: Tensor, lines: int, fourier: Fourier = CENTERED) -> Tensor:
    """Coil maps from the fully sampled middle of centred k-space: its coil images over the root of their sum of squares.

    Args:
        kspace: (B, C, H, W, 2), frequency 0 in the middle.
        lines: Side of the square in the middle that is taken, in samples, softened by a Hann window against ringing.
        fourier: Its transform.

    Raises:
        ValueError: ``lines`` is smaller than 2, or k-space isn't centred.
    """
    checks.at_least(2, lines=lines)
    if not fourier.centered:
        raise ValueError("estimate_maps takes the middle of k-space, but fourier isn't centred: shift k-space first")
    height, width = kspace.shape[-3:-1]
    rows, columns = min(lines, height), min(lines, width)
    window = torch.zeros(height, width, dtype=kspace.dtype, device=kspace.device)
    soft = torch.outer(*(torch.hann_window(side + 2, False, dtype=kspace.dtype, device=kspace.device)[1:-1] for side in (rows, columns)))
    top, left = height // 2 - rows // 2, width // 2 - columns // 2
    window[top : top + rows, left : left + columns] = soft
    return normalise_maps(ifft2c(kspace * window[..., None], fourier))


def check_shapes(kspace: Tensor, maps: Tensor, mask: Tensor) -> None:
    """Raise unless k-space, coil maps and mask belong together.

    Args:
        kspace: (B, C, H, W, 2).
        maps: The same shape.
        mask: (1 or B, 1, H or 1, W, 1).

    Raises:
        ValueError: They don't.
    """
    if kspace.ndim != 5 or kspace.shape[-1] != 2:
        raise ValueError(f"k-space is {tuple(kspace.shape)}: expected (batch, coils, height, width, 2), real and imaginary part last")
    if maps.shape != kspace.shape:
        raise ValueError(
            f"coil maps are {tuple(maps.shape)} and k-space {tuple(kspace.shape)}: expected one shape; give the maps of the same slices "
            "and the same coils, or let them be estimated"
        )
    try:
        fits = mask.ndim == 5 and torch.broadcast_shapes(mask.shape, kspace.shape) == kspace.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"mask is {tuple(mask.shape)}: expected (1 or batch, 1, height, width, 1) for k-space {tuple(kspace.shape)}")


class MultiCoilMRI(LinearOperator):
    """A x = M F(S_c x) of images (B, H, W, 2); A^H y = sum_c conj(S_c) F^-1(M y) up to the transform's scale.

    Args:
        maps: (1 or B, C, H, W, 2).
        mask: (1 or B, 1, H, W, 1), true where measured.
        fourier: Which transform. The adjoint is exact for each normalization.
        iterations: Conjugate gradient iterations of the pseudo-inverse.
    """

    maps: Tensor
    mask: Tensor

    def __init__(self, maps: Tensor, mask: Tensor, fourier: Fourier = CENTERED, iterations: int = 50) -> None:
        super().__init__(iterations)
        check_shapes(maps, maps, mask if len(mask) == 1 or len(maps) > 1 else mask[:1])
        self.fourier = fourier
        self.register_buffer("maps", maps.detach(), persistent=False)
        self.register_buffer("mask", mask.detach() != 0, persistent=False)
        self._made: tuple[Any, tuple[Tensor, Tensor]] | None = None  # from which maps and mask, and what _factors made of them

    def _factors(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Maps (1 or B, C, H, W) and mask (1 or B, 1, H, W), complex, with the signs that a centred transform of even sides consists of.

        With s = (-1)^(row + column), fftshift F ifftshift x = +-s F(s x): two products that are there anyway, in place of two copies of all
        coils.
        """
        key = like.dtype, like.device, self.maps._version, self.maps.data_ptr(), self.mask._version, self.mask.data_ptr()
        if self._made is None or self._made[0] != key:
            height, width = self.maps.shape[-3:-1]
            with torch.inference_mode(False), torch.no_grad():
                maps, mask = torch.view_as_complex(self.maps.to(like).contiguous()), self.mask[..., 0].to(like)
                if self.fourier.centered:
                    rows, columns = torch.arange(height, device=like.device), torch.arange(width, device=like.device)
                    signs = 1 - 2 * ((rows[:, None] + columns) % 2).to(like)
                    maps, mask = maps * signs, mask * signs * (-1) ** ((height + width) // 2)
                self._made = key, (maps, torch.complex(mask, torch.zeros_like(mask)))
        return self._made[1]

    def _forward(self, x: Tensor) -> Tensor:
        if any(side % 2 for side in self.maps.shape[-3:-1]):
            return self.mask.to(x.device) * fft2c(sense_expand(x, self.maps.to(x)), self.fourier)
        maps, mask = self._factors(x)
        coils = maps * torch.view_as_complex(x.contiguous()).unsqueeze(1)
        return torch.view_as_real(torch.fft.fft2(coils, norm=self.fourier.normalization) * mask)

    def _adjoint(self, y: Tensor) -> Tensor:
        size = y.shape[-2] * y.shape[-3]
        scale = {"ortho": 1.0, "backward": float(size), "forward": 1.0 / size}[self.fourier.normalization]
        if any(side % 2 for side in self.maps.shape[-3:-1]):
            return sense_combine(self.mask.to(y.device) * y, self.maps.to(y), self.fourier) * scale
        maps, mask = self._factors(y)
        coils = torch.fft.ifft2(torch.view_as_complex(y.contiguous()) * mask, norm=self.fourier.normalization)
        return torch.view_as_real((maps.conj() * coils).sum(1) * scale)


__all__ = [
    "CENTERED",
    "Fourier",
    "MultiCoilMRI",
    "Normalization",
    "check_shapes",
    "complex_product",
    "estimate_maps",
    "fft2c",
    "ifft2c",
    "magnitude",
    "normalise_maps",
    "sense_combine",
    "sense_expand",
    "sense_reduce",
]
