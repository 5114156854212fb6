"""The maths of CoPrompt (arXiv:2306.01195): adapters, cosines and the consistency term.

Read in ShuvenduRoy/CoPrompt@a2a6c12 (trainers/coprompt.py), where the golden vectors come from. The learning rate of each epoch is
:func:`lit_methods.optim.warmup_cosine_rate`. Left out: unused helpers of the authors' file.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_methods import checks

Criterion = Literal["cosine", "mse", "l1"]
Adapter = tuple[Tensor, Tensor]


class CoPromptLoss(NamedTuple):
    """(B, C) logits, and scalars: cross-entropy, consistency of texts and of images, their sum, and the whole loss."""

    logits: Tensor
    cross_entropy: Tensor
    consistency_text: Tensor
    consistency_image: Tensor
    consistency: Tensor
    total: Tensor


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def adapter_features(features: Tensor, adapter: Adapter | None, mix: float) -> Tensor:
    """``mix * A(x) + (1 - mix) * x`` with A(x) = ReLU(W2 ReLU(W1 x)), in float32 or wider.

    Args:
        features: (N, D) floating point.
        adapter: W1 (H, D) and W2 (D, H), without biases; None: the features as they are.
        mix: Share of the adapter, in [0, 1].

    Returns:
        (N, D).
    """
    with torch.autocast(features.device.type, enabled=False):
        x = _wide(features)
        if adapter is None:
            return x
        inside = F.relu(F.linear(x, adapter[0].to(x.dtype)))
        return mix * F.relu(F.linear(inside, adapter[1].to(x.dtype))) + (1 - mix) * x


def cosine_logits(image: Tensor, text: Tensor, logit_scale: Tensor | float) -> Tensor:
    """Scaled cosines of every image with every class, in float32 or wider.

    Args:
        image: (B, D) of any length.
        text: (C, D) of any length.
        logit_scale: What the cosines are multiplied with; 100 in CLIP.

    Returns:
        (B, C).
    """
    with torch.autocast(image.device.type, enabled=False):
        return logit_scale * (F.normalize(_wide(image), dim=1) @ F.normalize(_wide(text), dim=1).T)


def embedding_consistency(student: Tensor, teacher: Tensor, criterion: Criterion = "cosine") -> Tensor:
    """How far embeddings are from those of the teacher, row by row; both are normalised here.

    Args:
        student: (N, D) of any length.
        teacher: (N, D); gets no gradient.
        criterion: ``cosine``: 1 - the mean cosine; ``mse`` and ``l1``: the mean over all N D entries of the unit vectors.

    Returns:
        Scalar >= 0 (but for rounding), float32 or wider.

    Raises:
        ValueError: The shapes differ, or an unknown criterion.
    """
    if student.ndim != 2 or student.shape != teacher.shape:
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must be (N, D) both, with the rows of the same"
        )
    checks.one_of(Criterion, criterion=criterion)
    with torch.autocast(student.device.type, enabled=False):
        own = _wide(student)
        if criterion == "cosine":  # unit vectors needn't be made
            return 1 - (_dot(own, teacher) / _length(own)).mean()
        return _distance(F.normalize(own, dim=1), teacher, criterion)


def _length(x: Tensor) -> Tensor:
    """(N,) lengths, at least what ``F.normalize`` divides by."""
    return x.norm(dim=1).clamp(min=1e-12)


def _dot(own: Tensor, teacher: Tensor) -> Tensor:
    """(N,) dot products with the teacher's unit vectors."""
    target = _wide(teacher.detach())
    return (own * target).sum(dim=1) / _length(target)


def _distance(unit: Tensor, teacher: Tensor, criterion: Criterion) -> Tensor:
    """:func:`embedding_consistency` of rows of length 1."""
    if criterion == "cosine":
        return 1 - _dot(unit, teacher).mean()
    target = F.normalize(_wide(teacher.detach()), dim=1)
    return F.mse_loss(unit, target) if criterion == "mse" else F.l1_loss(unit, target)


