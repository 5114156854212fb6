"""DSnoT and its baselines by a Trainer against the page's loop: dense steps, pruning, steps with the mask."""

import copy

import pytest
import torch

from lit_methods.callbacks import DSnoT, Magnitude, SparseGPT, Wanda
from trajectories import TOLERANCE, PlainClassifier, assert_same_logs, assert_same_state, both_dtypes, labelled, page_loop, run, small_mlp

SWAPS = {"max_cycles": 5, "update_threshold": 0.05}


@pytest.mark.parametrize("dtype", both_dtypes, ids=str)
@pytest.mark.parametrize(
    ("method", "callback"),
    [
        ("dsnot", lambda **how: DSnoT(**how, **SWAPS)),
        ("wanda", Wanda),
        ("sparsegpt", SparseGPT),
        ("magnitude", Magnitude),
    ],
)
@pytest.mark.parametrize("pattern", [None, (2, 4)], ids=str)
def test_a_run_is_the_loop(dtype, method, callback, pattern):
    network, batches = small_mlp(dtype), labelled(6, dtype)
    module = PlainClassifier(copy.deepcopy(network), lambda parameters: torch.optim.AdamW(parameters, lr=0.02))
    text = None if pattern is None else "{}:{}".format(*pattern)
    pruning = callback(sparsity=0.6, pattern=text, samples=24, at_step=2)
    logs = run(module, batches, [pruning])

    optimizer = torch.optim.AdamW(network.parameters(), lr=0.02)
    loop = page_loop("dsnot")
    wanted = loop.train(network, optimizer, batches, batches[:2], method, 0.6, pattern, prune_at=2, **SWAPS)
    assert_same_logs(logs, wanted, TOLERANCE[dtype])
    assert_same_state(module.network, network, TOLERANCE[dtype])
    share = 0.5 if pattern else 0.6
    assert abs((network[2].weight == 0).double().mean() - share) < 0.05
