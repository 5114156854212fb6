"""Composed retrieval with uncertainty against the authors' code; the README beside the vectors tells their origin."""

from typing import Any

import torch

from golden import GoldenCase, Kind, golden_test
from lit_methods.optim import learning_rate_factor
from lit_methods.retrieval.cir_uncertainty.core import (
    augment_targets,
    best_of_gallery,
    coarse_weight,
    recall_at,
    uncertainty_loss,
)
from lit_methods.retrieval.cir_uncertainty.networks import ContentStyleCompositor


def loss(case: GoldenCase) -> dict[str, Any]:
    inputs = [case.tensor(f"in_{name}").requires_grad_() for name in ("query", "target", "target_augmented")]
    gamma = coarse_weight(case.hp("epoch") / case.hp("total_epochs"), case.hp("gamma_scale"))
    found = uncertainty_loss(*inputs, gamma)
    gradients = torch.autograd.grad(found.loss, inputs)
    return {
        "out_gamma": gamma,
        "out_loss_infonce": found.info_nce,
        "out_loss_uncertainty": found.uncertainty,
        "out_loss_total": found.loss,
        **{f"out_grad_{name}": value for name, value in zip(("query", "target", "target_augmented"), gradients, strict=True)},
    }


def augmenter(case: GoldenCase) -> dict[str, Any]:
    features = case.tensor("in_features").requires_grad_()
    noise = case.tensor("in_noise_alpha"), case.tensor("in_noise_beta")
    found = augment_targets(features, *noise, case.hp("alpha_scale"), case.hp("beta_scale"), case.hp("eps"))
    (gradient,) = torch.autograd.grad((found.features * case.tensor("in_output_weight")).sum(), features)
    return {"out_alpha": found.alpha, "out_beta": found.beta, "out_augmented": found.features, "out_grad_features": gradient}


NAMES = {
    "self_att_generator_W_k_weight": "key.weight",
    "self_att_generator_W_q_weight": "query.weight",
    "global_att_generator_W_t_weight": "text.weight",
    "global_att_generator_W_t_bias": "text.bias",
    "merge_weight": "merge.weight",
    "W_v_weight": "value.weight",
    "W_r_weight": "out.weight",
    "W_r_bias": "out.bias",
}


def compositor(case: GoldenCase) -> dict[str, Any]:
    image, text = case.tensor("in_image_map"), case.tensor("in_text")
    network = ContentStyleCompositor(image.shape[1], text.shape[1], case.hp("num_heads")).double()
    state = {"weights": case.tensor("in_weights")}
    for theirs, ours in NAMES.items():
        state |= {f"first.{ours}": case.tensor(f"in_att_module_{theirs}"), f"second.{ours}": case.tensor(f"in_att_module2_{theirs}")}
    for theirs, ours in (("global_transform", "style"), ("gate", "gate")):
        state[f"{ours}.weight"] = case.tensor(f"in_global_styler_{theirs}_linear_weight_orig")
        state[f"{ours}.bias"] = case.tensor(f"in_global_styler_{theirs}_linear_bias")
    network.load_state_dict(state)
    with torch.no_grad():
        composed, attention = network.with_attention(image, text)
    return {"out_composed": composed, "out_attention_map_1": attention}


def recall(case: GoldenCase) -> dict[str, Any]:
    gallery, ks = case.tensor("in_gallery"), case.tensor("hp_k").tolist()
    places = torch.arange(len(gallery))
    target, reference = case.tensor("in_target_index"), case.tensor("in_reference_index")
    found = best_of_gallery(case.tensor("in_query"), gallery, target, places, reference, places, max(ks))
    return {"out_recall": recall_at(found.hits, ks)}


def lr_schedule(case: GoldenCase) -> dict[str, Any]:
    gamma, epochs = case.hp("gamma"), case.tensor("in_epoch").tolist()
    factors = [
        learning_rate_factor(
            epoch,
            total_steps=len(epochs),
            steps_per_epoch=1,
            schedule="multistep",
            milestones=(case.hp("decay_step"), case.hp("decay_step_second")),
            gamma=gamma,
            warmup_epochs=case.hp("warmup_epochs"),
            warmup_start=gamma**2,
        )
        for epoch in epochs
    ]
    return {"out_lr": case.hp("base_lr") * torch.tensor(factors, dtype=torch.float64)}


test_golden = golden_test(
    "cir_uncertainty",
    {
        kind: Kind(adapter, rtol=1e-6, atol=1e-8)
        for kind, adapter in {
            "loss": loss,
            "augmenter": augmenter,
            "compositor": compositor,
            "recall": recall,
            "lr_schedule": lr_schedule,
        }.items()
    },
)
