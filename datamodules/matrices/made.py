"""Matrices whose best reconstruction and whose label are known to need different directions."""

from pathlib import Path

import numpy as np

from lit_methods.checks import at_least
from lit_methods.datamodules.base import Ints
from lit_methods.datamodules.errors import BrokenRecordError
from lit_methods.datamodules.folders import data_path
from lit_methods.datamodules.matrices.base import Floats, MatrixDataModule, Table, no_covariates
from lit_methods.datamodules.matrices.idx import MISSING, mnist_files, read_mnist


def _sigmoid(scores: Floats) -> Floats:
    return np.asarray(0.5 * (1 + np.tanh(scores / 2)))


class PlantedDirectionsDataModule(MatrixDataModule):
    """Rows with some directions of large variance that say nothing, and one of small variance that decides the label.

    Batch: {"features": (N, P) float64, "label": (N,) int64, "covariates": (N, Q) float64}

    x = D z + noise, with orthonormal D, z_j ~ N(0, ``variance``) for the first directions and z_last ~ N(0, ``label_variance``); the label
    is 1 with probability sigmoid(``slope`` z_last + the covariates' part). A factorisation of the rows alone at a rank of ``directions``
    leaves the last direction out.

    Args:
        num_rows: Rows, drawn once; the held-out ones among them.
        num_features: p.
        directions: Directions of large variance, less than p.
        variance: Theirs.
        label_variance: Variance of the last direction.
        slope: How steeply the label depends on it.
        noise: Standard deviation of the noise of each feature.
        num_covariates: q standard normal covariates; the first one adds itself to the score of the label.
        test_share: Share of the rows that is held out.
        scale: Features are divided by it.
        steps_per_epoch: Iterations between two validations.
        num_workers: Processes that read data; 0 is fastest.
        seed: Seed of the rows and of the split.

    Raises:
        ValueError: A number lies outside its range.
    """

    def __init__(
        self,
        num_rows: int = 300,
        num_features: int = 50,
        directions: int = 3,
        variance: float = 10.0,
        label_variance: float = 0.5,
        slope: float = 6.0,
        noise: float = 0.05,
        num_covariates: int = 0,
        test_share: float = 1 / 3,
        scale: float = 1.0,
        steps_per_epoch: int = 25,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(test_share=test_share, scale=scale, steps_per_epoch=steps_per_epoch, num_workers=num_workers, seed=seed)
        at_least(2, num_rows=num_rows, num_features=num_features)
        at_least(0, directions=directions, variance=variance, label_variance=label_variance, noise=noise, num_covariates=num_covariates)
        if directions >= num_features:
            raise ValueError(
                f"directions is {directions} and num_features {num_features}: give fewer directions, one more decides the label"
            )
        self.save_hyperparameters()

    def tables(self) -> tuple[Table, Table]:
        """Draw all rows."""
        hp, rng = self.hparams, np.random.default_rng([self.seed, 0])
        count = hp["directions"] + 1
        basis = np.linalg.qr(rng.standard_normal((hp["num_features"], count)))[0]
        spread = np.sqrt([hp["variance"]] * hp["directions"] + [hp["label_variance"]])
        z = rng.standard_normal((hp["num_rows"], count)) * spread
        features = z @ basis.T + hp["noise"] * rng.standard_normal((hp["num_rows"], hp["num_features"]))
        covariates = rng.standard_normal((hp["num_rows"], hp["num_covariates"]))
        scores = hp["slope"] * z[:, -1] + covariates[:, :1].sum(1)
        label = (rng.random(hp["num_rows"]) < _sigmoid(scores)).astype(np.int64)
        return self.halves(Table(features, label, covariates))


class SemiSyntheticDigitsDataModule(MatrixDataModule):
    """Mixtures of some digit images, with labels that depend on other images: the paper's semi-synthetic MNIST.

    Batch: {"features": (N, P) float64, "label": (N,) int64, "covariates": (N, Q) float64}

    x = W h + noise, with W two images each of a 2 and a 7 and h uniform in [0, 1]; the label is 1 with probability sigmoid of the score
    <sum of two images of a 1 minus two of a 4, x>. Scores are shifted to the mean 0, so that both classes occur. Images are in [0, 1].

    Args:
        root: Folder with MNIST's files (``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``, or those of ``t10k``; also ``.gz``, also
            in ``MNIST/raw`` below it); None: the 8 x 8 digits of scikit-learn.
        num_rows: Rows, drawn once; the held-out ones among them.
        noise: Standard deviation of the noise of each pixel.
        test_share: Share of the rows that is held out.
        scale: Features are divided by it; the authors take 10 for the filter model and 500 for the feature model.
        steps_per_epoch: Iterations between two validations.
        num_workers: Processes that read data; 0 is fastest.
        seed: Seed of the images that are chosen, the rows and the split.

    Attributes:
        atoms: W^T (4, p) of the mixtures, after ``setup``, before ``scale``.
        direction: (p,) that decides the label, after ``setup``.

    Raises:
        ValueError: A number lies outside its range.
        WrongRootError: ``root`` has no such files.
        BrokenRecordError: A file is damaged, or has less than two images of a digit that is needed.
    """

    def __init__(
        self,
        root: Path | None = None,
        num_rows: int = 500,
        noise: float = 0.1,
        test_share: float = 0.2,
        scale: float = 1.0,
        steps_per_epoch: int = 25,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(test_share=test_share, scale=scale, steps_per_epoch=steps_per_epoch, num_workers=num_workers, seed=seed)
        at_least(2, num_rows=num_rows)
        at_least(0, noise=noise)
        self.save_hyperparameters()
        self.root = data_path(root)

    def check_root(self, stage: str = "fit") -> None:
        """See whether there are MNIST's files.

        Raises:
            WrongRootError: There are none.
        """
        if self.root is not None:
            mnist_files(self.root)

    def images(self) -> tuple[Floats, Ints]:
        """(N, H, W) images in [0, 1] and their digits."""
        if self.root is None:
            from sklearn.datasets import load_digits

            digits = load_digits()
            return digits.images / 16, digits.target
        labels = mnist_files(self.root)[1]
        pixels, digits = read_mnist(self.root)
        for digit in (1, 2, 4, 7):
            if (digits == digit).sum() < 2:
                raise BrokenRecordError(labels, "labels", f"{(digits == digit).sum()} images of a {digit}, 2 are needed: {MISSING}")
        return pixels / 255, digits.astype(np.int64)

    def tables(self) -> tuple[Table, Table]:
        """Choose images, draw all rows."""
        hp, rng = self.hparams, np.random.default_rng([self.seed, 0])
        images, digits = self.images()
        self.image_shape = images.shape[1:]  # type: ignore[assignment]

        def two_of(digit: int) -> Floats:
            return images[rng.choice(np.flatnonzero(digits == digit), 2, replace=False)].reshape(2, -1)

        self.atoms = atoms = np.concatenate([two_of(2), two_of(7)])
        self.direction = direction = two_of(1).sum(0) - two_of(4).sum(0)
        features = rng.random((hp["num_rows"], 4)) @ atoms + hp["noise"] * rng.standard_normal((hp["num_rows"], atoms.shape[1]))
        scores = features @ direction
        label = (rng.random(hp["num_rows"]) < _sigmoid(scores - scores.mean())).astype(np.int64)
        return self.halves(Table(features, label, no_covariates(len(label))))


__all__ = ["PlantedDirectionsDataModule", "SemiSyntheticDigitsDataModule", "mnist_files"]
