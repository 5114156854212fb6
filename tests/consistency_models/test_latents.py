"""Latents: standardising, decoding, the adapters of diffusers on stand-ins, and the modules that train on them."""

import copy
import sys
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from helpers import assert_state_dicts_equal, tiny_trainer
from lit_methods import SLCT, ConsistencyTraining, DiffusersAutoencoder, DiffusersNetwork, DigitAutoencoder, SmallUNet
from lit_methods.callbacks import SampleGrid, WeightEMA
from lit_methods.consistency_models.latents import LatentSpace, standardise, unstandardise
from lit_methods.datamodules import GenerativeDigitsDataModule, LatentDataModule


class Doubling(nn.Module):
    """Latents are half the images."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0))

    def encode(self, images):
        return images / self.factor

    def decode(self, latents):
        return latents * self.factor


def test_standardised_latents_have_the_deviation_that_was_asked_for_and_go_back():
    latents = torch.randn(500, 3, 4, 4) * torch.tensor([0.1, 2.0, 9.0])[:, None, None] + torch.tensor([5.0, 0.0, -3.0])[:, None, None]
    mean, std = latents.mean((0, 2, 3), keepdim=True)[0], latents.std((0, 2, 3), keepdim=True)[0]
    x = standardise(latents, mean, std)
    torch.testing.assert_close(x.std((0, 2, 3)), torch.full((3,), 0.5))
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(unstandardise(x, mean, std), latents, atol=1e-4, rtol=1e-4)


def test_a_latent_space_decodes_and_saves_its_statistics_alone():
    space = LatentSpace(Doubling())
    with pytest.raises(RuntimeError, match="LatentDataModule"):
        space.decode(torch.zeros(1, 2, 1, 1))
    space.set_statistics(torch.tensor([0.1, -0.1])[:, None, None], torch.tensor([1.0, 0.2])[:, None, None])
    x = torch.tensor([0.05, 0.5]).view(1, 2, 1, 1)
    torch.testing.assert_close(space.decode(x).flatten(), torch.tensor([2 * (0.05 * 2 + 0.1), 2 * (0.5 * 0.2 * 2 - 0.1)]))
    assert space.decode(100 * x).max() == 1
    assert set(space.state_dict()) == {"_extra_state"}
    assert not list(space.parameters())
    other = LatentSpace(Doubling())
    other.load_state_dict(space.state_dict())
    assert torch.equal(other.decode(x), space.decode(x))
    other.statistics.mean.add_(1)
    assert not torch.equal(other.decode(x), space.decode(x)), "its own"
    early = LatentSpace(Doubling())
    copied = copy.deepcopy(early)
    early.set_statistics(torch.zeros(2, 1, 1), torch.ones(2, 1, 1))
    assert torch.equal(copied.decode(x), early.decode(x)), "averaged weights are copied before the data are known"
    with pytest.raises(TypeError, match="decode"):
        LatentSpace(nn.Identity())


def test_digits_survive_the_built_in_autoencoder():
    before = torch.random.get_rng_state()
    coder = DigitAutoencoder()
    assert torch.equal(torch.random.get_rng_state(), before)
    data = GenerativeDigitsDataModule(image_size=16)
    data.setup("fit")
    images = data.val_set.images
    latents = coder.encode(images)
    assert latents.shape == (297, 4, 4, 4)
    error = (coder.decode(latents) - images).square().mean() / images.var()
    assert error < 0.03
    assert_state_dicts_equal(DigitAutoencoder().state_dict(), coder.state_dict())


# ---- diffusers, by classes of the same interface ---------------------------------------------------------------------------------------


class FakeKL(Doubling):
    """AutoencoderKL's interface: an output with ``latent_dist``, one with ``sample``."""

    @classmethod
    def from_pretrained(cls, path, local_files_only):
        assert local_files_only
        made = cls()
        made.path = path
        return made

    def encode(self, images):
        mode = nn.functional.avg_pool2d(images, 8)
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: mode, sample=lambda: mode + torch.randn_like(mode)))

    def decode(self, latents):
        return SimpleNamespace(sample=nn.functional.interpolate(latents, scale_factor=8))


class FakeNetwork(nn.Module):
    """Interface of UNet2DModel and DiTTransformer2DModel."""

    def __init__(self, in_channels, needs_labels=False):
        super().__init__()
        self.layer = nn.Conv2d(in_channels, in_channels, 1)
        self.needs_labels = needs_labels

    def forward(self, sample, timestep, class_labels=None):
        self.seen = timestep, class_labels
        assert not self.needs_labels or class_labels is not None
        return SimpleNamespace(sample=self.layer(sample))


