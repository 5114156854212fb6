"""TCM and OPIS against a third party's code and independent scripts; see tests/golden/data/tcm/README.md for the origin of each kind."""

import torch
from torch import Tensor

from golden import GoldenCase, Kind, golden_test
from lit_methods.callbacks.metric_learning import tcm
from lit_methods.tasks.metric_learning import opis as measure


def loss(case: GoldenCase) -> dict[str, Tensor]:
    embeddings = case.tensor("in_embeddings").requires_grad_()
    names = {"margin_pos": "margin_pos", "margin_neg": "margin_neg", "weight_pos": "lambda_pos", "weight_neg": "lambda_neg"}
    found = tcm.tcm_loss(embeddings, case.tensor("in_labels"), **{ours: case.hp(theirs) for ours, theirs in names.items()})
    (grad,) = torch.autograd.grad(found.loss, embeddings)
    counts = {"out_num_hard_pos": found.hard_positives, "out_num_hard_neg": found.hard_negatives}
    return {"out_loss": found.loss, "out_grad_embeddings": grad} | counts


def calibration_range(case: GoldenCase) -> dict[str, float]:
    data = case.tensor("in_embeddings"), case.tensor("in_labels")
    d_min, d_max, pairs = measure.calibration_range(*data, case.hp("far_min"), case.hp("far_max"))
    return {"out_d_min": d_min, "out_d_max": d_max, "out_num_negative_pairs": pairs}


def opis(case: GoldenCase) -> dict[str, Tensor]:
    data = case.tensor("in_embeddings"), case.tensor("in_labels")
    found = measure.opis(*data, *(case.hp(name) for name in ("d_min", "d_max", "num_thresholds", "epsilon")))
    names = ("utility", "sensitivity", "specificity", "mean_utility", "opis", "eps_opis", "class_mean_utility")
    return {f"out_{name}": getattr(found, name) for name in names}


test_golden = golden_test("tcm", {"loss": Kind(loss), "calibration_range": Kind(calibration_range), "opis": Kind(opis)})
