"""A dense bi-encoder: what sparse retrievers are compared with, and a teacher of theirs."""

from pathlib import Path
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from lit_methods import checks
from lit_methods.distributed import gather_rows
from lit_methods.retrieval.base import Retriever, Schedule, batch_fields
from lit_methods.retrieval.networks import MaskedLanguageEncoder
from lit_methods.retrieval.ranking import pair_scores, ranking_info_nce
from lit_methods.runs.checkpoints import load_into

Pooling = Literal["cls", "mean"]


class DenseRetriever(Retriever):
    """Queries and documents by one encoder: a hidden state, or the mean of all, scaled to length 1; trained by InfoNCE.

    Runs: as :class:`Retriever`. Negatives are all other documents of the batch, of all ranks. The encoder's masked-language head isn't used
    and isn't trained.

    Saves: the network.

    Refuses: a linear schedule in a training without an end.

    Args:
        network: Encoder, such as ``SmallTextEncoder`` or ``MaskedLM``.
        pooling: ``mean`` over the tokens, or ``cls``: the first one.
        temperature: The cosines are divided by it.
        pretrained: Checkpoint of this class, or of ``SparseRetriever``, whose network it starts from.
        learning_rate: AdamW's learning rate after the warm-up.
        weight_decay: AdamW's weight decay.
        warmup_steps: Optimiser steps of linear rise.
        schedule: ``constant``, or ``linear``: down to 0 at the end of the training.
        top_k: Documents of a query that an evaluation keeps.

    Raises:
        ValueError: A value outside its range.
    """

    def __init__(
        self,
        network: MaskedLanguageEncoder,
        pooling: Pooling = "mean",
        temperature: float = 0.05,
        pretrained: Path | None = None,
        learning_rate: float = 2e-5,
        weight_decay: float = 0.01,
        warmup_steps: int = 0,
        schedule: Schedule = "constant",
        top_k: int = 100,
    ) -> None:
        super().__init__(learning_rate, weight_decay, warmup_steps, schedule, top_k)
        checks.literals(DenseRetriever, locals())
        checks.positive(temperature=temperature)
        self.save_hyperparameters(ignore=["network"])
        body = {id(parameter) for parameter in network.body.parameters()}
        for parameter in network.parameters():
            if id(parameter) not in body:
                parameter.requires_grad_(False)
        if pretrained is not None:
            load_into(network, pretrained, "network.")
        self.network, self.pooling, self.temperature = network, pooling, temperature

    def represent(self, input_ids: Tensor, attention_mask: Tensor, queries: bool) -> Tensor:
        """(B, L) tokens and mask -> (B, D) of length 1."""
        return pooled(self.network.hidden(input_ids, attention_mask), attention_mask, self.pooling)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """InfoNCE over the batch of all ranks."""
        query_ids, query_mask, ids, mask = batch_fields(batch, "query_ids", "query_mask", "document_ids", "document_mask")
        queries = gather_rows(self.represent(query_ids, query_mask, True))
        documents = gather_rows(self.represent(ids, mask, False))
        loss = ranking_info_nce(pair_scores(queries, documents), len(documents) // len(queries), self.temperature, other_positives=True)
        self.log("retriever/loss", loss.detach(), prog_bar=True, batch_size=len(query_ids))
        return loss


def pooled(hidden: Tensor, attention_mask: Tensor, pooling: Pooling) -> Tensor:
    """(B, L, D) hidden states -> (B, D) of length 1: the first token's, or the mean over tokens whose mask (B, L) is 1."""
    hidden = hidden.float()
    if pooling == "cls":
        return F.normalize(hidden[:, 0], dim=1)
    mask = attention_mask[..., None].to(hidden.dtype)
    return F.normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1), dim=1)


__all__ = ["DenseRetriever", "pooled"]
