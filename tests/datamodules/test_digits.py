"""Digits: split, subset, label noise, order."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from lit_methods.datamodules import DigitsDataModule
from lit_methods.datamodules.vision.base import redraw_labels


def prepared(**kwargs):
    data = DigitsDataModule(**kwargs)
    data.setup("fit")
    return data


def all_of(dataset):
    samples = [dataset[(0, index)] for index in range(len(dataset))]
    return torch.stack([sample["image"] for sample in samples]), np.array([sample["label"] for sample in samples])


def test_the_split_covers_every_image_once_whatever_the_seed():
    data, other = prepared(), prepared(seed=5)
    (train, train_labels), (test, test_labels) = all_of(data.train_set), all_of(data.test_set)
    assert (len(train), len(test)) == (1200, 597)
    assert data.val_set is data.test_set
    assert torch.equal(train, all_of(other.train_set)[0])
    digits = load_digits()
    # image and label as one row: both halves together are scikit-learn's set, in another order
    ours = np.concatenate([np.c_[train.flatten(1).numpy() * 16, train_labels], np.c_[test.flatten(1).numpy() * 16, test_labels]])
    theirs = np.c_[digits.data, digits.target]
    np.testing.assert_array_equal(ours[np.lexsort(ours.T)], theirs[np.lexsort(theirs.T)])


def test_batches():
    data = prepared(batch_size=50)
    batches = list(data.train_dataloader())
    assert len(batches) == 24
    assert batches[0]["image"].shape == (50, 1, 8, 8)
    assert batches[0]["image"].dtype == torch.float32
    assert 0 <= batches[0]["image"].min() < batches[0]["image"].max() == 1
    assert batches[0]["label"].dtype == torch.int64
    held_out = torch.cat([batch["label"] for batch in data.test_dataloader()])
    assert held_out.tolist() == data.test_set.labels.tolist(), "in order, all of them"
    again = torch.cat([batch["label"] for batch in prepared(batch_size=50, num_workers=1).train_dataloader()])
    assert torch.equal(torch.cat([batch["label"] for batch in batches]), again), "the same with a worker"


def test_a_smaller_training_set_is_the_first_part():
    small, whole = prepared(train_size=300), prepared()
    assert len(small.train_set) == 300
    assert small.train_set.labels.tolist() == whole.train_set.labels[:300].tolist()
    assert len(small.test_set) == 597


def test_label_noise_follows_from_the_seed_and_spares_held_out_images():
    clean, noisy, again, other = (prepared(label_noise=share, seed=seed) for share, seed in ((0, 0), (0.2, 0), (0.2, 0), (0.2, 1)))
    assert noisy.train_set.labels.tolist() == again.train_set.labels.tolist() != other.train_set.labels.tolist()
    assert 0.15 < (noisy.train_set.labels != clean.train_set.labels).mean() < 0.2, "0.2 times 9/10"
    assert noisy.test_set.labels.tolist() == clean.test_set.labels.tolist()


def test_all_labels_redrawn_are_uniform():
    drawn = redraw_labels(np.zeros(5000, np.int64), 1.0, 5, seed=0)
    assert np.bincount(drawn, minlength=5) / 5000 == pytest.approx(np.full(5, 0.2), abs=0.02)


@pytest.mark.parametrize("options", [{"num_train": 1797}, {"train_size": 1201}, {"label_noise": -0.1}, {"batch_size": 0}])
def test_numbers_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        DigitsDataModule(**options)
