"""DSL against the authors' code; see tests/golden/data/dsl_recommendation/README.md for the origin of each kind."""

import numpy as np
import torch
from torch import Tensor

from golden import GoldenCase, Kind, golden_test
from lit_methods.callbacks.sparsity import dsl_recommendation as dsl
from lit_methods.tasks.recommendation.lightgcn import lightgcn_loss, normalized_adjacency, propagate
from lit_methods.tasks.recommendation.metrics import ranking_metrics


def mask_update(case: GoldenCase) -> dict[str, Tensor]:
    weight, mask, gradient = (case.tensor(f"in_{name}") for name in ("weight", "mask", "grad"))
    assert case.hp("growth") == "gradient"
    uniform = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0))
    new, removed = dsl.update_mask(weight, mask, gradient.abs(), case.hp("update_ratio"), uniform, case.hp("death"), gradient)
    return {"out_mask": new, "out_num_pruned": removed, "out_weight": weight * new}


def update_ratio(case: GoldenCase) -> dict[str, Tensor]:
    arguments = case.hp("total_steps"), case.hp("initial_ratio"), case.hp("min_ratio")
    steps = range(1, len(case.expected["out_ratio"]) + 1)
    return {"out_ratio": torch.tensor([dsl.update_ratio(step, *arguments) for step in steps], dtype=torch.float64)}


def ranking(case: GoldenCase) -> dict[str, Tensor]:
    found = ranking_metrics(case.tensor("in_scores"), case.tensor("in_train_mask"), case.tensor("in_test_mask"), case.hp("k"))
    counted = found.pop("counted")  # the mean over users is torchmetrics' in a run
    return {f"out_{name}": values[counted].mean() for name, values in found.items()}


def loss(case: GoldenCase) -> dict[str, Tensor]:
    table, users, items = case.tensor("in_embedding").requires_grad_(), case.hp("num_users"), case.hp("num_items")
    adjacency = normalized_adjacency(case.tensor("in_user_idx"), case.tensor("in_item_idx"), users, items, table.dtype)
    final = propagate(adjacency, table, case.hp("num_layers"))
    batch = [case.tensor(f"in_batch_{name}") for name in ("user", "pos_item", "neg_item")]
    losses = lightgcn_loss(table, final, *batch, users, case.hp("reg_weight"))
    return {
        "out_final_embedding": final,
        "out_bpr_loss": losses["bpr"],
        "out_reg_loss": losses["reg"],
        "out_loss": losses["total"],
        "out_grad_embedding": torch.autograd.grad(losses["total"], table)[0],
    }


def close_for_its_dtype(case: GoldenCase, key: str, ours: np.ndarray, reference: np.ndarray) -> None:
    """1e-8 of the largest entry in float64, 1e-5 in float32."""
    rtol = 1e-8 if case.arrays["in_embedding"].dtype == np.float64 else 1e-5
    assert ours.shape == reference.shape
    error, scale = np.abs(ours.astype(np.float64) - reference).max(), np.abs(reference).max()
    assert error <= rtol * scale + 1e-12, f"{key}: largest error {error:.3e} > {rtol * scale:.3e}"


test_golden = golden_test(
    "dsl_recommendation",
    {
        "mask_update": Kind(mask_update),
        "update_ratio": Kind(update_ratio, rtol=1e-7, atol=0),
        "topk_metrics": Kind(ranking, rtol=1e-9, atol=1e-12),
        "lightgcn_loss": Kind(loss, compare=close_for_its_dtype),
    },
)
