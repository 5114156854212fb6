"""EPG against the authors' code; see tests/golden/data/epg/README.md for the origin of each kind."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from golden import GoldenCase, Kind, golden_test
from lit_methods.consistency_models.curricula import doubling_levels, doubling_stage_length, ect_lower, ect_stage
from lit_methods.consistency_models.epg.core import (
    consistency_tuning_loss,
    cosine_info_nce,
    encode,
    pretrain_levels,
    pretrain_loss,
    resolution_shift,
)
from lit_methods.consistency_models.pairs import consistency_function


class Layer:
    """tanh(A vec(u) + tau b + d), in the shape of u or as a feature, and the projection P of it; leaves of the graph."""

    def __init__(self, case: GoldenCase, name: str, parts: str) -> None:
        self.parts = {part: case.tensor(f"in_{name}_{part}").requires_grad_() for part in parts}

    def feature(self, u: Tensor, tau: Tensor) -> Tensor:
        a, b, d = (self.parts[part] for part in "Abd")
        return torch.tanh(u.flatten(1) @ a.T + tau[:, None] * b + d)

    def image(self, u: Tensor, tau: Tensor) -> Tensor:
        return self.feature(u, tau).view_as(u)

    def project(self, feature: Tensor) -> Tensor:
        return feature @ self.parts["P"].T

    def gradients(self, name: str) -> dict[str, Tensor]:
        return {f"out_grad_{name}_{part}": value.grad for part, value in self.parts.items()}


def shift_of(case: GoldenCase) -> float:
    return resolution_shift(case.tensor("in_x").shape[-2], case.hp("base_resolution"))


def info_nce(case: GoldenCase) -> dict[str, Any]:
    query = case.tensor("in_query").requires_grad_()
    losses = cosine_info_nce(query, case.tensor("in_key"), case.tensor("in_tau")[0])
    losses.mean().backward()
    return {"out_loss_per_sample": losses, "out_loss": losses.mean(), "out_grad_query": query.grad}


def pretraining(case: GoldenCase) -> dict[str, Any]:
    online, target = Layer(case, "online", "AbdP"), Layer(case, "target", "AbdP")
    x = case.tensor("in_x")
    index = int(case.arrays["in_index"].flat[0])
    spacing = (case.hp("sigma_min"), case.hp("sigma_max"), case.hp("rho"))
    levels = pretrain_levels(index, case.hp("num_scales"), *spacing, shift_of(case))
    found = pretrain_loss(
        online.feature,
        online.project,
        target.feature,
        target.project,
        x,
        case.tensor("in_view1"),
        case.tensor("in_view2"),
        case.tensor("in_noise"),
        levels,
        sigma_data=case.hp("sigma_data"),
        contrastive_temperature=case.hp("tau_contrastive"),
        consistency_temperature=case.hp("tau_consistency"),
    )
    loss = (found.contrastive + found.consistency).mean()
    loss.backward()
    names = {"hi": levels.high, "lo": levels.low, "clean": levels.clean}
    out = {f"out_sigma_{name}": np.full(len(x), level) for name, level in names.items()}
    return out | online.gradients("online") | {
        "out_contrastive": found.contrastive,
        "out_consistency": found.consistency,
        "out_loss": loss,
    }  # fmt: skip


def curriculum(case: GoldenCase) -> dict[str, Any]:
    settings = (case.hp("total_steps"), case.hp("s0"), case.hp("s1"))
    levels = [doubling_levels(int(step), *settings, "ceil") for step in case.arrays["in_step"]]
    return {"out_num_scales": np.array(levels, dtype=np.int64), "out_stage_length": doubling_stage_length(*settings, "ceil")}


def ect_pair(case: GoldenCase) -> dict[str, Any]:
    t, shape = case.tensor("in_t"), [case.hp(name) for name in ("q", "k", "b", "sigma_min")]
    stages = [ect_stage(int(step), case.hp("delta"), case.hp("d0"), case.hp("d1")) for step in case.arrays["in_step"]]
    rows = [ect_lower(t, stage, *shape) for stage in stages]
    return {"out_r": torch.stack(rows) if rows else t.new_empty(0, len(t)), "out_stage": np.array(stages, dtype=np.int64)}


def consistency(case: GoldenCase) -> dict[str, Any]:
    student, teacher, x, shift = Layer(case, "net", "Abd"), Layer(case, "teacher", "Abd"), case.tensor("in_x"), shift_of(case)
    clean, sigma_data = shift * case.hp("sigma_min"), case.hp("sigma_data")
    perceptual = None
    if case.hp("use_perceptual"):
        frozen, level = Layer(case, "perceptual", "AbdP"), torch.full((len(x),), clean, dtype=x.dtype)

        def perceptual(image: Tensor) -> Tensor:
            return frozen.project(encode(frozen.feature, image, level, sigma_data=sigma_data))

    found = consistency_tuning_loss(
        consistency_function(student.image, clean, sigma_data),
        consistency_function(teacher.image, clean, sigma_data),
        x,
        case.tensor("in_noise"),
        shift * case.tensor("in_t"),
        shift * case.tensor("in_r"),
        c=case.hp("c"),
        warmup=bool(case.hp("denoise_warmup")),
        perceptual=perceptual,
        temperature=case.hp("tau"),
    )
    loss = (found.consistency + found.perceptual).mean()
    loss.backward()
    return student.gradients("net") | {
        "out_pred": found.student,
        "out_target": found.teacher,
        "out_weight": found.weight,
        "out_cm_loss_per_sample": found.consistency,
        "out_perceptual_per_sample": found.perceptual,
        "out_loss": loss,
    }


def compare(case: GoldenCase, key: str, ours: NDArray[Any], reference: NDArray[Any]) -> None:
    """The README's two tolerances, by the dtype of the inputs."""
    assert ours.shape == reference.shape, f"{key}: shape {ours.shape}, reference {reference.shape}"
    if not np.issubdtype(reference.dtype, np.inexact):
        assert np.array_equal(ours, reference), f"{key}: {int((ours != reference).sum())} of {reference.size} entries differ"
    elif reference.size:
        narrow = any(array.dtype == np.float32 for array in case.arrays.values())
        rtol, atol = (5e-4, 1e-6) if narrow else (1e-9, 1e-12)
        error, limit = np.abs(ours - reference).max(), atol + rtol * np.abs(reference).max()
        assert error <= limit, f"{key}: largest error {error:.3e} > {limit:.3e}"


test_golden = golden_test(
    "epg",
    {
        "info_nce": Kind(info_nce, compare=compare),
        "pretrain_loss": Kind(pretraining, compare=compare),
        "pretrain_curriculum": Kind(curriculum, compare=compare),
        "ect_pair": Kind(ect_pair, compare=compare),
        "consistency_loss": Kind(consistency, compare=compare),
    },
)
