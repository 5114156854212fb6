"""FLAIR by a Trainer against the page's loop: a prior that is trained, its error curve, and images that are restored."""

import pytest
import torch

from lit_methods import FLAIR, BoxInpainting, LatentFlow, SmallUNet
from lit_methods.datamodules import RestorationDataModule
from lit_methods.inverse_problems.flair.core import FlairSettings
from trajectories import TOLERANCE, assert_same_logs, assert_same_state, both_dtypes, page_loop, run

PRECISION = {torch.float32: "32-true", torch.float64: "64-true"}


def prior() -> LatentFlow:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LatentFlow(SmallUNet(1, 8, (1,)))


@pytest.mark.parametrize("dtype", both_dtypes, ids=str)
def test_a_run_is_the_loop(dtype: torch.dtype) -> None:
    data, operator = RestorationDataModule(image_size=8, batch_size=16, eval_batch_size=8), BoxInpainting([8, 8], [2, 2, 4, 4])
    settings = FlairSettings(steps=4, lr_data=0.3, data_steps=3)
    module = FLAIR(prior(), operator, settings, calibration_times=5, val_images=8, seed=3)
    limits = {"limit_train_batches": 4, "limit_val_batches": 1, "precision": PRECISION[dtype]}
    logs = run(module, data, **limits)

    own, loop = prior().to(dtype), page_loop("flair")
    batches = [batch["image"].to(dtype) for batch, _ in zip(data.train_dataloader(), range(4), strict=False)]
    clean, numbers = data.val_set.images[:8].to(dtype), list(range(1497, 1505))
    wanted = loop.train(own, batches, seed=3)
    curve = loop.calibrate(own, clean, numbers, times=5, seed=3)
    start = operator.pseudo_inverse(operator(clean))
    images = loop.restore(own, operator, clean, numbers, curve, settings, noise=0.01, seed=3)

    tolerance = 10 * TOLERANCE[dtype]
    assert_same_logs(logs, wanted, tolerance)
    state = {f"prior.{name}": value for name, value in own.state_dict().items()} | {"solver.error": curve}
    assert_same_state(module.state_dict(), state, tolerance)
    found = module.predict_step({"image": clean, "index": torch.tensor(numbers)}, 0)
    torch.testing.assert_close(found["image"], images, rtol=tolerance, atol=tolerance)
    assert (images - start).abs().max() > 0.05
