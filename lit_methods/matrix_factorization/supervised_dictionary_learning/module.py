"""Supervised matrix factorisation (arXiv:2206.06774), one full-batch iteration per step.

Read in ljw9510/SDL@c6ae40f. The maths is in :mod:`lit_methods.matrix_factorization.supervised_dictionary_learning.core`; baselines are
``TwoStageClassifier``. Left out: more than two classes, the update of xi by the noise.
"""

import math
from typing import ClassVar, Literal

import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

from lit_methods import checks
from lit_methods.catalog import Technique
from lit_methods.matrix_factorization.base import MatrixClassifier
from lit_methods.matrix_factorization.regression import best_threshold, code_columns, linear_scores
from lit_methods.matrix_factorization.supervised_dictionary_learning.core import (
    Factors,
    Lifted,
    Model,
    Objective,
    Prediction,
    bcd_step,
    decayed_step_size,
    factor_objective,
    lift_factors,
    lifted_scores,
    lpgd_curvature,
    lpgd_objective,
    lpgd_step,
    predict_probability,
    random_factors,
    recover_factors,
    search_radius,
)
from lit_methods.panels import Curve, Panel
from lit_methods.seeds import own_seed
from lit_methods.steps import logs_now

TECHNIQUE = Technique(
    slug="supervised_dictionary_learning",
    short="Supervised Dictionary Learning",
    title="Supervised Dictionary Learning with Auxiliary Covariates",
    arxiv="2206.06774",
    family="matrix_factorization",
    form="module",
    classes=(
        "lit_methods.SupervisedMatrixFactorization",
        "lit_methods.SupervisedDictionaryClassifier",
        "lit_methods.TwoStageClassifier",
    ),
    configs=(
        "supervised_dictionary_learning.yaml",
        "supervised_dictionary_learning_bcd.yaml",
        "supervised_dictionary_learning_feature.yaml",
    ),
    golden=("lpgd", "bcd_block", "bcd_filter_fit"),
    claim=(
        "Where the label depends on a direction of small variance, LPGD with a small xi predicts held-out rows better than an SVD of the "
        "same rank and then a logistic regression."
    ),
    summary="Finds a dictionary of a data matrix whose atoms reconstruct the rows and predict their label, with covariates beside them.",
)

Solver = Literal["lpgd", "bcd"]
_CHECK_EVERY = 10  # iterations between two looks at the objective


