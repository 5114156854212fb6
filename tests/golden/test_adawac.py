"""AdaWAC and its baselines against the authors' code; see tests/golden/data/adawac/README.md for the origin of each kind."""

import torch
from torch import Tensor

from golden import GoldenCase, Kind, golden_test
from lit_methods.callbacks.noisy_labels.adawac import core as adawac
from lit_methods.sample_table import SampleTable
from lit_methods.tasks.segmentation.metrics import dice_and_hd95


def weight_update(case: GoldenCase) -> dict[str, Tensor]:
    parts = (case.tensor(f"in_{name}") for name in ("weights", "ce", "consistency"))
    return {"out_weights": adawac.update_sample_weights(*parts, case.hp("lr_w"))}


def loss(case: GoldenCase) -> dict[str, Tensor]:
    logits, latents = ([case.tensor(f"in_{name}{view}").requires_grad_() for view in (1, 2)] for name in ("logits", "latent"))
    labels, index = (case.tensor("in_labels1"), case.tensor("in_labels2")), case.tensor("in_index")
    start = case.tensor("in_weight_table")
    table = SampleTable(*start.shape, dtype=start.dtype)
    table.load_state_dict({"rows": start})
    names = {"rate": "lr_w", "consistency_weight": "consistency_coef", "dice_ratio": "dice_ratio", "trim_quantile": "trim_ratio"}
    found = adawac.adawac_loss(
        tuple(logits),
        labels,
        tuple(latents) if case.hp("use_consistency") else None,
        table.read(index),
        case.hp("mode"),
        entropy=case.hp("entropy_max"),
        **{ours: case.hp(theirs) for ours, theirs in names.items()},
    )
    table.write(index, found.weights)
    grads = torch.autograd.grad(found.loss, [*logits, *latents], allow_unused=True, materialize_grads=True)
    named = ("logits1", "logits2", "latent1", "latent2")
    return {
        "out_loss": found.loss,
        "out_ce": found.ce,
        "out_dice": found.dice,
        "out_consistency": found.consistency,
        "out_weight_table": table.rows,
        "out_effective_batch": found.kept,
    } | {f"out_grad_{name}": grad for name, grad in zip(named, grads, strict=True)}


def metric(case: GoldenCase) -> dict[str, float]:
    dice, distance = dice_and_hd95(case.arrays["in_prediction"], case.arrays["in_target"])
    return {"out_dice": dice, "out_hd95": distance}


test_golden = golden_test(
    "adawac",
    {
        "weight_update": Kind(weight_update, rtol=1e-5, atol=1e-12),
        "loss": Kind(loss, rtol=1e-5, overrides={"out_grad": (1e-5, 1e-7), "out_weight_table": (1e-5, 1e-12)}),
        "metric": Kind(metric, rtol=1e-6),
    },
)
