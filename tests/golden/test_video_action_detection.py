"""Semi-supervised video action detection against the authors' code; tests/golden/data/video_action_detection/README.md has the origin."""

from typing import Any

import torch

from golden import GoldenCase, Kind, golden_test
from lit_methods.video.video_action_detection.core import (
    exp_rampup,
    gradient_mask,
    mask_consistency,
    mask_loss,
    spread_loss,
    variance_masks,
)


def variance(case: GoldenCase) -> dict[str, Any]:
    forward, backward = variance_masks(
        case.tensor("in_output"), case.tensor("in_unflipped_aug_output"), case.hp("n_frames"), bool(case.hp("use_sigmoid"))
    )
    return {"out_mask_forward": forward, "out_mask_backward": backward}


def gradient(case: GoldenCase) -> dict[str, Any]:
    bounds = (case.hp(f"conf_thresh_{side}") for side in ("lower", "upper"))
    return {"out_mask": gradient_mask(case.tensor("in_output"), *(None if bound < 0 else bound for bound in bounds))}


def consistency(case: GoldenCase) -> dict[str, Any]:
    views = [case.tensor(f"in_{name}").requires_grad_() for name in ("output", "aug_output")]
    names = ("ramp", "n_frames", "bv_weight", "gv_weight")
    found = mask_consistency(
        *views, case.hp("mode"), gv_cross_batch=bool(case.hp("gv_cross_batch")), **{name: case.hp(name) for name in names}
    )
    output, aug_output = torch.autograd.grad(found.loss, views)
    return {"out_loss": found.loss, "out_loss_l2": found.l2, "out_grad_output": output, "out_grad_aug_output": aug_output}


def supervised(case: GoldenCase) -> dict[str, Any]:
    scores, output = (case.tensor(f"in_{name}").requires_grad_() for name in ("class_scores", "output"))
    spread = spread_loss(scores, case.tensor("in_class_labels"), case.hp("margin_min"))
    masks = mask_loss(output, case.tensor("in_target_mask"))
    of_scores, of_output = torch.autograd.grad(spread + masks.bce + masks.dice, (scores, output))
    return {
        "out_spread_loss": spread,
        "out_bce_loss": masks.bce,
        "out_dice_loss": masks.dice,
        "out_grad_class_scores": of_scores,
        "out_grad_output": of_output,
    }


def rampup(case: GoldenCase) -> dict[str, Any]:
    length = case.hp("rampup_length")
    return {"out_weight": torch.tensor([exp_rampup(epoch, length) for epoch in case.tensor("in_epochs").tolist()], dtype=torch.float64)}


test_golden = golden_test(
    "video_action_detection",
    {
        "variance_mask": Kind(variance, rtol=1e-5),
        "gradient_mask": Kind(gradient, rtol=1e-5),
        "cons_loss": Kind(consistency, rtol=1e-5, overrides={"out_grad": (1e-5, 1e-7)}),
        "sup_loss": Kind(supervised, rtol=1e-5, overrides={"out_grad": (1e-5, 1e-7)}),
        "rampup": Kind(rampup, rtol=1e-6),
    },
)
