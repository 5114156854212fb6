"""Random pruning against the authors' code; see tests/golden/data/random_pruning/README.md for the origin of each kind."""

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from golden import GoldenCase, Kind, golden_test
from lit_methods.callbacks.sparsity.density import layer_density
from lit_methods.callbacks.sparsity.random_pruning import REMOVED, ScoreMethod, layer_scores
from lit_methods.callbacks.sparsity.scores import kept_shares


def density(case: GoldenCase) -> dict[str, Any]:
    shapes = [[size for size in row if size] for row in case.arrays["in_shapes"].tolist()]
    found = layer_density(
        shapes,
        case.hp("density"),
        case.hp("method").lower(),
        first=case.hp("first_layer"),
        last=case.hp("last_layer"),
        last_density=case.hp("last_density") or None,  # 0: not used
        exact_budget=False,
    )
    return {"out_density": found}


def network(weights: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        for weight in weights[:-1]:
            x = F.linear(x, weight).relu()
        return F.linear(x, weights[-1]).log_softmax(1)

    return forward


def ratio(case: GoldenCase, method: ScoreMethod, **options: float) -> dict[str, Any]:
    weights = [case.tensor(f"in_weight{index}").requires_grad_() for index in range(case.hp("num_layers"))]
    scores = layer_scores(network(weights), weights, case.tensor("in_x"), case.tensor("in_y").long(), method, **options)
    return {"out_layer_sparsity": [1 - share for share in kept_shares(scores, case.hp("density"), REMOVED[method])]}


def snip_ratio(case: GoldenCase) -> dict[str, Any]:
    return ratio(case, "snip")


def grasp_ratio(case: GoldenCase) -> dict[str, Any]:
    return ratio(case, "grasp", temperature=case.hp("temperature"))


test_golden = golden_test(
    "random_pruning",
    {
        "layer_density": Kind(density, rtol=1e-9),
        "snip_ratio": Kind(snip_ratio, rtol=1e-9),
        "grasp_ratio": Kind(grasp_ratio, rtol=1e-9),
    },
)
