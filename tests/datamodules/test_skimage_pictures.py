"""Patches of scikit-image's pictures, and faces: parts that share no pixel, classes, label noise, errors."""

import numpy as np
import pytest
import skimage.data
import torch

from lit_methods.datamodules import SkimageDataModule
from lit_methods.datamodules.vision.skimage_pictures import PICTURES, cut_patches, read_picture


def prepared(**kwargs):
    data = SkimageDataModule(**kwargs)
    data.setup("fit")
    return data


def images_of(dataset):
    return torch.stack([dataset[(0, index)]["image"] for index in range(len(dataset))])


def places(patch, picture):
    """(top, left) of every place in ``picture`` that has exactly these pixels."""
    windows = np.lib.stride_tricks.sliding_window_view(picture, patch.shape)
    return np.argwhere((windows == patch).all(axis=(2, 3)))


def test_a_picture_is_grey_and_halved():
    halved = read_picture("chelsea")
    whole = skimage.data.chelsea().astype(np.float64)
    assert halved.shape == (150, 225)
    assert halved[7, 11] == pytest.approx(whole[14:16, 22:24].mean() / 255, abs=1e-6)


def test_patches_come_from_their_picture_and_the_parts_share_no_pixel():
    pictures = {name: read_picture(name) for name in PICTURES}
    for train in (True, False):
        patches, labels = cut_patches(40, 8, train)
        assert np.bincount(labels).tolist() == [4] * 10
        for patch, label in zip(patches[:10], labels[:10], strict=True):
            picture = pictures[PICTURES[label]]
            border = int(0.6 * picture.shape[1])
            columns = places(patch[0], picture)[:, 1]
            assert len(columns) >= 1
            assert ((columns + 8 <= border) if train else (columns >= border)).any()


def test_every_seed_has_the_same_pictures_and_its_own_label_noise():
    one, other = prepared(num_train=50, num_val=20, label_noise=0.5), prepared(num_train=50, num_val=20, label_noise=0.5, seed=3)
    assert torch.equal(images_of(one.train_set), images_of(other.train_set))
    assert torch.equal(images_of(one.val_set), images_of(other.val_set))
    assert one.train_set.labels.tolist() != other.train_set.labels.tolist()
    assert one.val_set.labels.tolist() == other.val_set.labels.tolist() == prepared(num_train=50, num_val=20).val_set.labels.tolist()


def test_faces_are_split_once_and_carry_their_kind():
    data = prepared(name="faces", num_train=120)
    train, held_out = images_of(data.train_set), images_of(data.test_set)
    assert (train.shape, held_out.shape) == ((120, 1, 25, 25), (80, 1, 25, 25))
    both = {image.numpy().tobytes(): label for image, label in zip(train, data.train_set.labels, strict=True)}
    both |= {image.numpy().tobytes(): label for image, label in zip(held_out, data.test_set.labels, strict=True)}
    stored = skimage.data.lfw_subset().astype(np.float32)
    assert [both[image[None].tobytes()] for image in stored] == [0] * 100 + [1] * 100
    assert data.class_names == ("face", "other")


def test_batches_have_the_chosen_size():
    batch = next(iter(prepared(size=16, num_train=64, batch_size=32).train_dataloader()))
    assert batch["image"].shape == (32, 1, 16, 16)
    assert batch["image"].dtype == torch.float32
    assert 0 <= batch["image"].min() < batch["image"].max() <= 1
    assert batch["label"].dtype == torch.int64


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"name": "cats"}, "name"),
        ({"name": "faces"}, "num_train"),
        ({"size": 65}, "size"),
        ({"num_val": 0}, "num_val"),
        ({"label_noise": 2}, "label_noise"),
    ],
)
def test_values_out_of_range_are_refused(options, word):
    with pytest.raises(ValueError, match=word):
        SkimageDataModule(**options)
