"""CoTAP against the authors' code in a public copy; see tests/golden/data/cotap/README.md for the origin of each kind."""

from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import nn

from golden import GoldenCase, Kind, golden_test
from lit_methods.self_supervised.cotap.core import continuous_ap_loss, image_cross_entropy, object_filter, prototype_entropy, sinkhorn


def cotap_loss(case: GoldenCase) -> dict[str, Any]:
    student = case.tensor("in_student_similarity").requires_grad_()
    names = ("tau", "weight_threshold", "ap_mul", "unmatched_weight")
    found = continuous_ap_loss(
        case.tensor("in_teacher_similarity"), student, case.tensor("in_is_match"), **{name: case.hp(name) for name in names}
    )
    return {
        "out_loss": found.loss,
        "out_pn": found.pn,
        "out_pp": found.pp,
        "out_weight": found.weight,
        "out_grad_student_similarity": torch.autograd.grad(found.loss, student)[0],
    }


def balanced(case: GoldenCase) -> dict[str, Any]:
    return {"out_assignment": sinkhorn(case.tensor("in_scores"), case.hp("temperature"), case.hp("iterations"))}


def filtered(case: GoldenCase) -> dict[str, Any]:
    weights = {key.removeprefix("in_w_").replace("__", "."): case.tensor(key) for key in case.arrays if key.startswith("in_w_")}
    tokens = case.tensor("in_tokens")
    width, norm = tokens.shape[2], partial(nn.LayerNorm, eps=1e-6)
    ratio = len(weights["mlp.fc1.weight"]) / width
    block: Any = Block(width, case.hp("num_heads"), ratio, qkv_bias="attn.qkv.bias" in weights, norm_layer=norm)
    norms = {"norm_in": norm(width), "norm_out_patch": norm(2 * width), "norm_out_cls": norm(2 * width)}
    for name, module in norms.items():
        block.add_module(name, module)
    block.to(tokens.dtype).load_state_dict(weights)
    found, attention = object_filter(tokens, case.tensor("in_prototypes"), block, *norms.values())
    return {"out_tokens": found, "out_prototype_attention": attention}


def image_ce(case: GoldenCase) -> dict[str, Any]:
    student, positive = (case.tensor(f"in_student_scores{end}").requires_grad_() for end in ("", "_positive"))
    teachers = case.tensor("in_teacher_assignment"), case.tensor("in_teacher_assignment_positive")
    loss = image_cross_entropy(*teachers, student, positive, case.hp("temperature"))
    gradients = torch.autograd.grad(loss, (student, positive))
    return {"out_loss": loss, "out_grad_student_scores": gradients[0], "out_grad_student_scores_positive": gradients[1]}


def entropy(case: GoldenCase) -> dict[str, Any]:
    prototypes = case.tensor("in_prototypes").requires_grad_()
    loss = prototype_entropy(prototypes, case.tensor("in_samples"), case.hp("temperature"))
    return {"out_loss": loss, "out_grad_prototypes": torch.autograd.grad(loss, prototypes)[0]}


test_golden = golden_test(
    "cotap",
    {
        "cotap_loss": Kind(cotap_loss, rtol=1e-5, overrides={"out_grad": (1e-5, 1e-7)}),
        "sinkhorn": Kind(balanced, rtol=1e-6),
        "object_filter": Kind(filtered, rtol=1e-6),
        "image_ce": Kind(image_ce, rtol=1e-6),
        "prototype_entropy": Kind(entropy, rtol=1e-6),
    },
)