@pytest.fixture
def diffusers(monkeypatch):
    fake = SimpleNamespace(
        AutoencoderKL=FakeKL, UNet2DModel=FakeNetwork, DiTTransformer2DModel=lambda **kw: FakeNetwork(**kw, needs_labels=True)
    )
    monkeypatch.setitem(sys.modules, "diffusers", fake)


def test_an_autoencoder_of_diffusers_is_read_from_a_folder(diffusers, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        DiffusersAutoencoder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    coder, drawing = DiffusersAutoencoder(tmp_path), DiffusersAutoencoder(tmp_path, sample=True)
    assert coder.model.path == str(tmp_path)
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(coder.encode(images), nn.functional.avg_pool2d(images, 8))
    assert not torch.equal(drawing.encode(images), drawing.encode(images))
    assert coder.decode(coder.encode(images)).shape == images.shape


@pytest.mark.parametrize("kind", ["UNet2DModel", "DiTTransformer2DModel"])
def test_a_network_of_diffusers_is_an_f(diffusers, kind):
    network = DiffusersNetwork({"in_channels": 4}, kind=kind)
    model = ConsistencyTraining(network, num_classes=None)
    x, sigma = torch.randn(3, 4, 8, 8), torch.tensor([0.01, 1.0, 80.0])
    assert model(x, sigma).shape == x.shape
    time, labels = network.model.seen
    torch.testing.assert_close(time, 250 * sigma.log())
    assert (labels is None) == (kind == "UNet2DModel")
    network(x, sigma, torch.tensor([1, 2, 3]))
    assert network.model.seen[1].tolist() == [1, 2, 3]


def test_without_diffusers_the_error_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    for make in (lambda: DiffusersAutoencoder(tmp_path), lambda: DiffusersNetwork({})):
        with pytest.raises(ImportError, match=r"lit-methods\[diffusers\]"):
            make()
    with pytest.raises(ValueError, match="UNet2DModel"):
        DiffusersNetwork({}, kind="Other")


# ---- the modules -----------------------------------------------------------------------------------------------------------------------


def module(kind=SLCT, **kwargs):
    torch.manual_seed(0)
    return kind(
        SmallUNet(4, channels=8, num_classes=10), num_classes=10, autoencoder=DigitAutoencoder(), s0=2, s1=8, sample_times=(1.0,), **kwargs
    )


@pytest.mark.parametrize("kind", [SLCT, ConsistencyTraining])
def test_samples_of_latents_are_shown_as_images(kind, tmp_path):
    pl.seed_everything(0, verbose=False)
    model, data = module(kind), LatentDataModule(num_val=16, batch_size=8, val_batch_size=16, num_samples=4)
    trainer = tiny_trainer(max_steps=2, limit_val_batches=1, val_check_interval=2, callbacks=[WeightEMA(0.5), SampleGrid(tmp_path)])
    trainer.fit(model, data)
    assert torch.equal(model.latents.statistics.mean, data.latent_mean)
    assert model.dashboard_media()["consistency/samples"].pixels.shape[2] == 3
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert {name for name in saved if not name.startswith("network.")} == {"latents._extra_state"}
    trainer.predict(model, data)
    samples = torch.load(tmp_path / "samples.pt", weights_only=True)
    assert samples["1_steps"].shape == samples["2_steps"].shape == (4, 1, 16, 16)
    assert (tmp_path / "2_steps.png").is_file()
    fresh = module(kind)
    fresh.load_state_dict(saved)
    latents = torch.randn(2, 4, 4, 4)
    assert torch.equal(fresh.to_images(latents), model.to_images(latents)), "a checkpoint is enough to decode"


def test_an_autoencoder_changes_nothing_in_training():
    states = []
    for coder in (DigitAutoencoder(), None):
        torch.manual_seed(0)
        model = SLCT(SmallUNet(4, channels=8), autoencoder=coder, s0=2, s1=8)
        pl.seed_everything(0, verbose=False)
        tiny_trainer(max_steps=2, limit_val_batches=0).fit(model, LatentDataModule(num_val=16, batch_size=8))
        states.append(model.network.state_dict())
    assert_state_dicts_equal(*states)
