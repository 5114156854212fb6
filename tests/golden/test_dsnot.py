"""DSnoT and its baselines against the authors' code; see tests/golden/data/dsnot/README.md for the origin of each kind."""

from typing import Any

from golden import GoldenCase, Kind, golden_test
from lit_methods.callbacks.sparsity.dsnot.core import dsnot_nm, dsnot_unstructured
from lit_methods.callbacks.sparsity.input_statistics import InputStatistics
from lit_methods.callbacks.sparsity.one_shot import initial_score, keep_high_scores, magnitude_mask, sparsegpt, wanda_mask

HOW = ("max_cycles", "update_threshold", "variance_power")


def statistics_of(case: GoldenCase, hessian: bool = False) -> InputStatistics:
    samples = case.tensor("in_calibration")
    found = InputStatistics.of(samples.shape[-1], hessian, dtype=samples.dtype)
    for sample in samples:  # one call of the layer each
        found.add(sample)
    return found


def unstructured(case: GoldenCase) -> dict[str, Any]:
    weight, statistics = case.tensor("in_weight"), statistics_of(case)
    score = initial_score(case.hp("initial_method"), weight, statistics)
    first = keep_high_scores(score, case.hp("sparsity"))
    options = {name: case.hp(name) for name in HOW}
    last = dsnot_unstructured(weight, statistics, first, require_same_sign=case.hp("require_same_sign"), **options)
    return {"out_initial_keep_mask": first, "out_keep_mask": last.keep}


def nm(case: GoldenCase) -> dict[str, Any]:
    weight, statistics = case.tensor("in_weight"), statistics_of(case)
    score, pattern = initial_score(case.hp("initial_method"), weight, statistics), (case.hp("n_pruned"), case.hp("m"))
    first = keep_high_scores(score, pattern=pattern)
    last = dsnot_nm(weight, statistics, first, score, pattern, **{name: case.hp(name) for name in HOW})
    return {"out_initial_keep_mask": first, "out_keep_mask": last.keep}


def baselines(case: GoldenCase) -> dict[str, Any]:
    weight, statistics = case.tensor("in_weight"), statistics_of(case, hessian=True)
    how = (case.hp("sparsity"), (case.hp("n_pruned"), case.hp("m")) if case.hp("n_pruned") else None)
    damp, block = case.hp("sparsegpt_damp"), case.hp("sparsegpt_blocksize")
    return {
        "out_wanda_weight": weight * wanda_mask(weight, statistics.square, *how),
        "out_magnitude_weight": weight * magnitude_mask(weight, *how),
        "out_sparsegpt_weight": sparsegpt(weight, statistics.hessian, *how, damp=damp, block=block),
    }


test_golden = golden_test(
    "dsnot",
    {
        "dsnot_unstructured": Kind(unstructured),
        "dsnot_nm": Kind(nm),
        "baseline_prune": Kind(baselines, rtol=0, atol=0, overrides={"out_sparsegpt": (0, 1e-5)}),
    },
)
