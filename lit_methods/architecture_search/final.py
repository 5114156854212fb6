"""Training of a network that a search found: image classification with an auxiliary head and dropped paths."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from lit_methods import checks
from lit_methods.architecture_search.networks import GenotypeNetwork
from lit_methods.arguments import handed_on
from lit_methods.steps import training_length
from lit_methods.tasks.vision.classifier import ImageClassifier, Schedule, classification_loss


class GenotypeClassifier(ImageClassifier):
    """Trains the network of a genotype on images.

    Runs: as :class:`ImageClassifier`. The loss of the auxiliary head joins with ``auxiliary_weight``. The share of dropped paths rises
    linearly from 0 to ``drop_path`` at the end of the training. A :class:`~lit_methods.callbacks.ScorePruning` beside it prunes the network
    as DASS does. Nothing is searched here: the genotype is a file or a name.

    Saves: the network, in ordinary layers.

    Refuses: what :class:`ImageClassifier` refuses, and ``drop_path`` in a training without an end.

    Args:
        network: The network of a genotype.
        num_classes: Number of classes.
        class_names: For the table of confusions; None numbers the classes.
        auxiliary_weight: Factor of the auxiliary head's loss, >= 0; of no effect where the network has no such head.
        drop_path: Share of the samples whose path is dropped at the end of the training, in [0, 1).
        optimizer: ``sgd``, ``adam`` or ``adamw``.
        learning_rate: The full one.
        momentum: SGD's momentum.
        weight_decay: Factor of the optimiser.
        schedule: ``constant``, ``cosine`` or ``multistep``.
        milestones: Epochs at which ``multistep`` multiplies the learning rate by ``gamma``.
        gamma: See ``milestones``.
        label_smoothing: 0 to 1; of the training loss.

    Raises:
        ValueError: A value lies outside its range.
    """

    def __init__(
        self,
        network: GenotypeNetwork,
        num_classes: int = 10,
        class_names: Sequence[str] | None = None,
        auxiliary_weight: float = 0.4,
        drop_path: float = 0.0,
        optimizer: Literal["sgd", "adam", "adamw"] = "sgd",
        learning_rate: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 3e-4,
        schedule: Schedule = "cosine",
        milestones: Sequence[int] = (),
        gamma: float = 0.1,
        label_smoothing: float = 0.0,
    ) -> None:
        checks.at_least(0, auxiliary_weight=auxiliary_weight)
        checks.within("[0, 1)", "a share", drop_path=drop_path)
        super().__init__(**handed_on(ImageClassifier, locals()))
        self.save_hyperparameters(ignore=["network"])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Loss of a batch, that of the auxiliary head with it."""
        hp, images, labels = self.hparams, batch["image"], batch["label"]
        network: GenotypeNetwork = self.network  # type: ignore[assignment]
        if hp["drop_path"] > 0:
            network.set_drop_rate(hp["drop_path"] * min(1.0, self.global_step / training_length(self, what="drop_path", instead=None)))
        logits, beside = network.both(images)
        loss = classification_loss(logits, labels, hp["loss"], hp["label_smoothing"])
        self.log("classifier/loss", loss.detach(), prog_bar=True, batch_size=len(labels))
        self.log("classifier/accuracy", (logits.detach().argmax(dim=1) == labels).float().mean(), batch_size=len(labels))
        if beside is not None:
            loss = loss + hp["auxiliary_weight"] * classification_loss(beside, labels, hp["loss"], hp["label_smoothing"])
        return loss


__all__ = ["GenotypeClassifier"]
