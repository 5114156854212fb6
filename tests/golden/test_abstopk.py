"""AbsTopK against the golden vectors; see tests/golden/data/abstopk/README.md for the origin of each kind."""

from torch import Tensor

from golden import GoldenCase, Kind, golden_test
from lit_methods.sparse_autoencoders.abstopk.core import (
    PROXIMAL,
    ablate_direction,
    add_direction,
    difference_in_means,
    proximal_map,
    proximal_objective,
)


def prox(case: GoldenCase) -> dict[str, Tensor]:
    u, settings = case.tensor("in_u"), {"lambda_": case.hp("lambda"), "k": case.hp("k")}
    found = {}
    for regulariser, row in PROXIMAL.items():
        z = proximal_map(u, regulariser, **settings)
        found[f"out_{row.activation}"] = z
        found[f"out_objective_{row.activation}"] = proximal_objective(z, u, regulariser, **settings)
    return found


def steering(case: GoldenCase) -> dict[str, Tensor]:
    direction, x = difference_in_means(case.tensor("in_positive"), case.tensor("in_negative")), case.tensor("in_x")
    return {
        "out_direction": direction,
        "out_added": add_direction(x, direction, case.hp("alpha")),
        "out_ablated": ablate_direction(x, direction),
    }


test_golden = golden_test(
    "abstopk",
    {
        "prox": Kind(prox, rtol=1e-12, atol=1e-12),
        "dim_steering": Kind(steering, rtol=1e-9),
    },
)
