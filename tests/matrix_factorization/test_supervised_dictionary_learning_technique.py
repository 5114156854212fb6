"""Supervised dictionary learning: the maths against independent computations, the module in a Trainer, the estimator in scikit-learn."""

import math
import warnings

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from sklearn import set_config
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_curve
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler
from sklearn.utils.estimator_checks import check_estimator
from torch.utils.data import DataLoader

from helpers import SaveAt, assert_state_dicts_equal, cloned_state, run_two_processes, tiny_trainer
from lit_methods import SupervisedDictionaryClassifier, SupervisedMatrixFactorization, TwoStageClassifier
from lit_methods.datamodules import PlantedDirectionsDataModule, SemiSyntheticDigitsDataModule, TwoClassDataModule
from lit_methods.matrix_factorization.base import atom_picture
from lit_methods.matrix_factorization.regression import best_threshold, code_columns, fit_regression
from lit_methods.matrix_factorization.supervised_dictionary_learning.core import (
    Factors,
    Lifted,
    alternating_codes,
    bcd_step,
    best_low_rank,
    exhaustive_codes,
    factor_objective,
    lift_factors,
    lpgd_curvature,
    lpgd_objective,
    lpgd_step,
    predict_probability,
    random_factors,
    recover_factors,
    search_radius,
    svd_factors,
    update_codes,
    update_codes_supervised,
    update_dictionary,
)

BOTH = ["filter", "feature"]


