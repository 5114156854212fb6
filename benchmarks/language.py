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


# ---- the command -----------------------------------------------------------------------------------------------------------------------

SECTIONS: dict[str, tuple[Callable[[int, int], Any], Callable[[Any], None]]] = {"fine_tuning": (fine_tuning, show_fine_tuning)}


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
