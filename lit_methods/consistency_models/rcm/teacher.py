"""A teacher that is known in closed form, for trials without weights."""

import math

import torch
from torch import Tensor, nn

from lit_methods import checks


class _Gaussians(nn.Module):
    """The exact velocity F(x_t, t) of equal, equally likely Gaussians: a teacher without weights.

    Args:
        centres: (modes, 2) float64.
        noise: Standard deviation of each Gaussian in each coordinate, > 0.
    """

    def __init__(self, centres: Tensor, noise: float) -> None:
        super().__init__()
        checks.positive(noise=noise)
        self.register_buffer("centres", centres)
        self.noise = noise

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(B, 2) and (B,) in [0, pi/2] -> (B, 2)."""
        centres = self.get_buffer("centres").double()
        cos, sin = time.double().cos()[:, None, None], time.double().sin()[:, None, None]
        away = x.double()[:, None] - cos * centres  # (B, modes, 2)
        variance = (cos * self.noise) ** 2 + sin**2
        share = (-away.square().sum(-1, keepdim=True) / (2 * variance)).softmax(1)
        x0, z = centres + cos * self.noise**2 / variance * away, sin / variance * away
        return (share * (cos * z - sin * x0)).sum(1).to(x.dtype)

    def evaluate(self, samples: Tensor) -> dict[str, Tensor]:
        """Share of samples (N, 2) within 3 standard deviations of a mode, ``quality``, and the number of ``modes`` with more than 2 %."""
        distance, mode = torch.cdist(samples.double(), self.get_buffer("centres").double()).min(1)
        shares = (mode[:, None] == torch.arange(len(self.get_buffer("centres")), device=mode.device)).double().mean(0)
        return {"quality": (distance < 3 * self.noise).double().mean(), "modes": (shares > 0.02).sum().double()}


class RingTeacher(_Gaussians):
    """The exact velocity F(x_t, t) of equal Gaussians on a circle, for trials: a teacher without weights. Use ``wrapper: trigflow``.

    Args:
        modes: Number of Gaussians.
        radius: Radius of the circle.
        noise: Standard deviation of each Gaussian in each coordinate, > 0.
    """

    def __init__(self, modes: int = 8, radius: float = 1.35, noise: float = 0.05) -> None:
        checks.at_least(1, modes=modes)
        checks.positive(radius=radius)
        angles = torch.arange(modes, dtype=torch.float64) * (2 * math.pi / modes)
        super().__init__(radius * torch.stack([angles.cos(), angles.sin()], dim=1), noise)


class IrisTeacher(_Gaussians):
    """The exact velocity F(x_t, t) of the distribution of ``IrisDataModule``: a Gaussian at each of 150 flowers. Use ``wrapper: trigflow``.

    Args:
        noise: Standard deviation of each Gaussian in each coordinate, > 0; that of the data.
    """

    def __init__(self, noise: float = 0.05) -> None:
        from lit_methods.datamodules.generative.toys import iris_flowers

        super().__init__(iris_flowers(), noise)


__all__ = ["IrisTeacher", "RingTeacher"]
