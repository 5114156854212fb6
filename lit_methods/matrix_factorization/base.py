"""Base of the modules that factorise a whole matrix and predict a label: evaluation, figures and pictures."""

from typing import Any, ClassVar

import numpy as np
import torch
from lightning.pytorch import LightningModule
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from lit_methods.distributed import gather_rows
from lit_methods.optim import Iterations
from lit_methods.panels import Curve, ImageMedia, ImagePanel, Media, Panel, TableMedia, TablePanel
from lit_methods.steps import log_global

Columns = tuple[Tensor, Tensor, Tensor]  # (p, n) data, (1, n) labels, (q, n) covariates


class MatrixClassifier(LightningModule):
    """A dictionary of a data matrix and a logistic regression of a binary label; subclasses say how both are found.

    Runs: batches have ``features`` (B, p), ``label`` (B,) of 0 and 1, and ``covariates`` (B, q) where there are any; a training batch is
    the whole matrix. The sizes come from the datamodule (``matrix_shape``) or from :meth:`set_shape`. Evaluation takes any batches, also
    split over ranks. All is computed in float64, whatever the precision of the trainer.

    Saves: what the subclass finds, and ``threshold``.

    Refuses: a batch that isn't the whole matrix; labels that aren't 0 and 1; values that aren't finite; precisions that would round the
    weights; strategies that split them.

    Attributes:
        threshold: Probability from which on a row counts as 1: that of the training rows with the largest TPR - FPR; 0.5 before a fit.
        image_shape: (height, width) of an atom, for the picture; None: no image.
        feature_names: Names of the p features, for the table; empty: numbers.
    """

    panels: ClassVar[tuple[Panel, ...]] = (
        Curve(
            "Held-out rows",
            ("factorization/val_accuracy", "factorization/val_auc", "factorization/val_f1"),
            note="Accuracy and F-score at the threshold.",
            goal="max",
        ),
        Curve(
            "Reconstruction of held-out rows",
            ("factorization/val_relative_error",),
            note="||X - W H||^2 / ||X||^2 with codes found without the label.",
            goal="min",
        ),
        ImagePanel("Atoms", "factorization/atoms_picture", note="A frame is red where beta is positive, blue where it is negative."),
        TablePanel("Atoms and their largest features", "factorization/atoms"),
    )

    threshold: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.register_buffer("threshold", torch.tensor(0.5, dtype=torch.float64))
        self.image_shape: tuple[int, int] | None = None
        self.feature_names: tuple[str, ...] = ()
        self._shape: tuple[int, int, int] | None = None
        self._looked = False
        self._rows: list[Tensor] = []
        self._media: dict[str, Media] = {}

    # ---- for subclasses ------------------------------------------------------------------------------------------------------------------

    def state_shapes(self, rows: int, features: int, covariates: int) -> dict[str, tuple[int, int]]:
        """Name -> shape of each parameter for n rows, p features and q covariates."""
        raise NotImplementedError

    def start(self, shapes: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
        """Name -> first value (float64, on the CPU) of each parameter."""
        return {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}

    def atoms(self) -> tuple[Tensor, Tensor] | None:
        """Dictionary (p, r) and beta (r,); None: there are no atoms."""
        raise NotImplementedError

    def probability(self, x: Tensor, covariates: Tensor) -> Tensor:
        """(m,) of label 1 for (p, m) columns and (q, m) covariates."""
        raise NotImplementedError

    def encode(self, x: Tensor) -> Tensor | None:
        """(r, m) codes of (p, m) columns without their labels; None: there are no atoms."""
        raise NotImplementedError

    # ---- sizes ---------------------------------------------------------------------------------------------------------------------------

    def set_shape(self, rows: int, features: int, covariates: int = 0) -> None:
        """Make the parameters for a training matrix of this size. A datamodule that knows it is asked by itself.

        Args:
            rows: n training rows.
            features: p.
            covariates: q.

        Raises:
            ValueError: There are parameters for another size already.
        """
        shape = rows, features, covariates
        if self._shape is not None:
            if shape != self._shape:
                raise ValueError(
                    f"{type(self).__name__} was made for (rows, features, covariates) = {self._shape}, and these data have {shape}: codes "
                    "belong to the rows that they were fitted to, so make a new module for other data"
                )
            return
        self._shape = shape
        for name, value in self.start(self.state_shapes(*shape)).items():
            self.register_parameter(name, torch.nn.Parameter(value.to(self.device)))

    def setup(self, stage: str) -> None:
        """Ask the datamodule for the sizes, the names of the features and the shape of an image.

        Raises:
            RuntimeError: Neither it nor :meth:`set_shape` tells the sizes.
            ValueError: The precision or the strategy can't work.
        """
        precision, strategy = str(self.trainer.precision), type(self.trainer.strategy).__name__
        if precision in ("16-mixed", "16-true", "bf16-true"):
            raise ValueError(f"precision is {precision!r}: iterations are in float64 and gain nothing by it, use 32-true or 64-true")
        if any(word in strategy for word in ("FSDP", "DeepSpeed", "ModelParallel")):
            raise ValueError(f"{type(self).__name__} moves whole matrices, but {strategy} shards them: use one process, or strategy='ddp'")
        data: Any = getattr(self.trainer, "datamodule", None)
        self.image_shape = getattr(data, "image_shape", None) or self.image_shape
        self.feature_names = tuple(getattr(data, "feature_names", ()) or self.feature_names)
        shape = getattr(data, "matrix_shape", None)
        if shape is not None and (stage == "fit" or self._shape is None):
            self.set_shape(*shape)
        if self._shape is None:
            raise RuntimeError(
                f"{type(self).__name__} doesn't know the size of the matrix: use a datamodule with matrix_shape = (rows, features, "
                "covariates), or call set_shape(rows, features, covariates) before the run"
            )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the sizes of a checkpoint: outside a fit the data may have other rows than those that were fitted.

        Raises:
            ValueError: A fit goes on with data of another size.
        """
        saved = checkpoint["state_dict"]
        fitting = getattr(self._trainer, "training", False)
        for name, value in saved.items():
            own = getattr(self, name, None)
            if name == "threshold" or (own is not None and own.shape == value.shape):
                continue
            if fitting and own is not None:
                raise ValueError(
                    f"the checkpoint's {name} is {tuple(value.shape)} and these data need {tuple(own.shape)}: go on with the data and the "
                    "rank that it was fitted with"
                )
            self.register_parameter(name, torch.nn.Parameter(value.to(self.device, copy=True)))
        self._shape = self._shape or self.saved_shape(saved)

    def saved_shape(self, saved: dict[str, Tensor]) -> tuple[int, int, int]:
        """(n, p, q) of the parameters of a checkpoint."""
        raise NotImplementedError

    # ---- training ------------------------------------------------------------------------------------------------------------------------

    def columns(self, batch: dict[str, Tensor]) -> Columns:
        """Data (p, n), labels (1, n) and covariates (q, n) of a batch, float64."""
        x = batch["features"].double().T
        covariates = batch["covariates"].double().T if "covariates" in batch else x.new_zeros(0, x.shape[1])
        return x, batch["label"].double()[None], covariates

    def on_fit_start(self) -> None:
        """Look at the data once, at the first step."""
        self._looked = False

    def whole_matrix(self, batch: dict[str, Tensor]) -> Columns:
        """As :meth:`columns`, for a training batch.

        Raises:
            ValueError: It isn't the whole matrix, or what is in it can't be fitted.
        """
        x, labels, covariates = self.columns(batch)
        assert self._shape is not None
        found = x.shape[1], x.shape[0], len(covariates)
        if found != self._shape:
            raise ValueError(
                f"a training batch has (rows, features, covariates) = {found} and the matrix {self._shape}: an iteration takes the whole "
                "matrix, so let the loader yield it as one batch, in the same order each time"
            )
        if not self._looked:
            self._looked = True
            if sorted(labels.unique().tolist()) != [0.0, 1.0]:
                raise ValueError(f"labels are {labels.unique().tolist()[:5]}: give rows of both classes, 0 and 1")
            if not (x.isfinite().all() and covariates.isfinite().all()):
                raise ValueError("features or covariates hold a NaN or an infinity: leave these rows out, or fill them in")
        return x, labels, covariates

    def configure_optimizers(self) -> Optimizer:
        """Nothing but the count of the iterations."""
        return Iterations(self.parameters())

    # ---- evaluation ----------------------------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Begin anew."""
        self._rows = []

    def on_test_epoch_start(self) -> None:
        """Begin anew."""
        self._rows = []

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Predictions of some rows."""
        self._evaluate(batch)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Predictions of some rows."""
        self._evaluate(batch)

    def _evaluate(self, batch: dict[str, Tensor]) -> None:
        x, labels, covariates = self.columns(batch)
        codes, found = self.encode(x), self.atoms()
        error = torch.zeros_like(labels[0]) if codes is None or found is None else (x - found[0] @ codes).square().sum(0)
        self._rows.append(torch.stack([self.probability(x, covariates), labels[0], error, x.square().sum(0)], dim=1))

    def on_validation_epoch_end(self) -> None:
        """Figures over the rows of all ranks."""
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Figures over the rows of all ranks."""
        self._log_evaluation("test")

    def _log_evaluation(self, stage: str) -> None:
        mine = torch.cat(self._rows) if self._rows else self.threshold.new_zeros(0, 4)
        probability, label, error, power = gather_rows(mine, with_grad=False).T
        self._rows = []
        if not len(label):
            return
        predicted, one = probability >= self.threshold, label == 1
        hits = (predicted & one).sum()
        figures = {"accuracy": (predicted == one).double().mean(), "f1": 2 * hits / (predicted.sum() + one.sum()).clamp(min=1)}
        if one.any() and not one.all():
            from torchmetrics.functional.classification import binary_auroc

            figures["auc"] = binary_auroc(probability, one.long())
        if self.atoms() is not None:
            figures["relative_error"] = error.sum() / power.sum().clamp(min=torch.finfo(power.dtype).tiny)
        log_global(self, {f"factorization/{stage}_{name}": value for name, value in figures.items()})
        self._draw()

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """``probability`` (B,) of label 1, ``predicted`` (B,) int64 at the threshold, ``codes`` (B, r), ``label`` where there is one."""
        x, _, covariates = self.columns(batch | {"label": batch.get("label", torch.zeros(len(batch["features"])))})
        probability, codes = self.probability(x, covariates), self.encode(x)
        found = {"probability": probability, "predicted": (probability >= self.threshold).long()}
        return found | ({} if codes is None else {"codes": codes.T}) | ({"label": batch["label"]} if "label" in batch else {})

    # ---- pictures ------------------------------------------------------------------------------------------------------------------------

    def _draw(self) -> None:
        found = self.atoms()
        if found is None:
            return
        atoms, beta = found[0].detach().T.cpu().numpy(), found[1].detach().cpu().numpy()
        rows = []
        for number, (atom, weight) in enumerate(zip(atoms, beta, strict=True)):
            largest = np.argsort(-np.abs(atom))[:8]
            names = ", ".join(self.feature_names[k] if self.feature_names else str(k) for k in largest)
            rows.append((number, round(float(weight), 4), round(float(np.linalg.norm(atom)), 4), names))
        self._media = {"factorization/atoms": TableMedia(("atom", "beta", "norm", "largest features"), tuple(rows))}
        if self.image_shape is not None:
            words = f"{len(atoms)} atoms as images, red where they are positive and blue where negative, framed by the sign of beta"
            self._media["factorization/atoms_picture"] = ImageMedia(atom_picture(atoms, beta, self.image_shape), words)

    def dashboard_media(self) -> dict[str, Media]:
        """The atoms, as a table and, where they are images, as a picture."""
        return self._media


def atom_picture(atoms: NDArray[Any], beta: NDArray[Any], shape: tuple[int, int], columns: int = 8, side: int = 64) -> NDArray[np.uint8]:
    """Atoms side by side: white is 0, red positive, blue negative, each scaled to its largest value; the frame has the colour of beta.

    Args:
        atoms: (r, height * width).
        beta: (r,).
        shape: (height, width).
        columns: Atoms in a row.
        side: Pixels of an atom's longer side, at least.

    Returns:
        (H, W, 3) uint8.
    """
    frame, gap = 3, 4
    scale = max(1, side // max(shape))
    high, wide = (size * scale + 2 * (frame + gap) for size in shape)
    rows = -(-len(atoms) // columns)
    picture = np.full((rows * high, min(len(atoms), columns) * wide, 3), 255, np.uint8)
    strongest = max(float(np.abs(beta).max()), 1e-12)
    for number, (atom, weight) in enumerate(zip(atoms, beta, strict=True)):
        pixels = np.kron(_colours(atom.reshape(shape) / max(float(np.abs(atom).max()), 1e-12)), np.ones((scale, scale, 1), np.uint8))
        framed = np.empty((high - 2 * gap, wide - 2 * gap, 3), np.uint8)
        framed[:] = _colours(np.asarray(weight / strongest))
        framed[frame:-frame, frame:-frame] = pixels
        top, left = (number // columns) * high + gap, (number % columns) * wide + gap
        picture[top : top + len(framed), left : left + framed.shape[1]] = framed
    return picture


def _colours(values: NDArray[Any]) -> NDArray[np.uint8]:
    """(...) in [-1, 1] -> (..., 3): blue, white, red."""
    fade = 1 - np.abs(values)
    red, blue = np.where(values >= 0, 1.0, fade), np.where(values <= 0, 1.0, fade)
    return np.asarray(np.round(255 * np.stack([red, fade, blue], axis=-1)), np.uint8)


__all__ = ["MatrixClassifier", "atom_picture"]
