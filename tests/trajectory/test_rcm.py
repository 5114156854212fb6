"""RCM by a Trainer against the page's loop: the warm-up, then turns of student and critic, simulations, the average."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from lit_methods import RCM
from trajectories import TOLERANCE, assert_same_logs, assert_same_state, both_dtypes, page_loop, run


class Velocity(nn.Module):
    """v(x, 1000 u) of points."""

    def __init__(self, dtype):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 16, dtype=dtype), nn.Tanh(), nn.Linear(16, 2, dtype=dtype))

    def forward(self, x, time):
        return self.layers(torch.cat([x, (time[:, None] / 1000).to(x.dtype)], dim=1))


def draws_of(step):
    """The run's own random numbers."""
    words = np.random.SeedSequence([3, step, 0, 0]).generate_state(2)
    return torch.Generator().manual_seed(int(words[0]) << 31 ^ int(words[1]))


@pytest.mark.parametrize("dtype", both_dtypes, ids=str)
def test_a_run_is_the_loop(dtype):
    torch.manual_seed(3)
    teacher, batches = Velocity(dtype), [{"image": torch.randn(6, 2, dtype=dtype)} for _ in range(9)]
    student = Velocity(dtype)
    rates = {"learning_rate": 1e-3, "critic_learning_rate": 2e-3}
    module = RCM(copy.deepcopy(teacher), copy.deepcopy(student), tangent_warmup=2, student_every=3, max_simulation_steps=2, **rates)
    logs = run(module, batches)

    wanted, critic, average = page_loop("rcm").train(teacher, student, batches, draws_of, **rates, warmup=2, every=3, max_steps=2)
    assert {name for step in wanted for name in step} == {"rcm/consistency_loss", "rcm/dmd_loss", "rcm/critic_loss"}
    assert_same_logs(logs, wanted, 1e-6)  # logged in float32
    for ours, theirs in ((module.student, student), (module.critic, critic), (module.average, average)):
        assert_same_state(ours, theirs, TOLERANCE[dtype])
