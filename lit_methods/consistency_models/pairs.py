"""The consistency loss between two noise levels of the same sample and noise, for any network, metric and weight."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lit_methods.consistency_models.levels import boundary_scalings, like
from lit_methods.consistency_models.randomness import SameRandomness

Network = Callable[..., Tensor]
Metric = Callable[[Tensor, Tensor], Tensor]
Path = Callable[[Tensor, Tensor, Tensor], Tensor]


def consistency_function(network: Network, sigma_min: float | Tensor = 0.002, sigma_data: float = 0.5) -> Callable[..., Tensor]:
    """f(x, sigma) = c_skip x + c_out F(c_in x, ln(sigma) / 4), with f(x, sigma_min) = x exactly.

    Args:
        network: F: (B, ...) in the dtype of x, (B,) noise condition, and whatever else f is given -> (B, ...).
        sigma_min: Smallest level.
        sigma_data: Standard deviation of the data.

    Returns:
        f of x (B, ...) and sigma (B,); further arguments go to the network. Scalings are computed in float32 or wider, also under autocast.
    """

    def f(x: Tensor, sigma: Tensor, *condition: Tensor) -> Tensor:
        wide = sigma.to(torch.promote_types(sigma.dtype, torch.float32))
        skip, out, inp, noise = boundary_scalings(wide, sigma_min, sigma_data)
        answer = network(like(inp, x) * x, noise, *condition)
        return like(skip, x) * x + like(out, x) * answer.to(x.dtype)

    return f


class PairLoss(NamedTuple):
    """Losses (B,), and the two answers (B, ...)."""

    losses: Tensor
    student: Tensor
    teacher: Tensor


def consistency_pair_loss(
    student: Callable[..., Tensor],
    teacher: Callable[..., Tensor],
    x: Tensor,
    noise: Tensor,
    lower: Tensor,
    upper: Tensor,
    metric: Metric,
    weight: Tensor,
    *condition: Tensor,
    path: Path | None = None,
) -> PairLoss:
    """Losses lambda d(f(x + sigma_{i+1} z, sigma_{i+1}), sg f-(x + sigma_i z, sigma_i)) (arXiv:2303.01469, Eq. 10).

    With a ``path`` the second point is where a diffusion model leads the first one: distillation (CD; Eq. 7).

    Student and teacher draw the same random numbers, so that dropout drops the same units. The teacher is whatever it is given to be:
    the student itself in iCT, an average of it in CT. It gets no gradient.

    Args:
        student: f of (B, ...) and (B,).
        teacher: The teacher's f, of (B, ...) and (B,).
        x: (B, ...) data.
        noise: z, like ``x``: one for both levels.
        lower: (B,) sigma_i.
        upper: (B,) sigma_{i+1}.
        metric: (B, ...) and (B, ...) -> (B,).
        weight: (B,) lambda.
        condition: Further arguments of both.
        path: The noisy sample at ``upper`` (B, ...), ``upper`` and ``lower`` -> the sample at ``lower``, such as :func:`heun_step`; None:
            x + sigma_i z.
    """
    noisy = x + like(upper, x) * noise
    with torch.no_grad():
        nearer = x + like(lower, x) * noise if path is None else path(noisy, upper, lower)
    same = SameRandomness(x.device)
    answer = student(noisy, upper, *condition)
    with torch.no_grad(), same.again():
        target = teacher(nearer, lower, *condition)
    with torch.autocast(x.device.type, enabled=False):
        wide = torch.promote_types(answer.dtype, torch.float32)
        losses = weight * metric(answer.to(wide), target.to(wide))
    return PairLoss(losses, answer, target)


def heun_step(denoise: Callable[..., Tensor], x: Tensor, upper: Tensor, lower: Tensor, *condition: Tensor) -> Tensor:
    """One step of Heun's method along dx / dsigma = (x - D(x, sigma)) / sigma, each sample between its own levels.

    Args:
        denoise: D of (B, ...) and (B,) levels: the mean of the clean sample.
        x: (B, ...) at ``upper``.
        upper: (B,) > 0.
        lower: (B,) > 0.
        condition: Further arguments of D.

    Returns:
        (B, ...) at ``lower``.
    """
    step = like(lower - upper, x)
    first = (x - denoise(x, upper, *condition)) / like(upper, x)
    moved = x + step * first
    return x + step * (first + (moved - denoise(moved, lower, *condition)) / like(lower, x)) / 2
