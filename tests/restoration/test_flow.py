"""Warping, flow estimators, and the warping error."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn

from lit_methods.restoration.flow import CorrelationFlow, RAFTFlow, SPyNet, flow_difference, flow_warp, resize_flow, warping_error


def smooth(height: int = 32, width: int = 40, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    image = ndimage.gaussian_filter(rng.standard_normal((3, height + 16, width + 16)), (0, 1.5, 1.5))
    return torch.tensor(image / np.abs(image).max()).float()


def moved(dx: int, dy: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A picture, and the same with its content moved by (dx, dy)."""
    image = smooth()
    first, second = image[:, 8:-8, 8:-8], image[:, 8 - dy : image.shape[1] - 8 - dy, 8 - dx : image.shape[2] - 8 - dx]
    return first[None], second[None]


def test_warping_takes_whole_pixels_and_pads():
    x = torch.arange(12.0, dtype=torch.float64).view(1, 1, 3, 4)
    flow = torch.zeros(1, 2, 3, 4, dtype=torch.float64)
    flow[:, 0] = 1
    assert torch.allclose(flow_warp(x, flow)[0, 0], torch.tensor([[1, 2, 3, 0], [5, 6, 7, 0], [9, 10, 11, 0]]).double())
    assert torch.allclose(flow_warp(x, flow, "border")[0, 0, :, 3], x[0, 0, :, 3])
    flow[:, 0], flow[:, 1] = 0.5, 0
    assert torch.allclose(flow_warp(x, flow)[0, 0, :, 0], torch.tensor([0.5, 4.5, 8.5]).double())


def test_warping_a_single_column_and_wrong_sizes():
    x = torch.tensor([[[[1.0], [2.0]]]])
    assert torch.allclose(flow_warp(x, torch.zeros(1, 2, 2, 1)), x)
    with pytest.raises(ValueError, match=r"flow is \(1, 2, 3, 3\) and x \(1, 1, 2, 1\)"):
        flow_warp(x, torch.zeros(1, 2, 3, 3))


@pytest.mark.parametrize(("dx", "dy"), [(0, 0), (1, 0), (-2, 1), (3, -4)])
def test_correlation_flow_finds_a_shift(dx: int, dy: int):
    first, second = moved(dx, dy)
    flow = CorrelationFlow()(first, second)[0, :, 6:-6, 6:-6].mean((1, 2))
    assert torch.allclose(flow, torch.tensor([float(dx), float(dy)]), atol=0.35), flow


def test_gradients_reach_both_images_and_descent_on_the_flow_difference_brings_the_motion_back():
    first, second = moved(1, 0)
    target = CorrelationFlow()(first, second).detach()
    guess = first.clone().requires_grad_()  # a still video
    losses = []
    optimizer = torch.optim.Adam([guess], lr=0.01)
    for _ in range(12):
        loss = flow_difference(CorrelationFlow()(first, guess), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    assert losses[-1] < 0.8 * losses[0]
    assert torch.autograd.grad(CorrelationFlow()(first.requires_grad_(), second).sum(), first)[0].abs().max() > 0


def test_warping_error_is_zero_for_true_flow_and_counts_only_what_is_in_sight():
    first, second = moved(2, 0)
    flow = torch.zeros(1, 2, 32, 40)
    flow[:, 0] = 2
    assert warping_error(first, second, flow) < 1e-6
    assert warping_error(first, second, torch.zeros_like(flow)) > 0.02
    assert warping_error(first, second, flow, flow) == 0  # there and back disagree: nothing is in sight
    assert warping_error(first, second, flow, -flow) < 1e-6


def test_flow_of_another_size():
    flow = torch.ones(1, 2, 4, 6)
    larger = resize_flow(flow, 8, 18)
    assert torch.allclose(larger[0, 0], torch.tensor(3.0))
    assert torch.allclose(larger[0, 1], torch.tensor(2.0))
    assert flow_difference(larger, torch.zeros_like(larger)) == pytest.approx((3 / 18 + 2 / 8) / 2)


@pytest.mark.parametrize("build", [lambda: SPyNet(levels=3), RAFTFlow], ids=["spynet", "raft"])
def test_learned_estimators_have_gradients_and_sizes(build):
    torch.manual_seed(0)
    network: nn.Module = build()
    first, second = (part.requires_grad_() for part in moved(1, 1))
    if isinstance(network, RAFTFlow):
        network.updates = 1
        network.eval()
    flow = network(first, second)
    assert flow.shape == (1, 2, 32, 40)
    flow.square().sum().backward()
    assert second.grad.abs().max() > 0


def test_files_of_weights(tmp_path):
    network = SPyNet(levels=2)
    torch.save(network.state_dict(), tmp_path / "flow.pth")
    again = SPyNet(tmp_path / "flow.pth", levels=2)
    first, second = moved(1, 1)
    assert torch.equal(again(first, second), network(first, second))
    with pytest.raises(ValueError, match="give the weights of a SPyNet with as many levels"):
        SPyNet(tmp_path / "flow.pth", levels=3)
    with pytest.raises(ValueError, match="give the weights of raft_small"):
        RAFTFlow(tmp_path / "flow.pth")


def test_refusals():
    with pytest.raises(ValueError, match="odd"):
        CorrelationFlow(window=4)
    with pytest.raises(ValueError, match="size is 'tiny'"):
        RAFTFlow(size="tiny")