def coprompt_loss(
    image: Tensor,
    text: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    labels: Tensor,
    *,
    logit_scale: Tensor | float,
    consistency_weight: float = 8.0,
    criterion: Criterion = "cosine",
    image_adapter: Adapter | None = None,
    text_adapter: Adapter | None = None,
    image_mix: float = 0.1,
    text_mix: float = 0.2,
) -> CoPromptLoss:
    """Cross-entropy of the cosines, plus lambda times what text and image embeddings differ from the teacher's. Adapters come first.

    Args:
        image: (B, D), from the tuned image tower, of any length.
        text: (C, D), of every class, from the tuned text tower.
        teacher_image: (B, D), from the frozen tower: another view of the same images.
        teacher_text: (C, D), from the frozen tower: other words for the same classes.
        labels: (B,) int64 in 0..C-1.
        logit_scale: What the cosines are multiplied with.
        consistency_weight: lambda >= 0.
        criterion: See :func:`embedding_consistency`.
        image_adapter: W1 and W2, see :func:`adapter_features`; None: none.
        text_adapter: W1 and W2 of the text tower's adapter; None: none.
        image_mix: Share of the image adapter.
        text_mix: Share of the text adapter.

    Returns:
        Everything in float32 or wider.

    Raises:
        ValueError: Shapes that don't fit.
    """
    if image.ndim != 2 or labels.shape != image.shape[:1]:
        raise ValueError(f"image must be (B, D) and labels (B,), got {tuple(image.shape)} and {tuple(labels.shape)}")
    for tower, student, teacher in (("image", image, teacher_image), ("text", text, teacher_text)):
        if student.shape != teacher.shape:
            raise ValueError(f"{tower} {tuple(student.shape)} and teacher_{tower} {tuple(teacher.shape)} must have one shape")
    checks.one_of(Criterion, criterion=criterion)
    with torch.autocast(image.device.type, enabled=False):
        own_image, own_text = adapter_features(image, image_adapter, image_mix), adapter_features(text, text_adapter, text_mix)
        own_image, own_text = F.normalize(own_image, dim=1), F.normalize(own_text, dim=1)  # once, for both losses
        logits = logit_scale * (own_image @ own_text.T)
        entropy = F.cross_entropy(logits, labels)
        of_text, of_image = _distance(own_text, teacher_text, criterion), _distance(own_image, teacher_image, criterion)
        both = of_text + of_image
        return CoPromptLoss(logits, entropy, of_text, of_image, both, entropy + consistency_weight * both)


def harmonic_mean(one: Tensor, other: Tensor) -> Tensor:
    """2 a b / (a + b) of two scalars >= 0; 0 where both are 0."""
    return 2 * one * other / (one + other).clamp(min=torch.finfo(torch.float32).tiny)


def sentence_index(step: int, number: int, seed: int = 0) -> int:
    """Which of the sentences all classes have at an optimiser step: the same on all ranks, and after a resume.

    Args:
        step: Optimiser steps done.
        number: Number of sentences, S >= 1.
        seed: Seed of the draw.

    Returns:
        In 0..S-1.
    """
    return int(np.random.default_rng([seed, 8111, step]).integers(number))


def sentence_table(classes: Sequence[str], descriptions: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """S lists of a sentence for each class. Class names are compared without case, blanks and punctuation.

    Args:
        classes: C names.
        descriptions: Class name -> S sentences.

    Raises:
        ValueError: A class has none, or another number than the first; the message names it.
    """
    plain = {_plain(name): list(own) for name, own in descriptions.items()}
    rows: list[list[str]] = []
    for name in classes:
        own = plain.get(_plain(name), [])
        if not own:
            known = ", ".join(list(descriptions)[:3]) or "none at all"
            raise ValueError(
                f"class {name!r} has no description; there are some of {known}: give the datamodule a file of sentences for every base "
                "class, or set consistency_weight to 0"
            )
        if rows and len(own) != len(rows[0]):
            raise ValueError(f"class {name!r} has {len(own)} descriptions, {classes[0]!r} has {len(rows[0])}: give every class as many")
        rows.append(own)
    return [list(row) for row in zip(*rows, strict=True)]


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


__all__ = [
    "adapter_features", "coprompt_loss", "cosine_logits", "embedding_consistency", "harmonic_mean", "sentence_index", "sentence_table",
]  # fmt: skip
