"""Score against cost over many runs, as The Sparse Frontier compares them.

Maths, paper and origin: :mod:`~lit_methods.callbacks.sparse_attention.sparse_frontier.core`.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from lit_methods.callbacks.ordering import OrderedCallback
from lit_methods.callbacks.sparse_attention.sparse_frontier import core
from lit_methods.callbacks.sparse_attention.sparse_frontier.callback import SparseAttentionCallback
from lit_methods.callbacks.sparse_attention.sparse_frontier.methods import FrontierMethod
from lit_methods.callbacks.sparse_attention.sparse_frontier.pictures import scatter
from lit_methods.checks import at_least, naming
from lit_methods.files import write_json
from lit_methods.panels import ImageMedia, ImagePanel, Media, Panel, TableMedia, TablePanel
from lit_methods.runs.folder import run_dir

FILE = "isocost.json"
COSTS = {"prefill_flops": "operations of a prefill", "decode_memory": "values read by a step of decoding"}
Record = dict[str, Any]


def model_shape(module: nn.Module) -> core.ModelShape:
    """Sizes out of the configuration of the first model of transformers in a module.

    Raises:
        ValueError: There is none.
    """
    for own in module.modules():
        config: Any = getattr(own, "config", None)
        if all(hasattr(config, name) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")):
            heads, hidden = config.num_attention_heads, config.hidden_size
            return core.ModelShape(
                layers=config.num_hidden_layers,
                hidden=hidden,
                heads=heads,
                kv_heads=getattr(config, "num_key_value_heads", None) or heads,
                head_width=getattr(config, "head_dim", None) or hidden // heads,
                mlp=getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden,
                vocabulary=config.vocab_size,
            )
    raise ValueError(f"{type(module).__name__} has no model of transformers: its costs can't be known")


def read_records(folder: Path) -> list[Record]:
    """Records of all runs below a folder, in the order of their paths; broken ones are left out with a warning."""
    found = []
    for path in sorted(folder.rglob(FILE)):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            {name: record[name] for name in ("method", "task", "score", "length", "parameters", "sparsity", *COSTS)}
        except (json.JSONDecodeError, KeyError, TypeError, OSError) as error:
            rank_zero_warn(f"IsoCostReport leaves {path} out: {error!r}")
            continue
        found.append(record)
    return found


def mean_over_tasks(records: Sequence[Record], cost: str) -> list[Record]:
    """One record for each model, method, budget and length: mean score and cost over its tasks. Without a score: left out."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        if math.isfinite(record["score"]):
            key = (
                record["parameters"],
                record["method"],
                json.dumps(record.get("budget", {}), sort_keys=True),
                record.get("asked", record["length"]),
            )
            groups.setdefault(key, []).append(record)
    return [
        {
            **own[0],
            "score": float(np.mean([one["score"] for one in own])),
            cost: float(np.mean([one[cost] for one in own])),
            "tasks": len(own),
        }
        for own in groups.values()
    ]


def errors(records: Sequence[Record]) -> list[float | None]:
    """(p_dense - p_sparse) / p_dense of each record, by the full attention of the same model, task and length; None without one."""
    dense = {(one["parameters"], one["task"], one["length"]): one["score"] for one in records if one["method"] == "dense"}
    found: list[float | None] = []
    for one in records:
        full = dense.get((one["parameters"], one["task"], one["length"]))
        error = float("nan") if full is None else float(core.relative_error(full, one["score"]))
        found.append(None if math.isnan(error) else error)
    return found


