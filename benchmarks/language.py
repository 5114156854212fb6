"""What techniques for language models cost: one section for each kind of technique.

    python benchmarks/language.py [--section fine_tuning] [--rounds 5] [--steps 6] [--threads 1] [--json FILE]

``fine_tuning``: a training step of a small LLaMA-like model (width 256, 4 blocks, 8 heads with 4 of keys and values, 4 windows of 256
tokens) by full fine-tuning, LoRA of peft on q, k, v, up and down (rank 4), S2FT on output and down projections, and SaRA at the same number
of trained values, within 2 %. In one run, in turns:

- bytes that autograd keeps for the backward pass: of all tensors that it saves, each memory once, that of parameters left out;
- bytes of gradients behind a backward pass, and of the optimiser's state behind a step;
- median seconds of a step (forward, backward, optimiser), and its ratio to that of full fine-tuning in the same round: median of the
  rounds, and their quartiles. Time matters on an idle machine alone; bytes don't depend on it.

Arms whose library isn't installed are left out, and named.

``sparse_attention``: reading 4,096 and 16,384 tokens by Block-Sparse and by Vertical-Slash, the choice of keys included, beside
``scaled_dot_product_attention``, at budgets whose measured density (computed pairs / causal pairs) is nearest to 0.1 and 0.2; and a step of
decoding by Quest with a tenth of the cache beside one with all of it. Two query heads share one head of keys of width 64 (eight and two in
decoding), float32. Queries and keys agree by their distance, a little less the further they are apart, and some keys are wanted by all.
"""

import argparse
import copy
import importlib.util
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_methods.callbacks import S2FT, LoRA, SaRA

# ---- fine-tuning -----------------------------------------------------------------------------------------------------------------------

LLAMA = {
    "vocab_size": 1000, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "max_position_embeddings": 256,
}  # fmt: skip
BATCH, LENGTH = 4, 256
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
RANK = 4


class Tuning(pl.LightningModule):
    """A small language model, AdamW."""

    def __init__(self) -> None:
        super().__init__()
        import transformers

        torch.manual_seed(0)
        self.model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))

    def training_step(self, tokens: Tensor, batch_idx: int) -> Tensor:
        return self.model(input_ids=tokens, labels=tokens, use_cache=False).loss  # type: ignore[no-any-return]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([own for own in self.parameters() if own.requires_grad], lr=1e-4, weight_decay=0.0)


def lora_values(model: nn.Module) -> int:
    """Values of the adapters."""
    layers = [layer for name, layer in model.named_modules() if name.endswith(PROJECTIONS)]
    return sum(RANK * sum(layer.weight.shape) for layer in layers)  # type: ignore[arg-type, misc]


