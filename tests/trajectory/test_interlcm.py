"""InterLCM by a Trainer against the page's loop: encoders through the frozen chain, the discriminator's start, and images."""

from typing import Any

import pytest
import torch
from torch import nn

from lit_methods import DigitLCM, FeatureDistance, ImageResidual, InterLCM, PatchDiscriminator, RandomFeatures, SmallVisualEncoder
from trajectories import TOLERANCE, assert_same_logs, assert_same_state, both_dtypes, page_loop, run

PRECISION = {torch.float32: "32-true", torch.float64: "64-true"}


def parts() -> dict[str, nn.Module]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        visual, spatial = SmallVisualEncoder(12, channels=4), ImageResidual(1, 16, (1,))
        for parameter in (*visual.parameters(), *spatial.parameters()):  # they are 0 at the end, and would learn nothing before it
            nn.init.normal_(parameter, std=0.1)
        return {"visual_encoder": visual, "spatial_encoder": spatial, "discriminator": PatchDiscriminator(1, 4, 1)}


def distance() -> FeatureDistance:
    return FeatureDistance(RandomFeatures(1, (4, 8)))


@pytest.mark.parametrize("dtype", both_dtypes, ids=str)
def test_a_run_is_the_loop(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    clean = torch.rand(5, 6, 1, 8, 8, generator=generator, dtype=dtype) * 2 - 1
    batches: list[Any] = [{"image": x, "lq": x * 0.8 + 0.1} for x in clean]
    words = {"learning_rate": 1e-2, "final_learning_rate": 1e-2, "gan_start": 2, "accumulate": 1, "seed": 3}
    module = InterLCM(DigitLCM(8, 12), **parts(), perceptual=distance(), checkpointing=True, **words)  # type: ignore[arg-type]
    logs = run(module, batches, precision=PRECISION[dtype])

    loop, own = page_loop("interlcm"), {name: part.to(dtype) for name, part in parts().items()}
    lcm, perceptual = DigitLCM(8, 12).to(dtype), distance().to(dtype)
    wanted = loop.train(lcm, *own.values(), perceptual, batches, gan_start=2, learning_rate=1e-2, seed=3)

    tolerance = 10 * TOLERANCE[dtype]
    assert_same_logs(logs, wanted, tolerance)
    assert "interlcm/gan" not in wanted[1]
    assert "interlcm/gan" in wanted[2]
    state = {f"{name}.{key}": value for name, part in own.items() for key, value in part.state_dict().items()}
    assert_same_state(module.state_dict(), state, tolerance)
    lq, numbers = batches[0]["lq"], [4, 0, 7, 1, 2, 9]
    module.to(dtype).eval()
    with torch.no_grad():
        images = loop.restore(lcm, own["visual_encoder"].eval(), own["spatial_encoder"].eval(), lq, module.noises(lq, numbers)[:3])
        torch.testing.assert_close(module.restored(lq, numbers), images.clamp(-1, 1), rtol=tolerance, atol=tolerance)
