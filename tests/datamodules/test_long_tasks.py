"""Questions about long texts: their length, their answers, and that they follow from the seed."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_methods.datamodules import LongTasksDataModule, TokenTasksDataModule
from lit_methods.datamodules.errors import BrokenRecordError, WrongRootError
from lit_methods.datamodules.text.long_tasks import MAKERS
from lit_methods.datamodules.text.text import Bytes
from lit_methods.tasks.language.answers import answer_scores


def context(text: str) -> str:
    return text.partition("<context>\n")[2].partition("\n</context>")[0]


@pytest.mark.parametrize("task", MAKERS)
def test_prompts_have_the_length_that_was_asked_for(task: str) -> None:
    length = 16_000 if task == "ruler_cwe" else 6000
    data = LongTasksDataModule(task=task, length=length, samples=3)  # type: ignore[arg-type]
    data.setup("test")
    batch = next(iter(data.test_dataloader()))
    prompts = data.decode(batch["prompt_ids"])
    assert batch["prompt_ids"].shape == batch["prompt_mask"].shape
    assert 0.95 * length <= batch["prompt_mask"].sum() <= length
    assert prompts[0].count("Question: ") == 2
    again = LongTasksDataModule(task=task, length=length, samples=3)  # type: ignore[arg-type]
    again.setup("test")
    assert torch.equal(again.test_set[0]["prompt_ids"], data.test_set[0]["prompt_ids"])
    assert not torch.equal(data.test_set[1]["prompt_ids"][:800], data.test_set[0]["prompt_ids"][:800])
    gold = batch["answer"][0]
    reply = {"ruler_cwe": "\n".join(f"{number}. {word}" for number, word in enumerate(gold.split(","), 1))}.get(task, gold)
    if task == "ruler_niah":
        reply = "\n".join("{}. The answer for {} is {}.".format(number, *pair.split("|")) for number, pair in enumerate(gold.split(";"), 1))
    assert answer_scores(task, [f"<answer>{reply}</answer>"], [gold])[0] == 1
    assert not answer_scores(task, ["<answer>0</answer>"], [gold])[0]


def test_the_answers_follow_from_the_text() -> None:
    """Found by reading it with a rule of the test's own."""
    rng = np.random.default_rng(0)
    text, question, _, gold = MAKERS["ruler_niah"](rng, 30)
    known = dict(re.findall(r"key (\S+) is: (\S+)\.", text))
    assert len(known) == 30
    assert [tuple(pair.split("|")) for pair in gold.split(";")] == [
        (key, known[key]) for key in re.findall(r"\w{8}(?:-\w{8}){3}", question)
    ]
    text, question, _, gold = MAKERS["ruler_vt"](rng, 50)
    value = re.findall(r"\d{5}", question)[0]
    same = set(re.findall(rf"VAR (\w+) = {value}", text))
    for _ in range(4):
        same |= {new for new, old in re.findall(r"VAR (\w+) = VAR (\w+)", text) if old in same}
    assert same == set(gold.split())
    assert len(same) == 5
    text, _, _, gold = MAKERS["ruler_cwe"](rng, 20)
    words = re.findall(r"\d+\. (\w+)", text)
    assert {word for word in words if words.count(word) == 30} == set(gold.split(","))
    text, question, _, gold = MAKERS["story_multihop"](rng, 20)
    bought = re.findall(r"bought the (.*?)\.", text)
    assert len(set(bought)) == 20
    assert gold == bought[bought.index(re.findall(r"buying the (.*)\?", question)[0]) - 1]
    text, _, _, gold = MAKERS["story_filtering"](rng, 20)
    empty = [number for number, chapter in enumerate(text.split("Chapter ")[1:], 1) if "bought nothing" in chapter]
    assert ", ".join(map(str, empty)) == gold
    text, question, _, gold = MAKERS["story_retrieval"](rng, 20)
    chapters = text.split("Chapter ")[1:]
    for asked, answer in zip(question.splitlines(), gold.splitlines(), strict=True):
        assert answer.partition(". ")[2] in chapters[int(re.findall(r"chapter (\d+)", asked)[0]) - 1]
    sold = re.findall(r"sold the (.*?)\.", text)
    assert sold
    assert len(set(sold)) == len(sold)


def test_documents_and_training() -> None:
    with pytest.raises(ValueError, match="give root"):
        LongTasksDataModule(task="quality")


def test_documents_are_read(tmp_path: Path) -> None:
    (tmp_path / "quality.jsonl").write_text(
        "\n".join(
            json.dumps(
                {"document": f"This is text {number}. " * 20, "question": f"Which one is {number}?", "answer": "B", "choices": ["x", "y"]}
            )
            for number in range(30)
        )
    )
    data = LongTasksDataModule(task="quality", root=tmp_path, length=4000, samples=5)
    data.setup("test")
    prompt = data.decode(data.test_set[2]["prompt_ids"][None])[0]
    assert 3000 < len(prompt) <= 4000
    assert "This is text 2." in context(prompt)
    assert "B. y" in prompt
    batch = next(iter(data.train_dataloader()))
    learned = batch["labels"][batch["labels"] != -100]
    assert bytes(learned.tolist()) == b"<answer>B</answer>"
    (tmp_path / "quality.jsonl").write_text('{"document": "a"}')
    with pytest.raises(BrokenRecordError, match="line 1"):
        LongTasksDataModule(task="quality", root=tmp_path).setup("test")
    for content, problem in ((b"", "no question"), (b'{"document": "caf\xe9"}', "isn't UTF-8"), (b"[" * 100_000, "line 1: no JSON")):
        (tmp_path / "quality.jsonl").write_bytes(content)
        with pytest.raises(BrokenRecordError, match=rf"quality\.jsonl: .*{problem}"):
            LongTasksDataModule(task="quality", root=tmp_path).setup("test")
    with pytest.raises(WrongRootError, match=r"toefl\.jsonl"):
        LongTasksDataModule(task="toefl", root=tmp_path).check_root("test")
    short = LongTasksDataModule(length=50)
    short.setup("test")
    with pytest.raises(ValueError, match="raise it"):
        short.test_set[0]
    assert Bytes().vocab_size == short.vocab_size


@pytest.mark.parametrize("task", ["retrieval", "majority", "counting"])
def test_answers_of_token_tasks(task: str) -> None:
    """Counted from the tokens."""
    data = TokenTasksDataModule(tasks=[task], length=68, eval_questions=4, questions=16, train_lengths=[24, 64], num_val=8)  # type: ignore[list-item]
    data.setup("fit")
    for dataset, lengths in ((data.train_set, {24, 64}), (data.val_set, {68})):
        samples = [dataset[index] for index in range(8)]
        assert {len(sample["input_ids"]) for sample in samples} <= lengths
        for sample in samples:
            tokens, labels = sample["input_ids"].tolist(), sample["labels"].tolist()
            asked = [place for place, label in enumerate(labels) if label != -100]
            facts = [divmod(token - 74, 8) for token in tokens[: asked[0]]]  # behind 2 others, 64 keys and 8 values
            assert all(0 <= key < 64 for key, _ in facts)
            for place in asked:
                found = [value for key, value in facts if task == "counting" or key == tokens[place] - 2]
                assert found.count(labels[place] - 66) == max(map(found.count, found))
    batch = next(iter(data.train_dataloader()))
    assert torch.equal(batch["attention_mask"] == 0, batch["input_ids"] == 0)
    assert not torch.equal(data.train_set[0, 0]["input_ids"], data.train_set[1, 0]["input_ids"])
    with pytest.raises(ValueError, match="it must be 3 to 64"):
        TokenTasksDataModule(length=200)
