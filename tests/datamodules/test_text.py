"""TextDataModule: windows, layouts, tokens, broken files."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_methods.datamodules import TextDataModule
from lit_methods.datamodules.errors import BrokenRecordError, WrongRootError
from lit_methods.datamodules.text.text import Bytes, Characters, made_up_text


def module(**kwargs):
    found = TextDataModule(**({"block_size": 8, "batch_size": 4} | kwargs))
    found.setup("fit")
    return found


def test_made_up_sentences_agree():
    text = made_up_text(400, seed=3)
    assert text == made_up_text(400, seed=3) != made_up_text(400, seed=4)
    for line in text.splitlines():
        words = line.rstrip(".").split()
        verb = words[words.index("that") + 1] if "that" in words else next(w for w in words if w.rstrip("s") in VERBS)
        assert verb.endswith("s") == (words[0] == "this"), line
    assert any(" that " in line for line in text.splitlines())


VERBS = {"see", "hear", "follow", "greet", "paint", "need"}


def test_windows_lie_side_by_side_and_labels_follow(tmp_path):
    (tmp_path / "text.txt").write_text("".join(chr(97 + i % 26) for i in range(1000)))
    text = module(root=tmp_path / "text.txt")
    assert text.vocab_size == 27
    windows = text.train_set
    assert len(windows) == (900 - 1) // 8
    joined = torch.cat([windows[0, i]["input_ids"] for i in range(len(windows))])
    assert torch.equal(joined, torch.arange(len(joined)) % 26 + 1)
    assert torch.equal(windows[0, 3]["labels"], (torch.arange(25, 33)) % 26 + 1)
    batch = next(iter(text.train_dataloader()))
    assert {name: (tuple(value.shape), value.dtype) for name, value in batch.items()} == {
        "input_ids": ((4, 8), torch.int64),
        "labels": ((4, 8), torch.int64),
    }
    assert torch.equal(batch["input_ids"] % 26 + 1, batch["labels"])


def test_tokens():
    coder = Characters("cab")
    assert coder.vocab_size == 4
    assert coder.encode("abcz\U0001f600a").tolist() == [1, 2, 3, 0, 0, 1], "unknown characters are token 0"
    assert Bytes().encode("aé").tolist() == [97, 195, 169]


def test_a_folder_of_splits_and_one_that_lacks_some(tmp_path):
    (tmp_path / "wiki.train.tokens").write_text("abc" * 20)
    (tmp_path / "wiki.valid.tokens").write_text("abd" * 20)
    text = module(root=tmp_path)
    assert text.vocab_size == 4
    assert text.val_set.tokens.tolist()[:3] == [1, 2, 0], "characters are those of the training text"
    assert text.test_set.tokens is text.val_set.tokens
    (tmp_path / "wiki.train.tokens").unlink()
    evaluation = module(root=tmp_path)
    assert len(evaluation.val_dataloader()) == 2
    with pytest.raises(RuntimeError, match=r"has no train data: root=.* has none"):
        evaluation.train_dataloader()


@pytest.mark.parametrize("kind", ["uint16", "uint32"])
def test_token_files(tmp_path, kind):
    np.arange(50, dtype=kind).tofile(tmp_path / "train.bin")
    np.arange(20, dtype=kind).tofile(tmp_path / "val.bin")
    (tmp_path / "meta.json").write_text(json.dumps({"vocab_size": 40, "dtype": kind}))
    text = module(root=tmp_path)
    assert text.vocab_size == 40
    assert text.train_set[0, 1]["labels"].tolist() == list(range(9, 17))
    assert isinstance(text.train_set.tokens, np.memmap)
    with pytest.raises(BrokenRecordError, match=r"train\.bin: token 40: 40, but vocab_size is 40"):
        text.train_set[0, 4]
    (tmp_path / "train.bin").write_bytes(b"\0" * 101)
    with pytest.raises(BrokenRecordError, match=r"train\.bin: size: 101 bytes"):
        module(root=tmp_path)
    (tmp_path / "meta.json").write_text("{}")
    with pytest.raises(BrokenRecordError, match=r"meta\.json: vocab_size"):
        module(root=tmp_path)


def test_broken_and_missing_files(tmp_path):
    with pytest.raises(WrongRootError, match="does not exist"):
        module(root=tmp_path / "nowhere")
    with pytest.raises(WrongRootError, match=r"neither train\.txt"):
        module(root=tmp_path)
    (tmp_path / "train.txt").write_bytes(b"ab\xffcd")
    with pytest.raises(BrokenRecordError, match=r"train\.txt: byte 2"):
        module(root=tmp_path)
    (tmp_path / "train.txt").write_text("")
    with pytest.raises(BrokenRecordError, match="empty"):
        module(root=tmp_path)
    (tmp_path / "train.txt").write_text("abc")
    with pytest.raises(ValueError, match="lower block_size"):
        module(root=tmp_path)
    (tmp_path / "my.train.txt").write_text("abc" * 9)
    with pytest.raises(WrongRootError, match="several files for train"):
        module(root=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"level": "word"}, "level is 'word': give one of char, byte, tokenizer"),
        ({"level": "tokenizer"}, "takes its folder"),
        ({"block_size": 0}, "block_size is 0"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        TextDataModule(**arguments)


def test_a_tokenizer_of_transformers(tmp_path):
    pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"[UNK]": 0, "the": 1, "cat": 2}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]").save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "train.txt").write_text("the cat the dog " * 9)
    text = module(root=tmp_path / "train.txt", level="tokenizer", tokenizer=tmp_path / "tokenizer", block_size=1)
    assert text.vocab_size == 3
    assert text.train_set.tokens[:4].tolist() == [1, 2, 1, 0]


@pytest.mark.skipif("LIT_METHODS_TEST_DATA" not in os.environ, reason="LIT_METHODS_TEST_DATA names no folder of real data")
def test_real_text():
    root = Path(os.environ["LIT_METHODS_TEST_DATA"])
    shakespeare = module(root=root / "tinyshakespeare" / "input.txt", block_size=64)
    assert shakespeare.vocab_size == 66
    assert len(shakespeare.train_set) == (int(0.9 * 1115394) - 1) // 64
    wiki = module(root=root / "wikitext-2", level="byte", block_size=64)
    assert wiki.train_set is None
    assert wiki.val_set is not None
    assert len(wiki.test_set.tokens) == 1256449
