"""From noise to boxes in S steps: the sampler of ConsistencyDet, for any function that answers at a noise level."""

from collections.abc import Callable

import torch
from torch import Tensor

from lit_methods.detection.consistencydet.core import nearest_level, renewal_step
from lit_methods.detection.detector import Answer
from lit_methods.detection.noise import to_signal

Predict = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def consistency_sample(
    predict: Predict, noise: Tensor, size: Tensor, levels: Tensor, training_levels: Tensor, threshold: float = 0.9
) -> list[Answer]:
    """Answers at each level; between two of them sure proposals move on along the ODE, and the others are drawn anew.

    Args:
        predict: Noisy boxes (B, P, 4) in signal units, levels (B,), indices (B,) of the nearest training levels -> logits (B, P, K) and
            corners in pixels (B, P, 4), inside the image.
        noise: (S, B, P, 4) standard normal: the first for the start, the others for proposals that are drawn anew.
        size: (B, 2) width and height of the images in pixels.
        levels: (S + 1,) descending, the last one 0.
        training_levels: (n,) descending.
        threshold: A proposal is kept if its best score is above.
    """
    steps, images = noise.shape[:2]
    x, answers = noise[0] * levels[0], []
    index = nearest_level(levels[:-1], training_levels)
    for step in range(steps):
        logits, boxes = predict(x, levels[step].expand(images), index[step].expand(images))
        kept = torch.ones(images, device=x.device)
        if step + 1 < steps:
            renewal = renewal_step(x, to_signal(boxes, size), logits, noise[step + 1], levels[step], levels[step + 1], threshold)
            x, kept = renewal.boxes, renewal.kept.float().mean(1)
        answers.append(Answer(logits, boxes, kept))
    return answers


__all__ = ["consistency_sample"]
