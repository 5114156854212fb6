"""What ``self.log`` has gathered in an unfinished epoch, as plain data, so that a resumed epoch reports the whole of itself.

Lightning keeps sums of logged values and the states of torchmetrics' metrics in memory alone: a run that is resumed in mid-epoch would
log the mean of what came behind the resume, and a scheduler or callback that monitors a metric of an earlier validation would find none.
"""

import builtins
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.connectors.logger_connector.result import _Metadata, _ResultMetric, _Sync
from torch import Tensor
from torchmetrics import Metric

_ARGUMENTS = (
    *("fx", "name", "prog_bar", "logger", "on_step", "on_epoch", "enable_graph", "add_dataloader_idx", "dataloader_idx"),
    "metric_attribute",
)


def capture_logged(trainer: pl.Trainer) -> dict[str, Any]:
    """Values logged in this epoch's training so far, states of the module's metrics, and the metrics that callbacks see.

    Returns:
        Tensors (on the CPU), numbers, strings, lists and dicts only, so that it loads with ``weights_only``.
    """
    results = trainer.fit_loop.epoch_loop._results
    # a reduction over a group of one's own can't be written down
    written = {key: _written(result) for key, result in results.items() if not result.has_reset and result.meta.sync.group is None}
    module = trainer.lightning_module
    metrics = {name: part for name, part in module.named_modules() if isinstance(part, Metric) and part._update_count}
    return {
        "results": written,
        "metrics": {name: {"updates": part._update_count, "state": _state(part)} for name, part in metrics.items()},
        "callback_metrics": {name: _kept(value) for name, value in trainer._logger_connector._callback_metrics.items()},
    }


def restore_logged(trainer: pl.Trainer, logged: dict[str, Any]) -> None:
    """Make the logged values those of :func:`capture_logged`.

    Args:
        trainer: In fit, behind ``on_train_start``.
        logged: Of this rank.
    """
    module = trainer.lightning_module
    parts = dict(module.named_modules())
    for name, saved in logged["metrics"].items():
        if isinstance(metric := parts.get(name), Metric) and set(saved["state"]) == set(metric._defaults):
            for key, value in saved["state"].items():
                setattr(metric, key, [part.to(module.device) for part in value] if isinstance(value, list) else value.to(module.device))
            metric._update_count, metric._computed = saved["updates"], None
    results = trainer.fit_loop.epoch_loop._results
    for key, saved in logged["results"].items():
        if saved["value"] is not None or isinstance(parts.get(saved["metric_attribute"]), Metric):
            results[key] = _read(trainer, saved, parts)
    seen = {name: value.to(module.device) for name, value in logged["callback_metrics"].items()}
    trainer._logger_connector._callback_metrics.update(seen)


def _kept(value: Tensor) -> Tensor:
    return value.detach().cpu().clone()


def _state(metric: Metric) -> dict[str, Any]:
    values = {name: getattr(metric, name) for name in metric._defaults}
    return {name: [_kept(part) for part in value] if isinstance(value, list) else _kept(value) for name, value in values.items()}


def _written(result: _ResultMetric) -> dict[str, Any]:
    meta, sync = result.meta, result.meta.sync
    step: Any = result._forward_cache
    return {
        **{name: getattr(meta, name) for name in _ARGUMENTS},
        "reduce_fx": meta.reduce_fx.__name__,
        "builtin": meta.reduce_fx is getattr(builtins, meta.reduce_fx.__name__, None),
        "sync": [sync.should, sync.op, sync.rank_zero_only],
        "value": _kept(result.value) if result.is_tensor else None,
        "weight": _kept(result.cumulated_batch_size) if result.is_tensor and meta.is_mean_reduction else None,
        "step": _kept(step) if isinstance(step, Tensor) else None,
    }


def _read(trainer: pl.Trainer, saved: dict[str, Any], parts: dict[str, Any]) -> _ResultMetric:
    device = trainer.lightning_module.device
    meta = _Metadata(
        **{name: saved[name] for name in _ARGUMENTS}, reduce_fx=getattr(builtins if saved["builtin"] else torch, saved["reduce_fx"])
    )
    should, op, rank_zero_only = saved["sync"]
    meta.sync = _Sync(_should=should, fn=trainer.strategy.reduce, _op=op, rank_zero_only=rank_zero_only)
    result = _ResultMetric(meta, saved["value"] is not None)
    if saved["value"] is None:
        result.value = parts[saved["metric_attribute"]]
    else:
        result.to(device)
        result.value = saved["value"].to(device)
        if saved["weight"] is not None:
            result.cumulated_batch_size = saved["weight"].to(device)
    result._forward_cache = None if saved["step"] is None else saved["step"].to(device)
    result._update_count = 1  # it has been updated
    return result