def draws(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def problem(p=7, n=20, q=2, rank=3, dtype=torch.float64):
    """Data, labels, covariates, factors."""
    x, covariates = draws(p, n, dtype=dtype), draws(q, n, seed=1, dtype=dtype)
    labels = (draws(1, n, seed=2) > 0).to(dtype)
    factors = random_factors(p, n, q, rank, torch.Generator().manual_seed(3))
    return x, labels, covariates, Factors(*(part.to(dtype) for part in factors))


# ---- the maths -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("model", BOTH)
def test_a_step_is_a_gradient_step_and_a_projection(model, dtype):
    """Autograd of the objective, and NumPy's SVD."""
    x, labels, covariates, factors = problem(dtype=dtype)
    state = lift_factors(factors, model)
    leaves = [part.clone().requires_grad_() for part in state]
    z = torch.cat([torch.ones(1, x.shape[1], dtype=dtype), covariates])
    scores = (leaves[0].T @ x if model == "filter" else leaves[0]) + leaves[2] @ z
    loss = (torch.nn.functional.softplus(scores) - labels * scores).sum() + 0.7 * (x - leaves[1]).square().sum()
    loss = loss + 0.15 * (leaves[0].square().sum() + leaves[2].square().sum())
    torch.testing.assert_close(lpgd_objective(x, labels, covariates, state, model=model, xi=0.7, nu=0.3).total, loss.detach())
    stepped = [leaf.detach() - 0.02 * grad for leaf, grad in zip(leaves, torch.autograd.grad(loss, leaves), strict=True)]
    u, s, v = np.linalg.svd(np.concatenate([stepped[0], stepped[1]], axis=1 if model == "filter" else 0), full_matrices=False)
    wanted = torch.from_numpy((u[:, :2] * s[:2]) @ v[:2])
    found = lpgd_step(x, labels, covariates, state, model=model, rank=2, step_size=0.02, xi=0.7, nu=0.3)
    torch.testing.assert_close(torch.cat([found.score, found.product], dim=1 if model == "filter" else 0), wanted)
    torch.testing.assert_close(found.gamma, stepped[2])


def test_the_weight_of_the_reconstruction_is_2_xi_in_lpgd_and_xi_in_bcd():
    """A pitfall of the authors' code, kept: without labels' part, the gradients differ by the factor 2."""
    x, labels, covariates, factors = problem(q=0)
    still = factors._replace(coefficients=torch.zeros_like(factors.coefficients))
    state = Lifted(torch.zeros(7, 1).double(), factors.dictionary @ factors.codes, torch.zeros(1, 1).double())
    moved = lpgd_step(x, labels, covariates, state, model="filter", rank=20, step_size=0.1, xi=0.5)
    torch.testing.assert_close(moved.product, state.product - 0.1 * 2 * 0.5 * (state.product - x))
    dictionary = update_dictionary(x, labels, covariates, still, xi=0.5, inner_steps=1, nonnegative=False)
    gram = factors.codes @ factors.codes.T
    gradient = 0.5 * (factors.dictionary @ factors.codes - x) @ factors.codes.T
    torch.testing.assert_close(dictionary, factors.dictionary - gradient / (math.sqrt(10) * (gram.trace() + 1)))


@pytest.mark.parametrize("model", BOTH)
@pytest.mark.parametrize("rank", [1, 3, 30])
def test_factors_multiply_to_what_they_came_from(model, rank):
    """Only what is identified is compared: W H, the scores, ||W||. A rank above the matrix's is filled with zeros."""
    x, labels, covariates, factors = problem(rank=min(rank, 5))
    state = lpgd_step(x, labels, covariates, lift_factors(factors, model), model=model, rank=rank, step_size=0.01, xi=1.0)
    found = recover_factors(state.product, state.score, state.gamma, model=model, rank=rank)
    assert [tuple(part.shape) for part in found] == [(7, rank), (rank, 20), (1, 1 + rank + 2)]
    torch.testing.assert_close(found.dictionary @ found.codes, state.product)
    again = lift_factors(found, model)
    torch.testing.assert_close(again.score, state.score)
    torch.testing.assert_close(again.gamma, state.gamma)
    torch.testing.assert_close(found.dictionary.norm(), torch.ones(()).double())


def test_factors_of_zeros_are_zeros():
    found = recover_factors(torch.zeros(4, 5), torch.zeros(4, 1), torch.zeros(1, 1), model="filter", rank=2)
    assert all(not part.any() for part in found)


def test_a_sketch_finds_the_same_subspace():
    low = draws(40, 6) @ draws(6, 90, seed=1) + 1e-3 * draws(40, 90, seed=2)
    exact = best_low_rank(low, 6)
    torch.testing.assert_close(best_low_rank(low, 6, draws(90, 12, seed=3)).matrix(), exact.matrix(), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(best_low_rank(low, 60).matrix(), low)


@pytest.mark.parametrize("model", BOTH)
def test_a_step_of_one_over_the_curvature_never_raises_the_objective_where_the_rank_is_free(model):
    x, labels, covariates, factors = problem()
    x, state = 10 * x, lift_factors(factors, model)
    options = {"model": model, "xi": 0.5, "nu": 0.1}
    step = 1 / float(lpgd_curvature(x, covariates, **options))
    before = math.inf
    for _ in range(30):
        state = lpgd_step(x, labels, covariates, state, rank=20, step_size=step, **options)
        now = float(lpgd_objective(x, labels, covariates, state, **options).total)
        assert now <= before
        before = now


def test_a_sweep_of_codes_is_row_by_row_and_the_radius_binds_each_row():
    x, _, _, (dictionary, codes, _) = problem()
    gram, target, wanted = dictionary.T @ dictionary, dictionary.T @ x, codes.clone()
    for _ in range(2):
        for k in range(3):
            gradient = gram[k] @ wanted - target[k] + 0.1 * wanted[k].sign() + 0.2 * wanted[k]
            wanted[k] = (wanted[k] - gradient / (gram[k, k] + 1)).clamp(min=0)
    torch.testing.assert_close(update_codes(x, dictionary, codes, l1=0.1, l2=0.2), wanted)
    small = update_codes(x, dictionary, codes, sweeps=1, radius=0.01, nonnegative=False)
    torch.testing.assert_close((small - codes).norm(dim=1), torch.full((3,), 0.01, dtype=torch.float64))


def test_supervised_codes_descend_and_only_in_the_columns_that_are_drawn():
    x, labels, covariates, factors = problem()
    codes = update_codes_supervised(x, labels, covariates, factors, xi=1.0, sweeps=50, nonnegative=False)
    before, after = (
        factor_objective(x, labels, covariates, one, model="feature", xi=1.0).total for one in (factors, factors._replace(codes=codes))
    )
    assert after < before
    columns = torch.tensor([[0, 1], [2, 3], [4, 5]])
    part = update_codes_supervised(x, labels, covariates, factors, xi=1.0, columns=columns)
    changed = part != factors.codes
    assert all(set(changed[k].nonzero()[:, 0].tolist()) == set(columns[k].tolist()) for k in range(3))


@pytest.mark.parametrize("model", BOTH)
@pytest.mark.parametrize("nonnegative", [True, False])
def test_block_descent_lowers_the_objective_and_keeps_its_constraints(model, nonnegative):
    x, labels, covariates, factors = problem()
    x = x.abs()
    first = float(factor_objective(x, labels, covariates, factors, model=model, xi=1.0).total)
    for iteration in range(60):
        radius = search_radius(iteration, 1e3)
        factors = bcd_step(x, labels, covariates, factors, model=model, xi=1.0, radius=radius, nonnegative=nonnegative)
        torch.testing.assert_close(factors.dictionary.norm(), torch.ones(()).double())
    assert float(factor_objective(x, labels, covariates, factors, model=model, xi=1.0).total) < first
    assert (min(factors.dictionary.min(), factors.codes.min()) >= 0) == nonnegative or not nonnegative
    features = factors.dictionary.T @ x if model == "filter" else None
    if features is not None:  # so the authors' refit behind the loop changes nothing
        torch.testing.assert_close(fit_regression(features, covariates, labels), factors.coefficients)


def test_an_iteration_of_block_descent_may_end_with_a_dictionary_of_zeros():
    x, labels, covariates, factors = problem()
    found = bcd_step(-100 * x.abs(), labels, covariates, factors._replace(coefficients=factors.coefficients * 0), model="filter", xi=100.0)
    assert all(part.isfinite().all() for part in found)


def test_the_radius_falls_and_may_be_left_out():
    assert search_radius(0, 2.0, 0.5) == pytest.approx(2 / math.log(2))
    assert search_radius(3, 2.0, 0.5) == pytest.approx(2 * 4**-0.5 / math.log(5))
    assert search_radius(3, None) is None


def test_the_regression_is_scikit_learns():
    features, covariates = draws(3, 40), draws(2, 40, seed=1)
    labels = (draws(1, 40, seed=2) + features[:1] > 0).double()
    wanted = LogisticRegression().fit(torch.cat([features, covariates]).T.numpy(), labels[0].numpy())
    found = fit_regression(features, covariates, labels)
    np.testing.assert_allclose(found.numpy(), np.hstack([wanted.intercept_[:, None], wanted.coef_]))
    with pytest.raises(ValueError, match=r"all 40 labels are \[1.0\]: a regression needs"):
        fit_regression(features, covariates, torch.ones_like(labels))


@pytest.mark.parametrize("seed", range(4))
def test_the_threshold_is_that_of_the_roc_curve(seed):
    """Ties in the probabilities and between thresholds."""
    probability = (draws(60, seed=seed) * 3).round().sigmoid()
    labels = (draws(60, seed=seed + 10) + probability > 0.3).long()
    false, true, thresholds = roc_curve(labels.numpy(), probability.numpy())
    assert float(best_threshold(labels, probability)) == thresholds[np.argmax(true - false)]
    assert float(best_threshold(torch.tensor([0, 1]), torch.tensor([0.9, 0.1]))) == math.inf


def test_codes_of_new_columns_are_the_best_ones():
    dictionary, x = draws(8, 3).abs(), draws(8, 5, seed=1)
    from scipy.optimize import nnls

    wanted = np.stack([nnls(dictionary.numpy(), column)[0] for column in x.T.numpy()], axis=1)
    np.testing.assert_allclose(code_columns(x, dictionary, nonnegative=True).numpy(), wanted, atol=1e-7)
    free = code_columns(x, dictionary, nonnegative=False)
    torch.testing.assert_close(free, torch.linalg.lstsq(dictionary, x).solution)
    sparse = code_columns(x, dictionary, nonnegative=False, l1=0.5)
    slack = dictionary.T @ (x - dictionary @ sparse)  # the lasso's optimality: +-l1 where a code isn't 0, below it elsewhere
    torch.testing.assert_close(slack[sparse != 0], 0.5 * sparse[sparse != 0].sign(), rtol=1e-5, atol=1e-6)
    assert slack.abs().max() <= 0.5 + 1e-6
    with_zeros = torch.cat([dictionary, torch.zeros(8, 1).double()], dim=1)
    assert not code_columns(x, with_zeros, nonnegative=True)[3].any()


def test_the_exhaustive_codes_are_no_worse_than_the_others():
    x, _, covariates, factors = problem(n=30)
    factors = factors._replace(codes=code_columns(x, factors.dictionary, nonnegative=False))

    def losses(codes):
        scores = factors.coefficients @ torch.cat([torch.ones(1, 30).double(), codes, covariates])
        fit = (x - factors.dictionary @ codes).square().sum(0)
        return torch.minimum(*(torch.nn.functional.softplus(sign * scores[0]) for sign in (1, -1))) + fit

    exhaustive = losses(exhaustive_codes(x, covariates, factors, xi=1.0, nonnegative=False, sweeps=2000))
    for other in (factors.codes, alternating_codes(x, covariates, factors, xi=1.0, nonnegative=False)):
        assert (exhaustive <= losses(other) + 1e-3).all()
    kinds = {
        kind: predict_probability(x, covariates, factors, model="feature", prediction=kind)
        for kind in ("naive", "alternating", "exhaustive")
    }
    assert not torch.equal(kinds["naive"], kinds["exhaustive"])
    assert all(one.min() >= 0 and one.max() <= 1 for one in kinds.values())


def test_half_precision_autocast_changes_nothing():
    x, labels, covariates, factors = problem(dtype=torch.float32)
    step = {"model": "filter", "rank": 2, "step_size": 0.01, "xi": 0.5}
    plain = lpgd_step(x, labels, covariates, lift_factors(factors, "filter"), **step)
    with torch.autocast("cpu", torch.bfloat16):
        inside = lpgd_step(x, labels, covariates, lift_factors(factors, "filter"), **step)
    torch.testing.assert_close(inside.product, plain.product, rtol=1e-5, atol=1e-6)


def test_a_start_at_the_svd_reconstructs_best():
    x = draws(6, 9)
    found = svd_factors(x, 2, 3)
    torch.testing.assert_close(found.dictionary @ found.codes, best_low_rank(x, 3).matrix())
    assert not found.coefficients.any()


# ---- the module ------------------------------------------------------------------------------------------------------------------------


def small(seed=0, **arguments):
    return PlantedDirectionsDataModule(num_rows=40, num_features=6, directions=2, steps_per_epoch=4, seed=seed, **arguments)


def fit(module, data, steps=6, callbacks=(), **options):
    trainer = tiny_trainer(max_steps=steps, max_epochs=-1, callbacks=list(callbacks), **options)
    trainer.fit(module, datamodule=data, ckpt_path=options.get("ckpt_path"))
    return trainer


@pytest.mark.parametrize("options", [{"oversampling": 2}, {"solver": "bcd", "model": "feature"}, {"solver": "bcd", "radius": 0.5}], ids=str)
def test_a_killed_run_ends_bit_equal(options, tmp_path):
    """With what is drawn anew at each step: the sketch, the columns."""

    def train(steps, ckpt_path=None, callbacks=()):
        module = SupervisedMatrixFactorization(rank=2, step_size=4e-3, **options)
        trainer = tiny_trainer(max_steps=steps, max_epochs=-1, callbacks=list(callbacks))
        trainer.fit(module, datamodule=small(num_covariates=1), ckpt_path=ckpt_path)
        return cloned_state(module)

    whole = train(7, callbacks=[SaveAt(3, tmp_path / "half.ckpt")])
    assert_state_dicts_equal(train(7, tmp_path / "half.ckpt"), whole)
    other = SupervisedMatrixFactorization(rank=2, step_size=4e-3, seed=1, **options)
    fit(other, small(num_covariates=1), 7)
    assert any(not torch.equal(value, whole[name]) for name, value in other.state_dict().items())


def two_process_fit(processes):
    module = SupervisedMatrixFactorization(rank=2, step_size=4e-3)
    ranks = {"devices": processes, "strategy": "ddp"} if processes > 1 else {}
    trainer = tiny_trainer(max_steps=6, max_epochs=-1, limit_val_batches=1.0, **ranks)
    trainer.fit(module, datamodule=small())
    figures = {name: float(value) for name, value in trainer.callback_metrics.items() if "val_" in name}
    return cloned_state(module), figures


def test_two_processes_end_like_one():
    state, figures = two_process_fit(1)
    for theirs, seen in run_two_processes(two_process_fit, 2):
        assert_state_dicts_equal(theirs, state)
        assert seen == pytest.approx(figures)  # the rows were dealt out


def test_a_second_fit_goes_on_and_other_data_are_refused():
    module = SupervisedMatrixFactorization(rank=2, step_size=4e-3)
    fit(module, small(), 4)
    once = cloned_state(module)
    fit(module, small(), 4)
    whole = SupervisedMatrixFactorization(rank=2, step_size=4e-3)
    fit(whole, small(), 8)
    assert_state_dicts_equal(module.state_dict(), whole.state_dict())
    assert not torch.equal(once["product"], whole.state_dict()["product"])
    with pytest.raises(ValueError, match=r"was made for \(rows, features, covariates\) = \(27, 6, 0\), and these data have \(27, 6, 3\)"):
        fit(module, small(num_covariates=3), 1)


def test_covariates_are_seen_by_the_regression_and_not_by_the_dictionary():
    """Labels that follow from a covariate alone."""
    data = PlantedDirectionsDataModule(num_rows=200, num_features=6, directions=2, slope=0.0, num_covariates=1, steps_per_epoch=50, seed=1)
    data.setup("fit")
    batch = data.train_set[0]
    batch["label"] = (batch["covariates"][:, 0] > 0).long()
    held = data.val_set._batch
    held["label"] = (held["covariates"][:, 0] > 0).long()
    data.train_set._batch = batch
    for options in ({"solver": "bcd"}, {"step_size": 5e-3, "nu": 0.0, "solver": "lpgd"}):
        module = SupervisedMatrixFactorization(rank=2, xi=0.1, stop_on_rise=None, **options)
        trainer = fit(module, data, 150, limit_val_batches=1.0)
        assert trainer.callback_metrics["factorization/val_accuracy"] > 0.9
    assert module.factors().dictionary.shape == (6, 2)


@pytest.mark.parametrize("options", [{}, {"model": "feature"}, {"solver": "bcd"}], ids=str)
def test_a_checkpoint_predicts_without_its_training_rows(options, tmp_path):
    module, data = SupervisedMatrixFactorization(rank=2, step_size=4e-3, **options), small()
    fit(module, data, 6, callbacks=[SaveAt(6, tmp_path / "end.ckpt")])
    again = SupervisedMatrixFactorization.load_from_checkpoint(tmp_path / "end.ckpt")
    assert_state_dicts_equal(again.state_dict(), module.state_dict())
    other = PlantedDirectionsDataModule(num_rows=90, num_features=6, directions=2, steps_per_epoch=4)
    fresh = SupervisedMatrixFactorization(rank=2, step_size=4e-3, **options)
    (found,) = tiny_trainer().predict(fresh, datamodule=other, ckpt_path=tmp_path / "end.ckpt")
    assert found["probability"].shape == found["predicted"].shape == found["label"].shape == (30,)
    assert found["codes"].shape == (30, 2)
    batch = next(iter(other.predict_dataloader()))
    x, _, covariates = module.columns(batch)
    torch.testing.assert_close(found["probability"], module.probability(x, covariates))
    with pytest.raises(ValueError, match=r"the checkpoint's \w+ is .* and these data need"):
        tiny_trainer(max_steps=8).fit(
            SupervisedMatrixFactorization(rank=2, step_size=4e-3, **options), datamodule=other, ckpt_path=tmp_path / "end.ckpt"
        )


def test_evaluation_takes_any_batches():
    module, data = SupervisedMatrixFactorization(rank=2, step_size=4e-3), small()
    fit(module, data, 6)
    whole = tiny_trainer().test(module, datamodule=data, verbose=False)
    parts = tiny_trainer().test(module, dataloaders=DataLoader(data.test_set, batch_size=4), verbose=False)
    assert whole[0] == pytest.approx(parts[0])


def test_rows_of_one_class_have_no_auc():
    module, data = SupervisedMatrixFactorization(rank=2, step_size=4e-3), small()
    fit(module, data, 2)
    rows = [row for row in (data.test_set[k] for k in range(len(data.test_set))) if row["label"] == 1]
    (found,) = tiny_trainer().test(module, dataloaders=DataLoader(rows, batch_size=2), verbose=False)
    assert "factorization/test_auc" not in found
    assert 0 <= found["factorization/test_accuracy"] <= 1


class Plain(pl.LightningDataModule):
    """A loader that knows nothing of sizes."""

    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def train_dataloader(self):
        return DataLoader(self.batches, batch_size=None)


def plain(**changes):
    batch = {"features": draws(10, 4), "label": torch.tensor([0, 1] * 5)}
    return Plain([batch | changes] * 3)


def test_a_plain_loader_works_with_the_sizes_said():
    module = SupervisedMatrixFactorization(rank=2)
    module.set_shape(10, 4)
    fit(module, plain(), 2)
    with pytest.raises(RuntimeError, match="doesn't know the size of the matrix"):
        fit(SupervisedMatrixFactorization(rank=2), plain(), 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"features": draws(6, 4), "label": torch.tensor([0, 1] * 3)},
            r"batch has .* = \(6, 4, 0\) and the matrix \(10, 4, 0\)",
        ),
        ({"label": torch.arange(10)}, r"labels are \[0.0, 1.0, 2.0"),
        ({"label": torch.ones(10)}, r"labels are \[1.0\]: give rows of both classes"),
        ({"features": draws(10, 4) * math.nan}, "features or covariates hold a NaN"),
    ],
)
def test_batches_that_cant_be_fitted_are_refused(changes, message):
    module = SupervisedMatrixFactorization(rank=2)
    module.set_shape(10, 4)
    with pytest.raises(ValueError, match=message):
        fit(module, plain(**changes), 2)


