"""Counts of segmentation beside a count by hand."""

import pytest
import torch

from lit_methods.tasks.segmentation.core import class_counts


@pytest.mark.parametrize("ignore_index", [255, 2, -1])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_counts_equal_those_of_a_loop_with_values_outside_and_ignored_ones(ignore_index, dtype):
    low, high, classes = (0, 9, 4) if dtype is torch.uint8 else (-3, 9, 4)
    prediction, labels = (torch.randint(low, high, (3, 7, 8)).to(dtype) for _ in range(2))
    before = prediction.clone(), labels.clone()
    kept = labels != ignore_index
    expected = [
        [int((part & kept).sum()) for part in (((labels == c) & (prediction == c)), prediction == c, labels == c)] for c in range(classes)
    ]
    assert class_counts(prediction, labels, classes, ignore_index).T.tolist() == expected
    assert torch.equal(prediction, before[0]), "the arguments stay as they are"
    assert torch.equal(labels, before[1])


def test_counts_of_nothing_are_zero():
    empty = torch.zeros(0, dtype=torch.int64)
    assert class_counts(empty, empty, 3).tolist() == [[0] * 3] * 3
