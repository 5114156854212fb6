"""Random search against an independent script of its equations; see tests/golden/data/random_search/README.md."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from golden import GoldenCase, Kind, golden_test
from lit_methods.callbacks.sparsity.channels import ChannelGroup, Part, node_masks, removed_entries
from lit_methods.callbacks.sparsity.random_search import core
from lit_methods.claims.verdict import welch


def node_search(case: GoldenCase) -> dict[str, Any]:
    layers = case.hp("n_hidden_layers") + 1
    weights = [case.tensor(f"in_weight_{index}") for index in range(layers)]
    biases = [case.tensor(f"in_bias_{index}") for index in range(layers)]
    x, y = case.tensor("in_x"), case.tensor("in_y").long()
    nodes = [case.tensor(f"in_candidate_node_masks_{index}").bool() for index in range(layers - 1)]
    modules = {str(index): torch.nn.Linear(*reversed(weight.shape)) for index, weight in enumerate(weights)}
    groups = [
        ChannelGroup((), width, (Part(str(index), "out", width, 0, 1), Part(str(index + 1), "in", width, 0, 1)), ())
        for index, width in enumerate(len(weight) for weight in weights[:-1])
    ]

    def removed(candidate: int) -> dict[Any, Tensor]:
        return removed_entries((group, keep[candidate]) for group, keep in zip(groups, nodes, strict=True))

    def masks(candidate: int) -> dict[str, Tensor]:
        whole = {f"{index}.weight": torch.ones_like(weight, dtype=torch.bool) for index, weight in enumerate(weights)}
        return whole | node_masks(modules, removed(candidate))

    def logits(values: dict[str, Tensor]) -> Tensor:
        out = x
        for index, bias in enumerate(biases):
            out = F.linear(out, values[f"{index}.weight"], bias)
            out = out.relu() if index < layers - 1 else out
        return out

    start = {f"{index}.weight": weight for index, weight in enumerate(weights)}
    candidates = range(case.hp("n_candidates"))
    losses = core.candidate_scores(start, map(masks, candidates), lambda values: F.cross_entropy(logits(values), y))
    best = int(core.best_so_far(losses)[1][-1])
    chosen = masks(best)
    kept = [*(keep[best] for keep in nodes), torch.ones(len(biases[-1]), dtype=torch.bool)]
    effective, total = core.effective_parameters(chosen.values(), kept), sum(value.numel() for value in (*weights, *biases))
    return {
        "out_losses": losses,
        "out_best_index": best,
        "out_logits_best": logits({name: value * chosen[name] for name, value in start.items()}),
        "out_effective_parameters": effective,
        "out_total_parameters": total,
        "out_parameter_sparsity": 1 - effective / total,
        **{f"out_weight_mask_{index}": chosen[f"{index}.weight"] for index in range(layers)},
        **{f"out_best_node_mask_{index}": keep[best] for index, keep in enumerate(nodes)},
    }


def best_so_far(case: GoldenCase) -> dict[str, Any]:
    losses, places = core.best_so_far(case.tensor("in_losses"))
    return {"out_best_loss_per_iteration": losses, "out_best_index_per_iteration": places}


def neutral_test(case: GoldenCase) -> dict[str, Any]:
    found = welch(case.arrays["in_searched_metric"].tolist(), case.arrays["in_random_metric"].tolist())
    return {"out_mean_difference": found.mean, "out_standard_error": found.error, "out_welch_t": found.t, "out_welch_df": found.df}


test_golden = golden_test(
    "random_search",
    {
        "node_search": Kind(node_search, rtol=1e-9),
        "best_so_far": Kind(best_so_far, rtol=1e-9),
        "neutral_test": Kind(neutral_test, rtol=1e-9),
    },
)
