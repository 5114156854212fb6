"""CIRIM by a Trainer against the page's loop: implicit and explicit consistency, past a whole epoch."""

import copy

import pytest
import torch

from lit_methods import CIRIM
from lit_methods.datamodules import PhantomScansDataModule
from trajectories import TOLERANCE, assert_same_logs, assert_same_state, both_dtypes, page_loop, run


@pytest.mark.parametrize("dtype", both_dtypes)
@pytest.mark.parametrize("consistency", ["implicit", "explicit"])
def test_a_run_is_the_loop(consistency, dtype):
    torch.manual_seed(0)
    module = CIRIM(cascades=2, filters=4, time_steps=2, consistency=consistency, checkpointing=dtype == torch.float64).to(dtype)
    data = PhantomScansDataModule(size=16, coils=2, num_train=8, num_val=2, batch_size=2)
    data.setup("fit")
    batches = [
        {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}
        for batch in data.train_dataloader()
    ]
    network = copy.deepcopy(module.network)
    network_before = copy.deepcopy(network.state_dict())
    logs = run(module, batches, gradient_clip_val=0.05)

    wanted = page_loop("cirim").train(network, batches, clip=0.05)
    assert_same_logs(logs, wanted, TOLERANCE[dtype])
    assert_same_state(module.network, network, TOLERANCE[dtype])
    assert any(not torch.equal(network.state_dict()[name], value) for name, value in network_before.items())
