"""CAST against its equations; see tests/golden/data/cast/README.md for the origin."""

import torch
from torch import Tensor

from golden import GoldenCase, Kind, golden_test
from lit_methods.callbacks.sparsity.cast import core
from lit_methods.callbacks.sparsity.cast.adams import AdamS
from lit_methods.callbacks.sparsity.masks import nm_mask


def mask(case: GoldenCase) -> dict[str, Tensor]:
    weight = case.tensor("in_weight")
    return {"out_mask": nm_mask(weight, case.hp("n"), case.hp("m")).to(weight.dtype)}


def adams(case: GoldenCase) -> dict[str, Tensor]:
    weight = torch.nn.Parameter(case.tensor("in_weight"))
    optimizer = AdamS(
        [weight],
        betas=(case.hp("beta1"), case.hp("beta2")),
        eps=case.hp("eps"),
        l1_decay=case.hp("l1_decay"),
        total_steps=case.hp("total_steps"),
        sparse=[weight],
    )
    (group,) = optimizer.param_groups
    weights, masks, alphas = [], [], []
    for step, (grad, lr) in enumerate(zip(case.tensor("in_grads"), case.tensor("in_lrs").tolist(), strict=True)):
        if core.is_refresh_step(step, case.hp("mask_interval")):
            optimizer.set_masks({weight: nm_mask(weight, case.hp("n"), case.hp("m"))})
        weight.grad, group["lr"] = grad.clone(), lr
        optimizer.step()
        weights.append(weight.detach().clone())
        masks.append(optimizer.masks[weight].to(weight.dtype))
        alphas.append(group["alpha"])
    state = optimizer.state[weight]
    return {
        "out_weights": torch.stack(weights),
        "out_masks": torch.stack(masks),
        "out_alphas": torch.tensor(alphas, dtype=torch.float64),
        "out_exp_avg": state["exp_avg"],
        "out_exp_avg_sq": state["exp_avg_sq"],
    }


def weight_scaling(case: GoldenCase) -> dict[str, Tensor]:
    weight, scale = case.tensor("in_weight").requires_grad_(), case.tensor("in_scale").requires_grad_()
    scaled = core.scaled_weight(weight, scale)
    y = torch.nn.functional.linear(case.tensor("in_x"), scaled)
    grads = torch.autograd.grad(y, (weight, scale), case.tensor("in_grad_y"))
    final = core.finalized_weight(weight, nm_mask(weight, case.hp("n"), case.hp("m")), scale)
    return {
        "out_scaled_weight": scaled,
        "out_y": y,
        "out_grad_weight": grads[0],
        "out_grad_scale": grads[1],
        "out_finalized_weight": final,
    }


def kd_loss(case: GoldenCase) -> dict[str, Tensor]:
    student = case.tensor("in_student_logits").requires_grad_()
    numbers = case.hp("eta"), case.hp("temperature")
    loss, kl, ce = core.distillation_loss(student, case.tensor("in_teacher_logits"), case.tensor("in_targets"), *numbers)
    return {"out_loss": loss, "out_kl": kl, "out_ce": ce, "out_grad_student_logits": torch.autograd.grad(loss, student)[0]}


def tolerance(dtype: str) -> float:
    """Of the README: 1e-9 in float64, 1e-5 in float32, of the largest entry."""
    return 1e-9 if dtype == "float64" else 1e-5


def close(case: GoldenCase, key: str, ours, reference) -> None:
    assert ours.shape == reference.shape, f"{key}: shape {ours.shape}, reference {reference.shape}"
    if reference.size:
        inputs = [value.dtype for name, value in case.arrays.items() if name.startswith("in_") and value.dtype.kind == "f"]
        narrowest = "float32" if any(dtype == "float32" for dtype in inputs) else "float64"
        error, largest = abs(ours.astype("float64") - reference).max(), abs(reference).max()
        assert error <= 1e-12 + tolerance(narrowest) * largest, f"{key}: largest error {error:.3e} of {largest:.3e}"


test_golden = golden_test(
    "cast",
    {
        "mask": Kind(mask, rtol=0.0, atol=0.0),
        "adams": Kind(adams, compare=close),
        "weight_scaling": Kind(weight_scaling, compare=close),
        "kd_loss": Kind(kd_loss, compare=close),
    },
)
