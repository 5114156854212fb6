"""What retrievers share: the batches, ranking of a whole collection in evaluation, TREC's run file, the optimiser."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from lit_methods import checks
from lit_methods.distributed import gather_rows, rank
from lit_methods.evaluated import Evaluated, Part
from lit_methods.optim import scheduled
from lit_methods.panels import Curve, Panel
from lit_methods.retrieval.evaluation import Ranking, rank_documents, ranking_figures, write_trec_run
from lit_methods.runs.folder import run_dir
from lit_methods.steps import log_global, training_length

Schedule = Literal["constant", "linear"]


class Encoded(NamedTuple):
    """Texts as vectors: their numbers (n,) int64 and a (n, D) matrix, sparse in rows or an array."""

    numbers: Any
    vectors: Any


def batch_fields(batch: Any, *names: str) -> tuple[Tensor, ...]:
    """What a step needs of its batch.

    Raises:
        KeyError: Something is missing; the message says what was found.
    """
    try:
        return tuple(batch[name] for name in names)
    except (KeyError, TypeError, IndexError):
        have = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise KeyError(f"the batch needs {', '.join(names)}, it has {have}: SearchDataModule makes such batches") from None


class Retriever(Evaluated):
    """Base: subclasses give :meth:`represent` and a training step.

    A training batch has ``query_ids``, ``query_mask`` (B, Lq), ``document_ids`` and ``document_mask`` (B * G, Ld), laid out by query, the
    positive first. An evaluation's batch has ``input_ids`` and ``attention_mask`` (B, L), ``is_query`` (B,) bool, ``index`` (B,) number of
    the query or document, and ``judgements`` (J, 3) int64: query, document, grade. All queries are ranked against all documents that the
    evaluation has seen, on the CPU; with limited batches against those few.

    Args:
        learning_rate: AdamW's learning rate after the warm-up.
        weight_decay: AdamW's weight decay, for all parameters.
        warmup_steps: Optimiser steps of linear rise.
        schedule: ``constant``, or ``linear``: down to 0 at the end of the training.
        top_k: Documents of a query that an evaluation keeps, 100 or more.
    """

    panels: ClassVar[tuple[Panel, ...]] = (
        Curve("Loss", ("retriever/loss", "retriever/ranking_loss"), goal="min"),
        Curve("nDCG@10 of validation queries", ("retriever/val_ndcg_at_10",), goal="max"),
        Curve("Recall@100 and MRR@10", ("retriever/val_recall_at_100", "retriever/val_mrr_at_10"), goal="max"),
    )
    sparse: ClassVar[bool] = False  # vectors are kept as sparse rows, and what scores 0 isn't found

    def __init__(self, learning_rate: float, weight_decay: float, warmup_steps: int, schedule: Schedule, top_k: int) -> None:
        super().__init__()
        checks.positive(learning_rate=learning_rate)
        checks.at_least(0, weight_decay=weight_decay, warmup_steps=warmup_steps)
        checks.one_of(Schedule, schedule=schedule)
        checks.at_least(100, "documents", top_k=top_k)
        self._recipe = (learning_rate, weight_decay, warmup_steps, schedule)
        self._top_k = top_k
        self._rows: dict[bool, list[tuple[Tensor, ...]]] = {True: [], False: []}
        self._judgements: list[Tensor] = []
        self.ranking: Ranking | None = None

    def represent(self, input_ids: Tensor, attention_mask: Tensor, queries: bool) -> Tensor:
        """(B, L) tokens and mask of queries or documents -> (B, D) vectors, as the training sees them."""
        raise NotImplementedError

    def represent_for_index(self, input_ids: Tensor, attention_mask: Tensor, queries: bool) -> Tensor:
        """As :meth:`represent`, as an index holds them."""
        return self.represent(input_ids, attention_mask, queries)

    # ---- evaluation --------------------------------------------------------------------------------------------------------------------

    def encode(self, batch: dict[str, Tensor]) -> dict[bool, tuple[Tensor, Tensor]]:
        """True for queries, False for documents -> their numbers (n,) and vectors (n, D), of an evaluation's batch."""
        ids, mask, is_query, index = batch_fields(batch, "input_ids", "attention_mask", "is_query", "index")
        found = {}
        for queries in (True, False):
            rows = is_query == queries
            if bool(rows.any()):
                found[queries] = index[rows], self.represent_for_index(ids[rows], mask[rows], queries)
        return found

    def _keep(self, batch: dict[str, Tensor]) -> None:
        for queries, (numbers, vectors) in self.encode(batch).items():
            vectors = vectors.detach().float()
            row, column = vectors.nonzero(as_tuple=True) if self.sparse else (numbers[:0], numbers[:0])
            values = vectors[row, column] if self.sparse else vectors
            own = self._rows[queries]
            own.append((numbers.cpu(), numbers[row].cpu(), column.cpu(), values.cpu()))
        if "judgements" in batch:
            self._judgements.append(batch["judgements"].cpu())

    def encoded(self, queries: bool) -> Encoded | None:
        """All queries, or all documents, of the evaluation on all ranks; None: it has seen none. Every rank must call it."""
        parts = self._rows[queries]
        width = max([v.shape[1] for *_, v in parts if v.ndim == 2], default=0)
        width = int(gather_rows(torch.tensor([width]), with_grad=False).max())  # a rank may have none
        empty = torch.zeros(0, dtype=torch.int64)
        mine = [torch.cat(column) for column in zip(*parts, strict=True)] if parts else [empty] * 3 + [torch.zeros(0)]
        if not self.sparse and not parts:
            mine[3] = torch.zeros(0, width)
        numbers, row, column, values = (gather_rows(one, with_grad=False) for one in mine)
        if not len(numbers):
            return None
        names, keep = np.unique(numbers.numpy(), return_index=True)
        if not self.sparse:
            return Encoded(names, values.numpy()[keep])
        from scipy.sparse import csr_matrix

        # samplers of others give some texts twice, which would add up
        cells, first = np.unique(np.searchsorted(names, row.numpy()) * self.vector_size + column.numpy(), return_index=True)
        places = np.divmod(cells, self.vector_size)
        return Encoded(names, csr_matrix((values.numpy()[first], places), shape=(len(names), self.vector_size)))

    @property
    def vector_size(self) -> int:
        """D of sparse vectors."""
        raise NotImplementedError

    def _begin(self) -> None:
        self._rows, self._judgements = {True: [], False: []}, []

    def on_validation_epoch_start(self) -> None:
        """Begin anew."""
        self._begin()

    def on_test_epoch_start(self) -> None:
        """Begin anew."""
        self._begin()

    def on_predict_epoch_start(self) -> None:
        """Begin anew."""
        self._begin()

    def _evaluate(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._keep(batch)

    def rank_all(self) -> tuple[Encoded, Encoded, Ranking] | None:
        """Queries, documents, and the ranking of all of them; None: the evaluation has seen no query or no document."""
        queries, documents = self.encoded(True), self.encoded(False)
        if queries is None or documents is None:
            return None
        ranking = rank_documents(queries.vectors, documents.vectors, queries.numbers, documents.numbers, self._top_k, self.sparse)
        return queries, documents, ranking

    def collection_figures(self, queries: Encoded, documents: Encoded) -> dict[str, float]:
        """Further figures of all queries and documents; what the dashboard shows of them goes into ``_media``."""
        return {}

    def _log_evaluation(self, part: Part) -> None:
        found = self.rank_all()
        judgements = gather_rows(torch.cat([*self._judgements, torch.zeros(0, 3, dtype=torch.int64)]), with_grad=False)
        if found is None:
            rank_zero_warn("the evaluation has seen no query or no document: raise the number of its batches for retrieval figures")
        else:
            queries, documents, self.ranking = found
            figures = ranking_figures(self.ranking, judgements.unique(dim=0).numpy()) | self.collection_figures(queries, documents)
            if "ndcg_at_10" not in figures:
                rank_zero_warn("no query of the evaluation has a relevant document: give judgements, or evaluate more batches")
            log_global(self, {f"retriever/{part}_{name}": float(value) for name, value in figures.items()}, prog_bar=True)
        self._begin()

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """``index`` (B,) and ``is_query`` (B,) of what was encoded; the ranking goes into the run's ``run.trec``."""
        self._keep(batch)
        return {"index": batch["index"], "is_query": batch["is_query"]}

    def on_predict_epoch_end(self) -> None:
        """Write ``run.trec`` into the run's folder."""
        found = self.rank_all()
        if found is None:
            rank_zero_warn("no run file is written: the data have no query or no document")
            return
        self.write_run(*found)

    def write_run(self, queries: Encoded, documents: Encoded, ranking: Ranking) -> None:
        """Write TREC's run file of a prediction; called on every rank."""
        self.ranking = ranking
        data = getattr(self.trainer, "datamodule", None)
        names = [
            getattr(data, name, None) or [str(number) for number in range(int(encoded.numbers.max()) + 1)]
            for name, encoded in (("query_names", queries), ("document_names", documents))
        ]
        folder = run_dir(self.trainer)
        if rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            write_trec_run(folder / "run.trec", ranking, names[0], names[1], type(self).__name__)

    # ---- optimiser ---------------------------------------------------------------------------------------------------------------------

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What the optimiser gets."""
        return [{"params": [parameter for parameter in self.parameters() if parameter.requires_grad]}]

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW with a linear warm-up; constant behind it, or linear to 0."""
        rate, decay, warmup, schedule = self._recipe
        optimizer = torch.optim.AdamW(self.parameter_groups(), lr=rate, weight_decay=decay)
        total = 0 if schedule == "constant" else training_length(self, what="schedule='linear'", instead=None)

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return 1.0 if schedule == "constant" else max(0.0, (total - step) / max(1, total - warmup))

        return scheduled(optimizer, factor)


__all__ = ["Encoded", "Retriever", "batch_fields"]
