"""A sparse retriever for other software: documents for Anserini or OpenSearch, and a model for sentence-transformers."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lit_methods.datamodules.cache import making_folder
from lit_methods.files import replacing, write_json
from lit_methods.retrieval.base import Encoded
from lit_methods.retrieval.networks import MaskedLM

QUANTISED = 100.0  # Anserini's impacts are whole numbers: weights times this


def named_weights(encoded: Encoded, tokens: Sequence[str]) -> Iterator[tuple[int, dict[str, float]]]:
    """Number and token -> weight of each row."""
    rows = encoded.vectors
    for place, number in enumerate(encoded.numbers.tolist()):
        own = slice(rows.indptr[place], rows.indptr[place + 1])
        yield number, {tokens[j]: float(x) for j, x in zip(rows.indices[own].tolist(), rows.data[own].tolist(), strict=True)}


def write_anserini(folder: Path, retriever: Any, queries: Encoded, documents: Encoded, data: Any) -> None:
    """``documents.jsonl`` for Anserini's JsonVectorCollection, and ``topics.tsv`` of its pre-tokenised queries.

    Impacts are the weights times the query's table, times 100, rounded: a query is its tokens, each once, and its score is that of the
    model times 100, but for the rounding. Impacts that round to 0 are left out.

    Args:
        folder: Is made; must not exist.
        retriever: A ``SparseRetriever``; its table of query weights is multiplied in.
        queries: As the retriever encoded them.
        documents: Likewise.
        data: Has ``tokens``, ``document_names`` and ``query_names``.
    """
    table, tokens = retriever.query_table().detach().relu().cpu().numpy(), data.tokens
    scaled = documents.vectors.multiply(table[None] * QUANTISED).tocsr()
    scaled.data = np.rint(scaled.data)
    scaled.eliminate_zeros()
    with making_folder(folder) as partial:
        with (partial / "documents.jsonl").open("w", encoding="utf-8") as file:
            for number, weights in named_weights(Encoded(documents.numbers, scaled), tokens):
                impacts = {token: int(weight) for token, weight in weights.items()}
                file.write(json.dumps({"id": data.document_names[number], "contents": "", "vector": impacts}, ensure_ascii=False) + "\n")
        with (partial / "topics.tsv").open("w", encoding="utf-8") as file:
            for number, weights in named_weights(queries, tokens):
                file.write(f"{data.query_names[number]}\t{' '.join(weights)}\n")


def write_opensearch(path: Path, documents: Encoded, data: Any, index: str = "documents", name: str = "passage_embedding") -> None:
    """Lines for OpenSearch's bulk request: an action, and a document with its ``rank_features``; weights are those of the model.

    Args:
        path: The file.
        documents: As the retriever encoded them.
        data: Has ``tokens`` and ``document_names``.
        index: Name of the index.
        name: Name of the field.
    """
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
        for number, weights in named_weights(documents, data.tokens):
            file.write(json.dumps({"index": {"_index": index, "_id": data.document_names[number]}}, ensure_ascii=False) + "\n")
            file.write(json.dumps({name: {token: round(weight, 6) for token, weight in weights.items()}}, ensure_ascii=False) + "\n")


def save_sentence_transformers(folder: Path, retriever: Any, tokenizer: Any) -> None:
    """A folder that ``sentence_transformers.SparseEncoder`` loads; its scores are those of the retriever.

    Args:
        folder: Is made; must not exist.
        retriever: A ``SparseRetriever`` with a ``MaskedLM`` as its network.
        tokenizer: Of transformers, that of its data.

    Raises:
        ValueError: The network is another one, or documents are pruned, which that software can't say.
    """
    network = retriever.network
    if not isinstance(network, MaskedLM):
        raise ValueError(f"the network is a {type(network).__name__}: sentence-transformers loads models of transformers, use MaskedLM")
    if retriever.hparams["prune_ratio"] is not None:
        raise ValueError("prune_ratio is set, which sentence-transformers has no word for: set it to null")
    from safetensors.torch import save_file

    base = "sentence_transformers"
    kinds = {
        "query_0_SparseStaticEmbedding": f"{base}.sparse_encoder.modules.sparse_static_embedding.SparseStaticEmbedding",
        "document_0_MLMTransformer": f"{base}.sparse_encoder.modules.mlm_transformer.MLMTransformer",
        "document_1_SpladePooling": f"{base}.sparse_encoder.modules.splade_pooling.SpladePooling",
    }
    static, model, pooling = kinds
    structure = {"query": [model, pooling] if retriever.hparams["siamese"] else [static], "document": [model, pooling]}
    used = {name: kinds[name] for names in structure.values() for name in names}
    with making_folder(folder) as partial:
        for name in used:
            (partial / name).mkdir()
        network.model.save_pretrained(partial / model)
        tokenizer.save_pretrained(partial / model)
        text = {"text": {"method": "forward", "method_output_name": "logits"}}
        settings = {"transformer_task": "fill-mask", "modality_config": text, "module_output_name": "token_embeddings"}
        write_json(partial / model / "sentence_bert_config.json", settings)
        activation = "log1p_relu" if retriever.hparams["double_log"] else "relu"
        write_json(partial / pooling / "config.json", {"pooling_strategy": "max", "activation_function": activation})
        if static in used:
            table = retriever.query_table().detach().relu().index_fill(0, retriever.special_ids, 0.0).cpu()
            save_file({"weight": table[: len(tokenizer)].contiguous()}, partial / static / "model.safetensors")
            tokenizer.save_pretrained(partial / static)
            write_json(partial / static / "config.json", {"frozen": retriever.hparams["idf_learning_rate"] is None})
        parameters = {"default_route": "document", "allow_empty_key": True, "route_mappings": {}}
        write_json(partial / "router_config.json", {"types": used, "structure": structure, "parameters": parameters})
        write_json(partial / "modules.json", [{"idx": 0, "name": "0", "path": "", "type": f"{base}.base.modules.router.Router"}])
        described = {"model_type": "SparseEncoder", "similarity_fn_name": "dot", "prompts": {"query": "", "document": ""}}
        write_json(partial / "config_sentence_transformers.json", described)


__all__ = ["named_weights", "save_sentence_transformers", "write_anserini", "write_opensearch"]
