"""SaRA by a Trainer against the page's loop: selection, the penalty of rank, re-selection."""

import copy

import pytest
import torch

from lit_methods.callbacks import SaRA
from trajectories import TOLERANCE, PlainClassifier, assert_same_logs, assert_same_state, both_dtypes, labelled, page_loop, run, small_mlp


@pytest.mark.parametrize("dtype", both_dtypes, ids=str)
def test_a_run_is_the_loop(dtype):
    network, batches = small_mlp(dtype), labelled(6, dtype)
    module = PlainClassifier(copy.deepcopy(network), lambda parameters: torch.optim.AdamW(parameters, lr=0.03))
    options = {"rank_weight": 0.05, "rank_min_size": 7, "rank_min_entries": 10}
    logs = run(module, batches, [SaRA(threshold=0.15, progressive_steps=3, **options)])

    before = copy.deepcopy(network)
    wanted = page_loop("sara").train(network, batches, 0.15, 3, 0.03, 0.05, 7, 10)
    assert_same_logs(logs, wanted, TOLERANCE[dtype])
    assert_same_state(module.network, network, TOLERANCE[dtype])
    for (name, weight), old in zip(network.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(weight != old, old.abs() < 0.15), f"{name}: exactly the chosen entries have moved"
    assert wanted[2]["sara/active_share"] == 1 > wanted[3]["sara/active_share"] > 0
    assert wanted[0]["sara/rank_loss"] > 0
