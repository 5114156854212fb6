"""Tiny collections in the layouts that are read."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_methods.datamodules.fake import Arguments, Writer, text
from lit_methods.datamodules.retrieval.collection import made_collection
from lit_methods.datamodules.text.text import made_up_text


def beir(root: Path, documents: int = 40, splits: tuple[str, ...] = ("train", "dev", "test")) -> None:
    """``corpus.jsonl``, ``queries.jsonl`` and ``qrels/<split>.tsv`` of the built-in collection."""
    made = made_collection(documents, splits)
    records = zip(made.document_names, made.titles, made.bodies, strict=True)
    text(root / "corpus.jsonl", *(json.dumps({"_id": name, "title": title, "text": body}) for name, title, body in records))
    queries = zip(made.query_names, made.queries, strict=True)
    text(root / "queries.jsonl", *(json.dumps({"_id": name, "text": query}) for name, query in queries))
    for split, judged in made.judgements.items():
        rows = [f"{made.query_names[query]}\t{made.document_names[document]}\t{grade}" for query, document, grade in judged.tolist()]
        text(root / "qrels" / f"{split}.tsv", "query-id\tcorpus-id\tscore", *rows)


def trec(root: Path, documents: int = 40) -> None:
    """``doc-text.trec``, ``query-text.trec`` and ``qrels``, as Vaswani is given."""
    lines = made_up_text(2 * documents).splitlines()
    text(root / "doc-text.trec", *(f"<DOC>\n<DOCNO>{k}</DOCNO>\n{lines[2 * k]}\n{lines[2 * k + 1]}\n</DOC>" for k in range(documents)))
    asked = (f"<top>\n<num>{k}</num><title>\n{lines[2 * k].upper()}\n</title>\n</top>" for k in range(documents // 2))
    text(root / "query-text.trec", *asked)
    text(root / "qrels", *(f"{k} 0 {k} 1" for k in range(documents // 2)))


def examples(file: Path, number: int = 40, group: int = 4) -> None:
    """Queries with documents and scores, a JSON object in each line."""
    lines = made_up_text((group + 1) * number).splitlines()
    rows = [lines[k * (group + 1) : (k + 1) * (group + 1)] for k in range(number)]
    text(file, *(json.dumps({"query": query, "docs": docs, "scores": [float(-k) for k in range(group)]}) for query, *docs in rows))


def _search(arguments: Arguments, sizes: Mapping[str, int]) -> dict[str, Any]:
    """BEIR's layout, and a file of examples where the arguments name one."""
    names = tuple(dict.fromkeys(arguments[f"{part}_split"] for part in ("train", "val", "test")))
    splits = names[1:] if arguments["train_share"] else names
    beir(arguments["root"], max(40, 3 * int(arguments["batch_size"])), splits)
    if arguments.get("examples") is None:
        return {"root": arguments["root"]}
    examples(arguments["examples"], 3 * int(arguments["batch_size"]), max(4, int(arguments["docs_per_query"])))
    return {"root": arguments["root"], "examples": arguments["examples"]}


FAKES: dict[str, Writer] = {"SearchDataModule": _search}
__all__ = ["FAKES", "beir", "examples", "trec"]
