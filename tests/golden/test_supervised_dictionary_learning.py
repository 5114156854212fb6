"""Supervised dictionary learning against the authors' code; the README beside the vectors tells their origin."""

from typing import Any

import torch

from golden import GoldenCase, Kind, golden_test
from lit_methods.matrix_factorization.regression import best_threshold
from lit_methods.matrix_factorization.supervised_dictionary_learning.core import (
    Factors,
    Lifted,
    bcd_step,
    lpgd_objective,
    lpgd_step,
    predict_probability,
    recover_factors,
    search_radius,
    update_codes,
    update_codes_supervised,
    update_dictionary,
)


def lpgd(case: GoldenCase) -> dict[str, Any]:
    model, rank = "feature" if case.hp("is_feature_based") else "filter", case.hp("rank")
    weights = {"model": model, "xi": case.hp("xi"), "nu": case.hp("nu")}
    data = tuple(case.tensor(f"in_{name}") for name in ("X", "Y", "aux"))
    state = Lifted(*(case.tensor(f"in_{name}0") for name in ("A", "B", "Gamma")))
    states, objectives = [], []
    for _ in range(case.hp("steps")):
        state = lpgd_step(*data, state, rank=rank, step_size=case.hp("tau"), **weights)
        states.append(state)
        objectives.append(lpgd_objective(*data, state, **weights).total)
    found = recover_factors(state.product, state.score, state.gamma, model=model, rank=rank)
    beta = found.coefficients[:, 1 : 1 + rank]
    first = states[0]
    return {
        "out_A_after_1": first.score,
        "out_B_after_1": first.product,
        "out_Gamma_after_1": first.gamma,
        "out_A": state.score,
        "out_B": state.product,
        "out_Gamma": state.gamma,
        "out_objective_per_step": torch.stack(objectives),
        "out_W_times_H": found.dictionary @ found.codes,
        "out_W_frobenius": found.dictionary.norm(),
        "out_W_WT": found.dictionary @ found.dictionary.T,
        "out_score_vector": found.dictionary @ beta.T if model == "filter" else beta @ found.codes,
    }


def bcd_block(case: GoldenCase) -> dict[str, Any]:
    x, labels, covariates = (case.tensor(f"in_{name}") for name in ("X", "Y", "aux"))
    factors = Factors(*(case.tensor(f"in_{name}") for name in ("W", "H", "beta")))
    options = {"l1": case.hp("l1"), "l2": case.hp("l2"), "nonnegative": bool(case.hp("nonnegative"))}
    code, dictionary = {"sweeps": case.hp("code_sub_iter")}, {"inner_steps": case.hp("dict_sub_iter")}
    return {
        "out_code_unsupervised": update_codes(x, factors.dictionary, factors.codes, radius=case.hp("radius"), **options),
        "out_dict_filter": update_dictionary(x, labels, covariates, factors, xi=case.hp("xi"), **dictionary, **options),
        "out_code_feature": update_codes_supervised(x, labels, covariates, factors, xi=case.hp("xi"), **code, **options),
    }


def bcd_filter_fit(case: GoldenCase) -> dict[str, Any]:
    x, labels, covariates = (case.tensor(f"in_{name}_train") for name in ("X", "Y", "aux"))
    factors = Factors(*(case.tensor(f"in_{name}0") for name in ("W", "H", "regression_coefficients")))
    for iteration in range(case.hp("iterations")):
        radius = search_radius(iteration, case.hp("search_radius_const"), case.hp("beta"))
        factors = bcd_step(x, labels, covariates, factors, model="filter", xi=case.hp("xi"), radius=radius)
    training = predict_probability(x, covariates, factors, model="filter")
    return {
        "out_W": factors.dictionary,
        "out_H": factors.codes,
        "out_regression_coefficients": factors.coefficients,
        "out_test_probability": predict_probability(case.tensor("in_X_test"), case.tensor("in_aux_test"), factors, model="filter"),
        "out_threshold": best_threshold(labels[0], training),
    }


test_golden = golden_test(
    "supervised_dictionary_learning",
    {
        "lpgd": Kind(lpgd, rtol=1e-6),
        "bcd_block": Kind(bcd_block, rtol=1e-8),
        "bcd_filter_fit": Kind(bcd_filter_fit, rtol=1e-3, overrides={"out_W": (1e-6, 1e-9), "out_H": (1e-6, 1e-9)}),
    },
)
