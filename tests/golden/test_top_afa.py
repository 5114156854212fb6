"""top-AFA and its baselines against the authors' code; see tests/golden/data/top_afa/README.md for the origin of each kind."""

from typing import Any

import torch

from golden import GoldenCase, Kind, golden_test
from lit_methods import SparseAutoencoder, TopAFA
from lit_methods.sparse_autoencoders.dictionary import dense
from lit_methods.sparse_autoencoders.top_afa.core import band_slopes, decoder_coherence, zf_metrics


def step(module: SparseAutoencoder, case: GoldenCase) -> dict[str, Any]:
    """The case's weights in the module, and what its training step makes of the batch."""
    module.double()
    x = case.tensor("in_x").requires_grad_()
    weights = {"encoder": case.tensor("in_W_enc").T, "decoder": case.tensor("in_W_dec"), "decoder_bias": case.tensor("in_b_dec")}
    counter = case.tensor("in_num_batches_not_active").to(module.num_batches_not_active.dtype)
    module.load_state_dict({**weights, "num_batches_not_active": counter}, strict=False)
    largest, mean = decoder_coherence(module.decoder_directions)
    found = module.losses({"activation": x})
    found.loss.backward()
    sizes, code = module.sizes(found.code), dense(found.code)
    module.project_decoder()
    return {
        "out_feature_acts": code,
        "out_k_per_row": (code > 0).sum(dim=1),
        "out_sae_out": found.output,
        "out_loss": found.loss,
        "out_l2_loss": found.l2,
        "out_afa_loss": found.penalties.get("afa", torch.zeros(())),
        "out_aux_loss": found.aux,
        "out_l0_norm": sizes["l0"],
        "out_l1_norm": sizes["l1"],
        "out_epsilon_max": largest,
        "out_epsilon_mean": mean,
        "out_num_batches_not_active": module.num_batches_not_active,
        "out_grad_W_enc": module.encoder.grad.T,
        "out_grad_W_dec": module.decoder.grad,  # the vectors hold the projected gradient under both names
        "out_grad_b_dec": module.decoder_bias.grad,
        "out_grad_x": x.grad,
        "out_W_dec_after_renorm": module.decoder,
        "out_grad_W_dec_projected": module.decoder.grad,
    }


def common(case: GoldenCase) -> dict[str, Any]:
    features, width = case.arrays["in_W_dec"].shape
    return {
        "width": width,
        "features": features,
        "normalize": "sample" if case.hp("input_unit_norm") else "none",
        "aux_coeff": float(case.hp("aux_penalty")),
        "aux_features": int(case.hp("top_k_aux")),
        "dead_after": int(case.hp("n_batches_to_dead")),
    }


def topafa_step(case: GoldenCase) -> dict[str, Any]:
    return step(TopAFA(afa_coeff=float(case.hp("afa_coeff")), l1_coeff=float(case.hp("l1_coeff")), **common(case)), case)


def baseline(activation: str, case: GoldenCase) -> dict[str, Any]:
    penalties = {"l1": float(case.hp("l1_coeff"))} if case.hp("l1_coeff") else {}
    settings = {"k": min(int(case.hp("top_k")), case.arrays["in_W_dec"].shape[0])}
    return step(SparseAutoencoder(activation=activation, settings=settings, penalties=penalties, **common(case)), case)


def topk_step(case: GoldenCase) -> dict[str, Any]:
    return baseline("topk", case)


def batchtopk_step(case: GoldenCase) -> dict[str, Any]:
    return baseline("batchtopk", case)


def metrics(case: GoldenCase) -> dict[str, Any]:
    found = zf_metrics(case.tensor("in_z"), case.tensor("in_f"), case.tensor("in_W_dec"), case.tensor("in_b_dec"))
    slopes = [band_slopes(float(error)) for error in case.arrays["hp_band_eps_times_h_minus_1"]]
    return {f"out_{name}": value for name, value in found._asdict().items()} | {
        "out_band_lower_slope": [lower for lower, _ in slopes],
        "out_band_upper_slope": [upper for _, upper in slopes],
    }


LOSSES = {f"out_{name}": (2e-6, 1e-9) for name in ("loss", "l2_loss", "aux_loss", "l0_norm", "l1_norm")}  # float32 in the code
STEP = {**LOSSES, "out_grad": (1e-5, 1e-12)}

test_golden = golden_test(
    "top_afa",
    {
        "topafa_step": Kind(topafa_step, overrides=STEP),
        "topk_step": Kind(topk_step, overrides=STEP),
        "batchtopk_step": Kind(batchtopk_step, overrides=STEP),
        "zf_metrics": Kind(metrics, rtol=1e-10, atol=1e-14),
    },
)
