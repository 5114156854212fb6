"""AdaWAC by a Trainer against the page's loop: two views, the table of weights, samples that come again."""

import copy

import pytest
import torch
from torch import nn

from lit_methods.callbacks import AdaWAC
from trajectories import TOLERANCE, PlainClassifier, assert_same_logs, assert_same_state, both_dtypes, page_loop, run


@pytest.mark.parametrize("mode", ["adawac", "trim-train"])
@pytest.mark.parametrize("dtype", both_dtypes, ids=str)
def test_a_run_is_the_loop(dtype, mode):
    generator = torch.Generator().manual_seed(0)

    def labels():
        found = torch.randint(0, 3, (4, 8, 8), generator=generator)
        found[0], found[1, 0] = 0, 255  # a slice without an organ, pixels that don't count
        return found

    batches = [
        {
            **{name: torch.randn(4, 1, 8, 8, generator=generator).to(dtype) for name in ("image", "image_2")},
            "label": labels(),
            "label_2": labels(),
            "index": torch.randperm(6, generator=generator)[:4],
        }
        for _ in range(4)
    ]
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1)).to(dtype)
    module = PlainClassifier(copy.deepcopy(network), lambda parameters: torch.optim.Adam(parameters, lr=0.05))
    callback = AdaWAC(features="network.0", num_samples=6, mode=mode, rate=3.0, dice_ratio=0.3)
    logs = run(module, batches, [callback])

    optimizer = torch.optim.Adam(network.parameters(), lr=0.05)
    wanted, table = page_loop("adawac").train(network, network[0], optimizer, batches, 6, mode=mode, rate=3.0, dice_ratio=0.3)
    assert_same_logs(logs, wanted, TOLERANCE[dtype])
    assert_same_state(module.network, network, TOLERANCE[dtype])
    assert_same_state({"table": callback.table.rows}, {"table": table}, 1e-6)  # kept in float32
    assert (mode == "adawac") == bool((table - 0.5).abs().max() > 0.05)
