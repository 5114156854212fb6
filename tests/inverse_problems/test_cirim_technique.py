"""CIRIM and what it is compared with: the maths against independent computations, runs of all kinds, and mistakes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers import assert_state_dicts_equal, kill_and_resume, run_two_processes, tiny_trainer
from lit_methods import CIRIM, CompressedSensing, EndToEndVarNet, UNetReconstruction, ZeroFilledReconstruction
from lit_methods.callbacks import ExactResume
from lit_methods.datamodules import PhantomScansDataModule
from lit_methods.inverse_problems.cirim import core
from lit_methods.inverse_problems.cirim.base import inverse_square_root
from lit_methods.inverse_problems.cirim.networks import ComplexUNet
from lit_methods.inverse_problems.mri import MultiCoilMRI, magnitude, sense_combine

TINY: dict[str, Any] = {"cascades": 2, "filters": 4, "time_steps": 2}
MODULES = {
    "cirim": lambda: CIRIM(**TINY),
    "explicit": lambda: CIRIM(**TINY, consistency="explicit", checkpointing=True),
    "rim": lambda: CIRIM(cascades=1, filters=4, time_steps=2, cell="gru"),
    "mgu, ssim": lambda: CIRIM(cascades=1, filters=4, time_steps=2, cell="mgu", loss="ssim", accumulate=False),
    "varnet": lambda: EndToEndVarNet(cascades=2, channels=2, pools=2),
    "varnet without consistency": lambda: EndToEndVarNet(cascades=2, channels=2, pools=1, consistency="implicit"),
    "unet": lambda: UNetReconstruction(channels=2, pools=1, schedule="inverse_sqrt"),
}


def scans(**words: Any) -> PhantomScansDataModule:
    return PhantomScansDataModule(**({"size": 16, "coils": 2, "num_train": 12, "num_val": 4, "batch_size": 2} | words))


def batch_of(dtype: torch.dtype = torch.float64, **words: Any) -> dict[str, Tensor]:
    data = scans(**words)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}


def seeded(name: str) -> Any:
    torch.manual_seed(0)
    return MODULES[name]()


# ---- the maths --------------------------------------------------------------------------------------------------------------------------


def test_the_gradient_channels_are_autograds() -> None:
    """1/2 |A x - y|^2 differentiated by torch, and the operator's own A^H (A x - y)."""
    batch = batch_of()
    x = torch.randn(2, 16, 16, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    operator = MultiCoilMRI(batch["maps"], batch["mask"])
    (wanted,) = torch.autograd.grad((operator(x) - batch["kspace"]).square().sum() / 2, x)
    found = core.log_likelihood_gradient(x, batch["kspace"], batch["maps"], batch["mask"])
    torch.testing.assert_close(found[:, 2:].permute(0, 2, 3, 1), wanted)
    torch.testing.assert_close(found[:, :2].permute(0, 2, 3, 1), x)
    small = core.log_likelihood_gradient(x, batch["kspace"], batch["maps"], batch["mask"], sigma=0.1)
    torch.testing.assert_close(small, found)  # sigma below 1 counts as 1


def test_gates_are_torchs_gru() -> None:
    """With 1 x 1 kernels a pixel is a GRU of its own, its reset behind the product, as torch has it."""
    cell, other = core.GatedCell(3, 4).double(), torch.nn.GRUCell(3, 4).double()
    x, hidden = (torch.randn(5, size, 1, 1, dtype=torch.float64) for size in (3, 4))
    with torch.no_grad():
        other.weight_ih.copy_(cell.ih.weight[..., 0, 0])
        other.weight_hh.copy_(cell.hh.weight[..., 0, 0])
        other.bias_ih.copy_(cell.ih.bias)
        other.bias_hh.zero_()
    torch.testing.assert_close(cell(x, hidden)[..., 0, 0], other(x[..., 0, 0], hidden[..., 0, 0]))


def test_mgu_against_its_equations() -> None:
    cell = core.GatedCell(2, 3, kernel=3, gates=2).double()
    x, hidden = torch.randn(1, 2, 5, 6, dtype=torch.float64), torch.randn(1, 3, 5, 6, dtype=torch.float64)
    ours, theirs = cell.ih(x), cell.hh(hidden)
    forget = torch.sigmoid(ours[:, :3] + theirs[:, :3])
    new = torch.tanh(ours[:, 3:] + forget * theirs[:, 3:])
    torch.testing.assert_close(cell(x, hidden), new + forget * (hidden - new))


def test_cascades_carry_image_and_hidden_states_over() -> None:
    """Two cascades with the weights of one are that one with twice the steps."""
    batch = batch_of()
    torch.manual_seed(1)
    short, long = core.CIRIMNetwork(2, 3, 2).double(), core.CIRIMNetwork(1, 3, 4).double()
    for block in short.cascades:
        block.load_state_dict(long.cascades[0].state_dict())
    words = (batch["kspace"], batch["maps"], batch["mask"])
    torch.testing.assert_close(short(*words).flatten(0, 1), long(*words)[0])
    assert core.CIRIMNetwork(1, 3, 9, round_time_steps=True).cascades[0].time_steps == 16  # type: ignore[union-attr]


def test_checkpointing_changes_no_gradient() -> None:
    batch = batch_of()
    words = (batch["kspace"], batch["maps"], batch["mask"])
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        network = core.CIRIMNetwork(2, 3, 2, consistency="explicit", checkpointing=checkpointing).double()
        core.accumulated_loss(network(*words), batch["target"])[0].backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    for ours, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, wanted)


