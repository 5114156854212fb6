"""Metric learning: embeddings for retrieval among classes that training hasn't seen."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from lit_methods import checks
from lit_methods.distributed import gather_rows
from lit_methods.evaluated import Evaluated, Part
from lit_methods.optim import cosine_to_the_end
from lit_methods.panels import Curve, ImagePanel, Panel
from lit_methods.steps import log_global
from lit_methods.tasks.metric_learning.opis import OPIS, RetrievalScores, check_rates, summary
from lit_methods.tasks.metric_learning.pictures import utility_curves

Optimizer = Literal["adam", "adamw"]
Schedule = Literal["constant", "cosine"]


class MetricLearning(Evaluated):
    """Trains a network to place samples of one class near each other, and measures it on unseen classes.

    Runs: batches have ``image`` (B, ...) float32 and ``label`` (B,) int64; in training the labels are 0..C-1, in evaluation any.
    ``forward`` takes images and returns (B, D) embeddings; distances are those of their directions. Evaluation compares all samples with
    all others, on the CPU and in float64: ``retrieval/val_d_min`` and ``val_d_max`` are the ends of the calibration range, ``val_far``,
    ``val_far_std``, ``val_frr`` and ``val_frr_std`` the mean and standard deviation over classes of false acceptance and rejection at its
    middle.

    Saves: network and loss.

    Refuses: a cosine in a training without an end.

    Args:
        network: Images -> (B, D).
        loss: (embeddings, labels) -> scalar, such as ``ProxySoftmax`` or a loss of pytorch-metric-learning; its parameters are trained.
        gather_ranks: The loss sees the embeddings of all ranks; for losses of pairs.
        top_k: Values of k in Recall@k.
        far_min: False acceptance rate at the lower end of OPIS's range.
        far_max: At its upper end.
        num_thresholds: Thresholds at which OPIS looks.
        epsilon: Share of worst and best classes in epsilon-OPIS.
        optimizer: ``adam`` or ``adamw``.
        learning_rate: Learning rate of the network.
        loss_learning_rate: Learning rate of the loss's parameters; None: that of the network.
        weight_decay: Weight decay of all parameters.
        schedule: ``constant``, or ``cosine`` to 0 over the whole training.

    Raises:
        ValueError: A value lies outside its range.
    """

    panels: ClassVar[tuple[Panel, ...]] = (
        Curve("Base loss", ("retrieval/loss",), goal="min"),
        Curve("Retrieval", ("retrieval/val_recall_at_*", "retrieval/val_map_at_r"), note="Of unseen classes.", goal="max"),
        Curve(
            "OPIS", ("retrieval/val_opis", "retrieval/val_eps_opis"), note="Spread of the classes' utility. Lower is better.", goal="min"
        ),
        Curve("Errors at one threshold", ("retrieval/val_far_std", "retrieval/val_frr_std"), note="Spread over classes.", goal="min"),
        ImagePanel("Utility of each class", "retrieval/utility", note="Thin: classes, red the worst. Black: their mean."),
    )

    def __init__(
        self,
        network: nn.Module,
        loss: nn.Module,
        gather_ranks: bool = False,
        top_k: Sequence[int] = (1,),
        far_min: float = 1e-2,
        far_max: float = 1e-1,
        num_thresholds: int = 101,
        epsilon: float = 0.1,
        optimizer: Optimizer = "adam",
        learning_rate: float = 1e-3,
        loss_learning_rate: float | None = None,
        weight_decay: float = 0.0,
        schedule: Schedule = "constant",
    ) -> None:
        super().__init__()
        checks.literals(MetricLearning, locals())
        checks.positive(learning_rate=learning_rate)
        checks.at_least(0, loss_learning_rate=loss_learning_rate, weight_decay=weight_decay)
        check_rates(far_min, far_max)
        self.save_hyperparameters(ignore=["network", "loss"])
        self.network, self.loss = network, loss
        self.eval_opis = OPIS(far_min, far_max, num_thresholds, epsilon)
        self.eval_retrieval = RetrievalScores(tuple(top_k))

    def forward(self, images: Tensor) -> Tensor:
        """(B, ...) images -> (B, D) embeddings."""
        return self.network(images)  # type: ignore[no-any-return]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The base loss."""
        embeddings, labels = self(batch["image"]).float(), batch["label"]
        if self.hparams["gather_ranks"]:
            embeddings, labels = gather_rows(embeddings), gather_rows(labels)
        loss: Tensor = self.loss(embeddings, labels)
        self.log("retrieval/loss", loss.detach(), prog_bar=True, batch_size=len(batch["label"]))
        return loss

    def _evaluate(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Keep the embeddings."""
        embeddings = self(batch["image"])
        self.eval_opis.update(embeddings, batch["label"])
        self.eval_retrieval.update(embeddings, batch["label"])

    def _log_evaluation(self, part: Part) -> None:
        with self.eval_opis.sync_context(), self.eval_retrieval.sync_context():
            _, labels = self.eval_opis.kept()
            counts = labels.unique(return_counts=True)[1]
            if len(counts) < 2 or int(counts.max()) < 2:
                rank_zero_warn(f"{len(labels)} samples of {len(counts)} classes make no pairs: evaluate more batches for retrieval scores")
            else:
                scores, opis = self.eval_retrieval.scores(), self.eval_opis.result()
                if opis is None:
                    rank_zero_warn("samples of different classes are all equally far apart: there is no range of thresholds for OPIS")
                else:
                    scores |= summary(opis)
                    self._media["retrieval/utility"] = utility_curves(opis)
                log_global(self, {f"retrieval/{part}_{name}": value.float() for name, value in scores.items()})
        self.eval_opis.reset()
        self.eval_retrieval.reset()

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Unit embeddings (B, D), and labels (B,) where the batch has them."""
        embeddings = nn.functional.normalize(self(batch["image"]).float(), dim=1)
        return {"embedding": embeddings} | ({"label": batch["label"]} if "label" in batch else {})

    def configure_optimizers(self) -> torch.optim.Optimizer | OptimizerLRSchedulerConfig:
        """Adam or AdamW, with two learning rates if asked for."""
        hp = self.hparams
        groups: list[dict[str, Any]] = [{"params": [p for p in self.network.parameters() if p.requires_grad]}]
        if own := [p for p in self.loss.parameters() if p.requires_grad]:
            groups.append({"params": own, "lr": hp["loss_learning_rate"] or hp["learning_rate"]})
        kind = torch.optim.Adam if hp["optimizer"] == "adam" else torch.optim.AdamW
        optimizer = kind(groups, lr=hp["learning_rate"], weight_decay=hp["weight_decay"])
        if hp["schedule"] == "constant":
            return optimizer
        return cosine_to_the_end(self, optimizer, "schedule='cosine'")


__all__ = ["MetricLearning"]
