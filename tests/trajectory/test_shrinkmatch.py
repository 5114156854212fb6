"""ShrinkMatch by a Trainer against the page's loop: the queue of means, certain and uncertain images, the running share, the schedule."""

import copy

import torch
from torch import nn

from lit_methods import ShrinkMatch
from trajectories import TOLERANCE, assert_same_logs, assert_same_state, page_loop, run


def semi_batches(count, labelled=4, unlabelled=10, classes=5):
    """Batches of SemiSupervisedDataModule's form, of points."""
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "labelled": {
                "image": torch.randn(labelled, 6, generator=generator),
                "label": torch.randint(classes, (labelled,), generator=generator),
                "index": torch.arange(labelled),
            },
            "unlabelled": {
                "weak": 3 * torch.randn(unlabelled, 6, generator=generator),
                "strong": [torch.randn(unlabelled, 6, generator=generator)],
            },
        }
        for _ in range(count)
    ]


def test_a_run_is_the_loop():
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8), nn.BatchNorm1d(8))
    settings = {"threshold": 0.4, "queue_length": 3, "ratio_momentum": 0.8}
    module = ShrinkMatch(backbone, 8, 5, learning_rate=0.1, no_decay_norms=False, **settings)
    backbone, head, auxiliary = copy.deepcopy((module.backbone, module.head, module.auxiliary))
    batches = semi_batches(6)
    logs = run(module, batches)

    parameters = [parameter for part in (backbone, head, auxiliary) for parameter in part.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    wanted, ratio = page_loop("shrinkmatch").train(backbone, head, auxiliary, optimizer, batches, **settings)
    assert_same_logs(logs, wanted, TOLERANCE[torch.float32])
    for ours, theirs in ((module.backbone, backbone), (module.head, head), (module.auxiliary, auxiliary)):
        assert_same_state(ours, theirs, TOLERANCE[torch.float32])
    assert_same_state({"ratio": module.certain_ratio}, {"ratio": ratio}, TOLERANCE[torch.float32])
    for name in ("certain_loss", "shrink_loss"):
        assert sum(step[f"semi/{name}"] > 0 for step in wanted) >= 3, name
