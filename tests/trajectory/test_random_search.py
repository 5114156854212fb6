"""RandomSearch by a Trainer against the page's loop: candidates, their losses, the winner's masks under Adam, and the two other arms."""

import copy

import pytest
import torch

from lit_methods.callbacks import RandomSearch
from trajectories import TOLERANCE, PlainClassifier, assert_same_logs, assert_same_state, both_dtypes, labelled, page_loop, run, small_mlp


@pytest.mark.parametrize("mode", ["search", "random"])
@pytest.mark.parametrize("dtype", both_dtypes, ids=str)
def test_a_run_is_the_loop(dtype, mode):
    network, batches = small_mlp(dtype), labelled(5, dtype)
    module = PlainClassifier(copy.deepcopy(network), lambda parameters: torch.optim.AdamW(parameters, lr=0.02))
    search = RandomSearch(sparsity=0.6, mode=mode, candidates=7, batches=2, logits="network")
    logs = run(module, batches, [search])

    optimizer = torch.optim.AdamW(network.parameters(), lr=0.02)
    layers = [network[0], network[2], network[4]]
    wanted, scores = page_loop("random_search").train(network, layers, optimizer, batches, 0.6, 7, batches[:2], mode)
    assert_same_logs(logs, wanted, TOLERANCE[dtype])
    assert_same_state(module.network, network, TOLERANCE[dtype])
    assert len(search.scores) == len(scores) == (7 if mode == "search" else 0)
    torch.testing.assert_close(search.scores, torch.tensor(scores), rtol=1e-5, atol=0)
    assert (network[0].weight == 0).all(1).sum() == 10  # 16 nodes, 60 % of them gone
