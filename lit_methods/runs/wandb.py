"""W&B beside a training run: a lost server or a dead W&B process costs the W&B record, never the training."""

import functools
import netrc
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from weakref import WeakSet

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

_warned: WeakSet[WandbLogger] = WeakSet()
_variables: set[str] = set()  # environment variables that open_runs has set
# What Lightning calls on a logger while a run goes on, and at its end.
_CALLED_BY_LIGHTNING = ("log_metrics", "log_hyperparams", "log_graph", "save", "after_save_checkpoint", "finalize")


def has_login() -> bool:
    """Whether there is a key where ``wandb login`` and W&B's documentation put it; neither W&B nor the network is touched.

    Looked at are the environment variables ``WANDB_API_KEY`` and ``WANDB_IDENTITY_TOKEN_FILE`` and the netrc file.
    """
    if "WANDB_API_KEY" in os.environ or "WANDB_IDENTITY_TOKEN_FILE" in os.environ:
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    for path in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        with suppress(OSError, netrc.NetrcParseError):  # absent, unreadable or broken: no login there
            if path and netrc.netrc(Path(path).expanduser()).authenticators(host):
                return True
    return False


class LostRun:
    """Stands in for a ``wandb.Run`` that can't be reached any more: takes every call and does nothing.

    Args:
        id: The lost run's id, which Lightning goes on to ask for.
        name: The lost run's name.
    """

    def __init__(self, id: str, name: str) -> None:
        self.id, self.name = id, name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy and pickle look for these, and must not find them
            raise AttributeError(name)
        return self

    def __call__(self, *_: Any, **__: Any) -> Any:
        return self

    __getitem__ = __call__

    def __setitem__(self, key: Any, value: Any) -> None:
        """Nothing is kept."""


def open_runs(loggers: Iterable[Any], folder: Path | None = None) -> None:
    """Start the W&B runs of ``loggers`` now, offline where W&B's server can't be reached or refuses the key, with a warning.

    Args:
        loggers: A trainer's loggers; others than ``WandbLogger`` are left alone.
        folder: The run's own folder: until :func:`finish_runs`, W&B keeps its copies of artifacts there (``WANDB_DATA_DIR``) rather than
            in the home folder, and waits at the end at most ten minutes for a lost server (``WANDB_FINISH_TIMEOUT``), unless these
            variables are set. What wasn't sent lies in the folder, for ``wandb sync``.
    """
    wandb_loggers = [logger for logger in loggers if isinstance(logger, WandbLogger)]
    if wandb_loggers and folder is not None:
        for name, value in (("WANDB_DATA_DIR", str(folder / "wandb")), ("WANDB_FINISH_TIMEOUT", "600")):
            if name not in os.environ:
                os.environ[name] = value
                _variables.add(name)
    for logger in wandb_loggers:
        try:
            _ = logger.experiment  # made when it is first asked for
        except Exception as error:
            import wandb

            if not isinstance(error, wandb.errors.CommError):
                raise
            rank_zero_warn(f"W&B can't be reached, so the run stays offline, for `wandb sync` later. W&B says: {_first_line(error)}")
            logger._wandb_init["mode"] = "offline"
            _ = logger.experiment


def keep_training(logger: WandbLogger, before_metrics: Callable[[WandbLogger, Mapping[str, float]], None] | None = None) -> None:
    """Turn the failures of ``logger`` into one warning, where they would have ended the training.

    After an error of one call (no network for an artifact, say) the next one is tried as ever; when W&B's own process is gone, the logger
    is silent from then on. Calling this again for the same logger does nothing. What a module does with ``logger.experiment`` on its own
    is not watched.

    Args:
        logger: Guarded from now on, also after the end of the run.
        before_metrics: Called as ``before_metrics(logger, metrics)`` before each ``logger.log_metrics``.
    """
    for name in _CALLED_BY_LIGHTNING:
        # no closure: strategies that spawn processes pickle the logger
        setattr(logger, name, functools.partial(_call, logger, name, before_metrics if name == "log_metrics" else None))


def _call(logger: WandbLogger, method: str, before: Callable[[WandbLogger, Any], None] | None, *args: Any, **kwargs: Any) -> None:
    if before is not None:
        attempt(logger, lambda: before(logger, args[0] if args else kwargs["metrics"]))
    attempt(logger, lambda: getattr(type(logger), method)(logger, *args, **kwargs))


def attempt(logger: WandbLogger, action: Callable[[], object]) -> None:
    """Do something with the logger's run, unless it is lost; a failure gives one warning for each logger."""
    if isinstance(logger._experiment, LostRun):
        return
    try:
        action()
    except Exception as error:  # whatever it is: a record isn't worth a training run
        gone = isinstance(error, ConnectionError) or type(error).__name__ in ("MailboxClosedError", "HandleAbandonedError")
        if logger not in _warned:
            _warned.add(logger)
            goes_on = "the run goes on without it" if gone else "the run goes on, and W&B lacks what it was given"
            folder = getattr(getattr(logger._experiment, "settings", None), "sync_dir", None)
            kept = f" What W&B has written is in {folder}, for `wandb sync`." if folder else ""
            rank_zero_warn(f"W&B failed: {goes_on}. {type(error).__name__}: {_first_line(error)}.{kept}")
        if gone:
            give_up(logger)


def give_up(logger: WandbLogger) -> None:
    """Put a :class:`LostRun` in the place of the logger's run, whose process is gone, and keep W&B from complaining at the end."""
    import wandb

    run: Any = logger._experiment
    logger._experiment = LostRun(str(getattr(run, "id", logger._id)), str(getattr(run, "name", logger._name)))  # type: ignore[assignment]
    if wandb.run is run:
        wandb.run = None  # a later logger would go on with it
    with suppress(Exception):
        wandb.teardown()


def finish_runs(loggers: Iterable[Any], failed: bool = False) -> None:
    """Close the W&B runs of ``loggers``: all is on disk, or sent, when it returns. Errors give a warning.

    Args:
        loggers: A trainer's loggers.
        failed: Mark the runs as failed.
    """
    for logger in loggers:
        run: Any = logger._experiment if isinstance(logger, WandbLogger) else None
        if run is not None and not isinstance(run, LostRun):
            attempt(logger, functools.partial(run.finish, exit_code=int(failed)))
    while _variables:
        os.environ.pop(_variables.pop(), None)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "no message").splitlines()[0]
