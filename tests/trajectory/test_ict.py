"""ConsistencyTraining by a Trainer against the page's loop: iCT through doublings of its levels, CT with its averaged teacher."""

import copy
import math

import pytest
import torch

from lit_methods import ConsistencyTraining
from lit_methods.consistency_models.networks import NoiseMLP
from lit_methods.seeds import own_seed
from trajectories import TOLERANCE, assert_same_logs, assert_same_state, page_loop, run

CT = {"curriculum": "square_root", "levels": "uniform", "metric": "l2", "weight": "one", "teacher": "ema"}


def draws_of(step):
    """The run's own random numbers."""
    return torch.Generator().manual_seed(own_seed(f"ConsistencyTraining 0 {step}", 0))


@pytest.mark.parametrize(("settings", "s0", "s1"), [({}, 4, 16), (CT, 2, 20)], ids=["ict", "ct"])
def test_a_run_is_the_loop(settings, s0, s1):
    torch.manual_seed(0)
    network, batches = NoiseMLP(width=16, depth=2), [{"image": torch.randn(8, 2)} for _ in range(7)]
    module = ConsistencyTraining(copy.deepcopy(network), s0=s0, s1=s1, learning_rate=1e-2, grid=0, **settings)
    logs = run(module, batches)

    teacher = copy.deepcopy(network) if settings else None
    optimizer = torch.optim.RAdam(network.parameters(), lr=1e-2)
    wanted = page_loop("ict").train(network, optimizer, batches, draws_of, s0, s1, 0.00054 * math.sqrt(2), teacher)
    assert len({step["consistency/levels"] for step in wanted}) >= 3, "the curriculum goes on"
    assert_same_logs(logs, wanted, TOLERANCE[torch.float32])
    assert_same_state(module.network, network, TOLERANCE[torch.float32])
    if teacher is not None:
        assert_same_state(module.teacher_network, teacher, TOLERANCE[torch.float32])
