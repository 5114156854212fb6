"""Rings, digits and CIFAR-10 for generative models."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lit_methods.datamodules import (
    DigitsDataModule,
    GenerativeCIFARDataModule,
    GenerativeDigitsDataModule,
    GenerativeImageNetDataModule,
    IrisDataModule,
    RingDataModule,
)
from lit_methods.datamodules.generative.base import Tensors
from lit_methods.datamodules.generative.images import adm_crop


def prepared(data):
    data.setup("fit")
    return data


def images_of(loader):
    return torch.cat([batch["image"] for batch in loader])


def test_the_ring_has_its_modes_at_their_places():
    points = prepared(RingDataModule(num_train=20_000)).train_set.images
    angle = torch.atan2(points[:, 1], points[:, 0]) * 8 / (2 * torch.pi)
    mode = angle.round().long() % 8
    counts = torch.bincount(mode, minlength=8)
    assert counts.min() > 2200
    centres = torch.stack([points[mode == k].mean(0) for k in range(8)])
    torch.testing.assert_close(centres[0], torch.tensor([0.65, 0.0]), atol=0.01, rtol=0)
    torch.testing.assert_close(centres[2], torch.tensor([0.0, 0.65]), atol=0.01, rtol=0)
    assert (points - centres[mode]).std(0).tolist() == pytest.approx([0.05, 0.05], rel=0.05)


def test_impulses_hit_training_points_alone():
    clean, noisy = (prepared(RingDataModule(impulses=share)) for share in (0.0, 0.05))
    moved = (clean.train_set.images != noisy.train_set.images).any(1)
    assert moved.float().mean() == pytest.approx(0.05, abs=0.004)
    impulse = (noisy.train_set.images - clean.train_set.images)[moved]
    assert impulse.std(0).tolist() == pytest.approx([8.0, 8.0], rel=0.06)
    assert torch.equal(clean.val_set.images, noisy.val_set.images)
    assert noisy.val_set.images.norm(dim=1).max() < 1


def test_seeds_draw_other_training_points_and_the_same_validation_points():
    one, two = prepared(RingDataModule()), prepared(RingDataModule(seed=1))
    assert not torch.equal(one.train_set.images, two.train_set.images)
    assert torch.equal(one.val_set.images, two.val_set.images)
    assert not torch.isin(one.val_set.images, one.train_set.images).all(1).any()


def test_an_epoch_has_every_point_once_in_another_order():
    loader = prepared(RingDataModule(num_train=96, batch_size=32)).train_dataloader()
    first, second = images_of(loader), images_of(loader)
    assert first.shape == (96, 2)
    assert not torch.equal(first, second)
    assert torch.equal(first.sort(0).values, second.sort(0).values)


def test_a_batch_is_fetched_in_one_go(monkeypatch):
    calls = []
    fetch = Tensors.__getitems__
    monkeypatch.setattr(Tensors, "__getitems__", lambda self, draws: calls.append(len(draws)) or fetch(self, draws))
    monkeypatch.setattr(Tensors, "__getitem__", None)
    list(prepared(RingDataModule(num_train=1024)).train_dataloader())
    assert calls == [512, 512]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_goes_on_where_it_was(workers):
    data = prepared(RingDataModule(num_train=64, batch_size=8, num_workers=workers))
    whole = data.train_dataloader()
    whole.sampler.set_epoch(3)
    rest = [batch["image"] for batch in whole][5:]
    state = {**whole.state_dict(), "batches": 5}
    other = data.train_dataloader()
    other.load_state_dict(state)
    for mine, theirs in zip(other, rest, strict=True):
        assert torch.equal(mine["image"], theirs)


def test_digits_are_those_of_the_classification_module_enlarged():
    plain, large = (prepared(GenerativeDigitsDataModule(image_size=size, num_train=1000)) for size in (8, 16))
    digits = prepared(DigitsDataModule(num_train=1000))
    assert len(plain.train_set) == 1000
    torch.testing.assert_close(plain.train_set[0, 7]["image"], digits.train_set[0, 7]["image"] * 2 - 1)
    batch = next(iter(large.val_dataloader()))
    assert batch["image"].shape == (128, 1, 16, 16)
    assert (batch["image"].min(), batch["image"].max()) == (-1, 1)
    assert batch["label"].tolist() == digits.val_set.labels[:128].tolist()
    small = torch.nn.functional.avg_pool2d(batch["image"], 2)
    assert (small - next(iter(plain.val_dataloader()))["image"]).abs().mean() < 0.1


def test_mirror_images_follow_from_seed_and_epoch():
    images = torch.arange(400 * 2, dtype=torch.float32).view(400, 1, 1, 2)
    data = Tensors(images, flip=True, seed=4)
    first, again, later = (data.__getitems__([(epoch, k) for k in range(400)])["image"] for epoch in (0, 0, 1))
    mirrored = first[:, 0, 0, 0] > first[:, 0, 0, 1]
    assert 150 < mirrored.sum() < 250
    assert torch.equal(first, again)
    assert not torch.equal(first, later)
    assert torch.equal(first.sort(-1).values, images)
    parts = torch.cat([data.__getitems__([(0, k)])["image"] for k in range(400)])
    assert torch.equal(parts, first), "whatever the batch"
    assert torch.equal(data[1, 7]["image"], later[7])


def test_cifar_is_in_the_range_of_the_samples():
    data = prepared(GenerativeCIFARDataModule(batch_size=50, flip=False, num_samples=70))
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (50, 3, 32, 32)
    assert batch["image"].dtype == torch.float32
    assert -1 <= batch["image"].min() < -0.5 < 0.5 < batch["image"].max() <= 1
    assert sum(len(batch["label"]) for batch in data.predict_dataloader()) == 70


def test_cifar_of_the_release():
    root = os.environ.get("LIT_METHODS_TEST_DATA")
    if root is None or not (Path(root) / "cifar10" / "cifar-10-batches-py").is_dir():
        pytest.skip("LIT_METHODS_TEST_DATA doesn't hold cifar10/cifar-10-batches-py")
    data = prepared(GenerativeCIFARDataModule(root=Path(root) / "cifar10"))
    assert data.val_set.images.dtype == torch.uint8
    batch = data.val_set.__getitems__([(0, 0), (0, 1)])
    np.testing.assert_allclose(batch["image"].numpy(), data.val_set.images[:2].numpy() / 127.5 - 1, atol=1e-6)


def test_imagenet_is_cropped_in_the_middle_and_in_range():
    wide = np.zeros((40, 160, 3), np.uint8)
    wide[:, 50:110] = 255
    assert (np.asarray(adm_crop(Image.fromarray(wide), 8)) == 255).all(), "the middle alone"
    assert adm_crop(Image.fromarray(wide[:9, :9]), 16).size == (16, 16)
    data = prepared(GenerativeImageNetDataModule(image_size=32, batch_size=20))
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (20, 3, 32, 32)
    assert -1 <= batch["image"].min() < -0.3 < 0.3 < batch["image"].max() <= 1
    first, later = (torch.stack([data.train_set[epoch, k]["image"] for k in range(40)]) for epoch in (0, 1))
    mirrored = (first != later).flatten(1).any(1)
    assert 8 < mirrored.sum() < 32
    assert torch.equal(first[mirrored], later[mirrored].flip(3))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: IrisDataModule(noise=0.0), "noise is 0"),
        (lambda: IrisDataModule(num_val=0), "num_val is 0"),
        (lambda: RingDataModule(impulses=1.5), "impulses is 1.5: give a number in .0, 1."),
        (lambda: RingDataModule(num_train=0), "num_train is 0"),
        (lambda: RingDataModule(noise=-1.0), "noise is -1"),
        (lambda: RingDataModule(batch_size=0), "batch_size is 0"),
        (lambda: GenerativeDigitsDataModule(image_size=4), "8 x 8"),
    ],
)
def test_wrong_numbers_are_named(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_data_that_are_not_there_yet_are_asked_for():
    with pytest.raises(RuntimeError, match="setup"):
        RingDataModule().train_dataloader()


def test_points_lie_around_the_petals_of_real_irises():
    from sklearn.datasets import load_iris

    one, two = (prepared(IrisDataModule(num_train=30_000, num_val=500, seed=seed)) for seed in (0, 1))
    petals = load_iris().data[:, 2:]
    flowers = torch.from_numpy((petals - petals.mean(axis=0)) / petals.std(axis=0)).float()
    points = one.train_set.images
    assert points.mean(0).abs().max() < 0.02
    assert (points.std(0) - (1 + 0.05**2) ** 0.5).abs().max() < 0.02
    nearest = torch.cdist(points, flowers).min(1).values
    assert (nearest < 3 * 0.05).float().mean() > 0.985
    assert len(torch.cdist(points, flowers).argmin(1).unique()) == len(flowers.unique(dim=0)), "every flower has points"
    assert torch.equal(one.val_set.images, two.val_set.images)
    assert not torch.equal(points, two.train_set.images)
