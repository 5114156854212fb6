"""Measures, networks, the module and its datamodules: generated data and the official layouts."""

import builtins

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import tiny_trainer
from lit_methods import ImageSegmentor, LargeFOV, SmallUNet2d, TimmUNet
from lit_methods.datamodules import NoisyMasksDataModule, OrganSlicesDataModule
from lit_methods.datamodules.errors import BrokenRecordError, MissingFileError, WrongRootError
from lit_methods.datamodules.segmentation.base import flip_or_rotate
from lit_methods.datamodules.segmentation.fake import acdc, synapse
from lit_methods.datamodules.segmentation.fake import voc as write_voc
from lit_methods.datamodules.segmentation.noisy_masks import draw_shapes, jitter_scale_crop, shift_outlines
from lit_methods.datamodules.segmentation.organs import add_spurious, make_volumes, read_record
from lit_methods.tasks.segmentation.metrics import ClassCounts, dice_and_hd95

# ---- measures --------------------------------------------------------------------------------------------------------------------------


def test_dice_and_distance_of_shifted_squares():
    a, b = np.zeros((1, 20, 20)), np.zeros((1, 20, 20))
    a[0, 2:8, 2:8], b[0, 2:8, 5:11] = 1, 1
    dice, distance = dice_and_hd95(a, b)
    assert dice == 0.5
    assert distance == 3.0
    assert dice_and_hd95(a, b, spacing=(1, 1, 2))[1] == 6.0
    nothing = np.zeros_like(a)
    assert dice_and_hd95(nothing, nothing) == (1.0, 0.0)
    assert dice_and_hd95(a, nothing) == dice_and_hd95(nothing, a) == (0.0, 0.0)
    with pytest.raises(ValueError, match="one shape"):
        dice_and_hd95(a, a[0])


def test_the_counts_add_up():
    metric = ClassCounts(3)
    metric.update(torch.tensor([0, 1, 2]), torch.tensor([0, 1, 1]))
    metric.update(torch.tensor([2, 2]), torch.tensor([255, 2]))
    assert metric.compute().tolist() == [[1, 1, 1], [1, 1, 2], [1, 2, 1]]


# ---- networks and module ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [(24, 24), (17, 23)])
def test_networks_give_a_logit_for_each_pixel(side):
    small = SmallUNet2d(3, 2, (4, 8, 8))
    assert small(torch.randn(2, 2, *side)).shape == (2, 3, *side)
    unet = TimmUNet("resnet10t", 5, 1, (8, 8, 8, 8, 8)).eval()
    assert unet(torch.randn(1, 1, 64, 64)).shape == (1, 5, 64, 64)
    with pytest.raises(ValueError, match="feature maps"):
        TimmUNet("resnet10t", decoder_channels=(8, 8))
    assert LargeFOV("resnet10t", 4, 8, 2).eval()(torch.randn(1, 3, 41, 49)).shape == (1, 4, 41, 49)


def test_evaluation_counts_every_pixel_and_every_volume():
    class Levels(torch.nn.Module):
        """Reads the class off the grey value."""

        def forward(self, images):
            levels = torch.tensor([0.0, 1.0, 0.7, 0.45])
            return -(images - levels[None, :, None, None]).abs()

    data = OrganSlicesDataModule(num_train=1, num_val=2)
    module = ImageSegmentor(Levels())
    found = tiny_trainer().validate(module, data, verbose=False)[0]
    samples = [data.val_set[0, index] for index in range(len(data.val_set))]
    labels = torch.stack([sample["label"] for sample in samples])
    guess = module(torch.stack([sample["image"] for sample in samples])).argmax(1)
    dice = [2.0 * ((guess == c) & (labels == c)).sum() / ((guess == c).sum() + (labels == c).sum()) for c in (1, 2, 3)]
    assert found["segmentation/val_dice"] == pytest.approx(float(sum(dice) / 3), abs=1e-5)
    assert found["segmentation/val_dice/2"] == pytest.approx(float(dice[1]), abs=1e-5)
    test = tiny_trainer().test(module, data, verbose=False)[0]
    volumes = [data.test_set[0, index] for index in range(2)]
    each = [dice_and_hd95(module(volume["image"]).argmax(1) == c, volume["label"] == c) for volume in volumes for c in (1, 2, 3)]
    assert test["segmentation/test_volume_dice"] == pytest.approx(np.mean([one for one, _ in each]), abs=1e-5)
    assert test["segmentation/test_hd95"] == pytest.approx(np.mean([two for _, two in each]), abs=1e-4)
    assert {row[0] for row in module.dashboard_media()["segmentation/volumes"].rows} == {"generated 0", "generated 1"}
    with pytest.raises(ValueError, match="class_names"):
        ImageSegmentor(Levels(), class_names=["a"])


