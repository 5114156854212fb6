"""DualLoRAVSRModule by a Trainer against the page's loop, through consistency, detail and consistency again."""

import copy

import pytest
import torch

from lit_methods import (
    CorrelationFlow,
    CrossFrameRetrieval,
    DualLoRAVSRModule,
    FeatureDistance,
    RandomFeatures,
    SmallBackbone,
    StageSchedule,
    StepUNet,
)
from lit_methods.seeds import own_seed
from trajectories import TOLERANCE, assert_same_logs, assert_same_state, both_dtypes, page_loop, run


def draws_of(step):
    """The run's own steps and noise of score distillation: one process, clips of 2, latents of 12 x 4 x 4."""
    generator = torch.Generator().manual_seed(own_seed(f"DualLoRAVSRModule step {step} batch {step}", 0))
    return torch.randint(20, 500, (2,), generator=generator), torch.randn(2, 12, 4, 4, generator=generator)


@pytest.mark.parametrize("dtype", both_dtypes, ids=str)
def test_a_run_is_the_loop(dtype):
    torch.manual_seed(0)
    network = StepUNet(12, channels=8, multipliers=(1, 1))
    torch.nn.init.normal_(network.out[-1].weight, std=0.1)
    schedule = StageSchedule(0, 2, 1, 1, 1.0, 0.1, 0.01, 5.0)
    module = DualLoRAVSRModule(
        SmallBackbone(network), CrossFrameRetrieval(12, 2, 4, 10.0), schedule, rank=2, learning_rate=1e-2, weight_decay=0.1
    ).to(dtype)
    unet, retrieval, backbone = (copy.deepcopy(part) for part in (module.unet, module.retrieval, module.backbone.module))
    batches = [{name: (torch.rand(2, 3, 3, 8, 8) * 2 - 1).to(dtype) for name in ("lq", "gt")} for _ in range(5)]
    logs = run(module, batches)
    assert [round(float(entry["dloral/stage"])) for entry in logs] == [0, 1, 1, 0, 1]

    loop = page_loop("dloral")
    parameters = [p for name, p in unet.named_parameters() if name in unet.trained_names()]
    optimizer = torch.optim.AdamW([*parameters, *retrieval.parameters()], lr=1e-2, weight_decay=0.1)
    distance = FeatureDistance(RandomFeatures()).to(dtype)
    wanted = loop.train(unet, retrieval, backbone, CorrelationFlow(), distance, schedule, optimizer, batches, draws_of)
    assert_same_logs(logs, wanted, TOLERANCE[dtype])
    assert_same_state(module.unet, unet, TOLERANCE[dtype])
    assert_same_state(module.retrieval, retrieval, TOLERANCE[dtype])
