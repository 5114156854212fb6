"""CIRIM against the authors' code; see tests/golden/data/cirim/README.md for the origin of each kind."""

from typing import Any

import torch
from torch import Tensor

from golden import GoldenCase, Kind, golden_test
from lit_methods.inverse_problems.cirim.core import CIRIMNetwork, RIMBlock, accumulated_loss, indrnn_cell, log_likelihood_gradient
from lit_methods.inverse_problems.mri import Fourier, sense_combine

WEIGHTS = ("conv0", "conv1", "conv2", "rnn0_ih", "rnn1_ih")


def fourier(case: GoldenCase) -> Fourier:
    if "hp_fft_centered" not in case.arrays:
        return Fourier(False, "backward")
    return Fourier(bool(case.hp("fft_centered")), case.hp("fft_normalization"))


def measured(case: GoldenCase) -> tuple[Tensor, Tensor, Tensor]:
    return case.tensor("in_masked_kspace"), case.tensor("in_sensitivity_maps"), case.tensor("in_mask")


def ours(name: str) -> str:
    """The case's name of a weight as our modules have it: ``rnn0_ih_weight`` -> ``rnn0.ih.weight``."""
    for layer in WEIGHTS:
        name = name.replace(f"{layer}_", f"{layer.replace('_', '.')}.")
    return name.replace("rnn0_hh", "rnn0.hh").replace("rnn1_hh", "rnn1.hh")


def llgrad(case: GoldenCase) -> dict[str, Tensor]:
    features = log_likelihood_gradient(case.tensor("in_prediction"), *measured(case), case.hp("sigma"), fourier(case))
    return {"out_features": features}


def indrnn(case: GoldenCase) -> dict[str, Tensor]:
    names = ("x", "h", "ih_weight", "ih_bias", "hh")
    inputs = {name: case.tensor(f"in_{name}").requires_grad_() for name in names}
    found = indrnn_cell(*inputs.values(), dilation=case.hp("dilation"))
    gradients = torch.autograd.grad(found.square().sum(), list(inputs.values()))
    return {"out_h": found} | {f"out_grad_{name}": value for name, value in zip(names, gradients, strict=True)}


def gradients(case: GoldenCase, module: torch.nn.Module, prefix: str = "") -> dict[str, Tensor]:
    found = {}
    parameters = dict(module.named_parameters())
    for key in case.arrays:
        if key.startswith(f"out_grad_{prefix}"):
            gradient = parameters[ours(key.removeprefix(f"out_grad_{prefix}"))].grad
            assert gradient is not None
            found[key] = gradient
    return found


def load(case: GoldenCase, module: torch.nn.Module, prefix: str) -> None:
    weights = {ours(key.removeprefix(prefix)): case.tensor(key) for key in case.arrays if key.startswith(prefix)}
    module.double().load_state_dict(weights)


def rim_block(case: GoldenCase) -> dict[str, Any]:
    consistency = "implicit" if case.hp("no_dc") else "explicit"
    block = RIMBlock(case.hp("filters"), case.hp("time_steps"), consistency=consistency, fourier=fourier(case))
    load(case, block, "in_w_")
    kspace, maps, mask = measured(case)
    found, hidden = block(kspace, maps, mask, sense_combine(kspace, maps, fourier(case)))
    found.square().mean().backward()
    return {"out_predictions": found, "out_hidden_0": hidden[0], "out_hidden_1": hidden[1], **gradients(case, block)}


def cirim_loss(case: GoldenCase) -> dict[str, Any]:
    network = CIRIMNetwork(case.hp("num_cascades"), case.hp("filters"), case.hp("time_steps"), fourier=fourier(case))
    for number, block in enumerate(network.cascades):
        load(case, block, f"in_w_cascade{number}_")
    found = network(*measured(case))
    loss, _ = accumulated_loss(found, case.tensor("in_target"))
    loss.backward()
    return {"out_predictions": found, "out_loss": loss, **gradients(case, network.cascades[0], "cascade0_")}


test_golden = golden_test(
    "cirim",
    {
        "llgrad": Kind(llgrad, rtol=1e-6, atol=1e-8),
        "indrnn": Kind(indrnn, rtol=1e-6, atol=1e-8),
        "rim_block": Kind(rim_block, rtol=1e-6, atol=1e-8),
        "cirim_loss": Kind(cirim_loss, rtol=1e-6, atol=1e-8),
    },
)
