"""rCM against the authors' code; see tests/golden/data/rcm/README.md for the origin of each kind."""

from typing import Any

import torch
from torch import Tensor

from golden import GoldenCase, Kind, golden_test
from lit_methods.averages import power_decay, power_exponent
from lit_methods.consistency_models.rcm.attention_jvp import attention_with_tangent
from lit_methods.consistency_models.rcm.core import critic_loss, dcm_loss, dmd_loss, phase_at, sample, scm_loss, simulate
from lit_methods.consistency_models.rcm.trigflow import (
    Predict,
    Wrapped,
    flow_scalings,
    flow_time,
    guided,
    rectified_flow,
    shift_time,
    trig_time,
)


class Network:
    """tanh(A vec(x) + tau b / 1000 + d + condition), with leaves of the graph."""

    def __init__(self, case: GoldenCase, name: str) -> None:
        self.parts = {part: case.tensor(f"in_{name}_{part}").requires_grad_() for part in "Abd"}
        self.condition = case.tensor("in_cond")
        self.scale = case.hp("time_scale")
        self.name = name

    def __call__(self, x: Tensor, tau: Tensor, condition: Tensor) -> Tensor:
        a, b, d = self.parts.values()
        return torch.tanh(x.flatten(1) @ a.T + (tau / 1000)[:, None].to(x.dtype) * b + d + condition).view_as(x)

    def predict(self, conditional: bool = True) -> Wrapped:
        condition = self.condition if conditional else torch.zeros_like(self.condition)
        return rectified_flow(self, self.condition.dtype, condition, time_scale=self.scale)

    def guided(self, case: GoldenCase) -> Predict:
        return guided(self.predict(), self.predict(False), case.hp("guidance"))

    def gradients(self, losses: Tensor) -> dict[str, Any]:
        losses.sum().backward()
        out = {f"out_grad_{self.name}_{part}": leaf.grad for part, leaf in self.parts.items()}
        return out | {"out_loss_per_sample": losses, "out_loss": losses.sum()}


def attention_jvp(case: GoldenCase) -> dict[str, Any]:
    names = ("q", "k", "v", "tangent_q", "tangent_k", "tangent_v")
    found = attention_with_tangent(*(case.tensor(f"in_{name}") for name in names), scale=case.hp("sm_scale"), block_size=5)
    return {"out_o": found.output, "out_tangent_o": found.tangent, "out_lse": found.lse}


def scaling(case: GoldenCase) -> dict[str, Any]:
    time = case.tensor("in_trig_time")
    found = flow_scalings(time, case.hp("time_scale"))
    shifted = shift_time(flow_time(time), case.hp("shift"))
    out = {"out_c_skip": found.skip, "out_c_out": found.out, "out_c_in": found.inp, "out_c_noise": found.noise}
    return out | {"out_rf_time": flow_time(time), "out_rf_time_shifted": shifted, "out_trig_time_of_shifted": trig_time(shifted)}


def scm(case: GoldenCase) -> dict[str, Any]:
    student, teacher = Network(case, "student"), Network(case, "teacher")
    drawn = (case.tensor(f"in_{name}") for name in ("x0", "noise", "time"))
    settings = (case.hp("warmup_ratio"), case.hp("loss_scale"), case.hp("tangent_eps"))
    found = scm_loss(student.predict(), teacher.guided(case), *drawn, *settings)
    out = {"out_xt": found.xt, "out_F_student": found.student, "out_F_teacher": found.teacher, "out_df_dt": found.df_dt}
    return out | student.gradients(found.losses)


def dcm(case: GoldenCase) -> dict[str, Any]:
    student, teacher = Network(case, "student"), Network(case, "teacher")
    drawn = (case.tensor(f"in_{name}") for name in ("x0", "noise", "uniform"))
    settings = (case.hp(name) for name in ("total_steps", "skip", "shift", "loss_scale"))
    found = dcm_loss(student.predict(), teacher.guided(case), *drawn, *settings)
    return {"out_time": found.time, "out_xt": found.xt} | student.gradients(found.losses)


