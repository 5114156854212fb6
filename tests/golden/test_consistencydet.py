"""ConsistencyDet against the authors' code; see tests/golden/data/consistencydet/README.md for the origin of each kind."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from golden import GoldenCase, Kind, golden_test
from lit_methods.detection.consistencydet.core import (
    detection_levels,
    detection_scalings,
    noisy_pair,
    renewal_step,
    two_level_loss,
)
from lit_methods.detection.criterion import LossWeights
from lit_methods.detection.matcher import MatchCosts, Targets, dynamic_k_match
from lit_methods.detection.noise import clamp_to_image, clean_boxes, to_pixels


def image_size(case: GoldenCase, images: int = 1) -> Tensor:
    return torch.tensor([[case.hp("image_w"), case.hp("image_h")]], dtype=torch.float64).expand(images, 2)


def levels_of(case: GoldenCase) -> Tensor:
    return detection_levels(*(case.hp(name) for name in ("n_steps", "sigma_min", "sigma_max", "rho")))


def schedule(case: GoldenCase) -> dict[str, Any]:
    levels = levels_of(case)
    scalings = detection_scalings(levels[:-1], case.hp("sigma_min"), case.hp("sigma_data"))
    return {"out_sigmas": levels, "out_c_skip": scalings.skip, "out_c_out": scalings.out, "out_c_in": scalings.inp}


def noising(case: GoldenCase) -> dict[str, Any]:
    truths, drawn, proposals = case.tensor("in_gt_boxes_cxcywh"), case.tensor("in_placeholder_normal"), case.hp("num_proposals")
    padding = F.pad(drawn, (0, 0, proposals - len(drawn), 0))  # the draws stand behind the ground truths
    x0 = clean_boxes(truths[None], torch.ones(1, len(truths), dtype=torch.bool), padding[None])
    index = case.tensor("in_step_index").long().view(1)
    levels = levels_of(case)
    sigmas = levels[index], levels[index + 1]
    noisy = noisy_pair(x0, case.tensor("in_noise")[None], *sigmas)
    settings, size = (case.hp("sigma_min"), case.hp("sigma_data")), image_size(case)
    absolute = [to_pixels(detection_scalings(s, *settings).inp[:, None, None] * x, size) for s, x in zip(sigmas, noisy, strict=True)]
    return {
        "out_x_start": x0[0],
        "out_sigma_hi": sigmas[0],
        "out_sigma_lo": sigmas[1],
        "out_boxes_hi": noisy[0][0],
        "out_boxes_lo": noisy[1][0],
        "out_head_boxes_hi": absolute[0][0],
        "out_head_boxes_lo": absolute[1][0],
        "out_clamped_hi": clamp_to_image(absolute[0], size)[0],
    }


def matcher(case: GoldenCase) -> dict[str, Any]:
    labels, truths = case.tensor("in_gt_labels")[None], case.tensor("in_gt_boxes_xyxy")[None]
    targets = Targets(labels.long(), truths, torch.ones_like(labels, dtype=torch.bool), image_size(case))
    names = ("cost_class", "cost_l1", "cost_giou", "alpha", "gamma", "ota_k", "center_radius")
    costs = MatchCosts(*(case.hp(name) for name in names))
    return {"out_gt_of_query": dynamic_k_match(case.tensor("in_logits")[None], case.tensor("in_boxes_xyxy")[None], targets, costs)[0]}


def loss(case: GoldenCase) -> dict[str, Any]:
    labels, count = case.tensor("in_gt_labels").long(), case.tensor("in_gt_count").long()
    valid = torch.arange(labels.shape[1]) < count[:, None]
    targets = Targets(labels, case.tensor("in_gt_boxes_xyxy"), valid, image_size(case, len(labels)))
    parts = [case.tensor(f"in_{name}").requires_grad_() for name in ("logits_hi", "boxes_hi", "logits_lo", "boxes_lo")]
    factors = tuple(case.hp(f"weight_{name}") for name in ("class", "l1", "giou"))
    costs = MatchCosts(*factors, case.hp("alpha"), case.hp("gamma"), case.hp("ota_k"))
    found = two_level_loss(*parts, targets, LossWeights(*factors), costs)
    grads = torch.autograd.grad(found.total, parts)
    return {
        "out_loss_ce": found.high.label[-1] + found.low.label[-1],
        "out_loss_bbox": found.high.l1[-1] + found.low.l1[-1],
        "out_loss_giou": found.high.giou[-1] + found.low.giou[-1],
        "out_loss_total": found.total,
        "out_grad_logits_hi": grads[0],
        "out_grad_boxes_hi": grads[1],
        "out_grad_logits_lo": grads[2],
        "out_grad_boxes_lo": grads[3],
    }


def renewal(case: GoldenCase) -> dict[str, Any]:
    x, fresh = case.tensor("in_boxes"), case.tensor("in_fresh_normal")
    places = F.pad(fresh, (0, 0, len(x) - len(fresh), 0))  # the draws stand behind what is kept
    inputs = [part[None] for part in (x, case.tensor("in_x_start"), case.tensor("in_logits"), places)]
    sigmas = [torch.tensor(case.hp(name), dtype=x.dtype) for name in ("sigma_cur", "sigma_next")]
    return {"out_boxes_next": renewal_step(*inputs, *sigmas, case.hp("score_threshold")).boxes[0]}


# the reference computes its class loss in float32, whatever the inputs are
NARROW = {name: (1e-6, 1e-9) for name in ("out_loss_ce", "out_loss_total", "out_grad_logits")}

test_golden = golden_test(
    "consistencydet",
    {
        "schedule": Kind(schedule, rtol=1e-9, atol=1e-9),
        "noising": Kind(noising, rtol=1e-9, atol=1e-9),
        "matcher": Kind(matcher, rtol=1e-9, atol=1e-9),
        "loss": Kind(loss, rtol=1e-9, atol=1e-9, overrides=NARROW),
        "renewal": Kind(renewal, rtol=1e-9, atol=1e-9),
    },
)
