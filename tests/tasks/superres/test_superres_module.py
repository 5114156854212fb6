"""The networks and the module for super-resolution."""

from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from helpers import assert_state_dicts_equal, kill_and_resume, run_two_processes, tiny_trainer
from lit_methods import EDSR, SuperResolution, Swin2SRNetwork
from lit_methods.callbacks import ExactResume, IterativeSoftShrinkage
from lit_methods.datamodules import SuperResolutionDataModule
from lit_methods.tasks.superres.metrics import psnr_y
from lit_methods.tasks.superres.module import side_by_side
from lit_methods.tasks.superres.networks import enlarge


def tiny(scale: int = 2, channels: int = 1, **kwargs: Any) -> SuperResolution:
    torch.manual_seed(0)
    return SuperResolution(EDSR(scale, 4, 1, image_channels=channels, bicubic_skip=True), scale, **kwargs)


def photographs(**kwargs: Any) -> SuperResolutionDataModule:
    return SuperResolutionDataModule(**{"scale": 2, "patch_size": 16, "color": "luma", "batch_size": 5, "patches_per_image": 4, **kwargs})


# ---- networks --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("channels", [1, 3])
def test_edsr_enlarges(scale, channels):
    network = EDSR(scale, 4, 2, 0.1, channels)
    assert network(torch.rand(2, channels, 5, 7)).shape == (2, channels, 5 * scale, 7 * scale)


def test_edsr_is_the_papers():
    network = EDSR(4, 256, 32, 0.1)
    assert sum(p.numel() for p in network.parameters()) == 43_089_923  # x4, as counted by hand from the paper's table
    small = EDSR(2, 3, 2, 0.5, 1, mean=[0.25])
    with torch.no_grad():
        for name, parameter in small.named_parameters():
            if name.startswith("body"):
                parameter.zero_()
    x = torch.rand(1, 1, 4, 4)
    expected = small.tail(small.head(x - 0.25)) + 0.25
    torch.testing.assert_close(small(x), expected, msg="without its body it is head and tail around the mean")


def test_the_bicubic_skip_adds_the_enlarged_image():
    network = EDSR(2, 3, 1, image_channels=3, bicubic_skip=True)
    with torch.no_grad():
        for parameter in network.tail.parameters():
            parameter.zero_()
    x = torch.rand(1, 3, 6, 6)
    torch.testing.assert_close(network(x), enlarge(x, 2))


def test_enlargement_is_pillows_bicubic():
    pixels = np.random.default_rng(0).random((9, 11)).astype(np.float32)
    theirs = np.asarray(Image.fromarray(pixels, mode="F").resize((22, 18), Image.Resampling.BICUBIC))
    np.testing.assert_allclose(enlarge(torch.from_numpy(pixels)[None, None], 2)[0, 0].numpy(), theirs, atol=1e-5)


def test_swin2sr_is_built_from_its_config():
    pytest.importorskip("transformers")
    network = Swin2SRNetwork(scale=2, embed_dim=12, depths=[1, 1], num_heads=[2, 2], window_size=4)
    assert network(torch.rand(1, 3, 10, 13)).shape == (1, 3, 20, 26)
    names = [name for name, _ in network.named_modules()]
    assert any(name.startswith("model.upsample") for name in names)
    assert any("continuous_position_bias_mlp" in name for name in names)
    one, other = torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8)
    assert network(one).shape == (1, 3, 16, 16)
    assert not torch.equal(network(one), network(other))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": 5}, "EDSR enlarges by 2, 3 or 4"),
        ({"channels": 0}, r"channels is 0: give a number in \[1, inf\)"),
        ({"mean": [0.5]}, "mean has 1 numbers for image_channels=3"),
    ],
)
def test_wrong_networks_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        EDSR(**arguments)


# ---- the module ------------------------------------------------------------------------------------------------------------------------