def simulation(case: GoldenCase, student: Network) -> Any:
    draws = None if case.hp("fix_timesteps") else case.tensor("in_backward_time_draw")
    return simulate(student.predict(), case.tensor("in_init_noise"), case.tensor("in_step_noise"), draws)


def dmd(case: GoldenCase) -> dict[str, Any]:
    student, teacher, fake = (Network(case, name) for name in ("student", "teacher", "fake"))
    made = simulation(case, student)
    settings = (case.tensor("in_D_noise"), case.tensor("in_D_time"), case.hp("loss_scale"))
    found = dmd_loss(fake.predict(), teacher.guided(case), made.x0, *settings)
    out = {"out_backward_time": made.times, "out_G_x0": made.x0, "out_D_xt": found.xt}
    return out | {"out_x0_fake": found.fake, "out_x0_teacher": found.teacher} | student.gradients(found.losses)


def critic(case: GoldenCase) -> dict[str, Any]:
    student, fake = Network(case, "student"), Network(case, "fake")
    made = simulation(case, student)
    found = critic_loss(fake.predict(), made.x0, case.tensor("in_D_noise"), case.tensor("in_D_time"), case.hp("loss_scale"))
    out = {"out_backward_time": made.times, "out_G_x0": made.x0, "out_D_xt": found.xt, "out_x0_fake": found.prediction}
    return out | fake.gradients(found.losses)


def phase_schedule(case: GoldenCase) -> dict[str, Any]:
    settings = (case.hp("tangent_warmup"), case.hp("student_update_freq"), case.hp("max_simulation_steps"))
    phases = [phase_at(int(iteration), *settings) for iteration in case.arrays["in_iteration"]]
    exponent = power_exponent(case.hp("ema_rate"))
    return {
        "out_is_student": [phase.is_student for phase in phases],
        "out_effective_iteration": [phase.effective for phase in phases],
        "out_effective_iteration_fake": [phase.effective_critic for phase in phases],
        "out_num_simulation_steps": [phase.simulation_steps for phase in phases],
        "out_warmup_ratio": [phase.warmup_ratio for phase in phases],
        "out_ema_exponent": exponent,
        "out_ema_beta": [power_decay(phase.effective + case.hp("ema_iteration_shift"), exponent) for phase in phases],
    }


def sampler(case: GoldenCase) -> dict[str, Any]:
    student, start, noises = Network(case, "student"), case.tensor("in_init_noise"), case.tensor("in_step_noise")
    mid_times = case.tensor("in_mid_time").tolist()
    return {"out_x": sample(student.predict(), start, noises, mid_times, case.hp("sigma_max"))}


ADAPTERS = {
    "attention_jvp": attention_jvp,
    "scaling": scaling,
    "scm_loss": scm,
    "dcm_loss": dcm,
    "dmd_loss": dmd,
    "critic_loss": critic,
    "phase_schedule": phase_schedule,
    "sampler": sampler,
}
SINGLE = {"scm_loss": 5e-4}  # of the largest entry, for float32


def compare(kind: str) -> Any:
    """The README's rule: the tolerance depends on the dtype of the case."""

    def close(case: GoldenCase, key: str, ours: Any, reference: Any) -> None:
        import numpy as np

        assert ours.shape == reference.shape, f"{key}: shape {ours.shape}, reference {reference.shape}"
        if not np.issubdtype(reference.dtype, np.inexact):
            assert np.array_equal(ours, reference), key
            return
        dtypes = {str(value.dtype) for name, value in case.arrays.items() if name.startswith("in_") and value.dtype.kind == "f"}
        rtol, atol = (1e-8, 1e-9)
        if "float32" in dtypes:
            rtol = SINGLE.get(kind, 1e-4)
        if "float16" in dtypes:
            rtol = 1e-2
        if reference.size:
            error, limit = np.abs(ours.astype(float) - reference).max(), atol + rtol * np.abs(reference).max()
            assert error <= limit, f"{key}: largest error {error:.3e} > {limit:.3e}"

    return close


test_golden = golden_test("rcm", {name: Kind(adapter, compare=compare(name)) for name, adapter in ADAPTERS.items()})
