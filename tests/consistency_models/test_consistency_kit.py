"""The parts of the consistency kit against independent computations."""

import math

import numpy as np
import pytest
import torch

from lit_methods.consistency_models.curricula import ct_teacher_decay, doubling_levels, square_root_levels
from lit_methods.consistency_models.evaluation import sliced_wasserstein
from lit_methods.consistency_models.levels import inverse_gap, karras_levels, lognormal_probabilities
from lit_methods.consistency_models.metrics import perceptual, pseudo_huber, square
from lit_methods.consistency_models.networks import NoiseMLP, SmallUNet
from lit_methods.consistency_models.pairs import consistency_function, consistency_pair_loss, heun_step
from lit_methods.consistency_models.randomness import SameRandomness
from lit_methods.consistency_models.rcm.teacher import RingTeacher
from lit_methods.consistency_models.rcm.trigflow import VelocityDenoiser
from lit_methods.consistency_models.sampling import multistep_sample


def test_the_doubling_curriculum_has_eight_stages_and_stays_at_its_end():
    found = [doubling_levels(step, 400_000) for step in range(0, 400_001, 50_000)]
    assert found == [11, 21, 41, 81, 161, 321, 641, 1281, 1281]


def test_the_square_root_curriculum_grows_to_its_end():
    found = [square_root_levels(step, 1000) for step in (0, 250, 1000)]
    assert found[0] == 2
    assert found[-1] == 151
    assert found[1] == math.ceil(math.sqrt(0.25 * (151**2 - 4) + 4) - 1) + 1
    assert ct_teacher_decay(found[0]) == pytest.approx(0.81)
    assert ct_teacher_decay(found[-1]) > 0.998


def test_the_boundary_condition_holds_exactly():
    torch.manual_seed(0)
    x = torch.randn(6, 2)
    network = NoiseMLP(width=8)
    f = consistency_function(network, 0.002)
    assert torch.equal(f(x, torch.full((6,), 0.002)), x)
    assert not torch.allclose(f(x, torch.full((6,), 0.5)), x, atol=1e-2)


