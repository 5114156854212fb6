"""AbsTopK against the golden vectors; see tests/golden/data/abstopk/README.md for the origin of each kind."""

from typing import Any

from torch import Tensor

from golden import GoldenCase, Kind, golden_test
from lit_methods import AbsTopK, SparseAutoencoder
from lit_methods.sparse_autoencoders.abstopk.core import (
    PROXIMAL,
    ablate_direction,
    add_direction,
    clamp_feature,
    difference_in_means,
    proximal_map,
    proximal_objective,
    steer_by_clamping,
)
from lit_methods.sparse_autoencoders.dictionary import dense, normalized_mse


def prox(case: GoldenCase) -> dict[str, Tensor]:
    u, settings = case.tensor("in_u"), {"lambda_": case.hp("lambda"), "k": case.hp("k")}
    found = {}
    for regulariser, row in PROXIMAL.items():
        z = proximal_map(u, regulariser, **settings)
        found[f"out_{row.activation}"] = z
        found[f"out_objective_{row.activation}"] = proximal_objective(z, u, regulariser, **settings)
    return found


def sizes(case: GoldenCase, encoder: str) -> dict[str, int]:
    width, features = case.arrays[encoder].shape
    return {"width": width, "features": features}


def weights(module: SparseAutoencoder, case: GoldenCase, **names: str) -> SparseAutoencoder:
    """The module with the case's weights; matrices stand in the case as the other way round where that is another shape."""
    module.double()
    state = module.state_dict()
    found = {ours: case.tensor(theirs) for ours, theirs in names.items()}
    module.load_state_dict(state | {ours: value.T if ours == "encoder" else value.to(state[ours]) for ours, value in found.items()})
    return module


def paper_step(case: GoldenCase) -> dict[str, Any]:
    x, found = case.tensor("in_x"), {}
    shape = sizes(case, "in_W")
    for name in ("abstopk", "topk"):
        options = {"encoder_bias": "learned", "centre": False, "loss": "half_sum", "aux_coeff": 0.0}
        module = SparseAutoencoder(**shape, activation=name, settings={"k": min(case.hp("k"), shape["features"])}, **options)
        weights(module, case, encoder="in_W", decoder_bias="in_b", encoder_bias="in_b_enc")
        module.decoder.data = case.tensor("in_D").T.contiguous()
        losses = module.losses({"activation": x})
        losses.loss.backward()
        code = dense(losses.code)
        found |= {
            f"out_{name}_code": code,
            f"out_{name}_reconstruction": losses.output,
            f"out_{name}_loss": losses.loss,
            f"out_{name}_normalized_mse": normalized_mse(losses.output, x),
            f"out_{name}_l0": code.count_nonzero(dim=1),
            f"out_grad_{name}_W": module.encoder.grad.T,
            f"out_grad_{name}_D": module.decoder.grad.T,
            f"out_grad_{name}_b": module.decoder_bias.grad,
            f"out_grad_{name}_b_enc": module.encoder_bias.grad,
        }
        if name == "abstopk":
            clamp = case.hp("clamp_feature"), case.hp("clamp_value")
            found["out_clamped_reconstruction"] = module.decode(clamp_feature(code, *clamp))
            found["out_steered_activation"] = steer_by_clamping(x, code, *clamp, module.decoder_directions)
    return found


def step(module: SparseAutoencoder, case: GoldenCase) -> tuple[dict[str, Any], Any]:
    losses = module.losses({"activation": case.tensor("in_x")})
    losses.loss.backward()
    found = {
        "out_feature_acts": dense(losses.code),
        "out_sae_out": losses.output,
        "out_loss": losses.loss,
        "out_l2_loss": losses.l2,
        "out_grad_W_enc": module.encoder.grad.T,
        "out_grad_W_dec": module.decoder.grad,
        "out_grad_b_dec": module.decoder_bias.grad,
    }
    return found | {f"out_{name}": value for name, value in module.sizes(losses.code).items()}, losses


def training_step(case: GoldenCase) -> dict[str, Any]:
    shape = sizes(case, "in_W_enc")
    module = AbsTopK(
        **shape,
        k=min(case.hp("k"), shape["features"]),
        per_batch=bool(case.hp("batch_variant")),
        normalize="sample" if case.hp("input_unit_norm") else "none",
        aux_coeff=case.hp("aux_penalty"),
        aux_features=case.hp("top_k_aux"),
        dead_after=case.hp("n_batches_to_dead"),
    )
    counter = {"num_batches_not_active": "in_num_batches_not_active"}
    weights(module, case, encoder="in_W_enc", decoder="in_W_dec", decoder_bias="in_b_dec", **counter)
    found, losses = step(module, case)
    return found | {
        "out_aux_loss": losses.aux,
        "out_positive_features": found["out_positive"],
        "out_negative_features": found["out_negative"],
        "out_num_batches_not_active": module.num_batches_not_active,
    }


def jumprelu(case: GoldenCase) -> dict[str, Any]:
    module = SparseAutoencoder(
        **sizes(case, "in_W_enc"),
        activation="jumprelu",
        settings={"bandwidth": case.hp("bandwidth")},
        penalties={"l0": case.hp("l0_coeff")},
        centre=False,
        normalize="sample" if case.hp("input_unit_norm") else "none",
        aux_coeff=0.0,
    )
    learned = {"learned.log_threshold": "in_log_threshold"}
    weights(module, case, encoder="in_W_enc", decoder="in_W_dec", decoder_bias="in_b_dec", encoder_bias="in_b_enc", **learned)
    found, _ = step(module, case)
    return found | {"out_grad_b_enc": module.encoder_bias.grad, "out_grad_log_threshold": module.learned["log_threshold"].grad}


def steering(case: GoldenCase) -> dict[str, Tensor]:
    direction, x = difference_in_means(case.tensor("in_positive"), case.tensor("in_negative")), case.tensor("in_x")
    return {
        "out_direction": direction,
        "out_added": add_direction(x, direction, case.hp("alpha")),
        "out_ablated": ablate_direction(x, direction),
    }


LOSSES = {f"out_{name}": (2e-6, 1e-9) for name in ("loss", "l2_loss", "aux_loss", "l0", "positive", "negative")}  # float32 in the code
STEP = {**LOSSES, "out_grad": (1e-5, 1e-12)}

test_golden = golden_test(
    "abstopk",
    {
        "prox": Kind(prox, rtol=1e-12, atol=1e-12),
        "sae_step": Kind(paper_step, rtol=1e-9),
        "abstopk_training_step": Kind(training_step, overrides=STEP),
        "jumprelu_step": Kind(jumprelu, overrides=STEP),
        "dim_steering": Kind(steering, rtol=1e-9),
    },
)