# ---- generated data --------------------------------------------------------------------------------------------------------------------


def test_generated_slices_are_half_empty_and_follow_the_seed():
    images, labels = make_volumes(6, 3)
    dense = labels.reshape(-1, 24 * 24).any(1).mean()
    assert 0.3 < dense < 0.7
    assert np.array_equal(labels, make_volumes(6, 3)[1])
    assert not np.array_equal(labels, make_volumes(6, 4)[1])
    assert images[labels == 1].mean() > images[labels == 2].mean() > images[labels == 3].mean() > images[labels == 0].mean()
    flat = labels.reshape(-1, 24, 24)
    spoilt = add_spurious(flat, 0.5, 0)
    before, after = (part.reshape(len(flat), -1).any(1) for part in (flat, spoilt))
    assert (after & ~before).sum() == round(0.5 * (~before).sum())
    assert np.array_equal(spoilt[before], flat[before])


def test_views_move_image_and_label_together():
    label = np.zeros((1, 9, 9), dtype=np.uint8)
    label[0, 1:4, 2:8] = 1
    for seed in range(8):
        moved = flip_or_rotate({"image": label[0].astype(np.float32), "label": label[0]}, np.random.default_rng(seed))
        assert np.array_equal(moved["image"], moved["label"])
    data = OrganSlicesDataModule(num_train=1, batch_size=16, noise=0.0)
    data.setup("fit")
    first, second = (next(iter(data.train_dataloader())) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first), "a view follows from seed, epoch and index"
    assert not torch.equal(first["image"], first["image_2"])
    assert sorted(first["index"].tolist()) == list(range(16))


def test_outlines_are_shifted_and_shapes_survive():
    _, labels = draw_shapes(10, 0)
    noisy = shift_outlines(labels, (1, 2), 0)
    assert ((labels > 0) == (noisy > 0)).mean() < 0.99
    for old, new in zip(labels, noisy, strict=True):
        assert set(np.unique(old)) == set(np.unique(new))
    assert np.array_equal(shift_outlines(labels, (0, 0), 0), labels)


# ---- official layouts ------------------------------------------------------------------------------------------------------------------


def test_synapse_is_read(tmp_path):
    pytest.importorskip("h5py", reason="needs the extra segmentation")
    synapse(tmp_path)
    (tmp_path / "half.txt").write_text("case0005_slice002\ncase0005_slice000\n")
    data = OrganSlicesDataModule(tmp_path, "synapse", image_size=16, train_list=tmp_path / "half.txt", batch_size=2)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == batch["image_2"].shape == (2, 1, 16, 16)
    assert batch["label"].dtype == torch.int64
    volume = next(iter(data.test_dataloader()))
    assert volume["image"].shape == (4, 1, 16, 16)
    assert volume["label"].shape == (4, 32, 32), "measured at the stored size"
    found = tiny_trainer().validate(ImageSegmentor(SmallUNet2d(9, 1, (4, 8)), num_classes=9), data, verbose=False)[0]
    assert 0 <= found["segmentation/val_volume_dice"] < 0.5


def test_acdc_is_split_by_patient(tmp_path):
    pytest.importorskip("h5py", reason="needs the extra segmentation")
    acdc(tmp_path)
    data = OrganSlicesDataModule(tmp_path, "acdc")
    data.setup("fit")
    assert [len(part) for part in (data.train_set, data.val_set, data.test_set)] == [14, 1, 2]
    assert data.val_set.names == ["patient008_frame01"]


