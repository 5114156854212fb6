"""IterativeSoftShrinkage by a Trainer against the page's loop: shrinking steps, the switch, masked steps."""

import copy

import pytest
import torch

from lit_methods.callbacks import IterativeSoftShrinkage
from trajectories import TOLERANCE, PlainClassifier, assert_same_logs, assert_same_state, both_dtypes, labelled, page_loop, run, small_mlp


@pytest.mark.parametrize("dtype", both_dtypes, ids=str)
def test_a_run_is_the_loop(dtype):
    network, batches = small_mlp(dtype), labelled(7, dtype)
    module = PlainClassifier(copy.deepcopy(network), lambda parameters: torch.optim.Adam(parameters, lr=0.02))
    logs = run(module, batches, [IterativeSoftShrinkage(pr=0.7, ratio=0.9, prune_iters=4)])

    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    wanted = page_loop("issp").train(network, [network[0], network[2], network[4]], optimizer, batches, 0.7, 0.9, prune_iters=4)
    assert_same_logs(logs, wanted, TOLERANCE[dtype])
    assert_same_state(module.network, network, TOLERANCE[dtype])
    assert (network[2].weight == 0).sum() == 180, "0.7 of 256, rounded up"
