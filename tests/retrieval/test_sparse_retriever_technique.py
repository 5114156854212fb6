"""Sparse retriever: the maths against independent computations, the modules in a Trainer, one process and two."""

import math

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from torch import nn
from torch.utils.data import DataLoader

from helpers import Classifier, assert_state_dicts_equal, cloned_state, kill_and_resume, left_behind, run_two_processes, tiny_trainer
from lit_methods import DenseRetriever, RetrieverTeacher, SmallTextEncoder, SparseRetriever
from lit_methods.callbacks import FLOPSRegularizer
from lit_methods.datamodules import SynonymSearchDataModule
from lit_methods.distributed import gather_rows, rank, world_size
from lit_methods.retrieval.evaluation import expected_products, rank_documents, ranking_figures, trec_figures, write_trec_run
from lit_methods.retrieval.idf import count_documents, idf_of_counts, read_idf, write_idf
from lit_methods.retrieval.ranking import margin_mse, pair_scores, ranking_info_nce, ranking_kl
from lit_methods.retrieval.sparse_retriever.core import document_weights, ensemble_scores, flops_penalty, quadratic_ramp, query_weights


def draws(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def network(seed=0, vocab_size=400):
    torch.manual_seed(seed)
    return SmallTextEncoder(vocab_size, width=8, heads=2)


def retriever(**arguments):
    options = {"other_positives": True, "learning_rate": 1e-2, "flops_weight": 0.01, "ramp_steps": 3}
    return SparseRetriever(network(), **(options | arguments))


def small_data(**arguments):
    return SynonymSearchDataModule(**({"num_documents": 40, "batch_size": 4, "eval_batch_size": 16} | arguments))


# ---- maths -----------------------------------------------------------------------------------------------------------------------------


def test_idf_in_the_match_and_in_the_penalty_are_one_for_corresponding_weights():
    w, idf, ids = draws(6, 10).relu(), draws(10, seed=1).exp(), torch.tensor([[1, 4, 4], [2, 0, 7], [5, 5, 5]])
    e = idf * w
    matched = pair_scores(query_weights(ids, idf, [0]), w)
    binary = pair_scores(query_weights(ids, torch.ones(10, dtype=idf.dtype), [0]), e)
    torch.testing.assert_close(matched, binary)
    torch.testing.assert_close(flops_penalty(w, 2), flops_penalty(e, 2, idf=idf))
    assert not torch.isclose(flops_penalty(e, 2), flops_penalty(w, 2))  # the plain penalty of e is another one


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_document_weights_against_a_loop(dtype):
    logits, mask = draws(3, 4, 5, dtype=dtype), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])
    found = document_weights(logits, mask, double_log=True, prune_ratio=0.5)
    assert found.dtype == dtype
    for b in range(3):
        own = [math.log1p(math.log1p(max([0.0, *(float(logits[b, t, v]) for t in range(4) if mask[b, t])]))) for v in range(5)]
        wanted = [x if x > 0.5 * max(own) else 0.0 for x in own]
        np.testing.assert_allclose(found[b].tolist(), wanted, rtol=1e-5)
    assert not found[2].any()


def test_a_query_is_a_set_without_special_tokens_and_negative_idf_counts_as_none():
    idf = torch.tensor([1.0, 2.0, -3.0, 4.0])
    assert query_weights(torch.tensor([[3, 3, 1, 0], [2, 0, 0, 0]]), idf, [0]).tolist() == [[0, 2, 0, 4], [0, 0, 0, 0]]
    assert query_weights(torch.tensor([[3]]), idf).tolist() == [[0, 0, 0, 4]]


def test_flops_squares_means_and_leaves_short_rows_out():
    w = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    assert float(flops_penalty(w)) == pytest.approx(0.5**2 + 1.0**2 + 0.5**2)
    assert float(flops_penalty(w, 2)) == pytest.approx((1.0 + 0.25 + 1.0) + 2.25)
    assert float(flops_penalty(w, l0_threshold=1)) == pytest.approx(0.5**2 + 0.25**2 + 0.5**2)  # the mean is over all rows
    with pytest.raises(ValueError, match=r"weights are \(4, 3\) with 3 documents a query"):
        flops_penalty(w, 3)


def test_lambda_rises_with_the_square_of_the_step():
    assert [quadratic_ramp(step, 4.0, 2) for step in range(4)] == [1.0, 4.0, 4.0, 4.0]
    assert quadratic_ramp(0, 4.0, 0) == 4.0