@pytest.mark.parametrize(
    "arguments",
    [
        {"model": "both"},
        {"solver": "sgd"},
        {"rank": 0},
        {"xi": 0.0},
        {"step_size": -1.0},
        {"nu": -1.0},
        {"column_share": 0.0},
        {"radius": 0.0},
        {"prediction": "best"},
        {"oversampling": -1},
        {"seed": -1},
        {"stop_on_rise": 0.0},
    ],
    ids=str,
)
def test_arguments_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match=f"{next(iter(arguments))} is"):
        SupervisedMatrixFactorization(**arguments)


def test_a_step_that_must_diverge_is_refused_and_one_that_does_ends_the_run():
    with pytest.raises(ValueError, match=r"diverges from a step of 1 / xi = 0\.2 on"):
        SupervisedMatrixFactorization(xi=5.0, step_size=0.5)
    SupervisedMatrixFactorization(solver="bcd", xi=5.0, step_size=0.5)  # has no such step
    module = SupervisedMatrixFactorization(rank=2, xi=1e-3, step_size=100.0, nu=1.0, stop_on_rise=None)
    with pytest.raises(ValueError, match=r"the objective is (inf|nan) after \d+ iterations: lower step_size"):
        fit(module, small(), 3000)


def test_a_rise_of_the_objective_ends_the_training():
    module = SupervisedMatrixFactorization(rank=2, xi=0.04, nu=0.2, step_size=20.0)
    assert fit(module, small(), 200).global_step == 20
    module = SupervisedMatrixFactorization(rank=2, step_size=4e-3)
    assert fit(module, small(), 100).global_step == 100


