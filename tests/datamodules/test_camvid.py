"""CamVid as tiles with road users: reduction, classes, the two datamodules, what is refused, and real frames."""

import numpy as np
import pytest
from PIL import Image

from lit_methods.datamodules import NoisyMasksDataModule, OrganSlicesDataModule
from lit_methods.datamodules.errors import BrokenRecordError, MissingFileError, WrongRootError
from lit_methods.datamodules.segmentation.camvid import read_camvid


def write(root, frames=2, size=(240, 240), classes=12):
    rng = np.random.default_rng(0)
    for part in ("train", "val", "test"):
        for number in range(frames):
            for folder, array in (
                (part, rng.integers(0, 256, (*size, 3), dtype=np.uint8)),
                (
                    f"{part}annot",
                    np.kron(rng.integers(0, classes, (size[0] // 30, size[1] // 30), dtype=np.uint8), np.ones((30, 30), np.uint8)),
                ),
            ):
                (root / folder).mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(root / folder / f"{number}.png")
    return root


def test_a_tile_is_a_reduced_part_of_a_frame_with_its_classes(tmp_path):
    root = write(tmp_path, size=(270, 240))
    images, masks = read_camvid(root, "val", 5, 24)
    assert images.shape == masks.shape == (2, 4, 24, 24)
    frame = np.asarray(Image.open(root / "val" / "1.png"), dtype=np.float64).mean(axis=2) / 255
    given = np.asarray(Image.open(root / "valannot" / "1.png"))
    # tile 3: rows 24 to 47 and columns 24 to 47 of the reduced frame; its pixel (2, 4)
    rows, columns = slice((24 + 2) * 5, (24 + 3) * 5), slice((24 + 4) * 5, (24 + 5) * 5)
    assert images[1, 3, 2, 4] == pytest.approx(frame[rows, columns].mean(), abs=1e-5)
    assert masks[1, 3, 2, 4] == {8: 1, 9: 2, 10: 3}.get(int(given[rows, columns][2, 2]), 0)
    assert set(np.unique(masks)) == {0, 1, 2, 3}


def test_tiles_are_slices_that_know_whether_they_have_a_road_user(tmp_path):
    data = OrganSlicesDataModule(write(tmp_path), "camvid", spurious=1.0, views=1, augment=False)
    data.setup("fit")
    truth = read_camvid(tmp_path, "train", 5, 24)[1].reshape(-1, 24, 24)
    samples = [data.train_set[(0, index)] for index in range(len(data.train_set))]
    assert [bool(sample["dense"]) for sample in samples] == (truth.max((1, 2)) > 0).tolist()
    assert all(sample["label"].max() > 0 for sample in samples), "every empty tile has got a wrong label"
    assert [len(data.val_set), len(data.test_set), data.test_set[0]["image"].shape[0]] == [8, 2, 4]
    assert data.class_names == ("background", "car", "pedestrian", "bicyclist")


def test_outlines_of_road_users_are_shifted_for_training_alone(tmp_path):
    data = NoisyMasksDataModule(write(tmp_path), name="camvid")
    data.setup("fit")
    truth = read_camvid(tmp_path, "train", 3, 40)[1].reshape(-1, 40, 40)
    clean = np.stack([data.clean_labels(index) for index in range(len(truth))])
    noisy = np.stack([data.train_set[(0, index)]["label"].numpy() for index in range(len(truth))])
    np.testing.assert_array_equal(clean, truth)
    assert 0.02 < (noisy != truth).mean() < 0.5
    np.testing.assert_array_equal(data.val_set[0]["label"].numpy(), read_camvid(tmp_path, "val", 3, 40)[1][0, 0])


@pytest.mark.parametrize(
    "build", [lambda root: OrganSlicesDataModule(root, "camvid"), lambda root: NoisyMasksDataModule(root, name="camvid")]
)
def test_what_does_not_fit_is_named(build, tmp_path):
    with pytest.raises(WrongRootError, match="train"):
        build(tmp_path).check_root()
    write(tmp_path / "ids", classes=20)
    with pytest.raises(BrokenRecordError, match="11 classes"):
        build(tmp_path / "ids").setup("fit")
    (write(tmp_path / "gap") / "trainannot" / "1.png").unlink()
    with pytest.raises(MissingFileError, match=r"1\.png"):
        build(tmp_path / "gap").setup("fit")
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(write(tmp_path / "odd") / "trainannot" / "0.png")
    with pytest.raises(BrokenRecordError, match="size"):
        build(tmp_path / "odd").setup("fit")


def test_masks_belong_to_voc_alone(tmp_path):
    with pytest.raises(ValueError, match="camvid"):
        NoisyMasksDataModule(tmp_path, masks=tmp_path, name="camvid")


def test_real_frames(test_data):
    root = test_data / "camvid"
    if not root.is_dir():
        pytest.skip("no CamVid in LIT_METHODS_TEST_DATA")
    images, masks = read_camvid(root, "train", 5, 24)
    assert images.shape == (20, 12, 24, 24)
    assert 0.2 < images.mean() < 0.6
    share = np.bincount(masks.ravel(), minlength=4) / masks.size
    assert 0.03 < share[1] < 0.15
    assert share[2] > 0.002
    assert share[3] > 0.0005
