"""Tiny collections in the layouts that are read."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lit_methods.datamodules.fake import Arguments, Writer, flat, picture, text
from lit_methods.datamodules.matrices.idx import write_idx
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


# ---- composed retrieval ----------------------------------------------------------------------------------------------------------------

COLOURS = {"red": (200, 40, 40), "green": (40, 160, 60), "blue": (40, 70, 200), "yellow": (220, 200, 50), "grey": (120, 120, 120)}
CUTS = ("short", "long", "striped", "plain")


def _garments(number: int) -> list[tuple[str, str]]:
    """Colour and cut of each garment."""
    return [(list(COLOURS)[k % len(COLOURS)], CUTS[k // len(COLOURS) % len(CUTS)]) for k in range(number)]


def _garment(path: Path, colour: str, number: int) -> None:
    picture(path, flat(tuple(min(255, c + number % 9) for c in COLOURS[colour])))  # type: ignore[arg-type]


def fashioniq(root: Path, number: int = 10, lines: bool = False, categories: tuple[str, ...] = ("dress", "shirt", "toptee")) -> None:
    """FashionIQ's official JSON, or with ``lines`` the two lines a pair of ``captions_pairs``; images in ``image_data``."""
    for category in categories:
        for split in ("train", "val"):
            kinds = _garments(number)
            ids = [f"{category[0].upper()}{split[0].upper()}{k:05d}" for k in range(number)]
            for k, (colour, _) in enumerate(kinds):
                _garment(root / "image_data" / category / f"{ids[k]}.jpg", colour, k)
            records = [
                {"target": ids[k], "candidate": ids[k - 1], "captions": [f"is {kinds[k][0]}", f"is more {kinds[k][1]}"]}
                for k in range(1, number)
            ]
            text(root / "image_splits" / f"split.{category}.{split}.json", json.dumps(ids))
            if not lines:
                text(root / "captions" / f"cap.{category}.{split}.json", json.dumps(records))
                continue
            rows = [f"{category}/{r['candidate']}.jpg;{category}/{r['target']}.jpg;{said}" for r in records for said in r["captions"]]
            text(root / "captions_pairs" / f"fashion_iq-{split}-cap-{category}.txt", *rows)


def shoes(root: Path, number: int = 10, table: bool = False) -> None:
    """Lists of ``reference;target;caption``, or with ``table`` the JSON of all captions and lists of names."""
    names: dict[str, list[str]] = {}
    records = []
    for part in ("train", "test"):
        kinds, folder = _garments(number), "attributedata/womens_boots/0"
        names[part] = [f"img_womens_boots_{part}_{k}.jpg" for k in range(number)]
        for k, (colour, _) in enumerate(kinds):
            _garment(root / folder / names[part][k], colour, k)
        pairs = [(names[part][k - 1], names[part][k], f"more {kinds[k][0]} and {kinds[k][1]}") for k in range(1, number)]
        records += [{"ImageName": target, "ReferenceImageName": source, "RelativeCaption": said} for source, target, said in pairs]
        if not table:
            text(root / f"shoes-cap-{part}.txt", *(f"{folder}/{source};{folder}/{target};{said}" for source, target, said in pairs))
    if table:
        text(root / "relative_captions_shoes.json", json.dumps(records))
        for part, list_name in (("train", "train"), ("test", "eval")):
            text(root / f"{list_name}_im_names.txt", *names[part])
    else:
        text(root / "shoes-test-all.txt", *(f"{folder}/{name}" for name in names["test"]))


def fashion200k(root: Path, number: int = 20) -> None:
    """``labels/dress_<split>_detect_all.txt``, ``test_queries.txt`` and ``women/``."""
    asked = []
    for split in ("train", "test"):
        rows, kinds = [], _garments(number)
        for k, (colour, cut) in enumerate(kinds):
            name = f"women/dresses/{split}/{k}/{k}_0.jpeg"
            _garment(root / name, colour, k)
            rows.append(f"{name}\t0.9\t{colour} {cut} dress")
        text(root / "labels" / f"dress_{split}_detect_all.txt", *rows)
        asked = [f"women/dresses/{split}/{k}/{k}_0.jpeg women/dresses/{split}/{k + 1}/{k + 1}_0.jpeg" for k in range(min(4, number - 1))]
    text(root / "test_queries.txt", *asked)


def _fashion(arguments: Arguments, sizes: Mapping[str, int]) -> dict[str, Any]:
    """A release of the named data set, with enough training pairs for a few batches."""
    root, number = arguments["root"], max(10, 2 * int(arguments["batch_size"]) + 1)
    if arguments["name"] == "fashioniq":
        categories = tuple(arguments["categories"])
        fashioniq(root, max(6, -(-number // len(categories)) + 1), categories=categories)
    else:
        {"shoes": shoes, "fashion200k": fashion200k}[arguments["name"]](root, number)
    return {"root": root}


def _shifted(arguments: Arguments, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Fashion-MNIST's four files; the class is in the brightness."""
    per_class = max(4, -(-int(arguments["num_train"]) // 10))
    for part, count in (("train", per_class), ("t10k", 8)):
        labels = np.tile(np.arange(10, dtype=np.uint8), count)
        images = np.zeros((len(labels), 28, 28), np.uint8)
        images[np.arange(len(labels)), 2 * labels + 4] = 200
        folder = arguments["root"] / "FashionMNIST" / "raw"
        write_idx(folder / f"{part}-images-idx3-ubyte", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte", labels)
    return {"root": arguments["root"], "name": "fashion_mnist"}


FAKES: dict[str, Writer] = {
    "FashionRetrievalDataModule": _fashion,
    "SearchDataModule": _search,
    "ShiftedClassesDataModule": _shifted,
}
__all__ = ["FAKES", "beir", "examples", "fashion200k", "fashioniq", "shoes", "trec"]
