"""S2FT by a Trainer against the page's loop: choice, permutation, both kinds of slices, fusing."""

import copy

import pytest
import torch

from lit_methods.callbacks import S2FT
from lit_methods.callbacks.fine_tuning.s2ft.couplings import Coupling
from trajectories import TOLERANCE, PlainClassifier, assert_same_logs, assert_same_state, both_dtypes, labelled, page_loop, run, small_mlp


@pytest.mark.parametrize("dtype", both_dtypes, ids=str)
def test_a_run_is_the_loop(dtype):
    network, batches = small_mlp(dtype), labelled(5, dtype)
    module = PlainClassifier(copy.deepcopy(network), lambda parameters: torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.0))
    s2ft = S2FT(u_ratio=0.3, d_ratio=0.4, couplings=[Coupling("network.2", ["network.0"])])
    logs = run(module, batches, [s2ft])

    before = copy.deepcopy(network)
    wanted = page_loop("s2ft").train(network, batches, 0.3, 0.4)
    assert_same_logs(logs, wanted, TOLERANCE[dtype])
    assert_same_state(module.network, network, TOLERANCE[dtype])
    assert int((before[0].weight != network[0].weight).any(1).sum()) == 4, "int(16 x 0.3) rows have moved"
    assert int((before[2].weight != network[2].weight).any(0).sum()) == 6, "int(16 x 0.4) columns have moved"
