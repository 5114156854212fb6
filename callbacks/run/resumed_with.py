"""What a run goes on with that isn't what its checkpoint was saved with: callbacks that are missing, arguments that have changed."""

import inspect
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch import callbacks as lightnings
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lit_methods.callbacks.ordering import OrderedCallback

_KEY = "lit_methods.arguments"
_LOOKS_AFTER_THE_RUN = "lit_methods.callbacks.run."


def save_arguments(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
    """Put the arguments of our callbacks into a checkpoint, as far as they are numbers, texts, lists and dicts."""
    checkpoint[_KEY] = {callback.state_key: _arguments(callback) for callback in _techniques(trainer)}


def warn_of_other_arguments(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
    """Say which arguments of our callbacks differ from those with which the checkpoint was saved, naming both values."""
    saved = checkpoint.get(_KEY, {})
    for callback in _techniques(trainer):
        here, before = _arguments(callback), saved.get(callback.state_key, {})
        changed = [f"{name} was {before[name]!r} and is {here[name]!r}" for name in here if name in before and here[name] != before[name]]
        if changed:
            rank_zero_warn(
                f"{type(callback).__name__} goes on with other arguments than those with which the checkpoint was saved: "
                f"{', '.join(changed)}. What it has saved (masks, counters, averages) comes from the old ones; give them again to continue "
                "that run"
            )


def explain_misfit(trainer: pl.Trainer, exception: BaseException) -> None:
    """Name the callbacks that are missing, or new, in the message of an error that was raised while a checkpoint was loaded.

    PyTorch speaks of parameter groups and keys alone.
    """
    checkpoint = trainer._checkpoint_connector._loaded_checkpoint
    if not checkpoint or not isinstance(exception, RuntimeError | ValueError) or not exception.args:
        return
    saved = {key.partition("{")[0] for key in (*checkpoint.get("callbacks", {}), *checkpoint.get(_KEY, {}))}
    missing = sorted(name for name in saved - _names(trainer.callbacks) if not hasattr(lightnings, name))  # type: ignore[attr-defined]
    new = sorted(_names(_techniques(trainer)) - saved) if _KEY in checkpoint else []
    said = [f"the checkpoint was saved in a run with {', '.join(missing)}, which this run lacks: add it again"] if missing else []
    said += [f"this run has {', '.join(new)}, and the checkpoint was saved without: leave it out, or begin a new run"] if new else []
    if said:
        first, newline, rest = str(exception.args[0]).partition("\n")
        exception.args = (f"{first}\n  {'; '.join(said)}{newline}{rest}",)


def _techniques(trainer: pl.Trainer) -> list[pl.Callback]:
    """Callbacks that take part in the training, and not those that look after the run."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [one for one in callbacks if isinstance(one, OrderedCallback) and not type(one).__module__.startswith(_LOOKS_AFTER_THE_RUN)]


def _names(callbacks: list[pl.Callback]) -> set[str]:
    return {type(callback).__qualname__ for callback in callbacks}


def _arguments(callback: pl.Callback) -> dict[str, Any]:
    names = list(inspect.signature(type(callback).__init__).parameters)[1:]
    return {name: _plain(vars(callback)[name]) for name in names if name in vars(callback) and _is_plain(vars(callback)[name])}


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(inner) for key, inner in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def _plain(value: Any) -> Any:
    """Tuples as lists: a config may give either."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value
