"""Text whose beginning stands once more at the end."""

import pytest
import torch

from lit_methods.datamodules import RepeatedTextDataModule, TextDataModule


def test_the_end_is_the_beginning_and_the_rest_is_the_text():
    data, plain = RepeatedTextDataModule(block_size=24, repeated=8, batch_size=4), TextDataModule(block_size=16)
    for one in (data, plain):
        one.setup("fit")
        one.setup("test")
    assert data.vocab_size == plain.vocab_size
    for ours, theirs in ((data.train_set, plain.train_set), (data.test_set, plain.test_set)):
        assert len(ours) == len(theirs)
        tokens = ours[3]["input_ids"]
        assert torch.equal(tokens[:16], theirs[3]["input_ids"])
        assert torch.equal(tokens[16:], tokens[:8])
    assert data.decode(tokens.tolist())[:8] == data.decode(tokens.tolist())[16:]
    assert next(iter(data.val_dataloader()))["input_ids"].shape == (4, 24)
    assert data.hparams["block_size"] == 24


def test_bad_numbers_are_named():
    with pytest.raises(ValueError, match=r"repeated is 13: give at most half of block_size in \[1, 12\]"):
        RepeatedTextDataModule(block_size=24, repeated=13)


def test_tokens_become_text_again(tmp_path):
    text = TextDataModule(block_size=16)
    text.setup("fit")
    window = text.train_set[0]["input_ids"].tolist()
    assert text.coder.encode(text.decode(window)).tolist() == window
    assert text.decode([1000]) == "\ufffd"
    (tmp_path / "bytes.txt").write_text("häuser " * 40, encoding="utf-8")
    read = TextDataModule(tmp_path / "bytes.txt", level="byte", block_size=8)
    read.setup("fit")
    assert read.decode(list("hä".encode())) == "hä"
    assert read.decode([104, 999]) == "h\ufffd"
