"""The maths of CoPrompt against independent computations."""

import math

import pytest
import torch

from lit_methods.optim import warmup_cosine_rate
from lit_methods.prompting.coprompt.core import (
    adapter_features,
    coprompt_loss,
    cosine_logits,
    embedding_consistency,
    harmonic_mean,
)


def features(rows: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_adapter_has_an_outer_relu(dtype: torch.dtype) -> None:
    x, w1, w2 = features(5, dtype), features(2, dtype, 1), features(2, dtype, 2).T
    by_hand = [[0.3 * max(0.0, sum(w2[i, h] * max(0.0, w1[h] @ row) for h in range(2))) + 0.7 * row[i] for i in range(8)] for row in x]
    torch.testing.assert_close(adapter_features(x, (w1, w2), 0.3), torch.tensor(by_hand, dtype=dtype))
    assert adapter_features(x, None, 0.3) is x


def test_consistency_ignores_lengths_and_gives_the_teacher_no_gradient() -> None:
    student, teacher = features(4).requires_grad_(), features(4, seed=1).requires_grad_()
    cosines = [torch.nn.functional.cosine_similarity(a, b, dim=0) for a, b in zip(student, teacher, strict=True)]
    found = embedding_consistency(3 * student, 0.2 * teacher)
    torch.testing.assert_close(found, 1 - sum(cosines) / 4)
    found.backward()
    assert teacher.grad is None
    assert student.grad is not None
    a, b = (x / x.norm(dim=1, keepdim=True) for x in (student.detach(), teacher.detach()))
    torch.testing.assert_close(embedding_consistency(student, teacher, "mse").detach(), ((a - b) ** 2).mean())
    torch.testing.assert_close(embedding_consistency(student, teacher, "l1").detach(), (a - b).abs().mean())
    assert embedding_consistency(student, 2 * student).abs() < 1e-12


def test_consistency_refuses_rows_that_do_not_belong_together() -> None:
    with pytest.raises(ValueError, match="with the rows of the same"):
        embedding_consistency(features(4), features(3))
    with pytest.raises(ValueError, match="cosine, mse, l1"):
        embedding_consistency(features(4), features(4), "kl")  # type: ignore[arg-type]


def test_bfloat16_features_are_compared_in_float32() -> None:
    image, text = features(4, torch.bfloat16), features(3, torch.bfloat16, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = coprompt_loss(image, text, image, text, torch.tensor([0, 1, 2, 0]), logit_scale=100.0)
    assert all(value.dtype == torch.float32 for value in found)
    torch.testing.assert_close(found.logits, cosine_logits(image.float(), text.float(), 100.0), rtol=0, atol=0)
    assert found.consistency.abs() < 1e-6


def test_the_loss_adds_both_parts() -> None:
    image, text = features(4), features(3, seed=1)
    teachers = features(4, seed=2), features(3, seed=3)
    labels = torch.tensor([0, 1, 2, 0])
    found = coprompt_loss(image, text, *teachers, labels, logit_scale=10.0, consistency_weight=2.5)
    expected = found.cross_entropy + 2.5 * (embedding_consistency(text, teachers[1]) + embedding_consistency(image, teachers[0]))
    torch.testing.assert_close(found.total, expected)
    with pytest.raises(ValueError, match="labels"):
        coprompt_loss(image, text, *teachers, labels[:2], logit_scale=10.0)


def test_the_rate_does_not_reach_zero() -> None:
    rates = [warmup_cosine_rate(epoch, 0.1, 4, 1, 1e-5) for epoch in range(4)]
    assert rates == pytest.approx([1e-5, 0.1, 0.05 * (1 + math.cos(math.pi / 4)), 0.05])
    assert warmup_cosine_rate(0, 0.1, 4, 0) == 0.1


def test_the_harmonic_mean_of_nothing_is_nothing() -> None:
    assert harmonic_mean(torch.tensor(0.5), torch.tensor(1.0)) == pytest.approx(2 / 3)
    assert harmonic_mean(torch.tensor(0.0), torch.tensor(0.0)) == 0
