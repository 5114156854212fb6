"""What the recommenders share: evaluation by full ranking, and the optimiser."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lit_methods import checks
from lit_methods.evaluated import Evaluated, Part
from lit_methods.optim import cosine_to_the_end
from lit_methods.panels import Curve, Panel
from lit_methods.steps import log_global
from lit_methods.tasks.recommendation.metrics import ranking_metrics

_METRICS = ("recall", "precision", "ndcg")


class Recommender(Evaluated):
    """Base of the recommenders. Subclasses write ``training_step`` and :meth:`scores`.

    Runs: evaluation batches have ``known`` (B, C) bool and ``target`` (B, C) bool beside what :meth:`scores` needs; C are all items, or the
    candidates of a user. Figures are over the users that have a target, on any number of ranks, for each k of ``top_k``; with one target
    among candidates recall is the hit rate. Beside the panels ``recommender/val_precision_<k>`` is logged.

    Saves: the weights.

    Refuses: other numbers of users or items than the data have; a ``min_lr`` in a training without an end.

    Args:
        top_k: Lengths of the list of recommendations.
        learning_rate: Adam's learning rate at the start.
        min_lr: Where the cosine of the learning rate ends; None: no schedule.
    """

    panels: ClassVar[tuple[Panel, ...]] = (
        Curve("Recommendation loss", ("recommender/loss",), goal="min"),
        Curve("Recall", ("recommender/val_recall_*", "recommender/test_recall_*"), note="Of held-out items.", goal="max"),
        Curve("NDCG", ("recommender/val_ndcg_*", "recommender/test_ndcg_*"), goal="max"),
    )

    def __init__(self, top_k: Sequence[int] = (20,), learning_rate: float = 1e-3, min_lr: float | None = None) -> None:
        super().__init__()
        if not top_k or any(k < 1 for k in top_k):
            raise ValueError(f"top_k is {list(top_k)}: give one length of the list or more, each at least 1, such as [20]")
        checks.positive(learning_rate=learning_rate)
        checks.within(f"[0, {learning_rate}]", "a rate from 0 to learning_rate, or null,", min_lr=min_lr)
        self.top_k, self.learning_rate, self.min_lr = tuple(top_k), learning_rate, min_lr
        self.eval_metrics = nn.ModuleDict({f"{name}_{k}": MeanMetric() for k in self.top_k for name in _METRICS})

    def scores(self, batch: dict[str, Tensor]) -> Tensor:
        """(B, C) scores of an evaluation batch."""
        raise NotImplementedError

    def checked_size(self, num_users: int | None, num_items: int) -> None:
        """Compare the model's size with the data's.

        Raises:
            ValueError: They differ; the message says what to set.
        """
        data: Any = getattr(self.trainer, "datamodule", None)
        size = getattr(data, "num_users", None), getattr(data, "num_items", None)
        given = {"num_users": (num_users, size[0]), "num_items": (num_items, size[1])}
        wrong = [
            f"{name}={own} (the data have {theirs})" for name, (own, theirs) in given.items() if None not in (own, theirs) and own != theirs
        ]
        if wrong:
            raise ValueError(f"{type(self).__name__} was built for {', '.join(wrong)}: set model.init_args to the data's numbers")

    # ---- evaluation ------------------------------------------------------------------------------------------------------------------

    def _evaluate(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        scores = self.scores(batch)
        by_k = {k: ranking_metrics(scores, batch["known"], batch["target"], k) for k in self.top_k}
        for name, metric in self._named_metrics():
            kind, _, k = name.rpartition("_")
            values = by_k[int(k)]
            metric.update(values[kind], weight=values["counted"].to(values[kind]))

    def _log_evaluation(self, part: Part) -> None:
        log_global(self, {f"recommender/{part}_{name}": metric.compute() for name, metric in self._named_metrics()})
        for _, metric in self._named_metrics():
            metric.reset()

    def _named_metrics(self) -> Iterator[tuple[str, MeanMetric]]:
        for name, metric in self.eval_metrics.items():
            assert isinstance(metric, MeanMetric)
            yield name, metric

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """The largest of ``top_k`` recommendations per user, best first, known items left out.

        Returns:
            ``item`` (B, k) int64 columns of the scores and ``score`` (B, k), -inf where a user has fewer unknown items; ``user`` (B,).
        """
        scores = self.scores(batch).masked_fill(batch["known"], -math.inf)
        best = scores.topk(min(max(self.top_k), scores.shape[1]), dim=1)
        return {"user": batch["user"], "item": best.indices, "score": best.values}

    # ---- optimiser -------------------------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> torch.optim.Optimizer | OptimizerLRSchedulerConfig:
        """Adam without weight decay, which would pull at dead weights; a cosine per step, if asked for."""
        optimizer = torch.optim.Adam(self.parameters(), lr=self.learning_rate)
        if self.min_lr is None:
            return optimizer
        return cosine_to_the_end(self, optimizer, f"min_lr={self.min_lr}", self.min_lr)


__all__ = ["Recommender"]
