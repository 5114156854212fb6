"""Linear layers, convolutions and look-up tables with a normal distribution for each weight; biases have none.

``weight`` is the mean mu, under its usual name, so that a plain network's weights load; ``rho`` gives the standard deviation and ``mask``
says which weights there are. What a forward pass draws is said by :func:`drawing`.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_methods.bayes.variational import Spread, gaussian_kl, posterior_std, rho_of_std, variational_output

Draw = Literal["mean", "outputs", "weights"]
_drawn: Draw | None = None


@contextmanager
def drawing(what: Draw | None) -> Iterator[None]:
    """Say what all Bayes layers draw inside, from torch's global generator.

    Args:
        what: ``outputs``: noise at each output, of each sample its own (local reparameterisation). ``weights``: one set of weights for all
            samples of the pass. ``mean``: nothing. None: as without this, ``outputs`` in training mode and ``mean`` in evaluation mode.
    """
    global _drawn
    before, fast = _drawn, torch.backends.mha.get_fastpath_enabled()
    _drawn = what
    torch.backends.mha.set_fastpath_enabled(fast and what is None)  # its kernels read weights past the layers' forward
    try:
        yield
    finally:
        _drawn = before
        torch.backends.mha.set_fastpath_enabled(fast)


def drawn() -> Draw | None:
    """What :func:`drawing` says here."""
    return _drawn


class BayesLayer(nn.Module):
    """What Bayes layers share; stands before the ordinary class among the bases.

    Attributes:
        weight: mu, the means, 0 where nothing is active.
        rho: Gives the standard deviations, same shape, 0 where nothing is active.
        mask: bool, same shape: which weights are active.
        bias: Without a distribution; None: none.
        spread: How sigma follows from rho.
    """

    weight: Tensor
    bias: Any  # Tensor | None, as convolutions and linear layers declare it differently
    rho: nn.Parameter
    mask: Tensor
    spread: Spread = "softplus"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.begin()

    @torch.no_grad()
    def begin(
        self,
        mean_std: float | None = 0.01,
        std: float = 6e-4,
        std_spread: float = 5e-4,
        generator: torch.Generator | None = None,
        spread: Spread = "softplus",
    ) -> None:
        """Draw the start: mu ~ N(0, mean_std^2), sigma = |N(std, std_spread^2)|, all weights active.

        Args:
            mean_std: Of the means; None: they stay as they are.
            std: Mean of the standard deviations.
            std_spread: Their spread.
            generator: Of the CPU; None: the global one.
            spread: How sigma follows from rho.
        """
        shape = self.weight.shape
        if mean_std is not None:
            self.weight.copy_(mean_std * torch.randn(shape, generator=generator))
        sigma = (std + std_spread * torch.randn(shape, generator=generator, dtype=torch.float64)).abs().clamp_min(1e-12)
        self.spread = spread
        self.rho = nn.Parameter(rho_of_std(sigma, spread).to(self.weight))
        self.register_buffer("mask", torch.ones(shape, dtype=torch.bool, device=self.weight.device))

    def sigma(self) -> Tensor:
        """Standard deviations, 0 where nothing is active."""
        return posterior_std(self.rho, self.mask, self.spread)

    def kl(self, prior_mean: float = 0.0, prior_std: float = 1.0) -> Tensor:
        """KL divergence of the active weights from a normal prior: a scalar."""
        return gaussian_kl(self.weight, posterior_std(self.rho, None, self.spread), self.mask, prior_mean, prior_std)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's map with given weights."""
        raise NotImplementedError

    def squares(self, x: Tensor) -> Tensor:
        """What the variance's map takes."""
        return x.square()

    def forward(self, x: Tensor) -> Tensor:
        """As the ordinary layer, with noise where some is drawn."""
        what = _drawn or ("outputs" if self.training else "mean")
        if what == "mean":
            return self.product(x, self.weight, self.bias)
        if what == "weights":
            return self.product(x, self.weight + self.sigma() * torch.randn_like(self.weight), self.bias)
        device = x.device.type
        half = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
        with torch.autocast(device, enabled=False) if half else nullcontext():  # float16 has no room for sigma^2
            x = x.to(self.weight.dtype) if half and x.is_floating_point() else x
            return variational_output(self.product, x, self.squares(x), self.weight, self.sigma(), self.bias)


class BayesLinear(BayesLayer, nn.Linear):
    """A linear layer whose weights have normal distributions."""

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(..., in) -> (..., out)."""
        return F.linear(x, weight, bias)


class _BayesConv(BayesLayer):
    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(B, in, ...) -> (B, out, ...)."""
        return self._conv_forward(x, weight, bias)  # type: ignore[operator, no-any-return]


class BayesConv1d(_BayesConv, nn.Conv1d):
    """A convolution over sequences whose weights have normal distributions."""


class BayesConv2d(_BayesConv, nn.Conv2d):
    """A convolution over pictures whose weights have normal distributions."""


class BayesConv3d(_BayesConv, nn.Conv3d):
    """A convolution over volumes whose weights have normal distributions."""


class BayesEmbedding(BayesLayer, nn.Embedding):
    """A look-up table whose entries have normal distributions; the row of ``padding_idx`` has no noise."""

    bias: None = None  # type: ignore[assignment]

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(...) indices -> (..., dim)."""
        return F.embedding(x, weight, self.padding_idx)

    def squares(self, x: Tensor) -> Tensor:
        """The indices: a look-up has no factor."""
        return x

    def sigma(self) -> Tensor:
        """Standard deviations; 0 for padding."""
        sigma = super().sigma()
        if self.padding_idx is None:
            return sigma
        rows = torch.arange(len(sigma), device=sigma.device) != self.padding_idx
        return sigma * rows[:, None]


BAYES: dict[type[nn.Module], type[BayesLayer]] = {
    nn.Linear: BayesLinear,
    nn.Conv1d: BayesConv1d,
    nn.Conv2d: BayesConv2d,
    nn.Conv3d: BayesConv3d,
    nn.Embedding: BayesEmbedding,
}
"""Ordinary layer -> the same with distributions."""

__all__ = ["BAYES", "BayesConv1d", "BayesConv2d", "BayesConv3d", "BayesEmbedding", "BayesLayer", "BayesLinear", "Draw", "drawing", "drawn"]
