"""What CoNo adds to a denoising step: the pull on the content, guided frames, the passes of a long video; and DDC's translations.

    python benchmarks/diffusion.py [--rounds 20] [--threads 1] [--channels 32] [--latents 4 40 64] [--json FILE]

1. One call of ``SmallVideoUNet`` with 16 frames of latents, and one ``regularise`` of what it predicts: a round times both in turn, and the
   median ratio is printed. Target: the pull takes at most 1 % of the call. A released network is thousands of times larger than this one,
   and the pull stays what it is.
2. Frames per second of each strategy for a video of 36 frames, by the number of calls and frames that it takes.
3. Images per second of DDC's translations by the number of steps: 16 images of 16 x 16, with content and structure guidance or without.

Use an idle machine. Everything runs in this process with ``--threads`` torch threads.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lit_methods import ContentFusionUNet, LongVideoSampler, PhasicContentDiffusion, SmallVideoUNet, TranslationSampler
from lit_methods.functional import content, regularise

STRATEGIES = ("cono", "naive", "independent", "freenoise", "genl", "direct")


def seconds(call: Callable[[], object], repeats: int = 1) -> float:
    """Seconds of a call: the mean of some."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


@torch.no_grad()
def pull(network: SmallVideoUNet, shape: list[int], rounds: int) -> dict[str, float]:
    """Medians over rounds, each with the call of the network and the pull in turn."""
    x, reference = torch.randn(1, 16, *shape), content(torch.randn(1, 16, *shape))
    step, prompt = torch.tensor([500]), torch.tensor([3])
    eps = network.denoise(x, step, prompt)
    regularise(eps, reference, 140.0)
    calls, pulls = [], []
    for _ in range(rounds):
        calls.append(seconds(lambda: network.denoise(x, step, prompt)))
        pulls.append(seconds(lambda: regularise(eps, reference, 140.0), 10))
    ratios = [one / call for one, call in zip(pulls, calls, strict=True)]
    return {"denoise_ms": 1e3 * statistics.median(calls), "pull_ms": 1e3 * statistics.median(pulls), "ratio": statistics.median(ratios)}


def speed(network: SmallVideoUNet, strategy: str) -> dict[str, float]:
    """Frames per second of a video of 36 frames of 16 x 16, with 4 steps."""
    sampler = LongVideoSampler(strategy=strategy, steps=4, guided_until=1)  # type: ignore[arg-type]
    evaluated = 0

    class Counting:
        frame_prompts = True
        attention_windows = staticmethod(network.attention_windows)

        def denoise(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
            nonlocal evaluated
            evaluated += x.shape[0] * x.shape[1]
            return network.denoise(x, t, cond)

    def source(name: str, frames: int) -> Tensor:
        return torch.randn(1, frames, network.inp.in_channels, 16, 16)

    took = seconds(lambda: sampler.sample(Counting(), network.shares, [torch.tensor([3])], source))
    return {"frames_per_second": sampler.length / took, "frames_evaluated_per_step": evaluated / 4}


def translation(steps: int, whole: bool, images: int = 16) -> dict[str, float]:
    """Images per second of a translation; ``whole``: with content and structure guidance."""
    sampler = TranslationSampler(steps=steps, content=whole, guided=whole)
    module = PhasicContentDiffusion(ContentFusionUNet(1, 16, (1, 2, 4)), sampler=sampler)
    source = torch.rand(images, 1, 16, 16) * 2 - 1
    module.translate(source, torch.randn_like)
    return {"images_per_second": images / seconds(lambda: module.translate(source, torch.randn_like))}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--latents", type=int, nargs=3, default=[4, 40, 64], metavar=("C", "H", "W"))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    network = SmallVideoUNet(given.latents[0], given.channels)
    found: dict[str, dict[str, float]] = {"pull": pull(network, given.latents, given.rounds)}
    print("call of the network {denoise_ms:.2f} ms, pull {pull_ms:.3f} ms: {ratio:.2%} of it (target: 1 %)".format(**found["pull"]))
    for strategy in STRATEGIES:
        found[strategy] = speed(network, strategy)
        print("{}: {frames_per_second:.1f} frames/s, {frames_evaluated_per_step:.0f} frames a step".format(strategy, **found[strategy]))
    for steps in (5, 10, 25):
        for whole in (False, True):
            name = f"translation in {steps} steps{', with content and guidance' if whole else ''}"
            found[name] = translation(steps, whole)
            print("{}: {images_per_second:.1f} images/s".format(name, **found[name]))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
