"""The nuScenes reader, its data sets and datamodule, on a tiny release with known geometry and on a real key frame."""

import json
import math
import os
import pickle
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from helpers import run_two_processes
from lit_methods.datamodules import NuScenesDataModule
from lit_methods.datamodules.driving.common import draw_augmentation, fraction_of, read_image, read_points
from lit_methods.datamodules.driving.fake import CHANNELS, HEIGHT, WIDTH, nuscenes
from lit_methods.datamodules.driving.nuscenes import (
    CLASSES,
    IGNORED,
    LABEL_TABLE,
    NuScenesFrames,
    NuScenesPretrainDataset,
    collate_pretrain,
    project_into_cameras,
    sweep_to_key,
)
from lit_methods.datamodules.driving.nuscenes_tables import CAMERAS, read_rows, read_tables
from lit_methods.datamodules.driving.splits import MINI_VAL, OFFICIAL_VAL, SLIDR_HELD_OUT, choose_scenes, scene_names
from lit_methods.datamodules.errors import BrokenRecordError, MissingFileError, WrongRootError
from lit_methods.lidar.projection import dense_cloud, resize_pairs

SIZE = (18, 32)


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return nuscenes(tmp_path_factory.mktemp("nuscenes"))


@pytest.fixture(scope="module")
def tables(release):
    return read_tables(release, "v1.0-mini", num_sweeps=2)


@pytest.fixture
def copy(release, tmp_path):
    """The release again, to be broken."""
    return Path(shutil.copytree(release, tmp_path / "release"))


def datamodule(root, **options):
    return NuScenesDataModule(root, **({"version": "v1.0-mini", "image_size": SIZE, "batch_size": 2} | options))


def pretrain_set(root, tables, indices=(0, 1, 2, 3), **options):
    options = {"superpixel_root": root / "superpixels", "image_size": SIZE, "augment": False} | options
    return NuScenesPretrainDataset(tables, indices, **options)


# ---- splits and label map --------------------------------------------------------------------------------------------


def test_official_lists_have_the_published_sizes():
    val, held_out = scene_names(OFFICIAL_VAL), scene_names(SLIDR_HELD_OUT)
    assert len(val) == 150
    assert len(held_out) == 100
    assert not val & held_out  # what SLidR holds back are training scenes
    assert scene_names(MINI_VAL) == {"scene-0103", "scene-0916"}
    assert scene_names("3 12-14") == {"scene-0003", "scene-0012", "scene-0013", "scene-0014"}


def test_splits_of_each_version(tmp_path):
    names = ["scene-0061", "scene-0103", "scene-0008", "scene-0003"]
    assert choose_scenes(names, "val", "v1.0-trainval", tmp_path) == ["scene-0103", "scene-0003"]
    assert choose_scenes(names, "train", "v1.0-trainval", tmp_path) == ["scene-0061", "scene-0008"]
    assert choose_scenes(names, "slidr600", "v1.0-trainval", tmp_path) == ["scene-0061"]
    assert choose_scenes(names, "slidr600", "v1.0-mini", tmp_path) == choose_scenes(names, "train", "v1.0-mini", tmp_path)
    assert choose_scenes(names, "val", "v1.0-mini", tmp_path) == ["scene-0103"]
    assert choose_scenes(names, "test", "v1.0-test", tmp_path) == names
    assert choose_scenes(names, "train", "v1.0-test", tmp_path) == []


def test_a_root_with_its_own_splits(tmp_path):
    (tmp_path / "splits.json").write_text(json.dumps({"train": ["b"], "val": ["a"]}))
    assert choose_scenes(["a", "b", "c"], "train", "v1.0-mini", tmp_path) == ["b"]
    assert choose_scenes(["a", "b", "c"], "slidr600", "v1.0-trainval", tmp_path) == ["b"]
    assert choose_scenes(["a", "b", "c"], "val", "v1.0-mini", tmp_path) == ["a"]
    with pytest.raises(BrokenRecordError, match=r"splits\.json: val: scene 'a' is not in v1\.0-mini/scene\.json"):
        choose_scenes(["b"], "val", "v1.0-mini", tmp_path)


def test_label_map_covers_the_32_raw_ids_once():
    mapped = [raw for ids in CLASSES.values() for raw in ids]
    assert sorted([*mapped, *IGNORED]) == list(range(32))
    assert len(CLASSES) == 16
    expected = {
        9: 0,
        14: 1,
        15: 2,
        16: 2,
        17: 3,
        18: 4,
        21: 5,
        2: 6,
        6: 6,
        12: 7,
        22: 8,
        23: 9,
        24: 10,
        25: 11,
        26: 12,
        27: 13,
        28: 14,
        30: 15,
    }
    for raw, label in expected.items():
        assert LABEL_TABLE[raw] == label
    assert all(LABEL_TABLE[raw] == 16 for raw in (0, 1, 5, 7, 8, 10, 11, 13, 19, 20, 29, 31))