def test_the_loss_step_by_step() -> None:
    """In plain loops; its scale doesn't matter, a single cascade counts 0.1, and images of zeros give no NaN."""
    generator = torch.Generator().manual_seed(0)
    predictions, target = torch.randn(2, 3, 2, 4, 4, 2, generator=generator), torch.randn(2, 4, 4, 2, generator=generator)
    truth = magnitude(target) / magnitude(target).max()
    wanted = 0.0
    for cascade, outer in zip(predictions, (0.1, 1.0), strict=True):
        for step, inner in zip(cascade, (0.1, 0.1**0.5, 1.0), strict=True):
            wanted += outer * inner * float((magnitude(step) / magnitude(step).max() - truth).abs().mean()) / 6
    loss, each = core.accumulated_loss(predictions, target)
    assert float(loss) == pytest.approx(wanted, rel=1e-5)
    assert float(core.accumulated_loss(7 * predictions, target)[0]) == pytest.approx(wanted, rel=1e-5)
    assert float(core.accumulated_loss(predictions, target, cascade_weights=False)[0]) == pytest.approx(float(each.mean()))
    assert float(core.accumulated_loss(predictions[:1], target)[0]) == pytest.approx(0.1 * float(each[0]), rel=1e-5)
    alone = [core.accumulated_loss(predictions[:, :, k : k + 1], target[k : k + 1], per_sample=True)[0] for k in range(2)]
    assert float(core.accumulated_loss(predictions, target, per_sample=True)[0]) == pytest.approx(float(sum(alone)) / 2, rel=1e-5)
    zeros = torch.zeros_like(predictions).requires_grad_()
    core.accumulated_loss(zeros, torch.zeros_like(target))[0].backward()
    assert zeros.grad is not None
    assert not zeros.grad.isnan().any()
    with pytest.raises(ValueError, match="predictions are"):
        core.accumulated_loss(predictions, target[:1])


def test_explicit_consistency_and_residual() -> None:
    """At lambda 1 and an image of zeros, what was measured comes back; the residual of a true image is its noise."""
    batch = batch_of(noise=0.0)
    words = (batch["kspace"], batch["maps"], batch["mask"])
    zeros = torch.zeros_like(batch["target"])
    found = core.explicit_consistency(words[0], words[0] + 1, zeros, *words[1:], torch.ones(1).double(), core.CENTERED)
    torch.testing.assert_close(found, words[0] - batch["mask"].double())
    assert float(core.consistency_residual(batch["target"], *words).max()) < 1e-6
    torch.testing.assert_close(core.consistency_residual(zeros, *words), torch.ones(2).double())
    nothing = torch.zeros_like(words[0])
    assert not core.consistency_residual(zeros, nothing, *words[1:]).any()


def test_the_unet_takes_any_size_and_ignores_scale() -> None:
    torch.manual_seed(0)
    network = ComplexUNet(2, 3)
    image = torch.randn(2, 9, 13, 2)
    found = network(image)
    assert found.shape == image.shape
    torch.testing.assert_close(network(100 * image), 100 * found, rtol=1e-3, atol=1e-2)


def test_the_schedule() -> None:
    assert [inverse_square_root(step, 3) for step in (0, 2, 3, 15)] == pytest.approx([0.25, 0.75, 1.0, 0.5])


# ---- runs -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(MODULES))
def test_every_model_trains(name: str) -> None:
    """All weights get gradients, under bf16, too, and Fourier transforms stay wide; figures and pictures are there."""
    module = seeded(name)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    trainer = tiny_trainer(max_steps=3, precision="bf16-mixed", limit_val_batches=2)
    trainer.fit(module, datamodule=scans(num_train=6))
    still = [key for key, value in module.state_dict().items() if torch.equal(value, before[key])]
    still = [key for key in still if not key.endswith(("cascades.0.dc_weight", "dc_weights.0"))]  # begins with y: k - y = 0
    assert not still, f"never trained: {still}"
    logged = trainer.callback_metrics
    assert all(bool(value.isfinite()) for value in logged.values())
    assert {"mri/val_psnr", "mri/val_ssim", "mri/val_nmse", "mri/val_residual", "mri/val_zero_filled_psnr"} <= set(logged)
    assert ("mri/lambda/0" in logged) == (name in ("explicit", "varnet"))
    assert module.dashboard_media()["mri/pictures"].pixels.shape[1] == 4 * module.dashboard_media()["mri/pictures"].pixels.shape[0]


