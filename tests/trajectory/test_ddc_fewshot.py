"""PhasicContentDiffusion by a Trainer against the page's loop: source training, fusion, adaptation with and without the pass on details."""

import copy

import pytest
import torch
from torch import nn

from lit_methods import ContentFusionUNet, DirectionalDistributionConsistency, GramStyle, PhasicContentDiffusion
from lit_methods.seeds import own_seed
from trajectories import TOLERANCE, assert_same_logs, assert_same_state, both_dtypes, page_loop, run


class Maps(nn.Module):
    """Two layers of feature maps."""

    def __init__(self, dtype):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 3, 3, dtype=dtype), nn.Conv2d(3, 4, 3, stride=2, dtype=dtype)

    def forward(self, images):
        first = self.first(images).relu()
        return [first, self.second(first).relu()]


@pytest.mark.parametrize("dtype", both_dtypes, ids=str)
def test_a_run_is_the_loop(dtype):
    torch.manual_seed(0)
    network = ContentFusionUNet(1, 16, (1, 2)).to(dtype)
    nn.init.normal_(network.out.weight, std=0.1)
    features, maps = nn.Sequential(nn.Flatten(), nn.Linear(64, 6, dtype=dtype), nn.Tanh()).requires_grad_(False), Maps(dtype)
    maps.requires_grad_(False)
    batches = [{name: torch.rand(3, 1, 8, 8, dtype=dtype) * 2 - 1 for name in ("source", "target", "detail")} for _ in range(8)]
    banks = {"source": torch.rand(7, 1, 8, 8, dtype=dtype) * 2 - 1, "target": torch.rand(4, 1, 8, 8, dtype=dtype) * 2 - 1}
    consistency, style = DirectionalDistributionConsistency(features), GramStyle(maps)
    consistency.fit(features(banks["source"]), features(banks["target"]))
    style.fit_samples([{"image": banks["target"]}], torch.device("cpu"))
    settings = {"source_steps": 2, "fusion_steps": 2, "learning_rate": 1e-4}
    module = PhasicContentDiffusion(copy.deepcopy(network), consistency, style, **settings, seed=5)
    before = copy.deepcopy(network)
    logs = run(module, batches, precision={torch.float32: "32-true", torch.float64: "64-true"}[dtype])

    def generator_of(step):
        return torch.Generator().manual_seed(own_seed(f"PhasicContentDiffusion {step} {step}", 5))

    loop = page_loop("ddc_fewshot")
    wanted = loop.train(network, features, maps, banks, batches, generator_of, **settings)
    assert ["ddc/noise_loss" in step for step in wanted] == [True] * 4 + [False] * 4
    assert ["ddc/detail_loss" in step for step in wanted] == [False] * 5 + [True] * 3
    assert_same_logs(logs, wanted, 1e-6)  # logged in float32
    assert_same_state(module.network, network, TOLERANCE[dtype])
    loop.train(before, features, maps, banks, batches[:4], generator_of, **settings)
    assert_same_state(module.source, before, TOLERANCE[dtype])
