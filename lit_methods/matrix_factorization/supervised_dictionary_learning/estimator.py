"""The same algorithms as a scikit-learn estimator: pipelines, grid searches and cross-validation work with it."""

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, TransformerMixin
from sklearn.metrics import accuracy_score
from sklearn.utils import check_random_state, column_or_1d
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import check_array, check_is_fitted, validate_data
from torch import Tensor

from lit_methods import checks
from lit_methods.matrix_factorization.regression import best_threshold, code_columns, linear_scores
from lit_methods.matrix_factorization.supervised_dictionary_learning.core import (
    Factors,
    Lifted,
    Model,
    Prediction,
    bcd_step,
    decayed_step_size,
    factor_objective,
    lift_factors,
    lpgd_curvature,
    lpgd_objective,
    lpgd_step,
    predict_probability,
    random_factors,
    recover_factors,
    search_radius,
    svd_factors,
)

_CHECK_EVERY = 10  # iterations between two looks at the objective


class SupervisedDictionaryClassifier(TransformerMixin, ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Binary classifier and transformer: a dictionary that reconstructs the rows of X and predicts y, by LPGD or BCD (arXiv:2206.06774).

    Covariates, which the regression sees and the dictionary doesn't, are an argument of ``fit`` and of all predictions, and take part in
    scikit-learn's metadata routing: ``set_fit_request(covariates=True)`` and so on. All is computed in float64 on the CPU.

    Args:
        model: ``filter``: the label from W^T x; ``feature``: from the code h.
        solver: ``lpgd`` or ``bcd``.
        rank: r, atoms.
        xi: Weight of the reconstruction, > 0.
        nu: LPGD: weight of the L2 term.
        step_size: LPGD: c of the steps c (t + 10)^(-step_decay); None: 1 / L of the data, which can't diverge.
        step_decay: LPGD: beta; 0: constant.
        init: LPGD: ``svd`` starts at the best reconstruction, ``random`` at random factors, as the authors do. BCD starts at random.
        nonnegative: BCD: W, H >= 0.
        radius: BCD: c of the search radius c (t + 1)^(-radius_decay) / log(t + 2); None: no limit.
        radius_decay: BCD: beta.
        l1: BCD: weight of the L1 term of W and of H.
        l2: BCD: weight of the L2 term of W and of H.
        column_share: BCD of the feature model: share of the rows of X whose codes change in an iteration.
        prediction: Feature model: how a code is found without its label: ``naive``, ``alternating`` or ``exhaustive``.
        max_iter: Most iterations.
        tol: End where the objective falls by less than this share in 10 iterations; 0: never.
        random_state: Seed of the start and of the drawn columns.

    Attributes:
        components_: W^T (r, p).
        codes_: H^T (n, r) of the training rows.
        coef_: (1, r + q) of codes or projections and of the covariates.
        intercept_: (1,).
        threshold_: Probability with the largest TPR - FPR on the training rows; ``predict`` takes 0.5, as scikit-learn expects.
        objective_: At the end.
        n_iter_: Iterations made.
        classes_: The two labels.

    Example:
        >>> from sklearn.datasets import load_breast_cancer
        >>> x, y = load_breast_cancer(return_X_y=True)
        >>> found = SupervisedDictionaryClassifier(rank=2).fit(x / x.max(0), y)
        >>> found.transform(x / x.max(0)).shape
        (569, 2)
    """

    def __init__(
        self,
        model: str = "filter",
        solver: str = "lpgd",
        rank: int = 2,
        *,
        xi: float = 0.1,
        nu: float = 0.1,
        step_size: float | None = None,
        step_decay: float = 0.0,
        init: str = "svd",
        nonnegative: bool = True,
        radius: float | None = None,
        radius_decay: float = 1.0,
        l1: float = 0.0,
        l2: float = 0.0,
        column_share: float = 0.1,
        prediction: str = "naive",
        max_iter: int = 500,
        tol: float = 1e-6,
        random_state: Any = None,
    ) -> None:
        self.model = model
        self.solver = solver
        self.rank = rank
        self.xi = xi
        self.nu = nu
        self.step_size = step_size
        self.step_decay = step_decay
        self.init = init
        self.nonnegative = nonnegative
        self.radius = radius
        self.radius_decay = radius_decay
        self.l1 = l1
        self.l2 = l2
        self.column_share = column_share
        self.prediction = prediction
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state

    def __sklearn_tags__(self) -> Any:
        """Two classes alone."""
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags

    # ---- fitting -------------------------------------------------------------------------------------------------------------------------

    def fit(self, X: Any, y: Any, covariates: Any = None) -> "SupervisedDictionaryClassifier":
        """Fit dictionary and regression.

        Args:
            X: (n, p), finite.
            y: (n,) of two different labels.
            covariates: (n, q); None: there are none.

        Raises:
            ValueError: Values that can't be fitted, or an objective that isn't finite any more.
        """
        self._check_arguments()
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_, label = np.unique(column_or_1d(y), return_inverse=True)
        if len(self.classes_) != 2:
            kind = type_of_target(y, input_name="y")
            if len(self.classes_) < 2:
                raise ValueError(
                    f"y has the class {self.classes_.tolist()} alone: this classifier needs rows of 2 classes, not of one class"
                )
            raise ValueError(f"Only binary classification is supported. The type of the target is {kind}.")
        extra = self._covariates(covariates, len(X), fitting=True)
        self.n_covariates_ = len(extra)
        x, labels = torch.from_numpy(X.T.copy()), torch.from_numpy(label.astype(np.float64))[None]
        seed = int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max))
        generator = torch.Generator().manual_seed(seed)
        solve = self._lpgd if self.solver == "lpgd" else self._bcd
        factors, scores, objective, self.n_iter_ = solve(x, labels, extra, generator)
        self.components_ = factors.dictionary.T.numpy().copy()
        self.codes_ = factors.codes.T.numpy().copy()
        self.intercept_, self.coef_ = factors.coefficients[0, :1].numpy().copy(), factors.coefficients[:, 1:].numpy().copy()
        self.threshold_ = float(best_threshold(labels[0], torch.sigmoid(scores[0])))
        self.objective_ = objective
        return self

    def _check_arguments(self) -> None:
        checks.one_of(Model, model=self.model)
        checks.one_of(("lpgd", "bcd"), solver=self.solver)
        checks.one_of(Prediction, prediction=self.prediction)
        checks.one_of(("svd", "random"), init=self.init)
        checks.at_least(1, rank=self.rank, max_iter=self.max_iter)
        checks.positive(xi=self.xi, step_size=self.step_size, radius=self.radius)
        checks.at_least(0, nu=self.nu, step_decay=self.step_decay, radius_decay=self.radius_decay, l1=self.l1, l2=self.l2, tol=self.tol)
        checks.within("(0, 1]", "a share", column_share=self.column_share)

    def _lpgd(self, x: Tensor, labels: Tensor, covariates: Tensor, generator: torch.Generator) -> tuple[Factors, Tensor, float, int]:
        rank: int = self.rank
        from_svd = self.init == "svd"
        start = svd_factors(x, len(covariates), rank) if from_svd else random_factors(len(x), x.shape[1], len(covariates), rank, generator)
        state: Lifted = lift_factors(start, self.model)  # type: ignore[arg-type]
        options: dict[str, Any] = {"model": self.model, "xi": self.xi, "nu": self.nu}
        safe = 0.0 if self.step_size is not None else 1 / float(lpgd_curvature(x, covariates, **options))
        objective, done = math.inf, 0
        for iteration in range(self.max_iter):
            step = safe if self.step_size is None else decayed_step_size(iteration, self.step_size, self.step_decay)
            state = lpgd_step(x, labels, covariates, state, rank=rank, step_size=step, **options)
            done = iteration + 1
            if done % _CHECK_EVERY == 0 or done == self.max_iter:
                before, objective = objective, self._finite(lpgd_objective(x, labels, covariates, state, **options).total, done)
                if self._settled(before, objective):
                    break
        factors = recover_factors(state.product, state.score, state.gamma, model=self.model, rank=rank)  # type: ignore[arg-type]
        return factors, self._scores(x, covariates, factors), objective, done

    def _bcd(self, x: Tensor, labels: Tensor, covariates: Tensor, generator: torch.Generator) -> tuple[Factors, Tensor, float, int]:
        factors = random_factors(len(x), x.shape[1], len(covariates), self.rank, generator)
        count = max(1, int(x.shape[1] * self.column_share))
        objective, done = math.inf, 0
        for iteration in range(self.max_iter):
            columns = None
            if self.model == "feature" and self.column_share < 1:
                columns = torch.rand(self.rank, x.shape[1], generator=generator).argsort(dim=1)[:, :count]
            factors = bcd_step(
                x,
                labels,
                covariates,
                factors,
                model=self.model,  # type: ignore[arg-type]
                xi=self.xi,
                radius=search_radius(iteration, self.radius, self.radius_decay),
                l1=self.l1,
                l2=self.l2,
                nonnegative=self.nonnegative,
                columns=columns,
            )
            done = iteration + 1
            if done % _CHECK_EVERY == 0 or done == self.max_iter:
                total = factor_objective(x, labels, covariates, factors, model=self.model, xi=self.xi).total  # type: ignore[arg-type]
                before, objective = objective, self._finite(total, done)
                if self._settled(before, objective):
                    break
        return factors, self._scores(x, covariates, factors), objective, done

    def _scores(self, x: Tensor, covariates: Tensor, factors: Factors) -> Tensor:
        features = factors.dictionary.T @ x if self.model == "filter" else factors.codes
        return linear_scores(features, covariates, factors.coefficients)

    def _settled(self, before: float, now: float) -> bool:
        return math.isfinite(before) and abs(before - now) < self.tol * abs(before)

    @staticmethod
    def _finite(objective: Tensor, iterations: int) -> float:
        if not objective.isfinite():
            raise ValueError(f"the objective is {float(objective)} after {iterations} iterations: lower step_size, or scale X down")
        return float(objective)

    # ---- prediction ----------------------------------------------------------------------------------------------------------------------

    def _covariates(self, covariates: Any, rows: int, fitting: bool = False) -> Tensor:
        """(q, n)."""
        if covariates is None:
            if not fitting and self.n_covariates_:
                raise ValueError(f"this estimator was fitted with {self.n_covariates_} covariates: give them, (n, {self.n_covariates_})")
            return torch.zeros(0, rows, dtype=torch.float64)
        found = check_array(covariates, dtype=np.float64, ensure_min_features=0, input_name="covariates")
        if len(found) != rows:
            raise ValueError(f"covariates have {len(found)} rows and X has {rows}: give one row for each")
        if not fitting and found.shape[1] != self.n_covariates_:
            raise ValueError(f"covariates have {found.shape[1]} columns, and this estimator was fitted with {self.n_covariates_}")
        return torch.from_numpy(found.T.copy())

    def _factors(self) -> Factors:
        coefficients = np.concatenate([self.intercept_[None], self.coef_], axis=1)
        return Factors(*(torch.from_numpy(np.ascontiguousarray(part)) for part in (self.components_.T, self.codes_.T, coefficients)))

    def _columns(self, X: Any) -> Tensor:
        check_is_fitted(self)
        return torch.from_numpy(validate_data(self, X, dtype=np.float64, reset=False).T.copy())

    def predict_proba(self, X: Any, covariates: Any = None) -> NDArray[np.float64]:
        """(n, 2) probabilities of ``classes_``.

        Args:
            X: (n, p).
            covariates: (n, q), if there were any in ``fit``.
        """
        x = self._columns(X)
        one = predict_probability(
            x,
            self._covariates(covariates, x.shape[1]),
            self._factors(),
            model=self.model,  # type: ignore[arg-type]
            xi=self.xi,
            prediction=self.prediction,  # type: ignore[arg-type]
            nonnegative=self._nonnegative_codes,
        ).numpy()
        return np.stack([1 - one, one], axis=1)

    def predict(self, X: Any, covariates: Any = None) -> NDArray[Any]:
        """(n,) labels: the likelier ones.

        Args:
            X: (n, p).
            covariates: (n, q), if there were any in ``fit``.
        """
        likelier = self.predict_proba(X, covariates).argmax(axis=1)
        found: NDArray[Any] = self.classes_[likelier]
        return found

    def transform(self, X: Any) -> NDArray[np.float64]:
        """(n, r): what the regression sees, X W in the filter model and codes without their labels in the feature model.

        Args:
            X: (n, p).
        """
        x = self._columns(X)
        dictionary = self._factors().dictionary
        found = dictionary.T @ x if self.model == "filter" else code_columns(x, dictionary, nonnegative=self._nonnegative_codes)
        return np.ascontiguousarray(found.T.numpy())

    def score(self, X: Any, y: Any, sample_weight: Any = None, covariates: Any = None) -> float:
        """Share of right labels.

        Args:
            X: (n, p).
            y: (n,).
            sample_weight: (n,); None: all count the same.
            covariates: (n, q), if there were any in ``fit``.
        """
        return float(accuracy_score(y, self.predict(X, covariates), sample_weight=sample_weight))

    @property
    def _nonnegative_codes(self) -> bool:
        return self.solver == "bcd" and self.nonnegative


__all__ = ["SupervisedDictionaryClassifier"]
