"""SSVI by a Trainer against the page's loop: noise, KL term with its warm-up, and updates of the subspace in the place of SGD's steps."""

import copy

import pytest
import torch

from lit_methods.callbacks import SSVI
from trajectories import TOLERANCE, PlainClassifier, assert_same_logs, assert_same_state, both_dtypes, labelled, page_loop, run, small_mlp


@pytest.mark.parametrize("dtype", both_dtypes, ids=str)
def test_a_run_is_the_loop(dtype):
    network, batches = small_mlp(dtype), labelled(4, dtype)
    module = PlainClassifier(copy.deepcopy(network), lambda parameters: torch.optim.SGD(parameters, 0.05, momentum=0.9, weight_decay=5e-4))
    ssvi = SSVI(0.3, prior_std=0.1, kl_scale=0.05, interval=2, train_samples=32, samples=0)
    logs = run(module, batches, [ssvi], max_epochs=3)

    options = {"density": 0.3, "prior_std": 0.1, "kl_scale": 0.05, "interval": 2, "lr": 0.05}
    wanted = page_loop("ssvi").train(network, batches, 32, 3, **options)
    assert_same_logs(logs, wanted, TOLERANCE[dtype])
    assert_same_state(module.network, network, TOLERANCE[dtype])
    assert list(ssvi.updates) == [2, 4, 6, 8]
    assert ssvi.history.ever["network.2.weight"].sum() > network[2].mask.sum(), "the subspace has moved"
