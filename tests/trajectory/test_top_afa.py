"""TopAFA by a Trainer against the page's loop: the choice by norms, the loss of dead features, the projected gradient of unit rows."""

import pytest
import torch

from lit_methods import TopAFA
from trajectories import TOLERANCE, assert_same_logs, page_loop, run


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_run_is_the_loop(dtype):
    torch.manual_seed(0)
    module = TopAFA(width=8, features=200, learning_rate=1e-2, dead_after=2).to(dtype)
    weights = [one.detach().clone().requires_grad_() for one in (module.encoder, module.decoder, module.decoder_bias)]
    batches = [{"activation": torch.randn(3, 8, dtype=dtype)} for _ in range(6)]
    logs = run(module, batches)

    wanted, inactive = page_loop("top_afa").train(*weights, batches, learning_rate=1e-2, dead_after=2)
    assert any(step["sae/aux"] > 0 for step in wanted), "some features die"
    assert_same_logs(logs, wanted, TOLERANCE[dtype])
    for ours, theirs in zip((module.encoder, module.decoder, module.decoder_bias), weights, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert torch.equal(module.num_batches_not_active, inactive)
