"""SLCT by a Trainer against the page's loop: coupled noise, doublings of the levels with a falling c, the early denoising loss."""

import copy

import torch

from lit_methods import SLCT
from lit_methods.consistency_models.networks import NoiseMLP
from lit_methods.seeds import own_seed
from trajectories import TOLERANCE, assert_same_logs, assert_same_state, page_loop, run


def draws_of(step):
    """The run's own random numbers."""
    return torch.Generator().manual_seed(own_seed(f"ConsistencyTraining 0 {step}", 0))


def test_a_run_is_the_loop():
    torch.manual_seed(0)
    network, batches = NoiseMLP(width=16, depth=2), [{"image": 0.5 * torch.randn(8, 2)} for _ in range(7)]
    module = SLCT(copy.deepcopy(network), s0=4, s1=16, c_initial=0.05, diffusion_weight=2.0, learning_rate=1e-2, grid=0)
    logs = run(module, batches)

    optimizer = torch.optim.RAdam(network.parameters(), lr=1e-2, weight_decay=1e-4, eps=1e-4)
    wanted = page_loop("slct").train(network, optimizer, batches, draws_of, 4, 16, 0.05, 2.0)
    assert len({step["consistency/c"] for step in wanted}) == 3, "c falls as the levels double"
    assert any(step["consistency/early_loss"] > 0 for step in wanted)
    assert_same_logs(logs, wanted, TOLERANCE[torch.float32])
    assert_same_state(module.network, network, TOLERANCE[torch.float32])
