"""FLAIR against the authors' code; see tests/golden/data/flair/README.md for the origin of each kind."""

import math
from typing import Any

import torch
from torch import Tensor

from golden import GoldenCase, Kind, golden_test
from lit_methods.inverse_problems.flair.core import (
    FlairSettings,
    Problem,
    calibrated_weights,
    fit_data,
    flair_solve,
    guided_velocity,
    nearest_time,
    regulariser_step,
    time_grid,
    weight_at,
)
from lit_methods.inverse_problems.operators import Inpainting


class Toy:
    """The case's velocity W vec(x) + t b under guidance, and its decoder, encoder and mask."""

    def __init__(self, case: GoldenCase) -> None:
        self.case = case
        if "in_mask" in case.arrays:
            self.operator = Inpainting(case.tensor("in_mask"))
            self.weight, self.size = case.tensor("in_decoder_weight"), (-1, 3, *case.arrays["in_mask"].shape)

    def velocity(self, x: Tensor, t: float) -> Tensor:
        def branch(name: str) -> Tensor:
            return x.flatten(1) @ self.case.tensor(f"in_v_weight_{name}").T + t * self.case.tensor("in_v_bias")

        return guided_velocity(branch("uncond"), branch("cond"), self.case.hp("guidance")).view_as(x)

    def decode(self, z: Tensor) -> Tensor:
        return (z.flatten(1) @ self.weight.T).view(self.size)

    def encode(self, x: Tensor) -> Tensor:
        return (x.flatten(1) @ torch.linalg.pinv(self.weight).T)[..., None, None]

    def predict(self, z: Tensor) -> Tensor:
        return self.operator.forward(self.decode(z))


def shift_of(case: GoldenCase) -> float | None:
    shift = case.hp("reg_shift")
    return None if math.isnan(shift) else shift


def calib(case: GoldenCase) -> dict[str, Any]:
    weights = calibrated_weights(case.tensor("in_mse"), shift_of(case), case.hp("regularizer_weight"))
    times = case.tensor("in_t")
    return {"out_weights": weights, "out_index": nearest_time(times, len(weights)), "out_weight_at_t": weight_at(weights, times)}


def step(case: GoldenCase) -> dict[str, Any]:
    found = regulariser_step(
        case.tensor("in_mu"),
        case.tensor("in_x1_hat"),
        case.tensor("in_fresh_noise"),
        case.hp("t"),
        Toy(case).velocity,
        case.hp("reg_weight"),
        case.hp("alpha_mode"),
    )
    return {
        "out_noise": found.noise,
        "out_x_t": found.x_t,
        "out_velocity": found.velocity,
        "out_eps": found.x1_hat,
        "out_next_x1_hat": found.x1_hat,
        "out_reg_direction": found.direction,
    }


def data_term(case: GoldenCase) -> dict[str, Any]:
    toy, y = Toy(case), case.tensor("in_y")
    weight, rate, steps = (case.hp(name) for name in ("likelihood_weight", "lr", "steps"))
    found = fit_data(case.tensor("in_mu"), y, toy.predict, weight, rate, steps, case.hp("early_stopping"))
    return {
        "out_mu": found.mu,
        "out_loss_before": found.before[0],
        "out_loss_after": found.after[0],
        "out_pseudo_inverse": toy.operator.pseudo_inverse(y),
    }


def solve(case: GoldenCase) -> dict[str, Any]:
    toy, y, noises = Toy(case), case.tensor("in_y"), case.tensor("in_noises")
    settings = FlairSettings(
        steps=case.hp("n_steps"),
        ts_min=case.hp("ts_min"),
        alpha=case.hp("alpha_mode"),
        lr_reg=case.hp("lr_reg"),
        lr_data=case.hp("lr_data"),
        data_steps=case.hp("likelihood_steps"),
        tolerance=case.hp("early_stopping"),
        likelihood_weight=case.hp("likelihood_weight"),
    )
    times = time_grid(settings.steps, settings.ts_min)
    weights = weight_at(calibrated_weights(case.tensor("in_mse"), shift_of(case), case.hp("regularizer_weight")), times)
    path: list[Tensor] = []
    problem = Problem(y, toy.velocity, toy.predict)
    start = toy.encode(toy.operator.pseudo_inverse(y))
    mu = flair_solve(problem, start, lambda number: noises[number][None], weights.tolist(), settings, lambda seen: path.append(seen.mu))
    return {"out_timesteps": times, "out_mu_per_step": torch.cat(path), "out_x": toy.decode(mu)}


ADAPTERS = {"calib": calib, "step": step, "data_term": data_term, "solve": solve}
test_golden = golden_test("flair", {name: Kind(adapter, 1e-6, 1e-8) for name, adapter in ADAPTERS.items()})
