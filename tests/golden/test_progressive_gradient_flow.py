"""Progressive gradient flow against the authors' code; see tests/golden/data/progressive_gradient_flow/README.md for the origin."""

import torch
from torch import Tensor

from golden import GoldenCase, Kind, golden_test
from lit_methods.callbacks.sparsity import latent
from lit_methods.callbacks.sparsity.progressive_gradient_flow import core

DIRECTION = {0: "input", 1: "output"}


def mask(case: GoldenCase) -> dict[str, Tensor]:
    weight = case.tensor("in_weight")
    dim = latent.group_dim(weight.ndim, DIRECTION[case.hp("sparse_dim")])
    found = core.sparse_mask(weight, case.hp("n"), case.hp("m"), case.hp("sparsity_rate"), dim)
    return {"out_mask": found.to(weight.dtype)}


def masked_weight(case: GoldenCase) -> dict[str, Tensor]:
    recipe, weight = case.hp("recipe"), case.tensor("in_weight").requires_grad_()
    kept = core.sparse_mask(weight, case.hp("n"), case.hp("m"))
    masked = latent.masked_weight(weight, kept, core.flow_factor(recipe, case.hp("step"), case.hp("decay_coef")))
    (grad,) = torch.autograd.grad(masked, weight, case.tensor("in_grad_masked_weight"))
    if recipe == "srste":
        grad = core.decay_pruned(grad, weight, kept, case.hp("srste_decay"))
    return {"out_masked_weight": masked, "out_grad_weight": grad}


def sdgf_schedule(case: GoldenCase) -> dict[str, Tensor]:
    epochs = (case.hp("total_epochs"), case.hp("dense_epochs"), case.hp("fine_tune_epochs"))
    start, n, m = torch.tensor(core.sdgf_schedule(case.hp("kind"), case.hp("n"), case.hp("m"), *epochs)).T
    return {"out_start_epoch": start, "out_n": n, "out_m": m}


def phase(case: GoldenCase) -> dict[str, Tensor]:
    weight = case.tensor("in_weight")
    epochs = {name: case.hp(name) for name in ("total_epochs", "dense_epochs", "fine_tune_epochs")}
    masked = []
    for epoch, step in zip(case.tensor("in_epoch").tolist(), case.tensor("in_step").tolist(), strict=True):
        now = core.phase_at(epoch, step, case.hp("recipe"), case.hp("n"), case.hp("m"), decay=case.hp("decay_coef"), **epochs)
        masked.append(latent.masked_weight(weight, core.sparse_mask(weight, now.n, now.m), now.beta))
    return {"out_masked_weight": torch.stack(masked)}


test_golden = golden_test(
    "progressive_gradient_flow",
    {
        "mask": Kind(mask),
        "masked_weight": Kind(masked_weight, rtol=1e-6, atol=1e-7),
        "sdgf_schedule": Kind(sdgf_schedule),
        "phase": Kind(phase, rtol=1e-6, atol=1e-7),
    },
)
