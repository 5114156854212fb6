"""Exponential moving averages: the update, and its decay as a function of the step."""

import math

import numpy as np
import torch
from torch import Tensor, nn

from lit_methods import checks


@torch.no_grad()
def ema_update(average: list[Tensor], source: list[Tensor], decay: float) -> None:
    """``average <- decay * average + (1 - decay) * source``, in place.

    Floating-point (and complex) averages are computed in their own dtype: a float32 average of bfloat16 weights keeps
    its digits, a bfloat16 average loses every update that is smaller than its spacing. Integer and boolean tensors
    are copied.

    Args:
        average: Tensors to be changed.
        source: As many tensors, of the same shapes, any dtype that converts.
        decay: In [0, 1]: 0 copies, 1 changes nothing (integers are copied at any decay).

    Raises:
        ValueError: Another decay, or lists that don't fit together.
    """
    checks.share(decay=decay)
    if len(average) != len(source) or any(a.shape != s.shape for a, s in zip(average, source, strict=True)):
        raise ValueError(
            f"{len(average)} averaged tensors don't fit the {len(source)} of the source: the module was changed after the teacher was made"
        )
    floating: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], list[Tensor]]] = {}
    for a, s in zip(average, source, strict=True):
        if a.dtype.is_floating_point or a.dtype.is_complex:
            averages, sources = floating.setdefault((a.dtype, a.device), ([], []))
            averages.append(a)
            sources.append(s.detach().to(device=a.device, dtype=a.dtype))
        else:
            a.copy_(s)
    for averages, sources in floating.values():
        torch._foreach_lerp_(averages, sources, 1.0 - decay)


def state_tensors(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers of a module, as :func:`ema_update` takes them: what it changes isn't recorded by autograd."""
    return [*(parameter.data for parameter in module.parameters()), *module.buffers()]


def warmup_decay(step: int, decay: float) -> float:
    """``min(decay, (1 + step) / (10 + step))``: an average that forgets its beginning, ``step`` >= 0 updates done before."""
    return min(decay, (1 + step) / (10 + step))


def cosine_decay(step: int, total_steps: int, base: float) -> float:
    """``base`` at step 0, rising to 1 at ``total_steps`` along half a cosine.

    Source: BYOL (arXiv:2006.07733), "Implementation details"; DINO (arXiv:2104.14294) uses the same. Steps beyond
    ``total_steps`` give 1.
    """
    return 1.0 - (1.0 - base) * (math.cos(math.pi * min(1.0, step / max(1, total_steps))) + 1.0) / 2.0


def linear_decay(step: int, total_steps: int, start: float, end: float = 1.0) -> float:
    """``start`` at step 0, ``end`` at ``total_steps`` and beyond, linear between them.

    Source: I-JEPA (arXiv:2301.08243), section 4.
    """
    return start + (end - start) * min(1.0, step / max(1, total_steps))


def half_life_decay(half_life: float) -> float:
    """The decay that halves the share of the old average in ``half_life`` > 0 updates."""
    checks.within("(0, inf)", "a number of steps", half_life=half_life)
    return 0.5 ** (1.0 / half_life)


def power_exponent(s: float) -> float:
    """Exponent gamma of the power profile whose average has the relative width s (arXiv:2312.02696, Eq. 126 and rCM's code).

    The largest real root of gamma^3 + 7 gamma^2 + (16 - s^-2) gamma + (12 - s^-2).

    Args:
        s: Standard deviation of the average's weights over time, as a share of the training time; in (0, 0.28).

    Raises:
        ValueError: No such profile.
    """
    if not 0 < s < 12**-0.5:
        raise ValueError(f"s is {s}: give a width above 0 and below {12**-0.5:.4f}, for example 0.1")
    roots = np.roots([1.0, 7.0, 16.0 - s**-2, 12.0 - s**-2])
    return float(max(root.real for root in roots if abs(root.imag) < 1e-8 * max(1.0, abs(root))))


def power_decay(step: int, exponent: float) -> float:
    """beta_k = (1 - 1 / (k + 1))^(gamma + 1), how much the average keeps at step k; 0 for k < 1."""
    return 0.0 if step < 1 else (1.0 - 1.0 / (step + 1)) ** (exponent + 1.0)
