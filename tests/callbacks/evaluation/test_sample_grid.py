"""SampleGrid: pictures of what predict_step returns."""

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image

from helpers import tiny_trainer
from lit_methods.callbacks import SampleGrid


class Sampler(pl.LightningModule):
    """Returns its batch, and the batch turned dark."""

    def predict_step(self, batch, batch_idx):
        return {"1_steps": batch, "2_steps": batch * 0 - 1}


def predict(images, tmp_path, batch_size=3, **kwargs):
    grid = SampleGrid(output=tmp_path / "out", **kwargs)
    tiny_trainer(callbacks=[grid]).predict(Sampler(), torch.utils.data.DataLoader(images, batch_size), return_predictions=False)
    return tmp_path / "out"


def test_one_grid_for_each_number_of_steps_in_order(tmp_path):
    images = torch.linspace(-1, 1, 10)[:, None, None, None].expand(10, 1, 4, 4)
    folder = predict(images, tmp_path, columns=4, max_images=8)
    pixels = np.asarray(Image.open(folder / "1_steps.png"))
    assert pixels.shape == (2 * 5 + 1, 4 * 5 + 1, 3)
    shades = [pixels[2 + 5 * (k // 4), 2 + 5 * (k % 4), 0] for k in range(8)]
    np.testing.assert_allclose(shades, (images[:8, 0, 0, 0].numpy() + 1) / 2 * 255, atol=1)
    assert np.asarray(Image.open(folder / "2_steps.png")).max() == 0
    torch.testing.assert_close(torch.load(folder / "samples.pt", weights_only=True)["1_steps"], images)


def test_points_are_kept_without_a_picture(tmp_path):
    folder = predict(torch.randn(5, 2), tmp_path)
    assert [path.name for path in folder.iterdir()] == ["samples.pt"]


def test_other_predictions_and_sizes_are_refused(tmp_path):
    class Odd(Sampler):
        def predict_step(self, batch, batch_idx):
            return batch

    with pytest.raises(ValueError, match="dict of tensors"):
        tiny_trainer(callbacks=[SampleGrid(tmp_path)]).predict(Odd(), torch.utils.data.DataLoader(torch.zeros(2, 1), 1))
    with pytest.raises(ValueError, match=r"is 0: give a number in \[1, inf\)"):
        SampleGrid(columns=0)
