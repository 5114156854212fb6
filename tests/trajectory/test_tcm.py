"""TCM by a Trainer against the page's loop."""

import copy

import pytest
import torch

from lit_methods.callbacks import TCM
from trajectories import TOLERANCE, PlainClassifier, assert_same_logs, assert_same_state, both_dtypes, labelled, page_loop, run, small_mlp


@pytest.mark.parametrize("dtype", both_dtypes, ids=str)
def test_a_run_is_the_loop(dtype):
    network, batches = torch.nn.Sequential(small_mlp(dtype, (8, 16, 6)), torch.nn.Linear(6, 4, dtype=dtype)), labelled(4, dtype)
    module = PlainClassifier(copy.deepcopy(network), lambda parameters: torch.optim.Adam(parameters, lr=0.02))
    logs = run(module, batches, [TCM("network.0", margin_neg=0.3, weight_neg=2.0, weight=0.5)])

    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    wanted = page_loop("tcm").train(network[0], network[1], optimizer, batches, 0.5, margin_neg=0.3, weight_neg=2.0)
    assert_same_logs(logs, wanted, TOLERANCE[dtype])
    assert_same_state(module.network, network, TOLERANCE[dtype])
    assert all(step["tcm/hard_negatives"] > 0 for step in wanted)
