"""The part of a module that measures validation and test data in the same way."""

from typing import Any, Literal

from lightning.pytorch import LightningModule

from lit_methods.panels import Media

Part = Literal["val", "test"]


class Evaluated(LightningModule):
    """Base of modules whose validation and test differ in the names of the figures alone.

    Subclasses give :meth:`_evaluate`, which looks at a batch, and :meth:`_log_evaluation`, which logs over all batches of all ranks, and
    put what the dashboard shows into ``_media``.
    """

    def __init__(self) -> None:
        super().__init__()
        self._media: dict[str, Media] = {}

    def _evaluate(self, batch: Any, batch_idx: int) -> Any:
        """Add a batch to the figures; what this returns is what the step returns."""
        raise NotImplementedError

    def _log_evaluation(self, part: Part) -> None:
        """Log the figures, and begin anew."""
        raise NotImplementedError

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        """Adds a batch to the figures."""
        return self._evaluate(batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int) -> Any:
        """Adds a batch to the figures."""
        return self._evaluate(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        """Logs the figures over all data of all ranks."""
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Logs the figures over all data of all ranks."""
        self._log_evaluation("test")

    def dashboard_media(self) -> dict[str, Media]:
        """What the last evaluation, or step, has to show."""
        return self._media
