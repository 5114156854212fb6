"""Noise prediction: the schedule, the noisy latents, a training that learns."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from helpers import tiny_trainer
from lit_methods import NoisePrediction
from lit_methods.tasks.diffusion.noise_prediction import noisy, signal_shares


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor, time: Tensor, prompt: Tensor | None = None) -> Tensor:
        assert time.dtype == torch.int64
        return self.layer(x) + (0 if prompt is None else prompt.mean() * 0)


def batches(*shape: int, **more: Tensor) -> Any:
    generator = torch.Generator().manual_seed(0)
    return DataLoader([{"image": torch.randn(4, *shape, generator=generator) * 0.01, **more} for _ in range(40)], batch_size=None)  # type: ignore[arg-type]


def test_the_schedule_is_stable_diffusions():
    shares = signal_shares(1000, 0.00085, 0.012)
    assert shares[0] == pytest.approx(1 - 0.00085)
    assert shares[-1] == pytest.approx(0.0047, abs=1e-4)
    assert (shares.diff() < 0).all()


def test_noise_has_the_rest_of_the_power():
    x, noise = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    found = noisy(x, noise, torch.tensor([1.0, 0.0, 0.36]))
    torch.testing.assert_close(found, torch.stack([x[0], noise[1], 0.6 * x[2] + 0.8 * noise[2]]))


@pytest.mark.parametrize("shape", [(2, 4, 4), (2, 1, 4, 4)])
def test_it_learns(shape):
    torch.manual_seed(0)
    module = NoisePrediction(Network(), learning_rate=0.05, schedule="constant")
    data = batches(*shape, prompt=torch.zeros(4, 3, 5))
    trainer = tiny_trainer(max_epochs=2)
    (before,) = trainer.validate(module, data, verbose=False)
    trainer.fit(module, data)
    (after,) = trainer.validate(module, data, verbose=False)
    assert after["diffusion/val_loss"] < 0.8 * before["diffusion/val_loss"]


def test_wrong_arguments():
    with pytest.raises(ValueError, match="beta_first is 0"):
        NoisePrediction(Network(), beta_first=0.0)
    with pytest.raises(ValueError, match="schedule is 'line'"):
        NoisePrediction(Network(), schedule="line")  # type: ignore[arg-type]
