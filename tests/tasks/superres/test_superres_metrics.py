"""PSNR and SSIM on the luminance against scikit-image and plain sums."""

import math

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from lit_methods.tasks.superres.metrics import LuminancePSNR, LuminanceSSIM, luminance, psnr_y, ssim_y, to_uint8


def pair(height: int = 30, width: int = 26, channels: int = 3, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hr = torch.randint(0, 256, (batch, channels, height, width), generator=generator)
    sr = (hr + torch.randint(-20, 21, hr.shape, generator=generator)).clamp(0, 255)
    return sr.to(torch.uint8), hr.to(torch.uint8)


def test_luminance_has_the_studio_range():
    colours = torch.tensor([[0, 0, 0], [255, 255, 255], [255, 0, 0]], dtype=torch.uint8).view(3, 3, 1, 1)
    assert luminance(colours).flatten().tolist() == pytest.approx([16.0, 235.0, 81.481])
    assert luminance(torch.full((1, 1, 2, 2), 0.5)).unique().tolist() == [128.0], "one channel is taken as it is, on 8 bits"
    with pytest.raises(ValueError, match=r"got \(1, 2, 3, 3\)"):
        luminance(torch.zeros(1, 2, 3, 3))


def test_floats_count_as_they_would_be_written_to_a_file():
    assert to_uint8(torch.tensor([-0.1, 0.0, 0.5, 0.001, 0.9999, 2.0])).tolist() == [0, 0, 128, 0, 255, 255]
    sr, hr = pair()
    assert torch.equal(psnr_y(sr / 255 + 0.001, hr / 255, 2), psnr_y(sr, hr, 2))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("border", [0, 3])
def test_both_agree_with_independent_computations(channels, border):
    sr, hr = pair(channels=channels)
    psnr, ssim = psnr_y(sr, hr, border), ssim_y(sr, hr, border)
    for index in range(2):
        a, b = (luminance(image[index : index + 1])[0, 0].numpy() for image in (sr, hr))
        a, b = (x[border : x.shape[0] - border, border : x.shape[1] - border] for x in (a, b))
        assert float(psnr[index]) == pytest.approx(20 * math.log10(255 / math.sqrt(np.mean((a - b) ** 2))))
        _, every = structural_similarity(
            a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255, truncate=3.5, full=True
        )
        assert float(ssim[index]) == pytest.approx(every[5:-5, 5:-5].mean(), abs=1e-9)


def test_equal_images():
    _, hr = pair()
    assert psnr_y(hr, hr).tolist() == [math.inf] * 2
    assert ssim_y(hr, hr).tolist() == pytest.approx([1.0] * 2)


def test_images_that_dont_fit_are_refused():
    sr, hr = pair()
    with pytest.raises(ValueError, match="crop them to one size"):
        psnr_y(sr[..., 1:], hr)
    with pytest.raises(ValueError, match="leaves nothing of 30 x 26"):
        psnr_y(sr, hr, 13)
    with pytest.raises(ValueError, match="SSIM needs 11 x 11 pixels inside the border, got 14 x 10"):
        ssim_y(sr, hr, 8)


@pytest.mark.parametrize(("metric", "function"), [(LuminancePSNR, psnr_y), (LuminanceSSIM, ssim_y)])
def test_metrics_are_means_over_images_of_any_size(metric, function):
    counted = metric(crop_border=2)
    batches = [pair(), pair(40, 20, batch=1)]
    for sr, hr in batches:
        counted.update(sr, hr)
    expected = torch.cat([function(sr, hr, 2) for sr, hr in batches]).mean()
    torch.testing.assert_close(counted.compute().double(), expected, rtol=1e-6, atol=1e-6)
    counted.reset()
    assert counted.compute().isnan()