def arms() -> dict[str, Callable[[], list[pl.Callback]]]:
    """Name -> its callbacks; the budgets are LoRA's."""
    model = Tuning().model
    budget = lora_values(model)
    width, inside, blocks = LLAMA["hidden_size"], LLAMA["intermediate_size"], LLAMA["num_hidden_layers"]
    groups = LLAMA["num_key_value_heads"] * blocks
    heads = 3 / groups  # three groups of heads, each width x width / groups of a block, the rest in channels
    left = budget - 3 * width * width // LLAMA["num_key_value_heads"]
    channels = (left // width + 0.5) / (inside * blocks)
    share = budget / sum(own.numel() for own in model.parameters())
    found: dict[str, Callable[[], list[pl.Callback]]] = {"full fine-tuning": lambda: []}
    if importlib.util.find_spec("peft") is not None:
        found["LoRA (peft)"] = lambda: [LoRA([f"*.{name}" for name in PROJECTIONS], rank=RANK)]
    if left > 0:
        found["S2FT, o and d"] = lambda: [S2FT(o_ratio=heads + 1e-9, d_ratio=channels)]
    found["S2FT, d alone"] = lambda: [S2FT(d_ratio=(budget // width + 0.5) / (inside * blocks))]
    found["SaRA"] = lambda: [SaRA(threshold=None, share=share, progressive_steps=-1)]
    found["SaRA without the penalty of rank"] = lambda: [SaRA(threshold=None, share=share, progressive_steps=-1, rank_weight=0.0)]
    return found


class Measure(pl.Callback):
    """Bytes of the first step, and seconds of the others."""

    def __init__(self) -> None:
        self.figures: dict[str, float] = {}
        self.seconds: list[float] = []
        self._saved: dict[int, int] = {}
        self._hooks: Any = None
        self._start = 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        self._start = time.perf_counter()
        if batch_idx == 0:
            owned = {own.untyped_storage().data_ptr() for own in [*pl_module.parameters(), *pl_module.buffers()]}

            def keep(value: Tensor) -> Tensor:
                storage = value.untyped_storage()
                if storage.data_ptr() not in owned:
                    self._saved[storage.data_ptr()] = storage.nbytes()
                return value

            self._hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value)
            self._hooks.__enter__()

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        if self._hooks is not None:
            self._hooks.__exit__(None, None, None)
            self._hooks = None
            self.figures["saved"] = sum(self._saved.values())

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        grads = [own.grad for own in pl_module.parameters() if own.grad is not None]
        self.figures["gradients"] = sum(grad.numel() * grad.element_size() for grad in grads)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seconds.append(time.perf_counter() - self._start)
        states = [value for state in trainer.optimizers[0].state.values() for value in state.values() if isinstance(value, Tensor)]
        self.figures["optimiser"] = sum(value.numel() * value.element_size() for value in states)
        self.figures["trained"] = sum(own.numel() for own in pl_module.parameters() if own.requires_grad)


def fine_tuning(rounds: int, steps: int) -> dict[str, dict[str, Any]]:
    """Arm -> figures."""
    tokens = torch.randint(LLAMA["vocab_size"], ((steps + 2) * BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    base, kinds = Tuning(), arms()
    figures: dict[str, dict[str, Any]] = {name: {} for name in kinds}
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(rounds):
        names = list(kinds)[:: 1 if number % 2 == 0 else -1]
        for name in names:
            measure = Measure()
            quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
            trainer = pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=[*kinds[name](), measure], **quiet)  # type: ignore[arg-type]
            trainer.fit(copy.deepcopy(base), DataLoader(tokens, batch_size=BATCH))  # type: ignore[arg-type]
            figures[name].update(measure.figures)
            times[name].append(statistics.median(measure.seconds[2:]))
    for name, seconds in times.items():
        ratios = [own / full for own, full in zip(seconds, times["full fine-tuning"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        figures[name] |= {"seconds": statistics.median(seconds), "ratio": middle, "ratio_low": low, "ratio_high": high}
    return figures


def show_fine_tuning(figures: dict[str, dict[str, Any]]) -> None:
    """Print the table."""
    print(f"{'':34}{'trained':>10}{'saved MB':>10}{'grad MB':>9}{'state MB':>10}{'step s':>8}  / full [quartiles]")
    for name, own in figures.items():
        sizes = "".join(f"{own[key] / 1e6:>{width}.2f}" for key, width in (("saved", 10), ("gradients", 9), ("optimiser", 10)))
        ratio = f"{own['ratio']:.2f} [{own['ratio_low']:.2f}, {own['ratio_high']:.2f}]"
        print(f"{name:34}{int(own['trained']):>10,}{sizes}{own['seconds']:>8.3f}  {ratio}")
    if importlib.util.find_spec("peft") is None:
        print('LoRA was left out: pip install "lit-methods[peft]"')


# ---- sparse attention ------------------------------------------------------------------------------------------------------------------

LENGTHS, DENSITIES, WIDTH = (4096, 16_384), (0.1, 0.2), 64


def made_attention(heads: int, kv_heads: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as a trained model might have them: noise, rotary positions, and keys that all queries want."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, own, length, WIDTH, generator=generator) for own in (heads, kv_heads, kv_heads))
    angles = torch.arange(length)[:, None] * 10_000.0 ** (-torch.arange(WIDTH // 2) / (WIDTH // 2))
    turned = torch.cat([angles.cos(), angles.sin()], -1)  # of one vector: products depend on distances alone
    wanted = torch.randn(WIDTH, generator=generator)
    k[:, :, torch.randperm(length, generator=generator)[: length // 200]] += 0.5 * wanted
    return q + turned + 0.5 * wanted, k + turned, v


def nearest(density: float, build: Callable[[int], Any], budgets: list[int], q: Tensor, k: Tensor) -> tuple[Any, int, float]:
    """The method whose density is nearest to ``density``, its budget and its density."""
    from lit_methods.sparse_attention.blocks import all_pairs
    from lit_methods.sparse_attention.method import AttentionCall

    found = []
    for budget in budgets:
        method = build(budget)
        kept = method.prefill(q, k, AttentionCall(0, WIDTH**-0.5))
        share = float(kept.pairs(q.shape[2], q.shape[2]).mean()) / all_pairs(q.shape[2], q.shape[2], True)
        found.append((abs(share - density), budget, share, method))
        if share > 1.5 * density:
            break
    _, budget, share, method = min(found, key=lambda one: one[:2])
    return method, budget, share


@torch.no_grad()
def sparse_attention(rounds: int, steps: int) -> dict[str, dict[str, Any]]:
    """Arm -> figures."""
    from lit_methods.callbacks import BlockSparse, Quest, VerticalSlash
    from lit_methods.sparse_attention.blocks import block_attention, token_attention
    from lit_methods.sparse_attention.method import AttentionCall

    call = AttentionCall(0, WIDTH**-0.5)
    kinds: dict[str, tuple[str, Callable[[], Tensor], float, int]] = {}  # arm -> beside which, what runs, density, budget

    for length in LENGTHS:
        q, k, v = made_attention(2, 1, length)
        full = f"{length:,} tokens, full attention"
        kinds[full] = (
            full,
            lambda q=q, k=k, v=v: nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),  # type: ignore[misc]
            1.0,
            length,
        )
        for density in DENSITIES:
            blocks = length // 16
            choices = {
                "Block-Sparse": (lambda top: BlockSparse(16, top), list(range(max(3, blocks // 40), blocks // 6, max(1, blocks // 256)))),
                "Vertical-Slash": (
                    lambda budget: VerticalSlash(budget, budget),
                    [64, 80, 96, 112, 128, 164, 200, 240, 280, 315, 360, 400, 448, 512, 576, 672, 768, 1024, 1536],
                ),
            }
            for name, (build, budgets) in choices.items():
                method, budget, share = nearest(density, build, budgets, q, k)

                def prefill(method: Any = method, q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
                    return block_attention(q, k, v, method.prefill(q, k, call), call.scale)

                kinds[f"{length:,} tokens, {name} {density}"] = (full, prefill, share, budget)
        q, k, v = made_attention(8, 2, length)
        full = f"{length:,} tokens, a step with the whole cache"
        kinds[full] = (
            full,
            lambda q=q, k=k, v=v: nn.functional.scaled_dot_product_attention(q[:, :, -1:], k, v, enable_gqa=True),  # type: ignore[misc]
            1.0,
            length,
        )
        quest = Quest(16, length // 160 * 16)
        quest.compress(q[:, :, :-1], k[:, :, :-1], call)

        def decode(quest: Any = quest, q: Tensor = q[:, :, -1:], k: Tensor = k, v: Tensor = v) -> Tensor:
            return token_attention(q, k, v, quest.decode(q, k, call), call.scale)

        kinds[f"{length:,} tokens, a step with Quest"] = (full, decode, (quest.budget + 16) / length, quest.budget)
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(rounds + 1):  # the first is warm-up
        for name in list(kinds)[:: 1 if number % 2 == 0 else -1]:
            repeats = 20 if "a step" in name else 1
            start = time.perf_counter()
            for _ in range(repeats):
                kinds[name][1]()
            if number:
                times[name].append((time.perf_counter() - start) / repeats)
    figures: dict[str, dict[str, Any]] = {}
    for name, (beside, _, share, budget) in kinds.items():
        ratios = [full / own for own, full in zip(times[name], times[beside], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        figures[name] = {"seconds": statistics.median(times[name]), "density": share, "budget": budget}
        figures[name] |= {"speed_up": middle, "speed_up_low": low, "speed_up_high": high}
    return figures


def show_sparse_attention(figures: dict[str, dict[str, Any]]) -> None:
    """Print the table."""
    print(f"{'':46}{'density':>8}{'budget':>8}{'ms':>10}  speed-up [quartiles]")
    for name, own in figures.items():
        ratio = f"{own['speed_up']:.2f} [{own['speed_up_low']:.2f}, {own['speed_up_high']:.2f}]"
        print(f"{name:46}{own['density']:>8.3f}{own['budget']:>8}{own['seconds'] * 1e3:>10.2f}  {ratio}")


# ---- the command -----------------------------------------------------------------------------------------------------------------------

SECTIONS: dict[str, tuple[Callable[[int, int], Any], Callable[[Any], None]]] = {
    "fine_tuning": (fine_tuning, show_fine_tuning),
    "sparse_attention": (sparse_attention, show_sparse_attention),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--section", choices=list(SECTIONS), action="append", help="default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    found = {}
    for name in given.section or SECTIONS:
        measure, show = SECTIONS[name]
        found[name] = measure(given.rounds, given.steps)
        show(found[name])
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
