"""OPIS against a plain computation with the whole matrix, in blocks, over ranks."""

import numpy as np
import pytest
import torch

from helpers import run_two_processes
from lit_methods import OPIS, RetrievalScores
from lit_methods.tasks.metric_learning import opis as measure


def clouds(dtype=torch.float64, seed=0):
    """Four classes of different spread, one of a single sample; 40 samples."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.arange(39) % 3, torch.tensor([9])])
    centre = torch.randn(10, 6, generator=generator, dtype=torch.float64)
    spread = torch.tensor([0.2, 0.6, 1.5] + [1.0] * 7, dtype=torch.float64)
    noise = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    return (centre[labels] + spread[labels, None] * noise).to(dtype), labels


def whole_matrix(embeddings, labels, d_min, d_max, n, epsilon):
    """All pairs at once, by NumPy."""
    unit = (embeddings / embeddings.norm(dim=1, keepdim=True)).numpy()
    distances = np.linalg.norm(unit[:, None] - unit[None], axis=2)
    y, thresholds = labels.numpy(), np.linspace(d_min, d_max, n)
    rows = []
    for c in [c for c in np.unique(y) if (y == c).sum() > 1]:
        own = distances[np.ix_(y == c, y == c)][np.triu_indices((y == c).sum(), 1)]
        cross = distances[np.ix_(y == c, y != c)].ravel()
        sens = (own[:, None] <= thresholds).mean(0)
        spec = (cross[:, None] > thresholds).mean(0)
        rows.append(2 * sens * spec / np.maximum(sens + spec, 1e-300))
    utility = np.stack(rows)
    variance = ((utility - utility.mean(0)) ** 2).mean(0)
    order = np.argsort(np.trapezoid(utility, thresholds), kind="stable")
    k = max(1, int(np.ceil(epsilon * len(order))))
    gap = utility[order[:k]].mean(0) - utility[order[-k:]].mean(0)
    return np.trapezoid(variance, thresholds) / (d_max - d_min), np.trapezoid(gap**2, thresholds) / (d_max - d_min)


@pytest.mark.parametrize("block", [2048, 7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_opis_equals_the_computation_with_all_pairs(dtype, block, monkeypatch):
    monkeypatch.setattr(measure, "_BLOCK", block)
    embeddings, labels = clouds(dtype)
    d_min, d_max, pairs = measure.calibration_range(embeddings, labels)
    assert pairs == 40 * 39 // 2 - 3 * 13 * 12 // 2
    found = measure.opis(embeddings, labels, d_min, d_max, 31, 0.5)
    assert found.classes.tolist() == [0, 1, 2]
    expected = whole_matrix(embeddings.double(), labels, d_min, d_max, 31, 0.5)
    np.testing.assert_allclose([found.opis, found.eps_opis], expected, rtol=1e-9)
    scores = measure.retrieval_scores(embeddings, labels, (1, 5))
    unit = torch.nn.functional.normalize(embeddings.double(), dim=1)
    cosine = (unit @ unit.T).fill_diagonal_(-2)
    right = labels[cosine.argsort(dim=1, descending=True)] == labels[:, None]
    right = right[:39, :39]  # the single sample asks nothing; the last place is the query itself
    assert scores["recall_at_1"] == right[:, 0].double().mean()
    assert scores["recall_at_5"] == right[:, :5].any(1).double().mean()
    precision = right[:, :12].cumsum(1) / torch.arange(1, 13) * right[:, :12]
    torch.testing.assert_close(scores["map_at_r"], precision.double().mean())


def test_a_sample_of_pairs_is_near_all_pairs_and_always_the_same():
    generator = torch.Generator().manual_seed(0)
    embeddings, labels = torch.randn(600, 8, generator=generator), torch.arange(600) % 20
    exact = measure.calibration_range(embeddings, labels)
    sampled = measure.calibration_range(embeddings, labels, max_pairs=50_000, seed=1)
    assert sampled == measure.calibration_range(embeddings, labels, max_pairs=50_000, seed=1)
    assert sampled[2] < exact[2]
    np.testing.assert_allclose(sampled[:2], exact[:2], rtol=0.02)


def on_rank(metric):
    embeddings, labels = clouds(torch.float32)
    rank = torch.distributed.get_rank()
    metric.update(embeddings[rank::2][:3], labels[rank::2][:3])
    metric.update(embeddings[rank::2][3:], labels[rank::2][3:])
    return metric.compute()


@pytest.mark.parametrize("metric", [OPIS(num_thresholds=21), RetrievalScores((1, 2))], ids=["opis", "retrieval"])
def test_two_processes_equal_one(metric):
    both = run_two_processes(on_rank, metric)
    metric.update(*clouds(torch.float32))
    alone = metric.compute()
    for found in both:
        assert set(found) == set(alone)
        for name, value in alone.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)


def test_what_can_not_be_measured_is_said():
    embeddings, labels = clouds()
    with pytest.raises(ValueError, match="no negative pair"):
        measure.calibration_range(embeddings, torch.zeros_like(labels))
    with pytest.raises(ValueError, match="d_min"):
        measure.opis(embeddings, labels, 1.0, 1.0)
    with pytest.raises(ValueError, match="NaN"):
        measure.opis(embeddings * torch.nan, labels, 0.5, 1.0)
    with pytest.raises(ValueError, match="one with two samples"):
        measure.opis(embeddings, torch.arange(40), 0.5, 1.0)


@pytest.mark.slow
def test_sixty_thousand_embeddings_fit_in_two_gigabytes():
    """Peak memory above what the process held before, with one thread."""
    import resource

    generator = torch.Generator().manual_seed(0)
    metric = OPIS()
    labels = torch.arange(60_000) % 11_000
    centre = torch.randn(11_000, 128, generator=generator)
    metric.update(centre[labels] + torch.randn(60_000, 128, generator=generator), labels)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert 0 < metric.compute()["opis"] < 1
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 2e9