def test_training_lowers_the_loss_and_evaluation_gives_means_over_images():
    module, data = tiny(learning_rate=3e-3), photographs(patches_per_image=40)
    losses: list[float] = []

    class Losses(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
            losses.append(float(outputs["loss"]))

    trainer = tiny_trainer(max_epochs=2, callbacks=[Losses()])
    data.setup("validate")
    before = float(torch.cat([module.psnr_y(batch) for batch in data.val_dataloader()]).mean())
    trainer.fit(module, datamodule=data)
    assert sum(losses[-20:]) < 0.9 * sum(losses[:20])
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert found["superres/val_psnr"] > before + 1
    module.eval()
    with torch.no_grad():
        values = [module.psnr_y(batch) for batch in data.val_dataloader()]
        bicubic = [psnr_y(enlarge(batch["lr"], 2), batch["hr"], 2) for batch in data.val_dataloader()]
    assert found["superres/val_psnr"] == pytest.approx(float(torch.cat(values).mean()), abs=1e-4)
    assert found["superres/val_psnr_bicubic"] == pytest.approx(float(torch.cat(bicubic).mean()), abs=1e-4)
    picture = module.dashboard_media()["superres/picture"]
    assert picture.pixels.shape == (154, 3 * 154 + 8, 3)
    assert "astronaut" in picture.alt


def test_the_training_loss_is_the_mean_absolute_error():
    module = tiny()
    batch = {"lr": torch.rand(2, 1, 4, 4), "hr": torch.rand(2, 1, 8, 8)}
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    torch.testing.assert_close(module.training_step(batch, 0), (module(batch["lr"]) - batch["hr"]).abs().mean())
    with pytest.raises(ValueError, match=r"makes \(2, 1, 8, 8\) of \(2, 1, 4, 4\), but the batch's hr is \(2, 1, 7, 7\)"):
        module.training_step({"lr": batch["lr"], "hr": torch.rand(2, 1, 7, 7)}, 0)


def test_every_test_set_has_its_own_figures_and_predictions_are_8_bit():
    module, data = tiny(), photographs()
    trainer = tiny_trainer()
    trainer.test(module, datamodule=data, verbose=False)
    assert set(trainer.callback_metrics) == {"superres/test_psnr/photographs", "superres/test_ssim/photographs"}
    data.setup("test")
    loaders = [data.test_dataloader()[0]] * 2
    trainer.test(module, dataloaders=loaders, verbose=False)
    figures = trainer.callback_metrics
    assert set(figures) == {"superres/test_psnr/0", "superres/test_ssim/0", "superres/test_psnr/1", "superres/test_ssim/1"}
    assert figures["superres/test_psnr/0"] == figures["superres/test_psnr/1"]
    assert not module.test_metrics
    outputs = trainer.predict(module, datamodule=data)
    first = outputs[0] if isinstance(outputs[0], dict) else outputs[0][0]
    assert first["sr"].dtype == torch.uint8
    assert first["name"] == ["astronaut"]


def test_milestones_count_from_the_switch():
    module = tiny(milestones=[2], learning_rate=1e-3)
    rates: list[float] = []

    class Rates(pl.Callback):
        def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
            rates.append(optimizer.param_groups[0]["lr"])

    callback = IterativeSoftShrinkage(0.5, prune_iters=3, skip=["network.tail*"], probe="psnr_y")
    trainer = tiny_trainer(max_steps=7, callbacks=[callback, Rates()], limit_val_batches=2)
    trainer.fit(module, datamodule=photographs(batch_size=2))
    assert rates == [1e-3] * 5 + [5e-4] * 2
    found = {name: float(value) for name, value in trainer.callback_metrics.items() if "probe" in name}
    assert found["issp/probe_before"] != found["issp/probe_after"]
    assert 20 < found["issp/probe_after"] < 60
    assert all((weight != 0).all() for weight in module.network.tail.parameters())


def test_a_killed_run_ends_like_an_uninterrupted_one(tmp_path):
    def make() -> Any:
        callback = IterativeSoftShrinkage(0.5, prune_iters=4, skip=["network.tail*"], probe="psnr_y")
        return tiny(milestones=[2]), photographs(batch_size=4), [callback, ExactResume()]

    whole, resumed = kill_and_resume(make, 8, 3, tmp_path, limit_val_batches=1)
    assert_state_dicts_equal(resumed, whole)


def evaluate(devices: int) -> dict[str, float]:
    module, data = tiny(), photographs()
    kwargs = {"devices": 2, "strategy": "ddp"} if devices == 2 else {}
    trainer = tiny_trainer(**kwargs)
    trainer.validate(module, datamodule=data, verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_two_processes_evaluate_every_image_once():
    one = evaluate(1)
    for found in run_two_processes(evaluate, 2):
        assert found == pytest.approx(one, abs=1e-4)


def test_pictures_are_cut_from_the_middle():
    images = [torch.arange(36).view(1, 6, 6).to(torch.uint8), torch.zeros(1, 6, 6)]
    picture = side_by_side(images, gap=1)
    assert picture.shape == (6, 13, 3)
    assert (picture[:, 6] == 255).all()
    assert picture[2, 3, 0] == 15
    assert side_by_side([torch.rand(3, 400, 250)] * 2).shape == (192, 192 * 2 + 4, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": 0.0}, r"learning_rate is 0.0: give a number in \(0, inf\)"),
        ({"milestones": [5, 3]}, r"milestones=\[5, 3\] are optimiser steps"),
        ({"scale": 3}, "the network enlarges by 2, but scale=3"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SuperResolution(EDSR(2, 4, 1), **arguments)


def test_any_network_will_do():
    class Nearest(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(()))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.gain * F.interpolate(images, scale_factor=2)

    trainer = tiny_trainer(max_steps=2, limit_val_batches=1)
    trainer.fit(SuperResolution(Nearest(), 2), datamodule=photographs())
    assert float(trainer.callback_metrics["superres/loss"]) > 0


def test_bicubic_figures_of_set5_are_the_known_ones(test_data, tmp_path):
    """28.42 dB and 0.8104 at x4, as papers report them with MATLAB's enlargement."""
    if not (test_data / "set5").is_dir():
        pytest.skip("LIT_METHODS_TEST_DATA has no set5")
    (tmp_path / "benchmark").mkdir()
    (tmp_path / "benchmark" / "Set5").symlink_to(test_data / "set5")
    data = SuperResolutionDataModule(tmp_path, test=["Set5"], scale=4, patch_size=64)
    trainer = tiny_trainer()
    trainer.test(SuperResolution(Bicubic(), 4), datamodule=data, verbose=False)
    assert float(trainer.callback_metrics["superres/test_psnr/Set5"]) == pytest.approx(28.42, abs=0.02)
    assert float(trainer.callback_metrics["superres/test_ssim/Set5"]) == pytest.approx(0.8104, abs=0.001)


class Bicubic(nn.Module):
    """Has nothing to learn."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return enlarge(images, 4)
