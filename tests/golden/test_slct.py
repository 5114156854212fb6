"""sLCT against the authors' code; see tests/golden/data/slct/README.md for the origin of each kind."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from golden import GoldenCase, Kind, golden_test
from lit_methods.consistency_models.curricula import doubling_levels
from lit_methods.consistency_models.levels import inverse_gap, karras_levels
from lit_methods.consistency_models.metrics import cauchy, geman_mcclure, pseudo_huber, square
from lit_methods.consistency_models.pairs import consistency_function, consistency_pair_loss
from lit_methods.consistency_models.slct.core import NonScalingLayerNorm, adaptive_c, couple, early_diffusion_loss, is_early, slct_loss


class Network:
    """F(u, tau) = tanh(A vec(u) + tau b + d), with leaves of the graph."""

    def __init__(self, case: GoldenCase) -> None:
        self.parts = [case.tensor(f"in_net_{part}").requires_grad_() for part in ("A", "b", "d")]

    def __call__(self, u: Tensor, tau: Tensor) -> Tensor:
        a, b, d = self.parts
        return torch.tanh(u.flatten(1) @ a.T + tau[:, None] * b + d).view_as(u)


def loss(case: GoldenCase) -> dict[str, Any]:
    network, x, index = Network(case), case.tensor("in_x"), case.tensor("in_index").long()
    f = consistency_function(network, case.hp("sigma_min"), case.hp("sigma_data"))
    levels = case.hp("num_scales")
    sigma = karras_levels(levels, case.hp("sigma_min"), case.hp("sigma_max"), case.hp("rho"), x.dtype)
    lower, upper = sigma[index - 1], sigma[index]
    found = consistency_pair_loss(
        f, f, x, case.tensor("in_noise"), lower, upper, lambda a, b: cauchy(a, b, case.hp("c")), inverse_gap(lower, upper)
    )
    inside = is_early(index, levels, case.hp("diff_fraction"))
    early = early_diffusion_loss(found.student, x, upper, inside, case.hp("sigma_data"))
    total = slct_loss(found.losses, early.mean, case.hp("diff_weight"))
    total.backward()
    return {f"out_grad_net_{name}": part.grad for name, part in zip("Abd", network.parts, strict=True)} | {
        "out_cm_loss_per_sample": found.losses,
        "out_cm_loss": found.losses.mean(),
        "out_diff_mask": inside,
        "out_diff_loss_per_sample": early.losses,
        "out_diff_loss": early.mean,
        "out_loss": total,
    }


def metric(case: GoldenCase) -> dict[str, Any]:
    teacher, c, found = case.tensor("in_teacher"), case.hp("c"), {}
    for name, function in {
        "pseudo_huber": lambda a, b: pseudo_huber(a, b, c, "mean"),
        "cauchy": lambda a, b: cauchy(a, b, c),
        "geman_mcclure": lambda a, b: geman_mcclure(a, b, c),
        "l2": square,
    }.items():
        student = case.tensor("in_student").requires_grad_()
        distance = function(student, teacher)
        found |= {f"out_{name}": distance, f"out_grad_{name}": torch.autograd.grad(distance.sum(), student)[0]}
    return found


def c_schedule(case: GoldenCase) -> dict[str, Any]:
    s0 = case.hp("s0")
    levels = [doubling_levels(int(step), case.hp("total_steps"), s0, case.hp("s1")) for step in case.arrays["in_step"]]
    settings = (s0, case.hp("c_init"), case.hp("slope"), case.hp("intercept"))
    return {"out_num_scales": levels, "out_c": [adaptive_c(count, *settings) for count in levels]}


def ot_coupling(case: GoldenCase) -> dict[str, Any]:
    found = couple(case.tensor("in_x"), case.tensor("in_noise"))
    plan = torch.eye(len(found.match), dtype=torch.float64)[found.match] / len(found.match)  # the match, written as a plan
    return {"out_match": found.match, "out_plan": plan, "out_total_cost": found.cost, "out_identity_cost": found.identity_cost}


def nsln(case: GoldenCase) -> dict[str, Any]:
    x, bias = case.tensor("in_x").requires_grad_(), case.tensor("in_bias")
    norm = NonScalingLayerNorm(len(bias), case.hp("eps")).to(bias.dtype)
    norm.load_state_dict({"bias": bias})
    y = norm(x)
    grad_x, grad_bias = torch.autograd.grad(y, (x, norm.bias), case.tensor("in_cotangent"))
    trained = sum(parameter.numel() for parameter in norm.parameters() if parameter.requires_grad)
    return {"out_y": y, "out_grad_x": grad_x, "out_grad_bias": grad_bias, "out_n_trainable": trained}


def compare(case: GoldenCase, key: str, ours: NDArray[Any], reference: NDArray[Any]) -> None:
    """The README's two tolerances, by the dtype of the inputs; where several assignments are optimal, any of them."""
    assert ours.shape == reference.shape, f"{key}: shape {ours.shape}, reference {reference.shape}"
    narrow = any(array.dtype == np.float32 for array in case.arrays.values())
    rtol, atol = (1e-4, 1e-6) if narrow else (1e-9, 1e-12)
    if key in ("out_match", "out_plan") and not np.array_equal(ours, reference):
        rows = len(reference)
        match, theirs = (ours, reference) if key == "out_match" else (ours.argmax(1), reference.argmax(1))
        assert sorted(match) == list(range(rows)), f"{key} is no permutation"
        ours, reference = (cost_of(case, one) for one in (match, theirs))
    if not np.issubdtype(reference.dtype, np.inexact):
        assert np.array_equal(ours, reference), f"{key}: {int((ours != reference).sum())} of {reference.size} entries differ"
    elif reference.size:
        error, limit = np.abs(ours - reference).max(), atol + rtol * np.abs(reference).max()
        assert error <= limit, f"{key}: largest error {error:.3e} > {limit:.3e}"


def cost_of(case: GoldenCase, match: NDArray[Any]) -> NDArray[Any]:
    """Sum of squared distances of an assignment, in float64."""
    x, noise = (case.arrays[name].astype(np.float64) for name in ("in_x", "in_noise"))
    return np.asarray(((x - noise[match]) ** 2).sum())


test_golden = golden_test(
    "slct",
    {
        "loss": Kind(loss, compare=compare),
        "metric": Kind(metric, compare=compare),
        "c_schedule": Kind(c_schedule, compare=compare),
        "ot_coupling": Kind(ot_coupling, compare=compare),
        "nsln": Kind(nsln, compare=compare),
    },
)