def test_broken_slices_are_named(tmp_path, monkeypatch):
    with pytest.raises(WrongRootError, match="train_npz"):
        OrganSlicesDataModule(tmp_path, "synapse").setup("fit")
    with pytest.raises(ValueError, match="root"):
        OrganSlicesDataModule(tmp_path)
    (tmp_path / "train_npz").mkdir()
    (tmp_path / "test_vol_h5").mkdir()
    with pytest.raises(WrongRootError, match=r"no file \*\.npz"):
        OrganSlicesDataModule(tmp_path, "synapse").setup("fit")
    path = tmp_path / "a.npz"
    for fields, problem in (
        ({"image": np.zeros((2, 2))}, "a.npz: label: the file has"),
        ({"image": np.zeros((2, 2)), "label": np.zeros((2, 3))}, r"a.npz: label: image is \(2, 2\)"),
        ({"image": np.full((2, 2), np.nan), "label": np.zeros((2, 2))}, "a.npz: image: it has values that aren't finite"),
        ({"image": np.zeros((2, 2)), "label": np.full((2, 2), 256)}, "a.npz: label: it has values that are no whole number"),
        ({"image": np.zeros((2, 2)), "label": np.full((2, 2), 0.5)}, "a.npz: label: it has values that are no whole number"),
    ):
        np.savez(path, **fields)
        with pytest.raises(BrokenRecordError, match=problem):
            read_record(path)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(BrokenRecordError, match=r"a\.npz: file: not a readable"):
        read_record(path)
    with pytest.raises(MissingFileError, match=r"b\.npz"):
        read_record(tmp_path / "b.npz")
    (tmp_path / "c.h5").write_bytes(b"nothing")
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "h5py":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"lit-methods\[segmentation\]"):
        read_record(tmp_path / "c.h5")


@pytest.fixture
def voc(tmp_path):
    write_voc(tmp_path / "VOCdevkit" / "VOC2012", tmp_path / "masks")
    return tmp_path


def test_voc_is_read_at_its_own_sizes(voc):
    data = NoisyMasksDataModule(voc, voc / "masks", crop=24, batch_size=2, labels_folder=voc / "labels")
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (2, 3, 24, 24)
    assert torch.equal(batch["label"], batch["label_original"])
    assert set(batch["label"].unique().tolist()) <= {0, 3, 20, 255}
    assert [tuple(one["image"].shape[2:]) for one in data.correction_dataloader()] == [(20, 30), (25, 18)]
    assert [data.label_store.shape(index) for index in range(2)] == [(20, 30), (25, 18)]
    assert next(iter(data.val_dataloader()))["label"].shape == (1, 16, 16)


def test_a_crop_moves_all_maps_together():
    label = np.arange(30 * 20).reshape(30, 20) % 7
    sample = {"image": np.repeat(label[None].astype(np.float32), 3, axis=0), "label": label, "label_original": label}
    for seed in range(6):
        found = jitter_scale_crop(sample, np.random.default_rng(seed), 16, (1.0, 1.0), 0.0)
        assert np.array_equal(found["label"], found["label_original"])
        inside = found["label"] != 255
        np.testing.assert_allclose(found["image"][0][inside], found["label"][inside], atol=1e-5)
        larger = jitter_scale_crop(sample, np.random.default_rng(seed), 64, (0.5, 1.5), 0.1)
        assert larger["image"].shape == (3, 64, 64)
        assert (larger["label"] == 255).any()


def test_broken_voc_is_named(voc):
    arguments = {"labels_folder": voc / "labels"}
    with pytest.raises(ValueError, match="masks"):
        NoisyMasksDataModule(voc)
    with pytest.raises(WrongRootError, match="JPEGImages"):
        NoisyMasksDataModule(voc / "masks", voc / "masks").setup("fit")
    with pytest.raises(MissingFileError, match="nolist"):
        NoisyMasksDataModule(voc, voc / "masks", train="nolist").setup("fit")
    Image.fromarray(np.full((20, 30), 21, dtype=np.uint8)).save(voc / "masks" / "a.png")
    with pytest.raises(BrokenRecordError, match=r"a\.png: pixels: it has the class 21"):
        NoisyMasksDataModule(voc, voc / "masks", **arguments).setup("fit")
    (voc / "masks" / "a.png").unlink()
    with pytest.raises(MissingFileError, match=r"a\.png"):
        NoisyMasksDataModule(voc, voc / "masks", **arguments).setup("fit")
