"""ISS-P and the metrics of super-resolution against the authors' code; see tests/golden/data/issp/README.md for the origin."""

import torch
from torch import Tensor

from golden import GoldenCase, Kind, golden_test
from lit_methods.callbacks.sparsity.issp import core
from lit_methods.tasks.superres.metrics import psnr_y, ssim_y

METHOD = {"ISS-P": "iss_p", "IHT": "iht"}


def pick_pruned(case: GoldenCase) -> dict[str, Tensor]:
    pruned = core.pick_pruned(case.tensor("in_score"), case.hp("pr"), case.hp("mode"), case.hp("gcd_granularity"))
    return {"out_pruned": pruned, "out_num_pruned": pruned.sum()}


def shrink_steps(case: GoldenCase) -> dict[str, Tensor]:
    ratio = core.shrink_ratio(METHOD[case.hp("method")], case.hp("ratio"))
    steps, weight = [], case.tensor("in_weight")
    for update in case.tensor("in_updates"):
        weight, pruned = core.shrink_step(weight + update, case.hp("pr"), ratio)
        steps.append((weight, pruned))
    weights, masks = zip(*steps, strict=True)
    return {"out_weights": torch.stack(weights), "out_pruned": torch.stack(masks)}


def sr_metric(case: GoldenCase) -> dict[str, Tensor]:
    sr, hr = (case.tensor(key).permute(2, 0, 1)[None] for key in ("in_sr", "in_hr"))
    (psnr,), (ssim,) = (metric(sr, hr, case.hp("crop_border")) for metric in (psnr_y, ssim_y))
    return {"out_psnr_y": psnr, "out_ssim_y": ssim}


test_golden = golden_test(
    "issp",
    {
        "pick_pruned": Kind(pick_pruned),
        "shrink_steps": Kind(shrink_steps, rtol=1e-6),
        "sr_metric": Kind(sr_metric, overrides={"out_psnr_y": (0.0, 1e-4), "out_ssim_y": (0.0, 1e-5)}),
    },
)
