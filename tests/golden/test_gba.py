"""Group bias adaptation against the golden vectors; see tests/golden/data/gba/README.md for the origin of each kind."""

from typing import Any

from torch import Tensor

from golden import GoldenCase, Kind, golden_test
from lit_methods import SparseAutoencoder
from lit_methods.callbacks.sparse_autoencoders.gba.core import bias_update, firing_statistics
from lit_methods.sparse_autoencoders.dictionary import dense
from lit_methods.sparse_autoencoders.recovery import max_cosine, share_above


def biases(case: GoldenCase) -> dict[str, Tensor]:
    y = case.tensor("in_pre_activations")
    firing, peak = firing_statistics(y)
    settings = {name: case.hp(name) for name in ("gamma_plus", "gamma_minus", "epsilon")}
    found = bias_update(
        case.tensor("in_bias"), firing, peak, len(y), case.tensor("in_group"), case.tensor("in_target_frequency"), **settings
    )
    return {
        "out_activation_frequency": found.frequency,
        "out_peak": peak,
        "out_group_mean_peak": found.group_peak,
        "out_bias": found.bias,
        "out_lowered": found.lowered,
        "out_raised": found.raised,
    }


def step(case: GoldenCase) -> dict[str, Any]:
    found = {}
    for name, jump in (("jumprelu", True), ("relu", False)):
        neurons, width = case.arrays["in_w"].shape
        settings = {
            "activation": "gba",
            "settings": {"jump": jump},
            "tied": True,
            "output_scale": 1.0,
            "loss": "half_sum",
            "aux_coeff": 0.0,
        }
        module = SparseAutoencoder(width, neurons, **settings).double()
        weights = {"decoder": "in_w", "output_scale": "in_a", "decoder_bias": "in_b_pre", "encoder_bias": "in_b"}
        module.load_state_dict({ours: case.tensor(theirs) for ours, theirs in weights.items()}, strict=False)
        seen: list[Tensor] = []  # as GroupBiasAdaptation sees them
        module.pre_activation.register_forward_hook(lambda part, inputs, y, seen=seen: seen.append(y))
        losses = module.losses({"activation": case.tensor("in_x")})
        losses.loss.backward()
        found |= {
            "out_pre_activation": seen[0],
            f"out_{name}_activation": dense(losses.code),
            f"out_{name}_reconstruction": losses.reconstruction,
            f"out_{name}_loss": losses.loss,
            f"out_grad_{name}_w": module.decoder.grad,
            f"out_grad_{name}_a": module.output_scale.grad,
            f"out_grad_{name}_b_pre": module.decoder_bias.grad,
        }
    return found


def recovery(case: GoldenCase) -> dict[str, Tensor]:
    neurons, tau = case.tensor("in_neuron_weights"), case.hp("tau")
    features = max_cosine(case.tensor("in_true_features"), neurons)
    across = max_cosine(neurons, case.tensor("in_neuron_weights_other_seed"))
    return {
        "out_max_cosine_per_feature": features,
        "out_feature_recovery_rate": share_above(features, tau),
        "out_max_cosine_similarity_per_neuron": across,
        "out_consistent_neuron_ratio": share_above(across, tau),
    }


test_golden = golden_test(
    "gba",
    {
        "bias_update": Kind(biases, rtol=1e-12, atol=1e-12),
        "sae_step": Kind(step, rtol=1e-9),
        "recovery_metrics": Kind(recovery, rtol=1e-9),
    },
)
