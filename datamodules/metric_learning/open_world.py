"""Vectors of many classes that differ in how far they spread: an open world in seconds."""

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from lit_methods.checks import at_least, one_of, within
from lit_methods.datamodules.generative.base import Tensors
from lit_methods.datamodules.metric_learning.base import RetrievalDataModule

Source = Literal["made", "digits"]
FEATURES = 64


def open_world(num_classes: int, per_class: int, dims: int, rng: np.random.Generator) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Samples x = tanh(A (mu_c + s_c eps) + B (n_c eta)) with class spreads s_c in [0.15, 0.75] and nuisances n_c in [0.3, 2], log-uniform.

    A and B are the same for all classes, mu_c, eps and eta standard normal in ``dims`` dimensions.

    Returns:
        (num_classes * per_class, 64) and the classes, sample k of every class before sample k + 1 of any.
    """
    signal, clutter = rng.normal(size=(2, FEATURES, dims)) / np.sqrt(dims)
    spread, nuisance = (np.exp(rng.uniform(np.log(low), np.log(high), num_classes)) for low, high in ((0.15, 0.75), (0.3, 2.0)))
    centre = rng.normal(size=(num_classes, dims))
    eps, eta = rng.normal(size=(2, per_class, num_classes, dims))
    inside = (centre + spread[:, None] * eps) @ signal.T + (nuisance[:, None] * eta) @ clutter.T
    labels = np.tile(np.arange(num_classes), per_class)
    return np.tanh(inside).reshape(-1, FEATURES).astype(np.float32), labels


def open_digits(num_classes: int, per_class: int, rng: np.random.Generator) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """``per_class`` of scikit-learn's digits of each class 0 to ``num_classes - 1``, drawn without repetition: as :func:`open_world`."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    chosen = [rng.permutation(np.flatnonzero(digits.target == name))[:per_class] for name in range(num_classes)]
    order = np.stack(chosen, axis=1).ravel()
    return (digits.data[order] / 8 - 1).astype(np.float32), digits.target[order].astype(np.int64)


class OpenWorldDataModule(RetrievalDataModule):
    """Vectors of 64 numbers in classes of different spread; evaluation is on classes that training hasn't seen. Nothing is downloaded.

    Batch: {"image": (B, 64) float32 in [-1, 1], "label": (B,) int64}

    Labels are 0 to ``num_train_classes - 1`` in training and larger in evaluation.

    Args:
        source: ``made``, or ``digits``: scikit-learn's real digits of 8 x 8 pixels, of which the lowest are seen.
        num_train_classes: Seen classes.
        num_val_classes: Unseen classes; of ``digits`` there are ten classes in all.
        per_class: Samples of each class, up to 174 of ``digits``.
        dims: Dimensions of a made class's centre, and of what varies inside the class.
        classes_per_batch: Different classes in a training batch.
        samples_per_class: Samples of each.
        steps_per_epoch: Batches of a process in an epoch; None: as many as the samples fill.
        eval_batch_size: Samples per process and evaluation step.
        num_workers: Processes that read data; the samples lie in memory, so 0 is fastest.
        seed: Seed of the classes, their samples and the draws.

    Raises:
        ValueError: A number is below 1.
    """

    def __init__(
        self,
        num_train_classes: int = 30,
        num_val_classes: int = 30,
        per_class: int = 24,
        dims: int = 16,
        classes_per_batch: int = 16,
        samples_per_class: int = 5,
        steps_per_epoch: int | None = 50,
        eval_batch_size: int = 720,
        num_workers: int = 0,
        seed: int = 0,
        source: Source = "made",
    ) -> None:
        super().__init__(
            classes_per_batch=classes_per_batch,
            samples_per_class=samples_per_class,
            steps_per_epoch=steps_per_epoch,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        at_least(1, num_train_classes=num_train_classes, num_val_classes=num_val_classes, per_class=per_class, dims=dims)
        one_of(Source, source=source)
        if source == "digits":
            within(f"[1, {10 - num_train_classes}]", "unseen classes, as there are ten digits in all,", num_val_classes=num_val_classes)
            within("[1, 174]", "samples, as the rarest digit has 174,", per_class=per_class)
        self.save_hyperparameters(logger=False)

    def setup(self, stage: str) -> None:
        """Draw all samples."""
        if self.train_set is not None:
            return
        hp, seen = self.hparams, self.hparams["num_train_classes"]
        rng, classes = np.random.default_rng([self.seed, 4]), seen + hp["num_val_classes"]
        if hp["source"] == "digits":
            data, labels = open_digits(classes, hp["per_class"], rng)
        else:
            data, labels = open_world(classes, hp["per_class"], hp["dims"], rng)
        train = labels < seen
        self.train_labels = labels[train]
        self.train_set, self.val_set = (Tensors(torch.from_numpy(data[part]), torch.from_numpy(labels[part])) for part in (train, ~train))


__all__ = ["FEATURES", "OpenWorldDataModule", "open_digits", "open_world"]