def test_figures_are_those_of_volumes() -> None:
    """Two slices of one volume and one of another, against NumPy; the zero-filled module is its own floor."""
    module = ZeroFilledReconstruction(rescale=False)
    data = scans(num_val=3, batch_size=3)
    data.setup("fit")
    batch = next(iter(data.val_dataloader())) | {"volume": torch.tensor([4, 4, 9]), "maximum": torch.tensor([2.0, 2.0, 1.0])}
    trainer = tiny_trainer()
    trainer.validate(module, torch.utils.data.DataLoader([batch], batch_size=None), verbose=False)
    truth = magnitude(batch["target"]).numpy()
    image = magnitude(sense_combine(batch["kspace"], batch["maps"])).numpy()
    errors = [((image[part] - truth[part]) ** 2) for part in ([0, 1], [2])]
    wanted = np.mean([10 * np.log10(largest**2 / error.mean()) for error, largest in zip(errors, (2.0, 1.0), strict=True)])
    logged = trainer.callback_metrics
    assert float(logged["mri/val_psnr"]) == pytest.approx(wanted, rel=1e-5)
    nmse = np.mean([error.sum() / (truth[part] ** 2).sum() for error, part in zip(errors, ([0, 1], [2]), strict=True)])
    assert float(logged["mri/val_nmse"]) == pytest.approx(nmse, rel=1e-5)
    assert logged["mri/val_psnr"] == logged["mri/val_zero_filled_psnr"]
    assert float(logged["mri/val_ssim"]) < 1
    unnamed = [{name: value for name, value in batch.items() if name not in ("volume", "maximum")}] * 2
    trainer.validate(module, torch.utils.data.DataLoader(unnamed, batch_size=None), verbose=False)  # type: ignore[arg-type]
    each = [10 * np.log10(truth[k].max() ** 2 / ((image[k] - truth[k]) ** 2).mean()) for k in range(3)]
    assert float(trainer.callback_metrics["mri/val_psnr"]) == pytest.approx(np.mean(each), rel=1e-5)


def test_a_killed_run_ends_like_the_whole(tmp_path: Path) -> None:
    def build() -> Any:
        return seeded("explicit"), scans(), [ExactResume()]

    whole, resumed = kill_and_resume(build, steps=5, kill_at=3, tmp_path=tmp_path)
    assert_state_dicts_equal(whole, resumed)


def _train(devices: int) -> dict[str, Any]:
    module = seeded("cirim")
    words: dict[str, Any] = {"devices": devices, "strategy": "ddp" if devices > 1 else "auto", "accumulate_grad_batches": 2 // devices}
    trainer = tiny_trainer(max_steps=2, limit_val_batches=1.0, **words)
    trainer.fit(module, datamodule=scans(num_train=8, num_val=5))
    names = ("mri/val_psnr", "mri/val_ssim", "mri/val_residual")
    return {"state": dict(module.state_dict())} | {name: trainer.callback_metrics[name] for name in names}


def test_two_processes_end_like_one() -> None:
    """At the same global batch; five validation images, of which one process has more."""
    wanted = _train(1)
    for found in run_two_processes(_train, 2):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_compressed_sensing_beats_the_floor() -> None:
    pytest.importorskip("sigpy", reason="sigpy isn't installed: pip install 'lit-methods[mri]'")
    trainer = tiny_trainer()
    trainer.test(CompressedSensing(iterations=30), datamodule=scans(size=32, coils=4), verbose=False)
    logged = trainer.callback_metrics
    assert logged["mri/test_psnr"] > logged["mri/test_zero_filled_psnr"] + 1
    assert logged["mri/test_seconds_per_slice"] > 0


# ---- mistakes ---------------------------------------------------------------------------------------------------------------------------


def test_mistakes_are_named() -> None:
    batch = batch_of(torch.float32)
    module = seeded("cirim")
    with pytest.raises(ValueError, match="coil maps are"):
        module.training_step(batch | {"maps": batch["maps"][:, :1]}, 0)
    with pytest.raises(ValueError, match="mask is"):
        module.training_step(batch | {"mask": batch["mask"][..., :3, :]}, 0)
    with pytest.raises(ValueError, match="no maps"):
        module.training_step({name: value for name, value in batch.items() if name != "maps"}, 0)
    with pytest.raises(ValueError, match="no target"):
        module.training_step({name: value for name, value in batch.items() if name != "target"}, 0)
    full = batch | {"kspace": batch["kspace"] + ~batch["mask"]}  # beyond the mask nothing counts
    assert torch.equal(module.measured(full)[0], batch["kspace"])
    with pytest.raises(ValueError, match="has nothing to train"):
        tiny_trainer(max_steps=1).fit(ZeroFilledReconstruction(), datamodule=scans())
    with pytest.raises(ValueError, match="give an odd number"):
        CIRIM(recurrent_kernel=2)
    with pytest.raises(ValueError, match="give one of implicit, explicit"):
        CIRIM(consistency="hard")  # type: ignore[arg-type]
