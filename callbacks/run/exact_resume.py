"""A resumed run does and draws what the uninterrupted one would have done and drawn behind the checkpoint."""

import random
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lit_methods import distributed
from lit_methods.callbacks.ordering import OrderedCallback
from lit_methods.callbacks.run.logged import capture_logged, restore_logged
from lit_methods.callbacks.run.resumed_loop import place_of, run_resumed
from lit_methods.callbacks.run.resumed_with import explain_misfit, save_arguments, warn_of_other_arguments

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
    a resume they are put back when training starts, behind set-up, sanity check and all ``on_train_start``, and before the first
    batch is read. Validation inside fit is taken out of the stream: what it draws is undone at its end. (2) What lay between the
    hook that saved and the next batch: Lightning (2.6.6) drops it. A checkpoint of an epoch's last batch would lose the validation that is
    due and the end of the epoch, one of a validation or of the epoch's end some of the figures and schedulers. Here it is done first,
    once, also where nothing but that is left of the run; a validation that was cut off begins anew. (3) Figures: the sums that
    ``self.log`` has gathered, the states of torchmetrics' metrics and the metrics that callbacks monitor are saved and put
    back, so that the epoch's figures are those of the whole epoch. A run that ``EarlyStopping`` had stopped
    trains no further epoch.

    It also says where a run goes on with other things than its checkpoint was saved with: arguments of our callbacks that have another
    value now, and, where weights or optimisers don't fit, the technique that is missing.

    Runs: when a checkpoint is saved or loaded, at the start of training, and around validation.
    Saves: tensors, numbers, strings, lists and dicts, about 15 kB per rank and what is logged. A resume with another number of ranks gives
    a warning and restores neither generators nor figures.
    Loaders: those of :func:`~lit_methods.datamodules.loaders.make_loader` draw nothing from the global generators. A
    plain ``DataLoader`` draws its workers' seed whenever an iterator is made, which a resume does at other moments.
    Refuses: nothing. Not covered: sums of several CPU threads, which now and then come out in another order (``OMP_NUM_THREADS=1`` is
    exact); generators that a module or data set owns; what other callbacks, or the module, do in the hook that saved behind the callback
    that saved (Lightning calls ``ModelCheckpoint`` behind all other callbacks and before the module); gradients that were
    being accumulated.
    """

    def __init__(self) -> None:
        super().__init__()
        self._resumed: dict[str, Any] | None = None
        self._before_validation: dict[str, Any] | None = None
        self._logged_before_validation: dict[str, Any] | None = None

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Collect the states of all ranks."""
        mine = self._before_validation or capture_random_state(trainer.strategy.root_device)
        if trainer.state.fn == "fit":
            logged = capture_logged(trainer)
            if trainer.validating and self._logged_before_validation is not None:  # metrics may be half way through the validation
                logged |= self._logged_before_validation
            mine = mine | {"logged": logged, "should_stop": trainer.should_stop}
        everyone: list[Any] = [mine]
        if distributed.world_size() > 1:
            everyone = [None] * distributed.world_size()
            dist.all_gather_object(everyone, mine)
        checkpoint[_KEY] = everyone
        save_arguments(trainer, checkpoint)

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep this rank's state until training starts."""
        if trainer.state.fn != "fit":
            return
        run: Callable[[], None] = type(trainer.fit_loop).run.__get__(trainer.fit_loop)
        trainer.fit_loop.run = lambda: self._run(trainer, run)  # type: ignore[method-assign]
        warn_of_other_arguments(trainer, checkpoint)
        everyone = checkpoint.get(_KEY)
        if everyone is None:
            rank_zero_warn("the checkpoint holds no state of the random number generators: it was saved without ExactResume")
        elif len(everyone) != trainer.world_size:
            rank_zero_warn(
                f"the checkpoint was saved by {len(everyone)} ranks and is resumed by {trainer.world_size}: random numbers start anew"
            )
        else:
            self._resumed = everyone[trainer.global_rank]

    def _run(self, trainer: pl.Trainer, run: Callable[[], None]) -> None:
        """Lightning's fit loop, taken up where the checkpoint was saved; Lightning's own way where it was saved in other hooks."""
        loop = trainer.fit_loop
        place = place_of(loop) if loop._loaded_from_state_dict else None
        if place is None:
            run()
        else:
            run_resumed(loop, place, lambda: self._restore(trainer))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the generators back; behind all hooks of this name they are put back once more."""
        _mend_forgotten_loader_states(trainer)
        if self._resumed is not None:
            restore_random_state(self._resumed, trainer.strategy.root_device)

    def _restore(self, trainer: pl.Trainer) -> None:
        if self._resumed is not None:
            restore_random_state(self._resumed, trainer.strategy.root_device)
            if "logged" in self._resumed:
                restore_logged(trainer, self._resumed["logged"])
            callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
            spent = any(isinstance(one, EarlyStopping) and one.wait_count >= one.patience for one in callbacks)
            trainer.should_stop = trainer.should_stop or (spent and self._resumed.get("should_stop", False))
            self._resumed = None

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Hold the state of training."""
        if trainer.state.fn == "fit":
            self._before_validation = capture_random_state(trainer.strategy.root_device)
            logged = capture_logged(trainer)
            self._logged_before_validation = {name: logged[name] for name in ("results", "metrics")}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on with the state of training."""
        if self._before_validation is not None:
            restore_random_state(self._before_validation, trainer.strategy.root_device)
            self._before_validation = None

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Name the technique that is missing where the checkpoint doesn't fit without it."""
        explain_misfit(trainer, exception)
        super().on_exception(trainer, pl_module, exception)

    def leave(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the run."""
        self._resumed = self._before_validation = self._logged_before_validation = None
        vars(trainer.fit_loop).pop("run", None)


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