@pytest.mark.parametrize("precision", ["16-true", "bf16-true"])
def test_half_precision_is_refused(precision):
    trainer = tiny_trainer(precision=precision)
    with pytest.raises(ValueError, match=f"precision is '{precision}': iterations are in float64"):
        trainer.fit(SupervisedMatrixFactorization(rank=2), datamodule=small())


def test_bf16_autocast_changes_no_bit():
    states = []
    for precision in ("32-true", "bf16-mixed"):
        module = SupervisedMatrixFactorization(rank=2, step_size=4e-3)
        fit(module, small(), 5, precision=precision)
        states.append(module.state_dict())
    assert_state_dicts_equal(*states)


def test_accumulation_is_refused_by_lightning():
    with pytest.raises(Exception, match="accumulation is not supported for manual optimization"):
        fit(SupervisedMatrixFactorization(rank=2), small(), 1, accumulate_grad_batches=2)


def test_atoms_are_drawn_and_listed():
    module = SupervisedMatrixFactorization(rank=3, step_size=1e-3)
    fit(module, SemiSyntheticDigitsDataModule(num_rows=40, steps_per_epoch=2), 2, limit_val_batches=1.0)
    media = module.dashboard_media()
    assert media["factorization/atoms_picture"].pixels.shape == (78, 3 * 78, 3)
    table = media["factorization/atoms"]
    assert len(table.rows) == 3
    assert table.rows[0][3].split(", ")[0] == str(int(module.factors().dictionary[:, 0].abs().argmax()))
    pixels = atom_picture(np.array([[1.0, 0, 0, -2]]), np.array([1.0]), (2, 2), side=2)
    assert [pixels[y, x].tolist() for y, x in ((4, 4), (7, 7), (7, 8), (8, 8))] == [
        [255, 0, 0],
        [255, 128, 128],
        [255, 255, 255],
        [0, 0, 255],
    ]