def test_the_boundary_condition_holds_under_autocast():
    f = consistency_function(SmallUNet(channels=8), 0.002)
    x = torch.randn(2, 1, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(f(x, torch.full((2,), 0.002)), x)


def test_pairs_are_drawn_by_the_mass_of_the_lognormal():
    sigma = karras_levels(21)
    draws = torch.randn(400_000, generator=torch.Generator().manual_seed(0)).double().mul(2).sub(1.1).exp()
    inside = draws[(draws > sigma[0]) & (draws < sigma[-1])]
    counts = np.histogram(inside.numpy(), sigma.numpy())[0] / len(inside)
    np.testing.assert_allclose(lognormal_probabilities(sigma).numpy(), counts, atol=3e-3)


class SinglePoint:
    """f(x, s) = (s_min / s) x + (1 - s_min / s) theta, for data that are a single point xi: the analysis of iCT, Section 3.2."""

    smallest, point, sigma = 0.1, 0.7, 1.0

    def __init__(self, theta: float) -> None:
        self.theta = torch.tensor(theta, dtype=torch.float64, requires_grad=True)

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        share = (self.smallest / sigma)[:, None]
        return share * x + (1 - share) * self.theta

    def slope(self, teacher: "SinglePoint", step: float) -> float:
        """(1 / step) times the derivative by theta of the squared loss between sigma and sigma - step."""
        noise = torch.randn(64, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        x = torch.full_like(noise, self.point)
        upper = torch.full((64,), self.sigma, dtype=torch.float64)
        found = consistency_pair_loss(self, teacher, x, noise, upper - step, upper, square, torch.ones(64, dtype=torch.float64))
        return torch.autograd.grad(found.losses.mean(), self.theta)[0].item() / step


@pytest.mark.parametrize("theta", [0.2, 1.5])
def test_without_an_average_the_gradient_has_the_right_limit(theta):
    student = SinglePoint(theta)
    slopes = [student.slope(student, step) for step in (1e-2, 1e-4, 1e-6)]
    # d/dtheta of (s_min / s^2) (1 - s_min / s) (theta - xi)^2
    limit = 2 * 0.1 * (1 - 0.1) * (theta - SinglePoint.point)
    assert slopes[-1] == pytest.approx(limit, rel=1e-4)
    assert abs(slopes[1] - limit) < abs(slopes[0] - limit), "it approaches the limit"


@pytest.mark.parametrize("lag", [0.1, -0.1])
def test_with_an_average_the_gradient_diverges_to_the_side_where_the_teacher_is(lag):
    # the student stands above the point, so the true gradient is positive
    student, teacher = SinglePoint(1.5), SinglePoint(1.5 - lag)
    slopes = [student.slope(teacher, step) for step in (1e-2, 1e-4, 1e-6)]
    assert all(math.copysign(1, slope) == math.copysign(1, lag) for slope in slopes[1:])
    assert abs(slopes[2]) == pytest.approx(100 * abs(slopes[1]), rel=0.05)


def test_with_no_average_the_minimum_is_the_point():
    student = SinglePoint(SinglePoint.point)
    assert abs(student.slope(student, 1e-3)) < 1e-9


def test_student_and_teacher_drop_the_same_units():
    torch.manual_seed(0)
    drop, seen = torch.nn.Dropout(0.5), []

    def f(x, sigma):
        seen.append(drop(torch.ones(4, 50)))
        return x * seen[-1].mean()

    x, levels = torch.randn(4, 2), torch.ones(4)
    consistency_pair_loss(f, f, x, torch.randn(4, 2), levels, levels * 2, square, levels)
    assert torch.equal(seen[0], seen[1])
    consistency_pair_loss(f, f, x, torch.randn(4, 2), levels, levels * 2, square, levels)
    assert not torch.equal(seen[1], seen[2]), "the next pair drops others"


def test_random_numbers_go_on_behind_the_block():
    same = SameRandomness(torch.device("cpu"))
    first, second = torch.rand(2), torch.rand(2)
    with same.again():
        again = torch.rand(2)
    third = torch.rand(2)
    with same.again():
        assert torch.equal(torch.cat([torch.rand(2), torch.rand(2), torch.rand(2)]), torch.cat([first, second, third]))
    assert torch.equal(again, first)


def test_the_teacher_gets_no_gradient_and_the_metric_is_wide():
    weight = torch.ones((), requires_grad=True)
    dtypes = []

    def metric(a, b):
        dtypes.extend([a.dtype, b.dtype])
        return square(a, b)

    x, levels = torch.randn(4, 2, dtype=torch.bfloat16), torch.ones(4)
    noise = torch.randn(4, 2, dtype=torch.bfloat16)
    found = consistency_pair_loss(lambda x, s: x.bfloat16(), lambda x, s: weight * x.bfloat16(), x, noise, levels, levels, metric, levels)
    assert not found.losses.requires_grad
    assert set(dtypes) == {torch.float32}


def test_pseudo_huber_has_a_finite_gradient_at_zero():
    a = torch.zeros(2, 3, requires_grad=True)
    pseudo_huber(a, torch.zeros(2, 3), 1e-3).sum().backward()
    assert torch.equal(a.grad, torch.zeros(2, 3))


def test_the_weights_are_the_inverse_distances():
    sigma = karras_levels(5)
    gaps = np.diff(sigma.numpy())
    np.testing.assert_allclose(inverse_gap(sigma[:-1], sigma[1:]).numpy(), 1 / gaps)


def test_more_steps_call_f_at_the_given_times():
    times = []

    def f(x, t):
        times.append(float(t[0]))
        return x * 0

    multistep_sample(f, torch.randn(3, 2), [80.0, 2.0, 0.5, 0.002])
    assert times == pytest.approx([80.0, 2.0, 0.5])
    with pytest.raises(ValueError, match="at least two"):
        multistep_sample(f, torch.randn(3, 2), [80.0])


def test_sliced_wasserstein_of_a_shift_and_of_another_order():
    points = torch.randn(500, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert sliced_wasserstein(points, points[torch.randperm(500)]) == 0
    shifted = sliced_wasserstein(points, points + torch.tensor([3.0, 4.0]), projections=1500)
    assert shifted.item() == pytest.approx(5 / math.sqrt(2), rel=0.05), "a projection keeps half of a squared shift in the plane"
    with pytest.raises(ValueError, match="as many of the same size"):
        sliced_wasserstein(points, points[:5])


@pytest.mark.parametrize("size", [8, 16])
def test_the_small_unet_keeps_the_shape_and_uses_noise_and_labels(size):
    torch.manual_seed(0)
    network = SmallUNet(in_channels=3, channels=8, num_classes=4)
    for convolution in (layer for layer in network.modules() if isinstance(layer, torch.nn.Conv2d)):
        torch.nn.init.normal_(convolution.weight, std=0.1)  # some begin as zeros
    x, noise, labels = torch.randn(2, 3, size, size), torch.tensor([0.1, 0.2]), torch.tensor([0, 3])
    answer = network(x, noise, labels)
    assert answer.shape == x.shape
    assert not torch.allclose(answer, network(x, noise + 1, labels))
    assert not torch.allclose(answer, network(x, noise, labels - labels))


def test_attention_and_fourier_embedding_of_the_unet():
    torch.manual_seed(0)
    network = SmallUNet(channels=16, multipliers=(1, 2), attention=(1,), fourier_scale=0.02)
    for convolution in (layer for layer in network.modules() if isinstance(layer, torch.nn.Conv2d)):
        torch.nn.init.normal_(convolution.weight, std=0.1)
    x, noise = torch.zeros(1, 1, 16, 16), torch.zeros(1)
    x[0, 0, 0, 0] = 1.0
    far = (network(x, noise) - network(x * 2, noise))[0, 0, 15, 15]
    assert far != 0
    assert not torch.allclose(network(x, noise), network(x, noise + 1))
    frequencies = SmallUNet(channels=800, multipliers=(1,), fourier_scale=0.02).frequencies
    assert frequencies.std().item() == pytest.approx(0.02 * 2 * math.pi, rel=0.15)
    with pytest.raises(ValueError, match="stages"):
        SmallUNet(attention=(2,))


def test_heuns_step_follows_the_path_of_normal_data():
    spread, upper, lower = 0.7, torch.tensor([1.0, 0.5], dtype=torch.float64), torch.tensor([0.99, 0.48], dtype=torch.float64)
    x = torch.tensor([[2.0, -1.0], [0.3, 0.6]], dtype=torch.float64)
    found = heun_step(lambda x, sigma: x * (spread**2 / (spread**2 + sigma**2))[:, None], x, upper, lower)
    exact = x * ((spread**2 + lower**2) / (spread**2 + upper**2)).sqrt()[:, None]
    torch.testing.assert_close(found, exact, rtol=5e-6, atol=0)  # Euler's step is off by 1e-5 and 2e-4


def test_a_path_replaces_the_second_point_of_a_pair():
    x, noise = torch.zeros(3, 2), torch.ones(3, 2)
    upper, lower = torch.full((3,), 2.0), torch.full((3,), 1.0)
    seen = []

    def path(noisy, high, low):
        assert torch.equal(high, upper)
        assert torch.equal(low, lower)
        assert not torch.is_grad_enabled()
        return noisy + 10

    consistency_pair_loss(lambda x, t: x, lambda x, t: seen.append(x) or x, x, noise, lower, upper, square, torch.ones(3), path=path)
    assert torch.equal(seen[0], torch.full((3, 2), 12.0))


def test_a_velocity_is_a_denoiser():
    ring, sigma = RingTeacher(modes=5, radius=0.65, noise=0.05), torch.tensor([0.05, 0.4, 3.0], dtype=torch.float64)
    x = torch.tensor([[0.6, 0.1], [0.2, 0.9], [-2.0, 1.0]], dtype=torch.float64)
    centres = ring.get_buffer("centres")
    variance = (0.05**2 + sigma**2)[:, None, None]
    away = x[:, None] - centres
    share = (-away.square().sum(-1, keepdim=True) / (2 * variance)).softmax(1)
    mean = (share * (centres + 0.05**2 / variance * away)).sum(1)  # posterior mean of a mixture of Gaussians
    torch.testing.assert_close(VelocityDenoiser(ring)(x, sigma), mean)


def test_the_perceptual_distance_sees_directions_and_weighs_channels():
    a, b = torch.tensor([[[[3.0]], [[0.0]]]]), torch.tensor([[[[0.0]], [[5.0]]]])  # one place, two channels
    torch.testing.assert_close(perceptual(a, 7 * a, lambda x: x), torch.zeros(1))
    torch.testing.assert_close(perceptual(a, b, lambda x: [x, x.flatten(1)]), torch.tensor([4.0]))  # 2 for each layer
    torch.testing.assert_close(perceptual(a, b, lambda x: x, [torch.tensor([1.0, 0.5])]), torch.tensor([1.5]))
    wide = torch.cat([a, a], dim=3), torch.cat([a, b], dim=3)
    torch.testing.assert_close(perceptual(*wide, lambda x: x), torch.tensor([1.0]))  # the mean over two places