def test_teachers_are_scaled_within_a_query_and_ties_give_zeros():
    q, d = draws(2, 3), draws(4, 3, seed=1)
    tied = torch.zeros(2, 3, dtype=q.dtype), torch.zeros(4, 3, dtype=q.dtype)
    for in_batch in (True, False):
        one, both = ensemble_scores([q], [d], in_batch), ensemble_scores([q, tied[0]], [d, tied[1]], in_batch)
        torch.testing.assert_close(both, one / 2)
        assert one.amin(1).tolist() == [0, 0]
        torch.testing.assert_close(one.amax(1), torch.full((2,), 30.0, dtype=q.dtype), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ensemble_scores([q, q], [d, d], normalise=False), q @ d.T)
    assert not ensemble_scores([q.requires_grad_()], [d]).requires_grad
    with pytest.raises(ValueError, match="0 teachers' queries"):
        ensemble_scores([], [])


def test_info_nce_leaves_other_queries_positives_out_unless_asked():
    scores = draws(3, 6)
    rows = []
    for i in range(3):
        candidates = [2 * i, 1, 3, 5]
        rows.append(float(torch.logsumexp(scores[i, candidates] / 0.5, 0) - scores[i, 2 * i] / 0.5))
    assert float(ranking_info_nce(scores, 2, 0.5)) == pytest.approx(np.mean(rows))
    wanted = nn.functional.cross_entropy(scores, torch.tensor([0, 2, 4]))
    torch.testing.assert_close(ranking_info_nce(scores, 2, other_positives=True), wanted)
    torch.testing.assert_close(ranking_info_nce(scores[:, :2], 2), nn.functional.cross_entropy(scores[:, :2], torch.zeros(3).long()))
    assert float(ranking_info_nce(scores[:, :3], 1)) == 0  # one document a query, no rival
    with pytest.raises(ValueError, match="give"):
        ranking_info_nce(scores, 4)


def test_kl_and_margins_of_equal_scores_are_zero_and_of_others_are_not():
    scores, teacher = draws(3, 4), draws(3, 4, seed=1)
    assert float(ranking_kl(scores, scores)) == pytest.approx(0, abs=1e-12)
    assert float(margin_mse(scores, scores + 5)) == pytest.approx(0, abs=1e-12)
    p, q = teacher.softmax(1), scores.softmax(1)
    torch.testing.assert_close(ranking_kl(scores, teacher), (p * (p / q).log()).sum() / 3)
    for function in (ranking_kl, margin_mse):
        with pytest.raises(ValueError, match="score the same documents"):
            function(scores, teacher[:, :2])


def test_idf_is_that_of_the_formula_and_survives_a_file(tmp_path):
    counts = count_documents([[1, 1, 2], [2], [2, 3]], 5)
    assert counts.tolist() == [0, 1, 3, 1, 0]
    idf = idf_of_counts(counts, 3)
    np.testing.assert_allclose(idf[[1, 2]], [math.log(1 + 2.5 / 1.5), math.log(1 + 0.5 / 3.5)], rtol=1e-6)
    assert idf[0] == idf[4] == 1
    write_idf(tmp_path / "idf.json", list("abcde"), idf)
    np.testing.assert_allclose(read_idf(tmp_path / "idf.json", ["c", "x", "b"]), [idf[2], 1, idf[1]], atol=1e-6)
    for text, problem in (
        ("[1]", "is a list"),
        ('{"a": "x"}', "token 'a': 'x'"),
        ("{", "can't be read"),
        ('{"a": 1e300}', "token 'a': 1e\\+300"),
        ('{"z": 1}', "none of its 1"),
    ):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=problem):
            read_idf(tmp_path / "bad.json", ["a"])


# ---- ranking ---------------------------------------------------------------------------------------------------------------------------


def ranked():
    rng = np.random.default_rng(0)
    documents, queries = (rng.random(shape) * (rng.random(shape) < 0.3) for shape in ((130, 20), (7, 20)))
    return queries.astype(np.float32), documents.astype(np.float32)


def test_sparse_and_dense_vectors_are_ranked_alike_and_what_scores_0_is_not_found():
    queries, documents = ranked()
    numbers = np.arange(130)[::-1]
    found = rank_documents(csr_matrix(queries), csr_matrix(documents), np.arange(7), numbers, 100, True, rows=3)
    scores = queries @ documents.T
    for row in range(7):
        kept = [k for k in sorted(range(130), key=lambda k: (-scores[row, k], numbers[k])) if scores[row, k] > 0][:100]
        assert found.documents[row][: len(kept)].tolist() == [numbers[k] for k in kept]
        assert (found.documents[row][len(kept) :] == -1).all()
    dense = rank_documents(queries, documents, np.arange(7), numbers, 10, False)
    assert dense.documents.tolist() == [[d for d in row[:10]] for row in found.documents.tolist()]
    shares = [(part != 0).mean(0) for part in (queries, documents)]
    assert expected_products(csr_matrix(queries), csr_matrix(documents)) == pytest.approx(shares[0] @ shares[1])


