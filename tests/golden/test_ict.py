"""iCT and CT against the authors' code and the paper's equations; see tests/golden/data/ict/README.md for the origin of each kind."""

from typing import Any

import torch
from torch import Tensor

from golden import GoldenCase, Kind, golden_test
from lit_methods.consistency_models.curricula import ct_teacher_decay, doubling_levels, doubling_stage_length, square_root_levels
from lit_methods.consistency_models.levels import inverse_gap, karras_levels, lognormal_probabilities
from lit_methods.consistency_models.metrics import absolute, pseudo_huber, square
from lit_methods.consistency_models.pairs import consistency_function, consistency_pair_loss
from lit_methods.consistency_models.sampling import multistep_sample


def ct_curriculum(case: GoldenCase) -> dict[str, Any]:
    s0, s1 = case.hp("s0"), case.hp("s1")
    levels = [square_root_levels(int(step), case.hp("total_steps"), s0, s1) for step in case.arrays["in_step"]]
    return {"out_num_scales": levels, "out_target_ema": [ct_teacher_decay(count, s0, case.hp("mu0")) for count in levels]}


def ict_curriculum(case: GoldenCase) -> dict[str, Any]:
    settings = (case.hp("total_steps"), case.hp("s0"), case.hp("s1"))
    levels = [doubling_levels(int(step), *settings) for step in case.arrays["in_step"]]
    return {"out_num_scales": levels, "out_stage_length": doubling_stage_length(*settings)}


def levels_of(case: GoldenCase) -> Tensor:
    return karras_levels(case.hp("num_scales"), case.hp("sigma_min"), case.hp("sigma_max"), case.hp("rho"))


def noise_levels(case: GoldenCase) -> dict[str, Any]:
    sigma = levels_of(case)
    return {
        "out_sigma": sigma,
        "out_prob": lognormal_probabilities(sigma, case.hp("p_mean"), case.hp("p_std")),
        "out_weight": inverse_gap(sigma[:-1], sigma[1:]),
    }


class Network:
    """F(u, tau) = tanh(A vec(u) + tau b + d), with leaves of the graph."""

    def __init__(self, case: GoldenCase, name: str) -> None:
        self.parts = [case.tensor(f"in_{name}_{part}").requires_grad_() for part in ("A", "b", "d")]

    def __call__(self, u: Tensor, tau: Tensor) -> Tensor:
        a, b, d = self.parts
        return torch.tanh(u.flatten(1) @ a.T + tau[:, None] * b + d).view_as(u)


def loss(case: GoldenCase, improved: bool) -> dict[str, Any]:
    student = Network(case, "net")
    teacher = student if improved else Network(case, "teacher")
    sigma = levels_of(case).to(case.tensor("in_x").dtype)
    index = case.tensor("in_index").long() - 1
    lower, upper = sigma[index], sigma[index + 1]
    metric = "pseudo_huber" if improved else case.hp("metric")
    metrics = {"l2": square, "l1": absolute, "pseudo_huber": lambda a, b: pseudo_huber(a, b, case.hp("c"))}
    weight = inverse_gap(lower, upper) if improved else torch.ones_like(lower)
    found = consistency_pair_loss(
        consistency_function(student, case.hp("sigma_min"), case.hp("sigma_data")),
        consistency_function(teacher, case.hp("sigma_min"), case.hp("sigma_data")),
        case.tensor("in_x"),
        case.tensor("in_noise"),
        lower,
        upper,
        metrics[metric],
        weight,
    )
    total = found.losses.mean()
    total.backward()
    out = {f"out_grad_net_{name}": part.grad for name, part in zip("Abd", student.parts, strict=True)}
    out |= {"out_loss_per_sample": found.losses, "out_loss": total}
    return out | ({"out_student": found.student, "out_teacher": found.teacher, "out_weight": weight} if improved else {})


def sampler(case: GoldenCase) -> dict[str, Any]:
    settings = {"sigma_min": case.hp("sigma_min"), "sigma_max": case.hp("sigma_max")}
    levels = karras_levels(case.hp("steps"), **settings, rho=case.hp("rho")).flip(0)
    times = levels[torch.from_numpy(case.arrays["in_ts"]).long()].tolist()
    f = consistency_function(Network(case, "net"), case.hp("sigma_min"), case.hp("sigma_data"))
    x = multistep_sample(f, case.tensor("in_x_T"), times, list(case.tensor("in_noise")), **settings, clip=bool(case.hp("clip_denoised")))
    clipped = [min(max(time, case.hp("sigma_min")), case.hp("sigma_max")) for time in times]
    return {"out_x": x, "out_sigma_of_ts": clipped}


test_golden = golden_test(
    "ict",
    {
        "ct_curriculum": Kind(ct_curriculum, rtol=1e-9, atol=1e-12),
        "ict_curriculum": Kind(ict_curriculum, rtol=1e-9, atol=1e-12),
        "noise_levels": Kind(noise_levels, rtol=1e-9, atol=1e-12),
        "ct_loss": Kind(lambda case: loss(case, improved=False), rtol=1e-9, atol=1e-12),
        "ict_loss": Kind(lambda case: loss(case, improved=True), rtol=1e-9, atol=1e-12),
        "sampler": Kind(sampler, rtol=1e-9, atol=1e-12),
    },
)
