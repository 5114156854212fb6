"""NMSparsity by a Trainer against the page's loop: dense epochs, what flows through pruned weights, stages, fine-tuning, the end."""

import copy

import pytest
import torch

from lit_methods.callbacks import NMSparsity
from lit_methods.callbacks.sparsity.masks import is_nm
from trajectories import TOLERANCE, PlainClassifier, assert_same_logs, assert_same_state, both_dtypes, labelled, page_loop, run, small_mlp


@pytest.mark.parametrize(
    ("recipe", "schedule"),
    [("mdgf_exp", {"dense_epochs": 1, "fine_tune_epochs": 1}), ("sdgf_stepwise", {}), ("srste", {"dense_epochs": 1})],
    ids=["mdgf_exp", "sdgf_stepwise", "srste"],
)
@pytest.mark.parametrize("dtype", both_dtypes, ids=str)
def test_a_run_is_the_loop(dtype, recipe, schedule):
    network, batches = small_mlp(dtype), labelled(2, dtype)
    module = PlainClassifier(copy.deepcopy(network), lambda parameters: torch.optim.Adam(parameters, lr=0.03))
    callback = NMSparsity(1, 4, recipe, ["network.0", "network.2"], decay=0.3, srste_decay=0.1, **schedule)
    logs = run(module, batches, [callback], max_epochs=4)

    optimizer = torch.optim.Adam(network.parameters(), lr=0.03)
    loop = page_loop("progressive_gradient_flow")
    wanted = loop.train(network, ["0.weight", "2.weight"], optimizer, batches, 4, 1, 4, recipe, 0.3, 0.1, **schedule)
    assert_same_logs(logs, wanted, TOLERANCE[dtype])
    assert_same_state(module.network, network, TOLERANCE[dtype])
    assert is_nm(network[2].weight, 1, 4)
