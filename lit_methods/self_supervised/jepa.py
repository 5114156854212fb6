"""The maths of I-JEPA beside its masks: patches in the authors' order, targets, loss, schedules.

Source: I-JEPA (arXiv:2301.08243) and facebookresearch/ijepa@52c1ae9 (src/train.py, src/masks/utils.py, src/utils/tensors.py,
src/utils/schedulers.py).
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_methods.optim import warmup_cosine

Distance = Literal["smooth_l1", "mse"]


def take_patches(tokens: Tensor, masks: Tensor) -> Tensor:
    """Chosen tokens of each image, one mask behind the other.

    Args:
        tokens: (B, N, D).
        masks: (M, B, k) int64 indices of patches.

    Returns:
        (M * B, k, D): mask 1 of all images, then mask 2 of all images, and so on.
    """
    if masks.ndim != 3 or masks.shape[1] != len(tokens):
        raise ValueError(f"masks are {tuple(masks.shape)}, expected (number, {len(tokens)}, patches) for {len(tokens)} images")
    images = torch.arange(len(tokens), device=tokens.device)[:, None]
    return tokens[images, masks].flatten(0, 1)


def repeat_per_context(rows: Tensor, batch_size: int, contexts: int) -> Tensor:
    """Each mask's rows as often as there are contexts.

    Args:
        rows: (M * B, ...), mask after mask.
        batch_size: B.
        contexts: C.

    Returns:
        (M * C * B, ...): mask 1 C times, then mask 2 C times, and so on.
    """
    return rows.unflatten(0, (-1, 1, batch_size)).expand(-1, contexts, -1, *rows.shape[1:]).flatten(0, 2)


def jepa_targets(features: Tensor, targets: Tensor, contexts: int = 1) -> Tensor:
    """What is to be predicted: normalised features of all patches, taken at the target blocks.

    Args:
        features: (B, N, D) of the target encoder, which sees the whole image.
        targets: (M, B, k) int64 indices of patches.
        contexts: Number of contexts C.

    Returns:
        (M * C * B, k, D) without a gradient, float32 or wider.
    """
    with torch.autocast(features.device.type, enabled=False):
        features = features.detach().to(torch.promote_types(features.dtype, torch.float32))
        normalised = F.layer_norm(features, features.shape[-1:])
    return repeat_per_context(take_patches(normalised, targets), len(features), contexts)


def jepa_loss(predictions: Tensor, targets: Tensor, distance: Distance = "smooth_l1") -> Tensor:
    """Mean distance between predictions and targets over everything.

    Args:
        predictions: (R, k, D).
        targets: (R, k, D).
        distance: ``smooth_l1`` with beta 1, as in the authors' code; ``mse``: squared error, as in the paper's text.

    Returns:
        Scalar >= 0, float32 or wider.
    """
    with torch.autocast(predictions.device.type, enabled=False):
        predictions = predictions.to(torch.promote_types(predictions.dtype, torch.float32))
        return F.smooth_l1_loss(predictions, targets) if distance == "smooth_l1" else F.mse_loss(predictions, targets)


def learning_rate_at(step: int, total_steps: int, warmup_steps: int, start: float, peak: float, final: float) -> float:
    """Linear from ``start`` to ``peak``, then half a cosine to ``final``.

    Args:
        step: Number of the optimiser step, from 1.
        total_steps: Steps of the whole training.
        warmup_steps: Steps of the linear part, the last of which has nearly ``peak``.
        start: Learning rate that the rise begins at.
        peak: The highest.
        final: The last.
    """
    if step < warmup_steps:
        return start + (peak - start) * step / warmup_steps
    return max(final, final + (peak - final) * warmup_cosine(step - warmup_steps, total_steps - warmup_steps))


def weight_decay_at(step: int, total_steps: int, start: float, final: float) -> float:
    """Half a cosine from ``start`` to ``final``.

    Args:
        step: Number of the optimiser step, from 1.
        total_steps: Steps of the whole training.
        start: Weight decay that the curve begins at.
        final: Weight decay of the last step.
    """
    return final + (start - final) * warmup_cosine(step, total_steps)


__all__ = ["jepa_loss", "jepa_targets", "learning_rate_at", "repeat_per_context", "take_patches", "weight_decay_at"]
