"""InterLCM against the authors' code; see tests/golden/data/interlcm/README.md for the origin of each kind."""

from typing import Any

import torch

from golden import GoldenCase, Kind, golden_test
from lit_methods.restoration.color import adain_color_fix, wavelet_color_fix, wavelet_decompose
from lit_methods.restoration.interlcm.core import (
    critic_hinge,
    lcm_schedule,
    lcm_timesteps,
    restoration_loss,
    restore_from_low_quality,
)
from lit_methods.tasks.diffusion.noise_prediction import signal_shares


def schedule(case: GoldenCase) -> dict[str, Any]:
    times = lcm_timesteps(case.hp("num_inference_steps"), case.hp("original_inference_steps"), case.hp("num_train_timesteps"))
    shares = signal_shares(case.hp("num_train_timesteps"), case.hp("beta_start"), case.hp("beta_end"))
    found = lcm_schedule(shares, times, case.hp("timestep_scaling"), case.hp("sigma_data"))
    return {"out_timesteps": found.times, "out_alphas_cumprod": found.shares, "out_c_skip": found.skip, "out_c_out": found.out}


def trajectory(case: GoldenCase) -> dict[str, Any]:
    times = lcm_timesteps(case.hp("num_inference_steps"), case.hp("original_inference_steps"))
    answers = iter(case.tensor("in_model_eps"))
    steps = lcm_schedule(signal_shares(1000, 0.00085, 0.012), times)
    found = restore_from_low_quality(case.tensor("in_lq_latent"), lambda z, t: next(answers), steps, list(case.tensor("in_step_noise")))
    return {"out_timesteps": times, "out_latents": torch.stack(found.latents), "out_denoised": torch.stack(found.denoised)}


def color_fix(case: GoldenCase) -> dict[str, Any]:
    restored, lq, levels = case.tensor("in_restored"), case.tensor("in_lq"), case.hp("levels")
    high, low = wavelet_decompose(restored, levels)
    return {
        "out_wavelet": wavelet_color_fix(restored, lq, levels),
        "out_adain": adain_color_fix(restored, lq, case.hp("adain_eps")),
        "out_high_freq": high,
        "out_low_freq": low,
    }


def loss(case: GoldenCase) -> dict[str, Any]:
    output, scores = case.tensor("in_output").requires_grad_(), case.tensor("in_disc_fake").requires_grad_()
    when = (case.hp("step"), case.hp("disc_start"))
    weights = [case.hp(f"{name}_weight") for name in ("pixel", "perceptual", "gan")]
    found = restoration_loss(output, case.tensor("in_gt"), case.arrays["in_lpips"].item(), scores, *when, *weights)
    real, fake = critic_hinge(case.tensor("in_disc_real"), scores)
    gradients = torch.autograd.grad(found.total, [output, scores])
    return {
        "out_pixel": found.pixel,
        "out_gan_g": found.gan,
        "out_total_g": found.total,
        "out_disc_real": real,
        "out_disc_fake": fake,
        "out_grad_output": gradients[0],
        "out_grad_disc_fake": gradients[1],
    }


single, double = (1e-4, 1e-4), (1e-9, 1e-9)
test_golden = golden_test(
    "interlcm",
    {
        "schedule": Kind(schedule, *single),
        "trajectory": Kind(trajectory, *single),
        "color_fix": Kind(color_fix, *double),
        "loss": Kind(loss, *double),
    },
)
