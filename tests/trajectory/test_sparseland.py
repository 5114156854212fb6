"""DynamicSparsity with SparsityReport by a Trainer against the page's loop: masks by ERK, RigL's updates, what the report says of them."""

import copy

import pytest
import torch

from lit_methods.callbacks import DynamicSparsity, SparsityReport
from lit_methods.seeds import own_seed
from trajectories import TOLERANCE, PlainClassifier, assert_same_logs, assert_same_state, both_dtypes, labelled, page_loop, run, small_mlp


@pytest.mark.parametrize("dtype", both_dtypes, ids=str)
def test_a_run_and_its_report_are_the_loop(dtype):
    def optimizer(parameters):
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3)

    network, batches = small_mlp(dtype), labelled(8, dtype)
    module = PlainClassifier(copy.deepcopy(network), optimizer)
    logs = run(module, batches, [SparsityReport(), DynamicSparsity(density=0.3, interval=2)])

    generator = torch.Generator().manual_seed(own_seed("DynamicSparsity", 0))
    loop = page_loop("sparseland")
    wanted, report = loop.train(network, ["0.weight", "2.weight", "4.weight"], optimizer, batches, generator, 0.3, interval=2)
    assert_same_logs(logs, wanted, TOLERANCE[dtype])
    assert_same_state(module.network, network, TOLERANCE[dtype])
    found = module.trainer.callback_metrics
    assert_same_logs([found], [{f"sparsity/{name}": value for name, value in report.items()}], 1e-6)  # logged in float32
    assert report["itop"] > report["density"]