# ---- baselines -------------------------------------------------------------------------------------------------------------------------


def test_the_baselines_are_scikit_learns():
    from sklearn.decomposition import NMF

    data = TwoClassDataModule("digits", (3, 8), steps_per_epoch=2)
    data.setup("fit")
    train, held = data.train_set[0], next(iter(data.val_dataloader()))
    found = {}
    for kind in ("none", "nmf", "svd"):
        module = TwoStageClassifier(kind, rank=2, max_iter=300)
        trainer = fit(module, data, 2, limit_val_batches=1.0)
        x, _, covariates = module.columns(held)
        found[kind] = module.probability(x, covariates)
        assert ("factorization/val_relative_error" in trainer.callback_metrics) == (kind != "none")
    wanted = LogisticRegression().fit(train["features"], train["label"]).predict_proba(held["features"])[:, 1]
    np.testing.assert_allclose(found["none"], wanted, rtol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        atoms = NMF(2, init="nndsvda", max_iter=300, random_state=0).fit(train["features"].numpy()).components_
    atoms = atoms / np.linalg.norm(atoms)
    wanted = LogisticRegression().fit(train["features"] @ atoms.T, train["label"]).predict_proba(held["features"] @ atoms.T)[:, 1]
    np.testing.assert_allclose(found["nmf"], wanted, rtol=1e-6)
    with pytest.raises(ValueError, match="negative values, which an NMF can't reconstruct"):
        fit(TwoStageClassifier("nmf"), small(), 1)


# ---- the claim's mechanism -------------------------------------------------------------------------------------------------------------


def test_a_small_xi_finds_the_direction_that_a_large_one_leaves_out():
    found = {}
    for xi in (0.1, 1.0):
        module, data = SupervisedMatrixFactorization(rank=3, xi=xi, step_size=4e-3), PlantedDirectionsDataModule(seed=20)
        trainer = fit(module, data, 250, limit_val_batches=1.0, check_val_every_n_epoch=10)
        found[xi] = {name.rpartition("_")[2]: float(value) for name, value in trainer.callback_metrics.items() if "val_" in name}
    assert found[0.1]["auc"] > 0.85 > 0.65 > found[1.0]["auc"]
    assert found[0.1]["error"] > 0.3 > 0.1 > found[1.0]["error"]


# ---- the estimator ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "solver"),
    [
        ("filter", "lpgd"),
        pytest.param("feature", "lpgd", marks=pytest.mark.thorough),
        pytest.param("filter", "bcd", marks=pytest.mark.thorough),
        pytest.param("feature", "bcd", marks=pytest.mark.thorough),
    ],
)
def test_scikit_learns_own_checks_pass(model, solver):
    estimator = SupervisedDictionaryClassifier(model, solver, max_iter=100 if solver == "lpgd" else 40)
    results = check_estimator(estimator, on_skip=None, on_fail=None)
    assert len(results) > 40
    assert not [(result["check_name"], str(result["exception"])) for result in results if result["status"] == "failed"]


