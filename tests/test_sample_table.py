"""The table of samples: repeated samples, its size, ranks."""

import pytest
import torch

from helpers import run_two_processes
from lit_methods.sample_table import SampleTable, last_of_each


def test_a_repeated_sample_has_its_last_row():
    table = SampleTable(5, 2, fill=0.5)
    index = torch.tensor([3, 1, 3, 0])
    assert last_of_each(index, 5).tolist() == [2, 1, 2, 3]
    rows = torch.arange(8.0).reshape(4, 2)
    table.write(index, rows)
    assert table.rows.tolist() == [[6, 7], [2, 3], [0.5, 0.5], [4, 5], [0.5, 0.5]]
    assert torch.equal(table.read(torch.tensor([3, 1])), rows[[2, 1]])
    table.write(torch.empty(0, dtype=torch.int64), torch.empty(0, 2))
    assert table.rows[3].tolist() == [4, 5]


def test_a_table_of_unknown_size_takes_the_checkpoints():
    saved = SampleTable(4, 1, fill=1.0)
    saved.write(torch.tensor([2]), torch.tensor([[7.0]]))
    table = SampleTable(0, 1)
    table.load_state_dict(saved.state_dict())
    assert torch.equal(table.rows, saved.rows)
    table.resize(4)
    assert table.rows[2] == 7
    table.resize(6)
    assert table.rows.tolist() == [[0.0]] * 6
    with pytest.raises(RuntimeError, match="size mismatch"):
        table.load_state_dict(saved.state_dict())


def test_a_wrong_index_is_named():
    table = SampleTable(4)
    for index, problem in ((torch.tensor([0, 4]), "from 0 to 4"), (torch.tensor([0.0]), "float32"), (torch.tensor([[1]]), r"\(1, 1\)")):
        with pytest.raises(ValueError, match=problem):
            table.check(index)
    table.check(torch.tensor([0, 3]))


def write_on_two_ranks():
    rank = torch.distributed.get_rank()
    table = SampleTable(6, 1)
    index = torch.tensor([0, 1, 2]) if rank == 0 else torch.tensor([4, 2])  # unequal numbers, and 2 on both
    table.write(index, 10.0 * (rank + 1) + index[:, None].float(), gather=True)
    return table.rows


def test_ranks_have_one_table():
    one, other = run_two_processes(write_on_two_ranks)
    assert torch.equal(one, other)
    assert one[:, 0].tolist() == [10, 11, 22, 0, 24, 0]
