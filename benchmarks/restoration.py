"""What a restored image costs: images per second by number of steps, colour fixes, and what recomputing activations saves.

    python benchmarks/restoration.py [--rounds 5] [--threads 1] [--size 64] [--batch 4] [--json FILE]

1. Images per second of ``InterLCM`` with a small U-Net and encoder, for 2, 3 and 4 steps (1, 2 and 3 calls), and the calls' share of
   a single one: restoring is the network's calls and hardly more. Medians over rounds in which all take turns.
2. Both colour fixes, as a share of one call.
3. Bytes that autograd keeps for the backward pass of four steps, with ``checkpointing`` and without, counted by its hooks; what each
   call is recomputed from isn't counted.

Use an idle machine. Everything runs in this process with ``--threads`` torch threads.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_methods import ControlledUNet, InterLCM, SmallLCM, SmallSpatialEncoder, SmallVisualEncoder
from lit_methods.functional import adain_color_fix, wavelet_color_fix

STEPS = (2, 3, 4)


def build(steps: int, **words: Any) -> InterLCM:
    """A small U-Net with both encoders."""
    network = {"in_channels": 3, "channels": 32, "multipliers": (1, 2)}
    return InterLCM(
        SmallLCM(ControlledUNet(**network)),  # type: ignore[arg-type]
        SmallVisualEncoder(128, in_channels=3),
        SmallSpatialEncoder(ControlledUNet(**network), image_channels=3),  # type: ignore[arg-type]
        n_steps=steps,
        **words,
    )


def seconds(call: Callable[[], object]) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@torch.no_grad()
def speed(lq: Tensor, rounds: int) -> dict[str, float]:
    """Medians over rounds."""
    modules = {steps: build(steps).eval() for steps in STEPS}
    numbers = range(len(lq))
    calls: dict[str, Callable[[], object]] = {f"{steps} steps": lambda m=m: m.restored(lq, numbers) for steps, m in modules.items()}  # type: ignore[misc]
    calls |= {"wavelet": lambda: wavelet_color_fix(lq, lq), "adain": lambda: adain_color_fix(lq, lq)}
    for call in calls.values():
        call()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            taken[name].append(seconds(call))
    found = {name: statistics.median(values) for name, values in taken.items()}
    one = found["2 steps"]
    rows = {f"{steps} steps, images/s": len(lq) / found[f"{steps} steps"] for steps in STEPS}
    rows |= {f"{steps} steps, times one call": found[f"{steps} steps"] / one for steps in STEPS}
    return rows | {f"{name}, share of one call": found[name] / one for name in ("wavelet", "adain")}


def kept(lq: Tensor, checkpointing: bool) -> int:
    """Bytes that are kept for the backward pass of four steps, without weights and what is counted already."""
    module = build(4, checkpointing=checkpointing)
    weights = {value.data_ptr() for value in (*module.parameters(), *module.lcm.parameters())}
    seen: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if x.data_ptr() not in weights:
            seen[x.data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = module(lq, module.noises(lq, range(len(lq)))[:3])
    assert output.requires_grad
    return sum(seen.values())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    lq = torch.rand(options.batch, 3, options.size, options.size) * 2 - 1
    rows = speed(lq, options.rounds)
    plain, recomputed = kept(lq, False), kept(lq, True)
    rows |= {"kept MB": plain / 1e6, "kept MB, recomputed": recomputed / 1e6, "share kept": recomputed / plain}
    for name, value in rows.items():
        print(f"{name:28s} {value:10.3f}")
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
