"""Training of an inference-free sparse retriever (arXiv:2411.04403): IDF-aware FLOPS, and distillation from an ensemble of teachers.

Read in zhichao-aws/opensearch-sparse-model-tuning-sample@7cbe004. The maths is in
:mod:`lit_methods.retrieval.sparse_retriever.core` and :mod:`lit_methods.retrieval.ranking`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lit_methods import checks
from lit_methods.catalog import Technique
from lit_methods.distributed import gather_rows
from lit_methods.panels import Curve, Panel, TableMedia, TablePanel
from lit_methods.retrieval.base import Encoded, Retriever, Schedule, batch_fields
from lit_methods.retrieval.evaluation import expected_products
from lit_methods.retrieval.idf import read_idf
from lit_methods.retrieval.networks import MaskedLanguageEncoder
from lit_methods.retrieval.ranking import margin_mse, pair_scores, ranking_info_nce, ranking_kl
from lit_methods.retrieval.sparse_retriever.core import (
    document_weights,
    ensemble_scores,
    flops_penalty,
    quadratic_ramp,
    query_weights,
)
from lit_methods.retrieval.sparse_retriever.teachers import Teacher
from lit_methods.runs.checkpoints import load_into

TECHNIQUE = Technique(
    slug="sparse_retriever",
    short="Inference-free sparse retriever",
    title="Towards Competitive Search Relevance For Inference-Free Learned Sparse Retrievers",
    arxiv="2411.04403",
    family="retrieval",
    form="module",
    classes=(
        "lit_methods.SparseRetriever",
        "lit_methods.callbacks.FLOPSRegularizer",
        "lit_methods.DenseRetriever",
        "lit_methods.SmallTextEncoder",
        "lit_methods.MaskedLM",
        "lit_methods.RetrieverTeacher",
        "lit_methods.TextTeacher",
        "lit_methods.datamodules.SearchDataModule",
        "lit_methods.datamodules.SynonymSearchDataModule",
    ),
    configs=("sparse_retriever.yaml", "sparse_retriever_distill.yaml", "sparse_retriever_dense.yaml"),
    golden=("encode_doc", "encode_query", "flops", "ensemble_scores", "loss"),
    claim=(
        "At an equal weight of the FLOPS penalty, queries weighted by IDF reach a higher nDCG@10 than queries whose tokens all weigh the "
        "same."
    ),
    summary="Trains documents as sparse vectors of the vocabulary; a query is its tokens with IDF weights out of a table, no model runs.",
)

IDFMode = Literal["match", "penalty", "none"]
Loss = Literal["info_nce", "kl", "margin_mse"]
STOP_WORD = 2.3  # IDF of a token that a tenth of the documents contain


class SparseRetriever(Retriever):
    """Learns document vectors w over the vocabulary, so that s(q, d) = sum of idf_j w_j over the tokens j of the query ranks documents.

    The loss is weight * ranking + lambda_t * FLOPS(w): the documents' weights are log(1 + relu(max over tokens of the logits)), FLOPS is
    the sum over the vocabulary of squared mean weights, and lambda_t rises with the square of the step. ``idf_mode`` says where the IDF
    enters. ``match``: into the score, with plain FLOPS. ``penalty``: the network's output holds it already, so the query is binary and
    FLOPS divides by idf^2. ``none``: all query tokens weigh ``query_weight``. With e = idf * w, ``penalty`` of e and ``match`` of w have
    the same scores and the same penalty.

    Runs: as :class:`Retriever`. Queries and documents of all ranks are gathered with gradient, so penalty and negatives are those of the
    whole batch. With ``kl`` and ``margin_mse`` the targets are the ensemble scores of ``teachers``, else ``scores`` (B, G) of the batch.

    Saves: the network and the table of IDFs; no teacher.

    Refuses: a network whose vocabulary isn't the data's; ``kl`` or ``margin_mse`` without targets; ``margin_mse`` with in-batch negatives,
    where the first document would be another query's; ``penalty`` with an IDF of 0 or less; a linear schedule in a training without an end.

    Args:
        network: (B, L) tokens and mask -> (B, L, V) logits, such as ``SmallTextEncoder`` or ``MaskedLM``.
        idf: JSON table of ``lit idf``; None: that of the data's own documents.
        idf_mode: ``match``, ``penalty`` or ``none``.
        query_weight: Weight of every query token with ``none``.
        siamese: Queries go through the network, too; no IDF is used.
        double_log: w = log(1 + log(1 + relu(.))).
        prune_ratio: Weights of at most this share of a document's largest become 0; None: all stay.
        loss: ``info_nce``, ``kl`` or ``margin_mse``.
        weight: Factor of the ranking loss.
        temperature: Scores are divided by it; not used by ``margin_mse``.
        in_batch_negatives: Score the documents of all queries of the batch, not each query's own alone.
        other_positives: ``info_nce``: the positives of other queries are negatives, too, for data with one document a query.
        teachers: Frozen models, whose scores are averaged.
        teacher_scale: Factor of the averaged teacher scores.
        normalise_teachers: Scale each teacher's scores to [0, 1] within a query; False: plain mean, without ``teacher_scale``.
        flops_weight: lambda of the documents.
        query_flops_weight: lambda of the queries; siamese alone.
        ramp_steps: Optimiser steps in which both rise.
        l0_threshold: Documents with at most this many weights are left out of FLOPS; None: none is.
        idf_learning_rate: Learning rate of the IDFs; None: they stay.
        special_token_ids: Tokens that queries and the index leave out; None: those of the data.
        pretrained: Checkpoint whose network it starts from, for the second stage.
        learning_rate: AdamW's learning rate after the warm-up.
        weight_decay: AdamW's weight decay.
        warmup_steps: Optimiser steps of linear rise.
        schedule: ``constant``, or ``linear``: down to 0 at the end of the training.
        top_k: Documents of a query that an evaluation keeps.

    Raises:
        ValueError: A value outside its range, or values that don't fit together.
    """

    panels: ClassVar[tuple[Panel, ...]] = (
        *Retriever.panels,
        Curve("FLOPS penalty", ("retriever/flops", "retriever/query_flops"), note="Before lambda, of training batches.", goal="min"),
        Curve("lambda", ("retriever/lambda",), note="Rises with the square of the step."),
        Curve(
            "Weights of a document",
            ("retriever/document_length", "retriever/val_document_length"),
            note="How many aren't 0. All 0: lower lambda.",
        ),
        Curve("Share of stop words", ("retriever/stop_word_share",), note="Of the documents' mass; tokens of a tenth of all documents."),
        Curve("Products per query and document", ("retriever/val_flops",), note="What a search costs, expected.", goal="min"),
        TablePanel("What documents say", "retriever/documents", note="Largest weights times the IDF of some documents."),
    )
    sparse: ClassVar[bool] = True
    idf: Tensor
    idf_known: Tensor
    special_ids: Tensor

    def __init__(
        self,
        network: MaskedLanguageEncoder,
        idf: Path | None = None,
        idf_mode: IDFMode = "match",
        query_weight: float = 1.0,
        siamese: bool = False,
        double_log: bool = False,
        prune_ratio: float | None = None,
        loss: Loss = "info_nce",
        weight: float = 1.0,
        temperature: float = 1.0,
        in_batch_negatives: bool = True,
        other_positives: bool = False,
        teachers: list[Teacher] | None = None,
        teacher_scale: float = 30.0,
        normalise_teachers: bool = True,
        flops_weight: float = 0.003,
        query_flops_weight: float = 0.0,
        ramp_steps: int = 200,
        l0_threshold: int | None = None,
        idf_learning_rate: float | None = None,
        special_token_ids: Sequence[int] | None = None,
        pretrained: Path | None = None,
        learning_rate: float = 2e-5,
        weight_decay: float = 0.01,
        warmup_steps: int = 0,
        schedule: Schedule = "constant",
        top_k: int = 100,
    ) -> None:
        super().__init__(learning_rate, weight_decay, warmup_steps, schedule, top_k)
        checks.literals(SparseRetriever, locals())
        checks.positive(
            query_weight=query_weight, temperature=temperature, teacher_scale=teacher_scale, idf_learning_rate=idf_learning_rate
        )
        checks.at_least(0, weight=weight, flops_weight=flops_weight, query_flops_weight=query_flops_weight)
        checks.at_least(0, ramp_steps=ramp_steps, l0_threshold=l0_threshold)
        checks.within("[0, 1)", "a share of the largest weight", prune_ratio=prune_ratio)
        if loss == "margin_mse" and in_batch_negatives:
            raise ValueError(
                "loss='margin_mse' compares with the first document, which with in_batch_negatives is the first query's: set "
                "in_batch_negatives to false"
            )
        if query_flops_weight and not siamese:
            raise ValueError(f"query_flops_weight is {query_flops_weight}, but queries are looked up: set siamese to true, or it to 0")
        if teachers and loss == "info_nce":
            raise ValueError(f"loss='info_nce' learns from no teacher, and {len(teachers)} are given: set loss to kl or margin_mse")
        if loss == "kl" and in_batch_negatives and not teachers:
            raise ValueError(
                "loss='kl' with in_batch_negatives needs teachers, which score all documents of the batch: give some, or set "
                "in_batch_negatives to false and have scores in the batch"
            )
        size = getattr(network, "vocab_size", None)
        if not isinstance(size, int):
            raise ValueError(f"{type(network).__name__} has no vocab_size: give a MaskedLanguageEncoder, or set that attribute to V")
        self.save_hyperparameters(ignore=["network", "teachers"])
        if pretrained is not None:
            load_into(network, pretrained, "network.")
        self.network, self.teachers = network, nn.ModuleList(teachers or [])
        ones = torch.ones(size)
        if idf_learning_rate is None:
            self.register_buffer("idf", ones)
        else:
            self.idf = nn.Parameter(ones)  # type: ignore[assignment]
        self.register_buffer("idf_known", torch.zeros((), dtype=torch.bool))
        self.register_buffer("special_ids", torch.tensor(list(special_token_ids or ()), dtype=torch.int64), persistent=False)

    @property
    def vector_size(self) -> int:
        """V."""
        return len(self.idf)

    def setup(self, stage: str) -> None:
        """Take the IDF table and the special tokens, from the arguments or the data.

        Raises:
            ValueError: The vocabulary of the data is another one, or there is no table.
        """
        hp, data = self.hparams, getattr(self.trainer, "datamodule", None)
        tokens: Sequence[str] | None = getattr(data, "tokens", None)
        if tokens is not None and len(tokens) > len(self.idf):
            raise ValueError(f"the data have {len(tokens)} tokens and the network {len(self.idf)}: set its vocab_size to {len(tokens)}")
        if hp["special_token_ids"] is None and data is not None:
            unused = range(len(tokens or self.idf), len(self.idf))  # of the network's vocabulary: no text has them
            self.special_ids = torch.tensor([*getattr(data, "special_ids", ()), *unused], dtype=torch.int64, device=self.device)
        if hp["siamese"] or hp["idf_mode"] == "none" or bool(self.idf_known):
            return
        table = getattr(data, "idf", None)
        if hp["idf"] is not None:
            if tokens is None:
                raise ValueError(f"idf={str(hp['idf'])!r} names tokens, and the data have no list of them: use SearchDataModule")
            table = read_idf(Path(hp["idf"]).expanduser(), tokens)
        if table is None:
            if stage == "fit":
                raise ValueError(
                    "there is no IDF table: give idf, made by `lit idf`, or data with an attribute idf, or set idf_mode to none"
                )
            return
        self.set_idf(torch.as_tensor(table))

    def set_idf(self, idf: Tensor) -> None:
        """Take a table.

        Args:
            idf: (V,) floating point, or shorter: tokens that it lacks get 1.

        Raises:
            ValueError: It is too long, isn't finite, or ``idf_mode='penalty'`` would divide by 0.
        """
        if idf.ndim != 1 or len(idf) > len(self.idf) or not bool(idf.isfinite().all()):
            raise ValueError(f"the IDF table is {tuple(idf.shape)}: give up to {len(self.idf)} finite values")
        if self.hparams["idf_mode"] == "penalty" and bool((idf <= 0).any()):
            raise ValueError(f"idf_mode='penalty' divides by the IDF, and {int((idf <= 0).sum())} are 0 or less: use match")
        with torch.no_grad():
            self.idf.fill_(1.0)[: len(idf)] = idf.to(self.idf)
        self.idf_known.fill_(True)

    # ---- vectors -----------------------------------------------------------------------------------------------------------------------

    def query_table(self) -> Tensor:
        """(V,) weight of each token in a query."""
        mode = self.hparams["idf_mode"]
        if mode == "match":
            return self.idf
        return torch.full_like(self.idf, self.hparams["query_weight"] if mode == "none" else 1.0)

    def represent(self, input_ids: Tensor, attention_mask: Tensor, queries: bool) -> Tensor:
        """(B, L) tokens and mask -> (B, V) weights; of queries without the network, unless it is siamese."""
        hp = self.hparams
        if queries and not hp["siamese"]:
            # padding is a special token; where it isn't, the first token of the text stands for it and counts once as well
            return query_weights(torch.where(attention_mask != 0, input_ids, input_ids[:, :1]), self.query_table(), self.special_ids)
        return document_weights(self.network(input_ids, attention_mask), attention_mask, hp["double_log"], hp["prune_ratio"])

    def represent_for_index(self, input_ids: Tensor, attention_mask: Tensor, queries: bool) -> Tensor:
        """As :meth:`represent`, with the special tokens 0."""
        return self.represent(input_ids, attention_mask, queries).index_fill(1, self.special_ids, 0.0)

    def teacher_scores(self, batch: dict[str, Any], docs_per_query: int) -> Tensor:
        """Targets (B, B * G) or (B, G) of the queries of all ranks.

        Raises:
            KeyError: There is no teacher, and the batch has no scores.
            ValueError: Its scores are for another number of documents.
        """
        hp = self.hparams
        if not self.teachers:
            (scores,) = batch_fields(batch, "scores")
            if scores.ndim != 2 or scores.shape[1] != docs_per_query:
                raise ValueError(f"the batch's scores are {tuple(scores.shape)} with {docs_per_query} documents a query: give (B, G)")
            return gather_rows(scores, with_grad=False)
        queries, documents = [], []
        for teacher in self.teachers:
            queries.append(gather_rows(teacher.encode(batch, True), with_grad=False))  # type: ignore[operator]
            documents.append(gather_rows(teacher.encode(batch, False), with_grad=False))  # type: ignore[operator]
        return ensemble_scores(queries, documents, hp["in_batch_negatives"], scale=hp["teacher_scale"], normalise=hp["normalise_teachers"])

    # ---- training ----------------------------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Ranking loss and penalty of the batch of all ranks.

        Raises:
            ValueError: Each query has one document, and is compared with no other.
        """
        hp = self.hparams
        query_ids, query_mask, ids, mask = batch_fields(batch, "query_ids", "query_mask", "document_ids", "document_mask")
        queries = gather_rows(self.represent(query_ids, query_mask, True))
        documents = gather_rows(self.represent(ids, mask, False))
        group = len(documents) // len(queries)
        if group == 1 and not (hp["in_batch_negatives"] and (hp["other_positives"] or hp["loss"] == "kl")):
            raise ValueError(
                "each query has one document and is compared with no other, so that nothing is ranked: "
                "set in_batch_negatives and other_positives to true, or have further documents of each query in the batch"
            )
        scores = pair_scores(queries, documents, hp["in_batch_negatives"])
        if hp["loss"] == "info_nce":
            ranking = ranking_info_nce(scores, group, hp["temperature"], hp["other_positives"])
        elif hp["loss"] == "kl":
            ranking = ranking_kl(scores, self.teacher_scores(batch, group), hp["temperature"])
        else:
            ranking = margin_mse(scores, self.teacher_scores(batch, group))
        step = self.trainer.global_step
        factor = quadratic_ramp(step, hp["flops_weight"], hp["ramp_steps"])
        divide = self.idf if hp["idf_mode"] == "penalty" and not hp["siamese"] else None
        flops = flops_penalty(documents, group, hp["l0_threshold"], divide)
        loss = hp["weight"] * ranking + factor * flops
        logs = {"ranking_loss": ranking, "flops": flops, "lambda": torch.tensor(factor)} | self._document_figures(documents.detach())
        if hp["query_flops_weight"]:
            query_flops = flops_penalty(queries)
            loss = loss + quadratic_ramp(step, hp["query_flops_weight"], hp["ramp_steps"]) * query_flops
            logs["query_flops"] = query_flops
        self.log("retriever/loss", loss.detach(), prog_bar=True, batch_size=len(query_ids))
        self.log_dict({f"retriever/{name}": value.detach() for name, value in logs.items()}, batch_size=len(query_ids))
        return loss

    def _document_figures(self, documents: Tensor) -> dict[str, Tensor]:
        mass = documents.sum(dim=0)
        stop = torch.where(self.idf.detach() < STOP_WORD, mass, 0.0).sum() / mass.sum()  # NaN where all weights are 0
        return {"document_length": (documents != 0).sum(dim=1).float().mean(), "stop_word_share": stop}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The network, and the IDFs if they are trained, without weight decay."""
        groups: list[dict[str, Any]] = [{"params": [parameter for parameter in self.network.parameters() if parameter.requires_grad]}]
        if (rate := self.hparams["idf_learning_rate"]) is not None:
            groups.append({"params": [self.idf], "lr": rate, "weight_decay": 0.0})
        return groups

    # ---- evaluation --------------------------------------------------------------------------------------------------------------------

    def collection_figures(self, queries: Encoded, documents: Encoded) -> dict[str, float]:
        """Products of a query and a document that a search expects, and the number of a document's weights."""
        self._media["retriever/documents"] = self._largest_weights(documents)
        products = expected_products(queries.vectors, documents.vectors)
        return {"flops": products, "document_length": documents.vectors.nnz / len(documents.numbers)}

    def _largest_weights(self, documents: Encoded, number: int = 8, words: int = 10) -> TableMedia:
        data = getattr(self.trainer, "datamodule", None)
        tokens, names = getattr(data, "tokens", None), getattr(data, "document_names", None)
        table = self.query_table().detach().relu().cpu().numpy()
        rows = []
        for place, document in enumerate(documents.numbers[:number].tolist()):
            row = documents.vectors[[place]].tocoo()
            weights = row.data * table[row.col]
            best = (-weights).argsort(kind="stable")[:words]
            said = ", ".join(f"{tokens[row.col[k]] if tokens else row.col[k]} {weights[k]:.2f}" for k in best)
            rows.append((names[document] if names else str(document), int(row.nnz), said))
        return TableMedia(("document", "weights", "largest"), tuple(rows))


__all__ = ["SparseRetriever"]
