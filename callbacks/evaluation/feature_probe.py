"""How much a classifier would get out of a module's features: a linear probe and nearest neighbours, for any module."""

import operator
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lit_methods import checks, distributed
from lit_methods.callbacks.batch import Key, inputs_and_labels
from lit_methods.callbacks.evaluation.callback import EvaluationCallback, Split
from lit_methods.callbacks.twin import observed, training_batches
from lit_methods.panels import Curve, Panel
from lit_methods.self_supervised.probe import linear_probe, nearest_neighbours
from lit_methods.steps import log_global


class FeatureProbe(EvaluationCallback):
    """Classifies the validation (or test) samples by a module's features: by a linear classifier, and by their nearest neighbours.

    Both are fitted to the features of the training samples, as the first epoch's training loader brings them, and to their labels. The
    module isn't trained by them and needs no labels itself: this is how features of self-supervised learning are judged.

    Runs: at the end of each ``every_n_epochs``-th validation epoch and of a test, one pass over the training loader in evaluation mode, and
    a fit by :func:`~lit_methods.self_supervised.probe.linear_probe`; each batch of the evaluation takes one pass more. All ranks' samples
    count together. Features of all samples are kept in memory meanwhile: (samples, D) float32. Weights, running statistics and random
    numbers stay as they are. The sanity check looks at the features' shape alone.
    Saves: nothing.
    Refuses: modules without such features, features of another shape than (B, D), batches without (B,) integer labels, training data that
    are neither a ``DataLoader`` nor a list, ``validate`` and ``test`` without a datamodule.

    Args:
        features: Method or submodule that maps the inputs of a batch to (B, D) features; ``forward``: the module itself.
        inputs: Key or position of the inputs in a batch; null: ``image``, or 0.
        labels: Key or position of the labels; null: ``label``, or 1.
        every_n_epochs: Validation epochs from one measurement to the next; testing always measures.
        l2: Weight of the linear probe's penalty.
        iterations: Most steps of the linear probe's fit.
        neighbours: Nearest neighbours that vote.
        temperature: Of their votes; small: the nearest decide.

    Raises:
        TypeError: In ``setup``, the module has nothing of that name.
        ValueError: An argument out of range; while running, batches or features of another form.
    """

    runs_before: ClassVar[Sequence[str]] = ("Dashboard",)
    panels: ClassVar[tuple[Panel, ...]] = (
        Curve(
            "Accuracy on fixed features",
            ("probe/val_linear", "probe/val_neighbours", "probe/test_linear", "probe/test_neighbours"),
            note="Of a linear classifier, and of the nearest neighbours.",
            goal="max",
        ),
    )

    def __init__(
        self,
        features: str = "forward",
        inputs: Key = None,
        labels: Key = None,
        every_n_epochs: int = 1,
        l2: float = 1e-3,
        iterations: int = 200,
        neighbours: int = 20,
        temperature: float = 0.07,
    ) -> None:
        super().__init__()
        checks.at_least(1, every_n_epochs=every_n_epochs, iterations=iterations, neighbours=neighbours)
        checks.positive(l2=l2, temperature=temperature)
        self.features, self.inputs, self.labels, self.every_n_epochs = features, inputs, labels, every_n_epochs
        self.l2, self.iterations, self.neighbours, self.temperature = l2, iterations, neighbours, temperature
        self._twin: pl.LightningModule | None = None
        self._seen: list[tuple[Tensor, Tensor]] = []  # features and labels of this evaluation's batches

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a module without what ``features`` names."""
        super().setup(trainer, pl_module, stage)
        self.when_built(pl_module, lambda: self._check(pl_module))

    def _check(self, pl_module: pl.LightningModule) -> None:
        try:
            known = callable(operator.attrgetter(self.features)(pl_module))
        except AttributeError:
            known = False
        if not known or (self.features == "forward" and not is_overridden("forward", pl_module, pl.LightningModule)):
            raise TypeError(
                f"FeatureProbe needs features, but {type(pl_module).__name__} has no {self.features!r} that maps inputs to them: give "
                "features the name of a method or submodule that takes the inputs of a batch and returns (B, D)"
            )

    def begin_evaluation(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: Split) -> None:
        """Forget the epoch before."""
        self._twin, self._seen = None, []

    def leave(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let go of the copy."""
        self._twin, self._seen = None, []

    def _skipped(self, trainer: pl.Trainer) -> bool:
        fitting = trainer.state.fn == "fit" and not trainer.sanity_checking
        return fitting and (trainer.current_epoch + 1) % self.every_n_epochs != 0

    @torch.no_grad()
    def _look(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> tuple[Tensor, Tensor]:
        """(B, D) features and (B,) labels of a batch."""
        if self._twin is None:
            self._twin = observed(trainer, pl_module, type(self).__name__)
        inputs, labels = inputs_and_labels(batch, self.inputs, self.labels)
        with isolate_rng(pl_module.device.type == "cuda"):
            features = self._twin(inputs) if self.features == "forward" else operator.attrgetter(self.features)(self._twin)(inputs)
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(labels):
            shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(
                f"features={self.features!r} gives {shape} for {len(labels)} samples, expected (B, D): name a method or submodule "
                "that pools its output"
            )
        return features.float(), labels.to(features.device)

    def evaluate_batch(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, split: Split, dataloader_idx: int
    ) -> None:
        """Take the features of a batch of the first loader."""
        if dataloader_idx == 0 and not self._skipped(trainer):
            self._seen.append(self._look(trainer, pl_module, batch))

    def end_evaluation(self, trainer: pl.Trainer, pl_module: pl.LightningModule, split: Split) -> None:
        """Fit both classifiers and log their accuracy."""
        if not self._skipped(trainer) and not trainer.sanity_checking and self._seen:
            with checks.naming(type(self).__name__):
                figures = self._judge(trainer, pl_module)
            log_global(pl_module, {f"probe/{split}_{name}": value for name, value in figures.items()})
        self._twin, self._seen = None, []

    def _judge(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Tensor]:
        with isolate_rng(pl_module.device.type == "cuda"):  # a loader takes a seed for its workers from the global generator
            known = [self._look(trainer, pl_module, batch) for batch in self._training_batches(trainer)]
        train, train_labels = (distributed.gather_rows(torch.cat(parts), with_grad=False) for parts in zip(*known, strict=True))
        held_out, labels = (distributed.gather_rows(torch.cat(parts), with_grad=False) for parts in zip(*self._seen, strict=True))
        classes = int(train_labels.max()) + 1
        predicted = {
            "linear": linear_probe(train, train_labels, held_out, classes, self.l2, self.iterations),
            "neighbours": nearest_neighbours(train, train_labels, held_out, classes, self.neighbours, self.temperature),
        }
        return {name: (scores.argmax(1) == labels).float().mean() for name, scores in predicted.items()}

    @staticmethod
    def _training_batches(trainer: pl.Trainer) -> Iterator[Any]:
        if trainer.state.fn == "fit":
            yield from training_batches(trainer, "it takes training features", "give one, or a list of batches")
            return
        data: Any = getattr(trainer, "datamodule", None)
        if data is None:
            raise ValueError("the training data are needed, and validate and test have them from a datamodule alone: give one")
        data.setup("fit")
        for batch in data.train_dataloader():
            yield trainer.strategy.batch_to_device(batch, dataloader_idx=0)


__all__ = ["FeatureProbe"]