def tumours():
    from sklearn.datasets import load_breast_cancer

    x, y = load_breast_cancer(return_X_y=True)
    return x, np.array(["malignant", "benign"])[y]


def test_the_estimator_is_the_module():
    """The same data, start and steps."""
    data = small(num_covariates=2)
    data.setup("fit")
    batch = {name: value.numpy() for name, value in data.train_set[0].items()}
    for options in ({"solver": "lpgd"}, {"solver": "bcd", "radius": 5.0}):
        estimator = SupervisedDictionaryClassifier(rank=2, step_size=4e-3, init="random", max_iter=12, tol=0, random_state=0, **options)
        estimator.fit(batch["features"], batch["label"], covariates=batch["covariates"])
        module = SupervisedMatrixFactorization(rank=2, step_size=4e-3, stop_on_rise=None, **options)
        module.set_shape(*data.matrix_shape)
        seed = int(np.random.RandomState(0).randint(np.iinfo(np.int32).max))
        start = random_factors(6, 27, 2, 2, torch.Generator().manual_seed(seed))
        state = start._asdict() if options["solver"] == "bcd" else lift_factors(start, "filter")._asdict()
        module.load_state_dict(module.state_dict() | state)
        fit(module, data, 12)
        factors = module.factors()
        np.testing.assert_allclose(estimator.components_.T @ estimator.codes_.T, factors.dictionary @ factors.codes, rtol=1e-9)
        x, labels, covariates = module.columns(data.train_set[0])
        found = estimator.predict_proba(batch["features"], batch["covariates"])[:, 1]
        np.testing.assert_allclose(found, module.probability(x, covariates), rtol=1e-9)
        assert estimator.objective_ == pytest.approx(float(module.objective(x, labels, covariates).total))
        assert estimator.threshold_ == pytest.approx(float(module.threshold))


