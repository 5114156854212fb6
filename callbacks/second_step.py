"""Running somebody's ``training_step`` a second time, so that nobody but the caller notices."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor
from torchmetrics import Metric

from lit_methods.callbacks.wrapping import without_additions


def _ignore(*args: Any, **kwargs: Any) -> None:
    pass


def _kept(metric: Metric) -> Callable[[], None]:
    """What puts the metric back to where it stands now; states that several metrics share stay shared."""
    noted = {name: vars(metric)[name] for name in ("_update_count", "_computed", "_forward_cache")}
    states: dict[str, tuple[Any, Any]] = {}
    for name, state in metric.metric_state.items():
        states[name] = state, state.clone() if isinstance(state, Tensor) else list(state)

    def restore() -> None:
        for name, (state, content) in states.items():
            if isinstance(state, Tensor):
                state.copy_(content)
            else:
                state[:] = content
            setattr(metric, name, state)
        vars(metric).update(noted)

    return restore


@contextmanager
def unnoticed(module: LightningModule) -> Iterator[None]:
    """Inside, the module logs nothing, and afterwards its metrics stand where they stood."""
    trainer: Any = module.trainer
    loggers, own_log = trainer.loggers, vars(module).get("log")
    restores = [_kept(metric) for metric in module.modules() if isinstance(metric, Metric)]
    vars(module)["log"] = _ignore  # log_dict goes through it
    trainer.loggers = [DummyLogger() for _ in loggers]
    try:
        yield
    finally:
        trainer.loggers = loggers
        del vars(module)["log"]
        if own_log is not None:
            vars(module)["log"] = own_log
        for restore in restores:
            restore()


def second_step(module: LightningModule, batch: Any, batch_idx: int) -> Any:
    """What the module's own ``training_step`` returns for a batch: without what callbacks add to it, :func:`unnoticed`.

    Args:
        module: It is in the middle of a training step.
        batch: On the module's device.
        batch_idx: For a step that asks for it.

    Raises:
        ValueError: The step takes ``dataloader_iter``, which can't be read twice.
    """
    step = without_additions(module)
    parameters = inspect.signature(step).parameters
    if "dataloader_iter" in parameters:
        raise ValueError(
            f"training_step of {type(module).__name__} takes dataloader_iter, which can't be read twice: let it take (batch, batch_idx)"
        )
    with unnoticed(module):
        return step(*(batch, batch_idx)[: len(parameters)])


__all__ = ["second_step", "unnoticed"]
