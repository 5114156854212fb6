"""ImbalancedRegression with ConR and FDS by a Trainer against the page's loop: two views, calibrated features, statistics of epochs."""

import copy

import pytest
import torch

from lit_methods import ImbalancedRegression
from lit_methods.callbacks import FDS, ConR
from trajectories import TOLERANCE, assert_same_logs, assert_same_state, both_dtypes, page_loop, run, small_mlp


@pytest.mark.parametrize("dtype", both_dtypes, ids=str)
def test_a_run_is_the_loop(dtype):
    generator = torch.Generator().manual_seed(0)
    batches = [
        {
            **{name: torch.randn(16, 8, generator=generator).to(dtype) for name in ("image", "view_1", "view_2")},
            "target": torch.randint(0, 12, (16,), generator=generator).to(dtype),
            "weight": (0.5 + torch.rand(16, generator=generator)).to(dtype),
        }
        for _ in range(3)
    ]
    backbone, regressor = small_mlp(dtype, (8, 16, 6)), torch.nn.Linear(6, 1, dtype=dtype)
    with torch.no_grad():
        regressor.bias.fill_(6.0)
    module = ImbalancedRegression(copy.deepcopy(backbone), copy.deepcopy(regressor), learning_rate=0.01)
    fds = FDS(last_bucket=11)
    conr = ConR(weights="weight", views=["view_1", "view_2"], window=2.0, weight=0.5)
    logs = run(module, batches, [fds, conr], max_epochs=3)

    optimizer = torch.optim.Adam([*backbone.parameters(), *regressor.parameters()], lr=0.01)
    wanted, state = page_loop("conr").train(backbone, regressor, optimizer, batches, 3, last_bucket=11, beta=0.5, window=2.0)
    assert_same_logs(logs, wanted, TOLERANCE[dtype])
    assert_same_state(module.backbone, backbone, TOLERANCE[dtype])
    assert_same_state(module.regressor, regressor, TOLERANCE[dtype])
    assert_same_state(fds.state_dict(), vars(state), 1e-6)  # kept in float32
    assert all(step["conr/loss"] > 0 for step in wanted)