def test_the_estimator_classifies_real_data_in_a_pipeline():
    x, y = tumours()
    pipeline = make_pipeline(MinMaxScaler(), SupervisedDictionaryClassifier(rank=2)).fit(x[::2], y[::2])
    assert pipeline.score(x[1::2], y[1::2]) > 0.9
    assert pipeline.transform(x).shape == (569, 2)
    assert set(pipeline.predict(x)) == {"benign", "malignant"}


def test_covariates_travel_by_metadata_routing():
    rng = np.random.default_rng(0)
    x, extra = rng.normal(size=(120, 5)), rng.normal(size=(120, 1))
    y = (extra[:, 0] > 0).astype(int)
    plain_estimator = SupervisedDictionaryClassifier(rank=1, nu=0.0)
    assert plain_estimator.fit(x, y).score(x, y) < 0.75
    assert clone(plain_estimator).fit(x, y, covariates=extra).score(x, y, covariates=extra) > 0.95
    set_config(enable_metadata_routing=True)
    try:
        routed = SupervisedDictionaryClassifier(rank=1, nu=0.0).set_fit_request(covariates=True).set_score_request(covariates=True)
        search = GridSearchCV(routed, {"xi": [0.1, 1.0]}, cv=3).fit(x, y, covariates=extra)
        assert search.best_score_ > 0.9
    finally:
        set_config(enable_metadata_routing=False)
    fitted = clone(plain_estimator).fit(x, y, covariates=extra)
    for wrong, message in ((None, "fitted with 1 covariates"), (extra[:5], "5 rows and X has 120"), (np.hstack([extra] * 2), "2 columns")):
        with pytest.raises(ValueError, match=message):
            fitted.predict(x, wrong)


