"""A run whose loss becomes NaN or infinite ends early, and never saves spoilt weights over good ones."""

from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.nn.parameter import is_lazy

from lit_methods.callbacks.ordering import OrderedCallback
from lit_methods.checks import one_of

Policy = Literal["stop", "warn"]
NEVER = torch.iinfo(torch.int64).max


class NonFiniteError(RuntimeError):
    """The loss or the weights are NaN or infinite; the message says since when and what to do."""


def not_finite(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whether each tensor holds a NaN or an infinity.

    Args:
        parameters: Name -> tensor of any shape and floating dtype; others count as finite.

    Returns:
        Name -> scalar bool tensor on the tensor's device; nothing is read on the host. Lazy parameters without a shape are left out.
    """
    there = {name: value for name, value in parameters.items() if not is_lazy(value)}
    return {name: ~value.detach().isfinite().all() for name, value in there.items() if value.is_floating_point()}


class FiniteGuard(OrderedCallback):
    """Watches that loss and weights stay finite; ``lit fit`` adds it to every run.

    Each step notes on the device whether its loss is finite (three tiny operations, no waiting). The note is read where
    Lightning waits for the device anyway, every ``log_every_n_steps`` steps, and at the end of each epoch. Weights are
    looked at whenever a checkpoint is saved: weights that aren't finite are never written, so the last good checkpoint
    stays, and the run ends. Parameters that weren't finite at the start (a mask of infinities) are left out.

    With ``precision="16-mixed"`` the gradient scaler skips steps that overflow, so a loss alone only warns there.

    Runs: ``on_train_batch_end``, ``on_train_epoch_end``, ``on_save_checkpoint``; all ranks agree on what was seen, so all of
    them stop. Modules that return no loss (manual optimisation) are watched by their weights alone.
    Saves: nothing.
    Refuses: to go on with, or to save, what isn't finite.

    Args:
        policy: ``stop`` ends the run at a loss that isn't finite; ``warn`` says it once and goes on.

    Raises:
        NonFiniteError: While running, as said above.
        ValueError: Another policy.
    """

    def __init__(self, policy: Policy = "stop") -> None:
        super().__init__()
        one_of(Policy, policy=policy)
        self.policy = policy
        self._first: Tensor | None = None
        self._known: set[str] = set()
        self._warned = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note which parameters hold infinities on purpose."""
        self._first, self._warned = None, False
        bad = not_finite(dict(pl_module.named_parameters()))
        flags = torch.stack(list(bad.values())).tolist() if bad else []
        self._known = {name for name, is_bad in zip(bad, flags, strict=True) if is_bad}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        """Note the loss; read the notes now and then."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            if self._first is None:
                self._first = torch.full((), NEVER, device=loss.device)
            step = trainer.global_step
            self._first = torch.where(loss.detach().isfinite().all(), self._first, self._first.clamp(max=step))
        every = trainer.log_every_n_steps or 50  # type: ignore[attr-defined]  # 0: nothing is logged
        if (trainer.fit_loop.epoch_loop._batches_that_stepped + 1) % every == 0:
            self._look(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read the notes."""
        self._look(trainer, pl_module)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse to save weights that aren't finite."""
        if trainer.state.fn != "fit":
            return
        bad = self._bad_weights(trainer, pl_module)
        if bad is not None:
            raise NonFiniteError(self._message(trainer, f"the weights are not finite ({bad or 'on another process'})", self._first_step()))

    def leave(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the run."""
        self._first = None

    def _first_step(self) -> int | None:
        step = NEVER if self._first is None else int(self._first)
        return None if step == NEVER else step

    def _look(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        step = self._first_step()
        if not trainer.strategy.reduce_boolean_decision(step is not None, all=False):
            return
        what = "the loss is not finite"
        if self.policy == "stop" and not (str(trainer.precision) == "16-mixed" and self._bad_weights(trainer, pl_module) is None):
            raise NonFiniteError(self._message(trainer, what, step))
        if not self._warned:
            rank_zero_warn(self._message(trainer, what, step))
        self._warned = True
        self._first = None

    def _bad_weights(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> str | None:
        """Name of the first parameter that isn't finite on this rank, "" when it is one of another rank's, None when all are finite."""
        bad = not_finite({name: value for name, value in pl_module.named_parameters() if name not in self._known})
        any_bad = bool(torch.stack(list(bad.values())).any()) if bad else False
        if not trainer.strategy.reduce_boolean_decision(any_bad, all=False):
            return None
        return next((name for name, is_bad in bad.items() if is_bad), "")

    @staticmethod
    def _message(trainer: pl.Trainer, what: str, step: int | None) -> str:
        seen = (f"first at step {step:,}, " if step is not None else "") + f"seen at step {trainer.global_step:,}"
        return (
            f"{what}: {seen}. Checkpoints saved before are good\n"
            "  try a lower learning rate, --trainer.gradient_clip_val 1.0, or --trainer.precision bf16-mixed or 32-true;\n"
            "  --trainer.detect_anomaly true names the operation (slow);\n"
            "  to go on all the same: --trainer.callbacks+=FiniteGuard --trainer.callbacks.policy warn"
        )
