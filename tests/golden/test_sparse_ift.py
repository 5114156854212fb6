"""Sparse-IFT against the authors' code; see tests/golden/data/sparse_ift/README.md for the origin of each kind."""

from typing import Any

import torch
from torch import Tensor, nn

from golden import GoldenCase, Kind, golden_test
from lit_methods.callbacks.sparsity.drop_grow import drop_smallest, target_count, update_mask
from lit_methods.callbacks.sparsity.sparse_ift.core import (
    doped_rank,
    drop_schedule,
    factorized_width,
    folded_frobenius,
    parallel_branches,
    wide_width,
    width_factor,
)
from lit_methods.callbacks.sparsity.sparse_ift.surgery import dope, factorize, iso_flop_transform
from lit_methods.tasks.vision.networks import _BasicBlock


def isoflop_dims(case: GoldenCase) -> dict[str, Any]:
    sizes, sparsity, kernel = (case.hp("f_in"), case.hp("f_out")), case.hp("sparsity"), (case.hp("kernel"), case.hp("kernel"))
    if case.hp("family") == "sparse_wide":
        return {"out_dim": wide_width(case.hp("base_width"), sparsity), "out_width_factor": width_factor(sparsity)}
    if case.hp("family") == "sparse_parallel":
        return {"out_dim": parallel_branches(sparsity), "out_width_factor": 1.0}
    if case.hp("family") == "sparse_factorized":
        return {"out_dim": factorized_width(*sizes, sparsity, kernel, case.hp("sparse_u_only")), "out_width_factor": 1.0}
    assert case.hp("family") == "sparse_doped"
    return {"out_dim": doped_rank(*sizes, sparsity, kernel), "out_width_factor": 1.0}


def mask_update(case: GoldenCase) -> dict[str, Tensor]:
    weight, mask, score = (case.tensor(f"in_{name}") for name in ("weight", "mask", "grow_score"))
    fraction, target = case.hp("drop_fraction"), target_count(mask.numel(), case.hp("sparsity"))
    new = update_mask(weight, mask, score, fraction, target)
    return {"out_mask": new, "out_grown": new & ~drop_smallest(weight, mask, fraction), "out_weight_after": weight * new}


def schedule(case: GoldenCase) -> dict[str, Any]:
    anneal, _, rate = case.hp("anneal").partition("_")
    steps, fractions = drop_schedule(
        case.hp("total_updates"),
        case.hp("frequency"),
        case.hp("begin_iteration"),
        case.hp("end_fraction"),
        case.hp("drop_fraction"),
        anneal,
        float(rate or 0),
    )
    return {"out_update_steps": steps, "out_drop_fractions": fractions}


def load(module: nn.Module, case: GoldenCase, names: dict[str, str]) -> nn.Module:
    """Fill a module, in eval mode and the case's dtype; all but the counters of its norms must be there."""
    arrays = {ours: case.tensor(theirs) for ours, theirs in names.items()}
    missing, unknown = module.to(case.tensor("in_x").dtype).load_state_dict(arrays, strict=False)
    assert not unknown
    assert all(name.endswith("num_batches_tracked") for name in missing), missing
    return module.eval()


def norm(ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}.{part}": f"{theirs}_{part}" for part in ("weight", "bias", "running_mean", "running_var")}


@torch.no_grad()
def block_forward(case: GoldenCase) -> dict[str, Tensor]:
    inputs, outputs, stride, sparsity = (case.hp(name) for name in ("f_in", "f_out", "stride", "sparsity"))
    if case.hp("family") == "sparse_parallel":
        block = _BasicBlock(inputs, outputs, stride, projection=True)
        count = len(iso_flop_transform(block, "parallel", sparsity, targets=["conv1", "conv2"]).layers[0].sparse)
        names = {}
        for part in (1, 2):
            for j in range(count):
                names[f"conv{part}.branches.{j}.weight"] = f"in_conv{part}_list_{j}_weight"
                names |= norm(f"conv{part}.norms.{j}", f"in_bn{part}_list_{j}")
        if "in_shortcut_0_weight" in case.arrays:
            names |= {"downsample.0.weight": "in_shortcut_0_weight"} | norm("downsample.1", "in_shortcut_1")
        return {"out_y": load(block, case, names)(case.tensor("in_x"))}
    layer = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    names = {"u.weight": "in_U_conv3x3_weight", "v.weight": "in_V_conv1x1_weight"}
    if case.hp("family") == "sparse_doped":
        module: nn.Module = load(dope(layer, sparsity), case, names | {"sparse.weight": "in_sparse_conv_weight"})
    else:
        bn = norm("norm", "in_U_conv3x3_bn") if case.hp("uv_layer") != "linear" else {}
        module = load(factorize(layer, sparsity, case.hp("uv_layer")), case, names | bn)
    found = {"out_y": module(case.tensor("in_x"))}
    if case.hp("uv_layer") == "linear":
        found["out_frobenius_sq"] = folded_frobenius(module.u.weight, module.v.weight)
    return found


test_golden = golden_test(
    "sparse_ift",
    {
        "isoflop_dims": Kind(isoflop_dims),
        "mask_update": Kind(mask_update),
        "drop_schedule": Kind(schedule, rtol=1e-9, atol=0),
        "block_forward": Kind(block_forward, rtol=1e-4, atol=1e-5),
    },
)