@pytest.mark.parametrize("arguments", [{"model": "both"}, {"rank": 0}, {"xi": 0}, {"tol": -1}, {"init": "zeros"}, {"max_iter": 0}], ids=str)
def test_the_estimator_refuses_arguments_in_fit(arguments):
    x, y = tumours()
    with pytest.raises(ValueError, match=f"{next(iter(arguments))} is"):
        SupervisedDictionaryClassifier(**arguments).fit(x, y)


def test_the_estimator_says_that_a_step_diverges():
    x, y = tumours()
    with pytest.raises(ValueError, match=r"the objective is (inf|nan) after \d+ iterations"):
        SupervisedDictionaryClassifier(step_size=1e3, max_iter=5000, tol=0).fit(x, y)


def test_the_ways_to_predict_and_the_last_iterations():
    x, y = tumours()
    x = x / x.max(0)
    for kind in ("naive", "alternating", "exhaustive"):
        found = SupervisedDictionaryClassifier("feature", "bcd", prediction=kind, max_iter=4, random_state=0).fit(x[:60], y[:60])
        assert found.predict_proba(x[100:120]).sum(1) == pytest.approx(np.ones(20))
    found = SupervisedDictionaryClassifier(max_iter=7, tol=0).fit(x, y)
    assert found.n_iter_ == 7
    assert SupervisedDictionaryClassifier(max_iter=4000, tol=1e-3).fit(x, y).n_iter_ < 4000


@pytest.mark.thorough
def test_two_random_starts_end_near_each_other_but_not_at_the_same_objective():
    """The page's figures of the claim that the start doesn't matter: after 250 iterations, data of seeds 0 to 2, starts 0 and 1."""
    gaps = []
    for rank in (3, 4):
        for seed in range(3):
            data, ends = PlantedDirectionsDataModule(seed=seed, steps_per_epoch=250), []
            for start in (0, 1):
                module = SupervisedMatrixFactorization(rank=rank, xi=0.1, step_size=4e-3, seed=start)
                fit(module, data, 250)
                ends.append(float(module.objective(*module.columns(data.train_set[0])).total))
            gaps.append(abs(ends[0] / ends[1] - 1))
    assert sum(gap < 0.03 for gap in gaps) == 5
    assert max(gaps) < 0.05
