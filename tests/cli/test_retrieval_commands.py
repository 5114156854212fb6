"""``lit idf``, ``lit encode`` and ``lit search``."""

import json

import numpy as np
import pytest

from lit_methods.cli.main import main
from lit_methods.datamodules.retrieval.fake import beir

CONFIG = """
model:
  class_path: SparseRetriever
  init_args:
    network: {{class_path: SmallTextEncoder, init_args: {{vocab_size: 200, width: 8, heads: 2}}}}
data:
  class_path: SearchDataModule
  init_args: {{root: {root}, vocab_size: 200, max_length: 32, batch_size: 4}}
trainer: {{max_steps: 2, accelerator: cpu, logger: false, enable_progress_bar: false}}
"""


@pytest.fixture
def collection(tmp_path):
    beir(tmp_path / "collection", 12)
    (tmp_path / "small.yaml").write_text(CONFIG.format(root=tmp_path / "collection"))
    return tmp_path


@pytest.fixture
def tokenizer(tmp_path):
    pytest.importorskip("transformers")
    from transformers import BertTokenizerFast

    (tmp_path / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "this", "these", "fox", "sees", ".", "never"])
    )
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def test_idf_counts_documents_and_names_broken_lines(collection, tokenizer, capsys):
    out, corpus = collection / "idf.json", collection / "collection" / "corpus.jsonl"
    assert main(["idf", str(collection / "collection"), str(out), "--tokenizer", tokenizer, "--workers", "1"]) == 0
    table = json.loads(out.read_text())
    texts = [" ".join((one["title"], one["text"])).lower() for one in map(json.loads, corpus.read_text().splitlines())]
    n = sum("fox" in text.replace(".", " ").split() for text in texts)
    assert table["fox"] == pytest.approx(np.log1p((12 - n + 0.5) / (n + 0.5)), abs=1e-5)
    assert table["[CLS]"] == table["never"] == 1
    assert main(["idf", str(corpus), str(out), "--tokenizer", tokenizer]) == 2
    assert "exists" in capsys.readouterr().err
    corpus.write_text(corpus.read_text() + '{"_id": "x"}\n')
    words = ["idf", str(corpus), str(collection / "other.json"), "--tokenizer", tokenizer, "--workers", "1"]
    assert main(words) == 1
    assert f"{corpus}: line 13" in capsys.readouterr().err
    assert not (collection / "other.json").exists()
    assert main([*words, "--on-broken", "skip"]) == 0
    assert "1 lines are left out" in capsys.readouterr().out
    assert json.loads((collection / "other.json").read_text()) == table


@pytest.mark.thorough
def test_idf_is_the_same_by_several_processes(tmp_path, tokenizer):
    from lit_methods.cli.retrieval import count_corpus

    beir(tmp_path / "many", 2500)  # more than one chunk
    taken = []
    one = count_corpus(tmp_path / "many" / "corpus.jsonl", tokenizer, 1, 64)
    two = count_corpus(tmp_path / "many" / "corpus.jsonl", tokenizer, 2, 64, advance=taken.append)
    assert one[0] == two[0] == 2500
    assert np.array_equal(one[1], two[1])
    assert sum(taken) == (tmp_path / "many" / "corpus.jsonl").stat().st_size


def test_documents_for_anserini_and_opensearch_score_as_the_model(collection, capsys):
    from lit_methods.cli.retrieval import encode_all

    found = encode_all(str(collection / "small.yaml"))
    scores = (found.queries.vectors @ found.documents.vectors.T).toarray()
    assert main(["encode", str(collection / "small.yaml"), str(collection / "anserini"), "--format", "anserini"]) == 0
    documents = [json.loads(line) for line in (collection / "anserini" / "documents.jsonl").read_text().splitlines()]
    topics = [line.split("\t") for line in (collection / "anserini" / "topics.tsv").read_text().splitlines()]
    assert [one["id"] for one in documents] == [found.data.document_names[k] for k in found.documents.numbers]
    impacts = np.array([[sum(one["vector"].get(token, 0) for token in words.split(" ")) for one in documents] for _, words in topics])
    np.testing.assert_allclose(impacts / 100, scores, atol=0.005 * max(len(words.split(" ")) for _, words in topics) + 1e-6)
    assert scores.max() > 0
    assert main(["encode", str(collection / "small.yaml"), str(collection / "bulk.jsonl"), "--format", "opensearch"]) == 0
    lines = [json.loads(line) for line in (collection / "bulk.jsonl").read_text().splitlines()]
    assert [line["index"]["_id"] for line in lines[::2]] == [one["id"] for one in documents]
    token, weight = next(iter(lines[1]["passage_embedding"].items()))
    column = found.data.tokens.index(token)
    assert weight == pytest.approx(found.documents.vectors[0, column], abs=1e-6)
    assert main(["encode", str(collection / "small.yaml"), str(collection / "model"), "--format", "sentence-transformers"]) == 2
    assert "no tokenizer of transformers" in capsys.readouterr().err
    assert main(["encode", "x.yaml", str(collection / "y"), "--format", "lucene"]) == 2


def test_search_measures_each_system(collection, capsys):
    for library in ("qdrant_client", "bm25s", "pytrec_eval"):
        pytest.importorskip(library, reason=f'{library} is not installed: pip install "lit-methods[retrieval]"')
    assert main(["search", str(collection / "small.yaml"), "--out", str(collection / "out"), "--top-k", "5"]) == 0
    rows = json.loads((collection / "out" / "search.json").read_text())
    assert [row["system"] for row in rows] == ["bm25", "small"]
    for row in rows:
        assert 0 <= row["ndcg_at_10"] <= 1
        assert row["p50_ms"] <= row["p95_ms"]
        assert row["index_bytes"] > 0
        assert (collection / "out" / f"{row['system']}.trec").is_file()
    from lit_methods.cli.retrieval import encode_all
    from lit_methods.retrieval.index import VectorIndex

    found = encode_all(str(collection / "small.yaml"))
    index = VectorIndex(":memory:")
    for vectors in (lambda part: part.vectors, lambda part: part.vectors.toarray()):  # sparse, dense
        index.build(vectors(found.documents), [found.data.document_names[k] for k in found.documents.numbers])
        ranked = index.rank(vectors(found.queries), found.queries.numbers, found.documents.numbers, 5)
        np.testing.assert_allclose(ranked.scores, found.ranking.scores[:, :5], rtol=1e-5)
    assert index.size() is None
