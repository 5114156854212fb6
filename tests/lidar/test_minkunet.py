"""MinkUNet: size, borders, independence of samples, autocast."""

import pytest
import torch

pytest.importorskip("spconv", reason="spconv is not installed: pip install 'lit-methods[lidar]'")
from lit_methods.lidar.minkunet import MinkUNet

SMALL = {"depth": 18, "stem_channels": 4, "planes": (4, 4, 8, 8, 8, 8, 4, 4), "voxel_size": (0.5, 5.0, 0.5)}


def cloud(*sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(sum(sizes), 4, generator=generator) * torch.tensor([40.0, 40, 4, 255]) - torch.tensor([20.0, 20, 1, 0])
    return points, torch.tensor(sizes)


@pytest.mark.parametrize(("depth", "parameters", "width"), [(18, 21_721_472, 96), (34, 37_873_280, 96), (50, 31_774_912, 384)])
def test_parameters_are_the_papers(depth, parameters, width):
    net = MinkUNet(depth)
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert net.out_channels == width


def test_samples_do_not_see_each_other():
    net = MinkUNet(**SMALL).eval()
    points, sizes = cloud(300, 200)
    together = net(points, sizes).at_points()
    alone = torch.cat([net(part, torch.tensor([len(part)])).at_points() for part in points.split(sizes.tolist())])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("extent", [1, 2, 3, 7, 16, 17])
def test_no_voxel_at_an_odd_border_is_lost(extent):
    """With positive weights every voxel gets something from the coarser stage, unless the stage doesn't cover it."""
    net = MinkUNet(**{**SMALL, "voxel_type": "cubic", "voxel_size": (1.0, 1.0, 1.0)}).eval()
    for name, parameter in net.named_parameters():
        if name.endswith("conv.weight"):
            torch.nn.init.constant_(parameter, 0.01)
    line = torch.ones(extent, 4)
    line[:, 0] = torch.arange(extent)
    reached = []
    for stage in net.up:
        stage.conv.register_forward_hook(lambda module, inputs, output: reached.append(output.features))
    net(line, torch.tensor([extent]))
    assert [len(features) for features in reached] == [-(-extent // n) for n in (8, 4, 2, 1)]
    assert all((features > 0).all() for features in reached)


def test_gradients_reach_every_parameter_and_autocast_changes_nothing():
    net = MinkUNet(**SMALL)
    points, sizes = cloud(400, 400)
    net(points, sizes).features.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    net.eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = net(points, sizes).features
    assert torch.equal(half, net(points, sizes).features)


def test_wrong_depth_is_named():
    with pytest.raises(ValueError, match="depth=20"):
        MinkUNet(20)  # type: ignore[arg-type]
