"""Counts and Dice of segmentation beside what is computed by hand."""

import pytest
import torch

from lit_methods.tasks.segmentation.core import batch_dice, class_counts


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


@pytest.mark.parametrize("shape", [(), (5,), (4, 3), (2, 3, 2)], ids=str)
def test_dice_of_any_number_of_pixel_dimensions(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 4, *shape, dtype=torch.float64, generator=generator).requires_grad_()
    labels = torch.randint(0, 4, (6, *shape), generator=generator)
    labels.view(-1)[0] = -100
    p, counted = logits.softmax(1), (labels != -100)[:, None]
    target = torch.stack([labels == c for c in range(4)], 1).double()
    overlap, sizes = (part.transpose(0, 1).flatten(1).sum(1) for part in (p * target, (p * p * counted) + target))
    expected = (1 - (2 * overlap + 1e-5) / (sizes + 1e-5)).mean()
    loss = batch_dice(logits, labels)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in (loss, expected)), rtol=1e-10, atol=1e-14)
    assert batch_dice(logits[:0], labels[:0]) == 0, "no sample: nothing is missed"
