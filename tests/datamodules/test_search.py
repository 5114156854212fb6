"""Collections in BEIR's and TREC's layout: what is read, what is refused, what is skipped and counted."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_methods.datamodules import SearchDataModule, SynonymSearchDataModule
from lit_methods.datamodules.errors import BrokenRecordError, MissingFileError, WrongRootError
from lit_methods.datamodules.retrieval.collection import Broken, Texts, read_collection
from lit_methods.datamodules.retrieval.fake import beir, examples, trec
from lit_methods.datamodules.retrieval.tokens import Words

REAL = os.environ.get("LIT_METHODS_TEST_DATA")


def replace_line(file, number, text):
    lines = file.read_bytes().splitlines()
    lines[number - 1] = text if isinstance(text, bytes) else text.encode()
    file.write_bytes(b"\n".join(lines) + b"\n")


def record(**fields):
    return json.dumps(fields)


BAD = {  # file, line, what stands there, what the message says behind the file
    "broken JSON": ("corpus.jsonl", 3, '{"_id": "d2", "text": ', "line 3: is no JSON"),
    "a list": ("corpus.jsonl", 3, "[1, 2]", "line 3: is a list"),
    "latin-1": ("corpus.jsonl", 3, '{"_id": "d2", "text": "caf\xe9"}'.encode("latin-1"), "line 3: byte 26 isn't UTF-8"),
    "no text": ("corpus.jsonl", 3, record(_id="d2", contents="x"), "line 3, text: document 'd2' has none: found _id, contents"),
    "no name": ("corpus.jsonl", 3, record(text="x"), "line 3, _id: None, expected a name"),
    "empty": ("corpus.jsonl", 3, record(_id="d2", title=" ", text=""), "line 3, text: document 'd2' is empty"),
    "a number for text": ("corpus.jsonl", 3, record(_id="d2", text=5), "line 3, text: is a int in document 'd2'"),
    "a name twice": ("corpus.jsonl", 3, record(_id="d1", text="x"), "line 3, _id: 'd1' stands twice"),
    "a blank in a name": ("corpus.jsonl", 3, record(_id="d 2", text="x"), "line 3, _id: 'd 2' has a blank"),
    "an empty query": ("queries.jsonl", 2, record(_id="q1", text="  "), "line 2, text: query 'q1' is empty"),
    "an unknown document": ("qrels/test.tsv", 2, "q2\tnowhere\t1", "line 2, document: 'nowhere' is no document"),
    "an unknown query": ("qrels/test.tsv", 2, "nobody\td2\t1", "line 2, query: 'nobody' is no query"),
    "a grade in words": ("qrels/test.tsv", 2, "q2\td2\tyes", "line 2, score: 'yes', expected a whole number"),
    "a grade without end": ("qrels/test.tsv", 2, "q2\td2\t1e300", "line 2, score: '1e300', expected a whole number of 32 bits"),
    "digits without end": ("corpus.jsonl", 3, '{"_id": "d2", "text": ' + "1" * 5000 + "}", "line 3: is no JSON"),
    "half a grade": ("qrels/test.tsv", 2, "q2\td2\t0.5", "line 2, score: '0.5'"),
    "too few columns": ("qrels/test.tsv", 2, "q2 d2 1", "line 2: has 1 columns"),
    "two grades": ("qrels/test.tsv", 3, "q2\td2\t0", "line 3, score: q2 d2 is graded 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_broken_record_is_named_or_skipped_and_counted(name, tmp_path):
    file, line, text, problem = BAD[name]
    beir(tmp_path, 9)
    whole = read_collection(tmp_path, Broken())
    replace_line(tmp_path / file, line, text)
    with pytest.raises(BrokenRecordError) as error:
        read_collection(tmp_path, Broken())
    assert str(error.value).startswith(f"{tmp_path / file}: {problem}")
    broken = Broken("skip")
    found = read_collection(tmp_path, broken)
    assert broken.counts[str(tmp_path / file)] == 1
    assert problem.partition(":")[0] in broken.first
    lost = len(whole.document_names) - len(found.document_names), len(whole.query_names) - len(found.query_names)
    assert lost == {"corpus.jsonl": (1, 0), "queries.jsonl": (0, 1)}.get(file, (0, 0))
    with pytest.warns(UserWarning, match="records are left out"):
        broken.report()


def test_files_that_are_not_there_or_hold_nothing_are_errors(tmp_path):
    with pytest.raises(WrongRootError, match="is no collection: give a folder with BEIR's"):
        read_collection(tmp_path, Broken())
    beir(tmp_path, 9)
    (tmp_path / "queries.jsonl").unlink()
    with pytest.raises(WrongRootError, match=r"has no queries.jsonl"):
        read_collection(tmp_path, Broken())
    beir(tmp_path, 9)
    for name, content, problem in (
        ("qrels/test.tsv", "query-id\tscore\n", "header: the column corpus-id is missing"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\n", "no document is relevant"),
        ("corpus.jsonl", "", "the file has no document"),
    ):
        beir(tmp_path, 9)
        (tmp_path / name).write_text(content)
        with pytest.raises(BrokenRecordError, match=problem):
            read_collection(tmp_path, Broken("skip"))
    with pytest.raises(WrongRootError, match="is no collection"):
        SearchDataModule(tmp_path / "none").check_root()
    beir(tmp_path, 9)
    with pytest.raises(WrongRootError, match="has judgements dev, test, train, and the splits are a, b, c"):
        SearchDataModule(tmp_path, train_split="a", val_split="b", test_split="c").setup("fit")
    with pytest.raises(MissingFileError, match="no such file"):
        SearchDataModule(tmp_path, examples=tmp_path / "none.jsonl").setup("fit")


def test_names_may_look_like_paths(tmp_path):
    beir(tmp_path, 9)
    for name in ("corpus.jsonl", "qrels/train.tsv", "qrels/dev.tsv", "qrels/test.tsv"):
        file = tmp_path / name
        file.write_text(file.read_text().replace("d2", "../../d/2"))
    data = SearchDataModule(tmp_path)
    data.setup("fit")
    assert "../../d/2" in data.document_names
    assert not list(tmp_path.rglob("2"))


def test_trec_and_beir_give_the_same_kind_of_collection(tmp_path):
    trec(tmp_path, 8)
    found = read_collection(tmp_path, Broken())
    assert found.document_names == [str(k) for k in range(8)]
    assert found.query_names == [str(k) for k in range(4)]
    assert found.judgements["test"].tolist() == [[k, k, 1] for k in range(4)]
    assert found.queries[0].lower() == found.document(0)[: len(found.queries[0])]
    file = tmp_path / "doc-text.trec"
    file.write_text(file.read_text().rpartition("</DOC>")[0])
    with pytest.raises(BrokenRecordError, match=r"<DOC> isn't closed: the file is truncated"):
        read_collection(tmp_path, Broken())
    trec(tmp_path, 8)
    (tmp_path / "qrels").write_text("0 0 0\n")
    with pytest.raises(BrokenRecordError, match="line 1: has 3 columns"):
        read_collection(tmp_path, Broken())


@pytest.mark.parametrize("name", ["qrels/train.tsv", "examples.jsonl"])
def test_what_is_no_file_is_not_waited_for(name, tmp_path):
    beir(tmp_path, 9)
    examples(tmp_path / "examples.jsonl", 6)
    (tmp_path / name).unlink()
    for make in (os.mkfifo, os.mkdir):
        make(tmp_path / name)
        with pytest.raises(BrokenRecordError, match=rf"{name}: file: is a (named pipe|folder), expected a file"):
            SearchDataModule(tmp_path, tmp_path / "examples.jsonl").setup("fit")
        (tmp_path / name).unlink() if make is os.mkfifo else (tmp_path / name).rmdir()


BAD_EXAMPLES = {
    '{"query": " ", "pos": "x"}': "line 2, query: ' ', expected text",
    '{"query": "a"}': "line 2, pos, negs: expected texts",
    '{"query": "a", "pos": "b", "negs": [""]}': "line 2, pos, negs: expected texts",
    '{"query": "a", "docs": ["b", "c"], "scores": [1]}': "line 2, scores: expected 2 finite numbers",
    '{"query": "a", "docs": ["b", "c"], "scores": [1, NaN]}': "line 2, scores: expected 2 finite numbers",
    '{"query": "a", "docs": ["b", "c"], "scores": [1, 1e300]}': "line 2, scores: expected 2 finite numbers",
    '{"query": "a", "docs": ["b", "c"], "scores": [1, 1' + "0" * 30 + "0" * 30 + "]}": "line 2, scores: expected 2 finite numbers",
    '{"query": "a", "docs": ["b"], "scores": [1]}': "line 2, docs: has 1 documents, and docs_per_query is 2",
}


@pytest.mark.parametrize("line", BAD_EXAMPLES)
def test_a_broken_example_is_named_or_skipped(line, tmp_path):
    beir(tmp_path, 9)
    examples(tmp_path / "x.jsonl", 6)
    replace_line(tmp_path / "x.jsonl", 2, line)
    with pytest.raises(BrokenRecordError) as error:
        SearchDataModule(tmp_path, tmp_path / "x.jsonl", docs_per_query=2).setup("fit")
    assert str(error.value).startswith(f"{tmp_path / 'x.jsonl'}: {BAD_EXAMPLES[line]}")
    data = SearchDataModule(tmp_path, tmp_path / "x.jsonl", docs_per_query=2, on_broken="skip")
    with pytest.warns(UserWarning, match="1 records are left out"):
        data.setup("fit")
    assert len(data.train_set) == 5


def test_examples_bring_their_scores_best_document_first(tmp_path):
    beir(tmp_path, 9)
    lines = [
        record(query="q", docs=["low word", "high word", "middle word"], scores=[1, 9, 5]),
        record(query="r", docs=["a", "b", "c"], scores=[3, 2, 1]),
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    data = SearchDataModule(tmp_path, tmp_path / "x.jsonl", docs_per_query=2, batch_size=2, texts=True)
    data.setup("fit")
    seen = {tuple(data.train_set.example(epoch, 0).documents) for epoch in range(20)}
    assert seen == {("high word", "low word"), ("high word", "middle word")}
    batch = next(iter(data.train_dataloader()))
    assert batch["scores"].shape == (2, 2)
    assert batch["scores"][batch["query_text"].index("q"), 0] == 9
    assert len(batch["document_text"]) == 4
    (tmp_path / "x.jsonl").write_text("\n".join([lines[0], record(query="r", pos="a", negs=["b"])]))
    with pytest.raises(BrokenRecordError, match="some lines have scores and some don't"):
        SearchDataModule(tmp_path, tmp_path / "x.jsonl", docs_per_query=2).setup("fit")


def test_drawn_negatives_are_never_relevant(tmp_path):
    beir(tmp_path, 12)
    data = SearchDataModule(tmp_path, train_from="judgements", docs_per_query=8)
    data.setup("fit")
    data.train_set.pairs = data.train_set.pairs[:1]
    own = data.train_set.example(0, 0).documents[0]
    drawn = {text for epoch in range(40) for text in data.train_set.example(epoch, 0).documents[1:]}
    assert own not in drawn
    assert len(drawn) == 11


def test_held_out_queries_are_not_trained_on_and_validation_ranks_what_it_is_told(tmp_path):
    beir(tmp_path, 30, ("test",))
    data = SearchDataModule(tmp_path, train_from="judgements", train_share=0.5, val_documents=20, seed=1)
    data.setup("fit")
    held = set(data.val_set.numbers[data.val_set.is_query].tolist())
    assert held.isdisjoint(data.train_set.pairs[:, 0].tolist())
    assert len(held) == 15 == len(data.train_set)
    assert (~data.val_set.is_query).sum() == 20
    assert (~data.test_set.is_query).sum() == 30


def test_titles_are_queries_and_stand_in_the_document_once(tmp_path):
    beir(tmp_path, 5)
    lines = [json.loads(line) for line in (tmp_path / "corpus.jsonl").read_text().splitlines()]
    lines[0]["text"] = f"{lines[0]['title']} {lines[0]['text']}"  # as in Cranfield
    (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = SearchDataModule(tmp_path)
    data.setup("fit")
    assert data.all_documents[0].count(lines[0]["title"]) == 1
    example = data.train_set.example(0, 0)
    assert example.query == lines[0]["title"]
    assert lines[0]["title"] not in example.documents[0]


def test_a_batch_of_an_evaluation_mixes_both_and_brings_the_judgements():
    data = SynonymSearchDataModule(num_documents=40, eval_batch_size=10)
    data.setup("fit")
    batches = list(data.val_dataloader())
    assert all(0 < batch["is_query"].sum() < 10 for batch in batches[:-1])
    seen = torch.cat([batch["index"][batch["is_query"]] for batch in batches]).tolist()
    assert sorted(seen) == list(range(30, 40))
    judged = torch.cat([batch["judgements"] for batch in batches]).tolist()
    assert sorted(judged) == sorted(data.judgements.tolist())
    for query, document, _ in judged:  # the words of a query's concepts have the document's topic
        words = [t for t in data.all_documents[document] if t >= 40]
        topics = [(t - 40) // 9 for t in words]
        assert max(map(topics.count, topics)) >= 4
        assert query >= 30


def test_words_of_a_text():
    words = Words(["The wing, the WING; a slip-stream", "wing"], 5)
    assert words.tokens == ["[PAD]", "[UNK]", "wing", "the", "a"]
    assert words.encode(["A wing flies", "..."], 9) == [[4, 2, 1], [1]]


def test_packed_texts():
    texts = Texts(["a", "", "é\ud800"])
    assert [texts[k] for k in range(3)] == ["a", "", "é?"]
    assert texts[-3] == "a"
    with pytest.raises(IndexError):
        texts[3]


@pytest.mark.skipif(REAL is None, reason="LIT_METHODS_TEST_DATA names no folder with real data")
def test_real_collections():
    assert REAL is not None
    data = SearchDataModule(Path(REAL) / "cranfield", on_broken="skip")
    with pytest.warns(UserWarning, match="3 records are left out: 2 in"):
        data.setup("fit")
    assert (len(data.document_names), len(data.query_names), len(data.judgements)) == (1398, 225, 1836)


@pytest.mark.thorough
@pytest.mark.skipif(REAL is None, reason="LIT_METHODS_TEST_DATA names no folder with real data")
def test_a_larger_real_collection():
    assert REAL is not None
    vaswani = SearchDataModule(Path(REAL) / "vaswani", train_from="judgements")
    vaswani.setup("test")
    assert (len(vaswani.document_names), len(vaswani.query_names), len(vaswani.judgements)) == (11429, 93, 2083)
    assert vaswani.train_set is None
    assert np.isfinite(vaswani.idf.numpy()).all()
