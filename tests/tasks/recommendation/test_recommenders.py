"""The recommenders: maths against dense and plain computations, and short trainings."""

import math

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from helpers import tiny_trainer
from lit_methods import LightGCN, MultVAE, NeuMF
from lit_methods.datamodules import RatingsDataModule
from lit_methods.tasks.recommendation.lightgcn import lightgcn_loss, normalized_adjacency, propagate
from lit_methods.tasks.recommendation.metrics import ranking_metrics
from lit_methods.tasks.recommendation.multvae import annealed_beta, gaussian_kl, multinomial_loss
from lit_methods.tasks.recommendation.neumf import neumf_loss

EDGES = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 2])  # user 2 and item 3 have none


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_propagation_is_a_dense_product_and_isolated_nodes_pass_nothing_on(dtype):
    dense = torch.zeros(7, 7, dtype=dtype)
    dense[EDGES[0], 3 + EDGES[1]] = 1
    dense = dense + dense.T
    degree = dense.sum(1)
    scale = torch.where(degree > 0, degree.rsqrt(), torch.zeros_like(degree))
    dense = scale[:, None] * dense * scale
    adjacency = normalized_adjacency(*EDGES, 3, 4, dtype)
    torch.testing.assert_close(adjacency.to_dense(), dense)
    table = torch.randn(7, 5, dtype=dtype, generator=torch.Generator().manual_seed(0), requires_grad=True)
    final = propagate(adjacency, table, 3)
    torch.testing.assert_close(final, (table + dense @ table + dense @ dense @ table + dense @ dense @ dense @ table) / 4)
    torch.testing.assert_close(final[2], table[2] / 4)
    assert propagate(adjacency, table, 0).equal(table)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert propagate(adjacency, table, 3).dtype == dtype
    assert normalized_adjacency(EDGES[0][:0], EDGES[1][:0], 3, 4).to_dense().sum() == 0


def test_edges_out_of_range_are_named():
    with pytest.raises(ValueError, match="item runs from 0 to 2, expected 0 to 1"):
        normalized_adjacency(*EDGES, 3, 2)
    with pytest.raises(ValueError, match=r"\(edges,\) both"):
        normalized_adjacency(EDGES[0], EDGES[1][:2], 3, 4)


def test_the_loss_by_hand():
    table = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0], [3.0, 0.0]])  # two users, two items
    losses = lightgcn_loss(table, 2 * table, torch.tensor([0]), torch.tensor([0]), torch.tensor([1]), 2, 0.1)
    assert float(losses["bpr"]) == pytest.approx(math.log1p(math.exp(12 - 4)))
    assert float(losses["reg"]) == pytest.approx(0.1 * 0.5 * (1 + 2 + 9))
    assert float(losses["total"]) == pytest.approx(float(losses["bpr"] + losses["reg"]))
    huge = lightgcn_loss(table, 1e3 * table, torch.tensor([0]), torch.tensor([0]), torch.tensor([1]), 2, 0.0)
    assert torch.isfinite(huge["total"])


def plain_metrics(scores: list[float], known: list[bool], target: list[bool], k: int) -> tuple[float, float, float]:
    order = sorted(range(len(scores)), key=lambda i: -math.inf if known[i] else scores[i], reverse=True)[:k]
    gains = [target[i] for i in order]
    dcg = sum(gain / math.log2(rank + 2) for rank, gain in enumerate(gains))
    best = sum(1 / math.log2(rank + 2) for rank in range(min(k, sum(target))))
    return sum(gains) / sum(target), sum(gains) / k, dcg / best


@pytest.mark.parametrize("k", [1, 5, 12, 40])
def test_ranking_metrics_are_a_sorted_list(k):
    generator = torch.Generator().manual_seed(k)
    scores = torch.randn(9, 12, generator=generator, dtype=torch.float64)
    known = torch.rand(9, 12, generator=generator) < 0.3
    target = ~known & (torch.rand(9, 12, generator=generator) < 0.4)
    target[0] = False  # nothing held out
    target[1], known[1] = True, False  # everything
    expected = [plain_metrics(*(row.tolist() for row in rows), k) for rows in zip(scores, known, target, strict=True) if rows[2].any()]
    each = ranking_metrics(scores, known, target, k)
    for index, name in enumerate(("recall", "precision", "ndcg")):
        assert float(each[name][each["counted"]].mean()) == pytest.approx(sum(row[index] for row in expected) / len(expected), rel=1e-12)
    assert not each["counted"][0]
    assert float(each["ndcg"][0]) == float(each["recall"][0]) == 0
    assert each["ndcg"].dtype == torch.float64


def test_ranking_refuses_what_does_not_fit():
    scores = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="k is 0"):
        ranking_metrics(scores, scores.bool(), scores.bool(), 0)
    with pytest.raises(ValueError, match=r"\(2, 3\), \(3, 2\)"):
        ranking_metrics(scores, scores.bool().T, scores.bool(), 1)


