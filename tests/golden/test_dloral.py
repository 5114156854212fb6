"""DLoRAL; see tests/golden/data/dloral/README.md for the origin of each kind."""

from typing import Any

import torch
from torch import Tensor

from golden import GoldenCase, Kind, golden_test
from lit_methods.restoration.color import adain_color_fix, wavelet_color_fix
from lit_methods.restoration.dloral.core import CrossFrameRetrieval, StageSchedule, csd_loss, frame_difference_mask
from lit_methods.restoration.flow import flow_warp
from lit_methods.tasks.diffusion.noise_prediction import signal_shares


def warp(case: GoldenCase) -> dict[str, Any]:
    x = case.tensor("in_x").requires_grad_()
    warped = flow_warp(x, case.tensor("in_flow").movedim(-1, 1), case.hp("padding_mode"))
    return {"out_warped": warped, "out_grad_x": torch.autograd.grad(warped.square().sum(), x)[0]}


def cfr(case: GoldenCase) -> dict[str, Any]:
    current = case.tensor("in_current_latent").requires_grad_()
    retrieval = CrossFrameRetrieval(current.shape[1], case.hp("heads"), case.hp("embed_dim"), case.hp("temperature")).to(current.dtype)
    names = {name: "in_w_" + name.replace(".", "_") for name in retrieval.state_dict()}
    retrieval.load_state_dict({name: case.tensor(array) for name, array in names.items()})
    found = retrieval(current, case.tensor("in_previous_latent"), case.tensor("in_flow"))
    found.fused.square().sum().backward()
    return {
        "out_aligned_previous": found.aligned,
        "out_retrieved": found.retrieved,
        "out_fused": found.fused,
        "out_unet_input": found.unet_input,
        "out_grad_current_latent": current.grad,
        "out_grad_threshold_bias": retrieval.threshold_fc.bias.grad,
    }


def schedule(case: GoldenCase) -> dict[str, Any]:
    lengths = {name: case.hp(name) for name in ("quality_iter", "quality_iter_1_final", "quality_iter_2", "transition_steps")}
    factors = {name: case.hp(name) for name in ("lambda_l2", "lambda_lpips", "lambda_csd", "lambda_consistency")}
    stages = StageSchedule(**lengths, **factors)
    found = [stages.at(step) for step in case.tensor("in_global_step").tolist()]
    columns = {f"out_lambda_{name}": [getattr(at, name) for at in found] for name in ("l2", "lpips", "csd", "consistency")}
    return {"out_stage": torch.tensor([at.stage for at in found])} | {
        name: torch.tensor(values, dtype=torch.float64) for name, values in columns.items()
    }


def _teacher(x: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
    return prompt.view(-1, 1, 1, 1) * x + 0.1 * t.view(-1, 1, 1, 1) / 1000


def csd(case: GoldenCase) -> dict[str, Any]:
    latents = case.tensor("in_latents").requires_grad_()
    words = case.tensor("in_prompt_scalar"), case.tensor("in_negative_prompt_scalar")
    shares = case.tensor("out_alphas_cumprod_at_t")
    loss = csd_loss(latents, case.tensor("in_noise"), case.tensor("in_t"), shares, _teacher, *words, case.hp("cfg"))
    alphas = signal_shares(1000, 0.00085, 0.012)[case.tensor("in_t")]
    return {"out_loss": loss, "out_grad_latents": torch.autograd.grad(loss, latents)[0], "out_alphas_cumprod_at_t": alphas}


def frame_mask(case: GoldenCase) -> dict[str, Any]:
    return {"out_mask": frame_difference_mask(case.tensor("in_frames"))}


def color_fix(case: GoldenCase) -> dict[str, Any]:
    given = case.tensor("in_content"), case.tensor("in_style")
    return {"out_adain": adain_color_fix(*given), "out_wavelet": wavelet_color_fix(*given)}


test_golden = golden_test(
    "dloral",
    {
        "warp": Kind(warp),
        "cfr": Kind(cfr),
        "schedule": Kind(schedule),
        "csd": Kind(csd),
        "frame_mask": Kind(frame_mask),
        "color_fix": Kind(color_fix),
    },
)
