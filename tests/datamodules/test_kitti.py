"""The KITTI-style reader: label maps, poses, sequences of one's own, real snippets; and the robustness metrics."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from lit_methods.catalog import configs_folder
from lit_methods.datamodules import KittiStyleDataModule
from lit_methods.datamodules.driving.fake import lidar_pose, sequences
from lit_methods.datamodules.driving.kitti import KittiFrames, read_calibration, read_label_map
from lit_methods.datamodules.driving.robustness import corruption_error, mce, mrr, resilience_rate
from lit_methods.datamodules.errors import BrokenRecordError, MissingFileError, WrongRootError

SHIPPED = ("semantickitti", "scribblekitti", "semanticposs", "semanticstf", "synlidar", "rellis3d", "daps3d", "synth4d")


@pytest.fixture
def root(tmp_path):
    sequences(tmp_path / "sequences")
    return tmp_path


def datamodule(root, **options):
    return KittiStyleDataModule(root, **({"train_sequences": ["00"], "batch_size": 2} | options))


# ---- label maps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dataset", "classes"),
    [
        ("semantickitti", 19),
        ("scribblekitti", 19),
        ("semanticposs", 13),
        ("semanticstf", 19),
        ("synlidar", 32),
        ("rellis3d", 14),
        ("daps3d", 4),
        ("synth4d", 7),
    ],
)
def test_shipped_label_maps(dataset, classes):
    label_map = read_label_map(dataset)
    assert len(label_map.classes) == classes
    known = label_map.table[label_map.table >= 0]
    assert set(known.tolist()) == set(range(classes + 1))  # every class and the ignored one occur
    assert not set(label_map.splits["train"]) & set(label_map.splits["val"])


def test_every_shipped_map_is_tested():
    assert sorted(path.stem for path in (configs_folder() / "label_maps").glob("*.yaml")) == sorted(SHIPPED)


def test_semantickitti_learning_map():
    table = read_label_map("semantickitti").table
    official = {10: 1, 252: 1, 11: 2, 15: 3, 18: 4, 258: 4, 13: 5, 16: 5, 20: 5, 256: 5, 257: 5, 259: 5, 30: 6, 254: 6, 31: 7, 253: 7,
    32: 8, 255: 8, 40: 9, 60: 9,
                44: 10, 48: 11, 49: 12, 50: 13, 51: 14, 70: 15, 71: 16, 72: 17, 80: 18, 81: 19}  # fmt: skip
    assert {raw: int(table[raw]) + 1 for raw in official} == official
    assert [int(table[raw]) for raw in (0, 1, 52, 99)] == [19] * 4
    assert (table >= 0).sum() == len(official) + 4


def test_a_label_map_of_ones_own(root, tmp_path):
    content = yaml.safe_load((configs_folder() / "label_maps" / "semantickitti.yaml").read_text())
    content |= {"classes": {"car": [10], "rest": [40, 50]}, "ignored": [0, 252]}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    data = datamodule(root, dataset=str(path))
    data.setup("fit")
    assert data.class_names == ("car", "rest")
    assert data.train_set[0]["labels"].shape == (50,)
    for change, message in (
        ({"colums": 4}, r"mine\.yaml: keys: missing: none, unknown: \['colums'\]"),
        ({"ignored": [10]}, r"mine\.yaml: values: raw label 10 is mapped to class 0 and to class 2"),
        ({"poses": "gps"}, r"mine\.yaml: values: poses is 'gps', expected camera, lidar or none"),
    ):
        path.write_text(yaml.safe_dump(content | change))
        with pytest.raises(BrokenRecordError, match=message):
            read_label_map(path)
    with pytest.raises(ValueError, match=r"dataset='kittti' is neither a shipped label map .*semantickitti"):
        read_label_map("kittti")


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_batches_and_labels(root):
    data = datamodule(root)
    data.setup(None)
    batch = next(iter(data.val_dataloader()))
    assert batch["token"] == ["08/000000", "08/000001"]
    assert batch["points_per_sample"].tolist() == [50, 50]
    assert batch["labels"].tolist() == [0, 0, 8, 12, 19] * 20  # instance bits are cut off, 0 is ignored
    assert (data.num_classes, data.ignore_index) == (19, 19)
    assert (len(data.train_set), len(data.val_set), len(data.test_set), len(data.predict_set)) == (4, 4, 4, 4)
    assert "labels" not in data.predict_set[0]


def test_neighbours_through_camera_poses(root):
    data = datamodule(root, neighbours=2)
    data.setup("fit")
    batch = data.collate_train([data.train_set[5, 0], data.train_set[5, 2]])
    assert [cloud["present"].tolist() for cloud in batch["neighbours"]] == [[False, True], [False, True], [True, True], [True, False]]
    current = batch["points"][50:, :3]
    for cloud in batch["neighbours"][:3]:
        points, matrix = cloud["points"][-50:, :3], cloud["to_current"][1]
        moved = points.double() @ matrix[:3, :3].T + matrix[:3, 3]
        torch.testing.assert_close(moved.float(), current, atol=1e-4, rtol=0)


def test_neighbours_in_lidar_poses(root, tmp_path):
    """A map with poses: lidar takes poses.txt as it is."""
    content = yaml.safe_load((configs_folder() / "label_maps" / "semantickitti.yaml").read_text()) | {"poses": "lidar"}
    (tmp_path / "lidar.yaml").write_text(yaml.safe_dump(content))
    for sequence in ("00", "08"):
        lines = [" ".join(map(str, lidar_pose(k)[:3].ravel())) for k in range(4)]
        (root / "sequences" / sequence / "poses.txt").write_text("\n".join(lines))
        (root / "sequences" / sequence / "calib.txt").unlink()
    data = datamodule(root, dataset=str(tmp_path / "lidar.yaml"), neighbours=1)
    data.setup("validate")
    sample = data.val_set[1]
    matrix = sample["neighbours"][0]["to_current"]
    moved = sample["neighbours"][0]["points"][:, :3].double() @ matrix[:3, :3].T + matrix[:3, 3]
    torch.testing.assert_close(moved.float(), sample["points"][:, :3], atol=1e-4, rtol=0)


def test_broken_scans_are_left_out_of_evaluations(root):
    (root / "sequences" / "08" / "velodyne" / "000001.bin").write_bytes(b"123")
    data = datamodule(root, on_broken="skip")
    with pytest.warns(UserWarning, match=r"1 of 4 samples of (val|test|predict) are broken and left out: .*000001\.bin"):
        data.setup()
    for loader in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        assert [token for batch in loader for token in batch["token"]] == ["08/000000", "08/000002", "08/000003"]
    strict = datamodule(root)
    strict.setup("test")
    with pytest.raises(BrokenRecordError, match=r"000001\.bin"):
        list(strict.test_dataloader())


def test_scribbles_train_and_full_labels_validate(root):
    scribbles = root / "sequences" / "00" / "scribbles"
    scribbles.mkdir()
    for k in range(4):
        np.zeros(50, np.uint32).tofile(scribbles / f"{k:06d}.label")
    data = datamodule(root, dataset="scribblekitti")
    data.setup("fit")
    assert set(data.train_set[0]["labels"].tolist()) == {19}
    assert set(data.val_set[0]["labels"].tolist()) == {0, 8, 12, 19}


def test_label_fraction_and_semi_supervised(root):
    data = datamodule(root, mode="semi_supervised", label_fraction=25, neighbours=1)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert set(batch["labelled"]["token"]) == {"00/000000"}
    assert set(batch["unlabelled"]["token"]) <= {"00/000001", "00/000002", "00/000003"}
    assert "labels" not in batch["unlabelled"]
    assert len(batch["unlabelled"]["neighbours"]) == 2


def test_split_files(tmp_path):
    """RELLIS-3D in its released layout: sequence folders in the root, a split by frame."""
    sequences(
        tmp_path, ("00000", "00001"), scans="os1_cloud_node_kitti_bin", labels=["os1_cloud_node_semantickitti_label_id"], poses="none"
    )
    for path in tmp_path.rglob("*.label"):
        np.full(50, 19, np.uint32).tofile(path)
    for split, frames in {"train": (("00000", 2), ("00001", 0)), "val": (("00001", 3),)}.items():
        lines = [f"{s}/os1_cloud_node_kitti_bin/{k:06d}.bin {s}/os1_cloud_node_semantickitti_label_id/{k:06d}.label" for s, k in frames]
        (tmp_path / f"pt_{split}.lst").write_text("\n".join(lines) + "\n")
    data = KittiStyleDataModule(tmp_path, dataset="rellis3d")
    data.setup("fit")
    assert [data.train_set[k]["token"] for k in range(2)] == ["00000/000002", "00001/000000"]
    assert data.val_set[0]["token"] == "00001/000003"
    assert set(data.val_set[0]["labels"].tolist()) == {8}  # bush
    (tmp_path / "pt_val.lst").write_text("00001/os1_cloud_node_kitti_bin/000009.bin x\n")
    with pytest.raises(BrokenRecordError, match=r"pt_val\.lst: line 1: names scan 00001/000009, which isn't in"):
        data.setup("validate")
    (tmp_path / "pt_val.lst").unlink()
    with pytest.raises(MissingFileError, match=r"pt_val\.lst: split: no such file.*val_sequences"):
        data.setup("validate")


def test_five_columns_and_folders_named_after_splits(tmp_path):
    sequences(tmp_path, ("train", "val"), columns=5, poses="none")
    for path in tmp_path.rglob("*.label"):
        np.full(50, 20, np.uint32).tofile(path)
    data = KittiStyleDataModule(tmp_path, dataset="semanticstf")
    data.setup("fit")
    assert data.train_set[0]["points"].shape == (50, 4)
    assert set(data.train_set[0]["labels"].tolist()) == {19}
    with pytest.raises(MissingFileError, match="SemanticSTF is read without poses: set neighbours=0"):
        KittiStyleDataModule(tmp_path, dataset="semanticstf", neighbours=1).setup("fit")


def test_npy_scans(tmp_path):
    for town in ("Town03", "Town10HD"):
        for name, array in (("velodyne", np.ones((6, 4))), ("labels", np.array([[1], [4], [7], [6], [10], [3]]))):
            (tmp_path / "kitti_synth" / town / name).mkdir(parents=True)
            np.save(tmp_path / "kitti_synth" / town / name / "000000.npy", array)
    data = KittiStyleDataModule(tmp_path, dataset="synth4d", train_sequences=["Town03"])
    data.setup("fit")
    assert data.train_set[0]["points"].dtype == torch.float32
    assert data.train_set[0]["labels"].tolist() == [5, 1, 2, 2, 0, 7]
    np.save(tmp_path / "kitti_synth" / "Town03" / "velodyne" / "000000.npy", np.ones((6, 3)))
    with pytest.raises(BrokenRecordError, match=r"000000\.npy: points: expected an array \(n, 4\), got \(6, 3\)"):
        data.train_set[0]


def test_predictions_are_written_as_raw_ids(root, tmp_path):
    data = datamodule(root)
    labels = torch.arange(19)
    path = data.write_labels("08/000003", labels, tmp_path / "out")
    assert path == tmp_path / "out" / "sequences" / "08" / "predictions" / "000003.label"
    raw = np.fromfile(path, np.uint32)
    assert raw.tolist() == [10, 11, 15, 18, 20, 30, 31, 32, 40, 44, 48, 49, 50, 51, 70, 71, 72, 80, 81]
    assert data.label_map.table[raw].tolist() == labels.tolist()
    with pytest.raises(ValueError, match=r"predictions of 08/000003 hold ids 19\.\.19"):
        data.write_labels("08/000003", torch.tensor([19]), tmp_path)


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_no_root_and_wrong_root(tmp_path):
    with pytest.raises(ValueError, match=r"root=null: KittiStyleDataModule has no built-in sample.*NuScenesDataModule"):
        KittiStyleDataModule()
    (tmp_path / "kitti").mkdir()
    with pytest.raises(WrongRootError, match=r"holds no sequences/ \(found: kitti\)\. SemanticKITTI is to be had from http"):
        KittiStyleDataModule(tmp_path).setup("fit")


def test_missing_sequence(root):
    with pytest.raises(
        WrongRootError, match=r"sequence 01 of SemanticKITTI is not in .*sequences: expected .*01/velodyne.*train_sequences"
    ):
        KittiStyleDataModule(root).setup("fit")


def test_unknown_label_and_length(root):
    path = root / "sequences" / "00" / "labels" / "000000.label"
    np.full(50, 12, np.uint32).tofile(path)
    data = datamodule(root)
    data.setup("fit")
    with pytest.raises(BrokenRecordError, match=r"000000\.label: labels: raw label 12 \(point 0\) is not in the label map"):
        data.train_set[0]
    np.full(49, 10, np.uint32).tofile(path)
    with pytest.raises(BrokenRecordError, match=r"000000\.label: labels: 196 bytes = 49 labels of uint32, but the scan has 50 points"):
        data.train_set[0]
    path.unlink()
    with pytest.raises(MissingFileError, match=r"000000\.label: labels: no such file"):
        data.train_set[0]


def test_broken_poses_and_calibration(root):
    folder = root / "sequences" / "00"
    poses, calibration = (folder / "poses.txt").read_text(), (folder / "calib.txt").read_text()
    for file, content, message in (
        ("poses.txt", "1 2 3\n" + poses, r"poses\.txt: line 1: expected 12 numbers"),
        ("poses.txt", "\n".join(poses.splitlines()[:3]), r"poses\.txt: poses: has 3 lines, but scan 000003 exists"),
        ("poses.txt", poses.replace(poses.split()[0], "nan", 1), r"poses\.txt: poses: holds NaN"),
        ("calib.txt", "P0: 1 2 3\n", r"calib\.txt: Tr: no such line; it has P0"),
        ("calib.txt", "Tr: 1 2 3\n", r"calib\.txt: Tr: expected 12 numbers"),
        ("poses.txt", None, r"poses\.txt: poses: no such file.*neighbours=0"),
        ("calib.txt", None, r"calib\.txt: Tr: no such file"),
    ):
        (folder / "poses.txt").write_text(poses)
        (folder / "calib.txt").write_text(calibration)
        if content is None:
            (folder / file).unlink()
        else:
            (folder / file).write_text(content)
        with pytest.raises(BrokenRecordError, match=message):
            datamodule(root, neighbours=1).setup("fit")
    datamodule(root).setup("fit")  # without neighbours neither file is needed


# ---- real data -------------------------------------------------------------------------------------------------------

real = pytest.mark.skipif("LIT_METHODS_TEST_DATA" not in os.environ, reason="LIT_METHODS_TEST_DATA is not set: no real data")


def real_folder(*parts):
    path = Path(os.environ["LIT_METHODS_TEST_DATA"]).joinpath(*parts)
    if not path.is_dir():
        pytest.skip(f"{path} is missing")
    return path


@real
def test_real_kitti_scans_and_calibration():
    root = real_folder("kitti_odometry")
    frames = KittiFrames(root, read_label_map("semantickitti"), ["00"], ["labels"], with_poses=False)
    assert [frames.token(k) for k in range(len(frames))] == ["00/000001", "00/000002"]
    first, second = frames.points(0), frames.points(1)
    assert min(len(first), len(second)) > 100_000
    assert -2.2 < first[:, 2].median() < -0.5
    tr = read_calibration(root / "sequences" / "00" / "calib.txt")
    ahead = tr[:3, :3] @ np.array([1.0, 0, 0])
    assert ahead[2] > 0.999  # the LiDAR's x is the camera's viewing direction
    assert abs(np.linalg.det(tr[:3, :3]) - 1) < 1e-4


@real
def test_real_rellis_frame():
    root = real_folder("rellis3d_frame")
    data = KittiStyleDataModule(root, dataset="rellis3d", train_sequences=["00"], val_sequences=["00"])
    data.setup("fit")
    sample = data.val_set[0]
    assert sample["points"].shape == (131072, 4)
    seen = torch.bincount(sample["labels"], minlength=15)
    names = {name for name, count in zip((*data.class_names, "ignored"), seen.tolist(), strict=True) if count}
    assert names == {"grass", "tree", "person", "fence", "bush", "concrete", "puddle", "mud", "ignored"}


@real
def test_real_semantickitti_snippet():
    root = real_folder("mmdet3d_snippets", "semantickitti")
    data = KittiStyleDataModule(root, train_sequences=["00"], val_sequences=["00"])
    data.setup("fit")
    sample = data.val_set[0]
    assert len(sample["points"]) == len(sample["labels"]) > 40
    raw = np.fromfile(root / "sequences/00/labels/000000.label", np.uint32) & 0xFFFF
    assert set(raw.tolist()) == {0, 50, 52, 70, 71, 80}
    assert (sample["labels"] == 14).tolist() == (raw == 70).tolist()
    assert (sample["labels"] == 19).tolist() == np.isin(raw, [0, 52]).tolist()


# ---- robustness ------------------------------------------------------------------------------------------------------


def test_robustness_by_hand():
    miou = torch.tensor([[0.6, 0.5, 0.4], [0.9, 0.8, 0.7]])
    baseline = torch.tensor([[0.5, 0.4, 0.3], [0.8, 0.7, 0.6]])
    torch.testing.assert_close(corruption_error(miou, baseline), torch.tensor([150 / 1.8, 60 / 0.9]))
    torch.testing.assert_close(mce(miou, baseline), torch.tensor(75.0))
    torch.testing.assert_close(resilience_rate(miou, 0.8), torch.tensor([150 / 2.4, 240 / 2.4]))
    torch.testing.assert_close(mrr(miou, 0.8), torch.tensor(81.25))
    torch.testing.assert_close(mce(baseline, baseline), torch.tensor(100.0))


def test_robustness_refuses_percents_and_shapes():
    good = torch.full((8, 3), 0.5)
    for call, message in (
        (lambda: mce(good * 100, good), r"miou holds values outside \[0, 1\]"),
        (lambda: mce(good, good[:4]), r"must both be \(corruptions, levels\)"),
        (lambda: mce(good, torch.ones(8, 3)), "the baseline makes no error under corruption 0"),
        (lambda: mrr(good, 50.0), r"clean=50\.0 must lie in \(0, 1\]"),
        (lambda: mrr(good[0], 0.5), r"miou must be \(corruptions, levels\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
