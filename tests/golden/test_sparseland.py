"""The sparsity report's measures; see tests/golden/data/sparseland/README.md for the origin of each kind.

Costs of networks go through the counter: the adapter builds the network that a case describes, and runs it.
"""

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from golden import GoldenCase, Kind, golden_test
from lit_methods.callbacks.sparsity.cost import theoretical_cost
from lit_methods.callbacks.sparsity.density import expected_nonzeros, layer_density, proportional_densities
from lit_methods.callbacks.sparsity.dynamics import itop_rate, mask_change, union
from lit_methods.callbacks.sparsity.flops import count_macs, gradual_training_flops, training_flops
from lit_methods.callbacks.sparsity.schedules import cubic_sparsity
from lit_methods.callbacks.sparsity.store import prunable_weights


def erk_density(case: GoldenCase) -> dict[str, Any]:
    shapes = [[size for size in row if size] for row in case.arrays["in_layer_shapes"].tolist()]
    density = layer_density(shapes, case.hp("density"), "erk", power=case.hp("power"))
    return {
        "out_layer_density": density,
        "out_layer_is_dense": proportional_densities(shapes, case.hp("density"), "erk", case.hp("power"))[1],
        "out_layer_expected_nonzeros": expected_nonzeros([int(np.prod(shape)) for shape in shapes], density),
    }


def itop_and_stability(case: GoldenCase) -> dict[str, Any]:
    layers = {str(index): case.tensor(f"in_masks_{index}") for index in range(case.hp("n_layers"))}
    history = [{name: masks[update] for name, masks in layers.items()} for update in range(case.hp("n_updates"))]
    seen: dict[str, Tensor] = {}
    explored, density = [], []
    for masks in history:
        seen = union(seen, masks)
        explored.append(itop_rate(seen))
        density.append(itop_rate(masks)[0])
    changes = [mask_change(before, after) for before, after in pairwise(history)]
    return {
        "out_itop_rate_total": [total for total, _ in explored],
        "out_itop_rate_per_layer": [list(each.values()) for _, each in explored],
        "out_density_total": density,
        "out_jaccard_consecutive": [change.jaccard for change in changes],
        "out_changed_fraction_consecutive": [change.changed for change in changes],
        "out_survival_fraction_consecutive": [change.survival for change in changes],
        "out_jaccard_first_last": mask_change(history[0], history[-1]).jaccard,
    }


class Convolutions(nn.Module):
    """Convolutions one after the other, global mean, linear."""

    def __init__(self, rows: list[list[int]], classes: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(inside * groups, out, (kh, kw), stride, pad, dilation, groups, bias=False)
            for out, inside, kh, kw, stride, pad, groups, dilation in rows
        )
        self.head = nn.Linear(rows[-1][0], classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        self.maps = []
        for conv in self.convs:
            x = conv(x)
            self.maps.append(x.shape[2:])
        return self.head(x.mean((2, 3)))


class Block(nn.Module):
    """Attention and MLP, without biases."""

    def __init__(self, width: int, mlp_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.fc1, self.fc2 = nn.Linear(width, mlp_width, bias=False), nn.Linear(mlp_width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(self.fc1(x))


class Transformer(nn.Module):
    """Patch embedding per token, blocks, head on the first token."""

    def __init__(self, case: GoldenCase) -> None:
        super().__init__()
        width = case.hp("width")
        self.embed = nn.Linear(case.hp("patch_dim"), width, bias=False)
        heads = case.hp("heads") if width % case.hp("heads") == 0 else 1  # their number plays no part
        self.blocks = nn.ModuleList(Block(width, case.hp("mlp_width"), heads) for _ in range(case.hp("n_blocks")))
        self.head = nn.Linear(width, case.hp("classes"), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


def network_cost(case: GoldenCase, network: nn.Module, example: Tensor) -> dict[str, Any]:
    weights = prunable_weights(network)
    sizes = [weight.numel() for weight in weights.values()]
    density = layer_density([weight.shape for weight in weights.values()], case.hp("density"), "erk")
    cost = theoretical_cost(count_macs(network, lambda: network(example), weights), dict(zip(weights, density, strict=True)))
    kept = sum(expected_nonzeros(sizes, density))
    return {
        "out_layer_density": density,
        "out_layer_params": [float(size) for size in sizes],
        "out_layer_shapes": [list(weight.shape) for weight in weights.values()] if isinstance(network, Transformer) else None,
        "out_layer_macs_dense": list(cost.macs_dense.values()),
        "out_layer_macs_sparse": list(cost.macs_sparse.values()),
        "out_attention_macs": cost.attention_macs,
        "out_total_params": float(sum(sizes)),
        "out_total_nonzero_params": kept,
        "out_param_ratio": kept / sum(sizes),
        "out_total_flops_dense": cost.flops_dense,
        "out_total_flops_sparse": cost.flops_sparse,
        "out_flops_ratio": cost.ratio,
        "out_flops_ratio_with_attention": cost.ratio,
        "out_flops_ratio_linear_only": cost.ratio_without_attention,
    }


def cnn_flops(case: GoldenCase) -> dict[str, Any]:
    rows, size = case.arrays["in_conv_layers"].tolist(), (case.hp("image_h"), case.hp("image_w"))
    network = Convolutions(rows, case.hp("classes"))
    found = network_cost(case, network, torch.zeros(1, rows[0][1] * rows[0][6], *size))
    return found | {"out_feature_map_hw": [tuple(size) for size in network.maps]}


def transformer_flops(case: GoldenCase) -> dict[str, Any]:
    return network_cost(case, Transformer(case), torch.zeros(1, case.hp("tokens"), case.hp("patch_dim")))


def training(case: GoldenCase) -> dict[str, Any]:
    dense, sparse, interval = case.hp("dense_forward_flops"), case.hp("sparse_forward_flops"), case.hp("update_interval")
    regimes = {
        "dense": "dense",
        "static_sparse": "static",
        "set": "set",
        "rigl": "rigl",
        "sparse_momentum": "sparse_momentum",
        "ste_dense_backward": "ste",
    }
    found: dict[str, Any] = {f"out_{name}": training_flops(regime, dense, sparse, interval) for name, regime in regimes.items()}
    schedule = [case.hp(f"gmp_{name}") for name in ("begin_step", "end_step", "initial_sparsity", "final_sparsity")]
    steps = case.hp("steps")
    return found | {
        "out_ratio_rigl": found["out_rigl"] / found["out_dense"],
        "out_gmp_sparsity_schedule": [cubic_sparsity(step, *schedule) for step in range(steps)],
        "out_gmp_mean": gradual_training_flops(dense, steps, *schedule),
    }


test_golden = golden_test(
    "sparseland",
    {
        "erk_density": Kind(erk_density, rtol=1e-9),
        "itop_and_stability": Kind(itop_and_stability, rtol=1e-9),
        "cnn_flops": Kind(cnn_flops, rtol=1e-9),
        "transformer_flops": Kind(transformer_flops, rtol=1e-9),
        "training_flops": Kind(training, rtol=1e-9),
    },
)
