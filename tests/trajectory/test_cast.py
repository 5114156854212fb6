"""CAST by a Trainer against the page's loop: refreshes of the masks, scales, the dense teacher, the end."""

import copy

import pytest
import torch

from lit_methods.callbacks import CAST
from lit_methods.callbacks.sparsity.masks import is_nm
from trajectories import TOLERANCE, PlainClassifier, assert_same_logs, assert_same_state, both_dtypes, labelled, page_loop, run, small_mlp


@pytest.mark.parametrize("dtype", both_dtypes, ids=str)
@pytest.mark.filterwarnings("ignore:CAST removes weights that are not small")
def test_a_run_is_the_loop(dtype):
    network, batches = small_mlp(dtype), labelled(7, dtype)
    teacher = copy.deepcopy(network)
    module = PlainClassifier(copy.deepcopy(network), lambda parameters: torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.0))
    cast = CAST(n=2, m=4, targets=["network.0", "network.2"], l1_decay=0.1, mask_interval=2, probe_interval=0)
    logs = run(module, batches, [cast])

    wanted = page_loop("cast").train(network, teacher, ["0.weight", "2.weight"], batches, 2, 4, lr=0.05, l1_decay=0.1, mask_interval=2)
    assert_same_logs(logs, wanted, TOLERANCE[dtype])
    assert_same_state(module.network, network, TOLERANCE[dtype])
    assert is_nm(network[2].weight, 2, 4)
    assert wanted[-1]["cast/kl"] > 1e-4, "the teacher stays behind"
