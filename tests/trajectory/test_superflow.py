"""SuperFlow by a Trainer against the page's loop: spatial, dense-to-sparse and temporal contrast, the one-cycle schedule."""

import copy

import torch
from torch import nn

from lit_methods import SuperFlow
from lit_methods.lidar.minkunet import VoxelFeatures
from trajectories import TOLERANCE, assert_same_logs, assert_same_state, page_loop, run


class PointNet(nn.Module):
    """Every point is a voxel of its own."""

    out_channels = 8

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8))

    def forward(self, points, points_per_sample):
        rows = torch.arange(len(points))
        return VoxelFeatures(self.layers(points), rows, rows)


class Teacher(nn.Module):
    """Features of patches of 4 x 4 pixels."""

    embed_dim, stride = 6, 4

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 6, 4, 4)

    def forward(self, images):
        return self.patches(images)


def frame(generator, images=True):
    """A batch's two scans of 30 points, each seen by two cameras."""

    def pairs(high):
        return torch.randint(high, (40,), generator=generator)

    cloud = {
        "points": torch.randn(60, 4, generator=generator),
        "points_per_sample": torch.tensor([30, 30]),
        "pairing_points": pairs(30),
        "pairing_images": torch.stack([pairs(2), pairs(8), pairs(12)], dim=1),
        "pairs_per_sample": torch.tensor([25, 15]),
    }
    if images:
        cloud["images"] = torch.rand(2, 2, 3, 8, 12, generator=generator)
        cloud["superpixels"] = torch.randint(5, (2, 2, 8, 12), generator=generator)
    return cloud


def test_a_run_is_the_loop():
    generator = torch.Generator().manual_seed(0)
    frames = ("cur", "prev", "next", "dense")
    batches = [{"token": ["a", "b"], **{name: frame(generator, name != "dense") for name in frames}} for _ in range(7)]
    torch.manual_seed(0)
    module = SuperFlow(PointNet(), Teacher(), num_superpixels=5, embed_dim=7, learning_rate=0.02)
    parts = copy.deepcopy([module.backbone_3d, module.head_3d, module.teacher.module, module.head_2d])
    logs = run(module, batches)

    trained = [parameter for part in (parts[0], parts[1], parts[3]) for parameter in part.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=0.02, weight_decay=0.01, eps=1e-6)
    cycle = {"pct_start": 0.2, "div_factor": 25.0, "final_div_factor": 100.0, "cycle_momentum": False}
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=len(batches), **cycle)
    wanted = page_loop("superflow").train(*parts, optimizer, scheduler, batches, num_superpixels=5)
    assert_same_logs(logs, wanted, TOLERANCE[torch.float32])
    for ours, theirs in ((module.backbone_3d, parts[0]), (module.head_3d, parts[1]), (module.head_2d, parts[3])):
        assert_same_state(ours, theirs, TOLERANCE[torch.float32])
