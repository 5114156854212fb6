"""Real tables that scikit-learn ships, with two classes."""

from typing import Literal

import numpy as np

from lit_methods.checks import literals
from lit_methods.datamodules.matrices.base import MatrixDataModule, Table, no_covariates

Name = Literal["breast_cancer", "digits", "wine"]


class TwoClassDataModule(MatrixDataModule):
    """Two classes of a real data set that scikit-learn ships: tumours, digits or wines. There is nothing to download and no ``root``.

    Batch: {"features": (N, P) float64, "label": (N,) int64, "covariates": (N, Q) float64}

    ``breast_cancer``: 569 rows of 30 measures, label 1 is benign; ``digits``: 8 x 8 images; ``wine``: 178 rows of 13 measures. Features are
    non-negative: images in [0, 1], measures brought to [0, 1] by the smallest and largest value of the training rows, held-out ones
    clipped to it.

    Args:
        name: Which data set.
        classes: The two classes that labels 0 and 1 stand for.
        test_share: Share of the rows that is held out.
        scale: Features are divided by it.
        steps_per_epoch: Iterations between two validations.
        num_workers: Processes that read data; 0 is fastest.
        seed: Seed of the split.

    Raises:
        ValueError: A number lies outside its range, or the data set has no such classes.
    """

    def __init__(
        self,
        name: Name = "breast_cancer",
        classes: tuple[int, int] = (0, 1),
        test_share: float = 0.3,
        scale: float = 1.0,
        steps_per_epoch: int = 25,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(test_share=test_share, scale=scale, steps_per_epoch=steps_per_epoch, num_workers=num_workers, seed=seed)
        literals(TwoClassDataModule, locals())
        count = {"breast_cancer": 2, "digits": 10, "wine": 3}[name]
        if len(set(classes)) != 2 or not set(classes) <= set(range(count)):
            raise ValueError(f"classes are {tuple(classes)}: give two different ones of {name}, from 0 to {count - 1}")
        self.save_hyperparameters()
        self.name, self.classes = name, tuple(classes)

    def tables(self) -> tuple[Table, Table]:
        """Read, choose the classes, split."""
        from sklearn import datasets

        bunch = getattr(datasets, f"load_{self.name}")()
        chosen = np.isin(bunch.target, self.classes)
        label = (bunch.target[chosen] == self.classes[1]).astype(np.int64)
        train, held = self.halves(Table(bunch.data[chosen].astype(np.float64), label, no_covariates(len(label))))
        self.feature_names = tuple(map(str, bunch.feature_names))
        if self.name == "digits":
            self.image_shape = (8, 8)
            low, high = np.zeros(64), np.full(64, 16.0)
        else:
            low, high = train.features.min(0), train.features.max(0)
        width = np.where(high > low, high - low, 1.0)
        first, second = (Table(np.clip((t.features - low) / width, 0, 1), t.label, t.covariates) for t in (train, held))
        return first, second


__all__ = ["TwoClassDataModule"]
