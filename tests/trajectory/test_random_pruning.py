"""RandomPruning by a Trainer against the page's loop: densities by shape, the draw, dead weights under Adam and weight decay."""

import copy

import pytest
import torch

from lit_methods.callbacks import RandomPruning
from lit_methods.seeds import own_seed
from trajectories import TOLERANCE, PlainClassifier, assert_same_logs, assert_same_state, both_dtypes, labelled, page_loop, run, small_mlp


@pytest.mark.parametrize("method", ["erk", "uniform"])
@pytest.mark.parametrize("dtype", both_dtypes, ids=str)
def test_a_run_is_the_loop(dtype, method):
    network, batches = small_mlp(dtype), labelled(5, dtype)
    module = PlainClassifier(copy.deepcopy(network), lambda parameters: torch.optim.AdamW(parameters, lr=0.02))
    logs = run(module, batches, [RandomPruning(density=0.3, method=method)])

    optimizer = torch.optim.AdamW(network.parameters(), lr=0.02)
    generator = torch.Generator().manual_seed(own_seed("random_pruning", 0))
    wanted = page_loop("random_pruning").train(network, [network[0], network[2], network[4]], optimizer, batches, generator, 0.3, method)
    assert_same_logs(logs, wanted, TOLERANCE[dtype])
    assert_same_state(module.network, network, TOLERANCE[dtype])
    assert 0.2 < (network[2].weight != 0).double().mean() < 0.4
