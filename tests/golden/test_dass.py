"""DASS against the authors' code and its equations; see tests/golden/data/dass/README.md for the origin of each kind."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from golden import GoldenCase, Kind, golden_test
from lit_methods.architecture_search.dass.core import architecture_gradient, derive_cell, mixed_operation
from lit_methods.callbacks.sparsity.score_masks import scaled_scores, score_mask, scored_weight


def sparse_layer(case: GoldenCase) -> dict[str, Any]:
    x, weight, scores = (case.tensor(f"in_{name}").requires_grad_() for name in ("x", "weight", "scores"))
    mask = score_mask(scores, case.hp("keep"))
    seen = scored_weight(weight, scores, mask)
    if case.hp("type") == "conv":
        geometry = {name: int(case.hp(name)) for name in ("stride", "padding", "dilation", "groups")}
        y = F.conv2d(x, seen, **geometry)
    else:
        y = F.linear(x, seen, case.tensor("in_bias"))
    grads = torch.autograd.grad(y, (x, weight, scores), case.tensor("in_cotangent"))
    return {"out_mask": mask, "out_y": y.detach(), **dict(zip(("out_grad_x", "out_grad_weight", "out_grad_scores"), grads, strict=True))}


def score_init(case: GoldenCase) -> dict[str, Any]:
    return {"out_scores": scaled_scores(case.tensor("in_weight"))}


def genotype(case: GoldenCase) -> dict[str, Any]:
    nodes, none = int(case.hp("steps")), int(case.hp("none_index"))
    cells = {f"out_{kind}_op_and_input": derive_cell(case.tensor(f"in_alpha_{kind}"), nodes, none) for kind in ("normal", "reduce")}
    return cells | {"out_concat": torch.arange(2, 2 + nodes)}


def arch_gradient(case: GoldenCase) -> dict[str, Any]:
    scores = case.tensor("in_scores")
    masks = torch.stack([score_mask(layer, case.hp("keep")) for layer in scores])

    def loss_of(part: str) -> Any:
        x, y = case.tensor(f"in_x_{part}"), case.tensor(f"in_y_{part}")

        def loss(alphas: dict[str, Tensor], weights: dict[str, Tensor]) -> Tensor:
            seen = scored_weight(weights["weights"], scores, masks)
            return F.cross_entropy(mixed_operation(alphas["alpha"].softmax(-1), [x @ weight.T for weight in seen]), y)

        return loss

    found = {
        name: architecture_gradient(
            loss_of("train"),
            loss_of("val"),
            {"alpha": case.tensor("in_alpha")},
            {"weights": case.tensor("in_weights")},
            rate=case.hp("eta"),
            weight_decay=case.hp("weight_decay"),
            radius=case.hp("fd_r"),
            order=order,
        ).gradient["alpha"]
        for name, order in (("first_order", "first"), ("unrolled", "second"), ("unrolled_exact", "exact"))
    }
    return {"out_masks": masks, **{f"out_grad_alpha_{name}": value for name, value in found.items()}}


test_golden = golden_test(
    "dass",
    {
        "sparse_layer": Kind(sparse_layer, rtol=1e-9, atol=1e-12),
        "score_init": Kind(score_init, rtol=1e-12, atol=1e-12),
        "genotype": Kind(genotype),
        "arch_gradient": Kind(arch_gradient, rtol=1e-8, atol=1e-10),
    },
)
