"""What restoration techniques share: colours, perceptual distances, blind degradations."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lit_methods.datamodules.restoration.blind import (
    FaceDegradation,
    RealDegradation,
    blur_kernel,
    filtered,
    jpeg,
    sinc_kernel,
    with_gaussian_noise,
    with_shot_noise,
)
from lit_methods.restoration.color import adain_color_fix, wavelet_color_fix, wavelet_decompose
from lit_methods.restoration.perceptual import FeatureDistance, LPIPSDistance, RandomFeatures


def blurred(image: np.ndarray, apart: int) -> np.ndarray:
    """One level, pixel by pixel."""
    found = np.zeros_like(image)
    height, width = image.shape
    for y in range(height):
        for x in range(width):
            for dy, a in ((-1, 1), (0, 2), (1, 1)):
                for dx, b in ((-1, 1), (0, 2), (1, 1)):
                    row, column = min(max(y + dy * apart, 0), height - 1), min(max(x + dx * apart, 0), width - 1)
                    found[y, x] += a * b / 16 * image[row, column]
    return found


def test_wavelets_are_blurs_with_holes() -> None:
    image = torch.rand(1, 2, 5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    high, low = wavelet_decompose(image, 3)
    for channel in range(2):
        expected = image[0, channel].numpy()
        for level in range(3):
            expected = blurred(expected, 2**level)
        np.testing.assert_allclose(low[0, channel].numpy(), expected, atol=1e-12)
    torch.testing.assert_close(high + low, image)


@pytest.mark.parametrize("fix", [wavelet_color_fix, adain_color_fix])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_colours_come_from_the_reference(fix: Any, dtype: torch.dtype) -> None:
    image = torch.rand(2, 3, 33, 20, generator=torch.Generator().manual_seed(1))
    shifted = (image + torch.tensor([0.3, -0.2, 0.1])[:, None, None]).to(dtype)
    assert fix(shifted, image).dtype == dtype
    torch.testing.assert_close(fix(shifted.float(), image), image, atol=1e-2 if dtype == torch.bfloat16 else 1e-5, rtol=1e-3)


def test_colours_of_other_images_are_refused() -> None:
    with pytest.raises(ValueError, match="of one size"):
        wavelet_color_fix(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 9))
    with pytest.raises(ValueError, match="as many images"):
        adain_color_fix(torch.rand(1, 3, 8, 8), torch.rand(1, 1, 8, 8))
    with pytest.raises(ValueError, match=r"\(batch, channels"):
        wavelet_decompose(torch.rand(3, 8, 8))
    with pytest.raises(ValueError, match="levels is 0"):
        wavelet_decompose(torch.rand(1, 3, 8, 8), 0)


def test_features_pull_images_together_and_are_not_trained() -> None:
    distance = FeatureDistance(RandomFeatures(1, seed=3))
    assert not list(distance.parameters())
    assert not distance.state_dict()
    again = FeatureDistance(RandomFeatures(1, seed=3))
    a, b = torch.rand(2, 2, 1, 8, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    a.requires_grad_()
    value = distance(a, b)
    torch.testing.assert_close(value, again(a, b))
    assert value.shape == (2,)
    assert float(distance(b, b).abs().max()) == 0
    (gradient,) = torch.autograd.grad(value.sum(), a)
    assert float(distance(a - 0.05 * gradient / gradient.norm(), b).sum()) < float(value.detach().sum())


def test_features_of_named_layers() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3))
    distance = FeatureDistance(network, ["0", "2"])
    assert [layer.shape[1] for layer in distance.features(torch.rand(1, 3, 8, 8))] == [4, 5]
    assert not network[0]._forward_hooks
    with pytest.raises(ValueError, match="Sequential hasn't"):
        FeatureDistance(network, ["conv9"])
    with pytest.raises(ValueError, match="list of patterns"):
        FeatureDistance(network, "0")  # type: ignore[arg-type]


def test_lpips_with_a_file_of_its_backbone(tmp_path: Path) -> None:
    pytest.importorskip("lpips", reason="lpips is not installed")
    import torchvision

    torch.manual_seed(0)
    backbone = torchvision.models.alexnet()
    torch.save(backbone.state_dict(), tmp_path / "alexnet.pth")
    distance = LPIPSDistance(tmp_path / "alexnet.pth", "alex")
    a, b = torch.rand(2, 2, 1, 64, 64).sub(0.5).mul(2).unbind(0)
    first = backbone.features[:2]
    torch.testing.assert_close(distance.frozen.module.net(a.expand(-1, 3, -1, -1))[0], first(a.expand(-1, 3, -1, -1)))
    assert distance(a, b).shape == (2,)
    assert float(distance(a, b).min()) > 0 == float(distance(a, a).abs().max())
    with pytest.raises(ValueError, match="give torchvision's vgg16"):
        LPIPSDistance(tmp_path / "alexnet.pth", "vgg")
    with pytest.raises(FileNotFoundError, match="torchvision's alexnet"):
        LPIPSDistance(tmp_path / "none.pth", "alex")


# ---- degradations ----------------------------------------------------------------------------------------------------------------------


def picture(side: int = 32, channels: int = 3, images: int = 1) -> Tensor:
    y, x = torch.meshgrid(torch.linspace(0, 1, side), torch.linspace(0, 1, side), indexing="ij")
    return torch.stack([x, y, (6 * x).sin().abs()][:channels]).expand(images, -1, -1, -1).contiguous()


@pytest.mark.parametrize("kind", ["gaussian", "generalised", "plateau"])
def test_kernels_sum_to_one_and_turn(kind: Any) -> None:
    kernel = blur_kernel(9, (3.0, 1.0), 0.0, kind, 1.5)
    assert kernel.sum() == pytest.approx(1)
    np.testing.assert_allclose(blur_kernel(9, (3.0, 1.0), math.pi / 2, kind, 1.5), kernel.T, atol=1e-12)
    assert kernel[4, 8] > kernel[8, 4]


def test_a_sharp_blur_and_a_wide_sinc_change_nothing() -> None:
    image = picture()
    torch.testing.assert_close(filtered(image, blur_kernel(41, (0.1, 0.1))), image)
    assert sinc_kernel(21, math.pi).sum() == pytest.approx(1)
    assert sinc_kernel(21, 1.0)[10, 10] < sinc_kernel(21, math.pi)[10, 10]
    with pytest.raises(ValueError, match="odd"):
        blur_kernel(8, (1, 1))
    with pytest.raises(ValueError, match="sigma_y is 0"):
        blur_kernel(9, (1, 0))


def test_borders_are_mirrored_as_often_as_needed() -> None:
    image = torch.arange(4.0)[None, None, None].expand(1, 1, 1, 4)
    kernel = np.zeros((11, 11))
    kernel[5, 0] = 1.0  # the pixel five to the right, as convolutions flip their kernel
    np.testing.assert_array_equal(filtered(image, kernel)[0, 0, 0].numpy(), [1, 0, 1, 2])


def test_noise_has_its_size() -> None:
    rng, grey = np.random.default_rng(0), torch.full((4, 3, 64, 64), 0.5)
    assert float(with_gaussian_noise(grey, 25.5, rng).std()) == pytest.approx(0.1, rel=0.02)
    same = with_gaussian_noise(grey, 25.5, rng, grey=True)
    torch.testing.assert_close(same[:, 0], same[:, 2])
    shot = with_shot_noise(grey, 1.0, rng)
    assert float(shot.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(shot.std()) == pytest.approx((0.5 / 2) ** 0.5, rel=0.05)  # one level counts as two


def test_jpeg_loses_more_at_a_lower_quality() -> None:
    image = (picture() + 0.1 * torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    errors = [float((jpeg(image, quality) - image).abs().mean()) for quality in (100, 60, 10)]
    assert errors[0] < errors[1] < errors[2]
    assert jpeg(picture(channels=1), 90).shape == (1, 1, 32, 32)


@pytest.mark.parametrize("channels", [1, 3])
def test_one_stage(channels: int) -> None:
    degrade, clean = FaceDegradation(), picture(48, channels, 2)
    first = degrade(clean, np.random.default_rng(5))
    torch.testing.assert_close(first, degrade(clean, np.random.default_rng(5)))
    assert first.shape == clean.shape
    assert 0 <= float(first.min()) <= float(first.max()) <= 1
    assert float((first - degrade(clean, np.random.default_rng(6))).abs().mean()) > 1e-3
    nothing = FaceDegradation(9, (0.01, 0.01), 1.0, (1, 1), (0, 0), None)
    torch.testing.assert_close(nothing(clean, np.random.default_rng(0)), clean)
    grey = FaceDegradation(grey=1.0)(picture(48), np.random.default_rng(0))
    torch.testing.assert_close(grey[:, 0], grey[:, 2])


def test_two_stages_over_many_draws() -> None:
    degrade, clean = RealDegradation(), picture(40, 3, 3)
    for seed in range(25):
        found = degrade(clean, np.random.default_rng(seed))
        assert found.shape == (3, 3, 10, 10)
        assert 0 <= float(found.min()) <= float(found.max()) <= 1
    # frames share what is drawn: they differ by noise alone
    quiet = RealDegradation(noise=(0, 0), shot_noise=(0, 0))(clean, np.random.default_rng(1))
    torch.testing.assert_close(quiet[0], quiet[2])
    with pytest.raises(ValueError, match="can't become 4 times smaller"):
        degrade(torch.rand(1, 3, 2, 8), np.random.default_rng(0))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"blur": (2.0, 1.0)}, "blur is"),
        ({"quality": (0, 50)}, "quality is"),
        ({"noise": (-1.0, 5.0)}, "noise is"),
        ({"kernel_size": 4}, "odd"),
    ],
)
def test_ranges_that_are_none(wrong: dict[str, Any], message: str) -> None:
    for kind in (FaceDegradation, RealDegradation):
        with pytest.raises(ValueError, match=message):
            kind(**wrong)
    with pytest.raises(ValueError, match="downsample"):
        FaceDegradation(downsample=(0.5, 2))
