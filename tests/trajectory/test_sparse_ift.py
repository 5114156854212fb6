"""SparseIFT by a Trainer against the page's loop: the transformation, first masks, RigL's updates with momentum of dead weights."""

import copy

import pytest
import torch

from lit_methods.callbacks import SparseIFT
from lit_methods.seeds import own_seed
from trajectories import TOLERANCE, PlainClassifier, assert_same_logs, assert_same_state, both_dtypes, labelled, page_loop, run, small_mlp


@pytest.mark.parametrize("family", ["wide", "parallel"])
@pytest.mark.parametrize("dtype", both_dtypes, ids=str)
def test_a_run_is_the_loop(dtype, family):
    def optimizer(parameters):
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3)

    network, batches = small_mlp(dtype, (8, 16, 16, 16, 4)), labelled(8, dtype)
    module = PlainClassifier(copy.deepcopy(network), optimizer)
    callback = SparseIFT(0.75, family, network="network", interval=2, drop_fraction=0.4, flops_tolerance=None)
    logs = run(module, batches, [callback])

    generator = torch.Generator().manual_seed(own_seed("SparseIFT", 0))
    wanted = page_loop("sparse_ift").train(network, optimizer, batches, generator, 0.75, family, interval=2, drop_fraction=0.4)
    assert list(callback.updates) == [2, 4]
    assert_same_logs(logs, wanted, TOLERANCE[dtype])
    assert_same_state(module.network, network, TOLERANCE[dtype])