class SupervisedMatrixFactorization(MatrixClassifier):
    """Finds a dictionary W and codes H of the data, and a regression of the label on them, together.

    It minimises sum_i l(y_i, a_i) + xi ||X - W H||_F^2, with l the logistic loss, and a_i = beta^T W^T x_i + Gamma z_i (``filter``) or
    beta^T h_i + Gamma z_i (``feature``); z_i are a 1 and the covariates of row i.

    ``lpgd`` takes gradient steps on the products A, B = W H and Gamma and keeps [A, B] at rank r by an SVD; ``bcd`` updates W, H and the
    regression in turn. One training step is one iteration over the whole matrix.

    Runs: as :class:`MatrixClassifier`; a training batch is the whole matrix, its rows in the same order each time. No gradient is
    computed: parameters are moved in place. Under DDP every process has the whole matrix and makes the same iterations, which gains no
    time; rows of an evaluation are dealt out. BCD fits its regression on the CPU.

    Saves: ``lpgd``: ``score`` A, ``product`` B, ``gamma``; ``bcd``: ``dictionary`` W, ``codes`` H, ``coefficients``; and ``threshold``. The
    draws follow from the seed and the step, so a resumed run ends bit-equal.

    Refuses: what :class:`MatrixClassifier` refuses; a step size with which the reconstruction alone diverges; an objective that isn't
    finite.

    Args:
        model: ``filter``: the label from W^T x; ``feature``: from the code h.
        solver: ``lpgd`` or ``bcd``.
        rank: r, atoms.
        xi: Weight of the reconstruction, > 0. Small: the atoms serve the label.
        nu: Weight of the L2 term of A and Gamma; LPGD alone.
        step_size: c of LPGD's steps c (t + 10)^(-step_decay); None: 1 / L of the data, which can't diverge, and is slow on large matrices.
        step_decay: beta; 0: constant.
        oversampling: LPGD: columns of the random sketch beyond r, 10 is usual; None: the exact SVD.
        nonnegative: BCD: W, H >= 0.
        radius: c of BCD's search radius c (t + 1)^(-radius_decay) / log(t + 2); None: no limit.
        radius_decay: beta.
        l1: BCD: weight of the L1 term of W and of H.
        l2: BCD: weight of the L2 term of W and of H.
        column_share: BCD of the feature model: share of the columns whose codes change in an iteration, drawn anew for each row of H.
        prediction: Feature model: how a row's code is found without its label: ``naive``, ``alternating`` or ``exhaustive``.
        stop_on_rise: End the training when the objective has risen by more than this share within 10 iterations; None: never.
        seed: Seed of the start, the sketch and the columns.

    Raises:
        ValueError: A value outside its range.
    """

    panels: ClassVar[tuple[Panel, ...]] = (
        Curve("Objective", ("factorization/loss",), note="A rise: lower the step size.", goal="min"),
        Curve("Logistic loss", ("factorization/classification",), note="Of the training rows, before weighting.", goal="min"),
        Curve("Squared error", ("factorization/reconstruction",), note="||X - W H||^2 of the training rows, before xi.", goal="min"),
        Curve("Threshold", ("factorization/threshold",), note="Largest TPR - FPR on the training rows."),
        *MatrixClassifier.panels,
    )

    score: Tensor
    product: Tensor
    gamma: Tensor
    dictionary: Tensor
    codes: Tensor
    coefficients: Tensor
    last_objective: Tensor

    def __init__(
        self,
        model: Model = "filter",
        solver: Solver = "lpgd",
        rank: int = 4,
        xi: float = 0.1,
        nu: float = 0.1,
        step_size: float | None = 0.01,
        step_decay: float = 0.0,
        oversampling: int | None = None,
        nonnegative: bool = True,
        radius: float | None = None,
        radius_decay: float = 1.0,
        l1: float = 0.0,
        l2: float = 0.0,
        column_share: float = 0.1,
        prediction: Prediction = "naive",
        stop_on_rise: float | None = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        checks.literals(SupervisedMatrixFactorization, locals())
        checks.at_least(1, rank=rank)
        checks.positive(xi=xi, step_size=step_size, radius=radius, stop_on_rise=stop_on_rise)
        checks.at_least(0, nu=nu, step_decay=step_decay, oversampling=oversampling, radius_decay=radius_decay, l1=l1, l2=l2, seed=seed)
        checks.within("(0, 1]", "a share", column_share=column_share)
        first = None if step_size is None else decayed_step_size(0, step_size, step_decay)
        if solver == "lpgd" and first is not None and first * xi >= 1:
            bound = f"a step of 1 / xi = {1 / xi:g}"
            raise ValueError(f"the first step is {first:g} and xi is {xi:g}: B = W H diverges from {bound} on, lower one of them")
        self.save_hyperparameters()
        self.model, self.solver, self.rank, self.xi, self.nu = model, solver, rank, xi, nu
        self.step_size, self.step_decay, self.oversampling = step_size, step_decay, oversampling
        self.nonnegative, self.radius, self.radius_decay, self.l1, self.l2 = nonnegative, radius, radius_decay, l1, l2
        self.column_share, self.prediction, self.stop_on_rise, self.seed = column_share, prediction, stop_on_rise, seed
        self.register_buffer("last_objective", torch.tensor(torch.finfo(torch.float64).max, dtype=torch.float64))  # before the first look
        self._safe_step: float | None = None
        self._factors: Factors | None = None

    # ---- state ---------------------------------------------------------------------------------------------------------------------------

    def state_shapes(self, rows: int, features: int, covariates: int) -> dict[str, tuple[int, int]]:
        """LPGD: A, B, Gamma. BCD: W, H, coefficients."""
        if self.solver == "lpgd":
            score = (features, 1) if self.model == "filter" else (1, rows)
            return {"score": score, "product": (features, rows), "gamma": (1, 1 + covariates)}
        return {"dictionary": (features, self.rank), "codes": (self.rank, rows), "coefficients": (1, 1 + self.rank + covariates)}

    def start(self, shapes: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
        """Products or factors of uniform draws."""
        features, rows = shapes["product"] if self.solver == "lpgd" else (shapes["dictionary"][0], shapes["codes"][1])
        covariates = shapes["gamma"][1] - 1 if self.solver == "lpgd" else shapes["coefficients"][1] - 1 - self.rank
        factors = random_factors(features, rows, covariates, self.rank, self._generator("start", torch.device("cpu")))
        return (factors if self.solver == "bcd" else lift_factors(factors, self.model))._asdict()

    def saved_shape(self, saved: dict[str, Tensor]) -> tuple[int, int, int]:
        """(n, p, q) of a checkpoint."""
        if self.solver == "lpgd":
            features, rows = saved["product"].shape
            return rows, features, saved["gamma"].shape[1] - 1
        return saved["codes"].shape[1], len(saved["dictionary"]), saved["coefficients"].shape[1] - 1 - self.rank

    def _generator(self, what: str, device: torch.device) -> torch.Generator:
        return torch.Generator(device).manual_seed(own_seed(f"supervised_dictionary_learning {what}", self.seed))

    @property
    def lifted(self) -> Lifted:
        """A, B and Gamma, where the solver is LPGD."""
        return Lifted(self.score.detach(), self.product.detach(), self.gamma.detach())

    def factors(self) -> Factors:
        """W, H and the coefficients, as they are now; after LPGD from an SVD."""
        if self.solver == "bcd":
            return Factors(self.dictionary.detach(), self.codes.detach(), self.coefficients.detach())
        lifted = self.lifted
        return recover_factors(lifted.product, lifted.score, lifted.gamma, model=self.model, rank=self.rank)

    # ---- training ------------------------------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Forget what was computed for other data."""
        super().on_fit_start()
        self._safe_step, self._factors = None, None

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> STEP_OUTPUT:
        """One iteration."""
        x, labels, covariates = self.whole_matrix(batch)
        iteration = self.trainer.global_step
        self.optimizers().step(closure=lambda: self._iterate(x, labels, covariates, iteration))  # type: ignore[union-attr, call-arg]
        logs, looks = logs_now(self), (iteration + 1) % _CHECK_EVERY == 0
        if logs or looks:
            found = self.objective(x, labels, covariates)
        if logs:
            values = {"loss": found.total, "classification": found.classification, "reconstruction": found.reconstruction}
            values["threshold"] = self.threshold
            self.log_dict({f"factorization/{name}": value for name, value in values.items()})
        if looks:
            self._look(found.total, iteration + 1)
        return None

    @torch.no_grad()
    def _iterate(self, x: Tensor, labels: Tensor, covariates: Tensor, iteration: int) -> None:
        self._factors = None
        if self.solver == "lpgd":
            lifted = lpgd_step(
                x,
                labels,
                covariates,
                self.lifted,
                model=self.model,
                rank=self.rank,
                step_size=self._step_at(x, covariates, iteration),
                xi=self.xi,
                nu=self.nu,
                sketch=self._sketch(x, iteration),
            )
            state, scores = lifted._asdict(), lifted_scores(x, covariates, lifted, self.model)
        else:
            factors = bcd_step(
                x,
                labels,
                covariates,
                self.factors(),
                model=self.model,
                xi=self.xi,
                radius=search_radius(iteration, self.radius, self.radius_decay),
                l1=self.l1,
                l2=self.l2,
                nonnegative=self.nonnegative,
                columns=self._columns(x, iteration),
            )
            features = factors.dictionary.T @ x if self.model == "filter" else factors.codes
            state, scores = factors._asdict(), linear_scores(features, covariates, factors.coefficients)
        for name, value in state.items():
            getattr(self, name).copy_(value)
        self.threshold.copy_(best_threshold(labels[0], torch.sigmoid(scores[0])))

    def _step_at(self, x: Tensor, covariates: Tensor, iteration: int) -> float:
        if self.step_size is not None:
            return decayed_step_size(iteration, self.step_size, self.step_decay)
        if self._safe_step is None:
            self._safe_step = 1 / float(lpgd_curvature(x, covariates, model=self.model, xi=self.xi, nu=self.nu))
        return self._safe_step

    def _sketch(self, x: Tensor, iteration: int) -> Tensor | None:
        if self.oversampling is None:
            return None
        width = x.shape[1] + (1 if self.model == "filter" else 0)
        size = min(self.rank + self.oversampling, width, len(x) + (1 if self.model == "feature" else 0))
        return torch.randn(width, size, generator=self._generator(f"sketch {iteration}", x.device), dtype=x.dtype, device=x.device)

    def _columns(self, x: Tensor, iteration: int) -> Tensor | None:
        if self.model == "filter" or self.column_share == 1:
            return None
        count = max(1, int(x.shape[1] * self.column_share))
        draws = torch.rand(self.rank, x.shape[1], generator=self._generator(f"columns {iteration}", x.device), device=x.device)
        return draws.argsort(dim=1)[:, :count]

    def objective(self, x: Tensor, labels: Tensor, covariates: Tensor) -> Objective:
        """What is minimised, of the state as it is now."""
        if self.solver == "lpgd":
            return lpgd_objective(x, labels, covariates, self.lifted, model=self.model, xi=self.xi, nu=self.nu)
        return factor_objective(x, labels, covariates, self.factors(), model=self.model, xi=self.xi)

    def _look(self, objective: Tensor, iterations: int) -> None:
        """Stop where it makes no sense to go on; the one place where a step waits for the device, every 10 iterations.

        Raises:
            ValueError: The objective isn't finite.
        """
        now, before = torch.stack([objective, self.last_objective]).tolist()
        if not math.isfinite(now):
            raise ValueError(
                f"the objective is {now} after {iterations} iterations: lower step_size (null takes one that can't diverge), or divide the "
                "features by a larger number (scale of the datamodule)"
            )
        if self.stop_on_rise is not None and now > before * (1 + self.stop_on_rise):
            self.trainer.should_stop = True
        self.last_objective.copy_(objective)

    # ---- prediction ----------------------------------------------------------------------------------------------------------------------

    def _found(self) -> Factors:
        """The factors, from one SVD for all batches of an evaluation."""
        if self._factors is None:
            self._factors = self.factors()
        return self._factors

    def atoms(self) -> tuple[Tensor, Tensor] | None:
        """W and beta."""
        found = self._found()
        return found.dictionary, found.coefficients[0, 1 : 1 + self.rank]

    @property
    def _nonnegative_codes(self) -> bool:
        return self.solver == "bcd" and self.nonnegative

    def probability(self, x: Tensor, covariates: Tensor) -> Tensor:
        """(m,) of label 1."""
        return predict_probability(
            x,
            covariates,
            self._found(),
            model=self.model,
            xi=self.xi,
            prediction=self.prediction,
            nonnegative=self._nonnegative_codes,
        )

    def encode(self, x: Tensor) -> Tensor | None:
        """(r, m) codes by W alone."""
        return code_columns(x, self._found().dictionary, nonnegative=self._nonnegative_codes)

    def on_validation_epoch_start(self) -> None:
        """Begin anew, with weights as they now are."""
        super().on_validation_epoch_start()
        self._factors = None

    def on_test_epoch_start(self) -> None:
        """Begin anew, with weights as they now are."""
        super().on_test_epoch_start()
        self._factors = None

    def on_predict_epoch_start(self) -> None:
        """Begin anew, with weights as they now are."""
        self._factors = None


__all__ = ["SupervisedMatrixFactorization"]
