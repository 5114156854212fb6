"""Base of the callbacks that judge a sparse autoencoder, ours or any module with the same four names."""

from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn

from lit_methods.callbacks.batch import Key, find_in_batch
from lit_methods.callbacks.evaluation.callback import EvaluationCallback, Split
from lit_methods.callbacks.targets import plain_modules
from lit_methods.callbacks.twin import observed
from lit_methods.checks import naming

PROTOCOL = {
    "encode": "a method, activations (B, d) -> codes (B, h)",
    "decode": "a method, codes (B, h) -> activations (B, d)",
    "decoder_directions": "a tensor (h, d) or a method that returns one",
}


class AutoencoderJudge(EvaluationCallback):
    """Subclass it, and write what is measured: ``self.judged`` is the autoencoder, ``self.activations(batch)`` what it codes.

    The autoencoder is a copy that shares the weights, so that counters in the module stay where they are.

    Args:
        autoencoder: Name of the submodule that is the autoencoder; "": the module itself.
        activation: Key or position of the activations in a batch; None: ``activation``, or 0.
    """

    def __init__(self, autoencoder: str = "", activation: Key = None) -> None:
        super().__init__()
        self.autoencoder, self.activation = autoencoder, activation
        self._twin: nn.Module | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Look whether the module has an autoencoder.

        Raises:
            ValueError: There is no such submodule, or it lacks one of the names.
        """
        super().setup(trainer, pl_module, stage)
        self.when_built(pl_module, lambda: self._check(pl_module))

    def _check(self, pl_module: pl.LightningModule) -> None:
        with naming(type(self).__name__):
            found = _find(pl_module, self.autoencoder)
            missing = [f"{name} ({what})" for name, what in PROTOCOL.items() if not hasattr(found, name)]
            if missing:
                where = f"autoencoder={self.autoencoder!r}" if self.autoencoder else type(pl_module).__name__
                raise ValueError(f"{where} has no {', '.join(missing)}: give it these, or name the submodule that has them by autoencoder")

    def begin_evaluation(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: Split) -> None:
        """Copy the module."""
        self._twin = _find(observed(trainer, pl_module, type(self).__name__), self.autoencoder)

    def end_evaluation(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: Split) -> None:
        """Forget the copy; a subclass calls it last."""
        self._twin = None

    @property
    def judged(self) -> Any:
        """The autoencoder, in evaluation mode; within an evaluation."""
        assert self._twin is not None
        return self._twin

    @property
    def directions(self) -> Tensor:
        """(h, d) decoder directions."""
        return decoder_directions(self.judged)

    def activations(self, batch: Any) -> Tensor:
        """(B, d) activations of a batch; those of sequences (B, T, d) one behind the other."""
        x = find_in_batch(batch, self.activation, ("activation", 0), "activation")
        return x.flatten(0, -2)

    def leave(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the copy."""
        self._twin = None


def decoder_directions(autoencoder: Any) -> Tensor:
    """(h, d) directions of an autoencoder's features, detached."""
    found = autoencoder.decoder_directions
    directions: Tensor = found if isinstance(found, Tensor) else found()
    return directions.detach()


def _find(pl_module: nn.Module, name: str) -> nn.Module:
    modules = plain_modules(pl_module)
    if name not in modules:
        known = ", ".join(own for own in modules if own and own.count(".") < 2)
        raise ValueError(f"autoencoder={name!r} is no submodule of {type(pl_module).__name__}; there are {known or 'none'}")
    return modules[name]


__all__ = ["AutoencoderJudge", "decoder_directions"]
