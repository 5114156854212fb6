"""Lightning's fit loop, taken up right behind the hook in which a checkpoint was saved.

Lightning 2.6 saves its counters, and a resume goes on with the next batch. What lay between the hook that saved and that batch is lost:
behind an epoch's last batch the validation that is due, the end of the epoch for callbacks and module, schedulers that wait for a metric,
the figures of the epoch. Here the counters say where the checkpoint was saved, and what is left of that batch, validation or epoch is done
first, once.
"""

from collections.abc import Callable
from enum import Enum
from typing import Any

import torch
from lightning.pytorch.loops.fit_loop import RestartStage, _FitLoop
from lightning.pytorch.loops.loop import _Loop


class Place(Enum):
    """Hook in which a checkpoint was saved."""

    BATCH_END = "on_train_batch_end"
    VALIDATION = "a validation"
    VALIDATION_END = "on_validation_end"
    EPOCH_END = "on_train_epoch_end"
    BETWEEN = "behind an epoch"


def place_of(loop: _FitLoop) -> Place | None:
    """Where a checkpoint was saved whose counters were just loaded into ``loop``; None: elsewhere, or before the first batch."""
    epoch: Any = loop.epoch_progress.current
    batch: Any = loop.epoch_loop.batch_progress.current
    validation = loop.epoch_loop.val_loop.batch_progress
    if epoch.ready != epoch.started or epoch.ready == 0:
        return None
    if epoch.ready == epoch.processed:
        return Place.BETWEEN if epoch.processed == epoch.completed else Place.EPOCH_END
    if not batch.ready == batch.started == batch.processed != 0:
        return None
    if batch.completed == batch.ready - 1:
        return Place.BATCH_END
    ended = validation.is_last_batch and validation.current.completed == validation.current.ready
    return Place.VALIDATION_END if ended else Place.VALIDATION


def run_resumed(loop: _FitLoop, place: Place, restore: Callable[[], None]) -> None:
    """Lightning's ``loop.run()`` for a run whose checkpoint was saved at ``place``: first what is left there, then the epochs that follow.

    Args:
        loop: Its counters are those of the checkpoint.
        place: From :func:`place_of`.
        restore: Called behind the hooks ``on_train_start``, with the loaders set up and before anything is trained.
    """
    loop.setup_data()
    if loop.max_batches == 0 or loop.trainer.limit_train_batches == 0 or (place is Place.BETWEEN and loop.done):
        return
    torch.set_grad_enabled(True)
    epoch: Any = loop.epoch_progress.current
    if place is Place.EPOCH_END:
        epoch.completed = epoch.processed  # on_train_start sees the epoch that comes next
    loop.on_run_start()
    restore()
    if place is Place.EPOCH_END:
        epoch.completed = epoch.processed - 1
        _finish_epoch_end(loop)
    elif place is not Place.BETWEEN:
        _finish_epoch(loop, place)
    _settle(loop)
    while not loop.done:
        try:
            loop.on_advance_start()
            loop.advance()
            loop.on_advance_end()
        except StopIteration:
            break
        finally:
            loop.on_iteration_done()
    loop.on_run_end()


def _finish_epoch(loop: _FitLoop, place: Place) -> None:
    """The rest of the batch or validation in which the checkpoint was saved, the batches that are left, the end of the epoch."""
    connector, epoch_loop, fetcher = loop.trainer._logger_connector, loop.epoch_loop, loop._data_fetcher
    assert fetcher is not None
    loop._restart_stage = RestartStage.RESTARTED_MID_EPOCH  # on_train_epoch_start has been called
    loop.on_advance_start()
    epoch_loop.on_run_start(fetcher)
    connector._first_loop_iter = epoch_loop.batch_progress.current.ready == 1  # True would drop what the epoch has logged
    if place is Place.BATCH_END:
        connector.on_batch_end()
        epoch_loop.batch_progress.increment_completed()
        connector.update_train_step_metrics()
    epoch_loop._skip_next_val = place is Place.VALIDATION_END
    _settle(loop)
    epoch_loop.on_advance_end(fetcher)
    while not epoch_loop.done:
        try:
            epoch_loop.advance(fetcher)
            epoch_loop.on_advance_end(fetcher)
        except StopIteration:
            break
    loop.on_advance_end()


def _finish_epoch_end(loop: _FitLoop) -> None:
    """What follows the hooks of an epoch's end: schedulers that wait for a metric, and the figures of the epoch."""
    connector, epoch_loop = loop.trainer._logger_connector, loop.epoch_loop
    connector.epoch_end_reached()
    connector.on_epoch_end()
    if epoch_loop._num_ready_batches_reached():
        epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)
    epoch_loop._batches_that_stepped -= 1  # loggers get these figures at the step of the last batch
    connector.update_train_epoch_metrics()
    epoch_loop._batches_that_stepped += 1
    loop.epoch_progress.increment_completed()


def _settle(loop: _Loop) -> None:
    """Nothing of the loop and of those in it is about to restart any more."""
    loop._restarting = loop._loaded_from_state_dict = loop._resuming_from_checkpoint = False
    loop.reset_restart_stage()
    for inner in vars(loop).values():
        if isinstance(inner, _Loop):
            _settle(inner)