class IsoCostReport(OrderedCallback):
    """Writes down score and cost of an evaluation, and draws them with those of other runs: who is best at which cost.

    Costs follow from the model's sizes, the longest text and the sparsity that was measured, by the paper's formulas, for ``batch`` texts
    at once: operations of a prefill, and values that one step of decoding reads; choosing is counted.

    Runs: at the end of a validation and of a test, outside the sanity check, on rank 0: ``isocost.json`` is written into the run's folder,
    those below ``runs`` are read, and pictures are drawn: the Pareto frontier of the mean score over tasks, scores by task, the relative
    error by length, and a table. The law of scores is our fit of a form that the paper's first version names.

    Saves: nothing in checkpoints.

    Refuses: a trainer without :class:`SparseAttentionCallback` (``method: null`` is full attention), and a module without a model of
    transformers.

    Args:
        runs: Folder with other runs, in which ``isocost.json`` is looked for; None: this run alone.
        metric: Logged score; ``{part}`` is ``val`` or ``test``.
        task: Name of the task; None: ``task`` or ``eval_task`` of the datamodule.
        batch: Texts at once for which costs are counted.

    Raises:
        ValueError: A number below 1; when it runs, no such metric.
    """

    runs_after: ClassVar[Sequence[str]] = ("AttentionCallback",)
    runs_before: ClassVar[Sequence[str]] = ("Dashboard",)
    panels: ClassVar[tuple[Panel, ...]] = (
        ImagePanel("Score against operations of a prefill", "isocost/prefill_flops", note="Ringed: no run is better and cheaper."),
        ImagePanel("Score against values that a step of decoding reads", "isocost/decode_memory", note="Ringed: as above."),
        ImagePanel("Scores by task", "isocost/tasks"),
        ImagePanel("Relative error by length", "isocost/lengths", note="(dense - sparse) / dense."),
        TablePanel("Runs", "isocost/runs"),
        TablePanel("A law of scores", "isocost/law", note="Ours: log score, linear in log size, log length and log compression."),
    )

    def __init__(self, runs: Path | None = None, metric: str = "language/{part}_score", task: str | None = None, batch: int = 64) -> None:
        super().__init__()
        at_least(1, "texts", batch=batch)
        self.runs, self.metric, self.task, self.batch = None if runs is None else Path(runs), metric, task, batch
        self._media: dict[str, Media] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Look for the callback that is reported on."""
        super().setup(trainer, pl_module, stage)
        with naming(type(self).__name__):
            if not any(isinstance(own, SparseAttentionCallback) for own in trainer.callbacks):  # type: ignore[attr-defined]
                raise ValueError("there is no SparseAttentionCallback to report on: add one, with method: null for full attention")
            self.when_built(pl_module, lambda: self._look(pl_module))

    def _look(self, pl_module: pl.LightningModule) -> None:
        with naming(type(self).__name__):
            model_shape(pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record and draw."""
        if not trainer.sanity_checking:
            self._report(trainer, pl_module, "val")

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record and draw."""
        self._report(trainer, pl_module, "test")

    def _report(self, trainer: pl.Trainer, pl_module: pl.LightningModule, part: str) -> None:
        folder = run_dir(trainer)
        if not trainer.is_global_zero:
            return
        with naming(type(self).__name__):
            record = self.record(trainer, pl_module, part)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / FILE, record)
        others = [] if self.runs is None else [own for own in read_records(self.runs) if own != record]
        self._media = draw([*others, record])

    def record(self, trainer: pl.Trainer, pl_module: pl.LightningModule, part: str) -> Record:
        """What this run is worth and costs."""
        callback = next(own for own in trainer.callbacks if isinstance(own, SparseAttentionCallback))  # type: ignore[attr-defined]
        figures, name = trainer.callback_metrics, self.metric.format(part=part)
        if name not in figures:
            raise ValueError(f"metric={self.metric!r} isn't logged: there are {', '.join(sorted(figures)) or 'none'}")
        sparsity = {phase: float(figures.get(f"{callback.prefix}/{part}_{phase}_sparsity", 0.0)) for phase in ("prefill", "decode")}
        shape, length, method = model_shape(pl_module), max(callback.longest, 1), callback.method
        executed = float(figures.get(f"{callback.prefix}/{part}_executed_sparsity", sparsity["prefill"]))
        prefill = core.prefill_flops(shape, length, 1 - executed, self.batch)
        decode = core.decode_weights(shape) + core.decode_cache(shape, length, 1 - sparsity["decode"], self.batch)
        if isinstance(method, FrontierMethod):
            prefill += method.prefill_overhead(shape, length, self.batch)
            decode += method.decode_overhead(shape, length, self.batch)
        data: Any = getattr(trainer, "datamodule", None)
        task = self.task or getattr(data, "task", None) or getattr(data, "hparams", {}).get("eval_task") or type(data).__name__
        budget = {key: own for key, own in vars(method).items() if not key.startswith("_") and isinstance(own, (int, float))}
        return {
            "method": type(method).__name__ if isinstance(method, FrontierMethod) or budget else "dense",
            "budget": budget,
            "task": str(task),
            "score": float(figures[name]),
            "sparsity": sparsity,
            "length": length,
            "asked": getattr(data, "length", length),
            "parameters": sum(own.numel() for own in pl_module.parameters()),
            "prefill_flops": prefill,
            "decode_memory": decode,
        }

    def dashboard_media(self) -> dict[str, Media]:
        """What was drawn last."""
        return self._media


def draw(records: Sequence[Record]) -> dict[str, Media]:
    """Pictures and tables of some runs."""
    media: dict[str, Media] = {}
    for cost, what in COSTS.items():
        points = mean_over_tasks(records, cost)
        front = core.pareto_front([one[cost] for one in points], [one["score"] for one in points])
        series: dict[str, list[tuple[float, float, bool]]] = {}
        for one, best in zip(points, front, strict=True):
            series.setdefault(f"{one['method']}, {_short(one['parameters'])}", []).append((one[cost], one["score"], bool(best)))
        best = ", ".join(sorted({one["method"] for one, ringed in zip(points, front, strict=True) if ringed}))
        alt = f"Mean score against {what}, {len(points)} points; on the frontier: {best}"
        media[f"isocost/{cost}"] = ImageMedia(scatter(series, what, "mean score", log=True), alt)
    by_task: dict[str, list[tuple[float, float, bool]]] = {}
    by_length: dict[str, list[tuple[float, float, bool]]] = {}
    for one, error in zip(records, errors(records), strict=True):
        sparsity = max(one["sparsity"].values())
        by_task.setdefault(f"{one['task']}, {one['method']}", []).append((sparsity, one["score"], False))
        if error is not None and one["method"] != "dense":
            by_length.setdefault(f"{one['method']}, {one['task']}", []).append((one["length"], error, False))
    media["isocost/tasks"] = ImageMedia(
        scatter(by_task, "sparsity", "score", joined=True), f"Score against sparsity, {len(by_task)} curves"
    )
    alt = f"Relative error against length, {len(by_length)} curves"
    media["isocost/lengths"] = ImageMedia(scatter(by_length, "tokens", "relative error", log=True, joined=True), alt)
    columns = ("method", "task", "length", "parameters", "prefill sparsity", "decode sparsity", "score", "relative error", *COSTS)
    rows = [
        (
            *(one[name] for name in ("method", "task", "length", "parameters")), *(one["sparsity"][name] for name in ("prefill", "decode")),
            one["score"], error, *(one[cost] for cost in COSTS),
        )
        for one, error in zip(records, errors(records), strict=True)
    ]  # fmt: skip
    media["isocost/runs"] = TableMedia(columns, tuple(rows))
    media["isocost/law"] = TableMedia(("method", "constant", "size", "length", "compression", "runs", "R2 held out"), tuple(_law(records)))
    return media


def _law(records: Sequence[Record]) -> list[tuple[Any, ...]]:
    """A row for each method whose runs settle the law; held out are the largest compressions."""
    rows = []
    for method in sorted({one["method"] for one in records} - {"dense"}):
        own = [one for one in records if one["method"] == method and one["score"] > 0]
        columns = (
            [one["parameters"] for one in own],
            [one["length"] for one in own],
            [1 / max(1 - max(one["sparsity"].values()), 1e-6) for one in own],
            [one["score"] for one in own],
        )
        try:
            law = core.fit_score_law(*columns)
        except ValueError:
            continue
        try:
            held_out: float | None = core.held_out_fit(*columns, by="compression")
        except ValueError:
            held_out = None
        rows.append((method, law.constant, law.size, law.length, law.compression, len(own), held_out))
    return rows


def _short(number: float) -> str:
    for limit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{letter}"
    return f"{number:g}"


__all__ = ["IsoCostReport", "draw", "errors", "mean_over_tasks", "model_shape", "read_records"]
