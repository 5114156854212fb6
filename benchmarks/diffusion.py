"""What CoNo adds to a denoising step, what DLoRAL's retrieval takes, and how fast long videos and DDC's translations are.

    python benchmarks/diffusion.py [--rounds 20] [--threads 1] [--channels 32] [--latents 4 40 64] [--json FILE]

1. One call of ``SmallVideoUNet`` with 16 frames of latents, and one ``regularise`` of what it predicts: a round times both in turn, and the
   median ratio is printed. Target: the pull takes at most 1 % of the call. A released network is thousands of times larger than this one,
   and the pull stays what it is.
2. ``retrieval``: DLoRAL's cross-frame retrieval with its gradient, dense and in chunks, for latents of ``--side``: seconds, and
   the bytes of tensors alive at the peak, each in a process of its own; both must give the same.
3. ``speed``: frames per second of each strategy for a video of 36 frames, by the number of calls and frames that it takes.
4. ``translation``: images per second of DDC's translations by the number of steps: 16 images of 16 x 16, with content and structure
   guidance or without.

Use an idle machine. Everything runs in this process with ``--threads`` torch threads.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lit_methods import ContentFusionUNet, LongVideoSampler, PhasicContentDiffusion, SmallVideoUNet, TranslationSampler
from lit_methods.functional import content, cross_frame_attention, regularise

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


HEADS, WIDTH = 9, 64  # of the paper


def retrieve(side: int, chunk: int, rounds: int) -> dict[str, float]:
    """Retrieval for one frame with its gradient: the fastest of some rounds, and the MB of tensors that are alive at its peak."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, HEADS, side * side, WIDTH, generator=generator).requires_grad_() for _ in range(3))
    threshold = torch.zeros(1, HEADS, side * side)
    small = torch.randn(1, 1, 8, 4).requires_grad_()  # what is imported at the first call isn't retrieval's
    cross_frame_attention(small, small, small, torch.zeros(1, 1, 8), 1.0, chunk=2 if chunk else None).sum().backward()
    took = []
    for _ in range(rounds):
        start = time.perf_counter()
        found = cross_frame_attention(query, key, value, threshold, 3000.0, chunk=chunk or None)
        gradients = torch.autograd.grad(found.square().sum(), (query, key, value))
        took.append(time.perf_counter() - start)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as watched:
        found = cross_frame_attention(query, key, value, threshold, 3000.0, chunk=chunk or None)
        gradients = torch.autograd.grad(found.square().sum(), (query, key, value))
    recorded = [event for event in watched.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    alive = list(itertools.accumulate(event.nbytes() for event in sorted(recorded, key=lambda event: event.start_ns())))
    sums = sum(float(part.detach().double().abs().sum()) for part in (found, *gradients))
    return {"seconds": min(took), "megabytes": max(alive) / 1e6, "sum": sums}


def retrieval(side: int, chunks: list[int], rounds: int, threads: int) -> dict[str, dict[str, float]]:
    """Dense (0) and chunked retrieval, each in a process of its own."""
    found = {}
    for chunk in chunks:
        words = ["--retrieve", str(side), str(chunk), "--rounds", str(rounds), "--threads", str(threads)]
        said = subprocess.run([sys.executable, __file__, *words], check=True, capture_output=True, text=True).stdout
        found[f"chunk {chunk}" if chunk else "dense"] = json.loads(said)
    dense = found["dense"]["sum"]
    if any(abs(figures["sum"] / dense - 1) > 1e-4 for figures in found.values()):
        raise SystemExit(f"chunks give something else than the dense form: {found}")
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--latents", type=int, nargs=3, default=[4, 40, 64], metavar=("C", "H", "W"))
    parser.add_argument("--side", type=int, default=40, help="of the latents that retrieval is timed with")
    parser.add_argument("--retrieve", type=int, nargs=2, help=argparse.SUPPRESS)  # what a process of its own computes
    parser.add_argument("--only", choices=("pull", "retrieval", "speed", "translation"), help="one section")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.retrieve:
        print(json.dumps(retrieve(*given.retrieve, given.rounds)))
        return
    torch.manual_seed(0)
    network = SmallVideoUNet(given.latents[0], given.channels)
    found: dict[str, dict[str, float]] = {}
    if given.only in (None, "pull"):
        found["pull"] = pull(network, given.latents, given.rounds)
        print("call of the network {denoise_ms:.2f} ms, pull {pull_ms:.3f} ms: {ratio:.2%} of it (target: 1 %)".format(**found["pull"]))
    if given.only in (None, "retrieval"):
        for name, figures in retrieval(given.side, [0, 64, 256, 1024], max(1, given.rounds // 5), given.threads).items():
            found[f"retrieval {name}"] = figures
            print("retrieval of {0} x {0}, {1}: {seconds:.2f} s, {megabytes:.0f} MB".format(given.side, name, **figures))
    for strategy in STRATEGIES if given.only in (None, "speed") else ():
        found[strategy] = speed(network, strategy)
        print("{}: {frames_per_second:.1f} frames/s, {frames_evaluated_per_step:.0f} frames a step".format(strategy, **found[strategy]))
    for steps in (5, 10, 25) if given.only in (None, "translation") else ():
        for whole in (False, True):
            name = f"translation in {steps} steps{', with content and guidance' if whole else ''}"
            found[name] = translation(steps, whole)
            print("{}: {images_per_second:.1f} images/s".format(name, **found[name]))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