def test_the_vae_and_neumf_losses():
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    history = (torch.rand(4, 6, generator=torch.Generator().manual_seed(2)) < 0.5).double()
    each = [
        -sum(x * math.log(p) for x, p in zip(h, row, strict=True))
        for h, row in zip(history.tolist(), logits.softmax(1).tolist(), strict=True)
    ]
    assert float(multinomial_loss(logits, history)) == pytest.approx(sum(each) / 4)
    mean, log_variance = logits[:, :3], logits[:, 3:]
    normal = torch.distributions.Normal(mean, (log_variance / 2).exp())
    standard = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    kl = torch.distributions.kl_divergence(normal, standard).sum(1).mean()
    torch.testing.assert_close(gaussian_kl(mean, log_variance), kl)
    assert [annealed_beta(step, 0.2, 100) for step in (0, 50, 100, 1000)] == pytest.approx([0, 0.1, 0.2, 0.2])
    assert annealed_beta(0, 0.2, 0) == 0.2
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    positive, negative = logits[:, 0], logits[:, 1:]
    expected = bce(positive, torch.ones_like(positive)) + bce(negative, torch.zeros_like(negative))
    torch.testing.assert_close(neumf_loss(positive, negative), expected)


def metrics_after(model: pl.LightningModule, data: RatingsDataModule, steps: int, **kwargs: object) -> dict[str, Tensor]:
    trainer = tiny_trainer(max_steps=steps, check_val_every_n_epoch=None, val_check_interval=steps, **kwargs)
    trainer.fit(model, datamodule=data)
    return dict(trainer.callback_metrics)


def built(mode: str) -> tuple[pl.LightningModule, RatingsDataModule]:
    pl.seed_everything(1, verbose=False)
    if mode == "bpr":
        return LightGCN(200, 150, 16, 2, learning_rate=2e-2), RatingsDataModule(mode="bpr", batch_size=1024)
    if mode == "neumf":
        return NeuMF(200, 150, 8, learning_rate=1e-2), RatingsDataModule(mode="neumf", num_negatives=30)
    return MultVAE(150, 32, 8, anneal_steps=100), RatingsDataModule(mode="autoencoder", batch_size=32, test_share=0.2)


@pytest.mark.parametrize("mode", ["bpr", "neumf", "autoencoder"])
def test_training_beats_a_random_ranking(mode):
    model, data = built(mode)
    before = tiny_trainer().validate(model, datamodule=data, verbose=False)[0]["recommender/val_ndcg_20"]
    after = metrics_after(*built(mode), 60)
    assert float(after["recommender/val_ndcg_20"]) > before + 0.03
    (predicted, *_) = tiny_trainer().predict(model, datamodule=data)
    known = next(iter(data.predict_dataloader()))["known"]
    assert predicted["item"].shape == predicted["score"].shape
    assert (predicted["score"].diff(dim=1) <= 0).all()
    assert not known.gather(1, predicted["item"][predicted["score"].isfinite().all(dim=1)]).any() or mode == "neumf"


def test_a_validation_before_training_leaves_the_graph_fit_for_it():
    model, data = built("bpr")
    found = metrics_after(model, data, 3, num_sanity_val_steps=2)
    assert torch.isfinite(found["recommender/loss"])
    assert model._final is None


def test_metrics_follow_the_weights():
    """The smoothed embeddings of one evaluation aren't used in the next."""
    model, data = built("bpr")
    trainer = tiny_trainer()
    first = trainer.validate(model, datamodule=data, verbose=False)[0]
    with torch.no_grad():
        model.embedding.weight.normal_()
    assert trainer.validate(model, datamodule=data, verbose=False)[0] != first


def test_sizes_that_do_not_fit_the_data_are_named():
    with pytest.raises(ValueError, match=r"num_users=199 \(the data have 200\)"):
        tiny_trainer(max_steps=1).fit(LightGCN(199, 150), datamodule=RatingsDataModule())
    with pytest.raises(RuntimeError, match="no graph"):
        LightGCN(2, 2)(torch.tensor([0]))
    model = LightGCN(3, 4, 5)
    model.set_graph(*EDGES)
    assert model(torch.tensor([0, 2])).shape == (2, 4)
    with pytest.raises(ValueError, match="top_k"):
        LightGCN(2, 2, top_k=[])
    with pytest.raises(ValueError, match=r"dropout is 1\.0"):
        NeuMF(2, 2, dropout=1.0)
    with pytest.raises(ValueError, match="beta is -1"):
        MultVAE(2, beta=-1.0)
    with pytest.raises(ValueError, match=r"min_lr is 1\.0: give a rate from 0 to learning_rate"):
        LightGCN(2, 2, min_lr=1.0)


def test_the_learning_rate_ends_where_it_should():
    model, data = built("bpr")
    trainer = tiny_trainer(max_steps=6, limit_val_batches=0)
    trainer.fit(model, datamodule=data)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-4)