@pytest.mark.parametrize(("percent", "expected"), [(1, 1), (5, 5), (10, 10), (25, 25), (100, 100)])
def test_label_fractions_are_evenly_spaced(percent, expected):
    chosen = fraction_of(list(range(100)), percent)
    assert len(chosen) == expected
    assert chosen[0] == 0
    assert set(np.diff(chosen)) <= {100 // percent}


# ---- tables ----------------------------------------------------------------------------------------------------------


def test_tables_order_and_neighbours(tables):
    assert len(tables) == 8
    assert tables.scene.tolist() == [0] * 4 + [1] * 4
    assert [tables.neighbour(0, 1), tables.neighbour(0, -1), tables.neighbour(3, 1), tables.neighbour(4, -1), tables.neighbour(4, 2)] == [
        1,
        None,
        None,
        None,
        6,
    ]
    times = tables.timestamp[tables.lidar]
    assert (np.diff(times.reshape(2, 4)) == 500_000).all()
    assert tables.token[tables.cameras[1, 3]] == b"scene-0061-1-0-CAM_BACK"
    assert CAMERAS[3] == "CAM_BACK"


def test_sweeps_are_the_nearest_earlier_ones_and_fewer_at_the_start(tables):
    assert tables.sweeps[0].tolist() == [-1, -1]
    assert [tables.token[record] for record in tables.sweeps[2]] == [b"scene-0061-2--1-LIDAR_TOP", b"scene-0061-2--2-LIDAR_TOP"]


def test_sweeps_skip_key_scans(release):
    tables = read_tables(release, "v1.0-mini", num_sweeps=3)
    assert [tables.token[record] for record in tables.sweeps[2]][2] == b"scene-0061-1--1-LIDAR_TOP"  # past key scan 1


def test_tables_pickle_small_and_whole(tables):
    again = pickle.loads(pickle.dumps(tables))
    assert again.path(3) == tables.path(3)
    assert len(pickle.dumps(tables)) < 40_000


def test_rows_of_a_table_larger_than_a_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr("lit_methods.datamodules.driving.nuscenes_tables._CHUNK", 64)
    rows = [{"token": f"{k}", "text": "a } , { ] [", "list": [1.5, [2]]} for k in range(200)]
    (tmp_path / "t.json").write_text(json.dumps(rows, indent=1))
    assert list(read_rows(tmp_path / "t.json")) == rows
    (tmp_path / "empty.json").write_text("[]")
    assert list(read_rows(tmp_path / "empty.json")) == []


# ---- geometry --------------------------------------------------------------------------------------------------------


def test_sweeps_land_on_the_key_scan(release, tables):
    """All scans of the tiny release see the same fixed landmarks: a sweep moved into the key frame must lie on the key scan."""
    key, sweep = int(tables.lidar[2]), int(tables.sweeps[2, 1])
    points, other = read_points(tables.path(key), 5), read_points(tables.path(sweep), 5)
    assert (points - other).abs().max() > 0.5  # the car moved and turned in between
    motion = torch.from_numpy(sweep_to_key(tables, sweep, key))[None]
    dense = dense_cloud(points, [other], motion)
    torch.testing.assert_close(dense[len(points) :, :3], points[:, :3], atol=2e-5, rtol=0)
    torch.testing.assert_close(dense[: len(points)], points, atol=0, rtol=0)


def test_projection_through_both_ego_poses(release, tables):
    """A pixel from the chain written with homogeneous matrices and the devices' own poses, independent of the reader's."""
    key, camera = int(tables.lidar[1]), int(tables.cameras[1, 0])
    points = read_points(tables.path(key), 5)
    rows, pixels = project_into_cameras(tables, points, key, [camera], (HEIGHT, WIDTH))
    to_camera = np.linalg.inv(tables.sensor_to_global(camera)) @ tables.sensor_to_global(key)
    seen = points[:, :3].double().numpy() @ to_camera[:3, :3].T + to_camera[:3, 3]
    uv = seen @ tables.intrinsic[tables.sensor[camera]].T
    uv = uv[:, :2] / uv[:, 2:]
    visible = (seen[:, 2] > 1) & (uv[:, 0] > 0) & (uv[:, 0] < WIDTH - 1) & (uv[:, 1] > 0) & (uv[:, 1] < HEIGHT - 1)
    assert 5 < visible.sum() < 60
    assert rows.tolist() == np.flatnonzero(visible).tolist()
    assert np.abs(pixels[:, 1:].numpy() - uv[visible][:, ::-1]).max() < 0.51


# ---- pretraining samples ---------------------------------------------------------------------------------------------


def test_pretraining_sample_without_augmentation(release, tables):
    sample = pretrain_set(release, tables)[2]
    assert set(sample) == {"cur", "prev", "next", "dense", "token"}
    assert sample["token"] == "scene-0061-2-0-LIDAR_TOP"
    points = read_points(tables.path(tables.lidar[2]), 5)
    assert torch.equal(sample["cur"]["points"], points)
    assert sample["dense"]["points"].shape == (360, 4)
    assert torch.equal(sample["dense"]["points"][:120], points)
    for view in ("cur", "prev", "next"):
        assert sample[view]["images"].shape == (3, 3, *SIZE)
        assert sample[view]["images"].dtype == torch.float32
        assert 0 <= sample[view]["images"].min() <= sample[view]["images"].max() <= 1
        assert sample[view]["superpixels"].shape == (3, *SIZE)
    # the green channel of the tiny images tells the camera: cur, prev and next show the same ones in the same order
    colours = [sample[view]["images"][:, 1].mean(dim=(1, 2)) * 255 / 40 for view in ("cur", "prev", "next")]
    cameras = colours[0].round().long()
    assert len(set(cameras.tolist())) == 3
    for colour in colours:
        torch.testing.assert_close(colour, cameras.float(), atol=0.02, rtol=0)
    # pairs are those of the chosen cameras, at the resized resolution
    records = [next(int(r) for r in tables.cameras[2] if tables.token[r].endswith(_channel(c).encode())) for c in cameras.tolist()]
    rows, pixels = project_into_cameras(tables, points, int(tables.lidar[2]), records, (HEIGHT, WIDTH))
    assert torch.equal(sample["cur"]["pairing_points"], rows)
    assert torch.equal(sample["cur"]["pairing_images"], resize_pairs(pixels, (HEIGHT, WIDTH), SIZE))
    # all scans show the same landmarks, thus the dense cloud has each of cur's pairs three times but for points at the images' borders
    assert abs(len(sample["dense"]["pairing_points"]) - 3 * len(rows)) <= 6


def _channel(number):
    return CHANNELS[number]


def test_a_missing_neighbour_is_the_frame_itself(release, tables):
    first = pretrain_set(release, tables)[0]
    assert torch.equal(first["prev"]["points"], first["cur"]["points"])
    assert torch.equal(first["prev"]["pairing_images"], first["cur"]["pairing_images"])
    assert not torch.equal(first["next"]["points"], first["cur"]["points"])
    assert len(first["dense"]["points"]) == 120  # no sweep before the first key frame


def test_augmentation_keeps_pairs_and_flips_consistently(release, tables):
    plain, augmented = pretrain_set(release, tables), pretrain_set(release, tables, augment=True)
    flipped = 0
    for epoch in range(4):
        base, sample = plain[2], augmented[epoch, 2]
        matrices = {}
        for cloud in ("cur", "prev", "next", "dense"):
            points = sample[cloud]["points"]
            assert torch.equal(points[:, 3], (base[cloud]["points"])[:, 3])  # order and intensity stay
            radius = points[:, :3].norm(dim=1) / base[cloud]["points"][:, :3].norm(dim=1)
            assert radius.max() - radius.min() < 1e-4
            assert 0.95 <= radius.mean() <= 1.05
            solution = torch.linalg.lstsq(base[cloud]["points"][:, :2].double(), points[:, :2].double()).solution / radius.mean()
            assert abs(abs(torch.linalg.det(solution)) - 1) < 1e-4
            matrices[cloud] = solution
        assert (matrices["cur"] - matrices["dense"]).abs().max() > 1e-3  # drawn independently
        assert (matrices["cur"] - matrices["prev"]).abs().max() > 1e-3
        for view, cloud in (("cur", "cur"), ("prev", "prev"), ("next", "next"), ("cur", "dense")):
            ids, images, pixels = sample[view]["superpixels"], sample[view]["images"], sample[cloud]["pairing_images"]
            # red is a ramp to the right in every file: a flipped camera shows it falling, and its ids and columns must agree
            rises = images[:, 0, 0, -1] > images[:, 0, 0, 0]
            flipped += int((~rises).sum())
            column = torch.where(rises[pixels[:, 0]], pixels[:, 2], SIZE[1] - 1 - pixels[:, 2])
            expected = column * 2 * 17 // WIDTH  # native column of a resized one by nearest, then its stripe
            assert torch.equal(ids[pixels[:, 0], pixels[:, 1], pixels[:, 2]].long(), expected)
    assert 10 < flipped < 40  # of 4 x 4 x 3 cameras, half on average


def test_samples_depend_on_seed_epoch_and_index_alone(release, tables):
    dataset = pretrain_set(release, tables, augment=True, seed=3)
    again = pickle.loads(pickle.dumps(dataset))
    _ = again[0, 1], again[5, 3]
    assert torch.equal(dataset[2, 1]["cur"]["points"], again[2, 1]["cur"]["points"])
    assert not torch.equal(dataset[2, 1]["cur"]["points"], dataset[3, 1]["cur"]["points"])
    assert not torch.equal(dataset[2, 1]["cur"]["points"], pretrain_set(release, tables, augment=True, seed=4)[2, 1]["cur"]["points"])
    plain = pretrain_set(release, tables)
    assert torch.equal(plain[2, 1]["cur"]["pairing_images"], plain[9, 1]["cur"]["pairing_images"])  # evaluation: the same in every epoch


def test_the_rotation_covers_the_range_of_the_protocol():
    angles, mirrored = [], 0
    for seed in range(400):
        matrix = draw_augmentation(np.random.default_rng(seed), (0.0, math.pi))
        mirrored += matrix[0, 0] * matrix[1, 1] - matrix[0, 1] * matrix[1, 0] < 0
        assert 0.95 <= matrix[2, 2] <= 1.05
        angles.append(math.atan2(abs(matrix[1, 0]), abs(matrix[0, 0])))
    assert 150 < mirrored < 250
    assert min(angles) < 0.05
    assert max(angles) > 1.5


@pytest.mark.parametrize(("frames", "views"), [(1, {"cur", "dense"}), (2, {"cur", "prev", "dense"}), (3, {"cur", "prev", "next", "dense"})])
def test_number_of_frames_and_sweeps(release, tables, frames, views):
    sample = pretrain_set(release, tables, frames=frames, num_sweeps=0, cameras=6)[1]
    assert set(sample) - {"token"} == views
    assert torch.equal(sample["dense"]["points"], sample["cur"]["points"])
    assert sample["cur"]["images"].shape[0] == 6


def test_pretraining_batch(release, tables):
    dataset = pretrain_set(release, tables, augment=True)
    samples = [dataset[0], dataset[2]]
    batch = collate_pretrain(samples)
    assert batch["token"] == ["scene-0061-0-0-LIDAR_TOP", "scene-0061-2-0-LIDAR_TOP"]
    assert batch["dense"]["points_per_sample"].tolist() == [120, 360]
    assert set(batch["dense"]) == {"points", "points_per_sample", "pairing_points", "pairing_images", "pairs_per_sample"}
    cur = batch["cur"]
    assert cur["images"].shape == (2, 3, 3, *SIZE)
    assert cur["superpixels"].dtype == torch.int64
    split = cur["pairs_per_sample"].tolist()
    assert torch.equal(cur["pairing_images"].split(split)[1], samples[1]["cur"]["pairing_images"])
    assert cur["pairing_points"].max() < 120  # local to the sample
    assert cur["pairing_images"][:, 0].max() == 2


# ---- segmentation ----------------------------------------------------------------------------------------------------


def test_segmentation_batch_and_labels(release):
    data = datamodule(release, mode="segment")
    data.setup("fit")
    batch = next(iter(data.val_dataloader()))
    assert batch["token"] == ["scene-0103-0-0-LIDAR_TOP", "scene-0103-1-0-LIDAR_TOP"]
    assert batch["points"].shape == (240, 4)
    assert torch.equal(batch["labels"], torch.from_numpy(LABEL_TABLE[np.arange(120) % 32]).repeat(2))
    assert data.num_classes == data.ignore_index == 16
    assert data.class_names[9] == "truck"
    assert (len(data.train_set), len(data.val_set)) == (4, 4)


def test_neighbours_land_on_the_current_scan_also_when_it_is_augmented(release):
    data = datamodule(release, mode="segment", neighbours=1)
    data.setup("fit")
    batch = data.collate_train([data.train_set[7, 0], data.train_set[7, 2]])
    previous, following = batch["neighbours"]
    assert previous["present"].tolist() == [False, True]
    assert previous["points_per_sample"].tolist() == [0, 120]
    assert following["present"].tolist() == [True, True]
    assert previous["to_current"].dtype == torch.float64
    current = batch["points"].split(120)[1]
    for cloud, points in ((previous, previous["points"]), (following, following["points"].split(120)[1])):
        matrix = cloud["to_current"][1]
        moved = points[:, :3].double() @ matrix[:3, :3].T + matrix[:3, 3]
        torch.testing.assert_close(moved.float(), current[:, :3], atol=1e-4, rtol=0)  # the landmarks stand still
        assert (points[:, :3] - current[:, :3]).abs().max() > 1


def test_semi_supervised_batches(release):
    data = datamodule(release, mode="semi_supervised", label_fraction=25, neighbours=1)
    data.setup("fit")
    assert len(data.train_set) == 3
    seen = set()
    for index in range(3):
        batch = data.collate_train([data.train_set[1, index]])
        assert batch["labelled"]["token"] == ["scene-0061-0-0-LIDAR_TOP"]
        assert "labels" in batch["labelled"]
        assert "labels" not in batch["unlabelled"]
        assert len(batch["unlabelled"]["neighbours"]) == 2
        seen.update(batch["unlabelled"]["token"])
    assert seen == {f"scene-0061-{k}-0-LIDAR_TOP" for k in (1, 2, 3)}
    repeats = [data.train_set[1, index]["labelled"]["points"] for index in range(3)]
    assert not torch.equal(repeats[0], repeats[1])  # a labelled scan that returns within an epoch is augmented anew
    with pytest.raises(ValueError, match="label_fraction=100 labels all 4 training frames"):
        datamodule(release, mode="semi_supervised").setup("fit")


def test_labelled_subset_is_every_fourth_key_frame(release):
    data = datamodule(release, mode="segment", label_fraction=25)
    data.setup("fit")
    assert [data.train_set[k]["token"] for k in range(len(data.train_set))] == ["scene-0061-0-0-LIDAR_TOP"]


def test_batches_do_not_depend_on_the_number_of_workers(release):
    def batches(workers):
        data = datamodule(release, num_workers=workers)
        data.setup("fit")
        return list(data.train_dataloader())

    for one, two in zip(batches(0), batches(1), strict=True):
        assert one["token"] == two["token"]
        assert torch.equal(one["dense"]["points"], two["dense"]["points"])
        assert torch.equal(one["next"]["superpixels"], two["next"]["superpixels"])


def test_predict_reads_no_labels_and_writes_the_challenge_format(release, tmp_path):
    data = datamodule(release, mode="segment")
    data.setup("predict")
    batch = next(iter(data.predict_dataloader()))
    assert "labels" not in batch
    labels = torch.arange(120) % 16
    path = data.write_labels(batch["token"][0], labels, tmp_path)
    assert path == tmp_path / "lidarseg" / "mini_val" / "scene-0103-0-0-LIDAR_TOP_lidarseg.bin"
    written = np.fromfile(path, np.uint8)
    assert written.tolist() == (labels + 1).tolist()
    for bad in (torch.full((3,), 16), torch.full((3,), -1), torch.zeros(3), torch.zeros(3, 2, dtype=torch.long)):
        with pytest.raises(ValueError, match="predictions of t "):
            data.write_labels("t", bad, tmp_path)
    data.close_predictions(tmp_path)
    meta = json.loads((tmp_path / "mini_val" / "submission.json").read_text())["meta"]
    assert meta == {f"use_{name}": name == "lidar" for name in ("camera", "lidar", "radar", "map", "external")}


def test_slic_superpixels_are_made_once(release, tmp_path):
    root = Path(shutil.copytree(release, tmp_path / "release"))
    shutil.rmtree(root / "superpixels")
    data = datamodule(root, superpixels="slic", num_superpixels=12)
    data.prepare_data()
    data.setup("fit")
    files = sorted((root / "superpixels_slic12").glob("*.png"))
    assert len(files) == 6 * 8
    ids = data.train_set[0]["cur"]["superpixels"]
    assert 1 < ids.max() < 12
    stamp = files[0].stat().st_mtime_ns
    files[1].unlink()
    datamodule(root, superpixels="slic", num_superpixels=12).prepare_data()
    assert files[0].stat().st_mtime_ns == stamp  # kept
    assert files[1].is_file()  # made again


def test_the_embedded_world_goes_through_the_same_reader(release, monkeypatch):
    import lit_methods.datamodules.driving.world as world

    monkeypatch.setattr(world, "embedded_world", lambda cache=None, seed=0: release)
    data = NuScenesDataModule(mode="segment")
    data.prepare_data()
    data.setup("fit")
    assert len(data.train_set) == 4


# ---- bad input -------------------------------------------------------------------------------------------------------


def scan_file(root, frame=0):
    return root / "samples" / "LIDAR_TOP" / f"scene-0061-{frame}-0-LIDAR_TOP.pcd.bin"


def segment_set(root):
    data = datamodule(root, mode="segment")
    data.setup("fit")
    return data.train_set


def test_truncated_scan(copy):
    path = scan_file(copy)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(BrokenRecordError, match=r"scene-0061-0-0-LIDAR_TOP\.pcd\.bin: points: 2397 bytes is not a multiple of 20"):
        segment_set(copy)[0]


def test_empty_scan(copy):
    scan_file(copy).write_bytes(b"")
    with pytest.raises(BrokenRecordError, match=r"LIDAR_TOP\.pcd\.bin: points: the scan is empty"):
        segment_set(copy)[0]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_points_that_are_not_finite(copy, value):
    scan = np.fromfile(scan_file(copy), np.float32).reshape(-1, 5)
    scan[7, 1] = value
    scan.tofile(scan_file(copy))
    with pytest.raises(BrokenRecordError, match=r"\.pcd\.bin: points: 1 points hold NaN or infinite values, the first is point 7"):
        segment_set(copy)[0]


def test_a_ring_index_of_nan_is_not_read(copy):
    scan = np.fromfile(scan_file(copy), np.float32).reshape(-1, 5)
    scan[7, 4] = np.nan
    scan.tofile(scan_file(copy))
    assert segment_set(copy)[0]["points"].shape == (120, 4)


def test_missing_scan(copy):
    scan_file(copy).unlink()
    with pytest.raises(MissingFileError, match=r"LIDAR_TOP\.pcd\.bin: points: no such file"):
        segment_set(copy)[0]


def test_labels_of_another_length(copy):
    path = next((copy / "lidarseg" / "v1.0-mini").glob("scene-0061-0-*"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BrokenRecordError, match=r"_lidarseg\.bin: labels: 119 bytes = 119 labels of uint8, but the scan has 120 points"):
        segment_set(copy)[0]


def test_label_out_of_range(copy):
    path = next((copy / "lidarseg" / "v1.0-mini").glob("scene-0061-0-*"))
    path.write_bytes(path.read_bytes()[:5] + b"\x20" + path.read_bytes()[6:])
    with pytest.raises(BrokenRecordError, match=r"_lidarseg\.bin: labels: raw label 32 \(point 5\) is not in the label map"):
        segment_set(copy)[0]


def test_no_labels_in_the_release(copy):
    (copy / "v1.0-mini" / "lidarseg.json").unlink()
    with pytest.raises(MissingFileError, match=r"lidarseg\.json: labels: names no labels of scan scene-0061-0-0-LIDAR_TOP"):
        segment_set(copy)[0]


def test_missing_and_broken_image(copy, tables):
    dataset = pretrain_set(copy, read_tables(copy, "v1.0-mini", 2), cameras=6)
    path = copy / "samples" / "CAM_BACK" / "scene-0061-0-0-CAM_BACK.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(BrokenRecordError, match=r"CAM_BACK\.png: image: can't be decoded"):
        dataset[0]
    path.unlink()
    with pytest.raises(MissingFileError, match=r"CAM_BACK\.png: image: no such file"):
        dataset[0]


def test_broken_jpeg(tmp_path):
    path = tmp_path / "image.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 160, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(BrokenRecordError, match=r"image\.jpg: image: can't be decoded"):
        read_image(path, (45, 80))


def test_jpegs_decoded_at_reduced_size_look_the_same(tmp_path):
    smooth = np.stack([np.add.outer(np.arange(180), np.arange(320)) * 0.5] * 3, axis=-1).astype(np.uint8)
    Image.fromarray(smooth).save(tmp_path / "a.jpg", quality=95)
    Image.fromarray(smooth).save(tmp_path / "a.png")
    jpeg, native = read_image(tmp_path / "a.jpg", (45, 80))
    png, _ = read_image(tmp_path / "a.png", (45, 80))
    assert native == (180, 320)
    assert jpeg.shape == (3, 45, 80)
    assert (jpeg.int() - png.int()).abs().max() < 4


@pytest.mark.parametrize("name", ["sample", "ego_pose", "calibrated_sensor", "sensor", "scene", "sample_data"])
def test_missing_table(copy, name):
    (copy / "v1.0-mini" / f"{name}.json").unlink()
    with pytest.raises(WrongRootError, match=rf"{name}\.json is missing: unpack the metadata archive"):
        read_tables(copy, "v1.0-mini", 2)


@pytest.mark.parametrize(
    ("table", "key"),
    [("sample_data", "ego_pose_token"), ("ego_pose", "rotation"), ("calibrated_sensor", "camera_intrinsic"), ("scene", "name")],
)
def test_missing_key_of_a_row(copy, table, key):
    path = copy / "v1.0-mini" / f"{table}.json"
    rows = json.loads(path.read_text())
    del rows[1][key]
    path.write_text(json.dumps(rows))
    with pytest.raises(BrokenRecordError, match=rf"{table}\.json: row 1: lacks the key '{key}'; it has token"):
        read_tables(copy, "v1.0-mini", 2)


@pytest.mark.parametrize(
    ("table", "key", "message"),
    [
        ("sample_data", "ego_pose_token", r"ego_pose\.json: token: no pose 'nowhere'"),
        ("sample_data", "calibrated_sensor_token", r"sample_data\.json: row 0: calibrated_sensor_token 'nowhere' is in no row"),
        ("sample_data", "sample_token", r"sample_data\.json: row 0: sample_token 'nowhere' is in no row of sample\.json"),
        ("calibrated_sensor", "sensor_token", r"calibrated_sensor\.json: row 0: sensor_token 'nowhere' is in no row of sensor\.json"),
        ("sample", "scene_token", r"sample\.json: sample scene-0061-0: scene_token 'nowhere' is in no row of scene\.json"),
        (
            "calibrated_sensor",
            "rotation",
            r"calibrated_sensor\.json: rotation, translation, camera_intrinsic: expected 4, 3 and 3x3 numbers",
        ),
        ("ego_pose", "translation", r"ego_pose\.json: row 0: rotation and translation must be 4 and 3 numbers"),
    ],
)
def test_rows_that_point_nowhere(copy, table, key, message):
    path = copy / "v1.0-mini" / f"{table}.json"
    rows = json.loads(path.read_text())
    rows[0][key] = "nowhere"
    path.write_text(json.dumps(rows))
    with pytest.raises(BrokenRecordError, match=message):
        read_tables(copy, "v1.0-mini", 2)


def test_truncated_table(copy):
    path = copy / "v1.0-mini" / "ego_pose.json"
    path.write_text(path.read_text()[:-40])
    with pytest.raises(BrokenRecordError, match=r"ego_pose\.json: row \d+: not valid JSON .* truncated or broken"):
        read_tables(copy, "v1.0-mini", 2)


def test_wrong_root_says_what_was_expected(tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(WrongRootError, match=r"holds no v1\.0-trainval/ \(found: images\).*nuscenes\.org.*root=null"):
        NuScenesDataModule(tmp_path, mode="segment").setup("fit")
    with pytest.raises(WrongRootError, match="no such folder"):
        NuScenesDataModule(tmp_path / "nothing", mode="segment").setup("fit")


def test_superpixels_that_do_not_fit(copy):
    dataset = pretrain_set(copy, read_tables(copy, "v1.0-mini", 2), cameras=6)
    path = copy / "superpixels" / "scene-0061-0-0-CAM_FRONT.png"
    Image.fromarray(np.zeros((HEIGHT, WIDTH + 2), np.uint8)).save(path)
    with pytest.raises(
        BrokenRecordError, match=rf"CAM_FRONT\.png: superpixels: is {WIDTH + 2} x {HEIGHT} pixels, its image is {WIDTH} x {HEIGHT}"
    ):
        dataset[0]
    Image.fromarray(np.full((HEIGHT, WIDTH), 17, np.uint8)).save(path)
    with pytest.raises(BrokenRecordError, match=r"CAM_FRONT\.png: superpixels: holds id 17, but num_superpixels=17 allows 0\.\.16"):
        dataset[0]
    path.unlink()
    with pytest.raises(MissingFileError, match=r"CAM_FRONT\.png: superpixels: no such file: give superpixel_root"):
        dataset[0]
    shutil.rmtree(copy / "superpixels")
    with pytest.raises(WrongRootError, match=r"no superpixel folder .*superpixels"):
        datamodule(copy).setup("fit")


def test_broken_samples_are_skipped_and_counted_on_request(copy):
    scan_file(copy, 1).write_bytes(b"")
    scan_file(copy, 3).write_bytes(b"123")
    data = datamodule(copy, mode="segment", on_broken="skip")
    data.setup("fit")
    with pytest.warns(UserWarning, match="sample 1 skipped, the next one takes its place: .*the scan is empty"):
        assert data.train_set[0, 1]["token"] == "scene-0061-2-0-LIDAR_TOP"
    with pytest.warns(UserWarning, match="sample 3 skipped"):
        assert data.train_set[0, 3]["token"] == "scene-0061-0-0-LIDAR_TOP"  # wraps around
    assert data.train_set.num_skipped == 2
    with pytest.warns(UserWarning, match="skipped"):
        assert torch.equal(data.train_set[4, 1]["points"], data.train_set[4, 2]["points"])  # as if it had been asked for
    for frame in (0, 2):
        scan_file(copy, frame).unlink()
    with pytest.raises(BrokenRecordError, match="all 4 samples are broken"), pytest.warns(UserWarning, match="skipped"):
        data.train_set[0]


def test_skipped_samples_of_workers_are_counted(copy):
    scan_file(copy, 1).write_bytes(b"")
    data = datamodule(copy, mode="segment", on_broken="skip", num_workers=1)
    data.setup("fit")
    tokens = [
        token
        for batch in DataLoader(data.train_set, batch_size=2, num_workers=1, collate_fn=data.collate_train)
        for token in batch["token"]
    ]
    assert tokens.count("scene-0061-2-0-LIDAR_TOP") == 2
    assert data.train_set.num_skipped == 1


def evaluated(data, part):
    loader = getattr(data, f"{part}_dataloader")()
    return [token for batch in loader for token in batch["token"]]


def val_scan(root, frame):
    return root / "samples" / "LIDAR_TOP" / f"scene-0103-{frame}-0-LIDAR_TOP.pcd.bin"


@pytest.mark.parametrize(("mode", "missing"), [("segment", (2, 3)), ("pretrain", (3,))])  # the neighbour of 2 is missing, too
def test_broken_samples_are_left_out_of_evaluations(copy, mode, missing):
    for frame in missing:
        val_scan(copy, frame).unlink()
    data = datamodule(copy, mode=mode, on_broken="skip")
    with pytest.warns(UserWarning, match="2 of 4 samples of (val|test|predict) are broken and left out: .*no such file"):
        data.setup()
    expected = [f"scene-0103-{frame}-0-LIDAR_TOP" for frame in (0, 1)]
    for part in ("val", "test", "predict"):
        assert evaluated(data, part) == expected
        dataset = getattr(data, f"{part}_set")
        assert (len(dataset), dataset.num_skipped) == (2, 2)
        assert [dataset[index]["token"] for index in (0, 1, -1)] == [*expected, expected[-1]]
    assert len(data.train_set) == 4
    for frame in range(4):
        val_scan(copy, frame).write_bytes(b"")
    with pytest.raises(BrokenRecordError, match=r"all 4 samples of val are broken: .*the scan is empty"):
        data.setup("validate")


def left_out_on_two_ranks(root):
    data = datamodule(root, mode="segment", on_broken="skip", batch_size=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data.setup("validate")
    return data.val_set.kept.tolist(), data.val_set.num_skipped, evaluated(data, "val")


@pytest.mark.thorough
def test_ranks_leave_out_the_same_samples(copy):
    for frame in (0, 2):  # the first rank reads both
        val_scan(copy, frame).write_bytes(b"")
    one, other = run_two_processes(left_out_on_two_ranks, copy)
    assert one[:2] == other[:2] == ([1, 3], 2)
    assert one[2] + other[2] == [f"scene-0103-{frame}-0-LIDAR_TOP" for frame in (1, 3)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "detect"}, "mode is 'detect': give one of pretrain, segment, semi_supervised"),
        ({"cameras": 7}, r"cameras is 7: .* in \[1, 6\]"),
        ({"frames": 4}, "frames is 4: give one of 1, 2, 3"),
        ({"num_sweeps": -1}, r"num_sweeps is -1: .* in \[0, inf\)"),
        ({"label_fraction": 3}, "label_fraction=3 is not one of"),
        ({"neighbours": -1}, "neighbours is -1: give scans before and after"),
        ({"on_broken": "ignore"}, "on_broken is 'ignore': give one of error, skip"),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        NuScenesDataModule(**options)


def test_a_split_without_scenes(copy):
    (copy / "splits.json").write_text(json.dumps({"train": ["scene-0061"], "val": []}))
    data = datamodule(copy, mode="segment")
    data.setup("fit")
    with pytest.warns(UserWarning, match="no frame of the val split in this root: val is left out"):
        assert data.val_dataloader() == []
    (copy / "splits.json").write_text(json.dumps({"train": [], "val": ["scene-0061"]}))
    with pytest.raises(WrongRootError, match="no frame of the training split"):
        datamodule(copy, mode="segment").setup("fit")
    with pytest.raises(WrongRootError, match="no scene of 'slidr600'"):
        datamodule(copy).setup("fit")


# ---- real data -------------------------------------------------------------------------------------------------------

real = pytest.mark.skipif("LIT_METHODS_TEST_DATA" not in os.environ, reason="LIT_METHODS_TEST_DATA is not set: no real data")


def real_folder(name):
    path = Path(os.environ["LIT_METHODS_TEST_DATA"]) / name
    if not path.is_dir():
        pytest.skip(f"{path} is missing")
    return path


@real
def test_a_real_frame_lines_up_with_its_cameras():
    """Projecting through the tables' four poses must agree with the info file's own LiDAR-to-camera matrices."""
    root = real_folder("nuscenes_frame")
    tables = read_tables(root, "v1.0-mini", num_sweeps=2)
    assert (len(tables), tables.scene_names) == (1, ("scene-0061",))
    points = read_points(tables.path(tables.lidar[0]), 5)
    assert points.shape == (34688, 4)
    rows, pixels = project_into_cameras(tables, points, int(tables.lidar[0]), tables.cameras[0].tolist(), (900, 1600))
    info = json.loads((root / "nuscenes_infos_mini.json").read_text())
    images = (info["data_list"] if isinstance(info, dict) else info)[0]["images"]
    for camera, name in enumerate(CAMERAS):
        chosen = pixels[:, 0] == camera
        assert 2500 < int(chosen.sum()) < 6000
        lidar_to_camera, intrinsic = np.array(images[name]["lidar2cam"]), np.array(images[name]["cam2img"])[:3, :3]
        seen = points[rows[chosen], :3].double().numpy() @ lidar_to_camera[:3, :3].T + lidar_to_camera[:3, 3]
        uv = seen @ intrinsic.T
        uv = uv[:, :2] / uv[:, 2:]
        assert np.abs(uv - pixels[chosen][:, 1:].flip(1).numpy()).max() < 0.6


@real
def test_a_real_frame_as_a_pretraining_sample(tmp_path):
    root = real_folder("nuscenes_frame")
    tables = read_tables(root, "v1.0-mini", num_sweeps=2)
    for record in tables.cameras[0]:
        Image.fromarray(np.full((900, 1600), 3, np.uint8)).save(tmp_path / f"{tables.token[record].decode()}.png")
    sample = NuScenesPretrainDataset(tables, [0], superpixel_root=tmp_path, augment=False)[0]
    assert sample["cur"]["images"].shape == (3, 3, 224, 448)
    assert 0.2 < sample["cur"]["images"].mean() < 0.6
    assert torch.equal(sample["prev"]["points"], sample["next"]["points"])  # one key frame only
    assert sample["cur"]["pairing_images"].max(dim=0).values.tolist()[1:] <= [223, 447]


@real
def test_real_lidarseg_labels(tmp_path):
    """Eight real scans with labels; poses and calibrations, which that set lacks, are filled in as identities."""
    source = real_folder("nuscenes_lidarseg_seq")
    root = tmp_path / "release"
    shutil.copytree(source / "v1.0-mini", root / "v1.0-mini")
    for name in ("samples", "lidarseg"):
        (root / name).symlink_to(source / name)

    def table(name, change=None, rows=None):
        path = root / "v1.0-mini" / f"{name}.json"
        rows = json.loads(path.read_text()) if rows is None else rows
        path.write_text(json.dumps([row | change(k) if change else row for k, row in enumerate(rows)]))

    still = {"rotation": [1, 0, 0, 0], "translation": [0, 0, 0], "camera_intrinsic": []}
    table("sample", lambda k: {"timestamp": k})
    table("sample_data", lambda k: {"timestamp": k, "ego_pose_token": "e", "calibrated_sensor_token": "c"})
    table("scene", rows=[{"token": json.loads((root / "v1.0-mini" / "sample.json").read_text())[0]["scene_token"], "name": "scene-0103"}])
    table("ego_pose", rows=[{"token": "e", **still}])
    table("calibrated_sensor", rows=[{"token": "c", "sensor_token": "s", **still}])
    table("sensor", rows=[{"token": "s", "channel": "LIDAR_TOP"}])
    frames = NuScenesFrames(read_tables(root, "v1.0-mini", 2))
    counts = torch.zeros(17, dtype=torch.long)
    for frame in range(8):
        points = frames.points(frame)
        assert 30_000 < len(points) < 40_000
        labels = frames.labels(frame, len(points))
        counts += torch.bincount(labels, minlength=17)
        road = points[labels == 10, 2]
        assert -2.5 < road.median() < -1.2  # driveable surface lies the mounting height below the sensor
    assert counts[10] > 50_000
    assert (counts > 0).sum() >= 8
