"""GroupBiasAdaptation on a tied autoencoder by a Trainer against the page's loop, through three updates of the biases."""

import pytest
import torch

from lit_methods import SparseAutoencoder
from lit_methods.callbacks import GroupBiasAdaptation
from trajectories import TOLERANCE, assert_same_logs, assert_same_state, both_dtypes, page_loop, run


@pytest.mark.parametrize("jump", [True, False])
@pytest.mark.parametrize("dtype", both_dtypes, ids=str)
def test_a_run_is_the_loop(dtype, jump):
    torch.manual_seed(0)
    options = {"tied": True, "output_scale": 0.5, "loss": "half_sum", "renormalize": "after", "aux_coeff": 0.0}
    module = SparseAutoencoder(8, 20, "gba", {"jump": jump}, learning_rate=0.02, **options).to(dtype)
    batches = list((torch.randn(7, 30, 8) / 8**0.5).to(dtype))
    weights = {name: value.detach().clone() for name, value in module.state_dict().items()}
    logs = run(module, batches, [GroupBiasAdaptation(3, 0.4, 0.02, 0.2, 0.2, every_n_steps=2)])

    trained = {name: weights[name].requires_grad_() for name in ("decoder", "output_scale", "decoder_bias")}
    optimizer = torch.optim.Adam(trained.values(), lr=0.02, betas=(0.9, 0.99))
    settings = {"groups": 3, "htf": 0.4, "ltf": 0.02, "gamma": 0.2, "every": 2}
    wanted = page_loop("gba").train(**trained, bias=weights["encoder_bias"], optimizer=optimizer, batches=batches, jump=jump, **settings)
    assert_same_logs(logs, wanted, TOLERANCE[dtype])
    ours = {name: module.state_dict()[name] for name in (*trained, "encoder_bias")}
    assert_same_state(ours, {**trained, "encoder_bias": weights["encoder_bias"]}, TOLERANCE[dtype])
    assert (weights["encoder_bias"] < 0).any()
    assert "gba/dead" in wanted[-1]
