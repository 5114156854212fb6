"""Drawn shapes with known factors."""

import numpy as np
import pytest
import torch

from lit_methods.datamodules import ShapeFactorsDataModule
from lit_methods.datamodules.vision.shapes import FACTORS, draw_factors


def test_factors_are_what_the_images_show():
    images, factors = draw_factors(600, 16, 0)
    assert images.shape == (600, 16, 16, 3)
    assert {name: values.max() + 1 for name, values in factors.items()} == {name: len(values) for name, values in FACTORS.items()}
    bright = images.astype(float) - np.median(images, axis=(1, 2), keepdims=True)
    weight = np.abs(bright).sum(-1)
    grid = np.arange(16) - 7.5
    x, y = ((weight * axis).sum((1, 2)) / weight.sum((1, 2)) for axis in (grid[None, None, :], grid[None, :, None]))
    assert (x[factors["position"] % 2 == 1].mean() - x[factors["position"] % 2 == 0].mean()) > 1
    assert (y[factors["position"] // 2 == 1].mean() - y[factors["position"] // 2 == 0].mean()) > 1
    red, blue = (images[factors["colour"] == place].reshape(-1, 3).astype(float).mean(0) for place in (0, 4))
    assert red[0] > red[2]
    assert blue[2] > blue[0]
    table = np.array([[np.sum((factors["shape"] == s) & (factors["colour"] == c)) for c in range(6)] for s in range(5)])
    assert (table > 5).all(), "every shape in every colour"


def test_seeds_share_no_image_and_hold_out_the_same_ones():
    first, second = ShapeFactorsDataModule(num_train=50, num_val=20), ShapeFactorsDataModule(num_train=50, num_val=20, seed=1)
    for data in (first, second):
        data.setup("fit")
    assert torch.equal(first.val_set.images, second.val_set.images)
    assert not any(torch.equal(image, other) for image in first.train_set.images for other in second.train_set.images)
    assert not any(torch.equal(image, other) for image in first.train_set.images for other in first.val_set.images)


@pytest.mark.parametrize(("label", "classes"), [("shape", 5), ("colour", 6), ("position", 4), ("shape_and_colour", 30)])
def test_the_label_is_chosen(label, classes):
    data = ShapeFactorsDataModule(num_train=40, num_val=10, label=label, batch_size=8)
    data.setup("fit")
    assert data.num_classes == classes
    batch = next(iter(data.train_dataloader()))
    wanted = batch["shape"] * 6 + batch["colour"] if label == "shape_and_colour" else batch[label]
    assert torch.equal(batch["label"], wanted)
    assert batch["image"].min() >= -1
    assert batch["image"].max() <= 1
    place = int(batch["label"][0])
    if label == "shape_and_colour":
        assert data.class_names[place] == f"{FACTORS['colour'][place % 6]} {FACTORS['shape'][place // 6]}"


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="size is 4"):
        ShapeFactorsDataModule(size=4)
    with pytest.raises(ValueError, match="label"):
        ShapeFactorsDataModule(label="size")
