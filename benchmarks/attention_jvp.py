"""What attention with its derivative costs: memory and time of the blockwise form beside plain attention under ``torch.func.jvp``.

    python benchmarks/attention_jvp.py [--tokens 4096 8192 16384] [--device cpu] [--dtype float32] [--block 256] [--rounds 3] [--json FILE]

One head of 64 features. Each case runs in a process of its own. Memory is what the call adds to the process at its highest point: on the
CPU the peak of resident memory beyond that before the call (Linux; pages that were free before hide a few MiB), on a GPU
``torch.cuda.max_memory_allocated`` likewise. Seconds are the shortest of ``--rounds`` further calls. On a GPU there is also plain flash
attention, which has no derivative, and the ratio of the blockwise form (a Triton kernel there) to it; the target is 2.5. A case that
doesn't fit into memory is shown as nan.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_methods.consistency_models.rcm.attention_jvp import attention_with_tangent, plain_attention

FORMS = ("blockwise", "plain", "flash")


def call(form: str, tensors: list[Tensor], block: int) -> Callable[[], Any]:
    """What is measured."""
    if form == "blockwise":
        q, k, v, tq, tk, tv = tensors
        return lambda: attention_with_tangent(q, k, v, tq, tk, tv, block_size=block)
    if form == "plain":
        return lambda: torch.func.jvp(lambda q, k, v: plain_attention(q, k, v)[0], tuple(tensors[:3]), tuple(tensors[3:]))
    return lambda: F.scaled_dot_product_attention(tensors[0], tensors[1], tensors[2])


def resident(field: str) -> int:
    """Resident memory of this process in bytes, now (``VmRSS``) or at its highest point (``VmHWM``)."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measure(form: str, tokens: int, device: str, dtype: str, block: int, rounds: int) -> dict[str, float]:
    """Bytes that one call adds at its peak, and seconds of the fastest one."""
    torch.set_num_threads(1)
    small = [torch.randn(1, 1, 64, 64, device=device, dtype=getattr(torch, dtype)) for _ in range(6)]
    tensors = [torch.randn(1, 1, tokens, 64, device=device, dtype=getattr(torch, dtype)) for _ in range(6)]
    with torch.no_grad():
        call(form, small, block)()  # libraries are loaded, kernels compiled
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call(form, tensors, block)()
            peak = torch.cuda.max_memory_allocated() - before
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the highest point so far is forgotten
            before = resident("VmRSS")
            call(form, tensors, block)()
            peak = resident("VmHWM") - before
        seconds = []
        for _ in range(rounds):
            start = time.perf_counter()
            call(form, tensors, block)()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    return {"bytes": float(peak), "seconds": min(seconds)}


def apart(form: str, tokens: int, options: argparse.Namespace) -> dict[str, float] | None:
    """``measure`` in a process of its own; None if it ended for lack of memory."""
    words = ["--one", form, "--tokens", str(tokens), "--device", options.device, "--dtype", options.dtype]
    words += ["--block", str(options.block), "--rounds", str(options.rounds)]
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return found
    if done.returncode < 0 or "memory" in done.stderr:
        return None
    raise RuntimeError(done.stderr)


def table(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each number of tokens, printed as it comes."""
    forms = FORMS if options.device == "cuda" else FORMS[:2]
    rows = []
    print(f"{'tokens':>7}" + "".join(f"{form + ' MiB':>15}{form + ' s':>13}" for form in forms) + f"{'plain / blockwise memory':>27}")
    for tokens in options.tokens:
        found = {form: apart(form, tokens, options) for form in forms}
        cells = [(one["bytes"] / 2**20, one["seconds"]) if one else (float("nan"),) * 2 for one in found.values()]
        ours, plain = found["blockwise"], found["plain"]
        ratio = plain["bytes"] / ours["bytes"] if ours and plain else float("nan")
        print(f"{tokens:>7}" + "".join(f"{size:>15.1f}{seconds:>13.3f}" for size, seconds in cells) + f"{ratio:>27.1f}", flush=True)
        rows.append({"tokens": tokens, **found, "memory_ratio": ratio})
        flash = found.get("flash")
        if ours and flash:
            print(f"{'':>7} blockwise / flash, seconds: {ours['seconds'] / flash['seconds']:.2f} (target: at most 2.5)")
    return rows


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--block", type=int, default=256, help="queries and keys at a time")
    parser.add_argument("--rounds", type=int, default=3, help="calls that are timed")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--one", choices=FORMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.tokens[0], options.device, options.dtype, options.block, options.rounds)))
        return
    rows = table(options)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
