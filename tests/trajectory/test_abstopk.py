"""AbsTopK by a Trainer against the page's loop, with dead features."""

import pytest
import torch

from lit_methods import AbsTopK
from trajectories import TOLERANCE, assert_same_logs, assert_same_state, both_dtypes, page_loop, run


@pytest.mark.parametrize("per_batch", [False, True])
@pytest.mark.parametrize("dtype", both_dtypes, ids=str)
def test_a_run_is_the_loop(dtype, per_batch):
    torch.manual_seed(0)
    module = AbsTopK(8, 40, k=2, per_batch=per_batch, normalize="none", aux_features=3, dead_after=2, learning_rate=0.02).to(dtype)
    batches = list(torch.randn(6, 5, 8).to(dtype))
    weights = {name: module.state_dict()[name].clone().requires_grad_() for name in ("encoder", "decoder", "decoder_bias")}
    logs = run(module, batches)

    optimizer = torch.optim.Adam(weights.values(), lr=0.02, betas=(0.9, 0.99))
    wanted = page_loop("abstopk").train(**weights, optimizer=optimizer, batches=batches, k=2, per_batch=per_batch, most=3, dead_after=2)
    assert_same_logs(logs, wanted, TOLERANCE[dtype])
    assert_same_state({name: module.state_dict()[name] for name in weights}, weights, TOLERANCE[dtype])
    assert wanted[-1]["sae/aux"] > 0
