"""Instructions with answers: what counts in the loss, how batches are filled up, and files that can't be used."""

import json
from pathlib import Path

import pytest
import torch

from lit_methods.datamodules import InstructionDataModule
from lit_methods.datamodules.errors import BrokenRecordError, WrongRootError

RECORDS = [{"instruction": "Add.", "input": f"{n} {n}", "output": str(2 * n)} for n in range(12)]


def data(root: Path, records: object = RECORDS, **options: object) -> InstructionDataModule:
    file = root / "made.json"
    file.write_text(records if isinstance(records, str) else json.dumps(records))
    return InstructionDataModule(file, **{"num_val": 2, "batch_size": 5, "prompt": "{instruction} {input} = "} | options)


def test_the_answer_alone_counts(tmp_path):
    module = data(tmp_path)
    module.setup("fit")
    assert (len(module.train_set), len(module.val_set), module.vocab_size) == (10, 2, 256)
    sample = module.train_set[7]
    assert bytes(sample["input_ids"].tolist()) == b"Add. 7 7 = 1"
    counted = sample["labels"] != -100
    assert bytes(sample["labels"][counted].tolist()) == b"14"
    assert counted.nonzero().flatten().tolist() == [10, 11]  # where each of them is to be predicted
    batch = module.train_set.collate([module.train_set[1], sample])
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 12)
    assert batch["labels"][0, 11] == -100
    assert torch.equal(batch["input_ids"][1], sample["input_ids"])


def test_long_samples_are_cut_off(tmp_path):
    module = data(tmp_path, max_length=11)
    module.setup("fit")
    assert bytes(module.train_set[7]["input_ids"].tolist()) == b"Add. 7 7 = "
    assert bytes(module.train_set[7]["labels"][-1:].tolist()) == b"1"


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ("{", "JSON: can't be read"),
        ({"a": 1}, "is a dict, expected a list of records"),
        ([{"instruction": "a"}], "record 0, output: is missing or empty"),
        ([{"instruction": 3, "output": "b"}], "record 0, instruction: is missing or empty"),
        (RECORDS[:2], "2 records, of which num_val=2 are held out: lower it"),
    ],
)
def test_files_that_cannot_be_used(records, message, tmp_path):
    with pytest.raises(BrokenRecordError, match=message):
        data(tmp_path, records).setup("fit")


def test_a_folder_with_one_file(tmp_path):
    data(tmp_path)
    module = InstructionDataModule(tmp_path, num_val=2)
    module.setup("fit")
    assert len(module.train_set) == 10
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(WrongRootError, match="has 2 files"):
        InstructionDataModule(tmp_path).setup("fit")


def test_without_a_root_there_are_sums():
    module = InstructionDataModule(num_val=3)
    module.setup("fit")
    assert (len(module.train_set), len(module.val_set)) == (200, 3)
    batch = next(iter(module.train_dataloader()))
    answer = bytes(batch["labels"][0][batch["labels"][0] >= 0].tolist())
    assert 0 <= int(answer) <= 18


def test_wrong_arguments(tmp_path):
    with pytest.raises(WrongRootError, match="has 0 files: give a JSON list"):
        InstructionDataModule(tmp_path).setup("fit")
    with pytest.raises(ValueError, match=r"it must hold \{instruction\}"):
        data(tmp_path, prompt="answer: ")
    with pytest.raises(ValueError, match="max_length is 1"):
        data(tmp_path, max_length=1)
