"""CoNo and its baselines; see tests/golden/data/cono/README.md for the origin of each kind."""

from typing import Any

import torch
from torch import Tensor

from golden import GoldenCase, Kind, golden_test
from lit_methods.diffusion.cono.core import (
    content_distance,
    content_gradient,
    extend_video,
    extending_shuffle,
    internal_shuffle,
    regularise,
)
from lit_methods.diffusion.ddim import DDIMSchedule
from lit_methods.diffusion.networks import TemporalAttention
from lit_methods.diffusion.windows import fuse_windows, reschedule_noise, window_views, window_weights


class Network:
    """eps = a x + b (mean of the frames) + c prompt + d t / 1000."""

    def __init__(self, case: GoldenCase) -> None:
        self.a, self.b, self.c, self.d = (case.hp(f"model_{name}") for name in "abcd")

    def __call__(self, x: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        return self.a * x + self.b * x.mean(1, keepdim=True) + self.c * prompt + self.d * t.view(-1, 1, 1, 1, 1) / 1000


def noise_shuffle(case: GoldenCase) -> dict[str, Any]:
    noise, left, right = case.tensor("in_noise"), case.hp("n1"), case.hp("n2")
    return {"out_extending": extending_shuffle(noise, left), "out_internal": internal_shuffle(noise, left, right)}


def consistency(case: GoldenCase) -> dict[str, Any]:
    eps, reference, reduction = case.tensor("in_eps_extended"), case.tensor("in_eps_reference"), case.hp("reduction")
    return {
        "out_distance": content_distance(eps, reference, reduction),
        "out_grad": content_gradient(eps, reference, reduction),
        "out_eps": regularise(eps, reference, case.hp("delta"), reduction),
    }


def lookback(case: GoldenCase) -> dict[str, Any]:
    shares = case.tensor("in_alphas_cumprod")
    final = torch.tensor([case.arrays["in_alpha_cumprod_final"].item()], dtype=shares.dtype)
    schedule = DDIMSchedule(case.tensor("in_timesteps_ascending").flip(0), shares.flip(0), torch.cat([final, shares[:-1]]).flip(0))
    sizes = (case.hp("n1"), case.hp("n2"), case.hp("t_d"), case.hp("delta"), case.hp("reduction"))
    found = extend_video(Network(case), case.tensor("in_noise")[None], list(case.tensor("in_prompts")), schedule, *sizes)
    names = ("clip_a", "extended", "internal", "second_extension")
    clips = {f"out_{name}": clip.frames[0] for name, clip in zip(names, found.clips, strict=True)}
    return clips | {"out_video": found.video[0]}


def freenoise_noise(case: GoldenCase) -> dict[str, Any]:
    size, stride = case.hp("window_size"), case.hp("window_stride")
    return {"out_noise": reschedule_noise(case.tensor("in_noise"), case.tensor("in_permutations"), size, stride, dim=1)}


def window_attention(case: GoldenCase) -> dict[str, Any]:
    x, size, stride = case.tensor("in_x").requires_grad_(), case.hp("window_size"), case.hp("window_stride")
    weights = {name: case.tensor(f"in_{key}") for name, key in NAMES.items()}
    layer = TemporalAttention(x.shape[-1], case.hp("heads"), len(weights["to_q.weight"])).to(x.dtype)
    layer.load_state_dict(weights)
    layer.window = (size, stride)
    y = layer(x)
    y.square().sum().backward()
    views = window_views(x.shape[1], size, stride)
    return {"out_views": views, "out_window_weights": window_weights(size), "out_y": y, "out_grad_x": x.grad}


NAMES = {"to_q.weight": "w_q", "to_k.weight": "w_k", "to_v.weight": "w_v", "to_out.weight": "w_out", "to_out.bias": "b_out"}


def codenoise(case: GoldenCase) -> dict[str, Any]:
    return {"out_fused": fuse_windows(case.tensor("in_window_predictions"), case.tensor("in_windows"), case.hp("frames"))}


test_golden = golden_test(
    "cono",
    {
        "noise_shuffle": Kind(noise_shuffle),
        "consistency": Kind(consistency),
        "lookback": Kind(lookback),
        "freenoise_noise": Kind(freenoise_noise),
        "window_attention": Kind(window_attention),
        "codenoise": Kind(codenoise),
    },
)
