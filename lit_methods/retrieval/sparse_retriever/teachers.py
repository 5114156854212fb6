"""Frozen models whose scores a student learns from."""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_methods.checks import at_least, literals
from lit_methods.frozen import Frozen
from lit_methods.hub import fetch, place_of
from lit_methods.retrieval.base import Retriever, batch_fields
from lit_methods.retrieval.dense import Pooling, pooled
from lit_methods.retrieval.networks import MaskedLM
from lit_methods.retrieval.sparse_retriever.core import document_weights
from lit_methods.runs.checkpoints import load_into


class Teacher(nn.Module):
    """Base: subclasses give :meth:`encode`. The model stands in ``Frozen``: it isn't trained and isn't saved."""

    def encode(self, batch: dict[str, Any], queries: bool) -> Tensor:
        """Vectors (n, D) of a training batch's queries or documents."""
        raise NotImplementedError


class RetrieverTeacher(Teacher):
    """A retriever of ours that was trained before, with the tokens of the student.

    Args:
        retriever: As it was trained, such as ``DenseRetriever`` or a siamese ``SparseRetriever``.
        checkpoint: Its checkpoint; None: the weights that it is built with.
    """

    def __init__(self, retriever: Retriever, checkpoint: Path | None = None) -> None:
        super().__init__()
        if checkpoint is not None:
            load_into(retriever, checkpoint)
        self.model = Frozen(retriever)

    def encode(self, batch: dict[str, Any], queries: bool) -> Tensor:
        """Vectors (n, D), without the special tokens."""
        part = "query" if queries else "document"
        ids, mask = batch_fields(batch, f"{part}_ids", f"{part}_mask")
        retriever: Any = self.model.module
        with torch.no_grad():
            return retriever.represent_for_index(ids, mask, queries)  # type: ignore[no-any-return]


class TextTeacher(Teacher):
    """A bi-encoder of Hugging Face transformers with a tokenizer of its own.

    It reads ``query_text`` and ``document_text`` of the batch, which ``SearchDataModule`` gives with ``texts: true``.

    Args:
        name_or_path: Folder or hub name of the model and its tokenizer, or ``package:<name>``.
        kind: ``dense``: a hidden state of length 1; ``sparse``: log(1 + relu(max over tokens)) of a masked-language head, special tokens 0.
        pooling: Of a dense one: ``cls`` or ``mean``.
        max_length: Tokens of a text; what is behind them is cut off.
        query_prompt: What is put before each query.
        document_prompt: What is put before each document.

    Raises:
        ImportError: transformers is not installed.
        ValueError: A value outside its range, or no such model.
    """

    def __init__(
        self,
        name_or_path: str,
        kind: Literal["dense", "sparse"] = "dense",
        pooling: Pooling = "cls",
        max_length: int = 512,
        query_prompt: str = "",
        document_prompt: str = "",
    ) -> None:
        super().__init__()
        literals(TextTeacher, locals())
        at_least(1, "tokens", max_length=max_length)
        self.kind, self.pooling, self.max_length = kind, pooling, max_length
        self.prompts = {True: query_prompt, False: document_prompt}
        try:
            import transformers
        except ImportError as error:
            raise ImportError('TextTeacher needs transformers: pip install "lit-methods[transformers]"') from error
        given = f"name_or_path={name_or_path!r}"
        place, _ = place_of(name_or_path, given)
        instead = "give the folder of a bi-encoder with its tokenizer"
        self.tokenizer: Any = fetch(lambda: transformers.AutoTokenizer.from_pretrained(place), place, given=given, instead=instead)
        if kind == "sparse":
            model: nn.Module = MaskedLM(name_or_path)
        else:
            auto: Any = transformers.AutoModel
            model = fetch(
                lambda: auto.from_pretrained(place, dtype=torch.float32),
                place,
                given=given,
                instead=instead,
                blank=lambda: auto.from_config(transformers.AutoConfig.from_pretrained(place), dtype=torch.float32),
            )
        self.model = Frozen(model)
        self.register_buffer("specials", torch.tensor(sorted(self.tokenizer.all_special_ids)), persistent=False)

    def encode(self, batch: dict[str, Any], queries: bool) -> Tensor:
        """Vectors (n, D)."""
        name = "query_text" if queries else "document_text"
        if name not in batch:
            raise KeyError(f"TextTeacher reads {name}, which the batch lacks: set texts: true in SearchDataModule")
        texts = [self.prompts[queries] + text for text in batch[name]]
        device = next(self.model.module.parameters()).device
        options = {"padding": True, "truncation": True, "max_length": self.max_length, "return_tensors": "pt"}
        tokens = self.tokenizer(texts, **options).to(device)
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        if self.kind == "dense":
            return pooled(self.model(input_ids=ids, attention_mask=mask).last_hidden_state, mask, self.pooling)
        return document_weights(self.model(ids, mask), mask).index_fill(1, self.specials, 0.0)  # type: ignore[arg-type]


__all__ = ["RetrieverTeacher", "Teacher", "TextTeacher"]