def test_figures_equal_those_of_trec_eval(tmp_path):
    pytest.importorskip("pytrec_eval", reason='pytrec_eval is not installed: pip install "lit-methods[retrieval]"')
    queries, documents = ranked()
    found = rank_documents(csr_matrix(queries), csr_matrix(documents), np.arange(7), np.arange(130), 100, True)
    rng = np.random.default_rng(1)
    judgements = np.array([(q, d, rng.integers(0, 3)) for q in range(6) for d in rng.choice(130, 12, replace=False)])
    ours = ranking_figures(found, judgements)
    names = [f"q{k}" for k in range(7)], [f"d{k}" for k in range(130)]
    write_trec_run(tmp_path / "run.trec", found, *names, "test")
    run, truth = {}, {}
    for query, _, document, place, *_ in (line.split() for line in (tmp_path / "run.trec").read_text().splitlines()):
        run.setdefault(query, {})[document] = -float(place)
    for query, document, grade in judgements.tolist():
        truth.setdefault(f"q{query}", {})[f"d{document}"] = grade
    theirs = trec_figures(run, truth)
    assert ours["ndcg_at_10"] == pytest.approx(theirs["ndcg_at_10"], abs=1e-6)
    assert ours["recall_at_100"] == pytest.approx(theirs["recall_at_100"], abs=1e-6)
    assert 0 < ours["mrr_at_10"] <= theirs["mrr"]
    assert ranking_figures(found, judgements[:0]) == {} == trec_figures(run, {})


def test_a_prediction_writes_a_run_file(tmp_path):
    module, data = retriever(), small_data()
    tiny_trainer(default_root_dir=tmp_path, max_steps=2).fit(module, datamodule=data)
    trainer = tiny_trainer(default_root_dir=tmp_path)
    trainer.predict(module, datamodule=data)
    lines = [line.split(" ") for line in (tmp_path / "run.trec").read_text().splitlines()]
    assert {line[0] for line in lines} == set(data.query_names[30:])
    assert all(line[1] == "Q0" and line[2] in data.document_names and line[5] == "SparseRetriever" for line in lines)
    first = [line for line in lines if line[0] == "q30"]
    assert [int(line[3]) for line in first] == list(range(1, len(first) + 1))
    assert sorted([float(line[4]) for line in first], reverse=True) == [float(line[4]) for line in first]


# ---- modules ---------------------------------------------------------------------------------------------------------------------------


def test_the_queries_never_run_the_network():
    module, data = retriever(), small_data()
    data.setup("fit")
    module.set_idf(data.idf)
    module.network.forward = None
    batch = next(iter(data.train_dataloader()))
    found = module.represent(batch["query_ids"], batch["query_mask"], True)
    assert torch.equal(found != 0, torch.zeros_like(found).scatter_(1, batch["query_ids"], 1.0) != 0)
    padded = nn.functional.pad(batch["query_ids"], (0, 3), value=399), nn.functional.pad(batch["query_mask"], (0, 3))
    assert torch.equal(module.represent(*padded, True), found)  # whatever the padding is


def test_lambda_counts_optimiser_steps():
    seen = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            seen.append(float(trainer.callback_metrics["retriever/lambda"]))

    tiny_trainer(max_steps=3, accumulate_grad_batches=2, callbacks=[Look()]).fit(retriever(), datamodule=small_data())
    np.testing.assert_allclose(seen, np.repeat([0.01 * (k / 3) ** 2 for k in (1, 2, 3)], 2), rtol=1e-6)


@pytest.mark.parametrize("mode", ["match", "penalty", "none"])
def test_every_mode_trains_and_a_killed_run_ends_bit_equal(mode, tmp_path):
    whole, resumed = kill_and_resume(lambda: (retriever(idf_mode=mode), small_data(), []), 5, 3, tmp_path, limit_val_batches=0)
    assert_state_dicts_equal(resumed, whole)
    assert bool(whole["idf_known"]) == (mode != "none")


def test_trained_idfs_move_and_others_stay():
    for rate in (0.1, None):
        module = retriever(idf_learning_rate=rate)
        data = small_data()
        tiny_trainer(max_steps=2, limit_val_batches=0).fit(module, datamodule=data)
        assert torch.equal(module.idf.detach(), data.idf) == (rate is None)


