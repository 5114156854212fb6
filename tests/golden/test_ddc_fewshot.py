"""DDC against the authors' code; see tests/golden/data/ddc_fewshot/README.md for the origin of each kind."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from golden import GoldenCase, Kind, golden_test
from lit_methods.diffusion.ddc_fewshot.core import (
    StructureGuidance,
    adaptation_loss,
    cosine_shares,
    ddc_distance,
    ddim_from,
    domain_direction,
    gram_distance,
    gram_matrix,
    lowpass,
    mix_content,
    noise_loss,
    noised,
    phase_share,
    phasic_weights,
    posterior,
    predicted_clean,
    sampling_times,
    translation_start,
    weighted_mean,
)


def ddc(case: GoldenCase) -> dict[str, Any]:
    direction = domain_direction(case.tensor("in_source_bank").mean(0), case.tensor("in_target_bank").mean(0))
    generated = case.tensor("in_feature_generated").requires_grad_()
    distance = ddc_distance(generated, case.tensor("in_feature_source"), direction)
    weights = phasic_weights(case.tensor("in_t"), case.hp("num_timesteps"), case.hp("base"), case.hp("exponent"))
    loss = adaptation_loss(distance, case.tensor("in_style_per_sample"), weights.adaptation)
    return {
        "out_direction": direction,
        "out_ddc_per_sample": distance,
        "out_alpha": weights.adaptation,
        "out_adaptation_loss": loss,
        "out_weighted_diffusion": weighted_mean(case.tensor("in_diffusion_per_sample"), weights.diffusion),
        "out_grad_feature_generated": torch.autograd.grad(loss, generated)[0],
    }


def phase(case: GoldenCase) -> dict[str, Any]:
    t, switch = case.tensor("in_t"), case.hp("switch_step")
    return {
        "out_m": phase_share(t, switch),
        "out_mixed": mix_content(case.tensor("in_content_features"), case.tensor("in_noise"), t, switch),
    }


def toy(case: GoldenCase) -> Callable[[Tensor, Tensor, Any], Tensor]:
    """The case's network: a x + b content + c t / 1000."""
    a, b, c = (case.hp(f"model_{name}") for name in "abc")

    def denoise(x: Tensor, t: Tensor, content: Any) -> Tensor:
        return a * x + (0 if content is None else b * content) + c * t.view(-1, *(1,) * (x.ndim - 1)).to(x.dtype) / 1000

    return denoise


def diffusion(case: GoldenCase) -> dict[str, Any]:
    shares = cosine_shares(case.hp("num_timesteps"))
    t, noise = case.tensor("in_t"), case.tensor("in_noise")
    x_t = noised(case.tensor("in_image") * 2 - 1, noise, t, shares)
    eps = toy(case)(x_t, t, case.tensor("in_condition") if "in_condition" in case.arrays else None)
    clean = predicted_clean(x_t, eps, t, shares)
    mean, variance = posterior(clean, x_t, t, shares)
    return {
        "out_x_t": x_t,
        "out_loss_per_sample": noise_loss(eps, noise, case.hp("loss")),
        "out_x0_prediction": clean,
        "out_posterior_mean": mean,
        "out_posterior_variance": variance,
        "out_alphas_cumprod": shares[[0, 10, 300, 500, 800, 998]],
    }


def style(case: GoldenCase) -> dict[str, Any]:
    layers = range(case.hp("num_layers"))
    generated = [case.tensor(f"in_generated_{layer}") for layer in layers]
    first = generated[0].requires_grad_()
    grams = [gram_matrix(maps) for maps in generated]
    loss = gram_distance(grams, [gram_matrix(case.tensor(f"in_reference_{layer}")) for layer in layers])
    return {
        "out_loss_per_sample": loss,
        "out_gram_0": grams[0],
        "out_grad_generated_0": torch.autograd.grad(loss.sum(), first)[0],
    }


def guided_ddim(case: GoldenCase) -> dict[str, Any]:
    shares = cosine_shares(case.hp("num_timesteps"))
    source = case.tensor("in_source")
    noises = iter(case.tensor("in_noises"))
    start = translation_start(source * 2 - 1, case.tensor("in_start_noise"), case.hp("max_step"), shares)
    times = sampling_times(case.hp("max_step"), case.hp("sample_steps"))
    guidance = StructureGuidance(case.hp("filter_size"), case.hp("guid_step"), case.hp("style_enhance"))
    image = ddim_from(
        toy(case),
        start,
        times,
        shares,
        lambda like: next(noises),
        case.hp("eta"),
        source if case.hp("use_condition") else None,
        source=source * 2 - 1,
        guidance=guidance if case.hp("use_guidance") else None,
    )
    return {
        "out_times": times,
        "out_start": start,
        "out_lowpass_source": lowpass(source, case.hp("filter_size")),
        "out_image": (image + 1) / 2,
    }


test_golden = golden_test(
    "ddc_fewshot",
    {
        "ddc": Kind(ddc, rtol=1e-6, atol=1e-8),
        "phase": Kind(phase, rtol=1e-6, atol=1e-8),
        "diffusion": Kind(diffusion, rtol=1e-4, atol=1e-5),
        "style": Kind(style, rtol=1e-6, atol=1e-8),
        "guided_ddim": Kind(guided_ddim, rtol=1e-4, atol=1e-5),
    },
)
