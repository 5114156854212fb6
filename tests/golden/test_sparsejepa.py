"""SparseJEPA's two building blocks against their authors' codes; see tests/golden/data/sparsejepa/README.md for the origin of each kind."""

from typing import Any

import torch

from golden import GoldenCase, Kind, golden_test
from lit_methods.averages import linear_decay
from lit_methods.callbacks.sparsity.group_sparsity import group_norms, group_penalty, group_shrink
from lit_methods.self_supervised.jepa import jepa_loss, jepa_targets, learning_rate_at, weight_decay_at
from lit_methods.self_supervised.masks import block_size
from lit_methods.self_supervised.networks import ViTPredictor, sincos_positions
from lit_methods.self_supervised.sparsejepa.core import kl_to_standard_normal


def loss(case: GoldenCase) -> dict[str, Any]:
    predictions = case.tensor("in_predictions").requires_grad_()
    targets = jepa_targets(case.tensor("in_target_features"), case.tensor("in_pred_masks"), case.hp("num_context_masks"))
    total = jepa_loss(predictions, targets)
    return {"out_targets": targets, "out_loss": total, "out_grad_predictions": torch.autograd.grad(total, predictions)[0]}


def predictor_forward(case: GoldenCase) -> dict[str, Any]:
    weights = {key[9:].replace("__", "."): case.tensor(key) for key in case.arrays if key.startswith("in_param_")}
    width, encoder_width = weights["predictor_embed.weight"].shape
    depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("predictor_blocks."))
    side = case.hp("grid_size")
    predictor = ViTPredictor((side, side), encoder_width, width, depth, case.hp("num_heads"), case.hp("layer_norm_eps"))
    predictor.to(case.tensor("in_context_tokens").dtype).load_state_dict(weights)
    return {"out_predictions": predictor(*(case.tensor(f"in_{name}") for name in ("context_tokens", "context_masks", "pred_masks")))}


def sizes(case: GoldenCase) -> dict[str, Any]:
    side = case.hp("input_size") // case.hp("patch_size")
    pred_scale, enc_scale, aspect = (tuple(case.arrays[f"hp_{name}"].tolist()) for name in ("pred_scale", "enc_scale", "aspect_ratio"))
    draws = case.arrays["in_uniform"].tolist()
    return {
        "out_pred_height_width": torch.tensor([block_size((side, side), pred_scale, aspect, u, u) for u in draws]),
        "out_enc_height_width": torch.tensor([block_size((side, side), enc_scale, (1.0, 1.0), u, u) for u in draws]),
    }


def schedules(case: GoldenCase) -> dict[str, Any]:
    total, hp = case.hp("total_steps"), case.hp
    rates = (hp("warmup_steps"), hp("start_lr"), hp("ref_lr"), hp("final_lr"))
    return {
        "out_lr": torch.tensor([learning_rate_at(step, total, *rates) for step in range(1, total + 1)], dtype=torch.float64),
        "out_weight_decay": torch.tensor(
            [weight_decay_at(step, total, hp("wd"), hp("final_wd")) for step in range(1, total + 1)], dtype=torch.float64
        ),
        "out_ema_momentum": torch.tensor(
            [linear_decay(step, total, hp("ema_start"), hp("ema_end")) for step in range(total + 1)], dtype=torch.float64
        ),
    }


def penalty(case: GoldenCase) -> dict[str, Any]:
    maps = case.tensor("in_group_maps").requires_grad_()
    total = group_penalty(maps, (-1,))
    after = group_shrink(maps.detach(), case.hp("learning_rate") * case.hp("lambda"), (-1,))
    kl = kl_to_standard_normal(case.tensor("in_latent_mean"), case.tensor("in_latent_std"))
    return {
        "out_penalty": total,
        "out_weighted_penalty": case.hp("lambda") * total,
        "out_grad_penalty": torch.autograd.grad(total, maps)[0],
        "out_group_maps_after_prox": after,
        "out_active_latent_group": group_norms(after, (-1,)) > 0,
        "out_kl_sum": kl.sum(),
        "out_kl_per_sample": kl.mean(),
    }


def position_embedding(case: GoldenCase) -> dict[str, Any]:
    side = case.hp("grid_size")
    return {"out_embedding": sincos_positions(case.hp("embed_dim"), (side, side))}


test_golden = golden_test(
    "sparsejepa",
    {
        "jepa_loss": Kind(loss, rtol=1e-6),
        "predictor_forward": Kind(predictor_forward, rtol=1e-6),
        "block_size": Kind(sizes),
        "schedules": Kind(schedules, rtol=1e-9, atol=1e-15),
        "group_penalty": Kind(penalty, rtol=1e-8),
        "position_embedding": Kind(position_embedding, rtol=1e-6),
    },
)
