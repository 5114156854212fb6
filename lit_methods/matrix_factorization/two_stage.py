"""Baselines by scikit-learn: logistic regression alone, or on the codes of a dictionary that has never seen a label."""

import warnings
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

from lit_methods import checks
from lit_methods.matrix_factorization.base import MatrixClassifier
from lit_methods.matrix_factorization.regression import best_threshold, code_columns, fit_regression, linear_scores

Decomposition = Literal["none", "nmf", "svd"]


class TwoStageClassifier(MatrixClassifier):
    """Factorises without labels, then regresses the label on W^T x: MF-LR; or regresses on x itself: LR.

    Both stages are scikit-learn's, to convergence, at the first step of a fit; further steps change nothing.

    Runs: as :class:`MatrixClassifier`.

    Saves: W, the coefficients and the threshold.

    Refuses: what :class:`MatrixClassifier` refuses; NMF of negative values.

    Args:
        decomposition: ``nmf``: non-negative factors; ``svd``: truncated SVD, for data of both signs; ``none``: regression on x.
        rank: r, atoms.
        max_iter: Most iterations of the NMF.
        seed: Seed of the NMF's start.

    Raises:
        ValueError: A value outside its range.
    """

    dictionary: Tensor
    coefficients: Tensor

    def __init__(self, decomposition: Decomposition = "nmf", rank: int = 4, max_iter: int = 1000, seed: int = 0) -> None:
        super().__init__()
        checks.literals(TwoStageClassifier, locals())
        checks.at_least(1, rank=rank, max_iter=max_iter)
        checks.at_least(0, seed=seed)
        self.save_hyperparameters()
        self.decomposition, self.rank, self.max_iter, self.seed = decomposition, rank, max_iter, seed

    def state_shapes(self, rows: int, features: int, covariates: int) -> dict[str, tuple[int, int]]:
        """W, of as many columns as there are regressors beside the covariates; and the coefficients."""
        width = features if self.decomposition == "none" else self.rank
        shapes = {"coefficients": (1, 1 + width + covariates)}
        return shapes if self.decomposition == "none" else shapes | {"dictionary": (features, self.rank)}

    def saved_shape(self, saved: dict[str, Tensor]) -> tuple[int, int, int]:
        """(0, p, q): how many rows there were isn't kept."""
        width = saved["coefficients"].shape[1] - 1
        return (0, width, 0) if self.decomposition == "none" else (0, len(saved["dictionary"]), width - self.rank)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> STEP_OUTPUT:
        """Fit at the first step."""
        x, labels, covariates = self.whole_matrix(batch)
        self.optimizers().step(closure=lambda: self._fit(x, labels, covariates))  # type: ignore[union-attr, call-arg]
        return None

    def _fit(self, x: Tensor, labels: Tensor, covariates: Tensor) -> None:
        if self.trainer.global_step:
            return
        with torch.no_grad():
            if self.decomposition != "none":
                self.dictionary.copy_(self._factorise(x))
            self.coefficients.copy_(fit_regression(self._regressors(x), covariates, labels))
            self.threshold.copy_(best_threshold(labels[0], self.probability(x, covariates)))

    def _factorise(self, x: Tensor) -> Tensor:
        """(p, r) atoms, together with norm 1; zeros where the data have a lower rank."""
        from sklearn.decomposition import NMF
        from sklearn.exceptions import ConvergenceWarning

        if self.decomposition == "svd":
            atoms = torch.linalg.svd(x, full_matrices=False).U[:, : self.rank]
        else:
            if (x < 0).any():
                raise ValueError("the features have negative values, which an NMF can't reconstruct: use decomposition='svd'")
            model: Any = NMF(self.rank, init="nndsvda", max_iter=self.max_iter, random_state=self.seed)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                atoms = torch.from_numpy(model.fit(x.T.cpu().numpy()).components_.T).to(x)
        atoms = torch.nn.functional.pad(atoms, (0, self.rank - atoms.shape[1]))
        return atoms / atoms.norm().clamp(min=torch.finfo(atoms.dtype).tiny)

    def _regressors(self, x: Tensor) -> Tensor:
        return x if self.decomposition == "none" else self.dictionary.T @ x

    def atoms(self) -> tuple[Tensor, Tensor] | None:
        """W and the coefficients of its atoms."""
        return None if self.decomposition == "none" else (self.dictionary, self.coefficients[0, 1 : 1 + self.rank])

    def probability(self, x: Tensor, covariates: Tensor) -> Tensor:
        """(m,) sigmoid of the regression."""
        return torch.sigmoid(linear_scores(self._regressors(x), covariates, self.coefficients))[0]

    def encode(self, x: Tensor) -> Tensor | None:
        """(r, m) codes, non-negative after NMF."""
        return None if self.decomposition == "none" else code_columns(x, self.dictionary, nonnegative=self.decomposition == "nmf")


__all__ = ["TwoStageClassifier"]
