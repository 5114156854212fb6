"""Progress bar with loss, key metrics and throughput; plain lines where there is no terminal."""

import time
from collections import deque
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console


class ThroughputProgressBar(RichProgressBar):
    """Rich progress bar that also shows the loss, the monitored metrics and the throughput.

    Without a terminal (a log file, CI) it prints a plain line at the first step, then at most every ``log_seconds``, and at the
    end, so that logs stay short. Throughput is a moving average over the last 20 batches, waiting for data included.

    Runs: after each batch; reads metrics from the device at most four times a second. Only rank 0 shows anything. Samples per second
    are ``batch_size`` of the training loader times the number of processes; a loader without a batch size shows iterations per
    second alone.
    Saves: nothing.
    Refuses: nothing; any module and strategy will do.

    Args:
        refresh_rate: Redraws per second on a terminal; 0 shows nothing.
        leave: Keep the bar of every epoch.
        log_seconds: Least seconds between two plain lines.
        plain: Plain lines (true) or the bar (false); null: plain when standard output is no terminal.
    """

    def __init__(self, refresh_rate: int = 10, leave: bool = False, log_seconds: float = 10.0, plain: bool | None = None) -> None:
        super().__init__(refresh_rate=refresh_rate, leave=leave)
        self.log_seconds = log_seconds
        self.plain = not Console().is_terminal if plain is None else plain
        self._shown = refresh_rate > 0
        self._loss: torch.Tensor | None = None
        self._batch_ends: deque[float] = deque(maxlen=21)
        self._read_at = self._line_at = -float("inf")
        self._line_step = -1
        self._metrics: dict[str, Any] = {}
        self._rates: dict[str, str] = {}

    @property
    def is_enabled(self) -> bool:
        """Whether the bar (not the plain lines) is drawn."""
        return super().is_enabled and not self.plain

    def disable(self) -> None:
        """Show nothing, as on all ranks but the first."""
        super().disable()
        self._shown = False

    def enable(self) -> None:
        """Show the bar, or plain lines."""
        super().enable()
        self._shown = self.refresh_rate > 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        super().on_train_start(trainer, pl_module)
        self._batch_ends.clear()
        self._rates = {}
        self._read_at = self._line_at = -float("inf")
        self._line_step = -1

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Advance by one batch."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        self._loss = loss.detach() if isinstance(loss, torch.Tensor) else None
        self._batch_ends.append(time.monotonic())
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._shown and self.plain and time.monotonic() - self._line_at >= self.log_seconds:
            self._print_line(trainer, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the training batches: the time of a validation is not training time."""
        super().on_validation_start(trainer, pl_module)
        self._throughput(trainer)
        self._batch_ends.clear()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the last line, unless the last step has one."""
        super().on_train_end(trainer, pl_module)
        if self._shown and self.plain and trainer.global_step != self._line_step:
            self._print_line(trainer, pl_module)

    def on_denoise_step(self, index: int, steps: int) -> None:
        """Show how far a generation by denoising has come, beside the batches of an evaluation or a prediction.

        Plain lines leave it out while a model trains.

        Args:
            index: Step that comes next, from 0.
            steps: How many there are.
        """
        if self.plain:
            trainer = getattr(self, "_trainer", None)
            training = trainer is not None and trainer.state.fn == "fit"
            if self._shown and not training and time.monotonic() - self._line_at >= self.log_seconds:
                print(f"denoising step {index + 1}/{steps}", flush=True)
                self._line_at = time.monotonic()
        elif self.progress is not None:
            shown = (self.predict_progress_bar_id, self.test_progress_bar_id, self.val_progress_bar_id, self.val_sanity_progress_bar_id)
            for number in (one for one in shown if one is not None and one in self.progress.task_ids):
                kind = self.progress.tasks[self.progress.task_ids.index(number)].description.partition(", step")[0]
                self.progress.update(number, description=f"{kind}, step {index + 1}/{steps}")

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Loss, metrics logged with ``prog_bar=True``, monitored metrics and throughput; at most 0.25 s old."""
        if time.monotonic() - self._read_at < 0.25:
            return self._metrics
        monitored = {getattr(callback, "monitor", None) for callback in trainer.callbacks}  # type: ignore[attr-defined]
        shown: dict[str, Any] = {name: value for name, value in trainer.callback_metrics.items() if name in monitored}
        shown |= {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}
        if self._loss is not None and self._loss.numel() == 1 and not any("loss" in name for name in shown):
            shown = {"loss": self._loss, **shown}
        self._metrics = {name: float(value) if isinstance(value, torch.Tensor) else value for name, value in shown.items()}
        self._metrics |= self._throughput(trainer)
        self._read_at = time.monotonic()
        return self._metrics

    def _throughput(self, trainer: pl.Trainer) -> dict[str, str]:
        if len(self._batch_ends) < 2:  # just after a validation: what was measured before it
            return self._rates
        rate = (len(self._batch_ends) - 1) / max(self._batch_ends[-1] - self._batch_ends[0], 1e-9)
        batch_size = getattr(trainer.train_dataloader, "batch_size", None)
        shown = {"samples/s": f"{rate * batch_size * trainer.world_size:.4g}"} if isinstance(batch_size, int) else {}
        self._rates = {"it/s": f"{rate:.3g}", **shown} if self.plain else shown  # the bar has a column for it/s
        return self._rates

    def _print_line(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._read_at = -float("inf")
        metrics = self.get_metrics(trainer, pl_module)
        values = "  ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in metrics.items())
        total = trainer.estimated_stepping_batches
        of = f"/{int(total)}" if total != float("inf") and total >= 0 else ""
        epoch = max(0, trainer.fit_loop.epoch_progress.current.ready - 1)  # current_epoch is the next one as soon as an epoch has ended
        print(f"epoch {epoch}  step {trainer.global_step}{of}  {values}", flush=True)
        self._line_at, self._line_step = time.monotonic(), trainer.global_step
