"""The one protocol of denoisers: ``denoise(x_t, t, cond)`` gives the noise in ``x_t``; and classifier-free guidance with any of them."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor, Any], Tensor]


@runtime_checkable
class Denoiser(Protocol):
    """Whatever predicts the noise in a noisy sample; an ``nn.Module`` without ``denoise`` is called with the same arguments.

    It may also have ``unconditional(cond)``, the condition of the same shape that says nothing, for classifier-free guidance;
    ``encode_prompts(texts)``, which maps N texts to conditions (N, ...); and ``decode(latents)``, which maps samples to frames in [-1, 1].
    """

    def denoise(self, x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
        """Noise in (B, ...) samples at steps (B,) int64, under conditions (B, ...), like ``x_t``."""
        ...


def denoise_of(model: Any) -> Denoise:
    """``denoise`` of a model, or the model itself, if it has none.

    Args:
        model: A :class:`Denoiser`, or any callable of (x_t, t, cond).

    Raises:
        TypeError: It is neither.
    """
    if isinstance(model, Denoiser):
        return model.denoise
    if not callable(model):
        raise TypeError(f"{type(model).__name__} is no denoiser: give it a method denoise(x_t, t, cond), or make it callable like that")
    return model  # type: ignore[no-any-return]


def with_guidance(denoise: Denoise, unconditional: Callable[[Any], Any], scale: float) -> Denoise:
    """Classifier-free guidance: eps = eps_0 + scale (eps_c - eps_0), both in one call (arXiv:2207.12598).

    Args:
        denoise: Of conditions that are tensors (B, ...).
        unconditional: Condition -> the one of the same shape that says nothing.
        scale: 1: the condition alone.

    Returns:
        A denoiser with the same arguments.
    """

    def guided(x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        both = denoise(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([unconditional(cond), cond]))
        without, given = both.chunk(2)
        return without + scale * (given - without)

    return guided


__all__ = ["Denoise", "Denoiser", "denoise_of", "with_guidance"]
