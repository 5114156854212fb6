"""Random number generators in the checkpoint, so that a resumed run draws what the uninterrupted one would have drawn."""

import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lit_methods import distributed
from lit_methods.callbacks.ordering import OrderedCallback

_KEY = "lit_methods.ExactResume"


def capture_random_state(device: torch.device | None = None) -> dict[str, Any]:
    """State of the global generators of this process: torch (CPU, and the CUDA ``device``), Python, NumPy.

    Args:
        device: A CUDA device whose generator is included; others are ignored.

    Returns:
        Tensors, numbers and lists only, so that it loads with ``weights_only``.
    """
    version, words, gauss = random.getstate()
    _, key, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002  (user code draws from it)
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": {"version": version, "words": list(words), "gauss": gauss},
        "numpy": {
            "key": torch.from_numpy(np.asarray(key).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
    }
    if device is not None and device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: dict[str, Any], device: torch.device | None = None) -> None:
    """Undo everything drawn since :func:`capture_random_state`."""
    torch.set_rng_state(state["torch"].cpu())
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"]), python["gauss"]))
    key = numpy["key"].cpu().numpy().astype(np.uint32)
    np.random.set_state(("MT19937", key, numpy["position"], numpy["has_gauss"], numpy["cached"]))  # noqa: NPY002
    if device is not None and device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


class ExactResume(OrderedCallback):
    """Makes a killed and resumed run end like the uninterrupted one, bit for bit on the CPU; ``lit`` adds it to every run.

    Three things stand in the way. (1) Random numbers: Lightning doesn't save the global generators. When a checkpoint
    is saved, those of EVERY rank go into it (one collective, so all ranks must save, as Lightning asks anyway); after
    a resume they are put back when training starts, behind set-up and sanity check and before the first batch is
    read. Validation inside fit is taken out of the stream: what it draws is undone at its end, for a resume may skip
    it. (2) With ``max_steps``, Lightning (seen in 2.6.6) trains one batch of a run that is resumed from an epoch's end
    as if it belonged to the old epoch, or counts the epoch twice. (3) A module that asks for
    ``trainer.estimated_stepping_batches`` in ``configure_optimizers`` makes Lightning forget the place of its loaders.

    Runs: when a checkpoint is saved or loaded, at the start of training, and around validation.
    Saves: tensors, numbers and lists, about 15 kB per rank. A resume with another number of ranks gives a warning and
    restores no generator.
    Loaders: those of :func:`~lit_methods.datamodules.loaders.make_loader` draw nothing from the global generators. A
    plain ``DataLoader`` draws its workers' seed whenever an iterator is made, which a resume does at other moments.
    Refuses: nothing. Not covered: sums of several CPU threads, which now and then come out in another order (``OMP_NUM_THREADS=1`` is
    exact); random numbers drawn in ``on_train_start`` of the module or of a callback behind this one, and
    generators that a module or data set owns.
    """

    def __init__(self) -> None:
        super().__init__()
        self._resumed: dict[str, Any] | None = None
        self._before_validation: dict[str, Any] | None = None

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Collect the states of all ranks."""
        mine = self._before_validation or capture_random_state(trainer.strategy.root_device)
        everyone: list[Any] = [mine]
        if distributed.world_size() > 1:
            everyone = [None] * distributed.world_size()
            dist.all_gather_object(everyone, mine)
        checkpoint[_KEY] = everyone

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep this rank's state until training starts."""
        if trainer.state.fn != "fit":
            return
        everyone = checkpoint.get(_KEY)
        if everyone is None:
            rank_zero_warn("the checkpoint holds no state of the random number generators: it was saved without ExactResume")
        elif len(everyone) != trainer.world_size:
            rank_zero_warn(
                f"the checkpoint was saved by {len(everyone)} ranks and is resumed by {trainer.world_size}: random numbers start anew"
            )
        else:
            self._resumed = everyone[trainer.global_rank]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the generators back, once."""
        _mend_restart_at_epoch_end(trainer)
        _mend_forgotten_loader_states(trainer)
        if self._resumed is not None:
            restore_random_state(self._resumed, trainer.strategy.root_device)
            self._resumed = None

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Hold the state of training."""
        if trainer.state.fn == "fit":
            self._before_validation = capture_random_state(trainer.strategy.root_device)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on with the state of training."""
        if self._before_validation is not None:
            restore_random_state(self._before_validation, trainer.strategy.root_device)
            self._before_validation = None

    def leave(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the run."""
        self._resumed = self._before_validation = None


def _mend_restart_at_epoch_end(trainer: pl.Trainer) -> None:
    """Let training go on with the next epoch when the checkpoint was saved at the end of one.

    With ``max_steps`` Lightning takes such a checkpoint for an unfinished epoch; with ``max_epochs`` alone it does
    what is done here.
    """
    loop = trainer.fit_loop
    if loop.restarted_on_epoch_end:
        loop.epoch_progress.increment_completed()
        loop.reset_restart_stage()
        _Loop.restarting.fset(loop, False)  # type: ignore[attr-defined]  # FitLoop's own setter would set it back


def _mend_forgotten_loader_states(trainer: pl.Trainer) -> None:
    """Give resumable loaders the place that the checkpoint names.

    A module that asks for ``trainer.estimated_stepping_batches`` in ``configure_optimizers`` makes Lightning set the
    loaders up before it has read the checkpoint, and it doesn't come back to them.
    """
    loop = trainer.fit_loop
    states = loop._combined_loader_states_to_load
    if states and loop._combined_loader is not None:
        loop._combined_loader._load_state_dicts(states)
        loop._combined_loader_states_to_load = []
