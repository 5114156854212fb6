"""What CIRIM is compared with: a U-Net, the end-to-end variational network made of it, and reconstructions without weights.

All map (k-space, coil maps, mask) to images (K, T, B, H, W, 2), as :class:`~lit_methods.inverse_problems.cirim.core.CIRIMNetwork` does,
so that one module trains and measures them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_methods import checks
from lit_methods.inverse_problems.cirim.core import Consistency
from lit_methods.inverse_problems.mri import CENTERED, Fourier, fft2c, sense_combine, sense_expand


def _pair(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.InstanceNorm2d(outputs), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers)


class ComplexUNet(nn.Module):
    """A U-Net on complex images: real and imaginary part are two channels, standardised before and scaled back behind it.

    Args:
        channels: Of the first level; each further one has twice as many.
        pools: Levels below the first, each with half the side.
    """

    def __init__(self, channels: int = 32, pools: int = 4) -> None:
        super().__init__()
        checks.at_least(1, channels=channels)
        checks.at_least(0, pools=pools)
        widths = [channels * 2**level for level in range(pools + 1)]
        self.down = nn.ModuleList(_pair(inputs, outputs) for inputs, outputs in zip([2, *widths], widths, strict=False))
        self.up = nn.ModuleList()
        self.join = nn.ModuleList()
        for wide, narrow in zip(widths[:0:-1], widths[-2::-1], strict=True):
            layers = (nn.ConvTranspose2d(wide, narrow, 2, stride=2, bias=False), nn.InstanceNorm2d(narrow), nn.LeakyReLU(0.2))
            self.up.append(nn.Sequential(*layers))
            self.join.append(_pair(2 * narrow, narrow))
        self.last = nn.Conv2d(channels, 2, 1)
        self.multiple = 2**pools

    def forward(self, image: Tensor) -> Tensor:
        """(B, H, W, 2) -> (B, H, W, 2), any H and W."""
        height, width = image.shape[1:3]
        mean, deviation = image.mean((1, 2), keepdim=True), image.std((1, 2), keepdim=True) + 1e-6
        # at least two pixels at the lowest level, which the instance norm needs
        sides = [max(2, -(-side // self.multiple)) * self.multiple - side for side in (height, width)]
        x = F.pad(((image - mean) / deviation).permute(0, 3, 1, 2), (0, sides[1], 0, sides[0]))
        levels = []
        for number, block in enumerate(self.down):
            x = block(F.avg_pool2d(x, 2) if number else x)
            levels.append(x)
        levels.pop()
        for up, join in zip(self.up, self.join, strict=True):
            x = join(torch.cat([up(x), levels.pop()], 1))
        return self.last(x)[..., :height, :width].permute(0, 2, 3, 1) * deviation + mean


class UNetNetwork(nn.Module):
    """:class:`ComplexUNet` of the zero-filled image.

    Args:
        channels: Of the first level.
        pools: Levels below it.
        fourier: The Fourier transform.
    """

    def __init__(self, channels: int = 32, pools: int = 4, fourier: Fourier = CENTERED) -> None:
        super().__init__()
        self.unet, self.fourier = ComplexUNet(channels, pools), fourier

    def forward(self, kspace: Tensor, maps: Tensor, mask: Tensor) -> Tensor:
        """(B, C, H, W, 2) twice, (1 or B, 1, H, W, 1) -> (1, 1, B, H, W, 2)."""
        return self.unet(sense_combine(kspace, maps, self.fourier))[None, None]  # type: ignore[no-any-return]


class VarNetNetwork(nn.Module):
    """The end-to-end variational network (arXiv:2004.06688) with given coil maps: cascades of U-Nets of their own, in k-space.

    Each cascade: k <- k - lambda M (k - y) - F(S U(SENSE k)), lambda learned and 1 at first; with ``implicit`` consistency, which here is
    none, k <- F(S U(SENSE k)).

    Args:
        cascades: K.
        channels: Of the first level of each U-Net.
        pools: Levels below it.
        consistency: ``explicit`` or ``implicit``.
        fourier: The Fourier transform.
    """

    def __init__(
        self, cascades: int = 8, channels: int = 18, pools: int = 4, consistency: Consistency = "explicit", fourier: Fourier = CENTERED
    ) -> None:
        super().__init__()
        checks.at_least(1, cascades=cascades)
        self.fourier = fourier
        self.unets = nn.ModuleList(ComplexUNet(channels, pools) for _ in range(cascades))
        explicit = consistency == "explicit"
        self.dc_weights = nn.ParameterList(nn.Parameter(torch.ones(1)) for _ in range(cascades if explicit else 0))

    def forward(self, kspace: Tensor, maps: Tensor, mask: Tensor) -> Tensor:
        """(B, C, H, W, 2) twice, (1 or B, 1, H, W, 1) -> (K, 1, B, H, W, 2)."""
        estimate, images = kspace, [sense_combine(kspace, maps, self.fourier)]
        for number, unet in enumerate(self.unets):
            model = fft2c(sense_expand(unet(images[-1]), maps), self.fourier)
            explicit = len(self.dc_weights) > 0
            estimate = estimate - self.dc_weights[number] * (mask * (estimate - kspace)) - model if explicit else model
            images.append(sense_combine(estimate, maps, self.fourier))
        return torch.stack(images[1:])[:, None]


class ZeroFilledNetwork(nn.Module):
    """The zero-filled image: what was not measured counts as 0.

    Args:
        fourier: The Fourier transform.
    """

    def __init__(self, fourier: Fourier = CENTERED) -> None:
        super().__init__()
        self.fourier = fourier

    def forward(self, kspace: Tensor, maps: Tensor, mask: Tensor) -> Tensor:
        """(B, C, H, W, 2) twice, (1 or B, 1, H, W, 1) -> (1, 1, B, H, W, 2)."""
        return sense_combine(kspace, maps, self.fourier)[None, None]


class WaveletNetwork(nn.Module):
    """Compressed sensing: min 1/2 |A x - y|^2 + weight |W x|_1 with Daubechies' wavelets, by sigpy's solver, slice by slice on the CPU.

    Args:
        weight: Of the wavelets' L1 norm, for k-space whose zero-filled image goes up to 1.
        iterations: Of the solver.

    Raises:
        ImportError: sigpy isn't installed.
    """

    def __init__(self, weight: float = 0.005, iterations: int = 60) -> None:
        super().__init__()
        checks.positive(weight=weight)
        checks.at_least(1, iterations=iterations)
        self.weight, self.iterations = weight, iterations
        self._solver()

    @staticmethod
    def _solver() -> Any:
        try:
            from sigpy.mri.app import L1WaveletRecon
        except ImportError as error:
            raise ImportError("compressed sensing is solved by sigpy: pip install 'lit-methods[mri]'") from error
        return L1WaveletRecon

    def forward(self, kspace: Tensor, maps: Tensor, mask: Tensor) -> Tensor:
        """(B, C, H, W, 2) twice, (1 or B, 1, H, W, 1) -> (1, 1, B, H, W, 2)."""
        solver, device = self._solver(), kspace.device
        y, coils = (torch.view_as_complex(values.float().contiguous()).cpu().numpy() for values in (kspace, maps))
        measured = mask.expand(len(y), -1, *y.shape[2:], -1)[:, 0, ..., 0].float().cpu().numpy()
        options = {"lamda": self.weight, "max_iter": self.iterations, "show_pbar": False}
        found = [solver(one, smooth, weights=where, **options).run() for one, smooth, where in zip(y, coils, measured, strict=True)]
        return torch.stack([torch.view_as_real(torch.from_numpy(image).to(torch.complex64)) for image in found]).to(device)[None, None]


__all__ = ["ComplexUNet", "UNetNetwork", "VarNetNetwork", "WaveletNetwork", "ZeroFilledNetwork"]