def test_teachers_are_frozen_unsaved_and_decide_the_targets():
    def student(teachers, **arguments):
        return retriever(loss="kl", teachers=teachers, **arguments)

    ends = []
    for width in (8, 16):
        torch.manual_seed(3)
        dense = DenseRetriever(SmallTextEncoder(400, width=width, heads=2))
        before = cloned_state(dense)
        module = student([RetrieverTeacher(dense), RetrieverTeacher(retriever(siamese=True))])
        tiny_trainer(max_steps=2, limit_val_batches=0).fit(module, datamodule=small_data(docs_per_query=2))
        assert_state_dicts_equal(cloned_state(dense), before)
        assert not any(name.startswith("teachers") for name in module.state_dict())
        ends.append(module.state_dict()["network.bias"])
    assert not torch.equal(*ends)


def test_scores_of_the_batch_are_targets():
    batch = {
        "query_ids": torch.tensor([[1, 2], [3, 4]]), "query_mask": torch.ones(2, 2).long(),
        "scores": torch.tensor([[3.0, 1.0], [2.0, 0.0]]),
        "document_ids": torch.tensor([[1, 2], [5, 6], [3, 4], [7, 8]]), "document_mask": torch.ones(4, 2).long(),
    }  # fmt: skip
    loader = DataLoader([batch] * 2, batch_size=None)
    for loss in ("kl", "margin_mse"):
        module = retriever(loss=loss, in_batch_negatives=False, idf_mode="none")
        trainer = tiny_trainer(max_steps=2)
        trainer.fit(module, loader)
        assert math.isfinite(float(trainer.callback_metrics["retriever/ranking_loss"]))
    del batch["scores"]
    module = retriever(loss="kl", in_batch_negatives=False, idf_mode="none")
    with pytest.raises(KeyError, match="the batch needs scores"):
        tiny_trainer(max_steps=1).fit(module, DataLoader([batch], batch_size=None))


def test_a_query_that_is_compared_with_no_document_is_refused():
    with pytest.raises(ValueError, match="one document and is compared with no other"):
        tiny_trainer(max_steps=1).fit(retriever(other_positives=False), datamodule=small_data())


def test_under_bfloat16_maximum_and_logarithm_are_wide():
    module = retriever()
    trainer = tiny_trainer(max_steps=2, precision="bf16-mixed")
    trainer.fit(module, datamodule=small_data())
    assert math.isfinite(float(trainer.callback_metrics["retriever/loss"]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = module.network(torch.tensor([[1, 2]]), torch.ones(1, 2).long())
        assert document_weights(logits, torch.ones(1, 2)).dtype == torch.float32
        assert pair_scores(torch.ones(1, 3).bfloat16(), torch.ones(2, 3).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"loss": "margin_mse"}, "set in_batch_negatives to false"),
        ({"loss": "kl"}, "needs teachers"),
        ({"query_flops_weight": 0.1}, "set siamese to true"),
        ({"idf_mode": "twice"}, "idf_mode is 'twice'"),
        ({"prune_ratio": 1.0}, "prune_ratio is 1.0"),
        ({"flops_weight": -1.0}, "flops_weight is -1.0"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"top_k": 10}, "top_k is 10"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, problem):
    with pytest.raises(ValueError, match=problem):
        retriever(**arguments)


def test_what_does_not_fit_the_data_is_refused():
    with pytest.raises(ValueError, match="learns from no teacher"):
        retriever(teachers=[RetrieverTeacher(DenseRetriever(network()))])
    with pytest.raises(ValueError, match="Linear has no vocab_size"):
        SparseRetriever(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="the data have 400 tokens and the network 300"):
        tiny_trainer(max_steps=1).fit(SparseRetriever(network(vocab_size=300)), datamodule=small_data())
    data = small_data()
    data.setup("fit")
    with pytest.raises(ValueError, match="there is no IDF table"):
        tiny_trainer(max_steps=1).fit(retriever(), data.train_dataloader())
    with pytest.raises(ValueError, match="divides by the IDF, and 1 are 0 or less"):
        retriever(idf_mode="penalty").set_idf(torch.tensor([0.0, 1.0]))
    with pytest.raises(KeyError, match=r"the batch needs query_ids, .* it has \['image'\]"):
        tiny_trainer(max_steps=1).fit(retriever(idf_mode="none"), DataLoader([{"image": torch.ones(2)}], batch_size=None))


