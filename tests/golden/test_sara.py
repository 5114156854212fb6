"""SaRA against the authors' code; see tests/golden/data/sara/README.md for the origin."""

import torch
from torch import Tensor

from golden import GoldenCase, Kind, golden_test
from lit_methods.callbacks.fine_tuning.sara import core
from lit_methods.callbacks.fine_tuning.sara.optimizer import MaskedAdamW


def sara_optimizer(case: GoldenCase) -> dict[str, Tensor]:
    numbers = range(case.hp("n_params"))
    weights = [torch.nn.Parameter(case.tensor(f"in_param_{i}")) for i in numbers]
    grads = [case.tensor(f"in_grads_{i}") for i in numbers]
    threshold, strength, choice = case.hp("threshold"), case.hp("lambda_rank"), case.tensor("in_rank_choice").tolist()
    betas = case.hp("beta1"), case.hp("beta2")
    optimizer = MaskedAdamW(weights, case.hp("lr"), betas, case.hp("eps"), case.hp("weight_decay"))
    masks = [core.small_weights(weight, threshold) for weight in weights]
    outputs = {f"out_initial_mask_{i}": mask for i, mask in enumerate(masks)}
    for step in range(1, case.hp("steps") + 1):
        if step == 1 or core.is_reselection(step, case.hp("progressive_iter")):
            if core.is_reselection(step, case.hp("progressive_iter")):
                masks = [core.still_small(mask, weight, threshold) for mask, weight in zip(masks, weights, strict=True)]
                outputs |= {f"out_reselected_mask_{i}": mask for i, mask in enumerate(masks)}
            for weight, mask in zip(weights, masks, strict=True):
                optimizer.set_mask(weight, mask)
        for weight, grad in zip(weights, grads, strict=True):
            weight.grad = grad[step - 1].clone()
        picked = choice[step - 1]
        if strength and masks[picked].sum() > case.hp("min_selected_for_rank"):
            weights[picked].grad += core.nuclear_norm(weights[picked], masks[picked], strength)[1]
        optimizer.step()
        if step == 1:
            outputs |= {f"out_param_after_step1_{i}": weight.detach().clone() for i, weight in enumerate(weights)}
    return outputs | {f"out_param_final_{i}": weight.detach() for i, weight in enumerate(weights)}


def close(case: GoldenCase, key: str, ours, reference) -> None:
    """Of the README: masks exact; 2e-6 without, 2e-5 with rank loss; entries outside the mask bit by bit."""
    assert ours.shape == reference.shape, f"{key}: shape {ours.shape}, reference {reference.shape}"
    if reference.dtype == bool:
        assert (ours == reference).all(), f"{key}: {(ours != reference).sum()} entries differ"
    elif reference.size:
        limit = 2e-5 if case.hp("lambda_rank") else 2e-6
        assert abs(ours - reference).max() <= limit, f"{key}: largest error {abs(ours - reference).max():.3e} > {limit}"
        outside = ~case.arrays[f"out_initial_mask_{key.rpartition('_')[2]}"]
        assert (ours[outside] == reference[outside]).all(), f"{key}: a frozen entry has moved"


def nuclear_norm(case: GoldenCase) -> dict[str, Tensor]:
    loss, grad = core.nuclear_norm(case.tensor("in_weight"), case.tensor("in_mask"), case.hp("lambda_rank"))
    return {"out_loss": loss, "out_grad_weight": grad}


test_golden = golden_test("sara", {"sara_optimizer": Kind(sara_optimizer, compare=close), "nuclear_norm": Kind(nuclear_norm, rtol=1e-7)})
