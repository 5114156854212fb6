"""Distances of features: against closed forms and plain loops."""

import pytest
import torch
from torch import nn

from lit_methods import DigitFeatures, ScriptedFeatures
from lit_methods.consistency_models.evaluation import frechet_distance, precision_recall
from lit_methods.datamodules import GenerativeDigitsDataModule


def test_the_frechet_distance_is_that_of_two_gaussians():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(200, 3, generator=generator), 2 * torch.randn(300, 3, generator=generator) + 1
    first, second = torch.cov(a.T.double()), torch.cov(b.T.double())
    values, vectors = torch.linalg.eigh(first)
    root = vectors @ torch.diag(values.sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ second @ root).sqrt().sum()
    expected = (a.double().mean(0) - b.double().mean(0)).square().sum() + first.trace() + second.trace() - 2 * cross
    assert float(frechet_distance(a, b)) == pytest.approx(float(expected), rel=1e-5)
    assert float(frechet_distance(a, a)) == pytest.approx(0, abs=1e-5)


def test_precision_and_recall_are_the_shares_inside_the_balls():
    generator = torch.Generator().manual_seed(1)
    samples, data = torch.randn(40, 2, generator=generator), torch.randn(50, 2, generator=generator) + 0.7

    def share(points, features, k):
        reach = [sorted((one - other).norm() for other in features)[k] for one in features]
        return sum(any((p - f).norm() <= r for f, r in zip(features, reach, strict=True)) for p in points) / len(points)

    precision, recall = precision_recall(samples, data, 2, chunk=7)
    assert float(precision) == pytest.approx(share(samples, data, 2))
    assert float(recall) == pytest.approx(share(data, samples, 2))
    assert 0 < precision < 1


def test_a_lost_mode_costs_recall_and_an_invented_one_precision():
    left, right = torch.randn(60, 2), torch.randn(60, 2) + 100
    precision, recall = precision_recall(left, torch.cat([left + 0.01, right]))
    assert precision > 0.9
    assert recall < 0.6
    precision, recall = precision_recall(torch.cat([left, right]), left + 0.01)
    assert precision < 0.6
    assert recall > 0.9


def test_too_few_features_are_refused():
    few = torch.zeros(3, 2)
    with pytest.raises(ValueError, match="3 samples"):
        precision_recall(few, few)
    with pytest.raises(ValueError, match="at least 2"):
        frechet_distance(few[:1], few)
    with pytest.raises(ValueError, match=r"\(N, D\)"):
        frechet_distance(few, torch.zeros(3, 4))


def test_digit_features_know_digits_and_leave_the_generators_alone():
    data = GenerativeDigitsDataModule(image_size=16)
    data.setup("fit")
    before = torch.random.get_rng_state()
    features = DigitFeatures().requires_grad_(False)
    with torch.inference_mode():
        right = features.logits(data.val_set.images).argmax(1) == data.val_set.labels
        found = features(data.val_set.images)
    assert right.float().mean() > 0.9, "they were trained in inference mode, too"
    assert found.shape == (297, 64)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not any(parameter.requires_grad for parameter in features.parameters())
    with torch.no_grad():
        assert torch.equal(DigitFeatures()(data.val_set.images), found)


class Inception(nn.Module):
    """Interface of StyleGAN's Inception network."""

    def forward(self, pixels: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert pixels.dtype == torch.uint8
        assert return_features
        return pixels.float().mean((2, 3))


def test_a_stored_network_gives_features(tmp_path):
    torch.jit.script(Inception()).save(tmp_path / "a.pt")
    images = torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1, 1).expand(3, 1, 2, 2)
    found = ScriptedFeatures(tmp_path / "a.pt")(images)
    assert found.tolist() == [[0.0] * 3, [128.0] * 3, [255.0] * 3]
    torch.jit.script(nn.Flatten()).save(tmp_path / "b.pt")
    assert ScriptedFeatures(tmp_path / "b.pt", as_bytes=False)(images).shape == (3, 12)
    with pytest.raises(FileNotFoundError, match="TorchScript"):
        ScriptedFeatures(tmp_path / "none.pt")
