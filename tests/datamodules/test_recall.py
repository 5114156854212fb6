"""Made-up lists of keys with values: answers follow from the pairs."""

import pytest
import torch

from lit_methods.datamodules import KeyValueRecallDataModule


@pytest.mark.parametrize("filler", [0, 3])
def test_answers_are_the_values_of_the_keys_that_are_asked_for(filler):
    data = KeyValueRecallDataModule(pairs=5, queries=3, keys=9, values=4, filler=filler, num_train=40, num_val=8, batch_size=4)
    data.setup("fit")
    assert data.vocab_size == 13 + (filler > 0)
    for part in (data.train_set, data.val_set):
        for row in part.tensors["input_ids"].tolist():
            listed, asked, answers = row[: 2 * (5 + filler)], row[-6:-3], row[-3:]
            pairs = [pair for pair in zip(listed[::2], listed[1::2], strict=True) if pair[0] != 13]
            assert len(dict(pairs)) == 5
            assert len(set(asked)) == 3
            assert [dict(pairs)[key] for key in asked] == answers
            assert all(9 <= value < 13 for value in answers)


def test_seeds_decide_and_bad_numbers_are_named():
    def drawn(seed):
        data = KeyValueRecallDataModule(num_train=4, num_val=4, seed=seed)
        data.setup("fit")
        return data.train_set.tensors["input_ids"]

    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))
    with pytest.raises(ValueError, match="pairs is 40: give at most as many as there are keys"):
        KeyValueRecallDataModule(pairs=40)
    with pytest.raises(ValueError, match="queries is 17: give at most as many as there are pairs"):
        KeyValueRecallDataModule(queries=17)
