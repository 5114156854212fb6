"""Features that have died: how they are counted, the auxiliary loss that revives them, and resampling."""

import torch
from torch import Tensor

from lit_methods.sparse_autoencoders.activations import keep_largest
from lit_methods.sparse_autoencoders.dictionary import Code, decode, unit_rows, wide


def active_features(code: Code, threshold: float = 0.0) -> Tensor:
    """Whether each feature is active anywhere in the batch: (h,) bool, sum of |z| > ``threshold``. Signs can't cancel."""
    if isinstance(code, Tensor):
        return wide(code.detach()).abs().sum(dim=0) > threshold
    magnitudes = wide(code.values.detach()).abs()
    return magnitudes.new_zeros(code.shape[1]).index_add_(0, code.columns, magnitudes) > threshold


def count_inactive(counter: Tensor, active: Tensor) -> Tensor:
    """How many batches in a row each feature was inactive: (h,) counter before -> after this batch."""
    return torch.where(active, torch.zeros_like(counter), counter + 1)


def auxiliary_loss(
    u: Tensor, dead: Tensor, residual: Tensor, decoder: Tensor, features: int = 512, coeff: float = 1 / 32, signed: bool = False
) -> Tensor:
    """Lets dead features reconstruct what is left: coeff x mean (sum of the largest dead ones' directions - residual)^2.

    As in the code of BatchTopK, top-AFA and AbsTopK: of each sample the ``features`` largest among the dead ones are taken, or all of them
    where there are fewer, decoded without bias; the residual isn't detached.

    Args:
        u: (B, h) pre-activations.
        dead: (h,) bool.
        residual: (B, d), x - x_hat.
        decoder: (h, d).
        features: At most so many of a sample are taken, >= 1.
        coeff: Factor of the loss.
        signed: Take the largest magnitudes, with their signs; False: the largest of max(u, 0).

    Returns:
        Scalar; 0 where nothing is dead. On the CPU that costs nothing; a GPU isn't waited for, so it computes the sum of nothing.
    """
    if dead.device.type == "cpu" and not dead.any():
        return residual.new_zeros(())
    scores = wide(u.detach().abs() if signed else u.detach()).masked_fill(~dead, -torch.inf)
    code = keep_largest(u, scores, features)
    values = code.values * dead[code.columns]
    taken = code._replace(values=values if signed else values.relu())
    loss = coeff * (decode(taken, decoder) - residual).square().mean()
    return torch.where(dead.any(), loss, torch.zeros_like(loss))


def resampled_rows(
    dead: Tensor, encoder: Tensor, x: Tensor, losses: Tensor, generator: torch.Generator | None = None, encoder_scale: float = 0.2
) -> tuple[Tensor, Tensor]:
    """New rows for dead features, out of samples that are reconstructed badly (arXiv:2405.08366, code amakelov/sae).

    Each dead feature draws a sample with probability in proportion to its loss squared.

    Args:
        dead: (h,) bool.
        encoder: (h, d).
        x: (B, d) samples, without the decoder's bias, B >= 1.
        losses: (B,) >= 0.
        generator: Generator on the device of ``losses``; None: the global one.
        encoder_scale: Norm of the new encoder rows over the mean norm of those alive.

    Returns:
        decoder: (h, d), unit rows.
        encoder: (h, d), the same rows at the norm above. Only the rows of dead features are meant.
    """
    chances = wide(losses.detach()).square()
    chances = torch.where(chances.sum() > 0, chances, torch.ones_like(chances))
    chosen = torch.multinomial(chances, len(dead), replacement=True, generator=generator)
    rows = unit_rows(x.detach()[chosen]).to(encoder.dtype)
    alive = (~dead).to(encoder.dtype)
    norm = (encoder.detach().norm(dim=1) * alive).sum() / alive.sum().clamp(min=1)
    return rows, rows * encoder_scale * norm


def reset_moments(optimizer: torch.optim.Optimizer, parameter: Tensor, dead: Tensor) -> None:
    """Set what the optimiser remembers about rows of a parameter to 0, in place.

    Args:
        optimizer: Any with one state per parameter, such as Adam.
        parameter: (h, ...).
        dead: (h,) bool: which rows.
    """
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            value.masked_fill_(dead.view(-1, *[1] * (value.ndim - 1)), 0.0)