# ---- processes -------------------------------------------------------------------------------------------------------------------------


def trained(batch_size, **trainer):
    torch.manual_seed(0)
    module, data = retriever(l0_threshold=1), small_data(batch_size=batch_size, docs_per_query=2)
    trainer = tiny_trainer(max_steps=4, **trainer)
    trainer.fit(module, datamodule=data)
    figures = {name: float(value) for name, value in trainer.callback_metrics.items() if "val_" in name}
    return {name: value.numpy() for name, value in module.state_dict().items()}, figures


def two_processes():
    return trained(2, devices=2, strategy="ddp")


def test_two_processes_end_like_one():
    first, second = run_two_processes(two_processes)
    whole, figures = trained(4)
    for other, seen in (first, second):
        assert seen == pytest.approx(figures, rel=1e-5)
        for name, value in whole.items():
            if name.endswith("in_proj_bias"):  # attention doesn't depend on the keys' bias: Adam makes steps of its rounding errors
                value, other[name] = (np.delete(part, slice(8, 16)) for part in (value, other[name]))
            np.testing.assert_allclose(other[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def gathered_gradients():
    own = draws(2, 5, seed=rank()).requires_grad_()

    def loss(rows):
        return flops_penalty(rows.relu()) + ranking_info_nce(pair_scores(rows, rows), 1, other_positives=True)

    (ours,) = torch.autograd.grad(loss(gather_rows(own)), own)
    others = [draws(2, 5, seed=k) for k in range(world_size())]
    others[rank()] = own
    (scaled,) = torch.autograd.grad(world_size() * loss(torch.cat(others)), own)  # the authors': own part with gradient, times W
    return ours.numpy(), scaled.numpy()


def test_gathering_with_gradient_equals_the_own_part_times_the_number_of_processes():
    for ours, scaled in run_two_processes(gathered_gradients):
        np.testing.assert_allclose(ours, scaled, rtol=1e-12)
        assert np.abs(ours).max() > 0


# ---- FLOPS as a callback ---------------------------------------------------------------------------------------------------------------


class SparseCodes(pl.LightningModule):
    """A module that isn't ours: an autoencoder with ReLU codes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.codes, self.back = nn.Sequential(nn.Linear(6, 12), nn.ReLU()), nn.Linear(12, 6)

    def training_step(self, batch, batch_idx):
        return (self.back(self.codes(batch)) - batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def vectors():
    return DataLoader(draws(8, 6, dtype=torch.float32), batch_size=4)


def test_the_callback_adds_the_penalty_to_any_module_and_leaves_nothing():
    module = SparseCodes()
    batch = next(iter(vectors()))
    wanted = flops_penalty(module.codes(batch))
    trainer = tiny_trainer(max_steps=1, callbacks=[FLOPSRegularizer(["codes"], weight=2.0, ramp_steps=2)])
    expected = SparseCodes()
    loss = expected.training_step(batch, 0) + 2.0 / 4 * flops_penalty(expected.codes(batch))
    loss.backward()
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter -= 0.1 * parameter.grad
    trainer.fit(module, vectors())
    assert float(trainer.callback_metrics["flops/loss"]) == pytest.approx(float(wanted))
    assert float(trainer.callback_metrics["flops/lambda"]) == pytest.approx(0.5)
    assert_state_dicts_equal(cloned_state(module), cloned_state(expected), atol=1e-6)
    assert not left_behind(SparseCodes, FLOPSRegularizer(["codes"]), vectors())


def test_the_callback_makes_codes_sparser():
    lengths = {}
    for weight in (0.0, 5.0):
        trainer = tiny_trainer(max_epochs=40, callbacks=[FLOPSRegularizer(["codes"], weight, ramp_steps=0)])
        trainer.fit(SparseCodes(), vectors())
        lengths[weight] = float(trainer.callback_metrics["flops/loss"])
    assert lengths[5.0] < 0.5 * lengths[0.0]


def test_the_callback_refuses_what_it_can_not_count():
    pictures = DataLoader([(torch.randn(3, 8, 8), torch.tensor(k)) for k in range(2)], batch_size=2)
    callback = FLOPSRegularizer(["network.0"], docs_per_query=3)  # feature maps are flattened
    with pytest.raises(ValueError, match=r"FLOPSRegularizer: weights are \(2, 144\) with 3 documents a query"):
        tiny_trainer(max_steps=1, callbacks=[callback]).fit(Classifier(), pictures)
    with pytest.raises(ValueError, match="docs_per_query is 0"):
        FLOPSRegularizer(["codes"], docs_per_query=0)
